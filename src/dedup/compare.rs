//! Finds equal pages in two files. This is the part of a deduplication that takes the time.
//!
//! Pages are read on all processors, in chunks that stay in a processor's cache. So linking
//! two dumps takes as long as reading both once.

use std::{ops::Range, sync::Arc};

use crate::{
    chain::{BackingFile, ChainError, FileId, Files, Run, Source, read_runs},
    parallel,
    units::{PAGE_LEN, PageIndex, page_bytes},
};

/// Pages in a chunk: 256 KiB of each side; one for each bit of [`Equal`].
const CHUNK_PAGES: u64 = 64;

/// How many chunks a thread takes at a time: 4 MiB of each side, contiguous.
const WORTH_A_THREAD: usize = 16;

/// How many chunks are cut at a time: 1 GiB of each side.
const BATCH_CHUNKS: usize = 4096;

/// The equal pages of a chunk, one bit for each.
type Equal = u64;

/// Consecutive pages, each to be compared with another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    /// The number of the first page in its memory.
    pub(super) first: PageIndex,
    /// How many pages there are.
    pub(super) pages: u64,
    /// The file of the pages, and the first page in it.
    pub(super) left: (FileId, u64),
    /// The file and first page of the other side.
    pub(super) right: (FileId, u64),
}

impl Pair {
    /// Returns `pages` pages of the pair, after the first `skipped`.
    fn part(&self, skipped: u64, pages: u64) -> Self {
        Self {
            first: PageIndex(self.first.0 + skipped),
            pages,
            left: (self.left.0, self.left.1 + skipped),
            right: (self.right.0, self.right.1 + skipped),
        }
    }
}

/// A run of pages: the first one and their number.
pub(super) type Stretch = (PageIndex, u64);

/// Compares pages, which ascend, and returns the equal runs. `progress` gets the number of
/// pages done, bit by bit.
///
/// # Errors
/// Files that cannot be read, or end too early.
pub(super) fn equal(
    pairs: &[Pair],
    left: &Files,
    right: &Files,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Vec<Stretch>, ChainError> {
    let mut cutter = Cutter { pairs, done: 0 };
    let mut stretches: Vec<Stretch> = Vec::new();
    loop {
        let batch = cutter.batch();
        if batch.chunks.is_empty() {
            return Ok(stretches);
        }
        let results = parallel::map_until(
            &batch.chunks,
            WORTH_A_THREAD,
            |desk: &mut Desk, _, chunk| {
                let parts = &batch.parts[chunk.clone()];
                let result = desk.compare(parts, left, right);
                progress(parts.iter().map(|part| part.pages).sum());
                result
            },
            |result| result.is_err(),
        );
        for (chunk, result) in batch.chunks.iter().zip(results) {
            enter(&batch.parts[chunk.clone()], result?, &mut stretches);
        }
    }
}

/// Appends the equal pages of a chunk.
fn enter(parts: &[Pair], mut equal: Equal, stretches: &mut Vec<Stretch>) {
    for part in parts {
        for page in part.first.0..part.first.0 + part.pages {
            if equal & 1 == 1 {
                match stretches.last_mut() {
                    Some((first, pages)) if first.0 + *pages == page => *pages += 1,
                    _ => stretches.push((PageIndex(page), 1)),
                }
            }
            equal >>= 1;
        }
    }
}

/// Cuts runs of pages into chunks, as many at a time as may be in memory: a pagemap may
/// claim more pages than there can be.
struct Cutter<'a> {
    pairs: &'a [Pair],
    /// How many pages of the first run have been cut off.
    done: u64,
}

/// Parts of runs, and the parts in each chunk.
#[derive(Default)]
struct Batch {
    parts: Vec<Pair>,
    chunks: Vec<Range<usize>>,
}

impl Cutter<'_> {
    /// Returns the next chunks; none at the end.
    fn batch(&mut self) -> Batch {
        let mut batch = Batch::default();
        let (mut begin, mut room) = (0, CHUNK_PAGES);
        while batch.chunks.len() < BATCH_CHUNKS
            && let Some(pair) = self.pairs.first()
        {
            let pages = room.min(pair.pages - self.done);
            batch.parts.push(pair.part(self.done, pages));
            self.done += pages;
            room -= pages;
            if self.done == pair.pages {
                (self.pairs, self.done) = (&self.pairs[1..], 0);
            }
            if room == 0 || self.pairs.is_empty() {
                batch.chunks.push(begin..batch.parts.len());
                (begin, room) = (batch.parts.len(), CHUNK_PAGES);
            }
        }
        batch
    }
}

/// What a thread keeps between chunks.
#[derive(Default)]
struct Desk {
    left: Side,
    right: Side,
}

#[derive(Default)]
struct Side {
    runs: Vec<Run>,
    bytes: Vec<u8>,
    /// The last file, which is usually the next one, too.
    last: Option<(FileId, Arc<BackingFile>)>,
}

impl Desk {
    fn compare(
        &mut self,
        parts: &[Pair],
        left: &Files,
        right: &Files,
    ) -> Result<Equal, ChainError> {
        self.left.read(left, parts.iter().map(|part| (part.left, part.pages)))?;
        self.right.read(right, parts.iter().map(|part| (part.right, part.pages)))?;
        let pages =
            self.left.bytes.chunks_exact(PAGE_LEN).zip(self.right.bytes.chunks_exact(PAGE_LEN));
        let bit = |(number, (left, right))| Equal::from(left == right) << number;
        Ok((0..CHUNK_PAGES).zip(pages).map(bit).fold(0, |all, one| all | one))
    }
}

impl Side {
    fn read(
        &mut self,
        files: &Files,
        parts: impl Iterator<Item = ((FileId, u64), u64)>,
    ) -> Result<(), ChainError> {
        self.runs.clear();
        for ((id, page), pages) in parts {
            let file = match &self.last {
                Some((last, file)) if *last == id => Arc::clone(file),
                _ => {
                    let file = files.get(id)?;
                    self.last = Some((id, Arc::clone(&file)));
                    file
                }
            };
            let source = Source::File(file, PageIndex(page).address());
            self.runs.push(Run { len: page_bytes(pages), source });
        }
        let len: u64 = self.runs.iter().map(|run| run.len).sum();
        self.bytes.resize(usize::try_from(len).expect("at most a chunk"), 0);
        read_runs(&self.runs, &mut self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, num::NonZeroUsize, sync::atomic::Ordering};

    use super::*;

    #[test]
    fn equal_pages_are_found_wherever_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let page = |value: u8| vec![value; PAGE_LEN];
        // 300 pages; the right side begins one page later, and every seventh page differs.
        let left: Vec<u8> = (0..300_u16).flat_map(|n| page(n.to_le_bytes()[0])).collect();
        let mut right = page(99);
        for number in 0..300_u16 {
            let changed = number % 7 == 0;
            right.extend(page(number.to_le_bytes()[0] ^ u8::from(changed)));
        }
        let paths = [dir.path().join("left"), dir.path().join("right")];
        fs::write(&paths[0], left).unwrap();
        fs::write(&paths[1], right).unwrap();
        let files = Files::new(NonZeroUsize::MIN);
        let [left, right] = paths.map(|path| files.enter_path(&path));
        // Runs of one page, of less than a chunk, and of several chunks, with gaps.
        let pair = |first, pages| Pair {
            first: PageIndex(1000 + 2 * first),
            pages,
            left: (left, first),
            right: (right, first + 1),
        };
        let pairs = [pair(0, 1), pair(1, 1), pair(2, 30), pair(40, 200), pair(299, 1)];
        let done = std::sync::atomic::AtomicU64::new(0);
        let found = equal(&pairs, &files, &files, &|pages| {
            done.fetch_add(pages, Ordering::Relaxed);
        });
        let found: Vec<u64> =
            found.unwrap().iter().flat_map(|(first, pages)| first.0..first.0 + pages).collect();
        let expected = pairs.iter().flat_map(|pair| {
            (0..pair.pages)
                .filter(|number| !(pair.left.1 + number).is_multiple_of(7))
                .map(|number| pair.first.0 + number)
        });
        assert_eq!(found, expected.collect::<Vec<_>>());
        assert_eq!(done.into_inner(), pairs.iter().map(|pair| pair.pages).sum::<u64>());
        // A file that ends too early is an error.
        let cut = Pair { right: (right, 300), ..pair(0, 2) };
        assert!(matches!(
            equal(&[cut], &files, &files, &|_| {}),
            Err(ChainError::Truncated { .. })
        ));
    }
}
