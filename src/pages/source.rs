//! Pages on their way out of a chain, in chunks that several threads take.

use std::ops::Range;

use crate::{chain::MemoryBytes, parallel, units::PageIndex};

/// Pages that are read and written at a time: 256 KiB.
const CHUNK_PAGES: u64 = 64;

/// Chunks that take longer than a thread takes to start.
const WORTH_A_THREAD: usize = 16;

/// Stretches of memory that are stored in the chain, in chunks.
#[derive(Debug)]
pub struct Chunks(Vec<Chunk>);

/// Pages that are read and written in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The first.
    pub first: PageIndex,
    /// How many.
    pub pages: u64,
}

impl Chunks {
    /// Cuts what is stored of `memory` within `ranges`, which ascend, into chunks.
    /// Pages that are in no image, though the images say that they exist, are among
    /// them: reading them is an error.
    pub fn new(memory: &MemoryBytes, ranges: &[Range<PageIndex>]) -> Self {
        let index = memory.index();
        let mut chunks = Vec::new();
        for range in ranges {
            let mut position = index.position(range.start);
            while let Some(extent) = index.extent(position) {
                if extent.first >= range.end {
                    break;
                }
                let mut first = extent.first.max(range.start);
                let end = extent.end().min(range.end);
                while first < end {
                    let pages = CHUNK_PAGES.min(end.0 - first.0);
                    push(&mut chunks, Chunk { first, pages });
                    first.0 += pages;
                }
                position += 1;
            }
        }
        Self(chunks)
    }

    /// Returns the chunks, ascending.
    pub fn as_slice(&self) -> &[Chunk] {
        &self.0
    }

    /// Calls `work` with each chunk, on all processors. Each call may use a buffer.
    ///
    /// # Errors
    /// The first error of `work`; what was not begun by then is not done.
    pub fn try_each<E: Send>(
        &self,
        work: impl Fn(Chunk, &mut Vec<u8>) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        parallel::try_each(&self.0, WORTH_A_THREAD, |buffer, chunk| work(*chunk, buffer))
    }
}

/// Appends a chunk, or lengthens the last one by it.
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
