//! The `membarrier(2)` commands that a process is registered for.

use nix::libc;

use super::{Calling, Collect, Kind, Restored};
use crate::{
    inject::Script,
    res::{Result, calls::Calls},
};

/// `MEMBARRIER_CMD_GET_REGISTRATIONS` (`linux/membarrier.h`, since Linux 6.3).
const REGISTRATIONS: i32 = 1 << 9;

pub(super) struct Membarrier;

impl Kind for Membarrier {
    fn ask(&self, _: &Calling<'_>, script: &mut Script) -> Result<Collect> {
        let call = script.attempt(libc::SYS_membarrier, &[REGISTRATIONS.into()]);
        Ok(Box::new(move |_, answers, images| {
            let mask = u32::try_from(answers.result(call).unwrap_or(0)).unwrap_or(0);
            images.core.membarrier_registration_mask = (mask != 0).then_some(mask);
            Ok(())
        }))
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        let task = of.core.tc.as_ref();
        let mask = task.and_then(|task| task.membarrier_registration_mask).unwrap_or(0);
        for bit in (0..u32::BITS).filter(|bit| mask >> bit & 1 == 1) {
            let command = 1_u32 << bit;
            calls.script.attempt(libc::SYS_membarrier, &[command.into(), 0.into()]);
        }
        Ok(())
    }
}
