//! Programs whose UNIX sockets are connected to others, in the tree and outside. Mostly the tests are the
//! programs outside.
//!
//! All of it needs root.

mod common;

use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    process::{Command, Output},
    time::Duration,
};

use common::{
    Cap,
    live::{Live, directory, wait_for},
    require,
};
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::socket::{getsockopt, sockopt::PeerCredentials},
};

/// Connects to the socket `server`, and answers once the file `go` is there.
const CLIENT: &str = "import os, socket, time\n\
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)\n\
    s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 40000)\n\
    s.connect('server')\n\
    open('inode', 'w').write(str(os.fstat(s.fileno()).st_ino))\n\
    os.rename('inode', 'ready')\n\
    while not os.path.exists('go'): time.sleep(0.01)\n\
    size = s.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)\n\
    s.sendall(b'%d' % size)\n\
    open('new', 'wb').write(s.recv(100))\n\
    os.rename('new', 'answer')\n\
    time.sleep(1000)\n";

/// A client in the tree, and its server outside.
struct Connected {
    live: Live,
    listener: UnixListener,
    /// The server's end.
    end: UnixStream,
    /// The inode of the client's end.
    inode: u32,
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Returns the error of a command that must fail.
fn failed(output: &Output) -> String {
    assert!(!output.status.success(), "it succeeded: {}", words(output));
    words(output)
}

fn patient(stream: &UnixStream) {
    let patience = Duration::from_secs(20) * common::slowness();
    stream.set_read_timeout(Some(patience)).unwrap();
}

impl Connected {
    fn new() -> Self {
        require(Cap::Ptrace);
        let dir = directory();
        let listener = UnixListener::bind(dir.path().join("server")).unwrap();
        let live = Live::program("/usr/bin/python3", &["-c", CLIENT], dir);
        let (end, _) = listener.accept().unwrap();
        patient(&end);
        let ready = live.path("ready");
        wait_for("the client", || ready.exists());
        let inode = fs::read_to_string(ready).unwrap().parse().unwrap();
        Self { live, listener, end, inode }
    }

    fn external(&self) -> String {
        format!("unix[{}]", self.inode)
    }

    /// The client is served at `end`, and has its options.
    fn is_served(&self, mut end: UnixStream) {
        patient(&end);
        fs::write(self.live.path("go"), "").unwrap();
        let mut size = [0; 5];
        end.read_exact(&mut size).unwrap();
        assert_eq!(&size, b"80000");
        end.write_all(b"answer").unwrap();
        let answer = self.live.path("answer");
        wait_for("the answer", || answer.exists());
        assert_eq!(fs::read(answer).unwrap(), b"answer");
    }
}

#[test]
fn privileged_a_stream_to_another_program_is_refused_by_its_pid_and_name() {
    let mut client = Connected::new();
    let said = failed(&client.live.try_dump(&["--ext-unix-sk"]));
    let own = std::process::id();
    let own = format!("is not open in the tree, but in process {own} (");
    assert!(
        said.contains(&own) && said.contains("help: ") && said.contains("--external"),
        "{said}"
    );
    client.is_served(client.end.try_clone().unwrap());
}

#[test]
fn privileged_a_stream_is_connected_to_its_listener_again() {
    let mut client = Connected::new();
    let external = client.external();
    client.live.dump(&["--external", &external]);
    assert_eq!(client.end.read(&mut [0]).unwrap(), 0, "the old connection is closed");
    let said = failed(&client.live.try_restore(&[]));
    assert!(said.contains("--ext-unix-sk"), "{said}");
    client.live.restore(&["--ext-unix-sk"]);
    let log = fs::read_to_string(client.live.images().join("restore.log")).unwrap();
    assert!(log.contains("the program there sees a new connection"), "{log}");
    let (end, _) = client.listener.accept().unwrap();
    let peer = getsockopt(&end, PeerCredentials).unwrap();
    assert_eq!(peer.pid(), client.live.root.as_raw());
    client.is_served(end);
}

#[test]
fn privileged_a_stream_without_its_listener_is_refused_and_said() {
    let mut client = Connected::new();
    let external = client.external();
    client.live.dump(&["--external", &external]);
    let name = client.live.path("server");
    let moved = client.live.path("moved");
    fs::rename(&name, &moved).unwrap();
    let said = failed(&client.live.try_restore(&["-x"]));
    assert!(
        said.contains("server, to which it was connected") && said.contains("help: "),
        "{said}"
    );
    fs::rename(&moved, &name).unwrap();
    client.live.restore(&["-x"]);
    let (end, _) = client.listener.accept().unwrap();
    client.is_served(end);
}

/// A new connection loses data that the client has not read, with a warning.
#[test]
fn privileged_a_stream_takes_a_socket_of_the_caller() {
    let mut client = Connected::new();
    client.end.write_all(b"unread").unwrap();
    let external = client.external();
    client.live.dump(&["--external", &external]);
    let (theirs, ours) = UnixStream::pair().unwrap();
    // The restore inherits it.
    let given = fcntl(&ours, FcntlArg::F_DUPFD(700)).unwrap();
    let key = format!("fd[{given}]:socket:[{}]", client.inode);
    client.live.restore(&["--inherit-fd", &key]);
    nix::unistd::close(given).unwrap();
    drop(ours);
    let log = fs::read_to_string(client.live.images().join("restore.log")).unwrap();
    assert!(log.contains("6 bytes that its process has not read are lost"), "{log}");
    client.is_served(theirs);
}

#[test]
fn privileged_an_inherited_descriptor_of_another_kind_is_refused() {
    let mut client = Connected::new();
    let external = client.external();
    client.live.dump(&["--external", &external]);
    let (_end, other) = nix::unistd::pipe().unwrap();
    for other in [other, std::net::TcpListener::bind("127.0.0.1:0").unwrap().into()] {
        let other: OwnedFd = other;
        let given = fcntl(&other, FcntlArg::F_DUPFD(700)).unwrap();
        let key = format!("fd[{given}]:socket:[{}]", client.inode);
        let said = failed(&client.live.try_restore(&["--inherit-fd", &key]));
        nix::unistd::close(given).unwrap();
        assert!(said.contains("is not a UNIX stream socket"), "{said}");
        assert!(other.as_raw_fd() >= 0);
    }
}

/// A listening socket that another program has made for the tree (`sd_listen_fds(3)`).
#[test]
fn privileged_a_listening_socket_is_inherited() {
    require(Cap::Ptrace);
    let script = "import os, socket, time\n\
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)\n\
        s.bind('server'); s.listen(3)\n\
        open('inode', 'w').write(str(os.fstat(s.fileno()).st_ino))\n\
        os.rename('inode', 'ready')\n\
        while True:\n\
        \tend = s.accept()[0]\n\
        \tend.sendall(b'hello')\n";
    let mut live = Live::program("/usr/bin/python3", &["-c", script], directory());
    let ready = live.path("ready");
    wait_for("the server", || ready.exists());
    let inode = fs::read_to_string(ready).unwrap();
    live.dump(&[]);
    let name = live.path("elsewhere");
    let listener = UnixListener::bind(&name).unwrap();
    let given = fcntl(&listener, FcntlArg::F_DUPFD(700)).unwrap();
    live.restore(&["--inherit-fd", &format!("fd[{given}]:socket:[{inode}]")]);
    nix::unistd::close(given).unwrap();
    drop(listener);
    let mut end = UnixStream::connect(name).unwrap();
    patient(&end);
    let mut hello = [0; 5];
    end.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
}

/// An agent that keeps keys in locked memory, which its clients find by its socket.
#[test]
fn privileged_an_agent_has_its_keys_still() {
    require(Cap::Ptrace);
    require(Cap::Program("ssh-agent"));
    let dir = directory();
    let run = |command: &str, arguments: &[&str], at: &std::path::Path| {
        let mut command = Command::new(command);
        let output = command.args(arguments).current_dir(at).env("SSH_AUTH_SOCK", "agent").output();
        let output = output.unwrap();
        assert!(output.status.success(), "{command:?}: {}", words(&output));
        output.stdout
    };
    let path = dir.path().join("agent");
    let mut live = Live::program("ssh-agent", &["-D", "-a", path.to_str().unwrap()], dir);
    wait_for("the agent", || path.exists());
    run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", "key"], live.dir.path());
    run("ssh-add", &["-q", "key"], live.dir.path());
    let before = run("ssh-add", &["-l"], live.dir.path());
    live.dump(&[]);
    live.restore(&[]);
    assert_eq!(run("ssh-add", &["-l"], live.dir.path()), before);
}

/// A bus with a client, both in the tree: the bus asks for the credentials of its clients.
#[test]
fn privileged_a_bus_answers_its_client() {
    require(Cap::Ptrace);
    require(Cap::Program("dbus-daemon"));
    require(Cap::Program("python3"));
    let client = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/programs/bus.py");
    let script = format!(
        "dbus-daemon --session --nofork --nopidfile --address=unix:path=$PWD/bus & \
         /usr/bin/python3 {client} & wait"
    );
    let mut live = Live::program("/bin/bash", &["-c", &script], directory());
    let ready = live.path("ready");
    wait_for("the client of the bus", || ready.exists());
    // A program outside gets the id of the same bus before and after.
    let id = |live: &Live| {
        let mut other = UnixStream::connect(live.path("bus")).unwrap();
        patient(&other);
        other.write_all(b"\0AUTH\r\n").unwrap();
        let mut answer = [0; 8];
        other.read_exact(&mut answer).unwrap();
        answer
    };
    assert_eq!(&id(&live), b"REJECTED");
    live.dump(&[]);
    live.restore(&[]);
    fs::write(live.path("go"), "").unwrap();
    let answer = live.path("answer");
    wait_for("the answer of the bus", || answer.exists());
    let found = fs::read(answer).unwrap();
    // A reply with the id of the bus, 32 digits, at its end.
    let digits = found.len().saturating_sub(33)..found.len().saturating_sub(1);
    assert!(found[digits].iter().all(u8::is_ascii_hexdigit), "{found:?}");
    assert_eq!(&id(&live), b"REJECTED");
}
