//! Code that the privileged tests and the benchmarks share.
#![allow(dead_code, clippy::allow_attributes, reason = "every test takes a part of it")]

pub mod busybox;
pub mod chain;
pub mod client;
pub mod dumps;
pub mod live;
pub mod look;
pub mod loops;
pub mod machines;
pub mod mounted;
pub mod net;
pub mod page_server;
pub mod peak;
pub mod recorder;
pub mod redis;
pub mod same;
mod skip;
pub mod swap;
pub mod trixie;
pub mod untouched;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use nix::unistd::{Whence, lseek};
use rcriu::sys::Features;

pub use skip::skip;

/// What a test needs of the machine.
#[derive(Clone, Copy, Debug)]
pub enum Cap {
    /// Mounting file systems in user space, as root.
    Fuse,
    /// Stopping, reading and restoring processes of any user.
    Ptrace,
    /// Mounting files as file systems, as root.
    Loop,
    /// Huge pages of 2 MiB that are free.
    HugePages,
    /// A processor with something, by its name among the flags in `/proc/cpuinfo`.
    Processor(&'static str),
    /// A kernel with a feature, by its name.
    Kernel(&'static str, fn(&Features) -> bool),
    /// One of Debian's kernels, in a machine of `tests/vm/run`.
    DebianKernel,
    /// CRIU, by the name of one of its commands.
    Peer(&'static str),
    /// A program in the search path.
    Program(&'static str),
    /// Time: the slow tests were asked for.
    Time,
}

/// Huge pages that a test may use.
const HUGE_PAGES: u32 = 32;

/// If set, tests that take long are run.
const ALL: &str = "RCRIU_TEST_ALL";

impl Cap {
    /// Whether the machine has it.
    pub fn is_here(self) -> bool {
        self.missing().is_none()
    }

    /// Says what is missing.
    fn missing(self) -> Option<String> {
        match self {
            Self::Fuse if !nix::unistd::geteuid().is_root() => Some("root".to_owned()),
            Self::Fuse => File::options()
                .read(true)
                .write(true)
                .open("/dev/fuse")
                .err()
                .map(|error| format!("/dev/fuse ({error})")),
            Self::Ptrace => {
                (!nix::unistd::geteuid().is_root()).then(|| "root, to trace processes".to_owned())
            }
            Self::Loop if !nix::unistd::geteuid().is_root() => Some("root".to_owned()),
            Self::Loop => (!Path::new("/dev/loop-control").exists())
                .then(|| "loop devices (/dev/loop-control)".to_owned()),
            Self::HugePages => {
                let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
                let free = fs::read_to_string(path).unwrap_or_default();
                let free: u32 = free.trim().parse().unwrap_or(0);
                (free < HUGE_PAGES)
                    .then(|| format!("{HUGE_PAGES} free huge pages (sysctl vm.nr_hugepages)"))
            }
            Self::Processor(flag) => {
                let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
                let has = text.split_whitespace().any(|word| word == flag);
                (!has).then(|| format!("a processor with {flag} (flags in /proc/cpuinfo)"))
            }
            Self::Kernel(name, has) => {
                static FEATURES: OnceLock<Features> = OnceLock::new();
                (!has(FEATURES.get_or_init(Features::probe)))
                    .then(|| format!("a kernel with {name}"))
            }
            Self::DebianKernel => std::env::var_os("RCRIU_VM")
                .is_none()
                .then(|| "one of Debian's kernels (tests/vm/run)".to_owned()),
            Self::Peer(name) => {
                let path = peer(name);
                let found = path.as_deref().is_some_and(Path::exists);
                (!found).then(|| format!("{name} of Debian's criu (tests/vm/run)"))
            }
            Self::Program(name) => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                let found = std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
                (!found).then(|| format!("the program {name}"))
            }
            Self::Time => {
                let all = std::env::var_os(ALL).is_some();
                (!all).then(|| format!("time (bash tests/run --all, or {ALL}=1)"))
            }
        }
    }
}

/// Returns where a command of the other program would be.
pub fn peer(name: &str) -> Option<PathBuf> {
    let dir = std::env::var_os("RCRIU_TEST_PEER").map(PathBuf::from).or_else(|| {
        let cache = PathBuf::from(std::env::var_os("RCRIU_VM_CACHE")?);
        Some(cache.join("criu/bin"))
    });
    Some(dir?.join(name))
}

/// Skips the test unless the machine has what it needs.
pub fn require(cap: Cap) {
    if let Some(missing) = cap.missing() {
        skip(&missing);
    }
}

/// Skips the test, which takes long, unless all tests are asked for.
pub fn slow() {
    require(Cap::Time);
}

/// How many times slower than usual the machine is, from the environment
/// (`RCRIU_TEST_SLOWNESS`): all bounds of waits are longer by this factor.
pub fn slowness() -> u32 {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    *SLOWNESS.get_or_init(|| match std::env::var("RCRIU_TEST_SLOWNESS") {
        Ok(value) => value.parse().expect("RCRIU_TEST_SLOWNESS is a number from 1 on"),
        Err(_) => 1,
    })
}

/// Whether a path is where the table of mounts has a mount of ours.
pub fn is_mounted(path: &Path) -> bool {
    let mounted = rcriu::fs::mounted_at(path).unwrap();
    mounted.is_some_and(|mount| mount.fs_type == rcriu::fs::FS_TYPE.as_bytes())
}

/// Returns the stretches of a file that are not holes, as byte offsets.
pub fn data_of(file: &File) -> Vec<std::ops::Range<i64>> {
    let mut found = Vec::new();
    let mut next = 0;
    while let Ok(start) = lseek(file, next, Whence::SeekData) {
        next = lseek(file, start, Whence::SeekHole).unwrap();
        found.push(start..next);
    }
    found
}

/// Returns how many bytes of a file are not holes. The blocks that it takes are more where
/// a file system keeps its own lists in them, as ext4 does for files of many extents.
pub fn stored_bytes(path: &Path) -> u64 {
    data_of(&File::open(path).unwrap()).iter().map(|data| (data.end - data.start) as u64).sum()
}
