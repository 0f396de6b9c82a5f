//! Containers of runc, which calls rcriu as it calls criu.
//!
//! Their root file system is that of busybox. A container counts, and counts on after a restore. All
//! tests need root.

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{PermissionsExt, lchown, symlink},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use common::{
    Cap,
    busybox::root_file_system,
    live::{PATIENCE, directory, engine, wait_for},
    mounted::Mounted,
    require, slow, stored_bytes, trixie,
};
use nix::sys::socket::MsgFlags;
use rcriu::sys::socket::receive;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Counts in a file, and in one on a tmpfs, five times a second.
const COUNT: &str = "i=0; while true; do i=$((i+1)); echo $i >/tmp/count; echo $i >/dev/shm/count; \
                     sleep 0.2; done";

fn needs() {
    require(Cap::Ptrace);
    require(Cap::Program("runc"));
    require(Cap::Program("busybox"));
}

/// A container of runc.
struct Container {
    dir: TempDir,
    id: String,
}

impl Container {
    /// Starts a container that executes a command of the shell; `edit` changes its configuration.
    fn start(command: &str, edit: impl FnOnce(&mut Value)) -> Self {
        Self::start_with(command, &[], edit)
    }

    /// Ends it, and checks that nothing of it stays mounted.
    fn end(self) {
        let dir = self.dir.path().to_str().unwrap().to_owned();
        drop(self);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let left: Vec<&str> = mounts.lines().filter(|line| line.contains(&dir)).collect();
        assert!(left.is_empty(), "{left:#?}");
    }

    /// The same, with more arguments of `runc run`.
    fn start_with(command: &str, arguments: &[&str], edit: impl FnOnce(&mut Value)) -> Self {
        Self::start_to(Stdio::null(), command, arguments, edit)
    }

    /// The same, with a standard output.
    fn start_to(
        out: Stdio,
        command: &str,
        arguments: &[&str],
        edit: impl FnOnce(&mut Value),
    ) -> Self {
        let dir = directory();
        // Names of containers are those of cgroups, too.
        let name = dir.path().file_name().unwrap().to_str().unwrap();
        let id: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
        let container = Self { id, dir };
        fs::create_dir(container.path("bin")).unwrap();
        symlink(engine(), container.path("bin/criu")).unwrap();
        root_file_system(&container.path("bundle/rootfs"));
        let made = Command::new("runc").arg("spec").current_dir(container.path("bundle")).status();
        assert!(made.unwrap().success());
        let file = container.path("bundle/config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["/bin/sh", "-c", command]);
        config["root"]["readonly"] = json!(false);
        edit(&mut config);
        if let Some(id) = config["linux"]["uidMappings"][0]["hostID"].as_u64() {
            give(&container.path("bundle/rootfs"), id.try_into().unwrap());
            fs::set_permissions(container.path(""), fs::Permissions::from_mode(0o711)).unwrap();
        }
        fs::write(&file, config.to_string()).unwrap();
        fs::create_dir(container.path("work")).unwrap();
        let bundle = container.path("bundle");
        let arguments = [&["-d", "-b", bundle.to_str().unwrap()], arguments].concat();
        let output = container.runc_to(out, "run", &arguments);
        assert!(output.status.success(), "{}", container.complaint(&output));
        container
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a command of runc on the container.
    fn runc(&self, command: &str, arguments: &[&str]) -> Output {
        // A restored container would keep pipes of ours open.
        self.runc_to(Stdio::null(), command, arguments)
    }

    fn runc_to(&self, stdout: Stdio, command: &str, arguments: &[&str]) -> Output {
        // What a container inherits must not be a file of the host: it has no name inside.
        let starts = matches!(command, "run" | "restore");
        let out = if starts { PathBuf::from("/dev/null") } else { self.path("output") };
        let out = fs::File::options().write(true).create(true).truncate(true).open(out).unwrap();
        // Newer ones have no option for it.
        let path = std::env::join_paths(
            std::iter::once(self.path("bin"))
                .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
        );
        let status = Command::new("runc")
            .env("PATH", path.unwrap())
            .arg("--root")
            .arg(self.path("state"))
            .arg(command)
            .args(arguments)
            .arg(&self.id)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(out)
            .status()
            .unwrap();
        Output {
            status,
            stdout: Vec::new(),
            stderr: fs::read(self.path("output")).unwrap_or_default(),
        }
    }

    fn complaint(&self, output: &Output) -> String {
        let mut text = String::from_utf8_lossy(&output.stderr).into_owned();
        for log in ["dump.log", "restore.log"] {
            text += &fs::read_to_string(self.path("work").join(log)).unwrap_or_default();
        }
        text
    }

    fn checkpoint(&self, images: &str, arguments: &[&str]) {
        fs::create_dir_all(self.path(images)).unwrap();
        self.with_images("checkpoint", &self.path(images), arguments);
    }

    fn restore(&self, images: &Path, arguments: &[&str]) {
        self.restore_to(Stdio::null(), images, arguments);
    }

    /// Restores it with a standard output.
    fn restore_to(&self, out: Stdio, images: &Path, arguments: &[&str]) {
        let bundle = self.path("bundle");
        let arguments = [&["-d", "-b", bundle.to_str().unwrap()], arguments].concat();
        self.with_images_to(out, "restore", images, &arguments);
    }

    fn with_images(&self, command: &str, images: &Path, arguments: &[&str]) {
        self.with_images_to(Stdio::null(), command, images, arguments);
    }

    fn with_images_to(&self, out: Stdio, command: &str, images: &Path, arguments: &[&str]) {
        let work = self.path("work");
        let mut all = vec!["--image-path", images.to_str().unwrap()];
        all.extend(["--work-path", work.to_str().unwrap()]);
        all.extend(arguments);
        let output = self.runc_to(out, command, &all);
        assert!(output.status.success(), "{command}: {}", self.complaint(&output));
    }

    fn count(&self) -> u64 {
        let text = fs::read_to_string(self.path("bundle/rootfs/tmp/count")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    /// Waits until the container has counted on, and returns how far.
    fn counts_on(&self) -> u64 {
        let from = self.count();
        wait_for("the container to count", || self.count() > from + 1);
        self.count()
    }

    /// Returns what a command of the shell prints in the container.
    fn exec(&self, command: &str) -> String {
        let output = Command::new("runc")
            .arg("--root")
            .arg(self.path("state"))
            .args(["exec", &self.id, "/bin/sh", "-c", command])
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let output = self.runc("delete", &["-f"]);
        if !output.status.success() {
            eprintln!("runc delete: {}", self.complaint(&output));
        }
    }
}

#[test]
fn privileged_runc_checkpoints_and_restores_twice() {
    needs();
    let container = Container::start(COUNT, |_| {});
    container.counts_on();
    container.checkpoint("running", &["--leave-running"]);
    let mut reached = container.counts_on();
    for images in ["1", "2"] {
        container.checkpoint(images, &[]);
        container.restore(&container.path(images), &[]);
        let now = container.counts_on();
        assert!(now > reached, "{now} after {reached}");
        reached = now;
        let seen = container.exec("ps; cat /dev/shm/count; cat /proc/self/mountinfo");
        assert!(seen.contains("sleep 0.2") && seen.contains("/dev/shm"), "{seen}");
    }
    container.end();
}

/// Gives a directory and all below it to a user and group.
fn give(top: &Path, id: u32) {
    let mut pending = vec![top.to_owned()];
    while let Some(path) = pending.pop() {
        lchown(&path, Some(id), Some(id)).unwrap();
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
}

/// A user namespace, to which the mounts, the network and the others belong.
#[test]
fn privileged_runc_with_mapped_users_goes_on() {
    needs();
    const COUNT: &str = "echo x >/dev/shm/of; chown 12:34 /dev/shm/of; i=0; while true; do i=$((i+1)); \
                         echo $i >/tmp/count; sleep 0.2; done";
    let container = Container::start(COUNT, |config| {
        let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
        config["linux"]["uidMappings"] = map.clone();
        config["linux"]["gidMappings"] = map;
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({ "type": "user" }));
        for set in ["bounding", "effective", "permitted"] {
            let set = &mut config["process"]["capabilities"][set];
            set.as_array_mut().unwrap().push(json!("CAP_CHOWN"));
        }
    });
    container.counts_on();
    // runc binds others of the cgroups of version 1 at a restore (its own).
    let seen = "cat /proc/self/uid_map; ls -lan /dev/shm; \
                grep -v -e ' - proc' -e ' - cgroup ' /proc/self/mountinfo | cut -d' ' -f4- | sort";
    let was = container.exec(seen);
    let owned = |line: &str| line.contains(" 12 ") && line.contains(" 34 ");
    assert!(was.lines().any(owned), "{was}");
    for images in ["1", "2"] {
        let reached = container.counts_on();
        container.checkpoint(images, &[]);
        container.restore(&container.path(images), &[]);
        assert!(container.counts_on() > reached);
        assert_eq!(container.exec(seen), was);
    }
    container.end();
}

/// What CRIU cannot do on kernels without soft-dirty bits.
#[test]
fn privileged_pre_dumps_of_runc_make_a_chain_that_is_restored_from_a_mount() {
    needs();
    require(Cap::Fuse);
    let container = Container::start(COUNT, |_| {});
    container.counts_on();
    container.checkpoint("1", &["--pre-dump"]);
    container.checkpoint("2", &["--pre-dump", "--parent-path", "../1"]);
    let reached = container.counts_on();
    container.checkpoint("3", &["--parent-path", "../2"]);
    assert_eq!(fs::read_link(container.path("3/parent")).unwrap(), Path::new("../2"));
    {
        let point = container.path("mount");
        let _mounted = Mounted::new(&container.path("3"), &point, &[]);
        // runc reads its own file of descriptors there, too.
        container.restore(&point, &[]);
    }
    assert!(container.counts_on() > reached);
}

/// Full checkpoints of one container in a directory that runc's configuration file names: each costs what has
/// changed, whatever directory runc itself is given, and each can be restored.
#[test]
fn privileged_checkpoints_of_runc_in_a_chain_cost_what_has_changed() {
    /// The memory that does not change, in bytes.
    const LARGE: u64 = 20_000_000;
    needs();
    let dir = directory();
    let (chain, file) = (dir.path().join("chain"), dir.path().join("criu.conf"));
    fs::write(&file, format!("chain {}\n", chain.display())).unwrap();
    // The process with the memory forks no more: a child would have all of it, too.
    let command = format!(
        "mkfifo /tmp/idle; \
         (large=$(head -c {LARGE} /dev/zero | tr '\\0' x); exec 9<>/tmp/idle; : >/tmp/filled; read line <&9) & \
         until [ -e /tmp/filled ]; do sleep 0.1; done; {COUNT}"
    );
    let container = Container::start(&command, |config| {
        config["annotations"] = json!({ "org.criu.config": file });
    });
    let mut reached = container.counts_on();
    // The last two go where the runtime keeps all of its checkpoints, as Podman does.
    for (number, images) in ["1", "2", "3", "own", "own"].iter().enumerate() {
        let inside = chain.join(images);
        let images = if *images == "own" { container.path("own") } else { inside };
        fs::create_dir_all(&images).unwrap();
        container.with_images("checkpoint", &images, &[]);
        container.restore(&images, &[]);
        let now = container.counts_on();
        assert!(now > reached, "{now} after {reached}");
        reached = now;
        let member = chain.join((number + 1).to_string());
        let pages: u64 = fs::read_dir(&member)
            .unwrap()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"))
            .map(|entry| stored_bytes(&entry.path()))
            .sum();
        if number == 0 {
            assert!(pages > LARGE, "{pages}");
            assert!(!member.join("parent").exists());
        } else {
            assert!(pages < LARGE / 20, "checkpoint {} has {pages} bytes of pages", number + 1);
            let parent = fs::read_link(member.join("parent")).unwrap();
            assert_eq!(parent, Path::new("..").join(number.to_string()));
        }
    }
    container.checkpoint("last", &[]);
    container.restore(&chain.join("4"), &[]);
    container.counts_on();
    // Another container has nothing to do with it.
    let other = Container::start(COUNT, |config| {
        config["annotations"] = json!({ "org.criu.config": file });
    });
    other.counts_on();
    other.checkpoint("1", &[]);
    assert!(!other.path("1/parent").exists() && !chain.join("7/parent").exists());
    assert!(chain.join("7/inventory.img").exists());
}

/// A directory that is a shared mount.
struct Shared(TempDir);

impl Shared {
    fn new() -> Self {
        let shared = Self(directory());
        run("mount", &["--bind", shared.path(), shared.path()]);
        run("mount", &["--make-shared", shared.path()]);
        shared
    }

    fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    /// Calls `look` while a file system is mounted on a new directory in it.
    fn with_mount(&self, name: &str, look: impl FnOnce()) {
        let point = self.0.path().join(name);
        fs::create_dir(&point).unwrap();
        run("mount", &["-t", "tmpfs", name, point.to_str().unwrap()]);
        look();
        run("umount", &[point.to_str().unwrap()]);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // With the mounts on it.
        run("umount", &["-R", self.path()]);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

/// A volume that is a slave of the host's mounts: the container sees what is mounted there, also after
/// the restore. As with CRIU, no option is needed for that.
#[test]
fn privileged_volumes_of_runc_receive_mounts_of_the_host() {
    needs();
    let shared = Shared::new();
    let container = Container::start(COUNT, |config| {
        let volume = json!({
            "destination": "/volume", "type": "bind", "source": shared.path(),
            "options": ["rbind", "rslave"],
        });
        config["mounts"].as_array_mut().unwrap().push(volume);
    });
    let seen = || container.exec("cut -d' ' -f5 /proc/self/mountinfo | grep ^/volume | sort");
    shared.with_mount("0", || assert_eq!(seen(), "/volume\n/volume/0\n"));
    for images in ["1", "2"] {
        let reached = container.counts_on();
        container.checkpoint(images, &[]);
        container.restore(&container.path(images), &[]);
        assert!(container.counts_on() > reached);
        shared.with_mount(images, || {
            assert_eq!(seen(), format!("/volume\n/volume/{images}\n"));
        });
    }
    container.end();
}

/// A read-only root, a cgroup namespace, a filter of system calls, a volume and a lock, in each of the modes for
/// cgroups.
#[test]
fn privileged_a_confined_container_of_runc_goes_on_in_each_mode_of_cgroups() {
    needs();
    require(Cap::Program("flock"));
    let command = format!("exec 9>/tmp/lock; /usr/bin/flock 9; {COUNT}");
    let container = Container::start(&command, |config| {
        config["root"]["readonly"] = json!(true);
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["swapon"], "action": "SCMP_ACT_ERRNO" }],
        });
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        if !namespaces.iter().any(|one| one["type"] == "cgroup") {
            namespaces.push(json!({ "type": "cgroup" }));
        }
        let volume = json!({
            "destination": "/tmp", "type": "bind", "source": "rootfs/tmp", "options": ["bind"],
        });
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(volume);
        // busybox locks no files.
        mounts.extend(["/lib", "/lib64", "/usr/bin/flock"].map(|path| {
            json!({ "destination": path, "type": "bind", "source": path, "options": ["bind", "ro"] })
        }));
    });
    // runc binds others of the cgroups of version 1 at a restore, and runs `exec` in another namespace.
    let seen = "grep -E '^(Seccomp|NoNewPrivs)' /proc/1/status; ls -l /proc/1/ns/net | cut -c1-10; \
                grep -v -e ' - proc' -e ' - cgroup ' /proc/1/mountinfo | cut -d' ' -f4-6 | sort";
    let is_locked = || {
        let lock = container.path("bundle/rootfs/tmp/lock");
        !Command::new("flock").arg("-n").arg(lock).arg("true").status().unwrap().success()
    };
    container.counts_on();
    let was = container.exec(seen);
    assert!(was.contains("Seccomp:\t2\n") && was.contains("/bundle/rootfs / ro"), "{was}");
    assert!(is_locked());
    for mode in ["soft", "full", "strict"] {
        let reached = container.counts_on();
        let options = ["--file-locks", "--manage-cgroups-mode", mode];
        container.checkpoint(mode, &options);
        assert!(!is_locked());
        container.restore(&container.path(mode), &options);
        assert!(container.counts_on() > reached);
        assert_eq!(container.exec(seen), was);
        assert!(is_locked());
    }
    container.end();
}

/// The standard output is a pipe: the restored container writes into that of the second runc.
#[test]
fn privileged_pipes_of_runc_are_those_of_the_restore() {
    needs();
    let lines = |end| {
        let mut lines = BufReader::new(fs::File::from(end)).lines();
        move || lines.next().map(|line| line.unwrap().parse::<u64>().unwrap())
    };
    let (end, out) = nix::unistd::pipe().unwrap();
    let mut next = lines(end);
    let container = Container::start_to(
        out.into(),
        "i=0; while true; do i=$((i+1)); echo $i; sleep 0.2; done",
        &[],
        |_| {},
    );
    let mut reached = next().unwrap();
    for images in ["1", "2"] {
        container.checkpoint(images, &[]);
        // All that it had written, and the end.
        while let Some(line) = next() {
            assert_eq!(line, reached + 1);
            reached = line;
        }
        let (end, out) = nix::unistd::pipe().unwrap();
        next = lines(end);
        container.restore_to(out.into(), &container.path(images), &[]);
        for _ in 0..3 {
            let line = next().unwrap();
            assert_eq!(line, reached + 1);
            reached = line;
        }
    }
}

/// A private network namespace: 1.1.5 with CRIU cannot keep connections in one.
#[test]
fn privileged_connections_in_a_network_namespace_of_runc_go_on() {
    needs();
    const TALK: &str = "ip link set lo up; nc -l -p 7 -e /bin/cat & sleep 0.5; \
                        (i=0; while true; do i=$((i+1)); echo $i; sleep 0.2; done) | \
                        nc 127.0.0.1 7 | while read i; do echo $i >/tmp/count; done";
    let container = Container::start(TALK, |config| {
        // Setting up the loopback device.
        for set in ["bounding", "effective", "permitted"] {
            let set = &mut config["process"]["capabilities"][set];
            set.as_array_mut().unwrap().push(json!("CAP_NET_ADMIN"));
        }
    });
    let reached = container.counts_on();
    container.checkpoint("1", &["--tcp-established"]);
    container.restore(&container.path("1"), &["--tcp-established"]);
    assert!(container.counts_on() > reached);
}

/// Removes the network namespace from the configuration, or puts another one into it.
fn set_network(config: &mut Value, path: Option<&str>) {
    let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|one| one["type"] != "network");
    namespaces.extend(path.map(|path| json!({"type": "network", "path": path})));
}

/// The client of a server with the network of the host stays connected.
#[test]
fn privileged_a_container_of_runc_with_the_network_of_the_host_goes_on() {
    needs();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let command = format!("nc -ll -p {port} -e /bin/cat & {COUNT}");
    let container = Container::start(&command, |config| set_network(config, None));
    let mut client = None;
    wait_for("the server", || {
        client = TcpStream::connect(("127.0.0.1", port)).ok();
        client.is_some()
    });
    let mut client = client.unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut talk = |word: &[u8]| {
        client.write_all(word).unwrap();
        let mut answer = vec![0; word.len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, word);
    };
    talk(b"before");
    let reached = container.counts_on();
    container.checkpoint("1", &["--tcp-established"]);
    container.restore(&container.path("1"), &["--tcp-established"]);
    assert!(container.counts_on() > reached);
    talk(b"after");
}

/// A process in a namespace, which ends with this.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A network namespace that another program has made: runc gives it to the restore by its file.
#[test]
fn privileged_a_container_of_runc_returns_into_a_network_namespace_that_exists() {
    needs();
    require(Cap::Program("unshare"));
    let dir = directory();
    let ready = dir.path().join("ready");
    let script = format!("busybox ip link set lo up; : >{}; exec sleep 1000", ready.display());
    let holder = Command::new("unshare").args(["-n", "sh", "-c", &script]).spawn().unwrap();
    let holder = Holder(holder);
    wait_for("the namespace", || ready.exists());
    let path = format!("/proc/{}/ns/net", holder.0.id());
    let network = || fs::read_link(&path).unwrap();
    const TALK: &str = "nc -l -p 7 -e /bin/cat & sleep 0.5; \
                        (i=0; while true; do i=$((i+1)); echo $i; sleep 0.2; done) | \
                        nc 127.0.0.1 7 | while read i; do echo $i >/tmp/count; done";
    let container = Container::start(TALK, |config| set_network(config, Some(&path)));
    let reached = container.counts_on();
    container.checkpoint("1", &["--tcp-established"]);
    container.restore(&container.path("1"), &["--tcp-established"]);
    assert!(container.counts_on() > reached);
    let seen = container.exec("ls -l /proc/1/ns/net");
    assert!(seen.contains(network().to_str().unwrap()), "{seen}");
}

/// Waits for the master of a console, which runc sends over a socket with this name.
fn console(listener: &UnixListener) -> OwnedFd {
    let (stream, _) = listener.accept().unwrap();
    let mut name = [0; 4096];
    let received = receive(stream.as_fd(), &mut name, MsgFlags::empty()).unwrap();
    received.fds.into_iter().next().expect("the master of the console")
}

/// Sends a line to a console, and waits until the program behind it has answered.
fn talks(console: &OwnedFd, line: &str) {
    let mut console = fs::File::from(console.try_clone().unwrap());
    writeln!(console, "{line}").unwrap();
    let mut seen = Vec::new();
    wait_for("an answer on the console", || {
        let mut bytes = [0; 256];
        let read = console.read(&mut bytes).unwrap();
        seen.extend(&bytes[..read]);
        String::from_utf8_lossy(&seen).contains(&format!("got {line}"))
    });
}

/// runc asks for the master of a container's terminal, and passes it on.
#[test]
fn privileged_consoles_of_runc_are_handed_over() {
    const ANSWER: &str = "while read line; do echo got $line; done";
    needs();
    let dir = directory();
    let socket = dir.path().join("console");
    let listener = UnixListener::bind(&socket).unwrap();
    let option = ["--console-socket", socket.to_str().unwrap()];
    let container = Container::start_with(ANSWER, &option, |config| {
        config["process"]["terminal"] = json!(true);
    });
    let master = console(&listener);
    talks(&master, "one");
    container.checkpoint("1", &[]);
    drop(master);
    container.restore(&container.path("1"), &option);
    let master = console(&listener);
    talks(&master, "two");
    let seen = container.exec("cat /proc/1/stat; ls -l /dev/console /dev/pts/0");
    // A controlling terminal: 136:0.
    assert_eq!(seen.split_whitespace().nth(6), Some("34816"), "{seen}");
}

/// Executes a program in Debian's root, with the file systems of the kernel, the directory of the tests and
/// those of the programs.
const IN_TRIXIE: &str = r#"
set -eu
root=$1 over=$2
shift 2
mount --make-rprivate /
mount -t tmpfs tmpfs "$over"
mkdir "$over/upper" "$over/work" "$over/root"
mount -t overlay overlay -o "lowerdir=$root,upperdir=$over/upper,workdir=$over/work" "$over/root"
cd "$over/root"
cp /bin/busybox bin/
for dir in /proc /sys /dev /tmp "$(dirname "$1")" "$RCRIU_TEST_PROGRAMS"; do
    mkdir -p ".$dir"
    mount --rbind "$dir" ".$dir"
done
mount -t tmpfs tmpfs run
mkdir -p mnt/old
pivot_root . mnt/old
umount -l /mnt/old
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec "$@"
"#;

/// The runc of Debian 13 passes all tests of this file that have runc only.
#[test]
fn privileged_a_newer_runc_does_the_same() {
    needs();
    slow();
    let root = trixie::with("usr/sbin/runc");
    let dir = directory();
    let programs = PathBuf::from(engine());
    let output = Command::new("unshare")
        .args(["-m", "bash", "-c", IN_TRIXIE, "bash"])
        .args([&root, dir.path(), &std::env::current_exe().unwrap()])
        .args(["privileged_", "--skip", "newer_runc"])
        .env("RCRIU_TEST_PROGRAMS", programs.parent().unwrap())
        .env("RCRIU_TEST_STRICT", "1")
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.contains("test result: ok. 11 passed"), "{said}");
}
