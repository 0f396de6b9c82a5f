//! What the privileged tests and the benchmarks share.
#![allow(dead_code, clippy::allow_attributes, reason = "every test takes a part of it")]

pub mod chain;
pub mod dumps;
pub mod live;
pub mod loops;
pub mod mounted;
pub mod peak;
pub mod recorder;
pub mod same;

use std::{fs::File, path::Path, sync::OnceLock};

/// What a test needs of the machine.
#[derive(Clone, Copy, Debug)]
pub enum Cap {
    /// To mount file systems in user space, as root.
    Fuse,
    /// To stop, read and restore processes of any user.
    Ptrace,
    /// To mount files as file systems, as root.
    Loop,
    /// Huge pages of 2 MiB that are free.
    HugePages,
    /// A processor with protection keys for memory.
    ProtectionKeys,
    /// A program in the search path.
    Program(&'static str),
}

/// Huge pages that a test may use.
const HUGE_PAGES: u32 = 32;

impl Cap {
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
                let free = std::fs::read_to_string(path).unwrap_or_default();
                let free: u32 = free.trim().parse().unwrap_or(0);
                (free < HUGE_PAGES)
                    .then(|| format!("{HUGE_PAGES} free huge pages (sysctl vm.nr_hugepages)"))
            }
            Self::ProtectionKeys => {
                let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
                let has = text.split_whitespace().any(|word| word == "ospke");
                (!has)
                    .then(|| "a processor with protection keys (ospke in /proc/cpuinfo)".to_owned())
            }
            Self::Program(name) => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                let found = std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
                (!found).then(|| format!("the program {name}"))
            }
        }
    }
}

/// Checks that the machine has what a test needs.
///
/// A test that cannot run fails: the test runner has no other way not to count
/// it as passed. The message says how to leave it out knowingly.
pub fn require(cap: Cap) {
    if let Some(missing) = cap.missing() {
        panic!(
            "this test needs {missing}; run the tests as root on a machine that has it, or leave \
             out those that need more than an ordinary user: cargo test -- --skip privileged"
        );
    }
}

/// How many times slower than usual the machine is, as who runs the tests says
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
    rcriu::fs::Mounted::at(path).unwrap().is_some_and(|m| m.fs_type == rcriu::fs::FS_TYPE)
}
