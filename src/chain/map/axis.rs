//! The addresses of a memory as a line that can be drawn.

use std::ops::Range;

use crate::units::PageRanges;

/// Gaps between pages up to this part of all pages are drawn as they are.
const JOINED: u64 = 1024;

/// The part of all pages that a longer gap or mapping without pages takes at most.
const SHORTENED: u64 = 256;

/// Pages in a row that are drawn in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first page.
    pub first: u64,
    /// How many pages there are.
    pub pages: u64,
    /// What is drawn before it, in pages.
    pub before: u64,
    /// How long it is drawn, in pages: less than it is if nothing of it is in images.
    pub drawn: u64,
}

/// A line of segments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Axis {
    segments: Vec<Segment>,
    drawn: u64,
}

impl Axis {
    /// Returns the line of the pages that images have, `kept`, and of others that are
    /// `mapped`.
    pub(super) fn new(kept: &PageRanges, mapped: &PageRanges) -> Self {
        let pages = if kept.is_empty() { mapped.pages() } else { kept.pages() };
        let mut full: Vec<Range<u64>> = Vec::new();
        let source = if kept.is_empty() { mapped } else { kept };
        for range in source.iter() {
            match full.last_mut() {
                Some(last) if range.start - last.end <= pages / JOINED => last.end = range.end,
                _ => full.push(range),
            }
        }
        let mut all: Vec<(Range<u64>, bool)> =
            full.iter().map(|range| (range.clone(), true)).collect();
        for range in mapped.iter() {
            super::outside(range, &full, &mut |rest| all.push((rest, false)));
        }
        all.sort_by_key(|(range, _)| range.start);
        let mut axis = Self::default();
        for (range, is_full) in all {
            let length = range.end - range.start;
            let drawn = if is_full { length } else { length.min((pages / SHORTENED).max(1)) };
            let segment = Segment { first: range.start, pages: length, before: axis.drawn, drawn };
            axis.drawn += drawn;
            axis.segments.push(segment);
        }
        axis
    }

    /// Returns the segments in the order of their addresses.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Returns the length of the line in pages.
    pub fn drawn(&self) -> u64 {
        self.drawn
    }

    /// Returns how many columns there are, if there may be `limit`.
    pub fn columns(&self, limit: usize) -> usize {
        limit.min(usize::try_from(self.drawn).unwrap_or(limit))
    }

    /// Returns what is drawn in a column, in pages from the beginning of the line.
    pub fn column(&self, column: usize, columns: usize) -> Range<u64> {
        part(self.drawn, column, columns)..part(self.drawn, column + 1, columns)
    }

    /// Returns the page at a place of the line.
    pub fn page(&self, place: u64) -> u64 {
        let at = self.segments.partition_point(|segment| segment.before + segment.drawn <= place);
        let Some(segment) = self.segments.get(at) else {
            return self.segments.last().map_or(0, |last| last.first + last.pages);
        };
        segment.first + scaled(place - segment.before, segment.pages, segment.drawn)
    }

    /// Returns where a page is on the line, or the next that is.
    pub fn place(&self, page: u64) -> u64 {
        let at = self.segments.partition_point(|segment| segment.first + segment.pages <= page);
        let Some(segment) = self.segments.get(at) else { return self.drawn };
        segment.before + scaled(page.saturating_sub(segment.first), segment.drawn, segment.pages)
    }

    /// Calls `put` with each column that shows some of `pages`, and how many.
    pub(super) fn spread(
        &self,
        pages: Range<u64>,
        columns: usize,
        mut put: impl FnMut(usize, u64),
    ) {
        let from = self.segments.partition_point(|s| s.first + s.pages <= pages.start);
        for segment in self.segments[from..].iter().take_while(|s| s.first < pages.end) {
            let start = pages.start.max(segment.first) - segment.first;
            let end = pages.end.min(segment.first + segment.pages) - segment.first;
            let mut next = segment.before + scaled(start, segment.drawn, segment.pages);
            let end = segment.before + scaled(end, segment.drawn, segment.pages);
            let mut column = self.column_of(next, columns);
            while next < end {
                let last = part(self.drawn, column + 1, columns).min(end);
                if last > next {
                    put(column, last - next);
                    next = last;
                }
                column += 1;
            }
        }
    }

    /// Returns a column at or before the one that a place is in.
    fn column_of(&self, place: u64, columns: usize) -> usize {
        let column = scaled(place, columns as u64, self.drawn.max(1));
        usize::try_from(column).map_or(0, |column| column.saturating_sub(1))
    }
}

/// Returns where a column begins.
fn part(drawn: u64, column: usize, columns: usize) -> u64 {
    scaled(drawn, column as u64, columns as u64)
}

/// Returns `value * by / of`.
fn scaled(value: u64, by: u64, of: u64) -> u64 {
    if by == of {
        return value;
    }
    let scaled = u128::from(value) * u128::from(by) / u128::from(of.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}
