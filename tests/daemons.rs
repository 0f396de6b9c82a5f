//! Daemons that log to `/dev/log`, dumped while they work.
//!
//! All of it needs root. The tests are the other end of `/dev/log`, in a root directory of their own.

mod common;

use std::{
    fs,
    os::unix::{fs::symlink, net::UnixDatagram},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use common::{
    Cap,
    live::{Live, PATIENCE, directory, wait_for},
    require,
};
use nix::{
    sys::stat::{Mode, SFlag, mknod},
    unistd::Pid,
};
use rcriu::{
    sys::process::{pidfd_getfd, pidfd_open},
    units::{HostPid, TargetFd},
};

/// Which connections are kept.
const OPTIONS: [&str; 2] = ["--ext-unix-sk", "--file-locks"];

const CRON: &str = "/usr/sbin/cron";

/// The libraries of the C library and of PAM that no program names.
const EXTRA: [&str; 3] = ["libnss_files.so.2", "security/pam_permit.so", "libpam_misc.so.0"];

/// A job that begins with cron, and ends when it is told to.
const JOB: &str = "#!/bin/sh
echo words of the job
until [ -e /go ]; do sleep 0.05; done
echo more words
echo $PPID >/ended
";

/// Makes a root directory with a program and the libraries that it needs.
fn root(dir: &Path, program: &str) -> PathBuf {
    let root = dir.join("root");
    let copy = |path: &Path| {
        let to = root.join(path.strip_prefix("/").unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(path, to).unwrap();
    };
    let output = Command::new("ldd").arg(program).output().unwrap();
    let listed = String::from_utf8(output.stdout).unwrap();
    let mut place = None;
    for path in listed.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new) {
        copy(path);
        place = path.parent().filter(|_| path.ends_with("libc.so.6")).or(place);
    }
    let place = place.expect("the program has the C library");
    EXTRA
        .map(|name| place.join(name))
        .iter()
        .filter(|path| path.exists())
        .for_each(|path| copy(path));
    copy(Path::new(program));
    copy(Path::new("/bin/busybox"));
    for command in ["sh", "sleep"] {
        symlink("busybox", root.join("bin").join(command)).unwrap();
    }
    for name in ["dev", "etc/pam.d", "run", "root", "tmp", "var/spool/cron/crontabs"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    symlink("../run", root.join("var/run")).unwrap();
    let null = nix::sys::stat::makedev(1, 3);
    let mode = Mode::from_bits_truncate(0o666);
    mknod(&root.join("dev/null"), SFlag::S_IFCHR, mode, null).unwrap();
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\n").unwrap();
    root
}

/// The other end of `/dev/log`.
struct Log {
    socket: UnixDatagram,
    lines: Vec<String>,
    /// How many lines a test has waited for, or passed over.
    seen: usize,
}

impl Log {
    fn new(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
        Self { socket, lines: Vec::new(), seen: 0 }
    }

    /// Waits for a line that comes after the one that was last waited for.
    fn wait(&mut self, words: &str) {
        wait_for(words, || {
            let mut bytes = [0; 2048];
            while let Ok(len) = self.socket.recv(&mut bytes) {
                self.lines.push(String::from_utf8_lossy(&bytes[..len]).into_owned());
            }
            let found = self.lines[self.seen..].iter().position(|line| line.contains(words));
            self.seen += found.map_or(0, |at| at + 1);
            found.is_some()
        });
    }
}

/// The number of the only socket of a process.
fn socket_of(pid: Pid) -> TargetFd {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let is_socket = |path: PathBuf| {
        fs::read_link(path).is_ok_and(|file| file.to_string_lossy().starts_with("socket:"))
    };
    let sockets: Vec<_> = links.filter(|link| is_socket(link.path())).collect();
    assert_eq!(sockets.len(), 1, "cron has its connection, and no other socket");
    TargetFd(sockets[0].file_name().to_str().unwrap().parse().unwrap())
}

/// A job runs, whose output cron reads, and jobs that begin every minute.
#[test]
fn privileged_cron_in_the_middle_of_a_job() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    require(Cap::Program("busybox"));
    require(Cap::Program("cron"));
    let dir = directory();
    let root = root(dir.path(), CRON);
    let permit = ["auth", "account", "session"].map(|of| format!("{of} required pam_permit.so\n"));
    fs::write(root.join("etc/pam.d/cron"), permit.concat()).unwrap();
    let table = "@reboot root /bin/sh /job\n* * * * * root echo tick >>/ticks\n";
    fs::write(root.join("etc/crontab"), table).unwrap();
    fs::write(root.join("job"), JOB).unwrap();
    let mut log = Log::new(&root.join("dev/log"));
    let words = [root.to_str().unwrap(), CRON, "-f", "-L", "15"];
    let mut live = Live::program("chroot", &words, dir);
    log.wait("/bin/sh /job)");
    wait_for("the job", || live.tree().len() >= 3);
    live.through_a_chain(&OPTIONS, |_| {});
    socket_of(live.root);
    fs::write(root.join("go"), "").unwrap();
    log.wait("No MTA installed, discarding output");
    log.wait("/bin/sh /job)");
    let parent = fs::read_to_string(root.join("ended")).unwrap();
    assert!(log.lines.iter().any(|line| line.contains(&format!("CRON[{}]", parent.trim()))));
    if Cap::Time.is_here() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        std::thread::sleep(Duration::from_secs(60 - now % 60).saturating_sub(PATIENCE / 2));
        log.wait("echo tick");
        wait_for("a job that began later", || root.join("ticks").exists());
    }
}

/// The daemon that receives the lines starts anew while the tree does not exist, or is gone.
#[test]
fn privileged_the_other_end_of_dev_log_is_a_new_one() {
    require(Cap::Ptrace);
    require(Cap::Program("busybox"));
    require(Cap::Program("cron"));
    let dir = directory();
    let root = root(dir.path(), CRON);
    let path = root.join("dev/log");
    let mut log = Log::new(&path);
    let words = [root.to_str().unwrap(), CRON, "-f", "-L", "15"];
    let mut live = Live::program("chroot", &words, dir);
    log.wait("Running @reboot jobs");
    let output = live.try_dump(&["-R", "--file-locks"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("dev/log"), "{said}");
    assert!(said.contains("--ext-unix-sk"), "{said}");
    fs::remove_dir_all(live.images()).unwrap();
    live.dump(&OPTIONS);
    drop(log);
    let output = live.try_restore(&OPTIONS);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("no program has a socket at"), "{said}");
    assert!(said.contains("dev/log, to which it was connected"), "{said}");
    fs::remove_file(&path).unwrap();
    let mut log = Log::new(&path);
    live.restore(&OPTIONS);
    let pidfd = pidfd_open(HostPid(live.root.as_raw())).unwrap();
    let socket = UnixDatagram::from(pidfd_getfd(&pidfd, socket_of(live.root)).unwrap());
    socket.send(b"words of cron").unwrap();
    log.wait("words of cron");
}
