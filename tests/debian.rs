//! A root file system of Debian that is booted into namespaces, with servers and clients that stay
//! connected, through a dump with `-R`, a dump that kills, and a restore from a mount of both, twice.
//!
//! All of it needs root, a mirror of Debian once, and time.

mod common;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use common::{
    Cap,
    live::{bounded, directory, engine, wait_for},
    mounted::Mounted,
    require, skip, slow, slowness,
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

/// What keeps the connections and locks of the servers.
const OPTIONS: [&str; 2] = ["--tcp-established", "--file-locks"];

/// How long cron may take: it looks once a minute.
const A_MINUTE: Duration = Duration::from_secs(90);

/// Returns the root file system, which is made once.
fn root() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let root = cache.or_else(home).unwrap_or(std::env::temp_dir()).join("rcriu-debian");
    let mut make = Command::new("bash");
    make.args(["-c", include_str!("programs/debian/make"), "make"]).arg(&root);
    let output = make.output().unwrap();
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        skip(&format!("a mirror of Debian: {}", said.lines().last().unwrap_or_default()));
    }
    root
}

/// The cgroup in which systemd-nspawn starts a container, where the hierarchies are those of version 1. A restore
/// makes it again.
const PAYLOAD: &str = "/sys/fs/cgroup/systemd/payload";

/// A booted root file system.
struct Debian {
    dir: TempDir,
    /// What started the first process.
    outside: Child,
    init: Pid,
    talked: usize,
    options: Vec<String>,
    /// Whether there was a cgroup of containers before.
    had_payload: bool,
}

impl Debian {
    /// Boots the root file system into the namespaces that a command makes for the script `boot`.
    fn boot(command: &[&str]) -> Self {
        let dir = directory();
        let path = |name: &str| dir.path().join(name);
        for name in ["root", "upper", "work", "mnt"] {
            fs::create_dir(path(name)).unwrap();
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            root().display(),
            path("upper").display(),
            path("work").display()
        );
        let none = MsFlags::empty();
        mount(Some("overlay"), &path("root"), Some("overlay"), none, Some(options.as_str()))
            .unwrap();
        let clients = path("root/sbin/clients");
        fs::write(&clients, include_str!("programs/debian/clients")).unwrap();
        fs::set_permissions(&clients, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(path("boot"), include_str!("programs/debian/boot")).unwrap();
        let words = command.iter().map(|word| match *word {
            "BOOT" => path("boot").display().to_string(),
            "ROOT" => path("root").display().to_string(),
            word => word.to_owned(),
        });
        let words: Vec<String> = words.collect();
        let had_payload = Path::new(PAYLOAD).exists();
        let outside = Command::new(&words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(path("errors")).unwrap())
            .spawn()
            .unwrap();
        let of = i32::try_from(outside.id()).unwrap();
        let mut debian =
            Self { dir, outside, init: Pid::from_raw(of), talked: 0, options: vec![], had_payload };
        let children = format!("/proc/{of}/task/{of}/children");
        wait_for("the first process", || {
            let children = fs::read_to_string(&children).unwrap_or_default();
            let mut pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
            let first = pids.find(|pid: &i32| {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
                numbers.is_some_and(|numbers| numbers.ends_with("\t1"))
            });
            first.is_some_and(|pid| {
                debian.init = Pid::from_raw(pid);
                true
            })
        });
        wait_for("the clients", || {
            let errors = fs::read_to_string(debian.path("errors")).unwrap();
            assert!(Path::new(&format!("/proc/{}", debian.init)).exists(), "{errors}");
            debian.inside("run/started").exists()
        });
        debian
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns a path by which the test reaches a file inside.
    fn inside(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.init)).join(name)
    }

    fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.inside(name)).unwrap_or_default()).into_owned()
    }

    /// Runs a command of the shell inside.
    fn run(&self, command: &str) -> String {
        let mut enter = Command::new("nsenter");
        enter.args(["-t", &self.init.to_string(), "-a", "-r", "-w"]);
        enter.args(["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c", command]);
        let output = enter.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {said}{errors}");
        said
    }

    fn state(&self) -> Vec<String> {
        self.run(include_str!("programs/debian/state")).lines().map(str::to_owned).collect()
    }

    /// Talks with all that runs inside: with the clients that were connected from the start, and
    /// with new ones.
    fn talk(&mut self) {
        self.talked += 1;
        let number = self.talked;
        let line = format!(
            "insert into numbers values (1); select 'sum', sum(n), {number} from numbers;\n"
        );
        fs::write(self.inside("run/psql.in"), line).unwrap();
        let sum = format!("sum|{}|{number}", number + 1);
        wait_for("an answer in the transaction", || self.read("run/psql.out").contains(&sum));
        fs::write(self.inside("run/ssh.in"), format!("echo by-ssh-$((1000 + {number})) $(tty)\n"))
            .unwrap();
        let heard = format!("by-ssh-{} /dev/pts/", 1000 + number);
        wait_for("an answer in the session", || self.read("run/ssh.out").contains(&heard));
        self.run(&format!("logger message-{number}-of-the-test"));
        let message = format!("message-{number}-of-the-test");
        wait_for("a message in the log", || self.read("var/log/syslog").contains(&message));
        let page = self.run("curl -sS http://localhost/");
        assert!(page.contains("Welcome to nginx"), "{page}");
        assert_eq!(self.run("ssh localhost echo a new session"), "a new session\n");
        assert_eq!(self.run("su postgres -c \"psql -XAtc 'select 40 + 2'\""), "42\n");
        assert_eq!(self.read("run/curl.out"), "");
    }

    /// Runs a command of the program under test.
    fn try_command(&self, name: &str, images: &Path, arguments: &[&str]) -> Output {
        let mut command = Command::new(engine());
        command.arg(name).arg("-D").arg(images).args(["-v4", "-o"]);
        command.arg(self.path(&format!("{name}.log"))).args(OPTIONS).args(&self.options);
        command.args(arguments);
        bounded(command, &self.path("said"))
    }

    fn command(&self, name: &str, images: &Path, arguments: &[&str]) {
        let output = self.try_command(name, images, arguments);
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn dump(&self, name: &str, arguments: &[&str]) {
        fs::create_dir_all(self.path(name)).unwrap();
        let init = self.init.to_string();
        self.command(
            "dump",
            &self.path(name),
            &[&["-t", &init, "--track-mem"], arguments].concat(),
        );
    }

    fn restore(&mut self, images: &Path) {
        let (root, file) = (self.path("root"), self.path("pid"));
        let _ = fs::remove_file(&file);
        let paths = [root.to_str().unwrap(), file.to_str().unwrap()];
        let work = self.dir.path().to_str().unwrap();
        let options = ["-d", "-W", work, "--root", paths[0], "--pidfile", paths[1]];
        self.command("restore", images, &options);
        let pid = fs::read_to_string(file).unwrap().trim().parse().unwrap();
        self.init = Pid::from_raw(pid);
    }

    /// Dumps the tree and leaves it running, dumps and kills it, and restores it from a mount of the
    /// chain of both.
    fn ordeal(&mut self, round: &str) {
        let [first, second] = ["first", "second"].map(|name| format!("{name}-{round}"));
        self.dump(&first, &["-R"]);
        self.talk();
        let before = self.state();
        for known in
            ["nginx: master", "/dev/pts/0 crw", " 127.0.0.1/8 ", "- mqueue ", "/run/postgresql/"]
        {
            assert!(before.iter().any(|line| line.contains(known)), "{known}: {before:#?}");
        }
        self.dump(&second, &["--prev-images-dir", &format!("../{first}")]);
        wait_for("the end of the tree", || !Path::new(&format!("/proc/{}", self.init)).exists());
        {
            let point = self.path("mnt");
            let _mounted = Mounted::new(&self.path(&second), &point, &[]);
            self.restore(&point);
        }
        let after = self.state();
        let lacking = |from: &[String], of: &[String]| -> Vec<String> {
            from.iter().filter(|line| !of.contains(line)).cloned().collect()
        };
        let (gone, new) = (lacking(&before, &after), lacking(&after, &before));
        assert!(gone.is_empty() && new.is_empty(), "gone:\n{gone:#?}\nnew:\n{new:#?}");
        self.talk();
    }

    /// Goes through two dumps and a restore, twice, and sees all that was begun before to its end.
    fn goes_through_it(&mut self) {
        self.talk();
        self.ordeal("a");
        self.ordeal("b");
        fs::write(self.inside("run/psql.in"), "commit;\n").unwrap();
        wait_for("the end of the transaction", || self.read("run/psql.out").contains("COMMIT"));
        let sum = self.run("su postgres -c \"psql -XAtc 'select sum(n) from numbers'\"");
        assert_eq!(sum.trim(), (self.talked + 1).to_string());
        let (all, got) = ("var/www/html/large", "var/tmp/large");
        let len = fs::metadata(self.inside(all)).unwrap().len();
        wait_for("the end of the download", || {
            fs::metadata(self.inside(got)).unwrap().len() == len
        });
        assert!(fs::read(self.inside(all)).unwrap() == fs::read(self.inside(got)).unwrap());
        assert_eq!(self.read("run/curl.out"), "");
        // The first process starts again what ends, and cron what is due.
        self.run("pkill -x rsyslogd");
        wait_for("a new server", || self.run("pgrep -x rsyslogd || true").trim() != "");
        self.run("nginx -s reload");
        let ticks = self.read("var/log/ticks").lines().count();
        let begin = Instant::now();
        while self.read("var/log/ticks").lines().count() == ticks {
            assert!(begin.elapsed() < A_MINUTE * slowness(), "cron does nothing");
            std::thread::sleep(Duration::from_millis(100));
        }
        self.talk_without_transaction();
    }

    fn talk_without_transaction(&self) {
        let page = self.run("curl -sS http://localhost/");
        assert!(page.contains("Welcome to nginx"), "{page}");
        assert_eq!(self.run("ssh localhost echo a new session"), "a new session\n");
    }
}

impl Drop for Debian {
    fn drop(&mut self) {
        // The kernel ends all others with it.
        let _ = kill(self.init, Signal::SIGKILL);
        let _ = self.outside.kill();
        let _ = self.outside.wait();
        let proc = format!("/proc/{}", self.init);
        let begin = Instant::now();
        while Path::new(&proc).exists() && begin.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(10));
        }
        if !self.had_payload {
            let _ = fs::remove_dir(PAYLOAD);
        }
        let _ = umount2(&self.path("root"), MntFlags::MNT_DETACH);
        if std::thread::panicking() && std::env::var_os("RCRIU_TEST_KEEP").is_some() {
            self.dir.disable_cleanup(true);
            eprintln!("kept {}", self.dir.path().display());
        }
    }
}

fn needs() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    slow();
    for program in ["debootstrap", "unshare", "nsenter", "ip", "ssh-keygen"] {
        require(Cap::Program(program));
    }
}

#[test]
fn privileged_debian_in_namespaces() {
    const UNSHARE: [&str; 11] = [
        "unshare", "--pid", "--mount", "--net", "--ipc", "--uts", "--cgroup", "--fork", "bash",
        "BOOT", "ROOT",
    ];
    needs();
    let mut debian = Debian::boot(&[&UNSHARE[..], &["/sbin/init"]].concat());
    // Those of the machine.
    debian.options = vec!["--manage-cgroups=ignore".to_owned()];
    debian.goes_through_it();
}

/// Mounts of deleted files over those of `/proc`, hidden ones, and groups of mounts.
#[test]
fn privileged_debian_in_systemd_nspawn() {
    const NSPAWN: [&str; 8] = [
        "systemd-nspawn",
        "--quiet",
        "--register=no",
        "--keep-unit",
        "--private-network",
        "--console=pipe",
        "--directory",
        "ROOT",
    ];
    needs();
    require(Cap::Program("systemd-nspawn"));
    let mut debian = Debian::boot(&[&NSPAWN[..], &["/sbin/init"]].concat());
    // A directory of the host by which systemd-nspawn sends mounts, and which goes away with it.
    debian.options =
        vec!["--skip-mnt=/run/host/incoming".to_owned(), "--manage-cgroups".to_owned()];
    debian.goes_through_it();
}
