//! Stopping a tree of processes, and letting it go on as if nothing had happened.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    libc,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{InjectError, Result, Tracee, hold, tracee};
use crate::{
    arch::native,
    causes::with_sources,
    fault::{self, Point},
    proc::{self, Cgroup},
    sys::ptrace::{self, Wait},
    units::{HostPid, RemoteAddr},
};

/// Rounds over the tree in which new processes may turn up.
const ROUNDS: usize = 1000;

/// How often a thread is looked at before sleeping in between.
const EAGER_LOOKS: usize = 200;

/// How long to sleep between two looks.
const NAP: Duration = Duration::from_micros(100);

/// `PF_IO_WORKER` (`linux/sched.h`, since Linux 5.12): the kernel's own thread, which
/// works for an io_uring.
const IO_WORKER: u32 = 0x10;

/// A process of a stopped tree.
#[derive(Debug)]
pub struct Task {
    /// The process.
    pub pid: HostPid,
    /// Its parent.
    pub parent: HostPid,
    /// Its threads that live, the leader first unless that has ended; none if it is dead
    /// and not yet waited for.
    pub threads: Vec<Tracee>,
}

impl Task {
    /// Whether the process has ended and waits to be reaped.
    pub fn is_zombie(&self) -> bool {
        self.threads.is_empty()
    }

    /// Returns the thread by which the kernel shows what all of them share: memory, files,
    /// signals. It is the leader, unless that has ended: then it has nothing any more.
    pub fn witness(&self) -> HostPid {
        self.threads.first().map_or(self.pid, |thread| thread.tid)
    }

    /// Whether the leader has ended while other threads live.
    pub fn is_leaderless(&self) -> bool {
        self.witness() != self.pid
    }

    /// Returns where the stacks of its threads end.
    pub fn stack_pointers(&self) -> impl Iterator<Item = RemoteAddr> + '_ {
        self.threads.iter().map(|thread| RemoteAddr(native::stack_pointer(&thread.registers)))
    }

    /// Returns the signal that had stopped the process before, or 0.
    pub fn stopped_by(&self) -> i32 {
        self.threads.first().map_or(0, |thread| thread.stopped_by)
    }
}

/// What becomes of a tree that was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on.
    Run,
    /// It stays, stopped by `SIGSTOP`.
    Stop,
    /// It is killed.
    Kill,
}

/// What the user says of stopping a tree.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    timeout: Duration,
}

impl Options {
    /// The timeout unless the user says otherwise, as CRIU has it.
    pub const TIMEOUT_S: u32 = 10;

    /// `timeout_s`: how many seconds to try (`--timeout`).
    pub fn new(timeout_s: u32) -> Self {
        Self { timeout: Duration::from_secs(timeout_s.into()) }
    }
}

/// A tree of processes that is stopped, parents before children. When it is
/// dropped, it goes on.
#[derive(Debug)]
pub struct Frozen {
    /// The processes.
    pub tasks: Vec<Task>,
    deadline: Instant,
    /// Sets of cgroups that are not frozen.
    cgroups: BTreeSet<Vec<Cgroup>>,
}

impl Frozen {
    fn new(timeout: Duration) -> Self {
        let deadline = Instant::now() + timeout;
        Self { tasks: Vec::new(), deadline, cgroups: BTreeSet::new() }
    }

    /// Stops a process with all its descendants within the timeout.
    ///
    /// # Errors
    /// [`InjectError::Denied`]; [`InjectError::Restless`]; [`InjectError::Lost`]
    /// for a thread that does not stop in time; those of reading `/proc`. What was
    /// stopped by then goes on.
    pub fn freeze(root: HostPid, options: Options) -> Result<Self> {
        let mut frozen = Self::new(options.timeout);
        frozen.stop_task(root, proc::stat(root)?.ppid)?;
        fault::hit(Point::DumpSeize)?;
        let mut known = BTreeSet::from([root]);
        let mut looked_at = 0;
        for _ in 0..ROUNDS {
            while looked_at < frozen.tasks.len() {
                let parent = frozen.tasks[looked_at].pid;
                looked_at += 1;
                for child in proc::children(parent)? {
                    if known.insert(child) {
                        frozen.stop_task(child, parent)?;
                    }
                }
            }
            // Whose parent has died while we looked has another one now.
            looked_at = 0;
            let mut complete = true;
            for task in &frozen.tasks {
                complete &= proc::children(task.pid)?.iter().all(|child| known.contains(child));
            }
            if complete {
                fault::hit(Point::DumpFrozen)?;
                return Ok(frozen);
            }
        }
        Err(InjectError::Restless { root })
    }

    /// Stops a process without its descendants.
    ///
    /// # Errors
    /// As [`Self::freeze`].
    pub(super) fn freeze_alone(pid: HostPid, timeout: Duration) -> Result<Self> {
        let mut frozen = Self::new(timeout);
        frozen.stop_task(pid, HostPid(0))?;
        Ok(frozen)
    }

    fn stop_task(&mut self, pid: HostPid, parent: HostPid) -> Result<()> {
        if let Ok(cgroups) = proc::cgroups(pid)
            && !self.cgroups.contains(&cgroups)
        {
            hold::check_frozen(pid, &cgroups)?;
            self.cgroups.insert(cgroups);
        }
        let threads = self.stop_threads(pid)?;
        let gone = threads.is_empty()
            && proc::stat(pid).map_or_else(|error| error.is_vanished(), |stat| stat.state != 'Z');
        // The parent may be another one, if the one it was found under has died.
        let parent = proc::stat(pid).map_or(parent, |stat| stat.ppid);
        if !gone {
            self.tasks.push(Task { pid, parent, threads });
        }
        Ok(())
    }

    /// Stops all threads of a process; none if it is dead.
    fn stop_threads(&self, pid: HostPid) -> Result<Vec<Tracee>> {
        let mut stopped: Vec<Tracee> = Vec::new();
        for _ in 0..ROUNDS {
            let result = self.stop_new_threads(pid, &mut stopped);
            match result {
                Ok(true) => {}
                Ok(false) => return Ok(stopped),
                Err(error) => {
                    release_all(stopped);
                    return Err(error);
                }
            }
        }
        release_all(stopped);
        Err(InjectError::Restless { root: pid })
    }

    /// Stops those threads that are not yet; tells whether there were any.
    fn stop_new_threads(&self, pid: HostPid, stopped: &mut Vec<Tracee>) -> Result<bool> {
        let tids = match proc::threads(pid) {
            Ok(tids) => tids,
            Err(error) if error.is_vanished() => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let mut pending = Vec::new();
        let mut failure = None;
        for tid in tids {
            // A worker of the kernel's has no registers to be put back, and may stay when
            // its ring is gone. A ring itself is seen by its descriptor.
            let known = stopped.iter().any(|thread| thread.tid == tid);
            if known || (tid != pid && is_io_worker(pid, tid)) {
                continue;
            }
            match seize(tid) {
                Ok(()) => pending.push(tid),
                // It has ended, or is ending.
                Err(_) if is_dead(pid, tid) => {}
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        let any = !pending.is_empty();
        for tid in pending {
            match self.await_stop(pid, tid).and_then(|by| take_over(tid, by)) {
                Ok(thread) => stopped.push(thread),
                Err(_) if is_dead(pid, tid) => {}
                Err(error) => {
                    // Best effort: it may not have stopped.
                    let _ = ptrace::detach(tid, 0);
                    failure.get_or_insert(error);
                }
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(any),
        }
    }

    /// Waits for a thread that was interrupted and returns the signal that had
    /// stopped its process, or 0. Signals that come first are passed on.
    fn await_stop(&self, pid: HostPid, tid: HostPid) -> Result<i32> {
        let failed = |step| InjectError::trace(tid, step);
        for look in 0_usize.. {
            match ptrace::wait_nohang(tid).map_err(failed("wait for"))? {
                Some(Wait::Interrupted) => return Ok(0),
                Some(Wait::Stopped(signal)) => return Ok(signal),
                Some(Wait::Signal(signal)) => {
                    ptrace::resume(tid, signal).map_err(failed("resume"))?;
                }
                Some(Wait::Event(_) | Wait::Syscall | Wait::Other(_)) => {
                    ptrace::resume(tid, 0).map_err(failed("resume"))?;
                }
                Some(ended) => return Err(tracee::lost(tid, ended)),
                None if look < EAGER_LOOKS => thread::yield_now(),
                None if Instant::now() > self.deadline => break,
                None => thread::sleep(NAP),
            }
        }
        Err(hold::why_running(pid, tid))
    }

    /// Ends the stop.
    ///
    /// # Errors
    /// The first failure; all processes are seen to all the same.
    pub fn release(mut self, outcome: Outcome) -> Result<()> {
        self.let_go(outcome)
    }

    fn let_go(&mut self, outcome: Outcome) -> Result<()> {
        let signal = match outcome {
            Outcome::Run => None,
            Outcome::Stop => Some(Signal::SIGSTOP),
            Outcome::Kill => Some(Signal::SIGKILL),
        };
        let mut result = Ok(());
        let tasks = std::mem::take(&mut self.tasks);
        for task in tasks.iter().filter(|task| !task.is_zombie()) {
            if let Some(signal) = signal
                && let Err(source) = kill(Pid::from_raw(task.pid.0), signal)
            {
                let step = "send a signal to";
                result = Err(InjectError::Trace { tid: task.pid, step, source });
            }
        }
        // Children first: a parent that goes on finds them as they were.
        for task in tasks.into_iter().rev() {
            for thread in task.threads.into_iter().rev() {
                let ended = match outcome {
                    Outcome::Run | Outcome::Stop => thread.release(),
                    Outcome::Kill => await_death(thread.tid),
                };
                if ended.is_err() {
                    result = ended;
                }
            }
        }
        result
    }
}

impl Drop for Frozen {
    /// Lets the tree go on.
    fn drop(&mut self) {
        if let Err(error) = self.let_go(Outcome::Run) {
            log::warn!("{}", with_sources(&error));
        }
    }
}

fn release_all(threads: Vec<Tracee>) {
    for thread in threads {
        let tid = thread.tid;
        if let Err(error) = thread.release() {
            log::warn!("{tid}: {}", with_sources(&error));
        }
    }
}

fn seize(tid: HostPid) -> Result<()> {
    ptrace::seize(tid, ptrace::options::SYSGOOD).map_err(|errno| tracee::denied(tid, errno))?;
    ptrace::interrupt(tid).map_err(InjectError::trace(tid, "interrupt"))
}

/// Takes over a thread that has stopped. If that was for this program, a call that it
/// would interrupt for nothing is made to go on.
fn take_over(tid: HostPid, stopped_by: i32) -> Result<Tracee> {
    let mut tracee = Tracee::new(tid, stopped_by)?;
    if stopped_by == 0
        && let Some(mended) = native::mended(&tracee.registers)
    {
        // At once: whatever ends this program, it goes on like that.
        ptrace::set_registers(tid, &mended)
            .map_err(InjectError::trace(tid, "set the registers of"))?;
        tracee.registers = mended;
    }
    Ok(tracee)
}

fn is_io_worker(pid: HostPid, tid: HostPid) -> bool {
    proc::thread_stat(pid, tid).is_ok_and(|stat| stat.flags & IO_WORKER != 0)
}

fn is_dead(pid: HostPid, tid: HostPid) -> bool {
    proc::thread_stat(pid, tid)
        .map_or_else(|error| error.is_vanished(), |stat| matches!(stat.state, 'Z' | 'X'))
}

/// Waits until a tracee that was killed is gone.
fn await_death(tid: HostPid) -> Result<()> {
    loop {
        match ptrace::wait(tid) {
            // It is not the leader, so no process waits for it; or its parent has reaped
            // it.
            Err(Errno::ECHILD) | Ok(Wait::Exited(_) | Wait::Killed(_)) => return Ok(()),
            Err(errno) => return Err(InjectError::trace(tid, "wait for")(errno)),
            Ok(Wait::Event(libc::PTRACE_EVENT_EXIT)) => {
                ptrace::resume(tid, 0).map_err(InjectError::trace(tid, "resume"))?;
            }
            Ok(_) => {}
        }
    }
}
