//! The part of a thread's scheduling that CRIU's images can hold.

use super::{Collect, Exited, Kind, Restored, Thread, own};
use crate::{
    image::proto::{CoreEntry, ThreadCoreEntry},
    inject::Script,
    res::{ResError, Result, calls::Calls},
    sys::process,
    units::HostPid,
};

/// `SCHED_RESET_ON_FORK`, `SCHED_DEADLINE` (`linux/sched.h`).
const RESET_ON_FORK: u32 = 0x4000_0000;
const DEADLINE: u32 = 6;

/// `SCHED_FLAG_RESET_ON_FORK` (`linux/sched.h`).
const FLAG_RESET_ON_FORK: u64 = 1;

pub(super) struct Scheduling;

impl Kind for Scheduling {
    fn ask(&self, _: Thread, _: &mut Script) -> Collect {
        Box::new(|of, _, core| {
            fill_in(&read(of.of.tid)?, own(core));
            Ok(())
        })
    }

    fn exited(&self, of: &Exited<'_>, core: &mut CoreEntry) -> Result<()> {
        fill_in(&read(of.tid)?, own(core));
        Ok(())
    }

    fn set(&self, of: &Restored<'_>, _: &mut Calls<'_>) -> Result<()> {
        let Some(thread) = &of.core.thread_core else { return Ok(()) };
        let tid = of.host_tid;
        let step = "set the scheduling of";
        let failed = |source| ResError::Thread { tid, step, source };
        let now = process::scheduling(tid).map_err(failed)?;
        // CRIU stores the flag in the policy, as sched_setscheduler(2) takes it.
        let policy = thread.sched_policy.unwrap_or(0);
        let resets = policy & RESET_ON_FORK != 0;
        let policy = policy & !RESET_ON_FORK;
        if policy == DEADLINE {
            // The entry cannot hold the deadline parameters; the `scheduling` attribute does.
            return Ok(());
        }
        let wanted = process::Scheduling {
            policy,
            flags: if resets { FLAG_RESET_ON_FORK } else { 0 },
            nice: thread.sched_nice.unwrap_or(0),
            priority: thread.sched_prio.unwrap_or(0),
            ..now
        };
        if wanted != now {
            process::set_scheduling(tid, &wanted).map_err(failed)?;
        }
        Ok(())
    }
}

/// Reads the scheduling of a thread.
fn read(tid: HostPid) -> Result<process::Scheduling> {
    let step = "read the scheduling of";
    process::scheduling(tid).map_err(|source| ResError::Thread { tid, step, source })
}

/// Stores the scheduling of a thread in its core.
fn fill_in(scheduling: &process::Scheduling, core: &mut ThreadCoreEntry) {
    core.sched_nice = Some(scheduling.nice);
    core.sched_policy = Some(match scheduling.flags & FLAG_RESET_ON_FORK {
        0 => scheduling.policy,
        _ => scheduling.policy | RESET_ON_FORK,
    });
    core.sched_prio = (scheduling.priority != 0).then_some(scheduling.priority);
}
