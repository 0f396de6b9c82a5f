//! Removing what a killed process has left in another one.

use std::{
    thread,
    time::{Duration, Instant},
};

use nix::libc;

use super::{
    Frozen, InjectError, Outcome, Result, Tracee,
    home::{Home, Slot},
};
use crate::{proc, sys::supervise::Leftover, units::HostPid};

/// How long a thread may take to come home.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long to let it run in between.
const NAP: Duration = Duration::from_millis(5);

/// How long to wait for the process to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// What became of scratch memory that was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// The process has removed it itself, or is gone.
    Nothing(HostPid),
    /// It was there, and is gone now.
    Unmapped(HostPid),
}

/// Removes scratch memory that a process still has although who mapped it is dead.
///
/// # Errors
/// Those of stopping the process and working in it.
pub fn repair(left: Leftover) -> Result<Repair> {
    let begin = Instant::now();
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
        if begin.elapsed() > PATIENCE {
            let what = "does not come home".to_owned();
            return Err(InjectError::Lost { tid: left.pid, what });
        }
        frozen.release(Outcome::Run)?;
        thread::sleep(NAP);
    }
}

/// Removes it unless a thread is still on its way home: it may unmap the memory, be in it,
/// or even have yet to map it.
fn attempt(left: Leftover, threads: &mut [Tracee]) -> Result<Option<Repair>> {
    let pid = left.pid;
    let (start, end) = (left.start, left.start.plus(left.bytes));
    let mappings = proc::maps(pid)?;
    let mut home = Home::find(threads, &mappings)?;
    let is_abroad = |thread: &Tracee| {
        (start.0..end.0).contains(&thread.registers.rip) || home.has_frame(thread)
    };
    if threads.iter().any(is_abroad) {
        return Ok(None);
    }
    if !mappings.iter().any(|mapping| mapping.start == start && mapping.end == end) {
        return Ok(Some(Repair::Nothing(pid)));
    }
    let thread = &mut threads[0];
    let stack = home.prepare(Slot::Keeper, thread)?;
    let unmap = [start.0, left.bytes, 0, 0, 0, 0];
    let result = thread.call(home.call, stack, u64::MAX, libc::SYS_munmap, unmap)?;
    thread.put_back()?;
    home.clear()?;
    let what = "unmap scratch memory".into();
    result.map_err(|source| InjectError::Call { tid: pid, what, source })?;
    Ok(Some(Repair::Unmapped(pid)))
}
