//! Freezes a tree of processes, and thaws it as if nothing had happened.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    Freezable, InjectError, Result, Tracee, await_ends,
    cgroup::{all_frozen, frozen_above},
    hold, tracee,
};
use crate::{
    arch::native,
    causes::with_sources,
    fault::{self, Point},
    proc::{self, Cgroup},
    sys::{
        ptrace::{self, Wait},
        supervise,
    },
    units::{HostPid, RemoteAddr},
};

/// How many times to look for new threads or processes, at most.
const ROUNDS: usize = 1000;

/// How many times to check for a stop before sleeping in between.
const EAGER_LOOKS: usize = 200;

/// How long to sleep between two checks.
const NAP: Duration = Duration::from_micros(100);

/// `PF_IO_WORKER` (`linux/sched.h`, since Linux 5.12): a kernel thread that works for an io_uring.
const IO_WORKER: u32 = 0x10;

/// A process of a frozen tree.
#[derive(Debug)]
pub struct Task {
    /// The process.
    pub pid: HostPid,
    /// Its parent.
    pub parent: HostPid,
    /// Its live threads, the leader first unless it has exited; empty for a zombie.
    pub threads: Vec<Tracee>,
}

impl Task {
    /// Whether the process is a zombie.
    pub fn is_zombie(&self) -> bool {
        self.threads.is_empty()
    }

    /// Returns a live thread, through which `/proc` shows what all threads share: memory, files,
    /// signals. It is the leader, unless that has exited and no longer shows them.
    pub fn witness(&self) -> HostPid {
        self.threads.first().map_or(self.pid, |thread| thread.tid)
    }

    /// Whether the leader has exited while other threads live.
    pub fn is_leaderless(&self) -> bool {
        self.witness() != self.pid
    }

    /// Returns the stack pointers of its threads.
    pub fn stack_pointers(&self) -> impl Iterator<Item = RemoteAddr> + '_ {
        self.threads.iter().map(|thread| RemoteAddr(native::stack_pointer(&thread.registers)))
    }

    /// Returns the signal that stopped the process before the freeze, or 0.
    pub fn stopped_by(&self) -> i32 {
        self.threads.first().map_or(0, |thread| thread.stopped_by)
    }
}

/// Returns the processes that are not zombies.
pub fn living(tasks: &[Task]) -> impl Iterator<Item = &Task> {
    tasks.iter().filter(|task| !task.is_zombie())
}

/// What happens to a frozen tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It resumes.
    Run,
    /// It stays stopped, by `SIGSTOP`.
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

/// A frozen tree of processes, parents before children. Dropping it thaws the tree.
#[derive(Debug)]
pub struct Frozen {
    /// The processes.
    pub tasks: Vec<Task>,
    deadline: Instant,
    /// Sets of cgroups known not to be frozen.
    cgroups: BTreeSet<Vec<Cgroup>>,
    /// Cgroups that were frozen, and are so again when the tree is released.
    thawed: Vec<Freezable>,
    /// Threads of these cgroups that are about to stop.
    stopping: BTreeSet<HostPid>,
    /// Threads of these cgroups that are stopped and do not belong to the tree.
    others: Vec<HostPid>,
}

impl Frozen {
    fn new(timeout: Duration) -> Self {
        let deadline = Instant::now() + timeout;
        Self {
            tasks: Vec::new(),
            deadline,
            cgroups: BTreeSet::new(),
            thawed: Vec::new(),
            stopping: BTreeSet::new(),
            others: Vec::new(),
        }
    }

    /// Returns the directories of the cgroups that were frozen.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        self.thawed.iter().map(|group| group.directory().to_owned()).collect()
    }

    /// Stops a process and all its descendants within `timeout`.
    ///
    /// # Errors
    /// [`InjectError::Denied`]; [`InjectError::Restless`]; [`InjectError::Lost`] for a thread that
    /// does not stop in time; errors of reading `/proc`. All processes stopped so far resume.
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
            // A process whose parent has exited meanwhile has a new parent: look again.
            looked_at = 0;
            let mut complete = true;
            for task in &frozen.tasks {
                complete &= proc::children(task.pid)?.iter().all(|child| known.contains(child));
            }
            if complete {
                frozen.stop_others()?;
                fault::hit(Point::DumpFrozen)?;
                return Ok(frozen);
            }
        }
        Err(InjectError::Restless { root })
    }

    /// Stops a process without its descendants; otherwise like [`Self::freeze`].
    pub(super) fn freeze_alone(pid: HostPid, timeout: Duration) -> Result<Self> {
        let mut frozen = Self::new(timeout);
        frozen.stop_task(pid, HostPid(0))?;
        Ok(frozen)
    }

    fn stop_task(&mut self, pid: HostPid, parent: HostPid) -> Result<()> {
        if let Ok(cgroups) = proc::cgroups(pid)
            && !self.cgroups.contains(&cgroups)
        {
            self.thaw(pid, &cgroups)?;
            self.cgroups.insert(cgroups);
        }
        let threads = self.stop_threads(pid)?;
        let gone = threads.is_empty()
            && proc::stat(pid).map_or_else(|error| error.is_vanished(), |stat| stat.state != 'Z');
        // The process has a new parent if the one that listed it has exited.
        let parent = proc::stat(pid).map_or(parent, |stat| stat.ppid);
        if !gone {
            self.tasks.push(Task { pid, parent, threads });
        }
        Ok(())
    }

    /// Thaws the frozen cgroups that a process is in, in such a way that no thread in them runs on.
    fn thaw(&mut self, pid: HostPid, cgroups: &[Cgroup]) -> Result<()> {
        let found = frozen_above(cgroups);
        let Some(first) = found.first() else { return Ok(()) };
        let own = HostPid::own();
        for tid in found.iter().flat_map(Freezable::threads).filter(|tid| *tid != own) {
            if self.stopping.contains(&tid) || self.is_stopped(tid) {
                continue;
            }
            match seize(tid) {
                Ok(()) => drop(self.stopping.insert(tid)),
                Err(_) if is_dead(tid, tid) => {}
                Err(error) => return Err(error),
            }
        }
        let frozen = all_frozen(&found);
        let mut all = self.thawed.clone();
        all.extend(frozen.iter().cloned());
        // If this program is killed, its supervisor freezes them again.
        if !supervise::note_frozen(&all.iter().map(Freezable::order).collect::<Vec<_>>()) {
            return Err(hold::frozen(pid, first));
        }
        for group in &frozen {
            log::debug!("{pid}: thaws {} for the dump", group.directory().display());
            self.thawed.push(group.clone());
            group.thaw().map_err(|_| hold::frozen(pid, group))?;
        }
        Ok(())
    }

    fn is_stopped(&self, tid: HostPid) -> bool {
        self.tasks.iter().flat_map(|task| &task.threads).any(|thread| thread.tid == tid)
    }

    /// Waits for the threads that do not belong to the tree, but are in a cgroup that was frozen.
    fn stop_others(&mut self) -> Result<()> {
        for tid in std::mem::take(&mut self.stopping) {
            match self.await_stop(tid, tid) {
                Ok(_) => self.others.push(tid),
                Err(_) if is_dead(tid, tid) => {}
                Err(error) => {
                    let _ = ptrace::detach(tid, 0);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Freezes the cgroups that were frozen. All threads in them are still stopped.
    fn freeze_again(&mut self) {
        if self.thawed.is_empty() {
            return;
        }
        for thread in self.tasks.iter_mut().flat_map(|task| &mut task.threads) {
            // `Tracee::release` reports a failure.
            let _ = thread.put_back();
        }
        for group in self.thawed.drain(..).rev() {
            if let Err(error) = group.freeze() {
                let path = group.directory().display();
                log::error!("{path}: cannot freeze the cgroup again: {error}");
            }
        }
        let _ = supervise::note_frozen(&[]);
        for tid in std::mem::take(&mut self.stopping) {
            // It may not have stopped, so ignore errors.
            let _ = ptrace::detach(tid, 0);
        }
        for tid in self.others.drain(..) {
            if let Err(error) = ptrace::detach(tid, 0) {
                log::warn!("{tid}: detach from a thread that is not of the tree: {error}");
            }
        }
    }

    /// Stops all threads of a process; returns none for a zombie.
    fn stop_threads(&mut self, pid: HostPid) -> Result<Vec<Tracee>> {
        let mut stopped: Vec<Tracee> = Vec::new();
        for _ in 0..ROUNDS {
            let result = self.stop_new_threads(pid, &mut stopped);
            match result {
                Ok(true) => {}
                Ok(false) => return Ok(stopped),
                Err(error) => {
                    self.freeze_again();
                    release_all(stopped);
                    return Err(error);
                }
            }
        }
        self.freeze_again();
        release_all(stopped);
        Err(InjectError::Restless { root: pid })
    }

    /// Stops the threads that are not stopped yet; returns whether there were any.
    fn stop_new_threads(&mut self, pid: HostPid, stopped: &mut Vec<Tracee>) -> Result<bool> {
        let tids = match proc::threads(pid) {
            Ok(tids) => tids,
            Err(error) if error.is_vanished() => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let mut pending = Vec::new();
        let mut failure = None;
        for tid in tids {
            // An io_uring worker has no user registers to restore, and may outlive its ring. The dump
            // finds rings by their descriptors.
            let known = stopped.iter().any(|thread| thread.tid == tid);
            if known || (tid != pid && is_io_worker(pid, tid)) {
                continue;
            }
            if self.stopping.remove(&tid) {
                pending.push(tid);
                continue;
            }
            match seize(tid) {
                Ok(()) => pending.push(tid),
                // The thread has exited or is exiting.
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
                    // It may not have stopped, so ignore errors.
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

    /// Waits until an interrupted thread stops. Returns the signal that had stopped its process
    /// before, or 0. Delivers signals that arrive first.
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

    /// Sets whether the kernel kills the tree if the dumper dies (`PTRACE_O_EXITKILL`), for a tree
    /// that the dump is about to kill.
    ///
    /// # Errors
    /// [`InjectError::Trace`].
    pub fn set_doomed(&mut self, doomed: bool) -> Result<()> {
        let exit = if doomed { ptrace::options::EXITKILL } else { 0 };
        let threads = self.tasks.iter().flat_map(|task| &task.threads);
        for Tracee { tid, .. } in threads {
            ptrace::set_options(*tid, ptrace::options::SYSGOOD | exit)
                .map_err(InjectError::trace(*tid, "set the options of"))?;
        }
        supervise::note_doom(doomed);
        Ok(())
    }

    /// Releases the tree.
    ///
    /// # Errors
    /// The first failure; all other processes are released nevertheless.
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
        for task in living(&self.tasks) {
            if let Some(signal) = signal
                && let Err(source) = kill(Pid::from_raw(task.pid.0), signal)
            {
                let step = "send a signal to";
                result = Err(InjectError::Trace { tid: task.pid, step, source });
            }
        }
        // A frozen process does not die before it is thawed.
        if outcome != Outcome::Kill {
            self.freeze_again();
        }
        let tasks = std::mem::take(&mut self.tasks);
        // Children first, so that a resumed parent finds them as they were.
        let threads = tasks.into_iter().rev().flat_map(|task| task.threads.into_iter().rev());
        if outcome == Outcome::Kill {
            let ended = await_ends(threads.map(|thread| thread.tid));
            self.freeze_again();
            return ended.and(result);
        }
        for thread in threads {
            let released = thread.release();
            if released.is_err() {
                result = released;
            }
        }
        result
    }
}

impl Drop for Frozen {
    /// Thaws the tree.
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

/// Takes over a stopped thread. If rcriu has stopped it, and has thereby interrupted a system call
/// that would fail for no reason, makes the thread restart the call.
fn take_over(tid: HostPid, stopped_by: i32) -> Result<Tracee> {
    let mut tracee = Tracee::new(tid, stopped_by)?;
    if stopped_by == 0
        && let Some(mended) = native::mended(&tracee.registers)
    {
        // Do so now: the thread then resumes like that even if rcriu is killed.
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
