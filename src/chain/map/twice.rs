//! Which pages are stored although an equal page is stored elsewhere.

use std::{collections::HashMap, ops::Range};

use crate::{
    chain::{
        Chain, Result, SnapshotId,
        duplicates::{HASH_SHIFT, StoredPages},
    },
    image::MemoryId,
    units::page_bytes,
};

/// The pages of each pages file of which an older one, or one before it in the same
/// snapshot, is equal: ranges in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Twice(HashMap<(SnapshotId, MemoryId), Vec<Range<u64>>>);

impl Twice {
    pub(super) fn of(&self, id: SnapshotId, memory: MemoryId) -> &[Range<u64>] {
        self.0.get(&(id, memory)).map_or(&[], Vec::as_slice)
    }
}

/// Finds pages that are stored more than once among those of the memories that `wanted`
/// names; the oldest copy counts as needed. `progress` is told how many bytes are done, and
/// of how many.
///
/// This reads all of these pages, and takes 16 bytes of memory for each.
///
/// # Errors
/// Images and files that cannot be read.
pub fn twice(
    chain: &Chain,
    wanted: &dyn Fn(SnapshotId, MemoryId) -> bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Twice> {
    /// Pages after which progress is told.
    const TOLD_PAGES: usize = 1 << 16;
    let stored = StoredPages::of_those(chain, wanted)?;
    let total = page_bytes(stored.pages);
    // The hash of a page, and instead of its lowest bits how many pages came before.
    let mut keys: Vec<u128> = Vec::with_capacity(usize::try_from(stored.pages).unwrap_or(0));
    stored.hash(chain, &mut |page| {
        let number = keys.len() as u128 & u128::from(u32::MAX);
        keys.push(page.hash >> HASH_SHIFT << HASH_SHIFT | number);
        if keys.len().is_multiple_of(TOLD_PAGES) {
            progress(page_bytes(keys.len() as u64), total);
        }
    })?;
    keys.sort_unstable();
    let mut copies: Vec<u32> = keys
        .windows(2)
        .filter(|pair| pair[0] >> HASH_SHIFT == pair[1] >> HASH_SHIFT)
        .map(|pair| u32::try_from(pair[1] & u128::from(u32::MAX)).expect("32 bits"))
        .collect();
    drop(keys);
    copies.sort_unstable();
    let mut found = Twice::default();
    let mut copies = copies.into_iter().map(u64::from).peekable();
    let mut before = 0;
    for (memory, pages) in stored.parts() {
        let end = before + (pages.end - pages.start);
        while let Some(copy) = copies.next_if(|copy| *copy < end) {
            let page = pages.start + (copy - before);
            let ranges = found.0.entry(memory).or_default();
            match ranges.last_mut() {
                Some(last) if last.end == page => last.end += 1,
                _ => ranges.push(page..page + 1),
            }
        }
        before = end;
    }
    progress(total, total);
    Ok(found)
}
