//! Cleans up what a killed rcriu process has left in other processes.

use std::{
    thread,
    time::{Duration, Instant},
};

use nix::libc;

use super::{
    Frozen, InjectError, Outcome, Result, Tracee,
    home::{Home, Slot, is_returning},
};
use crate::{arch::native::instruction_pointer, proc, sys::supervise::Leftover, units::HostPid};

/// How long a thread may take to come home: on a busy machine it has to wait for a processor.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long to let the process run before the first new attempt. The time doubles with each
/// attempt, up to [`LONG_NAP`].
const NAP: Duration = Duration::from_millis(5);

/// The longest time to let the process run between attempts.
const LONG_NAP: Duration = Duration::from_millis(320);

/// How long to wait for the process to stop.
pub(super) const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// What happened to scratch memory that was left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// The process has unmapped it itself, or has exited.
    Nothing(HostPid),
    /// The repair has unmapped it.
    Unmapped(HostPid),
    /// The process is stopped, and unmaps it itself when it resumes.
    Later(HostPid),
}

/// Unmaps the scratch memory of a process whose dumper was killed.
pub fn repair(left: Leftover) -> Result<Repair> {
    let begin = Instant::now();
    let mut nap = NAP;
    loop {
        let mut frozen = match Frozen::freeze_alone(left.pid, STOP_TIMEOUT) {
            Err(InjectError::Proc(error)) if error.is_vanished() => {
                return Ok(Repair::Nothing(left.pid));
            }
            frozen => frozen?,
        };
        let Some(task) = frozen.tasks.first_mut().filter(|task| !task.is_zombie()) else {
            return Ok(Repair::Nothing(left.pid));
        };
        if let Some(done) = attempt(left, &mut task.threads)? {
            return Ok(done);
        }
        if task.stopped_by() != 0 {
            return Ok(Repair::Later(left.pid));
        }
        if begin.elapsed() > PATIENCE {
            let what = "does not return from the work of a killed dump".to_owned();
            return Err(InjectError::Lost { tid: left.pid, what });
        }
        frozen.release(Outcome::Run)?;
        thread::sleep(nap);
        nap = LONG_NAP.min(nap * 2);
    }
}

/// Unmaps the scratch memory, unless a thread is still on its way home: the thread may be about to
/// unmap the memory, execute code in it, or even be about to map it.
fn attempt(left: Leftover, threads: &mut [Tracee]) -> Result<Option<Repair>> {
    let pid = left.pid;
    let (start, end) = (left.start, left.start.plus(left.bytes));
    let mappings = proc::maps(pid)?;
    let is_returning_here = |thread: &Tracee| {
        (start.0..end.0).contains(&instruction_pointer(&thread.registers)) || is_returning(thread)
    };
    if threads.iter().any(is_returning_here) {
        return Ok(None);
    }
    if !mappings.iter().any(|mapping| mapping.start == start && mapping.end == end) {
        return Ok(Some(Repair::Nothing(pid)));
    }
    let mut home = Home::find(threads, &mappings, &[])?;
    let thread = &mut threads[0];
    if thread.status()?.seccomp != 0 {
        thread.suspend_filters()?;
    }
    let stack = home.prepare(Slot::Keeper, thread)?;
    let unmap = [start.0, left.bytes, 0, 0, 0, 0];
    let result = thread.call(home.call, stack, u64::MAX, libc::SYS_munmap, unmap)?;
    thread.put_back()?;
    home.clear()?;
    let what = "unmap scratch memory".into();
    result.map_err(|source| InjectError::Call { tid: pid, what, source })?;
    Ok(Some(Repair::Unmapped(pid)))
}
