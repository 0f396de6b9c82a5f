//! The threads of a dumped process.

use super::{Process, Result, mapped::optional};
use crate::image::{Kind, proto, read_one};

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
        let dir = self.tables().dir();
        let path = dir.join(Kind::Core.file_name(tid.into()));
        let mut core: proto::CoreEntry = read_one(&path, Kind::Core)?;
        let mut creds = core.thread_core.as_mut().and_then(|thread| thread.creds.take());
        if creds.is_none() {
            // Older images have one file of them for the whole process.
            let path = dir.join(Kind::Creds.file_name(self.entry().pid.into()));
            creds = optional(read_one(&path, Kind::Creds))?;
        }
        Ok(Thread { tid, core, creds })
    }
}
