//! Common servers and network programs, with clients that stay connected during a dump that leaves
//! the tree running, a dump that kills it, and a restore from a mount of both.
//!
//! The clients lose nothing and notice nothing but a pause. All of it needs root.

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
};

use common::{
    Cap,
    live::{Live, directory, wait_for},
    net::{PATIENCE, connect, port},
    require,
};
use nix::sys::signal::{Signal, kill};

/// Debian's own Python: the first one in the search path may be a script of a version manager.
const PYTHON: &str = "/usr/bin/python3";

const ESTABLISHED: &str = "--tcp-established";

fn needs(program: &'static str) {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    require(Cap::Program(program));
}

/// Dumps a tree and leaves it running, dumps and kills it, and restores it from a mount of the chain of
/// both. Calls `go_on` whenever the tree runs: three times.
fn ordeal(live: &mut Live, mut go_on: impl FnMut(&mut Live)) {
    go_on(live);
    live.through_a_chain(&[ESTABLISHED], &mut go_on);
    go_on(live);
}

/// Starts a server that writes its port to a file when it listens.
fn server(program: &str, arguments: &[&str], dir: tempfile::TempDir) -> (Live, u16) {
    let told = dir.path().join("port");
    let words = [arguments, &[told.to_str().unwrap()]].concat();
    let live = Live::program(program, &words, dir);
    wait_for("the server", || told.exists());
    let port = fs::read_to_string(told).unwrap().trim().parse().unwrap();
    (live, port)
}

/// A connection to a server of ours: it answers each message with its number on the connection, and
/// sends `tick N` every few milliseconds.
trait Connection {
    fn send(&mut self, text: &str);
    fn receive(&mut self) -> String;
}

/// Messages are lines.
struct Lines(BufReader<TcpStream>);

impl Connection for Lines {
    fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(format!("{text}\n").as_bytes()).unwrap();
    }

    fn receive(&mut self) -> String {
        let mut line = String::new();
        assert!(self.0.read_line(&mut line).unwrap() > 0, "the server has closed the connection");
        line.truncate(line.trim_end().len());
        line
    }
}

/// A client that counts the messages that it receives.
struct Client<C> {
    connection: C,
    sent: usize,
    ticks: Option<usize>,
}

impl<C: Connection> Client<C> {
    fn new(connection: C) -> Self {
        Self { connection, sent: 0, ticks: None }
    }

    /// Sends messages and expects the answers, with all ticks in between and none left out.
    fn talk(&mut self, messages: usize) {
        for _ in 0..messages {
            self.sent += 1;
            let text = format!("message {} ", self.sent).repeat(self.sent % 400 + 1);
            let text = text.trim_end();
            self.connection.send(text);
            let answer = self.receive();
            let right = answer == format!("{} {text}", self.sent);
            assert!(right, "{answer:.60} is not the answer to {text:.60}");
        }
    }

    /// Waits for a tick.
    fn await_tick(&mut self) {
        let before = self.ticks;
        while self.ticks == before {
            assert_eq!(self.receive_once(), None);
        }
    }

    /// Returns the next answer.
    fn receive(&mut self) -> String {
        loop {
            if let Some(answer) = self.receive_once() {
                return answer;
            }
        }
    }

    /// Returns an answer, or counts a tick.
    fn receive_once(&mut self) -> Option<String> {
        let text = self.connection.receive();
        let Some(tick) = text.strip_prefix("tick ") else { return Some(text) };
        let tick: usize = tick.parse().unwrap();
        if let Some(last) = self.ticks {
            assert_eq!(tick, last + 1, "a tick was lost or came twice");
        }
        self.ticks = Some(tick);
        None
    }
}

/// Dumps and restores a server that sends ticks, with this number of clients, and connects a new
/// client afterwards.
fn with_clients<C: Connection>(live: &mut Live, clients: usize, open: impl Fn() -> C) {
    let mut clients: Vec<_> = (0..clients).map(|_| Client::new(open())).collect();
    ordeal(live, |_| {
        for client in &mut clients {
            client.talk(20);
            client.await_tick();
        }
    });
    let mut new = Client::new(open());
    new.talk(3);
    new.await_tick();
}

#[test]
fn privileged_asyncio_with_500_connections() {
    needs(PYTHON);
    const CONNECTIONS: usize = 500;
    let dir = directory();
    let (script, status) = (dir.path().join("echo.py"), dir.path().join("status"));
    fs::write(&script, include_str!("programs/echo.py")).unwrap();
    let told = dir.path().join("status.ports");
    let words = [script.to_str().unwrap(), status.to_str().unwrap(), &CONNECTIONS.to_string()];
    let mut live = Live::program(PYTHON, &words, dir);
    wait_for("the server", || told.exists());
    let ports = fs::read_to_string(told).unwrap();
    let port = ports.split(' ').next().unwrap().parse().unwrap();
    // One after the other, since a server that has no processor for a while would let the queue of
    // connections overflow: then each waits for a repetition of its packets.
    let open = |_| {
        let mut client = Client::new(Lines(BufReader::new(connect(port))));
        client.talk(1);
        client
    };
    let mut clients: Vec<_> = (0..CONNECTIONS).map(open).collect();
    ordeal(&mut live, |_| clients.iter_mut().for_each(|client| client.talk(2)));
    for client in clients {
        let mut stream = client.connection.0;
        stream.get_ref().shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    live.verdict();
}

/// A connection by WebSocket (RFC 6455).
struct WebSocket(BufReader<TcpStream>);

impl WebSocket {
    fn open(port: u16) -> Self {
        let mut stream = BufReader::new(connect(port));
        // The key and its answer are those of RFC 6455, 1.3.
        let request = "GET /chat HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: \
                       Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                       Sec-WebSocket-Version: 13\r\n\r\n";
        stream.get_mut().write_all(request.as_bytes()).unwrap();
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(stream.read_line(&mut head).unwrap() > 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        Self(stream)
    }
}

impl Connection for WebSocket {
    fn send(&mut self, text: &str) {
        const TEXT: u8 = 0x81; // the last fragment of a text
        const MASKED: u8 = 0x80;
        let mask = [1, 2, 3, 4];
        let mut frame = vec![TEXT];
        match u8::try_from(text.len()) {
            Ok(len) if len < 126 => frame.push(MASKED | len),
            _ => {
                frame.push(MASKED | 126);
                frame.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
            }
        }
        frame.extend(mask);
        frame.extend(text.bytes().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        self.0.get_mut().write_all(&frame).unwrap();
    }

    fn receive(&mut self) -> String {
        let mut head = [0; 2];
        self.0.read_exact(&mut head).unwrap();
        let mut len = usize::from(head[1]);
        if len == 126 {
            self.0.read_exact(&mut head).unwrap();
            len = u16::from_be_bytes(head).into();
        }
        let mut text = vec![0; len];
        self.0.read_exact(&mut text).unwrap();
        String::from_utf8(text).unwrap()
    }
}

#[test]
fn privileged_node_with_websockets() {
    needs("node");
    let dir = directory();
    let script = dir.path().join("websockets.js");
    fs::write(&script, include_str!("programs/websockets.js")).unwrap();
    let (mut live, port) = server("node", &[script.to_str().unwrap()], dir);
    with_clients(&mut live, 10, || WebSocket::open(port));
}

#[test]
fn privileged_java_with_selectors_and_timers() {
    needs("java");
    let dir = directory();
    let source = dir.path().join("Selecting.java");
    fs::write(&source, include_str!("programs/Selecting.java")).unwrap();
    let (mut live, port) = server("java", &["-Xmx128m", source.to_str().unwrap()], dir);
    with_clients(&mut live, 10, || Lines(BufReader::new(connect(port))));
}

#[test]
fn privileged_go() {
    needs("go");
    let dir = directory();
    let (source, program) = (dir.path().join("serving.go"), dir.path().join("serving"));
    fs::write(&source, include_str!("programs/serving.go")).unwrap();
    let built = Command::new("go")
        .args(["build", "-o"])
        .args([&program, &source])
        .env("GOCACHE", dir.path().join("cache"))
        .env("GOFLAGS", "-mod=mod")
        .env("GO111MODULE", "off")
        .status();
    assert!(built.unwrap().success(), "the program cannot be compiled");
    fs::remove_dir_all(dir.path().join("cache")).unwrap();
    let (mut live, port) = server(program.to_str().unwrap(), &[], dir);
    with_clients(&mut live, 10, || Lines(BufReader::new(connect(port))));
}

/// Bytes that do not repeat.
fn bytes(len: usize) -> Vec<u8> {
    (0..len as u64 / 8)
        .flat_map(|number| number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect()
}

/// Reads the head of an answer of HTTP, and returns it with the length of its body.
fn head(stream: &mut BufReader<TcpStream>) -> (String, usize) {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(stream.read_line(&mut head).unwrap() > 0, "{head}");
    }
    let len = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let len = len.map_or(0, |len| len.parse().unwrap());
    (head, len)
}

fn get(stream: &mut BufReader<TcpStream>, path: &str) -> Vec<u8> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    stream.get_mut().write_all(request.as_bytes()).unwrap();
    let (head, len) = head(stream);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let mut body = vec![0; len];
    stream.read_exact(&mut body).unwrap();
    body
}

/// A client that keeps its connection, a download and an upload half-way, and a new configuration
/// afterwards.
#[test]
fn privileged_nginx_in_the_middle_of_transfers() {
    needs("nginx");
    const LEN: usize = 24 << 20;
    let (dir, port) = (directory(), port());
    let place = dir.path().to_str().unwrap().to_owned();
    let file = bytes(LEN);
    fs::write(dir.path().join("large"), &file).unwrap();
    fs::write(dir.path().join("page"), "a page\n").unwrap();
    fs::create_dir(dir.path().join("tmp")).unwrap();
    let uploads = dir.path().join("uploads");
    fs::create_dir(&uploads).unwrap();
    fs::set_permissions(&uploads, fs::Permissions::from_mode(0o777)).unwrap();
    let text = include_str!("programs/transfers.conf");
    let text = text.replace("@DIR@", &place).replace("@PORT@", &port.to_string());
    fs::write(dir.path().join("nginx.conf"), text).unwrap();
    let config = format!("{place}/nginx.conf");
    let log = format!("{place}/error.log");
    let mut live = Live::program("nginx", &["-e", &log, "-p", &place, "-c", &config], dir);
    let open = || BufReader::new(connect(port));
    let (mut keeping, mut download, mut upload) = (open(), open(), open());
    wait_for("two workers", || live.tree().len() == 3);

    let request = "GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n";
    download.get_mut().write_all(request.as_bytes()).unwrap();
    assert_eq!(head(&mut download).1, LEN);
    let request =
        format!("PUT /uploads/large HTTP/1.1\r\nHost: localhost\r\nContent-Length: {LEN}\r\n\r\n");
    upload.get_mut().write_all(request.as_bytes()).unwrap();
    let (mut got, mut sent) = (Vec::new(), 0);
    ordeal(&mut live, |_| {
        assert_eq!(get(&mut keeping, "/page"), b"a page\n");
        // A quarter each time, so that both are half-way at the second dump.
        let mut quarter = vec![0; LEN / 4];
        download.read_exact(&mut quarter).unwrap();
        got.extend(quarter);
        upload.get_mut().write_all(&file[sent..sent + LEN / 4]).unwrap();
        sent += LEN / 4;
    });
    let mut rest = vec![0; LEN - got.len()];
    download.read_exact(&mut rest).unwrap();
    got.extend(rest);
    assert!(got == file, "the download is damaged");
    upload.get_mut().write_all(&file[sent..]).unwrap();
    let (answer, _) = head(&mut upload);
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    assert!(fs::read(uploads.join("large")).unwrap() == file, "the upload is damaged");
    // All three go on with their connections.
    for stream in [&mut keeping, &mut download] {
        assert_eq!(get(stream, "/page"), b"a page\n");
    }
    let workers = live.tree();
    fs::write(live.path("page"), "another page\n").unwrap();
    kill(live.root, Signal::SIGHUP).unwrap();
    wait_for("new workers", || {
        let tree = live.tree();
        tree.len() == 3 && tree.iter().filter(|pid| workers.contains(pid)).count() == 1
    });
    assert_eq!(get(&mut open(), "/page"), b"another page\n");
    // The old workers have closed their connections.
    assert_eq!(keeping.read(&mut [0]).unwrap(), 0);
    kill(live.root, Signal::SIGQUIT).unwrap();
    live.wait_gone();
}

/// The program is the client, the server is outside.
#[test]
fn privileged_curl_half_way() {
    needs("curl");
    const LEN: usize = 8 << 20;
    let file = bytes(LEN);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("http://{}/file", listener.local_addr().unwrap());
    let dir = directory();
    let out = dir.path().join("out");
    let words = ["-sS", "-o", out.to_str().unwrap(), &url];
    let mut live = Live::program("curl", &words, dir);
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = BufReader::new(stream);
    let (request, _) = head(&mut stream);
    assert!(request.starts_with("GET /file HTTP/1.1"), "{request}");
    write!(stream.get_mut(), "HTTP/1.1 200 OK\r\nContent-Length: {LEN}\r\n\r\n").unwrap();
    let mut sent = 0;
    ordeal(&mut live, |_| {
        stream.get_mut().write_all(&file[sent..sent + LEN / 4]).unwrap();
        sent += LEN / 4;
        // It keeps the last bytes to itself until there are enough to be written.
        wait_for("the download", || {
            fs::metadata(&out).is_ok_and(|found| found.len() + (1 << 20) > sent as u64)
        });
    });
    stream.get_mut().write_all(&file[sent..]).unwrap();
    live.wait_gone();
    assert!(fs::read(&out).unwrap() == file, "the download is damaged");
}

/// Three processes that share pairs of sockets.
#[test]
fn privileged_rsync_half_way() {
    needs("rsync");
    const LEN: usize = 24 << 20;
    let dir = directory();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir(&from).unwrap();
    let file = bytes(LEN);
    fs::write(from.join("large"), &file).unwrap();
    fs::write(from.join("small"), "small\n").unwrap();
    let source = format!("{}/", from.display());
    // As slow as to be met in the middle.
    let words = ["-a", "--bwlimit=3m", &source, to.to_str().unwrap()];
    let mut live = Live::program("rsync", &words, dir);
    let copied = |dir: &Path| -> u64 {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
    };
    let mut seen = 0;
    ordeal(&mut live, |_| {
        wait_for("more of the file", || copied(&to) > seen);
        seen = copied(&to);
    });
    assert!(seen < LEN as u64, "the copy was done before the dump");
    live.wait_gone();
    assert!(fs::read(to.join("large")).unwrap() == file, "the copy is damaged");
    let mut names: Vec<_> = fs::read_dir(&to).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["large", "small"]);
}
