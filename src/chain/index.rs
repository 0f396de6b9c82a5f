//! Which bytes hold page P of memory M?

use std::{fs, mem, os::unix::fs::MetadataExt, path::Path, sync::OnceLock, time::Instant};

use super::{
    Chain, ChainError, FileId, LinkError, Result, SnapshotId,
    overlay::{self, Piece, PiecePlace},
    side_by_side,
};
use crate::{
    image::{Kind, MemoryId, PagemapEntry, PagemapReader, Presence},
    units::{BLOCK_BYTES, PageIndex},
};

/// A pages file that an index refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// The snapshot in whose directory it is.
    pub snapshot: SnapshotId,
    /// Its number there.
    pub pages_id: u32,
    /// How many pages it must hold.
    pub pages: u64,
    /// Its number in [`Chain::files`].
    pub file: FileId,
    /// Whether it took as much room as it is long when the index was built, so
    /// that it has no holes; not so a compressed one.
    pub dense: bool,
}

/// Where the pages of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the pages file of the layer at this position in [`Index::layers`],
    /// from this page of the file on.
    Stored {
        /// The layer.
        layer: u32,
        /// Pages of the file before the extent's first.
        file_page: u64,
    },
    /// In no image: reading them is an error.
    Absent,
}

/// A stretch of pages that lie in a row in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first page.
    pub first: PageIndex,
    /// How many there are, at least 1.
    pub pages: u64,
    /// Where they are.
    pub place: Place,
    /// Whether a restore may leave them for later.
    pub lazy: bool,
}

impl Extent {
    /// Returns the first page after the extent.
    pub fn end(&self) -> PageIndex {
        PageIndex(self.first.0 + self.pages)
    }
}

/// One memory of one snapshot, resolved across the snapshot's ancestors: a
/// sorted array of extents, 24 bytes each. Pages between them are zero.
///
/// Building it costs one pass over the pagemap entries of the chain; a question
/// costs a binary search, whatever the chain's depth.
#[derive(Debug)]
pub struct Index {
    memory: MemoryId,
    pages_id: u32,
    layers: Vec<Layer>,
    extents: Vec<Piece>,
    stored_pages: u64,
    flat: OnceLock<Vec<FlatExtent>>,
}

/// A stored extent's place in a pages file without parents.
#[derive(Clone, Copy, Debug)]
pub(super) struct FlatExtent {
    /// Pages of that file before the extent's.
    pub(super) before: u64,
    /// The extent's position in the index.
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
        let begin = Instant::now();
        let (layers, pieces) = read_layers(chain, id, memory)?;
        let read = begin.elapsed();
        let lowest = u32::try_from(layers.len() - 1).expect("layers are numbered by u32");
        let extents = overlay::merge(pieces);
        let mut stored_pages = 0;
        for piece in &extents {
            let misled = match piece.place() {
                PiecePlace::Stored { .. } => {
                    stored_pages += piece.pages();
                    continue;
                }
                PiecePlace::Absent => continue,
                PiecePlace::Parent => lowest,
                PiecePlace::Missing { layer } => layer,
            };
            return Err(unanswered(chain, &layers, memory, piece, misled));
        }
        log::debug!(
            "{memory} of {}: {} extents in {} layers, read in {read:?}, built in {:?}",
            chain.snapshot(id).name,
            extents.len(),
            layers.len(),
            begin.elapsed(),
        );
        let pages_id = layers[0].pages_id;
        Ok(Self { memory, pages_id, stored_pages, layers, extents, flat: OnceLock::new() })
    }

    /// Returns the memory that was resolved.
    pub fn memory(&self) -> MemoryId {
        self.memory
    }

    /// Returns the number that the snapshot's own pages file of the memory has.
    pub fn pages_id(&self) -> u32 {
        self.pages_id
    }

    /// Returns the pages files that extents may be in, the newest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Returns all extents in the order of their pages.
    pub fn extents(&self) -> impl DoubleEndedIterator<Item = Extent> + ExactSizeIterator {
        self.extents.iter().map(extent)
    }

    /// Returns the extent at `position` among them.
    pub fn extent(&self, position: usize) -> Option<Extent> {
        self.extents.get(position).map(extent)
    }

    /// Returns how many pages are stored somewhere in the chain.
    pub fn stored_pages(&self) -> u64 {
        self.stored_pages
    }

    /// Returns the stored extents one after another; made when first needed.
    pub(super) fn flat(&self) -> &[FlatExtent] {
        self.flat.get_or_init(|| {
            let mut before = 0;
            let mut flat = Vec::with_capacity(self.extents.len());
            for (position, extent) in (0..).zip(self.extents()) {
                if matches!(extent.place, Place::Stored { .. }) {
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

    /// Returns the extent that holds `page`; `None` if the page is zero.
    pub fn find(&self, page: PageIndex) -> Option<Extent> {
        self.extent(self.position(page)).filter(|extent| extent.first <= page)
    }
}

/// How many pagemaps are opened side by side.
const BATCH: usize = 256;

/// Reads the pagemaps of `memory` from the snapshot down to the one where no
/// more is asked of a parent.
///
/// Most of the time goes into opening files, so beyond the first layer they are
/// opened side by side, a batch at a time; at most one batch is read in vain.
fn read_layers(
    chain: &Chain,
    id: SnapshotId,
    memory: MemoryId,
) -> Result<(Vec<Layer>, Vec<Vec<Piece>>)> {
    let mut layers = Vec::new();
    let mut pieces = Vec::new();
    let mut batch = vec![id];
    while !batch.is_empty() {
        let dir = &chain.snapshot(batch[0]).dir;
        let first = u32::try_from(layers.len()).expect("fewer layers than snapshots");
        if layers.len() + batch.len() > overlay::LAYER_LIMIT {
            return Err(ChainError::TooDeep { dir: dir.clone(), limit: overlay::LAYER_LIMIT });
        }
        let mut asking = None;
        for (id, read) in batch.iter().zip(read_batch(chain, &batch, first, memory)) {
            asking = None;
            let Some(read) = read? else {
                if layers.is_empty() {
                    return Err(ChainError::NoMemory { dir: dir.clone(), memory });
                }
                break; // the layer above asks for pages, and will get no answer
            };
            let pages = chain.image_path(*id, Kind::Pages, read.pages_id.into());
            layers.push(Layer {
                snapshot: *id,
                pages_id: read.pages_id,
                pages: read.pages,
                file: chain.files().enter(&pages),
                dense: read.dense,
            });
            pieces.push(read.pieces);
            if !read.asks_parent {
                break;
            }
            asking = Some(*id);
        }
        batch = match asking {
            Some(id) => ancestors(chain, id)?,
            None => Vec::new(),
        };
    }
    Ok((layers, pieces))
}

/// Returns the parent of a snapshot and as many of its ancestors as make a batch;
/// a link that is broken further up is met when it is its turn.
fn ancestors(chain: &Chain, id: SnapshotId) -> Result<Vec<SnapshotId>, LinkError> {
    let mut batch = Vec::new();
    let mut next = chain.snapshot(id).parent.clone()?;
    while let Some(id) = next
        && batch.len() < BATCH
    {
        batch.push(id);
        next = chain.snapshot(id).parent.as_ref().ok().copied().flatten();
    }
    Ok(batch)
}

/// One pagemap as it was read.
struct ReadLayer {
    pages_id: u32,
    pages: u64,
    asks_parent: bool,
    dense: bool,
    pieces: Vec<Piece>,
}

/// Reads the pagemaps of the snapshots `ids` as layers from number `first` on;
/// `None` for those that have none.
fn read_batch(
    chain: &Chain,
    ids: &[SnapshotId],
    first: u32,
    memory: MemoryId,
) -> Vec<Result<Option<ReadLayer>>> {
    let name = memory.pagemap_name();
    side_by_side::map(ids, WORTH_A_THREAD, |position, id| {
        let layer = first + u32::try_from(position).expect("a batch is small");
        read_layer(&chain.snapshot(*id).dir, &name, layer)
    })
}

/// Pagemaps that take longer to open and read than a thread takes to start.
const WORTH_A_THREAD: usize = 8;

/// Reads the pagemap `name` in `dir` as layer `layer`; `None` if there is none.
fn read_layer(dir: &Path, name: &str, layer: u32) -> Result<Option<ReadLayer>> {
    let mut reader = match PagemapReader::open(&dir.join(name)) {
        Ok(reader) => reader,
        Err(error) if error.is_missing() => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let pages_id = reader.pages_id();
    let dense = fs::metadata(dir.join(Kind::Pages.file_name(pages_id.into())))
        .is_ok_and(|meta| meta.blocks().saturating_mul(BLOCK_BYTES) >= meta.len());
    // At once as large as it can become: growing it costs more than filling it.
    let pieces = Vec::with_capacity(reader.entries_left());
    let mut read = ReadLayer { pages_id, pages: 0, asks_parent: false, dense, pieces };
    for entry in reader.by_ref() {
        let entry = entry?;
        overlay::push(&mut read.pieces, piece(layer, read.pages, &entry));
        match entry.presence {
            Presence::Present => read.pages += entry.pages,
            Presence::Parent => read.asks_parent = true,
            Presence::Absent => {}
        }
    }
    read.pieces.shrink_to_fit();
    Ok(Some(read))
}

/// Returns what an entry of layer `layer` says, `file_page` pages into its file.
pub(super) fn piece(layer: u32, file_page: u64, entry: &PagemapEntry) -> Piece {
    let place = match entry.presence {
        Presence::Present => PiecePlace::Stored { layer, file_page },
        Presence::Parent => PiecePlace::Parent,
        Presence::Absent => PiecePlace::Absent,
    };
    Piece::new(entry.first, entry.pages, place, entry.lazy)
}

/// Returns the extent that a piece of a whole chain is.
fn extent(piece: &Piece) -> Extent {
    let place = match piece.place() {
        PiecePlace::Stored { layer, file_page } => Place::Stored { layer, file_page },
        // The others were found out when the index was built.
        PiecePlace::Absent | PiecePlace::Parent | PiecePlace::Missing { .. } => Place::Absent,
    };
    Extent { first: piece.first(), pages: piece.pages(), place, lazy: piece.lazy() }
}

fn unanswered(
    chain: &Chain,
    layers: &[Layer],
    memory: MemoryId,
    piece: &Piece,
    layer: u32,
) -> ChainError {
    let asking = chain.snapshot(layers[layer as usize].snapshot);
    let reason = match &asking.parent {
        Ok(None) => "it has no parent".to_owned(),
        Ok(Some(parent)) => {
            let parent = &chain.snapshot(*parent).dir;
            format!(
                "{} does not account for that page",
                parent.join(memory.pagemap_name()).display()
            )
        }
        Err(link) => link.to_string(),
    };
    ChainError::Unanswered {
        dir: asking.dir.clone(),
        memory,
        first: piece.first(),
        pages: piece.pages(),
        reason,
    }
}

const _: () = assert!(mem::size_of::<Piece>() == 24);
