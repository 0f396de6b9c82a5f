//! A worker gets to undo its work, whatever happens to the process that waits for it.
//!
//! Without the test harness, whose threads keep a process from being split: this
//! program runs itself.

use std::{
    env,
    io::{BufRead, BufReader, Read},
    process::{Command, ExitCode, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, raise, sigaction},
    unistd::{Pid, getpid},
};
use rcriu::sys::{
    cancel,
    supervise::{self, Ended, Side},
};

/// Set in the process that splits.
const VARIABLE: &str = "RCRIU_TEST_SUPERVISE";
const READY: &str = "ready";
const UNDONE: &str = "undone";
const CODE: u8 = 7;
/// What a supervisor is sent.
const SIGNALS: [Signal; 4] = [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

#[expect(unsafe_code, reason = "signals get their default actions")]
fn main() -> ExitCode {
    if env::var_os(VARIABLE).is_some() {
        return split();
    }
    if env::args().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        // A shell that runs the tests in the background may ignore the signal, and this
        // process inherits that.
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action is no handler.
        unsafe { sigaction(signal, &default) }.unwrap();
    }
    for signal in SIGNALS {
        let (said, status) = started(signal);
        assert!(said.contains(UNDONE), "after {signal}: {said}");
        if signal != Signal::SIGKILL {
            assert_eq!(status.code(), Some(CODE.into()), "after {signal}");
        }
        println!("test a_worker_undoes_its_work_after_{signal} ... ok");
    }
    // In the form of the test harness: tests/tally reads this.
    println!("\ntest result: ok. {} passed; 0 failed; 0 ignored", SIGNALS.len());
    ExitCode::SUCCESS
}

/// Splits, and works until it is asked to stop.
fn split() -> ExitCode {
    match supervise::split().unwrap() {
        Side::Supervisor(supervisor) => match supervisor.wait().unwrap() {
            Ended::Exited(code) => ExitCode::from(u8::try_from(code).unwrap()),
            Ended::Killed(signal) => panic!("killed by {signal}"),
        },
        Side::Worker => {
            // Ctrl-Z must have no effect on the worker.
            raise(Signal::SIGTSTP).unwrap();
            println!("{READY}");
            while !cancel::is_cancelled() {
                thread::sleep(Duration::from_millis(1));
            }
            println!("{UNDONE} by {}", getpid());
            ExitCode::from(CODE)
        }
    }
}

/// Starts a supervisor, sends it a signal when its worker is ready, and returns
/// what the two write after that, until both have ended.
fn started(signal: Signal) -> (String, ExitStatus) {
    let mut child = Command::new(env::current_exe().unwrap())
        .env(VARIABLE, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line.trim(), READY);
    kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    (rest, child.wait().unwrap())
}
