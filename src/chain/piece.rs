//! Runs of pages in one place, of which the maps of layers and indexes consist.

use crate::units::{PAGE_SHIFT, PageIndex};

/// Where the pages of a piece are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PiecePlace {
    /// In a layer's pages file, from this page of the file on.
    Stored { layer: u32, file_page: u64 },
    /// Freed.
    Punched { layer: u32, file_page: u64 },
    /// Where the layer below has them.
    Parent,
    /// In no image.
    Absent,
    /// In no image, although the pagemap of this layer says that the layer below has them.
    /// Harmless if a newer layer has the pages.
    Missing { layer: u32 },
    /// In no image, and never claimed to be. Only maps with [`Gaps::Parent`] have such
    /// pieces.
    Nothing,
}

/// What a gap between the pieces of a map means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gaps {
    /// No image has the pages, as in a pagemap.
    Nothing,
    /// The pages are where the layer below has them.
    Parent,
}

/// The highest possible number of layers.
pub(super) const LAYER_LIMIT: usize = 1 << (2 * SPARE_BITS);

/// The bits of a 64-bit word that a page count leaves unused.
const SPARE_BITS: u32 = PAGE_SHIFT;

/// Values of [`Piece::kind`].
const STORED: u64 = 0;
pub(super) const PARENT: u64 = 1;
pub(super) const ABSENT: u64 = 2;
const MISSING: u64 = 3;
pub(super) const NOTHING: u64 = 4;
const PLACE_MASK: u64 = 7;

/// Bits beside the kind.
const LAZY: u64 = 8;
/// Stored pages that were freed; they keep their place in the file.
const PUNCHED: u64 = 16;

/// A run of pages in the same place, in 24 bytes: merging is bound by memory bandwidth, and
/// an index stays in memory while its file is in use.
///
/// Page numbers and counts are below 2^52. The upper bits of the first word hold the kind
/// of the place, whether the pages are lazy, and whether they were freed. Those of the
/// other two words hold the lower and the upper half of the layer's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    first: u64,
    pages: u64,
    file_page: u64,
}

const PAGE_BITS: u32 = u64::BITS - SPARE_BITS;
const PAGE_MASK: u64 = (1 << PAGE_BITS) - 1;
const HALF_LAYER_MASK: u64 = (1 << SPARE_BITS) - 1;

impl Piece {
    /// A piece from `first` to `end` whose pages are not in a file.
    pub(super) fn between(first: PageIndex, end: PageIndex, place: PiecePlace, lazy: bool) -> Self {
        Self::new(first, end.0 - first.0, place, lazy)
    }

    /// A piece of `pages` pages, fewer than 2^52, in a layer below [`LAYER_LIMIT`].
    pub(super) fn new(first: PageIndex, pages: u64, place: PiecePlace, lazy: bool) -> Self {
        let (kind, layer, file_page) = match place {
            PiecePlace::Stored { layer, file_page } => (STORED, layer, file_page),
            PiecePlace::Punched { layer, file_page } => (STORED | PUNCHED, layer, file_page),
            PiecePlace::Parent => (PARENT, 0, 0),
            PiecePlace::Absent => (ABSENT, 0, 0),
            PiecePlace::Missing { layer } => (MISSING, layer, 0),
            PiecePlace::Nothing => (NOTHING, 0, 0),
        };
        let tag = kind | if lazy { LAZY } else { 0 };
        let layer = u64::from(layer);
        debug_assert!((first.0 | pages | file_page) <= PAGE_MASK, "pages are below 2^52");
        Self {
            first: first.0 | tag << PAGE_BITS,
            pages: pages | (layer & HALF_LAYER_MASK) << PAGE_BITS,
            file_page: file_page | (layer >> SPARE_BITS) << PAGE_BITS,
        }
    }

    pub(super) fn first(&self) -> PageIndex {
        PageIndex(self.first & PAGE_MASK)
    }

    pub(super) fn pages(&self) -> u64 {
        self.pages & PAGE_MASK
    }

    pub(super) fn end(&self) -> PageIndex {
        PageIndex(self.first().0 + self.pages())
    }

    pub(super) fn lazy(&self) -> bool {
        self.tag() & LAZY != 0
    }

    pub(super) fn place(&self) -> PiecePlace {
        match self.kind() {
            STORED => {
                let (layer, file_page) = (self.layer(), self.file_page & PAGE_MASK);
                if self.tag() & PUNCHED == 0 {
                    PiecePlace::Stored { layer, file_page }
                } else {
                    PiecePlace::Punched { layer, file_page }
                }
            }
            PARENT => PiecePlace::Parent,
            ABSENT => PiecePlace::Absent,
            NOTHING => PiecePlace::Nothing,
            _ => PiecePlace::Missing { layer: self.layer() },
        }
    }

    pub(super) fn tag(&self) -> u64 {
        self.first >> PAGE_BITS
    }

    pub(super) fn kind(&self) -> u64 {
        self.tag() & PLACE_MASK
    }

    fn layer(&self) -> u32 {
        let layer = self.pages >> PAGE_BITS | (self.file_page >> PAGE_BITS) << SPARE_BITS;
        u32::try_from(layer).expect("24 bits")
    }

    /// Whether it is stored or freed, and not lazy.
    pub(super) fn is_stored(&self) -> bool {
        self.tag() & !PUNCHED == STORED
    }

    /// Whether it means the same as a gap of [`Gaps::Parent`].
    pub(super) fn is_gap(&self) -> bool {
        self.tag() == PARENT
    }

    pub(super) fn with_lazy(self, lazy: bool) -> Self {
        let tag = if lazy { LAZY } else { 0 };
        Self { first: self.first & !(LAZY << PAGE_BITS) | tag << PAGE_BITS, ..self }
    }

    /// Returns the part of the piece in `[first, end)`, a range within it.
    pub(super) fn clip(&self, first: PageIndex, end: PageIndex) -> Self {
        let skipped = first.0 - self.first().0;
        Self {
            first: self.first + skipped,
            pages: self.pages - self.pages() + (end.0 - first.0),
            file_page: self.file_page + if self.kind() == STORED { skipped } else { 0 },
        }
    }

    /// Whether `next` continues this piece in the same place.
    pub(super) fn continues(&self, next: &Self) -> bool {
        let pages = self.pages();
        // The first page with the tag in its upper bits, and the layer, must both match.
        let adjacent =
            self.first + pages == next.first && self.pages >> PAGE_BITS == next.pages >> PAGE_BITS;
        let in_file = if self.kind() == STORED { pages } else { 0 };
        adjacent && self.file_page + in_file == next.file_page
    }
}

/// Appends a piece, merging it into the last one if it continues that.
pub(super) fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    push_after(pieces, 0, piece);
}

/// Like [`push`], but never merges into `pieces[..kept]`.
pub(super) fn push_after(pieces: &mut Vec<Piece>, kept: usize, piece: Piece) {
    match pieces[kept..].last_mut() {
        Some(last) if last.continues(&piece) => last.pages += piece.pages(),
        _ => pieces.push(piece),
    }
}
