//! Which pages of an address space are still to be supplied, and from where in the images.

use std::{collections::BTreeMap, ops::Range};

use crate::units::PAGE_SIZE;

/// The pages of an address space that are still in the images only.
///
/// The process may move them (`mremap(2)`), so that their address is not that in the images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Waiting {
    /// By start address: the end, and the address in the images of the start.
    parts: BTreeMap<u64, (u64, u64)>,
}

/// A part of [`Waiting`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The addresses in the process.
    pub(super) range: Range<u64>,
    /// The address in the images of the first byte.
    pub(super) origin: u64,
}

impl Part {
    /// Returns what of the part lies in `window`; the two must overlap.
    fn within(&self, window: &Range<u64>) -> Self {
        let (start, end) = (self.range.start.max(window.start), self.range.end.min(window.end));
        Self { range: start..end, origin: self.origin + (start - self.range.start) }
    }
}

impl Waiting {
    /// Adds pages that have their address in the images.
    pub(super) fn add(&mut self, range: Range<u64>) {
        let before = self.parts.range_mut(..range.start).next_back();
        if let Some((at, (end, origin))) = before
            && *end == range.start
            && *origin + (*end - at) == range.start
        {
            *end = range.end;
            return;
        }
        self.insert(Part { origin: range.start, range });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Returns the number of bytes that wait.
    pub(super) fn bytes(&self) -> u64 {
        self.parts.iter().map(|(start, (end, _))| end - start).sum()
    }

    fn insert(&mut self, part: Part) {
        if part.range.start < part.range.end {
            self.parts.insert(part.range.start, (part.range.end, part.origin));
        }
    }

    /// Returns the parts that overlap with `range`, as they are.
    fn touching(&self, range: &Range<u64>) -> Vec<Part> {
        let first = self.parts.range(..=range.start).next_back().map_or(range.start, |(at, _)| *at);
        let all = self.parts.range(first..range.end.max(first));
        let parts = all
            .map(|(start, (end, origin))| Part { range: *start..*end, origin: *origin })
            .filter(|part| part.range.end > range.start);
        parts.collect()
    }

    /// Returns the part that contains `address`, up to `limit` bytes of it from there.
    pub(super) fn at(&self, address: u64, limit: u64) -> Option<Part> {
        let window = address..address.saturating_add(limit);
        self.touching(&(address..address + 1)).first().map(|part| part.within(&window))
    }

    /// Returns what waits around `address`, within the aligned window of `bytes`, a power of two.
    /// `None` if the page at `address` does not wait.
    pub(super) fn around(&self, address: u64, bytes: u64) -> Option<Part> {
        let start = address & !(bytes - 1);
        let part = self.touching(&(address..address + 1)).into_iter().next()?;
        Some(part.within(&(start..start.saturating_add(bytes))))
    }

    /// Returns the first part from `address` on, at most `limit` bytes.
    pub(super) fn next(&self, address: u64, limit: u64) -> Option<Part> {
        self.at(address, limit).or_else(|| {
            let (start, (end, origin)) = self.parts.range(address..).next()?;
            let part = Part { range: *start..*end, origin: *origin };
            Some(part.within(&(*start..start.saturating_add(limit))))
        })
    }

    /// Whether all of a part still waits at its place.
    pub(super) fn has(&self, part: &Part) -> bool {
        self.at(part.range.start, part.range.end - part.range.start).as_ref() == Some(part)
    }

    /// Forgets the pages in `range`, and returns what waited there.
    pub(super) fn take(&mut self, range: &Range<u64>) -> Vec<Part> {
        let mut taken = Vec::new();
        for part in self.touching(range) {
            self.parts.remove(&part.range.start);
            let inside = part.within(range);
            let Range { start, end } = part.range;
            if start < inside.range.start {
                self.insert(Part { range: start..inside.range.start, origin: part.origin });
            }
            if inside.range.end < end {
                let origin = part.origin + (inside.range.end - start);
                self.insert(Part { range: inside.range.end..end, origin });
            }
            taken.push(inside);
        }
        taken
    }

    /// Forgets the pages of a part that still wait at its place.
    pub(super) fn supplied(&mut self, part: &Part) {
        for taken in self.take(&part.range) {
            let expected = part.origin + (taken.range.start - part.range.start);
            if taken.origin != expected {
                self.insert(taken);
            }
        }
    }

    /// Moves what waits in `[from, from + len)` to `to`.
    pub(super) fn relocate(&mut self, from: u64, to: u64, len: u64) {
        let moved = self.take(&(from..from.saturating_add(len)));
        drop(self.take(&(to..to.saturating_add(len))));
        for part in moved {
            let start = to + (part.range.start - from);
            let bytes = part.range.end - part.range.start;
            self.insert(Part { range: start..start + bytes, origin: part.origin });
        }
    }
}

/// Returns the page of an address.
pub(super) fn page(address: u64) -> Range<u64> {
    let start = address & !(PAGE_SIZE - 1);
    start..start + PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Change {
        Take(u64, u64),
        Supplied(u64, u64),
        Move(u64, u64, u64),
    }

    fn changes() -> impl Strategy<Value = Vec<Change>> {
        let place = || 0_u64..64;
        let len = || 0_u64..24;
        let change = prop_oneof![
            (place(), len()).prop_map(|(at, len)| Change::Take(at, len)),
            (place(), len()).prop_map(|(at, len)| Change::Supplied(at, len)),
            (place(), place(), len()).prop_map(|(from, to, len)| Change::Move(from, to, len)),
        ];
        prop::collection::vec(change, 0..24)
    }

    proptest! {
        #[test]
        fn agrees_with_a_map_of_pages(
            first in prop::collection::vec((0_u64..64, 1_u64..16), 0..6),
            changes in changes(),
        ) {
            let (mut waiting, mut naive) = (Waiting::default(), BTreeMap::new());
            for (at, len) in first {
                drop(waiting.take(&(at..at + len)));
                waiting.add(at..at + len);
                naive.extend((at..at + len).map(|page| (page, page)));
            }
            for change in changes {
                match change {
                    Change::Take(at, len) => {
                        drop(waiting.take(&(at..at + len)));
                        naive.retain(|page, _| !(at..at + len).contains(page));
                    }
                    Change::Supplied(at, len) => {
                        waiting.supplied(&Part { range: at..at + len, origin: at });
                        naive.retain(|page, origin| {
                            !(at..at + len).contains(page) || page != origin
                        });
                    }
                    Change::Move(from, to, len) if from + len <= to || to + len <= from => {
                        waiting.relocate(from, to, len);
                        for page in 0..len {
                            naive.remove(&(to + page));
                            if let Some(origin) = naive.remove(&(from + page)) {
                                naive.insert(to + page, origin);
                            }
                        }
                    }
                    // The kernel moves nothing onto itself.
                    Change::Move(..) => {}
                }
            }
            for page in 0..128 {
                let found = waiting.at(page, 1).map(|part| part.origin);
                prop_assert_eq!(found, naive.get(&page).copied());
            }
            prop_assert_eq!(waiting.bytes(), naive.len() as u64);
            prop_assert_eq!(waiting.is_empty(), naive.is_empty());
            let next = waiting.next(0, 3).map(|part| part.range.start);
            prop_assert_eq!(next, naive.keys().next().copied());
        }
    }

    #[test]
    fn a_window_around_a_fault_stays_in_its_part() {
        let mut waiting = Waiting::default();
        waiting.add(0x5000..0x9000);
        waiting.relocate(0x6000, 0x1_3000, 0x1000);
        let around =
            |address| waiting.around(address, 0x8000).map(|part| (part.range, part.origin));
        assert_eq!(around(0x5000), Some((0x5000..0x6000, 0x5000)));
        assert_eq!(around(0x7000), Some((0x7000..0x8000, 0x7000)));
        assert_eq!(around(0x8000), Some((0x8000..0x9000, 0x8000)));
        assert_eq!(around(0x1_3000), Some((0x1_3000..0x1_4000, 0x6000)));
        assert_eq!(around(0x6000), None);
    }
}
