//! The memory of a process, by address.

use std::{
    collections::HashMap,
    iter,
    num::NonZeroUsize,
    ops::Range,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use lru::LruCache;

use super::{
    Process, Result, Tables,
    mapped::{FileExtent, Mapped},
    process::{Area, Below, PROT_READ},
};
use crate::{
    chain::{
        self, ChainError, Content, Cursor, Extent, Files, Index, MemoryBytes, Place, Run,
        SnapshotId, Source,
    },
    image::MemoryId,
    units::PageIndex,
};

/// The address space of a process: the byte at offset X is the byte at address X. It ends where the
/// highest mapping below 2^63 ends.
///
/// Private and shared memory are resolved over the chain. For a mapped file, pages that the process
/// has changed come from the images. The others come from the file, if it is still the one that was
/// dumped: it must have the recorded size, and the recorded build ID if there is one.
///
/// Holes are: addresses without a mapping; zero pages; pages after the end of a mapped file; a mapped
/// file that is missing or has changed; and memory of the kernel or a device, which no image has.
/// Bytes that an image should have but does not are errors ([`Source::Lost`]).
///
/// Nothing is resolved before it is read.
#[derive(Debug)]
pub struct AddressSpace {
    process: Arc<Process>,
    allocated: OnceLock<u64>,
    /// Indexes resolved so far, kept until the address space is closed.
    indexes: Mutex<HashMap<MemoryId, Arc<Index>>>,
}

impl AddressSpace {
    /// Returns the address space of `process` without reading anything.
    pub fn new(process: Arc<Process>) -> Self {
        Self { process, allocated: OnceLock::new(), indexes: Mutex::default() }
    }

    /// Returns the process.
    pub fn process(&self) -> &Arc<Process> {
        &self.process
    }

    fn files(&self) -> &Files {
        self.process.tables().chain().files()
    }

    fn index(&self, memory: MemoryId) -> chain::Result<Arc<Index>> {
        let indexes = || self.indexes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = indexes().get(&memory) {
            return Ok(Arc::clone(index));
        }
        let tables = self.process.tables();
        let index = tables.chain().readable_index(tables.snapshot(), memory)?;
        indexes().insert(memory, Arc::clone(&index));
        Ok(index)
    }

    fn shared_index(&self, shmid: u64) -> chain::Result<Arc<Index>> {
        self.index(MemoryId::Shared(shmid))
    }

    /// Returns the index of private memory, if `area` may have pages in it.
    fn private_index(&self, area: &Area) -> chain::Result<Option<Arc<Index>>> {
        area.private.then(|| self.index(self.process.private())).transpose()
    }

    /// Returns the ranges of `area` that a core file contains, ascending and not touching. If the
    /// process could read the area, these are all ranges that images or files have; otherwise, the
    /// pages in images.
    pub(super) fn known(&self, area: &Area) -> chain::Result<Vec<Range<u64>>> {
        let all = area.start..area.end;
        let readable = area.prot & PROT_READ != 0
            && match &area.below {
                Below::Unknown => false,
                Below::Mapped(Mapped::File(file)) => file.extents(self.files()).is_some(),
                Below::Mapped(_) => true,
            };
        if readable {
            return Ok(iter::once(all).collect());
        }
        let own: Vec<(Range<u64>, bool)> = match self.private_index(area)? {
            Some(index) => parts(&index, all).map(|(part, own)| (part, own.is_some())).collect(),
            None => vec![(all, false)],
        };
        let shared = match &area.below {
            Below::Mapped(Mapped::Shared(shmid)) => Some(self.shared_index(*shmid)?),
            _ => None,
        };
        let mut known: Vec<Range<u64>> = Vec::new();
        for (part, own) in own {
            if own {
                known.push(part);
            } else if let Some(index) = &shared {
                let start = area.offset_of(part.start);
                let stored = parts(index, start..start + (part.end - part.start));
                let stored = stored.filter(|(_, extent)| extent.is_some());
                let address = |offset| area.start + (offset - area.offset);
                known.extend(stored.map(|(part, _)| address(part.start)..address(part.end)));
            }
        }
        known.dedup_by(|next, last| {
            let touching = last.end == next.start;
            if touching {
                last.end = next.end;
            }
            touching
        });
        Ok(known)
    }

    /// Counts the bytes of `area` that images hold, in any snapshot that can be read: private pages,
    /// and pages of a shared object.
    pub(super) fn resident(&self, area: &Area) -> chain::Result<(u64, u64)> {
        let all = area.start..area.end;
        let len = |range: &Range<u64>| range.end - range.start;
        let shared = match &area.below {
            Below::Mapped(Mapped::Shared(shmid)) => self.shared_index(*shmid).ok(),
            _ => None,
        };
        let in_object = |part: Range<u64>| {
            let Some(index) = &shared else { return 0 };
            let start = area.offset_of(part.start);
            let parts = parts(index, start..start + len(&part));
            parts
                .filter(|(_, extent)| extent.is_some_and(is_held))
                .map(|(part, _)| len(&part))
                .sum()
        };
        let Some(index) = self.private_index(area)? else { return Ok((0, in_object(all))) };
        let (mut own, mut below) = (0, 0);
        for (part, extent) in parts(&index, all) {
            match extent {
                Some(extent) if is_held(extent) => own += len(&part),
                Some(_) => {}
                None => below += in_object(part),
            }
        }
        Ok((own, below))
    }

    /// Counts the bytes of `range`, which lies in one mapping, that are not holes.
    pub(super) fn allocated_in(&self, range: Range<u64>) -> u64 {
        let areas = self.process.areas();
        let position = areas.partition_point(|area| area.end <= range.start);
        areas.get(position).map_or(0, |area| self.area_allocated(area, range))
    }

    /// Appends the runs of `range`, which lies inside `area`.
    fn area_runs(&self, area: &Area, range: Range<u64>, runs: &mut Vec<Run>) -> chain::Result<()> {
        let index = match self.private_index(area) {
            Ok(Some(index)) => index,
            Ok(None) => return self.below_runs(area, range, runs),
            Err(error) => {
                runs.push(lost(error, range.end - range.start));
                return Ok(());
            }
        };
        let mut cursor = Cursor::new(self.process.tables().chain(), &index);
        for (part, extent) in parts(&index, range) {
            let Some(extent) = extent else {
                self.below_runs(area, part, runs)?;
                continue;
            };
            let skipped = part.start - extent.first.address();
            cursor.push_runs(&extent, skipped, part.end - part.start, runs)?;
        }
        Ok(())
    }

    /// Appends the runs of `range` where the process has no private pages.
    fn below_runs(&self, area: &Area, range: Range<u64>, runs: &mut Vec<Run>) -> chain::Result<()> {
        let len = range.end - range.start;
        match &area.below {
            Below::Unknown | Below::Mapped(Mapped::Zero) => {
                runs.push(Run { len, source: Source::Zero });
            }
            Below::Mapped(Mapped::Shared(shmid)) => match self.shared_index(*shmid) {
                Ok(index) => {
                    let chain = Arc::clone(self.process.tables().chain());
                    let object = MemoryBytes::new(chain, index, u64::MAX);
                    object.runs(area.offset_of(range.start), len, runs)?;
                }
                // Only this object is lost, not the rest of the address space.
                Err(error) => runs.push(lost(error, len)),
            },
            Below::Mapped(Mapped::File(file)) => {
                let start = area.offset_of(range.start);
                let extents = file.extents(self.files()).unwrap_or_default();
                extent_runs(extents, self.files(), start..start + len, runs)?;
            }
        }
        Ok(())
    }

    fn area_allocated(&self, area: &Area, range: Range<u64>) -> u64 {
        match self.private_index(area) {
            Ok(None) => self.below_allocated(area, range),
            Err(_) => 0,
            Ok(Some(index)) => parts(&index, range)
                .map(|(part, extent)| match extent {
                    Some(extent) => stored(&part, extent),
                    None => self.below_allocated(area, part),
                })
                .sum(),
        }
    }

    fn below_allocated(&self, area: &Area, range: Range<u64>) -> u64 {
        let start = area.offset_of(range.start);
        let end = start + (range.end - range.start);
        match &area.below {
            Below::Unknown | Below::Mapped(Mapped::Zero) => 0,
            Below::Mapped(Mapped::Shared(shmid)) => self.shared_index(*shmid).map_or(0, |index| {
                let extents = parts(&index, start..end);
                extents.map(|(part, extent)| extent.map_or(0, |extent| stored(&part, extent))).sum()
            }),
            Below::Mapped(Mapped::File(file)) => {
                let extents = file.extents(self.files()).unwrap_or_default();
                let first = extents.partition_point(|extent| extent.end <= start);
                let inside = extents[first..].iter().take_while(|extent| extent.start < end);
                inside.map(|extent| extent.end.min(end) - extent.start.max(start)).sum()
            }
        }
    }
}

/// Recently used address spaces: tools read many files of a process in a row.
#[derive(Debug)]
pub(super) struct Spaces(Mutex<LruCache<(SnapshotId, u32), Arc<AddressSpace>>>);

/// How many address spaces are kept. Each holds its mappings and the indexes resolved so far.
const SPACES_KEPT: NonZeroUsize = NonZeroUsize::new(8).expect("not zero");

impl Default for Spaces {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(SPACES_KEPT)))
    }
}

impl Spaces {
    /// Returns the address space of a process. Reads only the process's mappings.
    ///
    /// # Errors
    /// Like [`Process::load`].
    pub(super) fn get(&self, tables: &Arc<Tables>, pid: u32) -> Result<Arc<AddressSpace>> {
        let spaces = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Freeing pages changes where they are.
        let lasting = !tables.chain().has_freed();
        let key = (tables.snapshot(), pid);
        if lasting && let Some(space) = spaces().get(&key) {
            return Ok(Arc::clone(space));
        }
        let space = Arc::new(AddressSpace::new(Arc::new(Process::load(tables, pid)?)));
        if lasting {
            spaces().put(key, Arc::clone(&space));
        }
        Ok(space)
    }
}

/// An address space as in `/proc/PID/mem`: addresses without a mapping cannot be read.
#[derive(Debug)]
pub(super) struct ProcessMemory {
    space: Arc<AddressSpace>,
}

impl ProcessMemory {
    pub(super) fn new(space: Arc<AddressSpace>) -> Self {
        Self { space }
    }
}

impl Content for ProcessMemory {
    fn len(&self) -> u64 {
        self.space.len()
    }

    fn read_end(&self, offset: u64) -> u64 {
        let areas = self.space.process.areas();
        let position = areas.partition_point(|area| area.end <= offset);
        let mut end = offset;
        for area in &areas[position..] {
            if area.start > end {
                break;
            }
            end = area.end;
        }
        end
    }

    fn allocated(&self) -> u64 {
        self.space.allocated()
    }

    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> chain::Result<()> {
        self.space.runs(offset, len, runs)
    }
}

/// The contents of one mapping.
#[derive(Debug)]
pub(super) struct MappingFile {
    space: Arc<AddressSpace>,
    range: Range<u64>,
}

impl MappingFile {
    /// Returns the mapping at `range`, which must be a mapping of the address space.
    pub(super) fn new(space: Arc<AddressSpace>, range: Range<u64>) -> Self {
        Self { space, range }
    }
}

impl Content for MappingFile {
    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn allocated(&self) -> u64 {
        self.space.allocated_in(self.range.clone())
    }

    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> chain::Result<()> {
        self.space.runs(self.range.start + offset, len, runs)
    }
}

fn lost(error: ChainError, len: u64) -> Run {
    Run { len, source: Source::Lost(Arc::new(error)) }
}

/// Appends the runs of the bytes `range` of a file. `extents` holds its contents in ascending order,
/// with holes in between.
pub(super) fn extent_runs(
    extents: &[FileExtent],
    files: &Files,
    range: Range<u64>,
    runs: &mut Vec<Run>,
) -> chain::Result<()> {
    let first = extents.partition_point(|extent| extent.end <= range.start);
    let mut next = range.start;
    for extent in extents[first..].iter().take_while(|extent| extent.start < range.end) {
        if extent.start > next {
            runs.push(Run { len: extent.start - next, source: Source::Zero });
            next = extent.start;
        }
        let end = extent.end.min(range.end);
        let offset = extent.at + (next - extent.start);
        let source = Source::File(files.get(extent.file)?, offset);
        runs.push(Run { len: end - next, source });
        next = end;
    }
    if next < range.end {
        runs.push(Run { len: range.end - next, source: Source::Zero });
    }
    Ok(())
}

/// Splits `range` at the borders of the extents of `index`.
fn parts(
    index: &Index,
    range: Range<u64>,
) -> impl Iterator<Item = (Range<u64>, Option<Extent>)> + '_ {
    let mut next = range.start;
    let mut position = index.position(PageIndex::holding(next));
    iter::from_fn(move || {
        if next >= range.end {
            return None;
        }
        let start = next;
        let ahead = index.extent(position);
        let extent = ahead.filter(|extent| extent.first <= PageIndex::holding(start));
        let border = match (extent, ahead) {
            (Some(extent), _) => extent.end(),
            (None, ahead) => ahead.map_or(PageIndex::END, |extent| extent.first),
        };
        position += usize::from(extent.is_some());
        // The border may be 2^64, which is not an address.
        let beyond = border > PageIndex::holding(range.end);
        next = if beyond { range.end } else { border.address() };
        Some((start..next, extent))
    })
}

/// Whether an image tells of the pages of `extent`, though they may have been freed since.
fn is_held(extent: Extent) -> bool {
    !matches!(extent.place, Place::Unanswered { .. })
}

/// Counts the stored bytes of `part`, which lies inside `extent`.
fn stored(part: &Range<u64>, extent: Extent) -> u64 {
    match extent.place {
        Place::Stored { .. } => part.end - part.start,
        Place::Punched { .. } | Place::Absent | Place::Unanswered { .. } => 0,
    }
}

impl Content for AddressSpace {
    fn len(&self) -> u64 {
        self.process.end()
    }

    /// Returns how many bytes are stored in images, in any snapshot, plus how many bytes of mapped
    /// files are shown. Memory that is mapped twice counts twice; memory that cannot be resolved
    /// does not count.
    ///
    /// The first call resolves all memories of the process and examines all files that it maps.
    fn allocated(&self) -> u64 {
        *self.allocated.get_or_init(|| {
            let areas = self.process.areas().iter();
            areas.map(|area| self.area_allocated(area, area.start..area.end)).sum()
        })
    }

    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> chain::Result<()> {
        let end = offset + len;
        let mut next = offset;
        let areas = self.process.areas();
        let first = areas.partition_point(|area| area.end <= offset);
        for area in areas[first..].iter().take_while(|area| area.start < end) {
            if area.start > next {
                runs.push(Run { len: area.start - next, source: Source::Zero });
                next = area.start;
            }
            let stop = area.end.min(end);
            self.area_runs(area, next..stop, runs)?;
            next = stop;
        }
        if next < end {
            runs.push(Run { len: end - next, source: Source::Zero });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
