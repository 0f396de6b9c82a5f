//! Memory of chains that are broken: what can be read is read.
//!
//! A restore needs all pages, so [`Chain::index`] fails if one cannot be found. A person who
//! looks into a snapshot wants to see what is left.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    Chain, ChainError, Index, Result, SnapshotId,
    cache::IndexCache,
    index::{ancestors, read_layers},
};
use crate::image::MemoryId;

/// Indexes of memories that lack pages, and the first that is missing.
#[derive(Debug, Default)]
pub(super) struct Readable {
    indexes: IndexCache,
    gap: Mutex<Option<Arc<ChainError>>>,
}

impl Chain {
    /// Returns the index of a memory like [`Self::index`], also if ancestors of the snapshot are
    /// missing, were replaced or cannot be read: their pages are [`super::Place::Unanswered`].
    ///
    /// # Errors
    /// A pagemap of the snapshot itself that is missing or cannot be read.
    pub fn readable_index(&self, id: SnapshotId, memory: MemoryId) -> Result<Arc<Index>> {
        if let Ok(whole) = self.index(id, memory) {
            return Ok(whole);
        }
        let index = self.readable.indexes.get((id, memory), || build(self, id, memory))?;
        if let Some(error) = index.first_unanswered(self) {
            self.gap().get_or_insert_with(|| Arc::new(error));
        }
        Ok(index)
    }

    /// Returns why the first memory lacks pages for which [`Self::readable_index`] was called.
    pub fn first_gap(&self) -> Option<Arc<ChainError>> {
        self.gap().clone()
    }

    fn gap(&self) -> MutexGuard<'_, Option<Arc<ChainError>>> {
        self.readable.gap.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn build(chain: &Chain, id: SnapshotId, memory: MemoryId) -> Result<Index> {
    chain.require_version(id)?;
    let (mut intact, mut end) = intact_ancestors(chain, id);
    loop {
        let read = read_layers(chain, id, memory, || (intact.clone(), Ok(())))?;
        match read.end {
            Ok(()) => {
                // If an earlier ancestor does not have the memory, its child gets no answer.
                let end = end.filter(|_| read.layers.len() == intact.len() + 1);
                return Ok(Index::merged(chain, memory, read.layers, end.map(Arc::new)));
            }
            Err(error) => {
                // The layer after those that were read was read in part.
                intact.truncate(read.layers.len() - 1);
                end = Some(error);
            }
        }
    }
}

/// Returns the ancestors down to the first that is not the expected one, and what is wrong with it.
fn intact_ancestors(chain: &Chain, id: SnapshotId) -> (Vec<SnapshotId>, Option<ChainError>) {
    let (mut ancestors, mut end) = ancestors(chain, id);
    let mut child = id;
    for position in 0..ancestors.len() {
        let parent = ancestors[position];
        let bond = chain.require_bond(child).map_err(Into::into);
        if let Err(error) = bond.and_then(|()| chain.require_version(parent)) {
            ancestors.truncate(position);
            end = Err(error);
            break;
        }
        child = parent;
    }
    (ancestors, end.err())
}
