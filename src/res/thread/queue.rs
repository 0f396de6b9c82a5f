//! Signals pending for a single thread.

use super::{Collect, Exited, Kind, Restored, Thread, own};
use crate::{
    image::proto::{CoreEntry, SignalQueueEntry},
    inject::Script,
    res::{ResError, Result, signals},
    sys::ptrace,
};

pub(super) struct Queue;

impl Kind for Queue {
    fn ask(&self, _: Thread, _: &mut Script) -> Collect {
        Box::new(|of, _, core| {
            let tid = of.of.tid;
            let step = "read the signals of";
            let pending = ptrace::queued_signals(tid, false)
                .map_err(|source| ResError::Thread { tid, step, source })?;
            own(core).signals_p = Some(signals::queue(pending));
            Ok(())
        })
    }

    fn exited(&self, _: &Exited<'_>, core: &mut CoreEntry) -> Result<()> {
        own(core).signals_p = Some(SignalQueueEntry::default());
        Ok(())
    }

    fn last_calls(&self, of: &Restored<'_>, script: &mut Script) -> Result<()> {
        let queue = of.core.thread_core.as_ref().and_then(|thread| thread.signals_p.as_ref());
        let Some(queue) = queue else { return Ok(()) };
        let (pid, tid) = (of.local(of.pid)?, of.local(of.tid)?);
        signals::requeue(queue, of.tid, pid, Some(tid), script)
    }
}
