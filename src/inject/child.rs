//! Children of this program that it traces: takes them over, and waits for them.

use std::{thread, time::Duration};

use nix::{errno::Errno, libc};

use super::{InjectError, Result, Tracee};
use crate::{
    sys::{
        process,
        ptrace::{self, Wait, options},
    },
    units::HostPid,
};

/// Attaches to a process that [`process::spawn_sleeper`] made, with `more` options of `ptrace(2)`.
/// Processes that it creates have them, too. Kills the process if that fails.
///
/// # Errors
/// [`InjectError::Trace`], [`InjectError::Lost`].
pub fn adopt_sleeper(pid: HostPid, more: i32) -> Result<Tracee> {
    let adopted = (|| {
        ptrace::seize(pid, options::SYSGOOD | options::EXITKILL | more)
            .map_err(InjectError::trace(pid, "trace"))?;
        ptrace::interrupt(pid).map_err(InjectError::trace(pid, "interrupt"))?;
        await_stop(pid)
    })();
    if adopted.is_err() {
        let _ = process::signal(pid, libc::SIGKILL);
        let _ = await_end(pid);
    }
    adopted
}

/// Waits until a new tracee has stopped.
///
/// # Errors
/// [`InjectError::Lost`] if it has ended; [`InjectError::Trace`].
pub fn await_stop(tid: HostPid) -> Result<Tracee> {
    loop {
        match ptrace::wait(tid).map_err(InjectError::trace(tid, "wait for"))? {
            Wait::Interrupted | Wait::Stopped(_) => return Tracee::new(tid, 0),
            wait @ (Wait::Exited(_) | Wait::Killed(_)) => {
                return Err(InjectError::Lost { tid, what: format!("has ended ({wait:?})") });
            }
            _ => ptrace::resume(tid, 0).map_err(InjectError::trace(tid, "resume"))?,
        }
    }
}

/// Waits until killed children and tracees are gone, in whatever order they go. The first process of a
/// pid namespace goes last: the kernel keeps the thread of it that ends last until all others in the
/// namespace, its own threads included, have been waited for.
///
/// # Errors
/// [`InjectError::Trace`] for the first failure; waits for the others all the same.
pub fn await_ends(tids: impl IntoIterator<Item = HostPid>) -> Result<()> {
    const NAP: Duration = Duration::from_micros(100);
    let mut left: Vec<HostPid> = tids.into_iter().collect();
    let mut result = Ok(());
    while !left.is_empty() {
        let before = left.len();
        left.retain(|tid| match ptrace::wait_nohang(*tid) {
            // It is a thread that another one waits for, or its parent has reaped it.
            Err(Errno::ECHILD) | Ok(Some(Wait::Exited(_) | Wait::Killed(_))) => false,
            Ok(Some(Wait::Event(libc::PTRACE_EVENT_EXIT))) => {
                // It may be gone already.
                let _ = ptrace::resume(*tid, 0);
                true
            }
            Ok(_) => true,
            Err(source) => {
                if result.is_ok() {
                    result = Err(InjectError::trace(*tid, "wait for")(source));
                }
                false
            }
        });
        if left.len() == before {
            thread::sleep(NAP);
        }
    }
    result
}

/// Waits until a killed child or tracee is gone.
///
/// # Errors
/// [`InjectError::Trace`].
pub fn await_end(tid: HostPid) -> Result<()> {
    loop {
        match ptrace::wait(tid) {
            Err(Errno::ECHILD) | Ok(Wait::Exited(_) | Wait::Killed(_)) => return Ok(()),
            Ok(_) => {}
            Err(source) => return Err(InjectError::trace(tid, "wait for")(source)),
        }
    }
}
