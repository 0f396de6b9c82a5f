//! Overlays the pagemaps of a chain.
//!
//! A pagemap is a partial map from pages to places, in which `PARENT` stands for the map
//! below. Overlaying is associative, so a chain is merged like a sorted list: neighbours in
//! pairs, then pairs of pairs. Every merge is one pass over two sorted arrays, and the
//! number of merges that an entry takes part in is logarithmic in the number of layers.
//!
//! Most entries of a deep chain are `PARENT`. So maps are merged in a form in which the
//! gaps between pieces mean `PARENT`, and explicit pieces mean that there is nothing. That
//! form has at most half as many pieces.
//!
//! The merge goes through the pages window by window; a window has as many entries as fit
//! into a processor's cache. So merging needs little memory, always the same, and several
//! processors can share the windows.

use std::{collections::TryReserveError, mem};

use super::piece::{ABSENT, Gaps, NOTHING, PARENT, Piece, PiecePlace, push, push_after};
use crate::{parallel, units::PageIndex};

/// With this many entries, merging takes about a millisecond, longer than starting a
/// thread.
const WORTH_A_THREAD: usize = 50_000;

/// How many entries are merged at a time: 24 bytes each, twice.
const WINDOW_PIECES: usize = 16 << 10;

/// How many entries are sampled to choose the ends of windows.
const WINDOW_SAMPLES: usize = 16;

/// How many entries can be merged in the time that it takes to find where a window begins
/// in a layer.
const LOOK_PIECES: usize = 4;

/// Consecutive layers, merged into one map.
#[derive(Clone, Copy, Debug)]
pub(super) struct Merged<'a> {
    /// Their pieces.
    pub(super) pieces: &'a [Piece],
    /// What the gaps between the pieces mean.
    pub(super) gaps: Gaps,
    /// The number of the lowest layer.
    pub(super) lowest: u32,
}

/// Merges layers, the newest first, into one map with [`Gaps::Nothing`].
pub(super) fn merge(layers: &[Merged]) -> Vec<Piece> {
    // Every window needs a lookup in every layer.
    merge_by_windows(layers, WINDOW_PIECES.max(layers.len() * LOOK_PIECES))
}

/// Like [`merge`], in windows of about `target` pieces.
fn merge_by_windows(layers: &[Merged], target: usize) -> Vec<Piece> {
    // A gap in the newest layer means that no image has the pages.
    let Some(top) = layers.first() else { return Vec::new() };
    let (begin, end) = match (top.gaps, top.pieces.first(), top.pieces.last()) {
        (Gaps::Parent, ..) => (PageIndex(0), PageIndex::END),
        (Gaps::Nothing, Some(first), Some(last)) => (first.first(), last.end()),
        (Gaps::Nothing, ..) => return Vec::new(),
    };
    let total: usize = layers.iter().map(|layer| layer.pieces.len()).sum();
    let mut bounds = vec![begin];
    bounds.extend(inner_bounds(layers, total, target));
    bounds.retain(|page| (begin..end).contains(page));
    bounds.push(end);
    bounds.sort_unstable();
    bounds.dedup();
    let windows: Vec<(PageIndex, PageIndex)> = bounds.windows(2).map(|b| (b[0], b[1])).collect();
    let threads = parallel::processors_for(total / WORTH_A_THREAD);
    let shares: Vec<_> = windows.chunks(windows.len().div_ceil(threads)).collect();
    let mut parts = parallel::map(&shares, 1, |position, windows| {
        // Usually enough; untouched memory costs nothing.
        let mut merged = Vec::with_capacity(if position == 0 { total } else { total / threads });
        let mut pile = Pile::default();
        let mut rests: Vec<&[Piece]> = layers.iter().map(|layer| layer.pieces).collect();
        for (from, to) in *windows {
            pile.load(layers, &mut rests, *from, *to);
            pile.merge_into(*from, *to, &mut merged);
        }
        merged
    })
    .into_iter();
    let mut all = parts.next().unwrap_or_default();
    for part in parts {
        if let Some((first, rest)) = part.split_first() {
            push(&mut all, *first);
            all.extend_from_slice(rest);
        }
    }
    all.shrink_to_fit();
    all
}

/// Returns pages that divide the layers, `total` pieces in all, into windows of about
/// `target` pieces; unsorted.
fn inner_bounds(layers: &[Merged], total: usize, target: usize) -> Vec<PageIndex> {
    if total < 2 * target {
        return Vec::new();
    }
    let pieces = layers.iter().flat_map(|layer| layer.pieces);
    let mut samples: Vec<PageIndex> =
        pieces.step_by(target.div_ceil(WINDOW_SAMPLES)).map(Piece::first).collect();
    samples.sort_unstable();
    samples.into_iter().step_by(WINDOW_SAMPLES).collect()
}

/// Layers in a pile that have been merged into one.
#[derive(Debug)]
struct Stretch {
    /// Its end in the pile; it begins where the previous stretch ends.
    end: usize,
    /// The number of its lowest layer.
    lowest: u32,
}

/// A pile of layers that are to be merged, with its memory. Faulting in new memory takes
/// longer than merging, so a pile is reused.
#[derive(Debug, Default)]
pub(super) struct Pile {
    pieces: Vec<Piece>,
    stretches: Vec<Stretch>,
    next_pieces: Vec<Piece>,
    next_stretches: Vec<Stretch>,
}

impl Pile {
    /// Reserves memory for more pieces.
    ///
    /// # Errors
    /// Memory is exhausted.
    pub(super) fn make_room(&mut self, pieces: usize) -> Result<(), TryReserveError> {
        self.pieces.try_reserve(pieces)
    }

    /// Appends a piece to the lowest layer, which is open.
    pub(super) fn push(&mut self, piece: Piece) {
        let begun = self.begun();
        push_after(&mut self.pieces, begun, piece);
    }

    /// Closes the lowest layer, number `layer`; the next piece begins the layer below.
    pub(super) fn close(&mut self, layer: u32) {
        self.stretches.push(Stretch { end: self.pieces.len(), lowest: layer });
    }

    /// Merges all closed layers and takes them off the pile; discards the open one.
    pub(super) fn merge(&mut self) -> (Vec<Piece>, Gaps) {
        self.pieces.truncate(self.begun());
        if self.stretches.len() <= 1 {
            self.stretches.clear();
            // It may have millions of pieces.
            let mut only = mem::take(&mut self.pieces);
            only.shrink_to_fit();
            return (only, Gaps::Nothing);
        }
        self.leave_gaps_to_parents();
        self.merge_all();
        let merged = self.pieces.clone();
        self.clear();
        (merged, Gaps::Parent)
    }

    /// Brings all layers, which are as pushed, into the form that is merged.
    fn leave_gaps_to_parents(&mut self) {
        self.next_pieces.clear();
        let mut begin = 0;
        for stretch in &mut self.stretches {
            let pieces = self.pieces[begin..stretch.end].iter().copied();
            leave_gaps_to_parent(pieces, PageIndex(0), PageIndex::END, &mut self.next_pieces);
            begin = mem::replace(&mut stretch.end, self.next_pieces.len());
        }
        mem::swap(&mut self.pieces, &mut self.next_pieces);
    }

    /// Returns where the open layer begins.
    fn begun(&self) -> usize {
        self.stretches.last().map_or(0, |stretch| stretch.end)
    }

    fn clear(&mut self) {
        self.pieces.clear();
        self.stretches.clear();
    }

    fn merge_all(&mut self) {
        while self.stretches.len() > 1 {
            self.merge_pairs();
        }
    }

    /// Merges all layers, which are of the window `[from, to)`, appends them to `merged`
    /// with [`Gaps::Nothing`] and takes them off the pile.
    fn merge_into(&mut self, from: PageIndex, to: PageIndex, merged: &mut Vec<Piece>) {
        self.merge_all();
        let mut next = from;
        let end = Piece::between(to, to, PiecePlace::Nothing, false);
        for piece in self.pieces.iter().chain([&end]) {
            if piece.first() > next {
                push(merged, Piece::between(next, piece.first(), PiecePlace::Parent, false));
            }
            next = piece.end();
            if piece.kind() != NOTHING {
                push(merged, *piece);
            }
        }
        self.clear();
    }

    /// Piles up the pieces of `layers` in the window `[from, to)`. Windows must ascend from
    /// call to call; `rests` are the pieces of each layer that do not end before the
    /// window.
    fn load(&mut self, layers: &[Merged], rests: &mut [&[Piece]], from: PageIndex, to: PageIndex) {
        for (layer, rest) in layers.iter().zip(rests) {
            let begun = self.pieces.len();
            let inside = parts(rest, from, to);
            match layer.gaps {
                Gaps::Nothing => leave_gaps_to_parent(inside, from, to, &mut self.pieces),
                Gaps::Parent => self.pieces.extend(inside),
            }
            // A layer that leaves the whole window to its parent changes nothing.
            if self.pieces.len() == begun
                && let Some(above) = self.stretches.last_mut()
            {
                above.lowest = layer.lowest;
                continue;
            }
            self.close(layer.lowest);
        }
    }

    /// Merges every second stretch with the one below it.
    fn merge_pairs(&mut self) {
        self.next_pieces.clear();
        self.next_stretches.clear();
        let mut begin = 0;
        for pair in self.stretches.chunks(2) {
            let (upper, lower) = (&pair[0], pair.last().unwrap_or(&pair[0]));
            let above = &self.pieces[begin..upper.end];
            let kept = self.next_pieces.len();
            if pair.len() == 1 {
                self.next_pieces.extend_from_slice(above);
            } else {
                let below = &self.pieces[upper.end..lower.end];
                overlay(above, below, upper.lowest, kept, &mut self.next_pieces);
            }
            begin = lower.end;
            self.next_stretches.push(Stretch { end: self.next_pieces.len(), lowest: lower.lowest });
        }
        mem::swap(&mut self.pieces, &mut self.next_pieces);
        mem::swap(&mut self.stretches, &mut self.next_stretches);
    }
}

/// Converts `pieces` of a map with [`Gaps::Nothing`], in `[from, to)`, to [`Gaps::Parent`],
/// and appends them to `merged`.
fn leave_gaps_to_parent(
    pieces: impl Iterator<Item = Piece>,
    from: PageIndex,
    to: PageIndex,
    merged: &mut Vec<Piece>,
) {
    let mut next = from;
    for piece in pieces {
        if piece.first() > next {
            merged.push(Piece::between(next, piece.first(), PiecePlace::Nothing, false));
        }
        next = piece.end();
        if !piece.is_gap() {
            merged.push(piece);
        }
    }
    if next < to {
        merged.push(Piece::between(next, to, PiecePlace::Nothing, false));
    }
}

/// Overlays `upper` on `lower`, both with [`Gaps::Parent`], and appends the result to
/// `merged`, of which it leaves the first `kept` pieces alone. `layer` is the lowest layer
/// in `upper`.
fn overlay(upper: &[Piece], lower: &[Piece], layer: u32, kept: usize, merged: &mut Vec<Piece>) {
    // Usually enough: only cutting a lower piece in two needs more.
    merged.reserve(upper.len() + lower.len());
    let (mut above, mut below) = (upper, lower);
    let mut next = PageIndex(0);
    loop {
        pass_apart(&mut above, &mut below, next, merged);
        let Some((piece, rest)) = above.split_first() else { break };
        above = rest;
        for part in parts(&mut below, next, piece.first()) {
            show(part, layer, false, kept, merged);
        }
        next = piece.end();
        if piece.kind() != PARENT {
            push_after(merged, kept, *piece);
            continue;
        }
        // An explicit piece that leaves pages to the parent may follow.
        let mut begin = piece.first();
        for part in parts(&mut below, begin, next) {
            if part.first() > begin {
                push_after(merged, kept, piece.clip(begin, part.first()));
            }
            begin = part.end();
            show(part, layer, true, kept, merged);
        }
        if begin < next {
            push_after(merged, kept, piece.clip(begin, next));
        }
    }
    for part in parts(&mut below, next, PageIndex::END) {
        show(part, layer, false, kept, merged);
    }
}

/// Appends the pieces of both maps in page order, and takes them off, while they are stored
/// and do not overlap; the lower map counts from `next` on. That holds for nearly all. No
/// two can be merged: they are of different layers, or were merged before.
fn pass_apart(
    above: &mut &[Piece],
    below: &mut &[Piece],
    next: PageIndex,
    merged: &mut Vec<Piece>,
) {
    let first = |map: &[Piece]| map.first().map_or(PageIndex::END, Piece::first);
    let mut pass = |map: &mut &[Piece], end: PageIndex| {
        let passing = map.iter().take_while(|piece| piece.is_stored() && piece.end() <= end);
        let (passing, rest) = map.split_at(passing.count());
        merged.extend_from_slice(passing);
        *map = rest;
        !passing.is_empty()
    };
    while first(below) >= next {
        let passed = pass(above, first(below));
        if !pass(below, first(above)) && !passed {
            break;
        }
    }
}

/// Returns the pieces in `[from, to)`, and takes off those that end before it.
fn parts<'a>(
    pieces: &mut &'a [Piece],
    from: PageIndex,
    to: PageIndex,
) -> impl Iterator<Item = Piece> + use<'a> {
    *pieces = &pieces[skip_to(pieces, from)..];
    let inside = pieces.iter().take_while(move |piece| from < to && piece.first() < to);
    inside.map(move |piece| piece.clip(piece.first().max(from), piece.end().min(to)))
}

/// Appends what a layer has for pages that the layers above, down to layer `layer`, leave
/// to it. The snapshot decides whether they are `lazy`, unless it has no choice.
fn show(part: Piece, layer: u32, lazy: bool, kept: usize, merged: &mut Vec<Piece>) {
    let shown = match part.kind() {
        ABSENT => part,
        NOTHING => {
            let place = PiecePlace::Missing { layer };
            Piece::between(part.first(), part.end(), place, lazy)
        }
        _ => part.with_lazy(lazy),
    };
    if !shown.is_gap() {
        push_after(merged, kept, shown);
    }
}

/// Returns the position of the first piece that ends after `page`, by galloping search:
/// usually it is near, and sometimes very far.
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

    /// The state of one page in one layer.
    type Page = (PiecePlace, bool);

    /// Random layers, the newest first, as pieces whose file pages are numbered in order,
    /// as in pagemaps.
    fn layers() -> impl Strategy<Value = Vec<Vec<Piece>>> {
        let entry = (0..4_u64, 1..9_u64, 0..4_u8, any::<bool>());
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
                2 => {
                    file_page += pages;
                    PiecePlace::Punched { layer, file_page: file_page - pages }
                }
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

    /// Looks up one page, layer by layer.
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
            kind in 0..6_u8,
            lazy: bool,
        ) {
            let place = match kind {
                0 => PiecePlace::Stored { layer, file_page },
                1 => PiecePlace::Parent,
                2 => PiecePlace::Absent,
                3 => PiecePlace::Punched { layer, file_page },
                4 => PiecePlace::Nothing,
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
        fn merged_layers_answer_as_layer_by_layer(
            layers in layers(),
            in_a_pile in 1..5_usize,
            target in 1..40_usize,
        ) {
            let maps: Vec<_> = layers.iter().map(|layer| pages(layer)).collect();
            let mut pile = Pile::default();
            let mut stretches = Vec::new();
            for (position, chunk) in (0..).zip(layers.chunks(in_a_pile)) {
                for (lowest, layer) in (position * in_a_pile..).zip(chunk) {
                    layer.iter().for_each(|piece| pile.push(*piece));
                    pile.close(u32::try_from(lowest).unwrap());
                }
                let lowest = u32::try_from(position * in_a_pile + chunk.len() - 1).unwrap();
                stretches.push((pile.merge(), lowest));
            }
            let stretches: Vec<Merged> = stretches
                .iter()
                .map(|((pieces, gaps), lowest)| Merged { pieces, gaps: *gaps, lowest: *lowest })
                .collect();
            let merged = merge_by_windows(&stretches, target);
            prop_assert!(merged.iter().all(|piece| piece.pages() > 0));
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
