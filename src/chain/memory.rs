//! The bytes of a resolved memory: by address, or its stored pages one after another.

use std::{ops::Range, sync::Arc};

use super::{
    BackingFile, Chain, ChainError, Content, Extent, Index, Layer, Place, Result, Run, Source,
    freed, holes,
};
use crate::units::{PAGE_SHIFT, PAGE_SIZE, PageIndex, page_bytes};

/// How many files a [`Cursor`] remembers.
const RECENT_FILES: usize = 8;

/// Converts parts of extents to runs. Remembers the files that they are in, because
/// neighbouring extents are usually in the same few files.
pub(crate) struct Cursor<'a> {
    chain: &'a Chain,
    index: &'a Index,
    recent: Vec<(u32, Arc<BackingFile>)>,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(chain: &'a Chain, index: &'a Index) -> Self {
        Self { chain, index, recent: Vec::new() }
    }

    /// Appends the runs for the part of `extent` that begins after `skipped` bytes, at most
    /// `limit` bytes, and returns how many bytes that are.
    pub(crate) fn push_runs(
        &mut self,
        extent: &Extent,
        skipped: u64,
        limit: u64,
        runs: &mut Vec<Run>,
    ) -> Result<u64> {
        let len = (page_bytes(extent.pages) - skipped).min(limit);
        let first = PageIndex::holding(extent.first.address() + skipped);
        match extent.place {
            Place::Stored { layer, file_page } => {
                let start = PageIndex(file_page).address() + skipped;
                if self.chain.freed().is_empty() {
                    runs.push(Run { len, source: Source::File(self.file(layer)?, start) });
                } else {
                    self.push_what_is_left(layer, first, start, start + len, runs)?;
                }
            }
            Place::Punched { layer, .. } => {
                let pages = extent.pages - (skipped >> PAGE_SHIFT);
                runs.push(self.gone(layer, first, pages, len));
            }
            Place::Absent => {
                let error = ChainError::Absent { memory: self.index.memory(), first };
                runs.push(Run { len, source: Source::Lost(Arc::new(error)) });
            }
            Place::Unanswered { layer } => {
                let pages = extent.pages - (skipped >> PAGE_SHIFT);
                let error = self.index.no_answer(self.chain, layer, first, pages);
                runs.push(Run { len, source: Source::Lost(Arc::new(error)) });
            }
        }
        Ok(len)
    }

    /// Appends the runs for the bytes `[start, end)` of a layer's file, of which pages may
    /// have been freed after the index was built; `first` is the page of the first byte.
    fn push_what_is_left(
        &mut self,
        layer: u32,
        first: PageIndex,
        start: u64,
        end: u64,
        runs: &mut Vec<Run>,
    ) -> Result<()> {
        let file = self.index.layers()[layer as usize].file;
        let pages = PageIndex::holding(start).0..end.div_ceil(PAGE_SIZE);
        let begin = pages.start;
        for (part, gone) in self.chain.freed().split(file, pages) {
            let from = page_bytes(part.start).max(start);
            let len = page_bytes(part.end).min(end) - from;
            runs.push(if gone {
                let first = PageIndex(first.0 + (part.start - begin));
                self.gone(layer, first, part.end - part.start, len)
            } else {
                Run { len, source: Source::File(self.file(layer)?, from) }
            });
        }
        Ok(())
    }

    fn gone(&self, layer: u32, first: PageIndex, pages: u64, len: u64) -> Run {
        let layer = &self.index.layers()[layer as usize];
        let error = freed::punched(self.chain, self.index.memory(), layer, first, pages);
        Run { len, source: Source::Lost(Arc::new(error)) }
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

/// Counts the bytes of a resolved memory that occupy space: stored pages, without holes of
/// the files. A file whose holes cannot be determined counts in full.
fn allocated(chain: &Chain, index: &Index) -> u64 {
    let files = chain.files();
    let holes = |layer: &Layer| {
        // Pages that were freed since are holes, too.
        if layer.dense && chain.freed().is_empty() {
            return Vec::new();
        }
        let file = files.get(layer.file);
        file.and_then(|file| holes::in_file(&file, 0, page_bytes(layer.pages))).unwrap_or_default()
    };
    let holes: Vec<Vec<Range<u64>>> = index.layers().iter().map(holes).collect();
    let stored = page_bytes(index.stored_pages());
    if index.punched_pages() == 0 && holes.iter().all(Vec::is_empty) {
        return stored;
    }
    let free = index.extents().filter_map(|extent| match extent.place {
        Place::Absent | Place::Unanswered { .. } => None,
        Place::Punched { .. } => Some(page_bytes(extent.pages)),
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

/// Returns in how many contiguous parts of files a resolved memory lies; `None` if pages of
/// it are gone.
fn stretches(chain: &Chain, index: &Index) -> Option<usize> {
    let gone = index.punched_pages() + index.unanswered_pages();
    let whole = gone == 0 && chain.freed().is_empty();
    whole.then(|| index.extents().len())
}

/// A memory by address: the byte at offset X is the byte at address X.
#[derive(Debug)]
pub struct MemoryBytes {
    chain: Arc<Chain>,
    index: Arc<Index>,
    len: u64,
}

impl MemoryBytes {
    /// Presents the first `len` bytes of the memory that `index` resolves.
    pub fn new(chain: Arc<Chain>, index: Arc<Index>, len: u64) -> Self {
        Self { chain, index, len }
    }

    /// Returns the index.
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

    fn stretches(&self) -> Option<usize> {
        stretches(&self.chain, &self.index)
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
            next += cursor.push_runs(&extent, next - from, end - next, runs)?;
            position += 1;
        }
        Ok(())
    }
}

/// The stored pages of a memory one after another, like a pages file without parents.
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

    /// Returns the index.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Returns the pages file that consists of exactly these pages, from first to last, if
    /// there is one.
    pub fn whole_file(&self) -> Option<&Layer> {
        let mut next = 0;
        let mut whole = None;
        for flat in self.index.flat() {
            let Some(extent) = self.index.extent(flat.position as usize) else { break };
            let (layer, file_page) = match extent.place {
                Place::Stored { layer, file_page } => (layer, file_page),
                Place::Punched { .. } => return None,
                Place::Absent | Place::Unanswered { .. } => continue,
            };
            if file_page != next || *whole.get_or_insert(layer) != layer {
                return None;
            }
            next += extent.pages;
        }
        let layer = &self.index.layers()[whole? as usize];
        (layer.pages == next).then_some(layer)
    }
}

impl FlatPages {
    /// Returns where pages of this file are: layers, and pages of their files. Omits pages
    /// that were freed before the index was built.
    pub fn places(&self, pages: Range<u64>) -> impl Iterator<Item = (&Layer, Range<u64>)> {
        let all = self.index.flat();
        let first = all.partition_point(|flat| flat.before <= pages.start).saturating_sub(1);
        let inside = all[first..].iter().take_while(move |flat| flat.before < pages.end);
        inside.filter_map(move |flat| {
            let extent = self.index.extent(flat.position as usize)?;
            let Place::Stored { layer, file_page } = extent.place else { return None };
            let start = pages.start.max(flat.before);
            let end = pages.end.min(flat.before + extent.pages);
            let at = |page: u64| file_page + (page - flat.before);
            (start < end).then(|| (&self.index.layers()[layer as usize], at(start)..at(end)))
        })
    }
}

impl Content for FlatPages {
    fn len(&self) -> u64 {
        page_bytes(self.index.stored_pages())
    }

    fn allocated(&self) -> u64 {
        allocated(&self.chain, &self.index)
    }

    fn stretches(&self) -> Option<usize> {
        stretches(&self.chain, &self.index)
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
            let skipped = next - page_bytes(flat.before);
            next += cursor.push_runs(&extent, skipped, end - next, runs)?;
        }
        Ok(())
    }
}
