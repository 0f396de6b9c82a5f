//! Counts the pages of a chain that are stored more than once.
//!
//! Pages are compared by hash, so the result is for information only. Code that acts on
//! duplicates compares bytes.

use std::{
    collections::BTreeSet,
    io::IoSliceMut,
    ops::{AddAssign, Range},
};

use xxhash_rust::xxh3::xxh3_128;

use super::{Chain, FileId, Result, SnapshotId, holes};
use crate::{
    image::{MemoryId, Presence, punched},
    parallel,
    units::{PAGE_LEN, PAGE_SIZE, PageIndex, page_bytes},
};

/// How many pages a thread reads at a time: 256 KiB.
const CHUNK_PAGES: u64 = 64;

/// How many chunks have their hashes held before these are passed on: 256 MiB of pages.
const BATCH_CHUNKS: usize = 1024;

/// The bits of a page's key that hold its hash; the others hold the number of its memory.
pub(super) const HASH_SHIFT: u32 = 32;

/// Pages in a snapshot's own pages files, and how many of them are redundant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DuplicateCounts {
    /// Stored pages, without holes.
    pub stored: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// Pages that the same memory of the snapshot also stores elsewhere.
    pub within_memory: u64,
    /// Other pages that another memory of the snapshot also stores.
    pub between_memories: u64,
    /// Other pages that an older snapshot also stores.
    pub between_snapshots: u64,
}

impl AddAssign for DuplicateCounts {
    fn add_assign(&mut self, other: Self) {
        self.stored += other.stored;
        self.zero += other.zero;
        self.within_memory += other.within_memory;
        self.between_memories += other.between_memories;
        self.between_snapshots += other.between_snapshots;
    }
}

impl DuplicateCounts {
    /// Returns how many of the pages are redundant.
    pub fn duplicates(&self) -> u64 {
        self.zero + self.within_memory + self.between_memories + self.between_snapshots
    }
}

/// A page in a pages file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredPage {
    /// The number of its memory, in the order of the chain and then of the snapshot's.
    pub(crate) memory: u32,
    /// Its file.
    pub(crate) file: FileId,
    /// The position of the page in it.
    pub(crate) file_page: u64,
    /// The hash of its bytes.
    pub(crate) hash: u128,
}

/// Pages of one pages file.
struct Chunk {
    memory: u32,
    file: FileId,
    pages: Range<u64>,
}

/// The pages that a chain stores, for hashing.
pub(crate) struct StoredPages {
    chunks: Vec<Chunk>,
    /// The snapshot of each memory, by number.
    pub(crate) owners: Vec<SnapshotId>,
    /// The memory itself, by number.
    memories: Vec<MemoryId>,
    /// The number of pages.
    pub(crate) pages: u64,
}

impl StoredPages {
    /// Finds all pages in the files of a chain's snapshots, without holes and freed pages.
    ///
    /// # Errors
    /// Unreadable images.
    pub(crate) fn of(chain: &Chain) -> Result<Self> {
        Self::of_those(chain, &|_, _| true)
    }

    /// Like [`Self::of`], for the memories that `wanted` accepts.
    pub(super) fn of_those(
        chain: &Chain,
        wanted: &dyn Fn(SnapshotId, MemoryId) -> bool,
    ) -> Result<Self> {
        let mut found =
            Self { chunks: Vec::new(), owners: Vec::new(), memories: Vec::new(), pages: 0 };
        // In a damaged directory, two pagemaps may claim a file.
        let mut seen = BTreeSet::new();
        for id in chain.ids() {
            for memory in chain.memories(id)?.into_iter().filter(|memory| wanted(id, *memory)) {
                let number = u32::try_from(found.owners.len()).expect("fewer files than 2^32");
                found.owners.push(id);
                found.memories.push(memory);
                let images = chain.images(id);
                let mut reader = images.pagemap(memory)?;
                let pages_id = reader.pages_id();
                let mut pages = 0;
                for entry in reader.by_ref() {
                    let entry = entry?;
                    // Entries do not overlap, so the sum stays below 2^52.
                    pages += if entry.presence == Presence::Present { entry.pages } else { 0 };
                }
                if pages > 0 && seen.insert((id, pages_id)) {
                    let gone = punched::read(&**images, &memory.pagemap_name(), pages_id)?
                        .unwrap_or_default();
                    let there = gone.split(0..pages).filter(|(_, gone)| !gone);
                    let own = there.map(|(range, _)| range).collect();
                    found.enter(chain, number, chain.enter_pages(id, pages_id), own)?;
                }
            }
        }
        Ok(found)
    }

    fn enter(
        &mut self,
        chain: &Chain,
        memory: u32,
        id: FileId,
        own: Vec<Range<u64>>,
    ) -> Result<()> {
        let file = chain.files().get(id)?;
        let len = file.stat()?.len;
        let holes = holes::in_file(&file, 0, len)?;
        for pages in own {
            // If the file is shorter than the pagemap claims, one missing page is enough
            // for the error.
            let there = len.div_ceil(PAGE_SIZE).max(pages.start);
            let end = pages.end.min(there + 1);
            let mut next = pages.start;
            while next < end {
                let at = page_bytes(next);
                let hole = holes.partition_point(|hole| hole.end <= at);
                let hole = holes.get(hole);
                match hole {
                    Some(hole) if hole.start <= at => next = (hole.end / PAGE_SIZE).max(next + 1),
                    hole => {
                        let data_end = hole.map_or(end, |hole| hole.start.div_ceil(PAGE_SIZE));
                        let last = data_end.min(end).min(next + CHUNK_PAGES);
                        self.chunks.push(Chunk { memory, file: id, pages: next..last });
                        self.pages += last - next;
                        next = last;
                    }
                }
            }
        }
        Ok(())
    }

    /// Returns the memory of each range of pages and its place in the file, in the order of
    /// [`Self::hash`].
    pub(super) fn parts(&self) -> impl Iterator<Item = ((SnapshotId, MemoryId), Range<u64>)> + '_ {
        self.chunks.iter().map(|chunk| {
            let number = chunk.memory as usize;
            ((self.owners[number], self.memories[number]), chunk.pages.clone())
        })
    }

    /// Reads and hashes all pages on all processors, and passes each to `sink`, in order.
    ///
    /// # Errors
    /// Files that cannot be read, or end too early.
    pub(crate) fn hash(&self, chain: &Chain, sink: &mut dyn FnMut(StoredPage)) -> Result<()> {
        for batch in self.chunks.chunks(BATCH_CHUNKS) {
            let hashes = parallel::map_until(
                batch,
                1,
                |buffer: &mut Vec<u8>, _, chunk| hashes(chain, chunk, buffer),
                |hashes| hashes.is_err(),
            );
            for (chunk, hashes) in batch.iter().zip(hashes) {
                let Chunk { memory, file, .. } = *chunk;
                for (file_page, hash) in chunk.pages.clone().zip(hashes?) {
                    sink(StoredPage { memory, file, file_page, hash });
                }
            }
        }
        Ok(())
    }
}

fn hashes(chain: &Chain, chunk: &Chunk, buffer: &mut Vec<u8>) -> Result<Vec<u128>> {
    let len = page_bytes(chunk.pages.end - chunk.pages.start);
    buffer.resize(usize::try_from(len).expect("at most a chunk"), 0);
    let offset = PageIndex(chunk.pages.start).address();
    chain.files().get(chunk.file)?.read_exact_at(&mut [IoSliceMut::new(buffer)], offset)?;
    Ok(buffer.chunks_exact(PAGE_LEN).map(xxh3_128).collect())
}

/// Returns the hash of a page of zeros.
pub(crate) fn zero_hash() -> u128 {
    xxh3_128(&[0; PAGE_LEN])
}

/// Counts the pages that are stored more than once, for each snapshot of a chain. The
/// oldest copy counts as needed. `progress` gets the number of bytes done and in total.
///
/// This takes 16 bytes of memory for each stored page: 4 MiB for 1 GiB. 12 of these bytes
/// are the hash, so the chance that two different pages among a TiB are taken for equal is
/// below 1 in 10^12.
///
/// # Errors
/// Unreadable images and files.
pub fn duplicates(
    chain: &Chain,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<DuplicateCounts>> {
    let stored = StoredPages::of(chain)?;
    let total = page_bytes(stored.pages);
    let mut keys: Vec<u128> = Vec::with_capacity(usize::try_from(stored.pages).unwrap_or(0));
    stored.hash(chain, &mut |page| {
        keys.push(key(page.hash, page.memory));
        if keys.len().is_multiple_of(1 << 16) {
            progress(page_bytes(keys.len() as u64), total);
        }
    })?;
    keys.sort_unstable();
    let zero = key(zero_hash(), 0) >> HASH_SHIFT;
    let mut counts = vec![DuplicateCounts::default(); chain.snapshots().len()];
    let mut last: Option<u128> = None;
    for key in keys {
        let owner = stored.owners[memory_of(key)];
        let counts = &mut counts[owner.position()];
        counts.stored += 1;
        // The memories of one snapshot are consecutive.
        let equal = last.replace(key).filter(|last| last >> HASH_SHIFT == key >> HASH_SHIFT);
        if key >> HASH_SHIFT == zero {
            counts.zero += 1;
        } else if equal == Some(key) {
            counts.within_memory += 1;
        } else if let Some(equal) = equal {
            if stored.owners[memory_of(equal)] == owner {
                counts.between_memories += 1;
            } else {
                counts.between_snapshots += 1;
            }
        }
    }
    progress(total, total);
    Ok(counts)
}

/// Returns the sort key of a page: its hash, then the number of its memory.
fn key(hash: u128, memory: u32) -> u128 {
    hash >> HASH_SHIFT << HASH_SHIFT | u128::from(memory)
}

/// Returns the number of the memory in a key.
fn memory_of(key: u128) -> usize {
    usize::try_from(key & u128::from(u32::MAX)).expect("32 bits")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        chain::testing::{MEMORY, TestChain, entry},
        image::{Kind, Presence},
    };

    #[test]
    fn copies_are_counted_where_they_are() {
        let mut disk = TestChain::new();
        let present = |pages| [entry(0, pages, Presence::Present)];
        disk.push(&present(6));
        disk.memory(1, MemoryId::Private(1), 8, &present(3));
        disk.push(&present(4));
        let write = |layer: usize, pages_id: u64, pages: &[u8]| {
            let bytes: Vec<u8> = pages.iter().flat_map(|value| [*value; PAGE_LEN]).collect();
            fs::write(disk.dir(layer).join(Kind::Pages.file_name(pages_id)), bytes).unwrap();
        };
        // Private memory comes first. Page 1 is there twice in one memory and once in the
        // other; page 0 is zero.
        write(1, 8, &[1, 2, 0]);
        write(1, 7, &[1, 1, 3, 4, 0, 5]);
        write(2, 7, &[1, 3, 6, 6]);
        let counts = duplicates(&disk.open(), &mut |_, _| {}).unwrap();
        let expected = |stored, zero, within_memory, between_memories, between_snapshots| {
            DuplicateCounts { stored, zero, within_memory, between_memories, between_snapshots }
        };
        assert_eq!(counts, [expected(9, 2, 1, 1, 0), expected(4, 0, 1, 0, 2)]);
        assert_eq!(MEMORY, MemoryId::Shared(1024));
        // Holes are not counted.
        let sparse = fs::File::create(disk.dir(2).join("pages-7.img")).unwrap();
        sparse.set_len(4 * PAGE_SIZE).unwrap();
        let counts = duplicates(&disk.open(), &mut |_, _| {}).unwrap();
        assert_eq!(counts[1], DuplicateCounts::default());
        // Missing pages are an error.
        sparse.set_len(PAGE_SIZE).unwrap();
        duplicates(&disk.open(), &mut |_, _| {}).unwrap_err();
    }
}
