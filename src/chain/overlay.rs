//! Laying the pagemaps of a chain over one another.
//!
//! A pagemap is a partial map from pages to places, in which `PARENT` stands
//! for whatever the map below says. Laying one over another is associative, so
//! a chain is merged like a sorted list: in halves of equal weight. Every merge
//! is one pass over two sorted arrays, and an entry takes part in a number of
//! them that is logarithmic in the number of entries, however deep the chain.

use crate::units::{PAGE_SHIFT, PageIndex};

/// Entries that take longer to merge, about a millisecond, than a thread takes
/// to start.
const WORTH_A_THREAD: usize = 50_000;

/// Where the pages of a piece are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PiecePlace {
    /// In a layer's pages file, from this page of the file on.
    Stored { layer: u32, file_page: u64 },
    /// Where the layer below says.
    Parent,
    /// Nowhere.
    Absent,
    /// Nowhere, although this layer's pagemap says that the layer below has
    /// them. Harmless as long as a newer layer has the pages.
    Missing { layer: u32 },
}

/// The most layers that can be told apart.
pub(super) const LAYER_LIMIT: usize = 1 << (2 * SPARE_BITS);

/// Bits of a 64-bit word that a number of pages leaves free.
const SPARE_BITS: u32 = PAGE_SHIFT;

const STORED: u64 = 0;
const PARENT: u64 = 1;
const ABSENT: u64 = 2;
const MISSING: u64 = 3;
const PLACE_MASK: u64 = 3;
const LAZY: u64 = 4;

/// A stretch of pages that are in the same place, in 24 bytes: merging is bound
/// by memory, and an index is kept as long as its file is in use.
///
/// Page numbers and counts are below 2^52. The upper bits of the first word are
/// the place's kind and whether the pages are lazy; those of the two others are
/// the lower and the upper half of the layer's number.
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
    /// Makes a piece of `pages` pages, fewer than 2^52, at a layer below
    /// [`LAYER_LIMIT`].
    pub(super) fn new(first: PageIndex, pages: u64, place: PiecePlace, lazy: bool) -> Self {
        let (kind, layer, file_page) = match place {
            PiecePlace::Stored { layer, file_page } => (STORED, layer, file_page),
            PiecePlace::Parent => (PARENT, 0, 0),
            PiecePlace::Absent => (ABSENT, 0, 0),
            PiecePlace::Missing { layer } => (MISSING, layer, 0),
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
                PiecePlace::Stored { layer: self.layer(), file_page: self.file_page & PAGE_MASK }
            }
            PARENT => PiecePlace::Parent,
            ABSENT => PiecePlace::Absent,
            _ => PiecePlace::Missing { layer: self.layer() },
        }
    }

    fn tag(&self) -> u64 {
        self.first >> PAGE_BITS
    }

    fn kind(&self) -> u64 {
        self.tag() & PLACE_MASK
    }

    fn layer(&self) -> u32 {
        let layer = self.pages >> PAGE_BITS | (self.file_page >> PAGE_BITS) << SPARE_BITS;
        u32::try_from(layer).expect("24 bits")
    }

    fn with_lazy(self, lazy: bool) -> Self {
        let tag = if lazy { LAZY } else { 0 };
        Self { first: self.first & !(LAZY << PAGE_BITS) | tag << PAGE_BITS, ..self }
    }

    /// Returns the part of the piece in `[first, end)`, which lies within it.
    fn clip(&self, first: PageIndex, end: PageIndex) -> Self {
        let skipped = first.0 - self.first().0;
        Self {
            first: self.first + skipped,
            pages: self.pages - self.pages() + (end.0 - first.0),
            file_page: self.file_page + if self.kind() == STORED { skipped } else { 0 },
        }
    }

    /// Whether `next` goes on where this piece ends, in the same place.
    fn continues(&self, next: &Self) -> bool {
        let pages = self.pages();
        // Both the first page, with the tag above it, and the layer must agree.
        let adjacent =
            self.first + pages == next.first && self.pages >> PAGE_BITS == next.pages >> PAGE_BITS;
        let in_file = if self.kind() == STORED { pages } else { 0 };
        adjacent && self.file_page + in_file == next.file_page
    }
}

/// Appends a piece, joining it to the last where it continues it.
pub(super) fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    match pieces.last_mut() {
        Some(last) if last.continues(&piece) => last.pages += piece.pages(),
        _ => pieces.push(piece),
    }
}

/// Merges layers, the newest first, into one map.
pub(super) fn merge(layers: Vec<Vec<Piece>>) -> Vec<Piece> {
    let mut weights = Vec::with_capacity(layers.len() + 1);
    weights.push(0);
    for layer in &layers {
        weights.push(weights[weights.len() - 1] + layer.len() + 1);
    }
    let mut layers = layers;
    merge_range(&mut layers, &weights, 0, &mut Spare::default())
}

/// Memory of merged layers that are no longer needed. To fault in new memory for
/// every merge takes longer than the merge itself.
#[derive(Default)]
struct Spare(Vec<Vec<Piece>>);

impl Spare {
    /// How many are kept: two at most are taken before others come.
    const KEPT: usize = 3;

    fn take(&mut self) -> Vec<Piece> {
        self.0.pop().unwrap_or_default()
    }

    fn give(&mut self, mut layer: Vec<Piece>) {
        layer.clear();
        self.0.push(layer);
        self.0.sort_unstable_by_key(Vec::capacity);
        if self.0.len() > Self::KEPT {
            self.0.remove(0);
        }
    }
}

/// Merges `layers`, the first of which has number `first` in the whole chain;
/// `weights[n]` is what the layers before the chain's n-th weigh together.
fn merge_range(
    layers: &mut [Vec<Piece>],
    weights: &[usize],
    first: usize,
    spare: &mut Spare,
) -> Vec<Piece> {
    match layers {
        [] => Vec::new(),
        [only] => std::mem::take(only),
        _ => {
            let count = layers.len();
            let middle = usize::midpoint(weights[first], weights[first + count]);
            let split = weights[first..first + count].partition_point(|w| *w < middle);
            let split = split.clamp(1, count - 1);
            let (upper, lower) = layers.split_at_mut(split);
            let weight = weights[first + count] - weights[first];
            let mut upper_half = |spare: &mut _| merge_range(upper, weights, first, spare);
            let mut lower_half = |spare: &mut _| merge_range(lower, weights, first + split, spare);
            let (upper, lower) = if weight < WORTH_A_THREAD {
                (upper_half(spare), lower_half(spare))
            } else {
                std::thread::scope(|scope| {
                    let lower = scope.spawn(|| lower_half(&mut Spare::default()));
                    (upper_half(spare), lower.join().expect("merging does not panic"))
                })
            };
            let lowest = u32::try_from(first + split - 1).expect("layers are numbered by u32");
            let merged = overlay(&upper, &lower, lowest, spare.take());
            spare.give(upper);
            spare.give(lower);
            merged
        }
    }
}

/// Lays `upper` over `lower`; `layer` is the lowest layer in `upper`. The result
/// is put into `merged`, which is empty.
fn overlay(upper: &[Piece], lower: &[Piece], layer: u32, mut merged: Vec<Piece>) -> Vec<Piece> {
    // In most cases enough: only a lower piece that is cut in two takes more.
    merged.reserve(upper.len() + lower.len());
    let mut below = lower;
    for piece in upper {
        if piece.kind() != PARENT {
            push(&mut merged, *piece);
            continue;
        }
        let mut next = piece.first();
        let missing = |from: PageIndex, to: PageIndex| {
            Piece::new(from, to.0 - from.0, PiecePlace::Missing { layer }, piece.lazy())
        };
        below = &below[skip_to(below, next)..];
        for candidate in below {
            if candidate.first() >= piece.end() {
                break;
            }
            let from = candidate.first().max(next);
            if from > next {
                push(&mut merged, missing(next, from));
            }
            next = candidate.end().min(piece.end());
            let answer = candidate.clip(from, next);
            // Whether a page may come later is the snapshot's own affair, unless
            // it has no choice.
            let own = answer.kind() == ABSENT;
            push(&mut merged, if own { answer } else { answer.with_lazy(piece.lazy()) });
        }
        if next < piece.end() {
            push(&mut merged, missing(next, piece.end()));
        }
    }
    merged
}

/// Returns the position of the first piece that ends after `page`, galloping:
/// most often it is near, and sometimes very far.
fn skip_to(pieces: &[Piece], page: PageIndex) -> usize {
    let mut step = 1;
    while step < pieces.len() && pieces[step - 1].end() <= page {
        step *= 2;
    }
    let (from, to) = (step / 2, step.min(pieces.len()));
    from + pieces[from..to].partition_point(|piece| piece.end() <= page)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// What one page of one layer is.
    type Page = (PiecePlace, bool);

    /// Random layers, the newest first, as pieces with file pages given out in
    /// order, as pagemaps have them.
    fn layers() -> impl Strategy<Value = Vec<Vec<Piece>>> {
        let entry = (0..4_u64, 1..9_u64, 0..3_u8, any::<bool>());
        let layer = prop::collection::vec(entry, 0..12);
        prop::collection::vec(layer, 1..9).prop_map(|layers| {
            layers.into_iter().zip(0..).map(|(entries, layer)| pieces(layer, &entries)).collect()
        })
    }

    fn pieces(layer: u32, entries: &[(u64, u64, u8, bool)]) -> Vec<Piece> {
        let (mut page, mut file_page) = (0, 0);
        let mut pieces = Vec::new();
        for (gap, pages, place, lazy) in entries {
            let first = PageIndex(page + gap);
            page = first.0 + pages;
            let place = match place {
                0 => {
                    file_page += pages;
                    PiecePlace::Stored { layer, file_page: file_page - pages }
                }
                1 => PiecePlace::Parent,
                _ => PiecePlace::Absent,
            };
            push(&mut pieces, Piece::new(first, *pages, place, *lazy));
        }
        pieces
    }

    fn pages(pieces: &[Piece]) -> BTreeMap<u64, Page> {
        let single = |piece: &Piece, page| {
            let clipped = piece.clip(PageIndex(page), PageIndex(page + 1));
            (page, (clipped.place(), clipped.lazy()))
        };
        pieces.iter().flat_map(|p| (p.first().0..p.end().0).map(|page| single(p, page))).collect()
    }

    /// Looks one page up, layer by layer.
    fn naive(maps: &[BTreeMap<u64, Page>], page: u64) -> Option<Page> {
        let (mut place, lazy) = *maps[0].get(&page)?;
        for (layer, map) in (0..).zip(&maps[1..]) {
            if place != PiecePlace::Parent {
                break;
            }
            match map.get(&page) {
                None => place = PiecePlace::Missing { layer },
                Some((PiecePlace::Absent, below)) => {
                    return Some((PiecePlace::Absent, *below));
                }
                Some((below, _)) => place = *below,
            }
        }
        Some((place, lazy))
    }

    proptest! {
        #[test]
        fn a_piece_gives_back_what_it_was_made_of(
            first in 0..1_u64 << 51,
            pages in 1..1_u64 << 51,
            file_page in 0..1_u64 << 51,
            layer in 0..1_u32 << 24,
            kind in 0..4_u8,
            lazy: bool,
        ) {
            let place = match kind {
                0 => PiecePlace::Stored { layer, file_page },
                1 => PiecePlace::Parent,
                2 => PiecePlace::Absent,
                _ => PiecePlace::Missing { layer },
            };
            let piece = Piece::new(PageIndex(first), pages, place, lazy);
            prop_assert_eq!(piece.first(), PageIndex(first));
            prop_assert_eq!(piece.pages(), pages);
            prop_assert_eq!(piece.place(), place);
            prop_assert_eq!(piece.lazy(), lazy);
            prop_assert_eq!(piece.with_lazy(!lazy).with_lazy(lazy), piece);
            prop_assert_eq!(piece.clip(PageIndex(first), PageIndex(first + pages)), piece);
        }

        #[test]
        fn merged_layers_answer_as_layer_by_layer(layers in layers()) {
            let maps: Vec<_> = layers.iter().map(|layer| pages(layer)).collect();
            let merged = merge(layers);
            for pair in merged.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].first());
                prop_assert!(!pair[0].continues(&pair[1]));
            }
            let merged = pages(&merged);
            for page in 0..150 {
                prop_assert_eq!(merged.get(&page).copied(), naive(&maps, page), "page {}", page);
            }
        }
    }
}
