//! Where the memory of a chain is stored, in cells that can be drawn: a cell is a stretch
//! of addresses in a few snapshots.
//!
//! [`Survey::of`] counts, and learns which addresses there are; [`Survey::grids`] fills the
//! cells. Both read pagemaps, lists of mappings and where files have holes,
//! but no page. Only [`twice`] reads pages.

mod axis;
mod mapped;
#[cfg(test)]
mod tests;
mod twice;

use std::{collections::BTreeMap, ops::Range, sync::Mutex};

pub use axis::{Axis, Segment};
use mapped::Mapped;
pub use twice::{Twice, twice};

use super::{Chain, Result, SnapshotId, holes};
use crate::{
    causes::with_sources,
    image::{MemoryId, Presence, punched},
    parallel::{self, lock},
    units::{PAGE_SIZE, PageRanges},
};

/// Where a page of a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// In the snapshot's own pages file.
    Here,
    /// There too, although an equal page is stored elsewhere in the chain.
    Twice,
    /// In an ancestor.
    Parent,
    /// In the snapshot's own pages file until it was freed, or made a hole.
    Freed,
    /// In no image, although the snapshot needs it.
    Missing,
    /// In the file that is mapped, unchanged.
    File,
    /// Nowhere, since it is zero.
    Zero,
}

impl State {
    /// All states, those first that a reader looks for first.
    pub const ALL: [Self; 7] =
        [Self::Here, Self::Twice, Self::Parent, Self::Freed, Self::Missing, Self::File, Self::Zero];
}

/// Pages by where they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts([u64; State::ALL.len()]);

impl Counts {
    /// Returns how many pages are in one state.
    pub fn get(&self, state: State) -> u64 {
        self.0[state as usize]
    }

    /// Returns how many pages there are.
    pub fn pages(&self) -> u64 {
        self.0.iter().fold(0, |sum, pages| sum.saturating_add(*pages))
    }

    /// Returns how many pages the snapshot's dump stored, whatever became of them.
    pub fn stored(&self) -> u64 {
        [State::Here, State::Twice, State::Freed]
            .into_iter()
            .fold(0, |sum, state| sum.saturating_add(self.get(state)))
    }

    /// Returns how many pages images were to hold: all that are not zero or in a file.
    pub fn kept(&self) -> u64 {
        let elsewhere = self.get(State::Parent).saturating_add(self.get(State::Missing));
        self.stored().saturating_add(elsewhere)
    }

    /// Adds pages in one state.
    pub fn add(&mut self, state: State, pages: u64) {
        let count = &mut self.0[state as usize];
        *count = count.saturating_add(pages);
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        State::ALL.into_iter().for_each(|state| self.add(state, other.get(state)));
    }
}

/// One memory in all snapshots.
#[derive(Clone, Debug)]
pub struct Surveyed {
    /// The memory.
    pub memory: MemoryId,
    /// Its pages in each of the snapshots; `None` where it does not exist.
    pub counts: Vec<Option<Counts>>,
    /// Its addresses.
    pub axis: Axis,
}

impl Surveyed {
    /// Returns how many pages all dumps together stored of it.
    pub fn stored(&self) -> u64 {
        self.counts.iter().flatten().fold(0, |sum, counts| sum.saturating_add(counts.stored()))
    }
}

/// What there is of each memory in each snapshot.
#[derive(Debug)]
pub struct Survey<'a> {
    chain: &'a Chain,
    twice: &'a Twice,
    /// The snapshots, each after its parent.
    pub snapshots: Vec<SnapshotId>,
    /// The memories; those of which most is stored first.
    pub memories: Vec<Surveyed>,
    /// What could not be read, and counts as if it did not exist.
    pub problems: Vec<String>,
}

/// A row of cells: the same addresses in a few snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The positions of its snapshots in [`Survey::snapshots`].
    pub snapshots: Range<usize>,
    /// A cell for each column.
    pub cells: Vec<Counts>,
}

/// The addresses that a memory has, in whichever snapshot.
#[derive(Debug, Default)]
struct Extents {
    kept: PageRanges,
    mapped: PageRanges,
}

/// A memory and what a snapshot has of it.
type Counted = (MemoryId, Result<Counts>);

impl<'a> Survey<'a> {
    /// Counts the pages of the memories that `wanted` names in `snapshots`.
    ///
    /// What cannot be read is noted in [`Self::problems`].
    pub fn of(
        chain: &'a Chain,
        snapshots: Vec<SnapshotId>,
        twice: &'a Twice,
        wanted: impl Fn(MemoryId) -> bool + Sync,
    ) -> Self {
        let extents: Mutex<BTreeMap<MemoryId, Extents>> = Mutex::default();
        let counted = parallel::map(&snapshots, 1, |_, id| -> Result<Vec<Counted>> {
            let mut memories = chain.memories(*id)?;
            memories.retain(|memory| wanted(*memory));
            let all = Mapped::of(&**chain.images(*id));
            let mut found = Vec::new();
            for memory in memories {
                let mapped = all.get(&memory);
                let mut counts = Counts::default();
                let mut own = Extents::default();
                let result = stretches(chain, *id, memory, mapped, twice, &mut |pages, state| {
                    counts.add(state, pages.end - pages.start);
                    let set = match state {
                        State::File | State::Zero => &mut own.mapped,
                        _ => &mut own.kept,
                    };
                    set.insert(pages);
                });
                let mut extents = lock(&extents);
                let known = extents.entry(memory).or_default();
                known.kept.extend(&own.kept);
                known.mapped.extend(&own.mapped);
                found.push((memory, result.map(|()| counts)));
            }
            Ok(found)
        });
        let mut problems = Vec::new();
        let mut memories: BTreeMap<MemoryId, Surveyed> = BTreeMap::new();
        let extents = extents.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (memory, extents) in extents {
            let axis = Axis::new(&extents.kept, &extents.mapped);
            memories.insert(memory, Surveyed { memory, counts: vec![None; snapshots.len()], axis });
        }
        for (position, (id, found)) in snapshots.iter().zip(counted).enumerate() {
            let snapshot = chain.snapshot(*id);
            if let Err(link) = &snapshot.parent {
                problems.push(link.to_string());
            }
            let found = found.unwrap_or_else(|error| {
                problems.push(with_sources(&error));
                Vec::new()
            });
            for (memory, counts) in found {
                match (counts, memories.get_mut(&memory)) {
                    (Ok(counts), Some(surveyed)) => surveyed.counts[position] = Some(counts),
                    (Err(error), _) => problems.push(with_sources(&error)),
                    (Ok(_), None) => {}
                }
            }
        }
        let mut memories: Vec<Surveyed> = memories.into_values().collect();
        memories.sort_by_key(|surveyed| std::cmp::Reverse(surveyed.stored()));
        Self { chain, twice, snapshots, memories, problems }
    }

    /// Fills the cells of some memories: for each at most so many columns of equal width, and
    /// rows of an equal number of snapshots.
    pub fn grids(&self, memories: &[Surveyed], columns: usize, rows: usize) -> Vec<Vec<Row>> {
        let each = self.snapshots.len().div_ceil(rows.max(1)).max(1);
        let groups: Vec<&[SnapshotId]> = self.snapshots.chunks(each).collect();
        let filled = parallel::map(&groups, 1, |position, group| {
            let snapshots = position * each..position * each + group.len();
            let mut rows: Vec<Row> = memories
                .iter()
                .map(|surveyed| {
                    let cells = vec![Counts::default(); surveyed.axis.columns(columns)];
                    Row { snapshots: snapshots.clone(), cells }
                })
                .collect();
            for (at, id) in snapshots.zip(*group) {
                let mapped = Mapped::of(&**self.chain.images(*id));
                for (surveyed, row) in memories.iter().zip(&mut rows) {
                    self.fill(surveyed, at, *id, mapped.get(&surveyed.memory), row);
                }
            }
            rows
        });
        let mut grids = vec![Vec::with_capacity(filled.len()); memories.len()];
        for rows in filled {
            grids.iter_mut().zip(rows).for_each(|(grid, row)| grid.push(row));
        }
        grids
    }

    /// Adds a memory of the snapshot at position `at` to the cells of a row.
    fn fill(
        &self,
        surveyed: &Surveyed,
        at: usize,
        id: SnapshotId,
        mapped: Option<&Mapped>,
        row: &mut Row,
    ) {
        // What is not there, or cannot be read, has no cells.
        if surveyed.counts[at].is_none() {
            return;
        }
        let columns = row.cells.len();
        let mut put = |pages: Range<u64>, state| {
            surveyed.axis.spread(pages, columns, |column, pages| {
                row.cells[column].add(state, pages);
            });
        };
        let result = stretches(self.chain, id, surveyed.memory, mapped, self.twice, &mut put);
        if let Err(error) = result {
            log::warn!("{}", with_sources(&error));
        }
    }

    /// Returns the sum over all memories for each snapshot.
    pub fn totals(&self) -> Vec<Counts> {
        let mut totals = vec![Counts::default(); self.snapshots.len()];
        for surveyed in &self.memories {
            for (total, counts) in totals.iter_mut().zip(&surveyed.counts) {
                *total += counts.unwrap_or_default();
            }
        }
        totals
    }
}

/// Tells `put` where all pages of a memory are, stretch after stretch: first those that its
/// pagemap has, then the others that are mapped.
fn stretches(
    chain: &Chain,
    id: SnapshotId,
    memory: MemoryId,
    mapped: Option<&Mapped>,
    twice: &Twice,
    put: &mut dyn FnMut(Range<u64>, State),
) -> Result<()> {
    let images = &**chain.images(id);
    let mut reader = images.pagemap(memory)?;
    let pages_id = reader.pages_id();
    let mut file: Option<PagesFile> = None;
    let mut file_page = 0;
    let mut told: Vec<Range<u64>> = Vec::new();
    for entry in reader.by_ref() {
        let entry = entry?;
        let pages = entry.first.0..entry.end().0;
        match told.last_mut() {
            Some(last) if last.end == pages.start => last.end = pages.end,
            _ => told.push(pages.clone()),
        }
        match entry.presence {
            Presence::Parent => put(pages, State::Parent),
            Presence::Absent => put(pages, State::Missing),
            Presence::Present => {
                let file = match &file {
                    Some(file) => file,
                    None => file.insert(PagesFile::look_at(chain, id, memory, pages_id, twice)?),
                };
                let begin = file_page;
                file_page += entry.pages;
                file.split(begin..file_page, &mut |part, state| {
                    let start = pages.start + (part.start - begin);
                    put(start..start + (part.end - part.start), state);
                });
            }
        }
    }
    let Some(mapped) = mapped else { return Ok(()) };
    for (set, state) in [(&mapped.zero, State::Zero), (&mapped.file, State::File)] {
        for range in set.iter() {
            outside(range, &told, &mut |rest| put(rest, state));
        }
    }
    Ok(())
}

/// Calls `put` with the parts of `range` that are in none of the ranges `told`, which are in
/// order.
fn outside(range: Range<u64>, told: &[Range<u64>], put: &mut dyn FnMut(Range<u64>)) {
    let mut next = range.start;
    let from = told.partition_point(|told| told.end <= range.start);
    for told in told[from..].iter().take_while(|told| told.start < range.end) {
        if next < told.start {
            put(next..told.start);
        }
        next = told.end;
    }
    if next < range.end {
        put(next..range.end);
    }
}

/// What became of the pages of a pages file.
struct PagesFile<'a> {
    freed: PageRanges,
    /// How many pages the file has room for.
    there: u64,
    twice: &'a [Range<u64>],
}

impl<'a> PagesFile<'a> {
    fn look_at(
        chain: &Chain,
        id: SnapshotId,
        memory: MemoryId,
        pages_id: u32,
        twice: &'a Twice,
    ) -> Result<Self> {
        let images = &**chain.images(id);
        let gone = punched::read(images, &memory.pagemap_name(), pages_id)?;
        let mut freed = gone.unwrap_or_default();
        let twice = twice.of(id, memory);
        let Ok(file) = chain.files().get(chain.enter_pages(id, pages_id)) else {
            return Ok(Self { freed, there: 0, twice });
        };
        for hole in holes::in_file(&file, 0, u64::MAX)? {
            freed.insert(hole.start.div_ceil(PAGE_SIZE)..hole.end / PAGE_SIZE);
        }
        Ok(Self { freed, there: file.stat()?.len / PAGE_SIZE, twice })
    }

    fn split(&self, pages: Range<u64>, put: &mut dyn FnMut(Range<u64>, State)) {
        let there = pages.start..pages.end.min(self.there.max(pages.start));
        for (part, gone) in self.freed.split(there.clone()) {
            if gone {
                put(part, State::Freed);
                continue;
            }
            let from = self.twice.partition_point(|twice| twice.end <= part.start);
            for twice in self.twice[from..].iter().take_while(|twice| twice.start < part.end) {
                put(twice.start.max(part.start)..twice.end.min(part.end), State::Twice);
            }
            outside(part, self.twice, &mut |rest| put(rest, State::Here));
        }
        if there.end < pages.end {
            put(there.end..pages.end, State::Missing);
        }
    }
}
