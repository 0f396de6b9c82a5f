//! A resolved memory as bytes: in place, or its stored pages one after another.

use std::{ops::Range, sync::Arc};

use super::{
    BackingFile, Chain, ChainError, Content, Extent, Index, Layer, Place, Result, Run, Source,
    holes,
};
use crate::units::{PageIndex, page_bytes};

/// How many files a [`Cursor`] remembers.
const RECENT_FILES: usize = 8;

/// Turns stretches of extents into runs, remembering the files that they are
/// in: neighbours are most often in the same few.
pub(crate) struct Cursor<'a> {
    chain: &'a Chain,
    index: &'a Index,
    recent: Vec<(u32, Arc<BackingFile>)>,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(chain: &'a Chain, index: &'a Index) -> Self {
        Self { chain, index, recent: Vec::new() }
    }

    /// Returns the run of at most `limit` bytes of `extent` that begins
    /// `skipped` bytes into it.
    pub(crate) fn run(&mut self, extent: &Extent, skipped: u64, limit: u64) -> Result<Run> {
        let len = (page_bytes(extent.pages) - skipped).min(limit);
        let source = match extent.place {
            Place::Stored { layer, file_page } => {
                Source::File(self.file(layer)?, PageIndex(file_page).address() + skipped)
            }
            Place::Absent => {
                let first = PageIndex::holding(extent.first.address() + skipped);
                Source::Lost(Arc::new(ChainError::Absent { memory: self.index.memory(), first }))
            }
        };
        Ok(Run { len, source })
    }

    fn file(&mut self, layer: u32) -> Result<Arc<BackingFile>> {
        if let Some((_, file)) = self.recent.iter().find(|(known, _)| *known == layer) {
            return Ok(Arc::clone(file));
        }
        let file = self.chain.files().get(self.index.layers()[layer as usize].file)?;
        self.recent.truncate(RECENT_FILES - 1);
        self.recent.insert(0, (layer, Arc::clone(&file)));
        Ok(file)
    }
}

/// Counts the bytes of a resolved memory that take room: those of stored pages
/// that are not holes of their files. What cannot be looked at counts in full.
fn allocated(chain: &Chain, index: &Index) -> u64 {
    let files = chain.files();
    let holes = |layer: &Layer| {
        if layer.dense {
            return Vec::new();
        }
        let file = files.get(layer.file);
        file.and_then(|file| holes::in_file(&file, 0, page_bytes(layer.pages))).unwrap_or_default()
    };
    let holes: Vec<Vec<Range<u64>>> = index.layers().iter().map(holes).collect();
    let stored = page_bytes(index.stored_pages());
    if holes.iter().all(Vec::is_empty) {
        return stored;
    }
    let free = index.extents().filter_map(|extent| match extent.place {
        Place::Absent => None,
        Place::Stored { layer, file_page } => {
            let start = page_bytes(file_page);
            let end = start.saturating_add(page_bytes(extent.pages));
            let holes = &holes[layer as usize];
            let first = holes.partition_point(|hole| hole.end <= start);
            let inside = holes[first..].iter().take_while(|hole| hole.start < end);
            Some(inside.map(|hole| hole.end.min(end) - hole.start.max(start)).sum::<u64>())
        }
    });
    stored.saturating_sub(free.sum())
}

/// A memory in place: the byte at offset X is the byte at address X.
#[derive(Debug)]
pub struct MemoryBytes {
    chain: Arc<Chain>,
    index: Arc<Index>,
    len: u64,
}

impl MemoryBytes {
    /// Presents the memory that `index` resolves, `len` bytes of it from 0 on.
    pub fn new(chain: Arc<Chain>, index: Arc<Index>, len: u64) -> Self {
        Self { chain, index, len }
    }

    /// Returns the index that the bytes are looked up in.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }
}

impl Content for MemoryBytes {
    fn len(&self) -> u64 {
        self.len
    }

    fn allocated(&self) -> u64 {
        allocated(&self.chain, &self.index)
    }

    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> Result<()> {
        let end = offset + len;
        let mut next = offset;
        let mut position = self.index.position(PageIndex::holding(offset));
        let mut cursor = Cursor::new(&self.chain, &self.index);
        while next < end {
            let extent = self.index.extent(position);
            let from = extent.as_ref().map_or(u64::MAX, |extent| extent.first.address());
            if from > next {
                let len = from.min(end) - next;
                runs.push(Run { len, source: Source::Zero });
                next += len;
                continue;
            }
            let extent = extent.expect("only an extent begins before the end");
            let run = cursor.run(&extent, next - from, end - next)?;
            next += run.len;
            runs.push(run);
            position += 1;
        }
        Ok(())
    }
}

/// The stored pages of a memory one after another: a pages file without parents.
#[derive(Debug)]
pub struct FlatPages {
    chain: Arc<Chain>,
    index: Arc<Index>,
}

impl FlatPages {
    /// Presents the stored pages of the memory that `index` resolves.
    pub fn new(chain: Arc<Chain>, index: Arc<Index>) -> Self {
        Self { chain, index }
    }

    /// Returns the index that the pages are looked up in.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Returns the one pages file that these are exactly the pages of, from its
    /// first to its last, if there is one.
    pub fn whole_file(&self) -> Option<&Layer> {
        let mut next = 0;
        let mut whole = None;
        for flat in self.index.flat() {
            let Some(extent) = self.index.extent(flat.position as usize) else { break };
            let Place::Stored { layer, file_page } = extent.place else { continue };
            if file_page != next || *whole.get_or_insert(layer) != layer {
                return None;
            }
            next += extent.pages;
        }
        let layer = &self.index.layers()[whole? as usize];
        (layer.pages == next).then_some(layer)
    }
}

impl Content for FlatPages {
    fn len(&self) -> u64 {
        page_bytes(self.index.stored_pages())
    }

    fn allocated(&self) -> u64 {
        allocated(&self.chain, &self.index)
    }

    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> Result<()> {
        let end = offset + len;
        let mut next = offset;
        let page = PageIndex::holding(offset).0;
        let all = self.index.flat();
        let first = all.partition_point(|flat| flat.before <= page).saturating_sub(1);
        let mut cursor = Cursor::new(&self.chain, &self.index);
        for flat in &all[first..] {
            if next >= end {
                break;
            }
            let Some(extent) = self.index.extent(flat.position as usize) else { break };
            let run = cursor.run(&extent, next - page_bytes(flat.before), end - next)?;
            next += run.len;
            runs.push(run);
        }
        Ok(())
    }
}
