//! A cache of indexes.

use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;

use super::{Index, Result, SnapshotId};
use crate::image::MemoryId;

/// How many extents are kept in total, at 24 bytes each: 48 MiB.
const EXTENTS_KEPT: usize = 2 << 20;

type Key = (SnapshotId, MemoryId);

/// An index, or its place while it is built.
type Slot = Arc<Mutex<Option<Arc<Index>>>>;

/// Indexes by snapshot and memory. If there are too many extents, the least recently used
/// indexes are dropped; a caller that holds one keeps it.
#[derive(Debug)]
pub(super) struct IndexCache {
    slots: Mutex<LruCache<Key, Slot>>,
}

impl Default for IndexCache {
    fn default() -> Self {
        Self { slots: Mutex::new(LruCache::unbounded()) }
    }
}

impl IndexCache {
    /// Returns the index for `key`. It is built once, even if several threads ask for it.
    /// Failures are not cached.
    pub(super) fn get(
        &self,
        key: Key,
        build: impl FnOnce() -> Result<Index>,
    ) -> Result<Arc<Index>> {
        let slot = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(slots.get_or_insert(key, Slot::default))
        };
        let mut place = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = &*place {
            return Ok(Arc::clone(index));
        }
        let index = Arc::new(build()?);
        *place = Some(Arc::clone(&index));
        drop(place);
        self.trim();
        Ok(index)
    }

    /// Drops the oldest indexes until few enough extents are left; always keeps the newest.
    fn trim(&self) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // A locked slot is being built, and does not count yet.
        let weight = |slot: &Slot| {
            slot.try_lock()
                .ok()
                .and_then(|place| Some(place.as_ref()?.extents().len()))
                .unwrap_or(0)
        };
        let mut total: usize = slots.iter().map(|(_, slot)| weight(slot)).sum();
        while total > EXTENTS_KEPT && slots.len() > 1 {
            if let Some((_, slot)) = slots.pop_lru() {
                total = total.saturating_sub(weight(&slot));
            }
        }
    }
}
