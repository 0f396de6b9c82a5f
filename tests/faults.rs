//! What is left when a dump or a restore fails, at every point at which one can
//! be made to fail: of a dump, a tree that is as it was and no snapshot that looks
//! complete; of a restore, nothing.
//!
//! All of it needs root.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use common::{
    Cap,
    live::{Live, engine, state_of, wait_for},
    recorder::{Recorder, State},
    require,
    untouched::Before,
};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use rcriu::fault::Point;

/// The states with more memory than is copied at once.
const LARGE: [&str; 2] = ["cow_tree", "threads"];

/// The points of the command whose name theirs begin with.
fn points(command: &str) -> impl Iterator<Item = Point> {
    let of_command = move |point: &Point| point.name().starts_with(command);
    Point::ALL.iter().copied().filter(of_command)
}

/// The points that a dump of a state comes by.
fn dump_points(state: &str) -> impl Iterator<Item = Point> {
    let large = LARGE.contains(&state);
    let has_threads = state == "threads";
    points("dump-").filter(move |point| match point {
        Point::DumpMemory => large,
        Point::DumpHanded => has_threads,
        _ => true,
    })
}

#[test]
fn every_point_is_one_of_a_command() {
    // Those of a deduplication are for tests/link.rs and tests/dedup.rs, that of a mount for
    // tests/compose.rs, those of live dumps for tests/unpaused.rs, those of connections for
    // tests/connections.rs, those of terminals for tests/terminals.rs, those of a page server for
    // tests/page_server.rs, that of a pager for tests/lazy.rs.
    let commands = [
        "dump-",
        "live-",
        "restore-",
        "dedup-",
        "free-",
        "compose-",
        "tcp-",
        "terminal-",
        "page-server-",
        "pager-",
    ];
    let all = commands.map(|command| points(command).count());
    assert_eq!(all.iter().sum::<usize>(), Point::ALL.len());
}

/// The images of a directory and all else in it that is no log and no statistics.
type Images = BTreeMap<String, Vec<u8>>;

fn images(dir: &Path) -> Images {
    let mut found = Images::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if !["dump.log", "restore.log", "stats-dump", "stats-restore"].contains(&name.as_str()) {
            let bytes = if path.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            found.insert(name, bytes);
        }
    }
    found
}

fn empty(dir: &Path) {
    if dir.exists() {
        fs::remove_dir_all(dir).unwrap();
    }
    fs::create_dir(dir).unwrap();
}

/// Checks that a run failed where it was asked to.
fn assert_failed_at(point: Point, output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{} is never hit", point.name());
    let why = format!("fault injected at {}", point.name());
    assert!(said.contains(&why), "{}: {} {said}", point.name(), output.status);
}

/// Waits until a tree whose tracer was killed is as it was: the kernel lets go of
/// the traced in its own time.
fn assert_left_alone(what: &str, live: &mut Live, before: &Before) {
    before.assert_untouched(live, what);
}

/// Makes a dump fail at a point, once into an empty directory and once into one
/// that holds a snapshot.
fn failed_dump(point: Point, mode: &[&str], live: &mut Live, before: &Before) {
    let name = point.name();
    for old in [false, true] {
        live.fault = None;
        empty(&live.images());
        if old {
            live.dump_running(&[]);
        }
        let snapshot = images(&live.images());
        live.fault = Some(name.to_owned());
        let output = live.try_dump(mode);
        assert_failed_at(point, &output);
        // At once: a dump that has ended has put everything back.
        before.state().assert_unchanged(&live.state());
        before.assert_untouched(live, &format!("{mode:?}, failed at {name},"));
        let left = images(&live.images());
        assert!(!left.contains_key(".unfinished"), "{name} {mode:?} leaves unfinished images");
        if point == Point::DumpCommit {
            // What fails then is what becomes of the tree.
            live.check_images();
        } else {
            let names: Vec<_> = left.keys().collect();
            assert!(left == snapshot, "{name} {mode:?} leaves other images than before: {names:?}");
        }
    }
}

/// Kills the process that dumps at a point.
fn killed_dump(point: Point, mode: &[&str], live: &mut Live, before: &Before) {
    let name = point.name();
    empty(&live.images());
    live.fault = Some(format!("{name}:kill"));
    let output = live.try_dump(mode);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("was killed by SIGKILL"), "{name}: {} {said}", output.status);
    let what = format!("{mode:?}, killed at {name},");
    assert_left_alone(&what, live, before);
    let complete = images(&live.images()).contains_key("inventory.img");
    assert_eq!(complete, point == Point::DumpCommit, "{name} {mode:?}: a complete snapshot");
    if complete {
        live.check_images();
    }
    // The remains do not get in the way of the next dump.
    live.fault = None;
    live.dump_running(&[]);
    before.assert_untouched(live, &format!("-R, after {what},"));
    live.check_images();
}

/// Kills the process that the user has started while the one that does the work is
/// at a point.
fn deserted_dump(point: Point, mode: &[&str], live: &mut Live, before: &Before) {
    let what = format!("{} {mode:?}, deserted", point.name());
    empty(&live.images());
    let mut dump = Command::new(engine())
        .args(["dump", "-t", &live.root.to_string(), "-D"])
        .arg(live.images())
        .args(mode)
        .env("RCRIU_FAULT", format!("{}:stop", point.name()))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let front = dump.id();
    let mut worker = None;
    wait_for(&format!("a dump to stop at {}", point.name()), || {
        assert_eq!(dump.try_wait().unwrap(), None, "{} is never hit", point.name());
        let children = fs::read_to_string(format!("/proc/{front}/task/{front}/children")).unwrap();
        worker = children.trim().parse().ok();
        worker.is_some_and(|pid| state_of(pid) == Some('T'))
    });
    let worker = Pid::from_raw(worker.unwrap());
    dump.kill().unwrap();
    dump.wait().unwrap();
    // This process adopts orphans.
    let mut ended = WaitStatus::StillAlive;
    wait_for("the end of the worker", || {
        // Again and again: other threads may have been on their way to the point.
        kill(worker, Signal::SIGCONT).unwrap();
        ended = waitpid(worker, Some(WaitPidFlag::WNOHANG)).unwrap();
        ended != WaitStatus::StillAlive
    });
    assert!(matches!(ended, WaitStatus::Exited(..)), "{what}: {ended:?}");
    // At once, as after a failure.
    let left = images(&live.images());
    assert!(!left.contains_key(".unfinished"), "{what}: unfinished images");
    if point == Point::DumpCommit {
        live.check_images();
    } else {
        assert!(!left.contains_key("inventory.img"), "{what}: a snapshot");
    }
    if point != Point::DumpCommit || mode == ["-R"] {
        before.state().assert_unchanged(&live.state());
        before.assert_untouched(live, &what);
    }
}

fn dump_fails(name: &str) {
    require(Cap::Ptrace);
    let mut live = Live::workload(name);
    let before = Before::of(&mut live);
    for point in dump_points(name) {
        for mode in [&["-R"][..], &[], &["-R", "--track-mem"]] {
            failed_dump(point, mode, &mut live, &before);
        }
    }
    live.verdict();
}

fn dump_is_killed(name: &str) {
    require(Cap::Ptrace);
    let mut live = Live::workload(name);
    let before = Before::of(&mut live);
    for point in dump_points(name) {
        for mode in [&["-R"][..], &[]] {
            killed_dump(point, mode, &mut live, &before);
            // A dump that is complete kills the tree.
            if point != Point::DumpCommit || mode == ["-R"] {
                deserted_dump(point, mode, &mut live, &before);
            }
        }
    }
    // A snapshot that was complete before the tree was to be killed is one.
    empty(&live.images());
    deserted_dump(Point::DumpCommit, &[], &mut live, &before);
    live.wait_gone();
    live.fault = None;
    live.restore(&[]);
    live.verdict();
}

/// Every number that a restore of the images gives to a process or a thread.
fn numbers(dir: &Path) -> BTreeSet<u64> {
    let output = Command::new(env!("CARGO_BIN_EXE_rcriu"))
        .arg("show")
        .arg(dir.join("pstree.img"))
        .output()
        .unwrap();
    let tree: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut found = BTreeSet::new();
    for entry in tree["entries"].as_array().unwrap() {
        let all = ["pid", "pgid", "sid"].map(|key| &entry[key]);
        let threads = entry["threads"].as_array().into_iter().flatten();
        found.extend(all.into_iter().chain(threads).filter_map(serde_json::Value::as_u64));
    }
    found.remove(&0);
    assert!(!found.is_empty(), "no process in {tree}");
    found
}

fn restore_fails(name: &str) {
    require(Cap::Ptrace);
    let mut live = Live::workload(name);
    let before = live.state();
    live.dump(&[]);
    let snapshot = images(&live.images());
    let numbers = numbers(&live.images());
    let there = || -> Vec<_> {
        let exists = |number: &&u64| Path::new(&format!("/proc/{number}")).exists();
        numbers.iter().filter(exists).collect()
    };
    for point in points("restore-") {
        live.fault = Some(point.name().to_owned());
        let output = live.try_restore(&[]);
        assert_failed_at(point, &output);
        // At once, and no process is left for this one to reap.
        assert!(there().is_empty(), "{} leaves {:?}", point.name(), there());
        assert!(!live.path("pid").exists(), "{} leaves a pid file", point.name());
        assert!(images(&live.images()) == snapshot, "{} changes images", point.name());

        live.fault = Some(format!("{}:kill", point.name()));
        let output = live.try_restore(&[]);
        assert_eq!(output.status.code(), None, "{} is never hit", point.name());
        live.wait_gone();
        wait_for(&format!("the end of what is restored, killed at {}", point.name()), || {
            // Helpers, which this process has adopted.
            for number in there() {
                let pid = Pid::from_raw(i32::try_from(*number).unwrap());
                let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
            }
            there().is_empty()
        });
        let _ = fs::remove_file(live.path("pid"));
        assert!(images(&live.images()) == snapshot, "{}, killed, changes images", point.name());
    }
    live.fault = None;
    live.restore(&[]);
    let after = live.state();
    live.verdict();
    before.restored(live.root).assert_unchanged(&after.restored(live.root));
}

/// Three tests for each state.
macro_rules! states {
    ($($name:ident)*) => {
        mod privileged_dump_fails {
            $(#[test]
            fn $name() {
                super::dump_fails(stringify!($name));
            })*
        }

        mod privileged_dump_is_killed {
            $(#[test]
            fn $name() {
                super::dump_is_killed(stringify!($name));
            })*
        }

        mod privileged_restore_fails {
            $(#[test]
            fn $name() {
                super::restore_fails(stringify!($name));
            })*
        }
    };
}

// One with forks, one with threads, one with processes that stand in for others
// during a restore, one with files.
states! {
    cow_tree
    threads
    exited_leader
    shared_everything
    dead_session_leader
    unix_queued_descriptors
}

/// Dumps a process that runs on into a directory of the recorder, and checks that a power
/// cut leaves there what was there before, no snapshot, or the new one, each with all of its
/// bytes; and of a parent all.
fn dump_survives_power_cuts(recorder: &Recorder, live: &Live, name: &str, arguments: &[&str]) {
    let dir = recorder.path().join(name);
    let work = live.path("work");
    recorder.begin();
    let before = recorder.now();
    let mut command = Command::new(engine());
    command.args(["dump", "-R", "-t", &live.root.to_string(), "-D"]).arg(dir);
    // A log in the images directory would be most of what is recorded.
    let output = command.arg("-W").arg(work).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let after = recorder.now();
    let (dir, parent) = (Path::new(name), Path::new("1"));
    let is_snapshot = |state: &State| state.files(dir).contains_key(&*dir.join("inventory.img"));
    assert!(is_snapshot(&after));
    let states = recorder.states();
    let (mut old, mut none, mut new) = (0, 0, 0);
    for state in &states {
        let found = state.files(dir);
        if found == after.files(dir) {
            new += 1;
        } else if is_snapshot(state) {
            let names: Vec<_> = found.keys().collect();
            assert!(found == before.files(dir), "{name} is a snapshot of {names:?} only");
            old += 1;
        } else {
            none += 1;
        }
        if dir != parent {
            assert!(state.files(parent) == before.files(parent), "the parent of {name} changes");
        }
    }
    println!("{name}: {old} states with the old snapshot, {none} with none, {new} with the new");
    assert!(none > 20 && new > 0, "{none} {new}");
    assert_eq!(old > 0, is_snapshot(&before));
}

#[test]
fn privileged_dumps_survive_power_cuts() {
    require(Cap::Ptrace);
    let recorder = Recorder::mount();
    let live = Live::program("/bin/sleep", &["1000"], tempfile::tempdir().unwrap());
    wait_for("the program to sleep", || {
        let comm = fs::read_to_string(format!("/proc/{}/comm", live.root));
        comm.is_ok_and(|comm| comm == "sleep\n") && state_of(live.root.as_raw()) == Some('S')
    });
    for dir in [recorder.path().join("1"), recorder.path().join("2"), live.path("work")] {
        fs::create_dir(dir).unwrap();
    }
    dump_survives_power_cuts(&recorder, &live, "1", &[]);
    dump_survives_power_cuts(&recorder, &live, "2", &["--prev-images-dir", "../1"]);
    // In the place of the one that is there.
    dump_survives_power_cuts(&recorder, &live, "2", &[]);
    let mut check = Command::new(env!("CARGO_BIN_EXE_imgfs"));
    let output = check.arg("check").arg(recorder.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
