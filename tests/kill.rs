//! Whatever dies while a dump works in a tree, the tree goes on as it was.
//!
//! What is killed at random moments is the process that the user has started, the one that
//! does the work, or the process group, or both processes at once. `RCRIU_TEST_KILLS` says
//! how often, each; with `RCRIU_TEST_ALL` it is 300 times, while other programs keep the
//! processors busy. All of it needs root.

mod common;

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use common::{
    Cap,
    live::{Live, PATIENCE, TreeState, engine, state_of, wait_for},
    require,
};
use nix::{
    sys::{
        signal::{Signal, kill, killpg},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use rcriu::fault::Point;

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    /// The process that the user has started.
    Supervisor,
    /// The process that does the work.
    Worker,
    /// The process group that the user has started.
    Group,
    /// Both processes, the worker first.
    Both,
}

/// Kills of each kind in a short run.
const FEW: usize = 12;

/// Kills of each kind in a long one.
const MANY: usize = 300;

/// After so many, a tree tells whether it is well, and a fresh one takes its place.
const KILLS_PER_TREE: usize = 50;

fn is_long() -> bool {
    std::env::var_os("RCRIU_TEST_ALL").is_some()
}

fn kills() -> usize {
    let wanted = std::env::var("RCRIU_TEST_KILLS").ok().and_then(|text| text.parse().ok());
    wanted.unwrap_or(if is_long() { MANY } else { FEW })
}

/// Numbers that are the same each time (xorshift).
struct Numbers(u64);

impl Numbers {
    /// Returns one below a limit.
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }
}

/// Programs that do nothing but keep processors busy.
struct Load(Vec<Child>);

impl Load {
    fn begin(count: usize) -> Self {
        let spin = || Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        Self((0..count).map(|_| spin()).collect())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts a dump in a process group of its own.
fn start(live: &Live, options: &[&str], fault: Option<&str>) -> Child {
    let images = live.images();
    let _ = fs::remove_dir_all(&images);
    fs::create_dir_all(&images).unwrap();
    let mut command = Command::new(engine());
    command.args(["dump", "-t", &live.root.to_string(), "-R", "-D"]).arg(&images).args(options);
    command.envs(fault.map(|fault| ("RCRIU_FAULT", fault)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.process_group(0).spawn().unwrap()
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap())
}

/// The process that does the work, if there is one by now.
fn worker_of(front: Pid) -> Option<Pid> {
    let path = format!("/proc/{front}/task/{front}/children");
    let text = fs::read_to_string(path).ok()?;
    text.split_whitespace().next()?.parse().ok().map(Pid::from_raw)
}

/// Kills, and waits until neither process is left.
fn strike(victim: Victim, mut dump: Child) {
    let front = pid_of(&dump);
    let worker = worker_of(front);
    let end = |pid: Pid| {
        let _ = kill(pid, Signal::SIGKILL);
    };
    match victim {
        Victim::Supervisor => end(front),
        Victim::Worker => worker.into_iter().for_each(end),
        Victim::Group => {
            let _ = killpg(front, Signal::SIGKILL);
        }
        Victim::Both => worker.into_iter().chain([front]).for_each(end),
    }
    dump.wait().unwrap();
    if let Some(worker) = worker {
        wait_for("the end of the worker", || {
            // This process adopts orphans.
            let _ = waitpid(worker, Some(WaitPidFlag::WNOHANG));
            state_of(worker.as_raw()).is_none()
        });
    }
}

/// Returns how the tree differs from what it was. A thread comes home when it gets a
/// processor, which others keep busy.
fn harm(live: &mut Live, before: &TreeState) -> Vec<String> {
    let begin = Instant::now();
    loop {
        let wrong = before.differences(&live.state_after(before));
        if wrong.is_empty() || begin.elapsed() > PATIENCE * common::slowness() {
            return wrong;
        }
    }
}

/// Kills again and again, and returns what was wrong each time that something was.
fn loop_of(victim: Victim, name: &str, options: &[&str]) -> Vec<String> {
    let _load = is_long().then(|| Load::begin(2));
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15 ^ victim as u64);
    let mut harmed = Vec::new();
    let mut tree: Option<(Live, TreeState, Duration)> = None;
    let ends = |live: Live, harmed: &mut Vec<String>| {
        let said = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| live.verdict()));
        if said.is_err() {
            harmed.push(format!("{victim:?}: the tree says that it was harmed"));
        }
    };
    for round in 0..kills() {
        if round % KILLS_PER_TREE == 0
            && let Some((live, ..)) = tree.take()
        {
            ends(live, &mut harmed);
        }
        let (live, before, whole) = tree.get_or_insert_with(|| {
            let mut live = Live::workload(name);
            let before = live.state();
            let begin = Instant::now();
            start(&live, options, None).wait().unwrap();
            let whole = begin.elapsed();
            (live, before, whole)
        });
        let dump = start(live, options, None);
        let whole = u64::try_from(whole.as_micros()).unwrap();
        std::thread::sleep(Duration::from_micros(numbers.below(whole)));
        strike(victim, dump);
        let wrong = harm(live, before);
        if !wrong.is_empty() {
            harmed.push(format!("{victim:?}, kill {round}:\n{}", wrong.join("\n")));
            tree = None;
        }
    }
    if let Some((live, ..)) = tree {
        ends(live, &mut harmed);
    }
    println!("{victim:?} {options:?}: {} of {} kills harmed the tree", harmed.len(), kills());
    harmed
}

fn survives(victim: Victim) {
    require(Cap::Ptrace);
    let mut harmed = loop_of(victim, "busy_tree", &[]);
    harmed.extend(loop_of(victim, "busy_tree", &["--track-mem"]));
    // A shadow is reaped by what rcriu has a process do, so without rcriu it stays a zombie.
    if victim != Victim::Both {
        harmed.extend(loop_of(victim, "busy_tree", &["--live"]));
    }
    assert!(harmed.is_empty(), "{}", harmed.join("\n"));
}

#[test]
fn privileged_a_tree_survives_the_death_of_the_supervisor() {
    survives(Victim::Supervisor);
}

#[test]
fn privileged_a_tree_survives_the_death_of_the_worker() {
    survives(Victim::Worker);
}

#[test]
fn privileged_a_tree_survives_the_death_of_the_process_group() {
    survives(Victim::Group);
}

#[test]
fn privileged_a_tree_survives_the_death_of_both_at_once() {
    survives(Victim::Both);
}

/// The points at which a thread of the tree has other registers than its own, or is just
/// about to.
const WINDOWS: [Point; 9] = [
    Point::DumpMapped,
    Point::DumpInjected,
    Point::DumpCallSet,
    Point::DumpCall,
    Point::DumpHanded,
    Point::DumpListed,
    Point::DumpWalking,
    Point::DumpWalked,
    Point::LiveForked,
];

/// Kills the worker at a point each time that it comes by, until it does no more; and then
/// both processes.
fn killed_everywhere(name: &str, options: &[&str]) {
    killed_at_all_points(name, options, "kill");
    killed_at_all_points(name, options, "kill-both");
}

fn killed_at_all_points(name: &str, options: &[&str], how: &str) {
    require(Cap::Ptrace);
    let mut live = Live::workload(name);
    let before = live.state();
    let most = if is_long() { usize::MAX } else { 6 };
    let mut kills = 0;
    for point in WINDOWS {
        for time in 1..=most {
            let fault = format!("{}:{how}:{time}", point.name());
            let status = start(&live, options, Some(&fault)).wait().unwrap();
            let wrong = harm(&mut live, &before);
            assert!(wrong.is_empty(), "killed at {fault}:\n{}", wrong.join("\n"));
            if status.success() {
                break;
            }
            kills += 1;
        }
    }
    assert!(kills > 0, "no point was hit");
    println!("{name} {options:?}: {how} {kills} times");
    live.verdict();
}

#[test]
fn privileged_a_tree_survives_at_every_point() {
    killed_everywhere("busy_tree", &[]);
    killed_everywhere("busy_tree", &["--track-mem"]);
    killed_at_all_points("busy_tree", &["--live"], "kill");
}

#[test]
fn privileged_a_process_without_an_ignored_signal_survives_at_every_point() {
    killed_everywhere("no_ignored_signal", &[]);
}

#[test]
fn privileged_a_process_without_room_survives_at_every_point() {
    killed_everywhere("no_room_for_mappings", &["--track-mem"]);
    killed_everywhere("no_room_nor_signal", &[]);
}

/// The filters kill the process for what it does for the dump, unless they are suspended.
#[test]
fn privileged_a_process_with_seccomp_filters_survives_at_every_point() {
    killed_everywhere("seccomp_kills", &[]);
    killed_everywhere("seccomp_strict", &[]);
}

/// A thread of a stopped process comes home when that goes on. Until then nothing else may
/// work there, for which its registers would be the program's own.
#[test]
fn privileged_a_thread_that_is_not_home_yet_is_left_alone() {
    require(Cap::Ptrace);
    let mut live = Live::workload("threads");
    let before = live.state();
    let signal = |live: &Live, signal| kill(live.root, signal).unwrap();
    signal(&live, Signal::SIGSTOP);
    wait_for("the stop", || state_of(live.root.as_raw()) == Some('T'));
    live.fault = Some(format!("{}:kill:1", Point::DumpInjected.name()));
    let said = |live: &mut Live| {
        let output = live.try_dump(&["-R"]);
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let words = said(&mut live);
    assert!(words.contains("unmaps its scratch memory when it runs again"), "{words}");
    live.fault = None;
    let words = said(&mut live);
    assert!(words.contains("is still returning from the work of a dump"), "{words}");
    signal(&live, Signal::SIGCONT);
    let wrong = harm(&mut live, &before);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    live.dump_running(&[]);
    live.verdict();
}
