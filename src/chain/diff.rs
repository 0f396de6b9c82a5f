//! Compares the pages of two snapshots.

use std::{collections::BTreeSet, io::IoSliceMut, sync::Arc};

use super::{Chain, ChainError, FileId, Index, Place, Result, SnapshotId, freed};
use crate::{
    image::MemoryId,
    units::{PAGE_SIZE, PageIndex, page_bytes},
};

/// How many pages are compared at a time: both sides fit into the processor's cache.
const CHUNK_PAGES: u64 = 32;

/// Consecutive pages that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The first page.
    pub first: PageIndex,
    /// The number of pages.
    pub pages: u64,
}

/// How one memory differs between two snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryDiff {
    /// The memory.
    pub memory: MemoryId,
    /// Whether only the first snapshot has it.
    pub only_in_first: bool,
    /// Whether only the second has it.
    pub only_in_second: bool,
    /// The pages that differ, in order; a page that a snapshot does not have is zero.
    pub differences: Vec<Difference>,
    /// Pages that both snapshots find in the same place, so that they are equal.
    pub same_place: u64,
    /// Pages whose bytes had to be compared.
    pub compared: u64,
}

impl MemoryDiff {
    /// Returns how many pages differ.
    pub fn pages(&self) -> u64 {
        self.differences.iter().map(|difference| difference.pages).sum()
    }

    fn differ(&mut self, first: PageIndex, pages: u64) {
        match self.differences.last_mut() {
            Some(last) if last.first.0 + last.pages == first.0 => last.pages += pages,
            _ => self.differences.push(Difference { first, pages }),
        }
    }
}

/// A memory in each of two snapshots, if the snapshot has it.
type Pair = (Option<Arc<Index>>, Option<Arc<Index>>);

/// The chains of the two snapshots, which may be the same.
#[derive(Clone, Copy, Debug)]
struct Chains<'a>([&'a Chain; 2]);

impl Chains<'_> {
    /// Returns whether two places are known to hold the same bytes.
    fn equal(self, [a, b]: [Where; 2]) -> bool {
        // Each chain numbers its files by itself.
        let comparable =
            matches!(a, Where::Zero | Where::Absent) || std::ptr::eq::<Chain>(self.0[0], self.0[1]);
        comparable && a == b
    }
}

/// Compares all memory of two snapshots, of one chain or of two, one memory at a time.
///
/// Pages that resolve to the same place in one chain are not read. Memories are matched by
/// pid and shmid. Calls `progress` with the bytes that are compared and with all that will be.
///
/// # Errors
/// An index that cannot be built, or a page that cannot be read. A page that is in no image
/// is [`ChainError::Absent`], unless that holds in both snapshots; a freed page is
/// [`ChainError::Punched`], unless both find it in that place. Both are reported before any
/// page is read.
pub fn diff(
    first: (&Chain, SnapshotId),
    second: (&Chain, SnapshotId),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<MemoryDiff>> {
    let chains = Chains([first.0, second.0]);
    let (in_first, in_second) = (first.0.memories(first.1)?, second.0.memories(second.1)?);
    let all: BTreeSet<MemoryId> = in_first.iter().chain(&in_second).copied().collect();
    let side = |(chain, id): (&Chain, SnapshotId), there: &[MemoryId], memory| {
        there.contains(&memory).then(|| chain.index(id, memory)).transpose()
    };
    let indexes = |memory| -> Result<Pair> {
        Ok((side(first, &in_first, memory)?, side(second, &in_second, memory)?))
    };
    let mut total = 0;
    for memory in &all {
        let (first, second) = indexes(*memory)?;
        total += require_comparable(chains, *memory, first.as_deref(), second.as_deref())?;
    }
    let mut done = 0;
    let mut compared = |pages| {
        done += pages;
        progress(page_bytes(done), page_bytes(total));
    };
    all.into_iter()
        .map(|memory| {
            let (first, second) = indexes(memory)?;
            diff_memory(chains, memory, first.as_deref(), second.as_deref(), &mut compared)
        })
        .collect()
}

/// Walks through two memories in parallel, where they have pages. Calls `visit` with runs
/// of pages and their places in each memory.
fn walk(
    first: Option<&Index>,
    second: Option<&Index>,
    mut visit: impl FnMut(PageIndex, u64, Where, Where) -> Result<()>,
) -> Result<()> {
    let (mut left, mut right) = (Walk::new(first), Walk::new(second));
    let mut page = PageIndex(0);
    while page < PageIndex::END {
        let (a, a_pages) = left.at(page);
        let (b, b_pages) = right.at(page);
        let pages = a_pages.min(b_pages);
        visit(page, pages, a, b)?;
        page.0 += pages;
    }
    Ok(())
}

/// Checks that all pages that must be compared are readable, and counts them.
fn require_comparable(
    chains: Chains<'_>,
    memory: MemoryId,
    first: Option<&Index>,
    second: Option<&Index>,
) -> Result<u64> {
    let mut total = 0;
    let gone = |chain: &Chain, side: Option<&Index>, page: PageIndex, pages: u64| {
        let (index, extent) = side.and_then(|index| Some((index, index.find(page)?)))?;
        let Place::Punched { layer, .. } = extent.place else { return None };
        let layer = &index.layers()[layer as usize];
        Some(freed::punched(chain, memory, layer, page, pages))
    };
    walk(first, second, |page, pages, a, b| match (a, b) {
        (a, b) if chains.equal([a, b]) => Ok(()),
        (Where::Absent, _) | (_, Where::Absent) => Err(ChainError::Absent { memory, first: page }),
        (Where::Punched(..), _) | (_, Where::Punched(..)) => {
            let error = gone(chains.0[0], first, page, pages)
                .or_else(|| gone(chains.0[1], second, page, pages));
            Err(error.expect("one of them was freed"))
        }
        _ => {
            total += pages;
            Ok(())
        }
    })?;
    Ok(total)
}

fn diff_memory(
    chains: Chains<'_>,
    memory: MemoryId,
    first: Option<&Index>,
    second: Option<&Index>,
    compared: &mut dyn FnMut(u64),
) -> Result<MemoryDiff> {
    let mut diff = MemoryDiff {
        memory,
        only_in_first: second.is_none(),
        only_in_second: first.is_none(),
        differences: Vec::new(),
        same_place: 0,
        compared: 0,
    };
    walk(first, second, |page, pages, a, b| {
        match (a, b) {
            (Where::Zero, Where::Zero) => {}
            (a, b) if chains.equal([a, b]) => diff.same_place += pages,
            (a, b) => compare(chains, &mut diff, page, pages, [a, b], compared)?,
        }
        Ok(())
    })?;
    Ok(diff)
}

/// Where a page of a chain is, independent of the snapshot that reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    Zero,
    Absent,
    /// In a file, starting with this page of the file.
    Stored(FileId, u64),
    /// Freed.
    Punched(FileId, u64),
}

impl Where {
    /// Returns where the page `pages` further on is.
    fn skip(self, pages: u64) -> Self {
        match self {
            Self::Stored(file, file_page) => Self::Stored(file, file_page + pages),
            Self::Punched(file, file_page) => Self::Punched(file, file_page + pages),
            other => other,
        }
    }
}

/// Walks through an index by ascending page.
struct Walk<'a> {
    index: Option<&'a Index>,
    position: usize,
}

impl<'a> Walk<'a> {
    fn new(index: Option<&'a Index>) -> Self {
        Self { index, position: 0 }
    }

    /// Returns where `page` is, and how many pages from there on continue it.
    fn at(&mut self, page: PageIndex) -> (Where, u64) {
        let rest = PageIndex::END.0 - page.0;
        let Some(index) = self.index else { return (Where::Zero, rest) };
        while index.extent(self.position).is_some_and(|extent| extent.end() <= page) {
            self.position += 1;
        }
        match index.extent(self.position) {
            None => (Where::Zero, rest),
            Some(extent) if extent.first > page => (Where::Zero, extent.first.0 - page.0),
            Some(extent) => {
                let skipped = page.0 - extent.first.0;
                let at = match extent.place {
                    Place::Absent | Place::Unanswered { .. } => Where::Absent,
                    Place::Stored { layer, file_page } => {
                        Where::Stored(index.layers()[layer as usize].file, file_page)
                    }
                    Place::Punched { layer, file_page } => {
                        Where::Punched(index.layers()[layer as usize].file, file_page)
                    }
                };
                (at.skip(skipped), extent.pages - skipped)
            }
        }
    }
}

fn compare(
    chains: Chains<'_>,
    diff: &mut MemoryDiff,
    first: PageIndex,
    pages: u64,
    [a, b]: [Where; 2],
    compared: &mut dyn FnMut(u64),
) -> Result<()> {
    let chunk = || vec![0; usize::try_from(page_bytes(CHUNK_PAGES)).expect("a chunk is small")];
    let (mut left, mut right) = (chunk(), chunk());
    let page_len = usize::try_from(PAGE_SIZE).expect("a page is small");
    let mut done = 0;
    while done < pages {
        let count = CHUNK_PAGES.min(pages - done);
        let len = usize::try_from(page_bytes(count)).expect("a chunk is small");
        read(chains.0[0], a.skip(done), &mut left[..len])?;
        read(chains.0[1], b.skip(done), &mut right[..len])?;
        let both = left[..len].chunks(page_len).zip(right[..len].chunks(page_len));
        for (page, (left, right)) in (first.0 + done..).zip(both) {
            if left != right {
                diff.differ(PageIndex(page), 1);
            }
        }
        diff.compared += count;
        compared(count);
        done += count;
    }
    Ok(())
}

fn read(chain: &Chain, at: Where, buffer: &mut [u8]) -> Result<()> {
    match at {
        // Both were checked before.
        Where::Zero | Where::Absent | Where::Punched(..) => {
            buffer.fill(0);
            Ok(())
        }
        Where::Stored(file, file_page) => chain
            .files()
            .get(file)?
            .read_exact_at(&mut [IoSliceMut::new(buffer)], PageIndex(file_page).address()),
    }
}
