//! The threads of a dumped process.

use super::{Process, Result, Tables};
use crate::image::{Kind, proto};

/// A thread at the time of the dump.
#[derive(Clone, Debug)]
pub(super) struct Thread {
    /// Its tid in its own pid namespace.
    pub(super) tid: u32,
    /// Its core.
    pub(super) core: proto::CoreEntry,
    /// Its credentials, if the images have them.
    pub(super) creds: Option<proto::CredsEntry>,
}

impl Thread {
    /// Returns the thread `tid` of the process `pid`, with its core.
    pub(super) fn new(
        tables: &Tables,
        pid: u32,
        tid: u32,
        mut core: proto::CoreEntry,
    ) -> Result<Self> {
        let mut creds = core.thread_core.as_mut().and_then(|thread| thread.creds.take());
        if creds.is_none() {
            // Older images have one credentials image for each process.
            creds = tables.images().message_if_any(Kind::Creds, pid.into())?;
        }
        Ok(Self { tid, core, creds })
    }

    /// Returns the signals that it blocks.
    pub(super) fn blocked(&self) -> u64 {
        let own = self.core.thread_core.as_ref().and_then(|thread| thread.blk_sigset);
        own.or(self.core.tc.as_ref().map(|tc| tc.blk_sigset)).unwrap_or(0)
    }

    /// Returns the signals pending for the thread, and for the process.
    pub(super) fn pending(&self) -> (u64, u64) {
        let own = self.core.thread_core.as_ref().and_then(|thread| thread.signals_p.as_ref());
        let shared = self.core.tc.as_ref().and_then(|tc| tc.signals_s.as_ref());
        (own.map_or(0, queued), shared.map_or(0, queued))
    }
}

/// Returns the set of signals in a queue; `siginfo_t` begins with the number.
fn queued(queue: &proto::SignalQueueEntry) -> u64 {
    let numbers = queue.signals.iter().filter_map(|signal| {
        let number = u32::from_le_bytes(*signal.siginfo.first_chunk()?);
        1_u64.checked_shl(number.checked_sub(1)?)
    });
    numbers.fold(0, |set, signal| set | signal)
}

impl Process {
    /// Reads the threads of the process, the leader first.
    pub(super) fn threads(&self) -> Result<Vec<Thread>> {
        let leader = self.entry().pid;
        let others = self.entry().threads.iter().copied().filter(|tid| *tid != leader);
        std::iter::once(leader).chain(others).map(|tid| self.thread(tid)).collect()
    }

    fn thread(&self, tid: u32) -> Result<Thread> {
        let core = self.tables().images().message(Kind::Core, tid.into())?;
        Thread::new(self.tables(), self.entry().pid, tid, core)
    }
}
