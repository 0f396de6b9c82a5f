//! Which bytes hold page P of memory M?

use std::mem;

use super::{
    Chain, ChainError, FileId, Result, SnapshotId,
    overlay::{self, Piece, PiecePlace},
};
use crate::{
    image::{ImageError, Kind, MemoryId, PagemapEntry, PagemapReader, Presence},
    units::PageIndex,
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
        let (layers, pieces) = read_layers(chain, id, memory)?;
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
        Ok(Self { memory, pages_id: layers[0].pages_id, stored_pages, layers, extents })
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

    /// Returns the position of the first extent that ends after `page`.
    pub fn position(&self, page: PageIndex) -> usize {
        self.extents.partition_point(|piece| piece.end() <= page)
    }

    /// Returns the extent that holds `page`; `None` if the page is zero.
    pub fn find(&self, page: PageIndex) -> Option<Extent> {
        self.extent(self.position(page)).filter(|extent| extent.first <= page)
    }
}

/// Reads the pagemaps of `memory` from the snapshot down to the one where no
/// more is asked of a parent.
fn read_layers(
    chain: &Chain,
    id: SnapshotId,
    memory: MemoryId,
) -> Result<(Vec<Layer>, Vec<Vec<Piece>>)> {
    let mut layers = Vec::new();
    let mut pieces = Vec::new();
    let mut next = Some(id);
    while let Some(id) = next.take() {
        let dir = &chain.snapshot(id).dir;
        let number = u32::try_from(layers.len()).expect("fewer layers than snapshots");
        if layers.len() == overlay::LAYER_LIMIT {
            return Err(ChainError::TooDeep { dir: dir.clone(), limit: overlay::LAYER_LIMIT });
        }
        let mut reader = match PagemapReader::open(&dir.join(memory.pagemap_name())) {
            Ok(reader) => reader,
            Err(ImageError::Open { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound && layers.is_empty() =>
            {
                return Err(ChainError::NoMemory { dir: dir.clone(), memory });
            }
            Err(ImageError::Open { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                break; // the layer above asks for pages, and will get no answer
            }
            Err(error) => return Err(error.into()),
        };
        let mut pages = 0;
        let mut asks_parent = false;
        let mut layer = Vec::new();
        for entry in reader.by_ref() {
            let entry = entry?;
            overlay::push(&mut layer, piece(number, pages, &entry));
            match entry.presence {
                Presence::Present => pages += entry.pages,
                Presence::Parent => asks_parent = true,
                Presence::Absent => {}
            }
        }
        let pages_id = reader.pages_id();
        let file = chain.files().enter(&chain.image_path(id, Kind::Pages, pages_id.into()));
        layers.push(Layer { snapshot: id, pages_id, pages, file });
        pieces.push(layer);
        if asks_parent {
            next = chain.snapshot(id).parent.clone()?;
        }
    }
    Ok((layers, pieces))
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
