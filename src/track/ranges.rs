//! Ranges of the pages of a shared object.

use std::ops::Range;

use super::record::Place;
use crate::{
    proc::Mapping,
    units::{HostPid, PAGE_SIZE, PageIndex, RemoteAddr, page_bytes},
};

/// Pages in a lowest-level page table. Smaller holes of an object are protected together
/// with the pages around them.
const TABLE_PAGES: u64 = 512;

/// Whether the mappings of a process still show the same pages at the same address.
pub(super) fn covers(mappings: &[(HostPid, Mapping)], place: Place) -> bool {
    let mut next = place.start;
    // Ascending within each process.
    for (_, mapping) in mappings.iter().filter(|(pid, _)| *pid == place.pid) {
        let shows =
            mapping.offset.wrapping_sub(mapping.start.0) == place.offset.wrapping_sub(place.start);
        if shows && mapping.start.0 <= next && next < mapping.end.0 {
            next = mapping.end.0;
        }
    }
    next >= place.end
}

/// Returns the addresses at which a mapping shows pages of `data`, ascending; ranges with a
/// small hole between them are joined.
pub(super) fn stretches(data: &[Range<u64>], mapping: &Mapping) -> Vec<(RemoteAddr, RemoteAddr)> {
    let first = PageIndex::holding(mapping.offset).0;
    let last = first + mapping.len() / PAGE_SIZE;
    let mut found: Vec<Range<u64>> = Vec::new();
    for pages in data {
        let pages = pages.start.max(first)..pages.end.min(last);
        match found.last_mut() {
            _ if pages.is_empty() => {}
            Some(before) if pages.start - before.end < TABLE_PAGES => before.end = pages.end,
            _ => found.push(pages),
        }
    }
    let address = |page: u64| mapping.start.plus(page_bytes(page - first));
    found.into_iter().map(|pages| (address(pages.start), address(pages.end))).collect()
}

/// Returns the pages of `some` that are not in `others`, ascending.
pub(super) fn without(some: Vec<Range<u64>>, others: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let (some, others) = (joined(some), joined(others));
    let mut left = Vec::new();
    let mut others = others.into_iter().peekable();
    for Range { mut start, end } in some {
        while let Some(other) = others.peek().filter(|other| other.start < end) {
            if start < other.start {
                left.push(start..other.start);
            }
            start = start.max(other.end);
            if other.end > end {
                break;
            }
            others.next();
        }
        if start < end {
            left.push(start..end);
        }
    }
    left
}

/// Sorts ranges and joins adjacent ones.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::VmFlags;

    /// A mapping at `start` that shows so many pages from `first` on.
    fn mapping(start: u64, pages: u64, first: u64) -> Mapping {
        Mapping {
            start: RemoteAddr(start),
            end: RemoteAddr(start + page_bytes(pages)),
            read: true,
            write: true,
            execute: false,
            shared: true,
            offset: page_bytes(first),
            dev_major: 0,
            dev_minor: 1,
            inode: 7,
            name: b"/dev/zero (deleted)".to_vec(),
            flags: VmFlags::default(),
            rss_bytes: 0,
            shared_rss_bytes: 0,
            swap_bytes: 0,
            kernel_page_bytes: PAGE_SIZE,
            protection_key: 0,
        }
    }

    fn ranges(pairs: &[(u64, u64)]) -> Vec<Range<u64>> {
        pairs.iter().map(|(start, end)| *start..*end).collect()
    }

    #[test]
    fn pages_are_taken_away() {
        type Pairs = &'static [(u64, u64)];
        let cases: [(Pairs, Pairs, Pairs); 7] = [
            (&[(0, 10)], &[], &[(0, 10)]),
            (&[(0, 10)], &[(0, 10)], &[]),
            (&[(0, 10)], &[(3, 5), (7, 8)], &[(0, 3), (5, 7), (8, 10)]),
            (&[(0, 4), (4, 10), (20, 30)], &[(9, 25)], &[(0, 9), (25, 30)]),
            (&[(5, 10), (0, 3)], &[(2, 6), (9, 100)], &[(0, 2), (6, 9)]),
            (&[(0, 10), (12, 14), (16, 20)], &[(9, 17)], &[(0, 9), (17, 20)]),
            (&[], &[(1, 2)], &[]),
        ];
        for (some, others, expected) in cases {
            let left = without(ranges(some), ranges(others));
            assert_eq!(left, ranges(expected), "{some:?} {others:?}");
        }
    }

    #[test]
    fn mappings_that_were_split_show_what_was_there() {
        const START: u64 = 1 << 40;
        let at = |page: u64| START + page_bytes(page);
        let place = Place::of(HostPid(7), &mapping(at(0), 10, 5));
        for (now, expected) in [
            (vec![(7, mapping(at(0), 10, 5))], true),
            (vec![(7, mapping(at(0), 4, 5)), (7, mapping(at(4), 6, 9))], true),
            // Grown.
            (vec![(7, mapping(at(0), 20, 5))], true),
            // Cut, with a gap, moved, of other pages, of another process, gone.
            (vec![(7, mapping(at(0), 9, 5))], false),
            (vec![(7, mapping(at(0), 4, 5)), (7, mapping(at(5), 5, 10))], false),
            (vec![(7, mapping(at(1), 10, 5))], false),
            (vec![(7, mapping(at(0), 10, 6))], false),
            (vec![(8, mapping(at(0), 10, 5))], false),
            (vec![], false),
        ] {
            let now: Vec<_> =
                now.into_iter().map(|(pid, mapping)| (HostPid(pid), mapping)).collect();
            assert_eq!(covers(&now, place), expected, "{now:?}");
        }
    }

    #[test]
    fn only_what_is_data_is_looked_at() {
        const START: u64 = 1 << 40;
        let mapping = mapping(START, 5000, 100);
        let pages = |data: &[Range<u64>]| -> Vec<Range<u64>> {
            let page = |address: RemoteAddr| (address.0 - START) / PAGE_SIZE;
            let found = stretches(data, &mapping);
            found.into_iter().map(|(start, end)| page(start)..page(end)).collect()
        };
        assert_eq!(pages(&[0..100, 5100..6000]), []);
        assert_eq!(pages(&[0..101, 5099..6000]), [0..1, 4999..5000]);
        assert_eq!(pages(&[200..300, 811..900, 1412..1413]), [100..800, 1312..1313]);
    }
}
