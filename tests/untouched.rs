//! A dump leaves no trace in its target: what the target has and is, and what it costs,
//! is the same before and after each kind of dump.
//!
//! `dump -R` of every state is for `tests/live.rs`. Here are other kinds of dumps of some
//! states, and programs that would pay dearly for a dump that does it wrong.
//!
//! All of it needs root.

mod common;

use std::{fs, path::Path};

use common::{
    Cap,
    live::{Live, directory, workload},
    require, skip, slow,
    untouched::Before,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A kind of dump after which the tree goes on.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Running,
    Stopped,
    PreDump,
    Tracked,
    TrackedPreDump,
}

const KINDS: [Kind; 5] =
    [Kind::Running, Kind::Stopped, Kind::PreDump, Kind::Tracked, Kind::TrackedPreDump];

impl Kind {
    /// Makes one dump of this kind into an empty directory.
    fn dump(self, live: &mut Live, options: &[&str]) {
        let _ = fs::remove_dir_all(live.images());
        let (command, own): (&str, &[&str]) = match self {
            Self::Running => ("dump", &["-R"]),
            Self::Stopped => ("dump", &["-s"]),
            Self::PreDump => ("pre-dump", &[]),
            Self::Tracked => ("dump", &["-R", "--track-mem"]),
            Self::TrackedPreDump => ("pre-dump", &["--track-mem"]),
        };
        let output = live.try_run(command, &[own, options].concat());
        assert!(output.status.success(), "{self:?}: {}", live.complaint(&output, "dump.log"));
        if let Self::Stopped = self {
            for pid in live.tree() {
                // Of those that are on their way out, nothing is to go on.
                let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
            }
        }
    }
}

/// Dumps a tree in several ways, and compares it each time.
fn untouched(live: &mut Live, kinds: &[Kind], options: &[&str]) {
    for kind in kinds {
        let mut before = Before::of(live);
        if options.contains(&"--link-remap") {
            before = before.but_for_names();
        }
        kind.dump(live, options);
        before.assert_untouched(live, &format!("{kind:?}"));
    }
}

fn state_untouched(name: &str) {
    require(Cap::Ptrace);
    let mut live = Live::workload(name);
    untouched(&mut live, &KINDS, &[]);
    live.verdict();
}

macro_rules! states {
    ($($name:ident)*) => {
        mod privileged_state {
            $(#[test]
            fn $name() {
                super::state_untouched(stringify!($name));
            })*
        }
    };
}

// What processes share, what is on its way to them, and what runs on by itself.
states! {
    cow_tree
    private_file
    memfd_mapping
    mlocked
    threads
    sessions
    pending_many
    posix_timers
    timerfds
    epoll
    deleted_file
    unix_queued_descriptors
}

/// All states that a program has: as an example of a tree that others could be.
#[test]
fn privileged_every_state_is_untouched_by_every_kind_of_dump() {
    slow();
    require(Cap::Ptrace);
    let list = std::process::Command::new(workload()).arg("--list").output().unwrap();
    // They need what not every machine has, cannot be dumped, or are stopped themselves,
    // so that they are no longer after they were told to go on.
    let others = |name: &&str| {
        let apart = ["unix_pending_data", "protection_keys", "local_descriptors", "stopped_child"];
        !name.starts_with("hugetlb_") && !apart.contains(name)
    };
    let mut failed = Vec::new();
    for name in String::from_utf8(list.stdout).unwrap().lines().filter(others) {
        let options: &[&str] = if name == "deleted_linked_file" { &["--link-remap"] } else { &[] };
        let run = std::panic::catch_unwind(|| {
            let mut live = Live::workload(name);
            untouched(&mut live, &KINDS, options);
            live.verdict();
        });
        if run.is_err() {
            failed.push(name.to_owned());
        }
    }
    assert!(failed.is_empty(), "changed by a dump: {failed:?}");
}

/// A parent and six forks with 64 MiB that none of them has written.
#[test]
fn privileged_memory_shared_by_forks_stays_shared() {
    require(Cap::Ptrace);
    let mut live = Live::workload("forks_share");
    let before = live.proportional_kib();
    assert!(before < 80 << 10, "{before} KiB");
    untouched(&mut live, &KINDS, &[]);
    let after = live.proportional_kib();
    assert!(after.abs_diff(before) < 64, "{before} KiB, then {after}");
    live.verdict();
}

#[test]
fn privileged_workers_of_a_server_share_its_memory() {
    const PYTHON: &str = "/usr/bin/python3";
    require(Cap::Ptrace);
    if !Path::new(PYTHON).exists() {
        skip(PYTHON);
    }
    let dir = directory();
    let path = dir.path().join("script.py");
    fs::write(&path, include_str!("programs/prefork.py")).unwrap();
    let status = dir.path().join("status");
    let words = [path.to_str().unwrap(), status.to_str().unwrap()];
    let mut live = Live::program(PYTHON, &words, dir);
    live.wait_ready();
    let before = live.proportional_kib();
    untouched(&mut live, &KINDS, &[]);
    let after = live.proportional_kib();
    assert!(after < before + 256, "{before} KiB, then {after}");
    live.verdict();
}

/// The sum over the tree of a line of `smaps_rollup`.
fn kib(live: &mut Live, line: &str) -> u64 {
    let rollup = |pid| fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let value = |text: String| -> Option<u64> {
        let rest = text.lines().find_map(|of| of.strip_prefix(line))?.strip_prefix(':')?;
        rest.trim().strip_suffix(" kB")?.parse().ok()
    };
    live.tree().into_iter().filter_map(|pid| value(rollup(pid))).sum()
}

#[test]
fn privileged_huge_pages_stay_whole() {
    require(Cap::Ptrace);
    let enabled = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    if enabled.is_err() || enabled.is_ok_and(|text| text.contains("[never]")) {
        skip("transparent huge pages");
    }
    let mut live = Live::workload("forks_share_huge");
    let huge = kib(&mut live, "AnonHugePages");
    assert!(huge > 0, "the kernel has given no huge page");
    untouched(&mut live, &KINDS, &[]);
    assert_eq!(kib(&mut live, "AnonHugePages"), huge);
    live.verdict();
}

/// Lets the kernel merge equal pages until this is dropped.
struct Merging(String);

impl Merging {
    const FILES: [(&'static str, &'static str); 3] =
        [("run", "1"), ("pages_to_scan", "2000"), ("sleep_millisecs", "5")];

    fn path(name: &str) -> String {
        format!("/sys/kernel/mm/ksm/{name}")
    }

    fn begin() -> Self {
        let old = Self::FILES.map(|(name, value)| {
            let path = Self::path(name);
            let Ok(old) = fs::read_to_string(&path) else {
                skip("a kernel that merges pages (KSM)")
            };
            if fs::write(&path, value).is_err() {
                skip("a kernel that may be told to merge pages (KSM)");
            }
            old.trim().to_owned()
        });
        Self(old.join(" "))
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        for ((name, _), old) in Self::FILES.iter().zip(self.0.split(' ')) {
            let _ = fs::write(Self::path(name), old);
        }
    }
}

#[test]
fn privileged_merged_pages_stay_merged() {
    require(Cap::Ptrace);
    let _merging = Merging::begin();
    let mut live = Live::workload("merged");
    // Nothing is merged again behind a dump's back.
    fs::write(Merging::path("run"), "0").unwrap();
    untouched(&mut live, &KINDS, &[]);
    live.verdict();
}

/// With an empty pool of huge pages there is none for a copy: a process that needs one is
/// killed by SIGBUS.
#[test]
#[ignore = "needs huge pages for itself: tests/vm/run, or vm.nr_hugepages"]
fn privileged_huge_pages_of_an_empty_pool_are_not_copied() {
    require(Cap::Ptrace);
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = || fs::read_to_string(path).unwrap().trim().parse::<u32>().unwrap();
    if free() == 0 {
        skip("free huge pages of 2 MiB");
    }
    let mut live = Live::workload("forks_share_hugetlb");
    untouched(&mut live, &KINDS, &[]);
    assert_eq!(free(), 0);
    live.verdict();
}
