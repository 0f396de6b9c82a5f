//! What a dump must leave as it was in its target, as far as the kernel shows it:
//! [`TreeState`] compares what a process is and has, [`Traces`] what it costs and what is on
//! its way to it.
//!
//! Most is compared exactly. Where it is not, a constant says why.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    time::{Duration, Instant},
};

use libc::c_int;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rcriu::{
    sys::process::{pidfd_getfd, pidfd_open, pidfd_open_thread},
    units::{HostPid, TargetFd},
};

use super::live::{Live, TreeState, witness};

/// Lines of `smaps_rollup` that are compared: memory that is not a file's. How a file's
/// pages are shared depends on what other programs run.
const MEMORY: [&str; 12] = [
    "Pss_Anon",
    "Pss_Shmem",
    "Anonymous",
    "KSM",
    "AnonHugePages",
    "ShmemPmdMapped",
    "Shared_Hugetlb",
    "Private_Hugetlb",
    "Swap",
    "SwapPss",
    "Locked",
    "LazyFree",
];

/// KiB that memory may grow by in a process: a page that it writes itself in the meantime,
/// such as one of its stack by a handler of a timer's signal; and two at the unused end of
/// the main thread's stack, which hold the frames by which threads come home.
const OWN_WRITES_KIB: u64 = 12;

/// KiB by which a share of memory that several have differs when it is rounded.
const ROUNDING_KIB: u64 = 1;

/// KiB of page tables that a process may have more: where the memory was that a dump maps
/// for a moment, the table stays if other memory is beside it.
const TABLES_KIB: u64 = 4;

/// Seconds that pass between looking at a clock and at a timer, on a busy machine.
const TIMER_SLACK_S: f64 = 0.5;

/// How long a tree may take to be as it was: a call that was stopped is begun again.
const QUIET_AFTER: Duration = Duration::from_secs(3);

/// How often a tree is looked at in that time, at least: on a busy machine a look takes a second,
/// and a value that moves may be the same in two of them.
const LOOKS: usize = 30;

/// How long a tree may take to come to rest before it is looked at.
const RESTS_AFTER: Duration = Duration::from_secs(2);

/// Kinds of events that a descriptor is asked for.
const EVENTS: PollFlags =
    PollFlags::POLLIN.union(PollFlags::POLLPRI).union(PollFlags::POLLOUT).union(PollFlags::POLLERR);

/// The device numbers of `/dev/ptmx` and of slaves (`include/uapi/linux/major.h`).
const MASTERS: std::ops::Range<u32> = 5..6;
const SLAVES: std::ops::Range<u32> = 136..144;

/// The time when a file's attributes were last changed.
const CHANGED: &str = "changed";

/// What of one process may not change.
type Process = BTreeMap<String, String>;

/// What of a tree may not change, by pid.
#[derive(Clone, Debug, PartialEq)]
pub struct Traces {
    taken: Instant,
    /// Whether files may be given names.
    names_change: bool,
    processes: BTreeMap<i32, Process>,
}

impl Traces {
    /// Looks at some processes.
    pub fn read(pids: &[i32]) -> Self {
        let taken = Instant::now();
        let mut processes: BTreeMap<_, _> = pids.iter().map(|pid| (*pid, look_at(*pid))).collect();
        for (pid, key, value) in semaphores(pids) {
            processes.entry(pid).or_default().insert(key, value);
        }
        Self { taken, names_change: false, processes }
    }

    /// Lists the differences to a later look at the same processes.
    pub fn differences(&self, later: &Self) -> Vec<String> {
        self.differing(later).into_values().collect()
    }

    /// The differences to a later look at the same processes, by process and key.
    fn differing(&self, later: &Self) -> BTreeMap<(i32, String), String> {
        let passed = later.taken - self.taken;
        let mut found = BTreeMap::new();
        for (pid, before) in &self.processes {
            let Some(after) = later.processes.get(pid) else { continue };
            for key in before.keys().chain(after.keys()).collect::<BTreeSet<_>>() {
                let none = "(none)".to_owned();
                let (before, after) =
                    (before.get(key).unwrap_or(&none), after.get(key).unwrap_or(&none));
                if self.names_change && key.ends_with(CHANGED) {
                    continue;
                }
                if before != after && !is_tolerated(key, before, after, passed) {
                    let text = format!("process {pid}: {key}: {before}, then {after}");
                    found.insert((*pid, key.clone()), text);
                }
            }
        }
        found
    }
}

/// Whether a difference is none of a dump's.
fn is_tolerated(key: &str, before: &str, after: &str, passed: Duration) -> bool {
    let number = |text: &str| text.split_whitespace().next()?.parse::<u64>().ok();
    if key.starts_with("timer left ") {
        // It runs. One that has ended may have begun anew.
        let seconds = |text: &str| text.parse::<f64>().ok();
        let (Some(before), Some(after)) = (seconds(before), seconds(after)) else { return false };
        let gone = passed.as_secs_f64() + TIMER_SLACK_S;
        return before <= gone || (after <= before && before - after <= gone);
    }
    let (Some(before), Some(after)) = (number(before), number(after)) else { return false };
    match key {
        "memory Anonymous" => before.abs_diff(after) <= OWN_WRITES_KIB,
        "memory Pss_Anon" => before.abs_diff(after) <= OWN_WRITES_KIB + ROUNDING_KIB,
        _ if key.starts_with("timer ticks ") => before < after,
        "status VmPTE" => before.abs_diff(after) <= TABLES_KIB,
        // A share of the memory that several have is rounded.
        "memory Pss_Shmem" | "memory SwapPss" => before.abs_diff(after) <= ROUNDING_KIB,
        _ => false,
    }
}

fn look_at(pid: i32) -> Process {
    let mut found = Process::new();
    let (leader, pid) = (pid, witness(pid));
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let mut lines = |prefix: &str, text: &str, wanted: &dyn Fn(&str) -> bool| {
        for (key, value) in text.lines().filter_map(|line| line.split_once(':')) {
            if wanted(key) {
                found.insert(format!("{prefix} {key}"), value.trim().to_owned());
            }
        }
    };
    lines("memory", &read("smaps_rollup"), &|key| MEMORY.contains(&key));
    let status = ["SigPnd", "ShdPnd", "VmLck", "VmPin", "VmSwap", "HugetlbPages", "VmPTE"];
    lines("status", &read("status"), &|key| status.contains(&key));
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let tid = task.file_name().into_string().expect("a tid");
        lines(&format!("thread {tid}"), &read(&format!("task/{tid}/status")), &|key| {
            key == "SigPnd"
        });
    }
    for line in read("ksm_stat").lines() {
        let Some((key, value)) = line.split_once(' ') else { continue };
        found.insert(format!("ksm {key}"), value.to_owned());
    }
    let open = if pid == leader { pidfd_open } else { pidfd_open_thread };
    let Ok(process) = open(HostPid(pid)) else { return found };
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().expect("a number");
        let number = name.parse().expect("a number");
        let info = read(&format!("fdinfo/{name}"));
        found.extend(descriptor(&name, &info));
        if let Ok(fd) = pidfd_getfd(&process, TargetFd(number)) {
            found.extend(open_file(&name, &fd));
        }
        // Whether it has expired shows in its ticks.
        if info.contains("it_value") {
            found.remove(&format!("fd {name} polls"));
        }
    }
    found
}

/// What `fdinfo` says of a descriptor. Its flags and position are in [`TreeState`], too.
fn descriptor(name: &str, info: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (at, line) in info.lines().enumerate() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        if key == "it_value" {
            // (seconds, nanoseconds)
            let digits: Vec<f64> = value
                .trim_matches(['(', ')'])
                .split(", ")
                .filter_map(|number| number.parse().ok())
                .collect();
            if let [seconds, nanoseconds] = digits[..] {
                let left = seconds + nanoseconds / 1e9;
                found.push((format!("timer left {name}"), left.to_string()));
            }
            continue;
        }
        if key == "ticks" {
            found.push((format!("timer ticks {name}"), value.to_owned()));
            continue;
        }
        // Keys are not unique: an epoll has a line for each descriptor.
        found.push((format!("fdinfo {name} {at} {key}"), value.to_owned()));
    }
    found
}

/// What the open file itself says.
fn open_file(name: &str, fd: &OwnedFd) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut add = |what: &str, value: String| found.push((format!("fd {name} {what}"), value));
    let file = File::from(fd.try_clone().expect("a descriptor"));
    let Ok(metadata) = file.metadata() else { return found };
    let is_terminal = |majors: std::ops::Range<u32>| {
        metadata.file_type().is_char_device() && majors.contains(&libc::major(metadata.rdev()))
    };
    for (what, seconds, nanoseconds) in [
        ("accessed", metadata.atime(), metadata.atime_nsec()),
        ("modified", metadata.mtime(), metadata.mtime_nsec()),
        (CHANGED, metadata.ctime(), metadata.ctime_nsec()),
    ] {
        // A dump reads the bytes that wait in a pair, and then resets the times of the slave, which
        // changes its ctime; all pairs share /dev/ptmx.
        let is_of_pair = is_terminal(MASTERS) || what == CHANGED && is_terminal(SLAVES);
        if !is_of_pair {
            add(what, format!("{seconds}.{nanoseconds:09}"));
        }
    }
    add("size, links", format!("{} {}", metadata.len(), metadata.nlink()));
    let kind = metadata.file_type();
    // To ask a device, such as a terminal or FUSE's, could have an effect there.
    if kind.is_char_device() || kind.is_block_device() {
        return found;
    }
    let mut asked = [PollFd::new(fd.as_fd(), EVENTS)];
    let answer = poll(&mut asked, PollTimeout::ZERO);
    add("polls", format!("{answer:?} {:?}", asked[0].revents()));
    for (what, request) in [("bytes to read", libc::FIONREAD), ("bytes to send", libc::TIOCOUTQ)] {
        if kind.is_fifo() || kind.is_socket() {
            add(what, ioctl(fd, request));
        }
    }
    if kind.is_socket() {
        for (what, option) in [("SO_PEEK_OFF", libc::SO_PEEK_OFF), ("SO_RCVBUF", libc::SO_RCVBUF)] {
            add(what, socket_option(fd, option));
        }
    }
    found
}

#[expect(unsafe_code, reason = "requests that nix does not have")]
fn ioctl(fd: &OwnedFd, request: libc::Ioctl) -> String {
    let mut value: c_int = 0;
    // SAFETY: both requests write one int, which outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) };
    if result == 0 { value.to_string() } else { std::io::Error::last_os_error().to_string() }
}

/// An option of sockets that may be asked for without an effect: no `SO_ERROR`, which
/// takes the error away. What is pending shows in the events.
#[expect(unsafe_code, reason = "options that nix does not have")]
fn socket_option(fd: &OwnedFd, option: c_int) -> String {
    let (mut value, mut len): (c_int, _) = (0, 4);
    let (level, fd) = (libc::SOL_SOCKET, fd.as_raw_fd());
    // SAFETY: value and length outlive the call, and the length is the value's.
    let result =
        unsafe { libc::getsockopt(fd, level, option, (&raw mut value).cast(), &raw mut len) };
    if result == 0 { value.to_string() } else { std::io::Error::last_os_error().to_string() }
}

/// The System V semaphores that processes were the last to change: of which, and their
/// values.
#[expect(unsafe_code, reason = "nix has no semctl")]
fn semaphores(pids: &[i32]) -> Vec<(i32, String, String)> {
    let mut found = Vec::new();
    let text = fs::read_to_string("/proc/sysvipc/sem").unwrap_or_default();
    for line in text.lines().skip(1) {
        let fields: Vec<i32> =
            line.split_whitespace().take(4).filter_map(|field| field.parse().ok()).collect();
        let [_, id, _, count] = fields[..] else { continue };
        for number in 0..count {
            // SAFETY: these commands take no fourth argument.
            let ask = |command| unsafe { libc::semctl(id, number, command) };
            let pid = ask(libc::GETPID);
            if pids.contains(&pid) {
                let value = format!("{} {}", ask(libc::GETVAL), ask(libc::GETNCNT));
                found.push((pid, format!("semaphore {id} {number}"), value));
            }
        }
    }
    found
}

/// What a tree was before a dump.
#[derive(Debug)]
pub struct Before {
    state: TreeState,
    traces: Traces,
}

impl Before {
    /// Looks at a tree that has come to rest.
    pub fn of(live: &mut Live) -> Self {
        let begin = Instant::now();
        let mut traces = Traces::read(&live.tree());
        loop {
            std::thread::sleep(Duration::from_millis(4));
            let later = Traces::read(&live.tree());
            if traces.differences(&later).is_empty() || begin.elapsed() > RESTS_AFTER {
                return Self { state: live.state(), traces: later };
            }
            traces = later;
        }
    }

    /// Lets files without a name be given one for a while (`--link-remap`), which counts as
    /// a change of theirs.
    #[must_use]
    pub fn but_for_names(mut self) -> Self {
        self.traces.names_change = true;
        self
    }

    /// What the kernel shows of its processes.
    pub fn state(&self) -> &TreeState {
        &self.state
    }

    /// Panics unless the tree is as it was, or comes to be soon. What goes on changing by
    /// itself, such as a byte that busy processes pass around, is not the dump's.
    pub fn assert_untouched(&self, live: &mut Live, what: &str) {
        let begin = Instant::now();
        let first = Traces::read(&live.tree());
        let mut moving = BTreeSet::new();
        for look in 1.. {
            let mut differences = self.state.differences(&live.state());
            let now = Traces::read(&live.tree());
            moving.extend(first.differing(&now).into_keys());
            let changed = self.traces.differing(&now).into_iter();
            let stayed = changed.filter(|(key, _)| !moving.contains(key));
            differences.extend(stayed.map(|(_, text)| text));
            if differences.is_empty() {
                return;
            }
            if look >= LOOKS && begin.elapsed() > QUIET_AFTER * super::slowness() {
                panic!("{what} has changed its target:\n{}", differences.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
