//! Containers of LXC, whose `lxc-checkpoint` executes rcriu by the name of criu.
//!
//! Their root file system is that of busybox. A container counts, also on its console, and counts on after a
//! restore. All tests need root.

mod common;

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use common::{
    Cap,
    busybox::root_file_system,
    live::{directory, engine, wait_for},
    require,
};
use tempfile::TempDir;

/// Counts in a file and on a terminal, five times a second. Says in a file when the terminal is gone.
const COUNT: &str = "#!/bin/sh
exec </dev/TERMINAL >/dev/TERMINAL 2>&1
i=0
while true; do
    i=$((i+1))
    echo $i >/tmp/count
    echo number $i || echo gone >/tmp/gone
    sleep 0.2
done
";

struct Container {
    dir: TempDir,
    name: String,
    /// The cgroups [`pivots`] that were there before.
    others: Vec<PathBuf>,
}

/// Returns the cgroups into which the monitors of LXC move when they end, and which they leave behind.
fn pivots() -> Vec<PathBuf> {
    let all = fs::read_dir("/sys/fs/cgroup").unwrap().map(|entry| entry.unwrap().path());
    let places = all.chain([PathBuf::from("/sys/fs/cgroup")]).map(|dir| dir.join("lxc.pivot"));
    places.filter(|pivot| pivot.is_dir()).collect()
}

impl Container {
    /// Starts a container that counts on this terminal; `config` has more lines of its configuration.
    fn start(terminal: &str, config: &str) -> Self {
        require(Cap::Ptrace);
        for program in ["lxc-checkpoint", "busybox"] {
            require(Cap::Program(program));
        }
        let dir = directory();
        // Names of containers are those of cgroups, too.
        let name = dir.path().file_name().unwrap().to_str().unwrap();
        let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
        let container = Self { dir, name, others: pivots() };
        let root = container.root("");
        fs::create_dir_all(&root).unwrap();
        root_file_system(&root);
        let init = root.join("init");
        fs::write(&init, COUNT.replace("TERMINAL", terminal)).unwrap();
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
        let text = format!(
            "lxc.uts.name = counter
             lxc.rootfs.path = dir:{}
             lxc.init.cmd = /init
             lxc.mount.auto = proc:mixed sys:ro
             lxc.apparmor.profile = unconfined
             lxc.net.0.type = empty
             {config}\n",
            root.display()
        );
        let lines: Vec<&str> = text.lines().map(str::trim_start).collect();
        fs::write(container.of_lxc().join("config"), lines.join("\n") + "\n").unwrap();
        let bin = container.path("bin");
        fs::create_dir(&bin).unwrap();
        symlink(engine(), bin.join("criu")).unwrap();
        let started = container.lxc("lxc-start", &["-d"]);
        assert!(started.status.success(), "{}", said(&started));
        container.await_count(1);
        container
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The directory that LXC has for the container.
    fn of_lxc(&self) -> PathBuf {
        self.path("lxc").join(&self.name)
    }

    fn root(&self, name: &str) -> PathBuf {
        self.of_lxc().join("rootfs").join(name)
    }

    /// Runs a command of LXC on the container.
    fn lxc(&self, program: &str, arguments: &[&str]) -> Output {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = [self.path("bin")].into_iter().chain(std::env::split_paths(&path));
        let log = self.path("log");
        let failed = Command::new(program)
            .arg("-P")
            .arg(self.path("lxc"))
            .args(["-n", &self.name, "-o"])
            .arg(&log)
            .args(arguments)
            .env("PATH", std::env::join_paths(dirs).unwrap())
            .stdin(Stdio::null())
            // The monitor keeps pipes of ours open.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        Output {
            status: failed.unwrap(),
            stdout: Vec::new(),
            stderr: fs::read(log).unwrap_or_default(),
        }
    }

    /// Runs `lxc-checkpoint` with a directory of images, which is new if it does not exist.
    fn checkpoint(&self, images: &str, arguments: &[&str]) -> Output {
        let images = self.path(images);
        fs::create_dir_all(&images).unwrap();
        self.lxc("lxc-checkpoint", &[&["-D", images.to_str().unwrap()], arguments].concat())
    }

    fn count(&self) -> u64 {
        fs::read_to_string(self.root("tmp/count"))
            .map_or(0, |text| text.trim().parse().unwrap_or(0))
    }

    /// Waits until the container has counted up to a number, and said so on its terminal.
    fn await_count(&self, number: u64) {
        wait_for("the container to count", || self.count() >= number);
        assert!(!self.root("tmp/gone").exists(), "its terminal is gone");
    }

    fn first(&self) -> i32 {
        let output = Command::new("lxc-info")
            .arg("-P")
            .arg(self.path("lxc"))
            .args(["-n", &self.name, "-pH"])
            .output();
        String::from_utf8(output.unwrap().stdout).unwrap().trim().parse().expect("a pid")
    }

    /// Describes its mounts: what is mounted where, and how.
    fn mounts(&self) -> Vec<String> {
        let text = fs::read_to_string(format!("/proc/{}/mountinfo", self.first())).unwrap();
        let mut lines: Vec<String> = text
            .lines()
            .map(|line| line.split(' ').skip(3).take(3).collect::<Vec<_>>().join(" "))
            .collect();
        lines.sort_unstable();
        lines
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.lxc("lxc-stop", &["-k"]);
        for pivot in pivots().iter().filter(|pivot| !self.others.contains(pivot)) {
            // A monitor is in it for a moment.
            let is_gone = || fs::remove_dir(pivot).is_ok() || !pivot.exists();
            if !is_gone() && !std::thread::panicking() {
                wait_for("the monitors to leave lxc.pivot", is_gone);
            }
        }
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn fine(output: &Output) {
    assert!(output.status.success(), "{}", said(output));
}

#[test]
fn privileged_lxc_restores_a_container_with_its_console() {
    let container = Container::start("console", "lxc.tty.max = 0");
    let mounts = container.mounts();
    fine(&container.checkpoint("running", &[]));
    container.await_count(container.count() + 2);
    for images in ["first", "second"] {
        fine(&container.checkpoint(images, &["-s"]));
        let reached = container.count();
        fine(&container.checkpoint(images, &["-r"]));
        container.await_count(reached + 2);
        assert_eq!(container.mounts(), mounts);
    }
}

/// The monitor of LXC has the master, and starts anew with a restore: no terminal could be connected to it.
#[test]
fn privileged_lxc_containers_with_terminals_are_refused_by_name() {
    let container = Container::start("null", "lxc.tty.max = 1\nlxc.pty.max = 4");
    let output = container.checkpoint("images", &["-s"]);
    let text = said(&output);
    assert!(!output.status.success(), "{text}");
    let reason = "a mount at /dev/tty1 of a pseudoterminal whose other end is outside the tree";
    assert!(text.contains(reason), "{text}");
    container.await_count(container.count() + 2);
}
