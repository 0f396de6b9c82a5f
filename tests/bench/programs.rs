//! Runs programs that have CRIU's command line, and measures them.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::libc;

/// A program with CRIU's command line.
pub struct Program {
    pub name: &'static str,
    path: OsString,
}

/// What a run took.
pub struct Run {
    pub seconds: f64,
    pub peak_kib: u64,
}

impl Program {
    /// Installs rcriu, and the `criu` that `RCRIU_BENCH_CRIU` names or that is in `PATH`, in a directory.
    pub fn both(dir: &Path) -> (Self, Option<Self>) {
        let ours = Self::install("rcriu", env!("CARGO_BIN_EXE_rcriu").as_ref(), dir);
        (ours, criu().map(|path| Self::install("criu", &path, dir)))
    }

    /// Copies a program to a directory. What a linker has just written lies in the page
    /// cache in single pages, and takes a sixth longer to start.
    fn install(name: &'static str, path: &OsStr, dir: &Path) -> Self {
        let copy = dir.join(name);
        fs::copy(path, &copy).unwrap();
        Self { name, path: copy.into() }
    }

    #[expect(clippy::zombie_processes, reason = "waited for by its pid")]
    pub fn run(&self, arguments: &[&str], images: &Path) -> Run {
        let mut command = Command::new(&self.path);
        command.args(arguments).arg("-D").arg(images).stdin(Stdio::null());
        command.stdout(Stdio::null());
        let begin = Instant::now();
        let child = command.spawn().expect("the program exists");
        let (success, peak_kib) = wait(&child);
        let seconds = begin.elapsed().as_secs_f64();
        assert!(success, "{} {arguments:?} failed; see {}", self.name, images.display());
        Run { seconds, peak_kib }
    }
}

fn criu() -> Option<OsString> {
    std::env::var_os("RCRIU_BENCH_CRIU").or_else(|| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).map(|dir| dir.join("criu"));
        found.into_iter().find(|path| path.is_file()).map(PathBuf::into_os_string)
    })
}

/// Continues in a mount namespace of its own with a tmpfs on `/run`, if there is a `criu`. Without it, CRIU
/// asks the kernel anew what it can do, which takes longer than all else of a small process.
pub fn enter_own_run() {
    if criu().is_none() || std::env::var_os("RCRIU_BENCH_INSIDE").is_some() {
        return;
    }
    let script = "mount -t tmpfs tmpfs /run && exec \"$0\" \"$@\"";
    let error = Command::new("unshare")
        .args(["-m", "sh", "-c", script])
        .arg(std::env::current_exe().expect("it has a path"))
        .args(std::env::args_os().skip(1))
        .env("RCRIU_BENCH_INSIDE", "1")
        .exec();
    panic!("unshare: {error}");
}

/// Waits for a child; tells whether it succeeded, and its peak memory.
#[expect(unsafe_code, reason = "no crate has wait4")]
fn wait(child: &Child) -> (bool, u64) {
    // SAFETY: zeros are a valid `rusage`, which is numbers only.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    let mut status = 0;
    let pid = child.id().cast_signed();
    // SAFETY: both pointers are to locals of the right types that outlive the call.
    let waited = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
    assert_eq!(waited, pid);
    (status == 0, usage.ru_maxrss.unsigned_abs())
}

pub fn await_that(mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < end, "it takes too long");
        thread::sleep(Duration::from_millis(2));
    }
}

#[derive(Default)]
pub struct Times {
    pub seconds: Vec<f64>,
    pub peak_kib: u64,
}

impl Times {
    pub fn add(&mut self, run: &Run) {
        self.seconds.push(run.seconds);
        self.peak_kib = self.peak_kib.max(run.peak_kib);
    }

    pub fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }
}
