//! The memories of a snapshot.

use std::collections::BTreeSet;

use super::{Chain, Result, SnapshotId};
use crate::image::{Kind, MemoryId, proto};

impl Chain {
    /// Returns the memories of which a snapshot has a pagemap, sorted, except those that an earlier
    /// dump left in the directory.
    ///
    /// # Errors
    /// [`super::ChainError::Directory`].
    pub fn memories(&self, id: SnapshotId) -> Result<Vec<MemoryId>> {
        Ok(self.split_memories(id)?.0)
    }

    /// Returns the memories of processes that are not in the tree of the snapshot.
    ///
    /// A container engine that dumps a container again and again may use one directory for all dumps,
    /// and images of processes that have ended since then stay there. Their pagemaps claim pages files
    /// that were written anew for other processes.
    ///
    /// # Errors
    /// As [`Self::memories`].
    pub(super) fn leftovers(&self, id: SnapshotId) -> Result<Vec<MemoryId>> {
        Ok(self.split_memories(id)?.1)
    }

    fn split_memories(&self, id: SnapshotId) -> Result<(Vec<MemoryId>, Vec<MemoryId>)> {
        let names = self.list(id)?;
        let mut memories: Vec<MemoryId> =
            names.iter().filter_map(|name| MemoryId::of_pagemap(name)).collect();
        memories.sort_unstable();
        // A pre-dump has no tree. One that cannot be read is reported elsewhere.
        let tree = self.images(id).messages_if_any::<proto::PstreeEntry>(Kind::Pstree, 0);
        let Ok(Some(tree)) = tree else { return Ok((memories, Vec::new())) };
        let pids: BTreeSet<u64> = tree.iter().map(|entry| entry.pid.into()).collect();
        let is_used = |memory: &MemoryId| match memory {
            MemoryId::Private(pid) => pids.contains(pid),
            MemoryId::Shared(_) => true,
        };
        Ok(memories.into_iter().partition(is_used))
    }
}
