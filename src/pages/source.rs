//! Reads pages from a chain, in chunks, on several threads.

use std::ops::Range;

use crate::{chain::MemoryBytes, parallel, units::PageIndex};

/// Pages read and written at a time: 256 KiB.
const CHUNK_PAGES: u64 = 64;

/// The number of chunks from which copying takes longer than starting a thread.
const WORTH_A_THREAD: usize = 16;

/// The pages of a memory that the chain stores, in chunks.
#[derive(Debug)]
pub struct Chunks(Vec<Chunk>);

/// Consecutive pages that are read and written at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The first page.
    pub first: PageIndex,
    /// The number of pages.
    pub pages: u64,
}

impl Chunks {
    /// Cuts the stored pages of `memory` within `ranges`, which must ascend, into chunks. Includes
    /// pages that the images call present but do not have: reading those fails.
    pub fn new(memory: &MemoryBytes, ranges: &[Range<PageIndex>]) -> Self {
        let index = memory.index();
        let mut chunks = Vec::new();
        for range in ranges {
            for Range { start: mut first, end } in index.stored_within(range.clone()) {
                while first < end {
                    let pages = CHUNK_PAGES.min(end.0 - first.0);
                    push(&mut chunks, Chunk { first, pages });
                    first.0 += pages;
                }
            }
        }
        Self(chunks)
    }

    /// Returns the chunks in ascending order.
    pub fn as_slice(&self) -> &[Chunk] {
        &self.0
    }

    /// Calls `work` with each chunk and a buffer, on all processors.
    ///
    /// # Errors
    /// The first error of `work`. Chunks that were not started by then are skipped.
    pub fn try_each<E: Send>(
        &self,
        work: impl Fn(Chunk, &mut Vec<u8>) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        parallel::try_each(&self.0, WORTH_A_THREAD, |buffer, chunk| work(*chunk, buffer))
    }
}

/// Appends a chunk, or extends the last one by it.
fn push(chunks: &mut Vec<Chunk>, chunk: Chunk) {
    match chunks.last_mut() {
        Some(last)
            if last.first.0 + last.pages == chunk.first.0
                && last.pages + chunk.pages <= CHUNK_PAGES =>
        {
            last.pages += chunk.pages;
        }
        _ => chunks.push(chunk),
    }
}
