//! A dump leaves no trace in its target: what the target has and is, and what it costs,
//! is the same before and after each kind of dump.
//!
//! `dump -R` of every state is for `tests/live.rs`. Here are other kinds of dumps of some
//! states, and programs that would pay dearly for a dump that does it wrong.
//!
//! All of it needs root.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use common::{
    Cap,
    live::{Live, directory, engine, state_of, wait_for, workload},
    require, skip, slow,
    swap::Swap,
    untouched::Before,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcriu::units::HostPid;
use tempfile::TempDir;

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
        let output = self.try_dump(live, options);
        assert!(output.status.success(), "{self:?}: {}", live.complaint(&output, "dump.log"));
    }

    /// The same, if the tree can be dumped.
    fn try_dump(self, live: &mut Live, options: &[&str]) -> Output {
        let _ = fs::remove_dir_all(live.images());
        let (command, own): (&str, &[&str]) = match self {
            Self::Running => ("dump", &["-R"]),
            Self::Stopped => ("dump", &["-s"]),
            Self::PreDump => ("pre-dump", &[]),
            Self::Tracked => ("dump", &["-R", "--track-mem"]),
            Self::TrackedPreDump => ("pre-dump", &["--track-mem"]),
        };
        let output = live.try_run(command, &[own, options].concat());
        if let Self::Stopped = self {
            for pid in live.tree() {
                // Of those that are on their way out, nothing is to go on.
                let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
            }
        }
        output
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

/// All states, also those that are refused. That they can be dumped at all is for
/// `tests/live.rs`.
#[test]
fn privileged_every_state_is_untouched_by_every_kind_of_dump() {
    /// They see that `dump -s` stops the tree, and that this test tells it to go on; or a
    /// file of theirs keeps the name that a restore needs.
    const SEE_STOPS: [&str; 8] = [
        "stopped_child",
        "stops_told_and_untold",
        "exit_signals",
        "stopped_root",
        "stopped_twice",
        "no_ignored_signal",
        "no_room_nor_signal",
        "deleted_linked_file",
    ];
    /// They need what not every machine has.
    const NEEDY: [&str; 5] =
        ["hugetlb_private", "hugetlb_shared", "hugetlb_memfd", "hugetlb_sysv", "protection_keys"];
    slow();
    require(Cap::Ptrace);
    let list = Command::new(workload()).arg("--list").output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let mut failed = Vec::new();
    for name in list.lines().filter(|name| !NEEDY.contains(name)) {
        let run = std::panic::catch_unwind(|| {
            let mut live = Live::workload(name);
            for kind in KINDS {
                if SEE_STOPS.contains(&name) && matches!(kind, Kind::Stopped) {
                    continue;
                }
                let mut before = Before::of(&mut live);
                let mut options: &[&str] = &[];
                if name == "deleted_linked_file" {
                    (before, options) = (before.but_for_names(), &["--link-remap"]);
                }
                kind.try_dump(&mut live, options);
                before.assert_untouched(&mut live, &format!("{name}: {kind:?}"));
            }
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

/// What is in swap would count as memory again, and could end the process where that is
/// limited.
#[test]
fn privileged_memory_in_swap_stays_there() {
    require(Cap::Ptrace);
    let _swap = Swap::make();
    for name in ["swapped_out", "swapped_object"] {
        let mut live = Live::workload(name);
        assert!(kib(&mut live, "Swap") >= 8 << 10, "{name}");
        untouched(&mut live, &KINDS, &[]);
        live.verdict();
    }
}

/// A machine's pool of huge pages, made smaller: the test uses all of them in five dumps,
/// which takes long with an emulated processor. Any other pool stays as it is.
struct Pool(String);

impl Pool {
    const PAGES: u32 = 8;

    fn path(name: &str) -> String {
        format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}")
    }

    fn shrink() -> Self {
        let old = fs::read_to_string(Self::path("nr_hugepages")).unwrap_or_default();
        let shrinks = Cap::DebianKernel.is_here()
            && old.trim().parse().is_ok_and(|pages: u32| pages > Self::PAGES);
        if shrinks {
            fs::write(Self::path("nr_hugepages"), Self::PAGES.to_string()).unwrap();
        }
        Self(if shrinks { old } else { String::new() })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if !self.0.is_empty() {
            let _ = fs::write(Self::path("nr_hugepages"), &self.0);
        }
    }
}

/// With an empty pool of huge pages there is none for a copy: a process that needs one is
/// killed by SIGBUS.
#[test]
#[ignore = "needs all huge pages for itself: tests/vm/ci, or vm.nr_hugepages and --ignored"]
fn privileged_huge_pages_of_an_empty_pool_are_not_copied() {
    require(Cap::Ptrace);
    let _pool = Pool::shrink();
    let path = Pool::path("free_hugepages");
    let free = || fs::read_to_string(&path).unwrap().trim().parse::<u32>().unwrap();
    if free() == 0 {
        skip("free huge pages of 2 MiB");
    }
    let mut live = Live::workload("forks_share_hugetlb");
    untouched(&mut live, &KINDS, &[]);
    assert_eq!(free(), 0);
    live.verdict();
}

#[test]
fn tests_of_machines_exist() {
    // A machine has huge pages that nothing else uses.
    let test = "privileged_huge_pages_of_an_empty_pool_are_not_copied";
    common::machines::tell(&[(test, &["6.1", "6.12"])]);
}

/// Which calls notice that they were stopped: the list in src/docs/limits.md.
#[test]
fn privileged_calls_that_a_dump_interrupts_are_known() {
    require(Cap::Ptrace);
    let mut live = Live::workload("interrupted");
    Kind::Running.dump(&mut live, &[]);
    live.verdict();
}

/// A dump whose worker has stopped itself at a point.
struct StoppedDump {
    front: Child,
    worker: Pid,
}

impl StoppedDump {
    fn begin(live: &mut Live, command: &str, arguments: &[&str], point: &str) -> Self {
        live.tree();
        fs::create_dir_all(live.images()).unwrap();
        let mut front = Command::new(engine())
            .args([command, "-t", &live.root.to_string(), "-D"])
            .arg(live.images())
            .args(arguments)
            .env("RCRIU_FAULT", format!("{point}:stop"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let children = format!("/proc/{0}/task/{0}/children", front.id());
        let mut worker = None;
        wait_for(&format!("a dump to stop at {point}"), || {
            assert_eq!(front.try_wait().unwrap(), None, "{point} is never hit");
            let text = fs::read_to_string(&children).unwrap();
            let stopped = |pid: &i32| state_of(*pid) == Some('T');
            worker = text.split_whitespace().filter_map(|pid| pid.parse().ok()).find(stopped);
            worker.is_some()
        });
        Self { front, worker: Pid::from_raw(worker.unwrap()) }
    }

    /// Lets it go on, and returns what it says at its end.
    fn finish(self) -> Output {
        let Self { mut front, worker } = self;
        wait_for("the end of the dump", || {
            // Again and again: other threads may have been on their way to the point.
            let _ = kill(worker, Signal::SIGCONT);
            front.try_wait().unwrap().is_some()
        });
        front.wait_with_output().unwrap()
    }
}

/// A dump is none if one of the processes has not lived to see its end.
#[test]
fn privileged_a_process_that_dies_meanwhile_is_no_success() {
    require(Cap::Ptrace);
    let cases: [(&str, &[&str], &str); 8] = [
        ("dump", &[], "dump-frozen"),
        ("dump", &["-R"], "dump-asked"),
        ("dump", &["-R"], "dump-files"),
        ("dump", &["-R"], "dump-memory"),
        ("dump", &[], "dump-memory"),
        ("dump", &["-s"], "dump-written"),
        ("dump", &[], "dump-synced"),
        ("pre-dump", &[], "dump-memory"),
    ];
    for (command, arguments, point) in cases {
        let what = format!("{command} {arguments:?}, at {point}");
        let mut live = Live::workload("cow_tree");
        let root = live.root.as_raw();
        let victim = live.tree().into_iter().filter(|pid| *pid != root).max().unwrap();
        let dump = StoppedDump::begin(&mut live, command, arguments, point);
        kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
        let output = dump.finish();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{what}: {said}");
        assert!(said.contains(&format!("process {victim} was killed")), "{what}: {said}");
        assert!(!live.images().join("inventory.img").exists(), "{what}");
        assert!(!live.images().join(".unfinished").exists(), "{what}");
        // All others run on.
        let left = live.tree();
        let runs = |pid: &i32| matches!(state_of(*pid), Some('S' | 'R'));
        wait_for("the others to run on", || left.iter().filter(|pid| **pid != victim).all(runs));
        assert_eq!(left.iter().filter(|pid| **pid != victim).count(), 3, "{what}");
    }
}

/// Processes that end by themselves are no reason to give up a pre-dump.
#[test]
fn privileged_a_process_that_exits_during_a_pre_dump_is_no_failure() {
    require(Cap::Ptrace);
    let dir = directory();
    let script = "mkfifo gate; (dd if=gate of=/dev/null count=1 2>/dev/null; exit 3) & \
                  echo ready >status.new; mv status.new status; wait; sleep 1000";
    let mut live = Live::program("sh", &["-c", script], dir);
    live.wait_ready();
    wait_for("the end of mv", || live.tree().len() == 3);
    let dump = StoppedDump::begin(&mut live, "pre-dump", &[], "dump-written");
    fs::write(live.path("gate"), "x").unwrap();
    wait_for("the children's end", || live.tree().len() == 2);
    let output = dump.finish();
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("in a way that this kernel does not report") {
        skip("a kernel that tells how a process has ended (Linux 6.15)");
    }
    assert!(output.status.success(), "{said}");
}

/// A memory cgroup of a test's own.
struct Group(PathBuf);

/// The end of the names of a group's files: of its limit, and of its usage.
const GROUP_FILES: [[&str; 2]; 2] =
    [["memory.limit_in_bytes", "memory.usage_in_bytes"], ["memory.max", "memory.current"]];

impl Group {
    fn new(limit: u64) -> Self {
        let own = HostPid(std::process::id().cast_signed());
        let mounts = rcriu::proc::mounts().unwrap();
        for (_, controllers, path) in rcriu::proc::cgroups(own).unwrap() {
            let Ok(parent) = rcriu::proc::cgroup_directory(&controllers, &path, &mounts) else {
                continue;
            };
            static NUMBER: AtomicU32 = AtomicU32::new(0);
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let dir = parent.join(format!("rcriu-test-{}-{number}", std::process::id()));
            if fs::create_dir(&dir).is_err() {
                continue;
            }
            let group = Self(dir);
            if let Some([name, _]) = group.files() {
                fs::write(group.0.join(name), limit.to_string()).unwrap();
                return group;
            }
        }
        skip("memory cgroups (version 1, or version 2 where this one may have children)");
    }

    fn files(&self) -> Option<[&str; 2]> {
        GROUP_FILES.into_iter().find(|[limit, _]| self.0.join(limit).exists())
    }

    fn usage(&self) -> PathBuf {
        self.0.join(self.files().unwrap()[1])
    }

    fn used(&self) -> u64 {
        fs::read_to_string(self.usage()).unwrap().trim().parse().unwrap()
    }

    /// How often the kernel has killed a process for want of memory.
    fn kills(&self) -> Option<u64> {
        let texts = ["memory.oom_control", "memory.events"]
            .map(|name| fs::read_to_string(self.0.join(name)).unwrap_or_default());
        let line = texts.iter().flat_map(|text| text.lines()).find(|l| l.starts_with("oom_kill "));
        line?.split(' ').nth(1)?.parse().ok()
    }

    /// Starts a state in the group.
    fn workload(&self, name: &str, dir: TempDir) -> Live {
        let procs = self.0.join("cgroup.procs");
        let status = dir.path().join("status");
        let program = workload();
        let script = format!(
            "echo $$ >{} && exec {} {name} {}",
            procs.display(),
            program.display(),
            status.display()
        );
        let live = Live::program("sh", &["-c", &script], dir);
        live.wait_ready();
        live
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let begin = Instant::now();
        while fs::remove_dir(&self.0).is_err() && begin.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// 68 MiB of 100 are in use: a copy for each process would be the end of one.
#[test]
fn privileged_a_memory_limit_is_not_reached_by_a_dump() {
    const SLACK: u64 = 2 << 20;
    require(Cap::Ptrace);
    let group = Group::new(100 << 20);
    let mut live = group.workload("forks_share", directory());
    for kind in KINDS {
        let used = group.used();
        assert!((60 << 20..80 << 20).contains(&used), "{used} bytes");
        untouched(&mut live, &[kind], &[]);
        // The kernel counts ahead, for each processor.
        assert!(group.used() < used + SLACK, "{kind:?}: {used} bytes, then {}", group.used());
        assert_eq!(group.kills().unwrap_or(0), 0, "{kind:?}");
    }
    live.verdict();
    drop(live);
}

/// The kernel would kill a process for the little that asking it takes.
#[test]
fn privileged_a_process_without_room_is_not_asked() {
    const KIB: u64 = 24 << 10;
    require(Cap::Ptrace);
    let group = Group::new(KIB << 10);
    let dir = directory();
    fs::write(dir.path().join("status.kib"), KIB.to_string()).unwrap();
    fs::write(dir.path().join("status.usage"), group.usage().to_str().unwrap()).unwrap();
    let mut live = group.workload("full_cgroup", dir);
    let before = Before::of(&mut live);
    let output = live.try_dump(&["-R"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("raise the limit"), "{said}");
    assert_eq!(group.kills().unwrap_or(0), 0);
    before.assert_untouched(&mut live, "a dump that was refused");
    // Without a word to the process it can be done.
    Kind::PreDump.dump(&mut live, &[]);
    before.assert_untouched(&mut live, "a pre-dump");
    live.verdict();
    drop(live);
}
