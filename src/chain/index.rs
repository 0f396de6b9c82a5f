//! Which bytes hold page P of memory M?

use std::{
    mem,
    ops::{Range, RangeInclusive},
    sync::{Arc, OnceLock},
    time::Instant,
};

use super::{
    Chain, ChainError, FileId, Result, SnapshotId, freed,
    overlay::{self, Merged, Pile},
    piece::{self, Gaps, Piece, PiecePlace},
};
use crate::{
    causes::with_sources,
    image::{Kind, MemoryId, PagemapEntry, PagemapReader, Presence, punched},
    parallel,
    units::{PageIndex, PageRanges},
};

/// A pages file that an index refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// The snapshot that has the file.
    pub snapshot: SnapshotId,
    /// The number of the file in that snapshot.
    pub pages_id: u32,
    /// The number of pages that it must hold.
    pub pages: u64,
    /// Its number in [`Chain::files`].
    pub file: FileId,
    /// Whether it occupied its full length when the index was built, so that it has no
    /// holes. False for a compressed file.
    pub dense: bool,
}

/// Where the pages of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the pages file of the layer at this position in [`Index::layers`], starting with
    /// this page of the file.
    Stored {
        /// The layer.
        layer: u32,
        /// The position of the first page in the file.
        file_page: u64,
    },
    /// Freed: reading the pages is an error. They keep their place in a pages file without
    /// parents.
    Punched {
        /// The layer.
        layer: u32,
        /// The position of the first page in the file.
        file_page: u64,
    },
    /// In no image: reading them is an error.
    Absent,
    /// In an ancestor that cannot be read: reading them is an error. Only indexes of
    /// [`Chain::readable_index`] have such extents.
    Unanswered {
        /// The layer that leaves them to its parent.
        layer: u32,
    },
}

/// A run of pages that are contiguous in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first page.
    pub first: PageIndex,
    /// The number of pages, at least 1.
    pub pages: u64,
    /// Where they are.
    pub place: Place,
    /// Whether a restore may load them later.
    pub lazy: bool,
}

impl Extent {
    /// Returns the page after the last one.
    pub fn end(&self) -> PageIndex {
        PageIndex(self.first.0 + self.pages)
    }
}

/// One memory of one snapshot, resolved across the snapshot's ancestors: a sorted array of
/// extents of 24 bytes each. Pages between the extents are zero.
///
/// Building it takes one pass over the pagemap entries of the chain; a lookup takes one
/// binary search, however deep the chain is.
#[derive(Debug)]
pub struct Index {
    memory: MemoryId,
    pages_id: u32,
    layers: Vec<Layer>,
    extents: Vec<Piece>,
    stored_pages: u64,
    punched_pages: u64,
    unanswered_pages: u64,
    /// Why the lowest layer gets no answer, if its parent link is not the reason.
    end: Option<Arc<ChainError>>,
    flat: OnceLock<Vec<FlatExtent>>,
}

/// The place of a stored or freed extent in a pages file without parents.
#[derive(Clone, Copy, Debug)]
pub(super) struct FlatExtent {
    /// How many pages of that file come before it.
    pub(super) before: u64,
    /// Its position in the index.
    pub(super) position: u32,
}

impl Index {
    /// Resolves `memory` of the snapshot `id`.
    ///
    /// # Errors
    /// [`ChainError::NoMemory`] if the snapshot has no pagemap of it,
    /// [`ChainError::Unanswered`] and [`ChainError::Link`] for a chain that is
    /// broken where this memory needs it, [`ChainError::Image`] for a pagemap
    /// that cannot be read.
    pub fn build(chain: &Chain, id: SnapshotId, memory: MemoryId) -> Result<Self> {
        let read = read_layers(chain, id, memory, || ancestors(chain, id))?;
        read.end?;
        // Every layer but the last leaves pages to the next.
        let snapshots: Vec<SnapshotId> =
            read.layers.layers.iter().map(|layer| layer.snapshot).collect();
        chain.require_layers(&snapshots)?;
        let index = Self::merged(chain, memory, read.layers, None);
        match index.first_unanswered(chain) {
            Some(error) => Err(error),
            None => Ok(index),
        }
    }

    /// Merges layers. `end` says why the lowest gets no answer, if its parent link does not.
    pub(super) fn merged(
        chain: &Chain,
        memory: MemoryId,
        layers: Layers,
        end: Option<Arc<ChainError>>,
    ) -> Self {
        let begin = Instant::now();
        let (layers, extents) = layers.merge();
        let (mut stored_pages, mut punched_pages, mut unanswered_pages) = (0, 0, 0);
        for piece in &extents {
            match piece.place() {
                PiecePlace::Stored { .. } => stored_pages += piece.pages(),
                PiecePlace::Punched { .. } => {
                    stored_pages += piece.pages();
                    punched_pages += piece.pages();
                }
                PiecePlace::Absent | PiecePlace::Nothing => {}
                PiecePlace::Parent | PiecePlace::Missing { .. } => {
                    unanswered_pages += piece.pages();
                }
            }
        }
        log::debug!(
            "{memory} of {}: {} extents in {} layers, merged in {:?}",
            chain.snapshot(layers[0].snapshot).name,
            extents.len(),
            layers.len(),
            begin.elapsed(),
        );
        Self {
            memory,
            pages_id: layers[0].pages_id,
            layers,
            extents,
            stored_pages,
            punched_pages,
            unanswered_pages,
            end,
            flat: OnceLock::new(),
        }
    }

    /// Returns the memory that was resolved.
    pub fn memory(&self) -> MemoryId {
        self.memory
    }

    /// Returns the number of the memory's pages file in the snapshot itself.
    pub fn pages_id(&self) -> u32 {
        self.pages_id
    }

    /// Returns the pages files that can hold extents, the newest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Returns all extents in page order.
    pub fn extents(&self) -> impl DoubleEndedIterator<Item = Extent> + ExactSizeIterator {
        self.extents.iter().map(|piece| self.extent_of(piece))
    }

    /// Returns the extent at `position`.
    pub fn extent(&self, position: usize) -> Option<Extent> {
        self.extents.get(position).map(|piece| self.extent_of(piece))
    }

    /// Returns how many pages are stored in the chain, freed ones included: the length of a
    /// pages file without parents.
    pub fn stored_pages(&self) -> u64 {
        self.stored_pages
    }

    /// Returns how many of them had been freed when the index was built.
    pub fn punched_pages(&self) -> u64 {
        self.punched_pages
    }

    /// Returns how many pages are in ancestors that cannot be read.
    pub fn unanswered_pages(&self) -> u64 {
        self.unanswered_pages
    }

    /// Returns why the first page that is in no readable ancestor is there; `None` if there is no
    /// such page.
    pub(super) fn first_unanswered(&self, chain: &Chain) -> Option<ChainError> {
        if self.unanswered_pages == 0 {
            return None;
        }
        self.extents().find_map(|extent| match extent.place {
            Place::Unanswered { layer } => {
                Some(self.no_answer(chain, layer, extent.first, extent.pages))
            }
            _ => None,
        })
    }

    /// Returns why `layer` gets no answer for pages from its parent.
    pub(super) fn no_answer(
        &self,
        chain: &Chain,
        layer: u32,
        first: PageIndex,
        pages: u64,
    ) -> ChainError {
        let asking = chain.snapshot(self.layers[layer as usize].snapshot);
        let memory = self.memory;
        let reason = match (&asking.parent, &self.end) {
            (_, Some(end)) if layer as usize + 1 == self.layers.len() => with_sources(&**end),
            (Ok(None), _) => "it has no parent".to_owned(),
            (Ok(Some(parent)), _) => {
                let pagemap = chain.images(*parent).path_of(&memory.pagemap_name());
                format!("{} has no entry for that page", pagemap.display())
            }
            (Err(link), _) => with_sources(link),
        };
        ChainError::Unanswered { dir: asking.path().to_owned(), memory, first, pages, reason }
    }

    /// Converts a piece of a whole chain to an extent.
    fn extent_of(&self, piece: &Piece) -> Extent {
        let place = match piece.place() {
            PiecePlace::Stored { layer, file_page } => Place::Stored { layer, file_page },
            PiecePlace::Punched { layer, file_page } => Place::Punched { layer, file_page },
            PiecePlace::Absent | PiecePlace::Nothing => Place::Absent,
            PiecePlace::Parent => {
                let lowest = self.layers.len() - 1;
                let layer = u32::try_from(lowest).expect("layers are numbered by u32");
                Place::Unanswered { layer }
            }
            PiecePlace::Missing { layer } => Place::Unanswered { layer },
        };
        Extent { first: piece.first(), pages: piece.pages(), place, lazy: piece.lazy() }
    }

    /// Checks that no page was freed.
    ///
    /// # Errors
    /// [`ChainError::Punched`].
    pub fn require_whole(&self, chain: &Chain) -> Result<()> {
        if self.punched_pages == 0 && chain.freed().is_empty() {
            return Ok(());
        }
        for extent in self.extents() {
            match extent.place {
                Place::Punched { layer, .. } => {
                    let layer = &self.layers[layer as usize];
                    return Err(freed::punched(
                        chain,
                        self.memory,
                        layer,
                        extent.first,
                        extent.pages,
                    ));
                }
                Place::Stored { layer, file_page } => {
                    let layer = &self.layers[layer as usize];
                    let pages = file_page..file_page + extent.pages;
                    let parts = chain.freed().split(layer.file, pages);
                    if let Some((part, _)) = parts.into_iter().find(|(_, gone)| *gone) {
                        let first = PageIndex(extent.first.0 + (part.start - file_page));
                        let pages = part.end - part.start;
                        return Err(freed::punched(chain, self.memory, layer, first, pages));
                    }
                }
                Place::Absent | Place::Unanswered { .. } => {}
            }
        }
        Ok(())
    }

    /// Returns the stored extents in order; computed when first needed.
    pub(super) fn flat(&self) -> &[FlatExtent] {
        self.flat.get_or_init(|| {
            let mut before = 0;
            let mut flat = Vec::with_capacity(self.extents.len());
            for (position, extent) in (0..).zip(self.extents()) {
                if matches!(extent.place, Place::Stored { .. } | Place::Punched { .. }) {
                    flat.push(FlatExtent { before, position });
                    before += extent.pages;
                }
            }
            flat
        })
    }

    /// Returns the position of the first extent that ends after `page`.
    pub fn position(&self, page: PageIndex) -> usize {
        self.extents.partition_point(|piece| piece.end() <= page)
    }

    /// Returns the pages of `range` that are in extents, in ascending order.
    pub fn stored_within(
        &self,
        range: Range<PageIndex>,
    ) -> impl Iterator<Item = Range<PageIndex>> + '_ {
        let extents = (self.position(range.start)..).map_while(|position| self.extent(position));
        let inside = extents.take_while(move |extent| extent.first < range.end);
        inside.map(move |extent| extent.first.max(range.start)..extent.end().min(range.end))
    }

    /// Returns the extent that holds `page`; `None` if the page is zero.
    pub fn find(&self, page: PageIndex) -> Option<Extent> {
        self.extent(self.position(page)).filter(|extent| extent.first <= page)
    }
}

/// The layers that one memory is resolved across, the newest first.
pub(super) struct Layers {
    layers: Vec<Layer>,
    stretches: Vec<Stretch>,
}

/// Layers that were read.
pub(super) struct ReadLayers {
    pub(super) layers: Layers,
    /// The error that ended them, if the lowest asks its parent for pages.
    pub(super) end: Result<()>,
}

impl Layers {
    /// Returns the number of layers, at least 1.
    pub(super) fn len(&self) -> usize {
        self.layers.len()
    }

    /// Merges the layers into one map.
    fn merge(mut self) -> (Vec<Layer>, Vec<Piece>) {
        let merged = match &mut *self.stretches {
            [only] if only.gaps == Gaps::Nothing => mem::take(&mut only.pieces),
            stretches => {
                let maps: Vec<_> = stretches.iter().map(Stretch::map).collect();
                overlay::merge(&maps)
            }
        };
        (self.layers, merged)
    }
}

/// How many pagemaps a thread reads and merges at a time: enough to be worth starting a
/// thread, and few enough that small ones fit into the processor's cache. Each thread may
/// read up to this many in vain.
const STRETCH_LAYERS: RangeInclusive<usize> = 8..=64;

/// How many stretches each processor gets, so that all finish at about the same time.
const STRETCHES: usize = 4;

/// Reads the pagemaps of `memory` from the snapshot downwards, until one asks its parent
/// for nothing. `ancestors` returns the ancestors from the parent of the snapshot down, and
/// the error of the last link.
///
/// Opening files takes most of the time, so all but the first layer are opened in parallel.
///
/// # Errors
/// A pagemap of the snapshot itself that is missing or cannot be read.
pub(super) fn read_layers(
    chain: &Chain,
    id: SnapshotId,
    memory: MemoryId,
    ancestors: impl FnOnce() -> (Vec<SnapshotId>, Result<()>),
) -> Result<ReadLayers> {
    let name = memory.pagemap_name();
    let mut stretches = vec![Desk::default().read(chain, &name, 0, &[id])];
    let asked = matches!(stretches[0].end, End::AsksParent);
    let (ancestors, end) = if asked { ancestors() } else { (Vec::new(), Ok(())) };
    let processors = parallel::processors_for(ancestors.len() / STRETCH_LAYERS.start());
    let fair = ancestors.len().div_ceil(processors * STRETCHES);
    let each = fair.clamp(*STRETCH_LAYERS.start(), *STRETCH_LAYERS.end());
    let parts: Vec<&[SnapshotId]> = ancestors.chunks(each).collect();
    stretches.extend(parallel::map_until(
        &parts,
        1,
        |desk: &mut Desk, position, ids| desk.read(chain, &name, 1 + position * each, ids),
        |stretch| !matches!(stretch.end, End::AsksParent),
    ));
    let layers: Vec<Layer> =
        stretches.iter_mut().flat_map(|stretch| mem::take(&mut stretch.layers)).collect();
    let dir = || chain.snapshot(id).path().to_owned();
    let end = match stretches.last_mut().map(|last| mem::replace(&mut last.end, End::Answered)) {
        Some(End::Failed(error)) if layers.is_empty() => return Err(error),
        _ if layers.is_empty() => {
            let (kind, number) = memory.sent_pagemap();
            return Err(match chain.images(id).stat(&kind.file_name(number)) {
                Ok(_) => ChainError::PagesElsewhere { dir: dir(), memory },
                Err(_) => ChainError::NoMemory { dir: dir(), memory },
            });
        }
        Some(End::Failed(error)) => Err(error),
        Some(End::AsksParent) if layers.len() >= piece::LAYER_LIMIT => {
            Err(ChainError::TooDeep { dir: dir(), limit: piece::LAYER_LIMIT })
        }
        Some(End::AsksParent) => end,
        // The layer above a missing one gets no answer.
        Some(End::Answered | End::Missing) | None => Ok(()),
    };
    Ok(ReadLayers { layers: Layers { layers, stretches }, end })
}

/// Returns all ancestors of a snapshot, from its parent down, and the error of the last
/// link.
pub(super) fn ancestors(chain: &Chain, id: SnapshotId) -> (Vec<SnapshotId>, Result<()>) {
    let mut ancestors = Vec::new();
    let mut next = id;
    loop {
        next = match &chain.snapshot(next).parent {
            Ok(Some(parent)) if ancestors.len() + 1 < piece::LAYER_LIMIT => *parent,
            Ok(_) => return (ancestors, Ok(())),
            Err(link) => return (ancestors, Err(link.clone().into())),
        };
        ancestors.push(next);
    }
}

/// What comes after the last layer of a stretch.
enum End {
    /// The layer asks its parent for pages.
    AsksParent,
    /// Nothing: the layer asks for no more pages.
    Answered,
    /// A snapshot that does not have this memory.
    Missing,
    /// An unreadable pagemap.
    Failed(ChainError),
}

/// Consecutive layers, merged while they were read.
struct Stretch {
    layers: Vec<Layer>,
    /// The number of the lowest layer; if there is none, of the layer above.
    lowest: u32,
    pieces: Vec<Piece>,
    gaps: Gaps,
    end: End,
}

impl Stretch {
    fn map(&self) -> Merged<'_> {
        Merged { pieces: &self.pieces, gaps: self.gaps, lowest: self.lowest }
    }
}

/// Memory in which stretches of pagemaps are read and merged, one after another.
#[derive(Default)]
struct Desk {
    buffer: Vec<u8>,
    pile: Pile,
}

impl Desk {
    /// Reads the pagemaps `name` of the snapshots `ids` as layers, numbered from `first`
    /// on.
    fn read(&mut self, chain: &Chain, name: &str, first: usize, ids: &[SnapshotId]) -> Stretch {
        let first = u32::try_from(first).expect("layers are numbered by u32");
        let mut layers = Vec::with_capacity(ids.len());
        let mut lowest = first.saturating_sub(1);
        let mut end = End::AsksParent;
        for (layer, id) in (first..).zip(ids) {
            match self.read_layer(chain, name, *id, layer) {
                Ok(Some((read, asks_parent))) => {
                    layers.push(read);
                    lowest = layer;
                    if asks_parent {
                        continue;
                    }
                    end = End::Answered;
                }
                Ok(None) => end = End::Missing,
                Err(error) => end = End::Failed(error),
            }
            break;
        }
        let (pieces, gaps) = self.pile.merge();
        Stretch { layers, lowest, pieces, gaps, end }
    }

    /// Reads the pagemap `name` of the snapshot `id` as layer `layer` and adds it to the
    /// pile. Returns the layer, and whether it asks its parent for pages; `None` if the
    /// snapshot has no such pagemap.
    fn read_layer(
        &mut self,
        chain: &Chain,
        name: &str,
        id: SnapshotId,
        layer: u32,
    ) -> Result<Option<(Layer, bool)>> {
        let images = chain.images(id);
        let mut reader = match images.pagemap_through(name, &mut self.buffer) {
            Ok(reader) => reader,
            Err(error) if error.is_missing() => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let pages_id = reader.pages_id();
        let pages = Kind::Pages.file_name(pages_id.into());
        let dense = images.stat(&pages).is_ok_and(|stat| stat.is_dense());
        let file = chain.files().enter(images, &pages);
        // Reserves the largest possible size at once: growing costs more than filling.
        let make_room = |pile: &mut Pile, pieces, reader: &PagemapReader<_>| {
            pile.make_room(pieces).map_err(|_| reader.out_of_memory())
        };
        make_room(&mut self.pile, reader.entries_left(), &reader)?;
        let gone = punched::read(&**images, name, pages_id)?.unwrap_or_default();
        let (mut pages, mut asks_parent) = (0, false);
        while let Some(entry) = reader.next() {
            let entry = entry?;
            // The reader's estimate may be too low.
            make_room(&mut self.pile, 1, &reader)?;
            pieces(layer, pages, &entry, &gone, |piece| self.pile.push(piece));
            match entry.presence {
                Presence::Present => pages += entry.pages,
                Presence::Parent => asks_parent = true,
                Presence::Absent => {}
            }
        }
        self.pile.close(layer);
        Ok(Some((Layer { snapshot: id, pages_id, pages, file, dense }, asks_parent)))
    }
}

/// Passes the pieces of an entry of layer `layer` to `put`. The entry begins at page
/// `file_page` of its file, of which the pages `gone` were freed.
pub(super) fn pieces(
    layer: u32,
    file_page: u64,
    entry: &PagemapEntry,
    gone: &PageRanges,
    mut put: impl FnMut(Piece),
) {
    let pages = file_page..file_page + entry.pages;
    let mut part = |pages: Range<u64>, place| {
        let first = PageIndex(entry.first.0 + (pages.start - file_page));
        put(Piece::new(first, pages.end - pages.start, place, entry.lazy));
    };
    match entry.presence {
        Presence::Present if gone.is_empty() => {
            part(pages, PiecePlace::Stored { layer, file_page })
        }
        Presence::Present => {
            for (pages, gone) in gone.split(pages) {
                let file_page = pages.start;
                let place = if gone {
                    PiecePlace::Punched { layer, file_page }
                } else {
                    PiecePlace::Stored { layer, file_page }
                };
                part(pages, place);
            }
        }
        // Pages that are not in the file cannot have been freed in it.
        Presence::Parent => part(pages, PiecePlace::Parent),
        Presence::Absent => part(pages, PiecePlace::Absent),
    }
}

const _: () = assert!(mem::size_of::<Piece>() == 24);
