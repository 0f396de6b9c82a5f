//! A worker that outlives the process that waits for it.
#![expect(unsafe_code, reason = "fork")]

use std::{
    fs, io, process,
    sync::atomic::{AtomicPtr, AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        prctl::set_pdeathsig,
        signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, kill, sigaction},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork, getpid, getppid, setsid},
};

use super::cancel;
use crate::units::{HostPid, RemoteAddr};

/// State that the worker shares with the supervisor, in common memory.
#[derive(Debug, Default)]
struct Ledger {
    /// The process that has scratch memory, or 0.
    pid: AtomicU64,
    start: AtomicU64,
    bytes: AtomicU64,
}

/// The ledger; none before [`split`].
static LEDGER: AtomicPtr<Ledger> = AtomicPtr::new(std::ptr::null_mut());

fn ledger() -> Option<&'static Ledger> {
    // SAFETY: what is there was set by `begin_ledger`, to memory that stays mapped and
    // consists of atomics; otherwise it is null.
    unsafe { LEDGER.load(Ordering::Acquire).as_ref() }
}

fn begin_ledger() -> nix::Result<()> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let (anywhere, len) = (std::ptr::null_mut(), size_of::<Ledger>());
    // SAFETY: a new mapping touches no other. It is aligned to a page, and zeros are a ledger.
    let memory = unsafe { libc::mmap(anywhere, len, access, flags, -1, 0) };
    if memory == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    LEDGER.store(memory.cast(), Ordering::Release);
    Ok(())
}

/// Scratch memory in another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The process.
    pub pid: HostPid,
    /// Where it begins.
    pub start: RemoteAddr,
    /// Its length.
    pub bytes: u64,
}

/// Tells the supervisor that a process is about to get scratch memory, which is to be
/// removed if this process cannot.
pub fn note_scratch(pid: HostPid, start: RemoteAddr, bytes: u64) {
    if let Some(ledger) = ledger() {
        ledger.start.store(start.0, Ordering::Relaxed);
        ledger.bytes.store(bytes, Ordering::Relaxed);
        ledger.pid.store(u64::from(pid.0.cast_unsigned()), Ordering::Release);
    }
}

/// Tells the supervisor that there is no scratch memory any more.
pub fn clear_scratch() {
    if let Some(ledger) = ledger() {
        ledger.pid.store(0, Ordering::Release);
    }
}

/// The two processes after [`split`].
#[derive(Debug)]
pub enum Side {
    /// The one that was called, which waits for the other.
    Supervisor(Supervisor),
    /// The one that does the work.
    Worker,
}

/// The caller's process.
#[derive(Debug)]
pub struct Supervisor {
    worker: Pid,
    /// What is waited for; all of it is blocked.
    signals: SigSet,
}

/// How the worker has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this exit code.
    Exited(i32),
    /// By a signal.
    Killed(Signal),
}

/// Splits the process in two: a worker, and one that waits for it and passes on
/// to it what asks for an end.
///
/// The worker is in a session of its own, so that what kills the caller's process group or
/// session does not kill both.
///
/// If the caller is killed, even by `SIGKILL`, the worker is asked to stop, by a flag
/// ([`cancel`]). So it always gets to undo what it has done to other processes. In the
/// worker Ctrl-Z has no effect either: it would stop while others are stopped by it.
///
/// To be called before the program starts a thread. The worker must not change
/// its user id: the kernel forgets then whose end it wants to know of.
///
/// # Errors
/// `EBUSY` if there is another thread; what `fork(2)` and `sigaction(2)` return.
pub fn split() -> io::Result<Side> {
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(Errno::EBUSY.into());
    }
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    for signal in cancel::REQUESTS {
        if signal == Signal::SIGTERM || !cancel::is_ignored(signal)? {
            signals.add(signal);
        }
    }
    // An ignored SIGCHLD is inherited, and would let the kernel reap the worker
    // behind our back.
    set_action(Signal::SIGCHLD, SigHandler::SigDfl)?;
    begin_ledger()?;
    let before = signals.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let supervisor = getpid();
    // SAFETY: there is one thread, as was checked above, so that the child
    // inherits no lock that a thread it does not have would have to release.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => {
            Ok(Side::Supervisor(Supervisor { worker: child, signals }))
        }
        Ok(ForkResult::Child) => {
            cancel::install()?;
            set_action(Signal::SIGTSTP, SigHandler::Handler(stay))?;
            set_pdeathsig(Signal::SIGTERM)?;
            if getppid() != supervisor {
                // The supervisor was killed before we asked for the signal. No work has
                // begun yet.
                process::exit(1);
            }
            setsid()?;
            before.thread_set_mask()?;
            Ok(Side::Worker)
        }
        Err(errno) => {
            before.thread_set_mask()?;
            Err(errno.into())
        }
    }
}

/// The handler of a signal that is to have no effect, but not for the programs
/// that the worker executes, as ignoring it would.
extern "C" fn stay(_signal: libc::c_int) {}

fn set_action(signal: Signal, handler: SigHandler) -> nix::Result<()> {
    let action = SigAction::new(handler, SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler is the default, or does nothing.
    unsafe { sigaction(signal, &action) }.map(drop)
}

impl Supervisor {
    /// Returns the scratch memory that a worker has left, which was killed.
    pub fn leftover(&self) -> Option<Leftover> {
        let ledger = ledger()?;
        let pid = ledger.pid.load(Ordering::Acquire);
        let pid = i32::try_from(pid).ok().filter(|pid| *pid != 0)?;
        Some(Leftover {
            pid: HostPid(pid),
            start: RemoteAddr(ledger.start.load(Ordering::Relaxed)),
            bytes: ledger.bytes.load(Ordering::Relaxed),
        })
    }

    /// Waits for the end of the worker, and passes on `SIGINT`, `SIGTERM` and
    /// `SIGHUP` until then.
    ///
    /// # Errors
    /// What `sigwait(3)` and `waitpid(2)` return.
    pub fn wait(&self) -> io::Result<Ended> {
        loop {
            match waitpid(self.worker, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(_, code)) => return Ok(Ended::Exited(code)),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Ended::Killed(signal)),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            match self.signals.wait()? {
                Signal::SIGCHLD => {}
                // The worker may have ended just now; then the signal goes nowhere.
                signal => drop(kill(self.worker, signal)),
            }
        }
    }
}
