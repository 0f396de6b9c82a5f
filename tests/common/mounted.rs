//! Mounts that are gone when the test ends, however it ends.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output},
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::is_mounted;

/// The program under test.
pub const IMGFS: &str = env!("CARGO_BIN_EXE_imgfs");

/// Bounds every wait; nothing that works takes as long.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for a condition.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE * super::slowness(), "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs `imgfs` to its end.
pub fn imgfs(arguments: &[&str]) -> Output {
    Command::new(IMGFS).args(arguments).output().unwrap()
}

/// A chain mounted by a daemon in the foreground, which is our child.
#[derive(Debug)]
pub struct Mounted {
    pub point: PathBuf,
    pub log: PathBuf,
    child: Child,
}

impl Mounted {
    /// Mounts `chain` at `point`, which is made if need be.
    pub fn new(chain: &Path, point: &Path, arguments: &[&str]) -> Self {
        Self::by(Command::new(IMGFS), chain, point, arguments)
    }

    /// Does so by a command that becomes `imgfs`.
    pub fn by(mut imgfs: Command, chain: &Path, point: &Path, arguments: &[&str]) -> Self {
        fs::create_dir_all(point).unwrap();
        let log = point.with_extension("log");
        let child = imgfs
            .arg("mount")
            .args([chain, point])
            .args(["--foreground", "--quiet"])
            .arg("--log-file")
            .arg(&log)
            .args(arguments)
            .spawn()
            .unwrap();
        let mut mounted = Self { point: point.to_owned(), log, child };
        wait_for("the mount", || {
            assert_eq!(mounted.child.try_wait().unwrap(), None, "imgfs has exited");
            is_mounted(&mounted.point)
        });
        mounted
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    /// Sends a signal to the daemon.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Waits for the daemon's end and returns its exit status.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let mut status = None;
        wait_for("the daemon's end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.point.join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    pub fn log_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if is_mounted(&self.point) {
            let _ = umount2(&self.point, MntFlags::MNT_DETACH);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Detaches what is mounted at a path when it goes out of scope.
#[derive(Debug)]
pub struct Detach(pub PathBuf);

impl Drop for Detach {
    fn drop(&mut self) {
        if is_mounted(&self.0) {
            let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        }
    }
}
