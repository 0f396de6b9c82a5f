//! Dumps without a pause (`--live`): the tree runs on while its memory is copied, and the images show
//! it at the moment when it stood still.
//!
//! All of it needs root.

mod common;

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use common::{
    Cap,
    live::{Live, directory, engine, state_of, wait_for},
    net::port,
    require,
    untouched::Before,
};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};

const LIVE: &str = "--live";

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Dumps a state live, which goes on unharmed; kills it, and restores it from the images.
fn restored(name: &str, options: &[&str]) {
    require(Cap::Ptrace);
    let mut live = Live::workload(name);
    live.dump_running(&[&[LIVE], options].concat());
    assert_no_shadows(&mut live);
    live.check_images();
    kill_session(&mut live);
    live.restore(&[]);
    live.verdict();
}

/// Kills a tree, with the processes that it forks meanwhile, which this process inherits.
fn kill_session(live: &mut Live) {
    live.kill();
    let root = live.root.to_string();
    let is_of_session = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // State, parent, group and session follow the name.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        fields.split_whitespace().nth(3) == Some(&root)
    };
    wait_for("the end of the session", || {
        let all = fs::read_dir("/proc").unwrap().flatten();
        let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let left: Vec<i32> = pids.filter(is_of_session).collect();
        for pid in left.iter().copied().map(Pid::from_raw) {
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
        }
        left.is_empty()
    });
}

/// The same for the tree that runs on.
fn running(name: &str, options: &[&str]) {
    require(Cap::Ptrace);
    let mut live = Live::workload(name);
    for _ in 0..3 {
        let _ = fs::remove_dir_all(live.images());
        live.dump_running(&[&[LIVE], options].concat());
        assert_no_shadows(&mut live);
    }
    live.verdict();
}

/// Waits until no process of the tree is a zombie: the children of a state stay so for a moment, but a
/// shadow that is not reaped does for good.
fn assert_no_shadows(live: &mut Live) {
    wait_for("a moment without zombies", || {
        live.tree().into_iter().all(|pid| state_of(pid) != Some('Z'))
    });
}

#[test]
fn privileged_images_are_of_one_moment() {
    restored("ordered_writes", &[]);
}

#[test]
fn privileged_writers_run_on() {
    running("ordered_writes", &[]);
}

#[test]
fn privileged_memory_that_passes_is_kept() {
    restored("passing_memory", &[]);
}

#[test]
fn privileged_removers_of_memory_run_on() {
    running("passing_memory", &[]);
}

#[test]
fn privileged_busy_tree() {
    restored("busy_tree", &[]);
    running("busy_tree", &["--track-mem"]);
}

/// Tests of states whose memory a fork does not copy as it is, or where it is hard to work: a live dump
/// changes nothing about them.
macro_rules! states {
    ($($name:ident)*) => {
        mod privileged_state {
            $(#[test]
            fn $name() {
                super::untouched(stringify!($name));
            })*
        }
    };
}

states! {
    private_anon
    zero_and_holes
    shared_anon
    private_file
    memfd_mapping
    sysv_shm
    mlocked
    madvised
    prot_none
    growing_stack
    brk_heap
    cow_tree
    guard_pages
    huge_pages
    vdso
    droppable
    vast
    aio_contexts
    threads
    zombies
    stopped_child
    clear_tid
    seccomp_filters
    two_hundred
    no_ignored_signal
    no_room_for_mappings
    no_room_nor_signal
}

#[test]
fn privileged_huge_pages() {
    require(Cap::HugePages);
    untouched("hugetlb_private");
}

fn untouched(name: &str) {
    require(Cap::Ptrace);
    let mut live = Live::workload(name);
    let before = Before::of(&mut live);
    live.dump_running(&[LIVE]);
    before.assert_untouched(&mut live, "dump -R --live");
    live.kill();
    live.restore(&[]);
    live.verdict();
}

/// Each link of a chain is a live dump, which compares its memory with the one before.
#[test]
fn privileged_chains() {
    for track in [false, true] {
        require(Cap::Ptrace);
        let mut live = Live::workload("ordered_writes");
        let options: &[&str] = if track { &["--track-mem"] } else { &[] };
        live.images_name = "1";
        live.dump_running(&[&[LIVE], options].concat());
        live.images_name = "2";
        let parent = ["--prev-images-dir", "../1", "--auto-dedup"];
        live.dump_running(&[&[LIVE], &parent[..], options].concat());
        live.images_name = "3";
        live.dump_running(&[&[LIVE, "--prev-images-dir", "../2"], options].concat());
        kill_session(&mut live);
        live.restore(&[]);
        live.verdict();
    }
}

/// Starts a live dump that stops at a point.
fn start(live: &Live, point: &str) -> Child {
    fs::create_dir_all(live.images()).unwrap();
    Command::new(engine())
        .args(["dump", "-R", LIVE, "-t", &live.root.to_string(), "-D"])
        .arg(live.images())
        .env("RCRIU_FAULT", format!("{point}:stop"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn children(pid: i32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// Waits until the process that does the work has stopped, and returns its pid.
fn await_worker(dump: &Child) -> Pid {
    let front = i32::try_from(dump.id()).unwrap();
    let mut worker = None;
    wait_for("a dump to stop", || {
        worker = children(front).first().copied();
        worker.is_some_and(|pid| state_of(pid) == Some('T'))
    });
    Pid::from_raw(worker.unwrap())
}

/// The tree runs while its memory is copied, and may end: the images are complete all the same.
#[test]
fn privileged_a_tree_may_end_meanwhile() {
    require(Cap::Ptrace);
    let mut live = Live::workload("cow_tree");
    let tree = live.tree();
    let dump = start(&live, "live-released");
    let worker = await_worker(&dump);
    // From now on, this process knows the shadows as well, which it inherits.
    assert!(live.tree().len() > tree.len(), "there are no shadows");
    for pid in &tree {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).unwrap();
    }
    wait_for("the end of the tree", || {
        tree.iter().all(|pid| state_of(*pid).is_none_or(|state| state == 'Z'))
    });
    kill(worker, Signal::SIGCONT).unwrap();
    let output = dump.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    live.wait_gone();
    live.check_images();
    live.restore(&[]);
    live.verdict();
}

/// Without the copy of a process, there are no images; the tree runs on.
#[test]
fn privileged_a_lost_shadow_fails_the_dump() {
    require(Cap::Ptrace);
    let mut live = Live::workload("cow_tree");
    let before = Before::of(&mut live);
    let root = live.root.as_raw();
    let own = children(root);
    let dump = start(&live, "live-released");
    let worker = await_worker(&dump);
    let shadow = children(root).into_iter().find(|pid| !own.contains(pid)).expect("a shadow");
    assert_eq!(fs::read_to_string(format!("/proc/{shadow}/oom_score_adj")).unwrap(), "1000\n");
    kill(Pid::from_raw(shadow), Signal::SIGKILL).unwrap();
    wait_for("the end of the shadow", || state_of(shadow).is_none_or(|state| state == 'Z'));
    kill(worker, Signal::SIGCONT).unwrap();
    let output = dump.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let why = format!("the copy-on-write copy of process {root} that --live reads was killed");
    assert!(said(&output).contains(&why), "{}", said(&output));
    assert!(!live.images().join("inventory.img").exists());
    before.assert_untouched(&mut live, "a shadow was killed");
    live.verdict();
}

/// Wherever rcriu fails or is killed, the tree runs on without anything of the dump.
#[test]
fn privileged_faults() {
    require(Cap::Ptrace);
    let mut live = Live::workload("cow_tree");
    let before = Before::of(&mut live);
    for point in ["dump-injected", "dump-call", "live-forked", "live-released", "live-copied"] {
        for how in ["", ":kill", ":kill:2"] {
            let what = format!("{point}{how}");
            let _ = fs::remove_dir_all(live.images());
            live.fault = Some(what.clone());
            let output = live.try_dump(&["-R", LIVE]);
            if how != ":kill:2" {
                assert!(!output.status.success(), "{what} is never hit");
                assert!(!live.images().join("inventory.img").exists(), "{what}");
            }
            before.assert_untouched(&mut live, &what);
        }
    }
    live.fault = None;
    let _ = fs::remove_dir_all(live.images());
    live.dump_running(&[LIVE]);
    live.verdict();
}

#[test]
fn privileged_more_shared_memory_than_allowed_is_refused() {
    require(Cap::Ptrace);
    let mut live = Live::workload("ordered_writes");
    let output = live.try_dump(&["-R", LIVE, "--live-stopped", "64K"]);
    assert!(!output.status.success());
    let message = live.complaint(&output, "dump.log");
    assert!(message.contains("help: allow more with --live-stopped SIZE"), "{message}");
    assert_no_shadows(&mut live);
    live.verdict();
}

/// Keys of redis that are set in order, again and again.
const KEYS: usize = 1000;

/// A client of redis, which sends command after command.
fn set_keys(stream: &mut TcpStream, round: u64) -> std::io::Result<()> {
    let mut commands = Vec::new();
    for key in 0..KEYS {
        write!(commands, "SET key:{key} {round}\r\n")?;
    }
    stream.write_all(&commands)?;
    let mut answers = vec![0; KEYS * b"+OK\r\n".len()];
    stream.read_exact(&mut answers)
}

/// A server under load is dumped at one moment of the sequence of its clients' commands.
#[test]
fn privileged_redis_under_load() {
    require(Cap::Ptrace);
    require(Cap::Program("redis-server"));
    let (dir, port) = (directory(), port());
    let number = port.to_string();
    let path = dir.path().to_str().unwrap().to_owned();
    let arguments =
        ["--port", &number, "--save", "", "--dir", &path, "--enable-debug-command", "yes"];
    let mut live = Live::program("redis-server", &arguments, dir);
    let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, port));
    wait_for("redis", || connect().is_ok());
    let mut stream = connect().unwrap();
    stream.write_all(b"DEBUG POPULATE 50000 more 1000\r\n").unwrap();
    stream.read_exact(&mut [0; 5]).unwrap();
    set_keys(&mut stream, 0).unwrap();
    let mut writer = connect().unwrap();
    let written = Arc::new(AtomicU64::new(0));
    let load = {
        let written = Arc::clone(&written);
        std::thread::spawn(move || {
            let rounds = (1..).take_while(|round| set_keys(&mut writer, *round).is_ok());
            rounds.for_each(|round| written.store(round, Ordering::Relaxed));
        })
    };
    wait_for("a write", || written.load(Ordering::Relaxed) > 0);
    live.dump_running(&[LIVE, "--tcp-close"]);
    assert_no_shadows(&mut live);
    live.kill();
    load.join().unwrap();
    live.restore(&["--tcp-close"]);
    let mut stream = connect().unwrap();
    let mut values = Vec::new();
    for key in 0..KEYS {
        write!(stream, "GET key:{key}\r\n").unwrap();
        let mut answer = Vec::new();
        while answer.iter().filter(|byte| **byte == b'\n').count() < 2 {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        let text = String::from_utf8(answer).unwrap();
        values.push(text.split("\r\n").nth(1).unwrap().parse::<u64>().unwrap());
    }
    let (first, last) = (values[0], values[KEYS - 1]);
    assert!(first - last <= 1 && values.is_sorted_by(|a, b| a >= b), "{values:?}");
    live.kill();
}
