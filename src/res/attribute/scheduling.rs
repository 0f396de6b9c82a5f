//! What the images have no place for of how a thread is scheduled.

use nix::errno::Errno;

use super::{Asked, Kind, Who};
use crate::{
    inject::{Answers, Script},
    sys::process,
};

/// Policy, flags, nice value and priority; runtime, deadline and period in nanoseconds:
/// of deadline scheduling, and the slice of other policies; clamps of utilization. What is left of the present
/// period is not kept.
pub(super) struct Scheduling;

impl Kind for Scheduling {
    fn name(&self) -> &'static str {
        "scheduling"
    }

    fn about(&self) -> &'static str {
        "how it is scheduled (sched_setattr(2): policy, flags, nice, priority, runtime, deadline, \
         period, clamps)"
    }

    fn read(&self, who: Who, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        let now = process::scheduling(who.tid).ok()?;
        Some(vec![
            now.policy.into(),
            now.flags,
            i64::from(now.nice).cast_unsigned(),
            now.priority.into(),
            now.runtime,
            now.deadline,
            now.period,
            now.clamps[0].into(),
            now.clamps[1].into(),
        ])
    }

    fn set(&self, values: &[u64], who: Who, _: &mut Script) -> Result<(), Errno> {
        let &[policy, flags, nice, priority, runtime, deadline, period, least, most] = values
        else {
            return Err(Errno::EINVAL);
        };
        let wrong = |_| Errno::EINVAL;
        let now = process::scheduling(who.tid)?;
        let clamps = [u32::try_from(least).map_err(wrong)?, u32::try_from(most).map_err(wrong)?];
        let flags = if clamps == now.clamps { flags } else { flags | process::SCHED_CLAMPS };
        let wanted = process::Scheduling {
            policy: u32::try_from(policy).map_err(wrong)?,
            flags,
            nice: i32::try_from(nice.cast_signed()).map_err(wrong)?,
            priority: u32::try_from(priority).map_err(wrong)?,
            runtime,
            deadline,
            period,
            clamps,
            ..now
        };
        process::set_scheduling(who.tid, &wanted)
    }
}
