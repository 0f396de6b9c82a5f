//! The part of a thread's scheduling that CRIU's images have no field for.

use nix::errno::Errno;

use super::{Asked, Kind, Label, Owner};
use crate::{
    inject::{Answers, Script},
    sys::process,
};

/// Policy, flags, nice value and priority; runtime, deadline and period in nanoseconds, which for
/// policies other than deadline scheduling hold the slice; and utilization clamps. The time left
/// in the current period is not kept.
pub(super) struct Scheduling;

impl Kind for Scheduling {
    fn label(&self) -> Label {
        Label::of_thread(
            "scheduling",
            "the scheduling (sched_setattr(2): policy, flags, nice, priority, runtime, deadline, \
         period, clamps)",
        )
    }

    fn read(&self, owner: Owner, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        let now = process::scheduling(owner.tid).ok()?;
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

    fn set(&self, values: &[u64], owner: Owner, _: &mut Script) -> Result<(), Errno> {
        let &[policy, flags, nice, priority, runtime, deadline, period, least, most] = values
        else {
            return Err(Errno::EINVAL);
        };
        let wrong = |_| Errno::EINVAL;
        let now = process::scheduling(owner.tid)?;
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
        process::set_scheduling(owner.tid, &wanted)
    }
}
