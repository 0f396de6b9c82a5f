//! The threads of a dumped process.

use super::{Process, Result};
use crate::image::{Kind, proto};

/// A thread, as it was stopped.
#[derive(Clone, Debug)]
pub(super) struct Thread {
    /// Its tid, as the thread itself knew it.
    pub(super) tid: u32,
    /// What its own image holds.
    pub(super) core: proto::CoreEntry,
    /// Its credentials, if they were dumped.
    pub(super) creds: Option<proto::CredsEntry>,
}

impl Process {
    /// Reads the process's threads, the leader first.
    ///
    /// # Errors
    /// [`ViewError::Image`](super::ViewError::Image).
    pub(super) fn threads(&self) -> Result<Vec<Thread>> {
        let leader = self.entry().pid;
        let others = self.entry().threads.iter().copied().filter(|tid| *tid != leader);
        std::iter::once(leader).chain(others).map(|tid| self.thread(tid)).collect()
    }

    fn thread(&self, tid: u32) -> Result<Thread> {
        let images = self.tables().images();
        let mut core: proto::CoreEntry = images.message(Kind::Core, tid.into())?;
        let mut creds = core.thread_core.as_mut().and_then(|thread| thread.creds.take());
        if creds.is_none() {
            // Older images have one file of them for the whole process.
            creds = images.message_if_any(Kind::Creds, self.entry().pid.into())?;
        }
        Ok(Thread { tid, core, creds })
    }
}
