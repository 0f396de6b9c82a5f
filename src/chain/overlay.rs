//! Laying the pagemaps of a chain over one another.
//!
//! A pagemap is a partial map from pages to places, in which `PARENT` stands
//! for whatever the map below says. Laying one over another is associative, so
//! a chain is merged like a sorted list: in halves of equal weight. Every merge
//! is one pass over two sorted arrays, and an entry takes part in a number of
//! them that is logarithmic in the number of entries, however deep the chain.

use crate::units::PageIndex;

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

/// A stretch of pages that are in the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) first: PageIndex,
    pub(super) pages: u64,
    pub(super) place: PiecePlace,
    pub(super) lazy: bool,
}

impl Piece {
    pub(super) fn end(&self) -> u64 {
        self.first.0 + self.pages
    }

    /// Returns the part of the piece in `[first, end)`, which lies within it.
    fn clip(&self, first: u64, end: u64) -> Self {
        let place = match self.place {
            PiecePlace::Stored { layer, file_page } => {
                PiecePlace::Stored { layer, file_page: file_page + (first - self.first.0) }
            }
            place => place,
        };
        Self { first: PageIndex(first), pages: end - first, place, lazy: self.lazy }
    }

    /// Whether `next` goes on where this piece ends, in the same place.
    fn continues(&self, next: &Self) -> bool {
        let same_place = match (self.place, next.place) {
            (
                PiecePlace::Stored { layer, file_page },
                PiecePlace::Stored { layer: next_layer, file_page: next_page },
            ) => layer == next_layer && file_page.checked_add(self.pages) == Some(next_page),
            (a, b) => a == b,
        };
        same_place && self.lazy == next.lazy && self.end() == next.first.0
    }
}

/// Appends a piece, joining it to the last where it continues it.
pub(super) fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    match pieces.last_mut() {
        Some(last) if last.continues(&piece) => last.pages += piece.pages,
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
    merge_range(&mut layers, &weights, 0)
}

/// Merges `layers`, the first of which has number `first` in the whole chain;
/// `weights[n]` is what the layers before the chain's n-th weigh together.
fn merge_range(layers: &mut [Vec<Piece>], weights: &[usize], first: usize) -> Vec<Piece> {
    match layers {
        [] => Vec::new(),
        [only] => std::mem::take(only),
        _ => {
            let count = layers.len();
            let middle = usize::midpoint(weights[first], weights[first + count]);
            let split = weights[first..first + count].partition_point(|w| *w < middle);
            let split = split.clamp(1, count - 1);
            let (upper, lower) = layers.split_at_mut(split);
            let upper = merge_range(upper, weights, first);
            let lower = merge_range(lower, weights, first + split);
            let lowest = u32::try_from(first + split - 1).expect("layers are numbered by u32");
            overlay(&upper, &lower, lowest)
        }
    }
}

/// Lays `upper` over `lower`; `layer` is the lowest layer in `upper`.
fn overlay(upper: &[Piece], lower: &[Piece], layer: u32) -> Vec<Piece> {
    let mut merged = Vec::with_capacity(upper.len());
    let mut below = lower;
    for piece in upper {
        if piece.place != PiecePlace::Parent {
            push(&mut merged, *piece);
            continue;
        }
        let mut next = piece.first.0;
        let missing = |from: u64, to: u64| Piece {
            first: PageIndex(from),
            pages: to - from,
            place: PiecePlace::Missing { layer },
            lazy: piece.lazy,
        };
        below = &below[skip_to(below, next)..];
        for candidate in below {
            if candidate.first.0 >= piece.end() {
                break;
            }
            let from = candidate.first.0.max(next);
            if from > next {
                push(&mut merged, missing(next, from));
            }
            next = candidate.end().min(piece.end());
            let answer = candidate.clip(from, next);
            // Whether a page may come later is the snapshot's own affair, unless
            // it has no choice.
            let own = answer.place == PiecePlace::Absent;
            let lazy = if own { answer.lazy } else { piece.lazy };
            push(&mut merged, Piece { lazy, ..answer });
        }
        if next < piece.end() {
            push(&mut merged, missing(next, piece.end()));
        }
    }
    merged
}

/// Returns the position of the first piece that ends after `page`, galloping:
/// most often it is near, and sometimes very far.
fn skip_to(pieces: &[Piece], page: u64) -> usize {
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
            push(&mut pieces, Piece { first, pages: *pages, place, lazy: *lazy });
        }
        pieces
    }

    fn pages(pieces: &[Piece]) -> BTreeMap<u64, Page> {
        let single = |piece: &Piece, page| {
            let clipped = piece.clip(page, page + 1);
            (page, (clipped.place, clipped.lazy))
        };
        pieces.iter().flat_map(|p| (p.first.0..p.end()).map(|page| single(p, page))).collect()
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
        fn merged_layers_answer_as_layer_by_layer(layers in layers()) {
            let maps: Vec<_> = layers.iter().map(|layer| pages(layer)).collect();
            let merged = merge(layers);
            for pair in merged.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].first.0);
                prop_assert!(!pair[0].continues(&pair[1]));
            }
            let merged = pages(&merged);
            for page in 0..150 {
                prop_assert_eq!(merged.get(&page).copied(), naive(&maps, page), "page {}", page);
            }
        }
    }
}
