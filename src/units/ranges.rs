//! Sets of pages as ranges.

use std::{collections::BTreeMap, ops::Range};

/// A set of pages, kept as disjoint ranges that do not touch, in order.
///
/// The pages are numbered by whatever the set is about: a file's pages or those
/// of an address space. A question and a change cost the logarithm of the number
/// of ranges, and what they find or join.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageRanges {
    /// The first page of each range, and the one after its last.
    ranges: BTreeMap<u64, u64>,
    pages: u64,
}

impl PageRanges {
    /// Returns the set that is empty.
    pub const fn new() -> Self {
        Self { ranges: BTreeMap::new(), pages: 0 }
    }

    /// Whether there is no page in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Returns how many pages there are.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Returns how many ranges there are.
    pub fn count(&self) -> usize {
        self.ranges.len()
    }

    /// Returns the ranges in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(start, end)| *start..*end)
    }

    /// Adds the pages of `range`; an empty one changes nothing.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // From the last that begins at or before the new end back to the first that
        // touches the new start.
        while let Some((first, last)) = self.ranges.range(..=end).next_back() {
            let (first, last) = (*first, *last);
            if last < start {
                break;
            }
            self.take(first, last);
            start = start.min(first);
            end = end.max(last);
        }
        self.ranges.insert(start, end);
        self.pages += end - start;
    }

    /// Takes the pages of `range` out.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((first, last)) = self.ranges.range(..range.end).next_back() {
            let (first, last) = (*first, *last);
            if last <= range.start {
                break;
            }
            self.take(first, last);
            for rest in [first..range.start, range.end..last] {
                if !rest.is_empty() {
                    self.pages += rest.end - rest.start;
                    self.ranges.insert(rest.start, rest.end);
                }
            }
        }
    }

    /// Adds all pages of another set.
    pub fn extend(&mut self, other: &Self) {
        other.iter().for_each(|range| self.insert(range));
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        self.ranges.range(..=page).next_back().is_some_and(|(_, end)| page < *end)
    }

    /// Returns the parts of `range` that are in the set, in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        // One may begin before.
        let before = self.ranges.range(..range.start).next_back();
        let others = self.ranges.range(range.start..range.end.max(range.start));
        let cut =
            move |(start, end): (&u64, &u64)| (*start).max(range.start)..(*end).min(range.end);
        before.into_iter().chain(others).map(cut).filter(|part| !part.is_empty())
    }

    /// Splits `range` where it enters and leaves the set: its parts in order, each
    /// with whether it is in the set.
    pub fn split(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, bool)> + '_ {
        let end = range.end;
        let mut next = range.start;
        let mut inside = self.within(range).peekable();
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let start = next;
            let part = match inside.peek() {
                Some(part) if part.start == start => {
                    let part = part.clone();
                    inside.next();
                    (part, true)
                }
                Some(part) => (start..part.start, false),
                None => (start..end, false),
            };
            next = part.0.end;
            Some(part)
        })
    }

    /// Takes out a range that is there as it is.
    fn take(&mut self, first: u64, end: u64) {
        self.ranges.remove(&first);
        self.pages -= end - first;
    }
}

impl FromIterator<Range<u64>> for PageRanges {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut set = Self::new();
        ranges.into_iter().for_each(|range| set.insert(range));
        set
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "sets of ranges")]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Pages that the tests deal with.
    const PAGES: u64 = 64;

    fn range() -> impl Strategy<Value = Range<u64>> {
        (0..PAGES, 0..20_u64).prop_map(|(first, pages)| first..(first + pages).min(PAGES))
    }

    /// Checks that a set is what the naive one is, in the one form that it has.
    fn assert_same(set: &PageRanges, naive: &BTreeSet<u64>) {
        assert_eq!(
            set.iter().flatten().collect::<Vec<_>>(),
            naive.iter().copied().collect::<Vec<_>>()
        );
        let ranges: Vec<_> = set.iter().collect();
        assert!(ranges.iter().all(|range| !range.is_empty()));
        assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{ranges:?}");
        assert_eq!(set.pages(), naive.len() as u64);
        assert_eq!(set.count(), ranges.len());
        assert_eq!(set.is_empty(), naive.is_empty());
    }

    #[test]
    fn the_ends_of_the_numbers_are_no_trouble() {
        let mut set = PageRanges::from_iter([u64::MAX - 1..u64::MAX, 0..1]);
        assert!(set.contains(0) && set.contains(u64::MAX - 1) && !set.contains(u64::MAX));
        set.insert(1..u64::MAX - 1);
        assert_eq!(set.iter().collect::<Vec<_>>(), [0..u64::MAX]);
        set.remove(0..u64::MAX);
        assert!(set.is_empty());
        assert_eq!(set.split(3..3).count(), 0);
    }

    proptest! {
        #[test]
        fn a_set_is_what_a_naive_one_is(
            changes in prop::collection::vec((any::<bool>(), range()), 0..40),
            asked in prop::collection::vec(range(), 10),
        ) {
            let (mut set, mut naive) = (PageRanges::new(), BTreeSet::new());
            for (add, range) in changes {
                if add {
                    naive.extend(range.clone());
                    set.insert(range);
                } else {
                    naive.retain(|page| !range.contains(page));
                    set.remove(range);
                }
                assert_same(&set, &naive);
            }
            for page in 0..PAGES {
                prop_assert_eq!(set.contains(page), naive.contains(&page));
            }
            for range in asked {
                let within: Vec<u64> = set.within(range.clone()).flatten().collect();
                let expected: Vec<u64> = naive.range(range.clone()).copied().collect();
                prop_assert_eq!(within, expected);
                let parts: Vec<_> = set.split(range.clone()).collect();
                prop_assert_eq!(
                    parts.iter().flat_map(|(part, _)| part.clone()).collect::<Vec<_>>(),
                    range.collect::<Vec<_>>()
                );
                for (part, inside) in &parts {
                    prop_assert!(part.clone().all(|page| naive.contains(&page) == *inside));
                }
                prop_assert!(parts.windows(2).all(|pair| pair[0].1 != pair[1].1));
            }
            let mut both = PageRanges::from_iter([10..30]);
            both.extend(&set);
            naive.extend(10..30);
            assert_same(&both, &naive);
        }
    }
}
