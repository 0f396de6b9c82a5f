//! Locks and watches as other processes meet them: one takes a lock while the tree does not exist,
//! one waits for it, one shares it.

mod common;

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use common::{
    Cap,
    live::{Live, directory, wait_for, workload},
    require,
};
use nix::fcntl::{Flock, FlockArg};

/// The option of all these dumps.
const FILE_LOCKS: &str = "--file-locks";

const PYTHON: &str = "/usr/bin/python3";

/// A process that ends with the test.
struct Other(Child);

impl Other {
    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a Python script that takes a lock of a file, and then waits.
fn taker(script: &str, file: &Path) -> Other {
    require(Cap::Program(PYTHON));
    let text = format!(
        "import fcntl, sys, time\nf = open(sys.argv[1], 'r+')\n{script}\nwhile True: time.sleep(1)\n"
    );
    let mut python = Command::new(PYTHON);
    python.args(["-c", &text]).arg(file).stdin(Stdio::null());
    Other(python.spawn().unwrap())
}

/// Whether `/proc/locks` has a line about a process with this word.
fn is_shown(pid: u32, word: &str, waits: bool) -> bool {
    let locks = fs::read_to_string("/proc/locks").unwrap();
    locks.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let has = |text: &str| words.contains(&text);
        has(word) && has(&pid.to_string()) && has("->") == waits
    })
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Dumps a state, has another process take a lock, and expects the restore to name it.
fn taken_meanwhile(workload: &str, script: &str, word: &str) {
    require(Cap::Ptrace);
    let mut live = Live::workload(workload);
    live.dump(&[FILE_LOCKS]);
    let file = live.path("status.file");
    let other = taker(script, &file);
    wait_for("the lock", || is_shown(other.pid(), word, false));
    let output = live.try_restore(&[]);
    let text = said(&output);
    assert!(!output.status.success(), "it was restored");
    let holder = format!("now process {} (python3) holds a", other.pid());
    assert!(text.contains(&holder) && text.contains("status.file"), "{text}");
    assert!(text.contains("help: "), "{text}");
    drop(other);
    live.restore(&[]);
    live.verdict();
}

#[test]
fn privileged_a_posix_lock_that_another_process_has_taken_is_named() {
    taken_meanwhile("locks_posix", "fcntl.lockf(f, fcntl.LOCK_EX)", "POSIX");
}

#[test]
fn privileged_a_flock_that_another_process_has_taken_is_named() {
    taken_meanwhile("locks_flock", "fcntl.flock(f, fcntl.LOCK_EX)", "FLOCK");
}

#[test]
fn privileged_a_process_that_waits_for_a_lock_of_the_tree_is_named() {
    require(Cap::Ptrace);
    let mut live = Live::workload("locks_posix");
    let other = taker("fcntl.lockf(f, fcntl.LOCK_EX)", &live.path("status.file"));
    wait_for("the process to wait", || is_shown(other.pid(), "POSIX", true));
    let output = live.try_dump(&["-R", FILE_LOCKS]);
    assert!(output.status.success() && said(&output).is_empty(), "{}", said(&output));
    let output = live.try_dump(&[FILE_LOCKS]);
    assert!(output.status.success(), "{}", said(&output));
    let waits = format!("process {} (python3) waits for a POSIX write lock", other.pid());
    assert!(said(&output).contains(&waits), "{}", said(&output));
    live.wait_gone();
    wait_for("the other process to get it", || is_shown(other.pid(), "POSIX", false));
}

/// A shell often locks a file and starts a program, which inherits the lock.
#[test]
#[expect(clippy::zombie_processes, reason = "it is reaped by its pid, as what replaces it is")]
fn privileged_a_process_outside_that_shares_a_lock_is_named() {
    require(Cap::Ptrace);
    require(Cap::Program(PYTHON));
    let dir = directory();
    let file = dir.path().join("lock");
    let lock = Flock::lock(File::create(&file).unwrap(), FlockArg::LockExclusive).unwrap();
    let script = "import os, sys, time\n\
        open(sys.argv[1], 'w').close()\n\
        while True: time.sleep(1)\n";
    let ready = dir.path().join("ready");
    let mut program = Command::new(workload());
    program.args(["--exec", PYTHON, "-c", script]).arg(&ready);
    program.stdin(lock.try_clone().unwrap()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = program.spawn().unwrap();
    let mut live = Live::adopt(child.id().try_into().unwrap(), dir);
    wait_for("the program", || ready.exists());
    let output = live.try_dump(&[FILE_LOCKS]);
    assert!(output.status.success(), "{}", said(&output));
    let me = std::process::id();
    assert!(said(&output).contains(&format!("process {me} (")), "{}", said(&output));
    assert!(said(&output).contains("has the same open file"), "{}", said(&output));
    live.wait_gone();
    let output = live.try_restore(&[]);
    assert!(!output.status.success() && said(&output).contains(" holds a write lock of flock(2)"));
    drop(lock);
    live.restore(&[]);
    let info = fs::read_to_string(format!("/proc/{}/fdinfo/0", live.root)).unwrap();
    assert!(info.contains("FLOCK  ADVISORY  WRITE"), "{info}");
}
