//! Signals pending for a process as a whole.

use super::{Calling, Collect, Kind, Restored};
use crate::{
    inject::Script,
    res::{ResError, Result, signals},
    sys::ptrace,
};

pub(super) struct Queue;

impl Kind for Queue {
    fn ask(&self, _: &Calling<'_>, _: &mut Script) -> Result<Collect> {
        Ok(Box::new(|of, _, images| {
            let tid = of.of.witness;
            let step = "read the signals of";
            let pending = ptrace::queued_signals(tid, true).map_err(|source| ResError::Thread {
                tid,
                step,
                source,
            })?;
            images.core.signals_s = Some(signals::queue(pending));
            Ok(())
        }))
    }

    fn last_calls(&self, of: &Restored<'_>, script: &mut Script) -> Result<()> {
        let queue = of.core.tc.as_ref().and_then(|task| task.signals_s.as_ref());
        queue.map_or(Ok(()), |queue| {
            signals::requeue(queue, of.pid, of.local(of.pid)?, None, script)
        })
    }
}
