//! Stretches of pages that a dump may have to read.

use std::ops::Range;

use super::Result;
use crate::{
    chain::{Index, Place},
    units::{PageIndex, PageRanges, page_bytes},
};

/// Consecutive pages that may have contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The number of the first page, by address or by offset in an object.
    pub first: PageIndex,
    /// The number of pages.
    pub pages: u64,
    /// Whether reading may pin them; see `pages/process.rs`.
    pub pinnable: bool,
    /// Whether they are pages of the vDSO that the process has not touched; see
    /// `pages/process.rs`.
    pub of_kernel: bool,
    /// Whether they are in swap.
    pub swapped: bool,
    /// Whether zero pages must be stored explicitly: otherwise the file would show through, or
    /// another program would not continue the chain.
    pub zeros_stored: bool,
    /// Whether they are known to be unchanged since the parent, so they are not read.
    pub unwritten: bool,
}

impl Stretch {
    /// Returns the numbers of its pages.
    pub fn range(&self) -> Range<u64> {
        self.first.0..self.first.0 + self.pages
    }
}

/// Returns the size of at most a chunk of pages, in bytes.
pub(super) fn len(pages: u64) -> usize {
    usize::try_from(page_bytes(pages)).expect("at most a chunk")
}

/// Calls `read` with each run and its part of `bytes`.
pub(super) fn for_each_run(
    runs: &[Stretch],
    bytes: &mut [u8],
    mut read: impl FnMut(&Stretch, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let mut rest = bytes;
    for run in runs {
        let target;
        (target, rest) = rest.split_at_mut(len(run.pages));
        read(run, target)?;
    }
    Ok(())
}

/// Returns the same pages, after applying `mark` to those in `ranges`.
pub fn marked(
    stretches: &[Stretch],
    ranges: &[Range<u64>],
    mark: impl Fn(&mut Stretch),
) -> Vec<Stretch> {
    let mut marked = Vec::with_capacity(stretches.len());
    let mut push = |pages: Range<u64>, of: &Stretch, is_marked: bool| {
        if pages.is_empty() {
            return;
        }
        let (first, pages) = (PageIndex(pages.start), pages.end - pages.start);
        let mut part = Stretch { first, pages, ..*of };
        if is_marked {
            mark(&mut part);
        }
        marked.push(part);
    };
    for stretch in stretches {
        let (mut next, end) = (stretch.first.0, stretch.first.0 + stretch.pages);
        let begin = ranges.partition_point(|pages| pages.end <= next);
        for pages in ranges[begin..].iter().take_while(|pages| pages.start < end) {
            let pages = pages.start.max(next)..pages.end.min(end);
            push(next..pages.start, stretch, false);
            next = pages.end;
            push(pages, stretch, true);
        }
        push(next..end, stretch, false);
    }
    marked
}

/// Clears `unwritten` for pages that the parent does not store: these must be read, since they are
/// new, or the parent cannot read them.
pub fn require_stored(stretches: &mut Vec<Stretch>, parent: Option<&Index>) {
    if !stretches.iter().any(|stretch| stretch.unwritten) {
        return;
    }
    let mut result = Vec::with_capacity(stretches.len());
    for stretch in stretches.drain(..) {
        match parent {
            Some(parent) if stretch.unwritten => split(stretch, parent, &mut result),
            _ => result.push(Stretch { unwritten: false, ..stretch }),
        }
    }
    *stretches = result;
}

/// Clears `unwritten` for pages that are not in `held`, which a page server has.
pub fn require_held(stretches: &mut Vec<Stretch>, held: &PageRanges) {
    let mut result = Vec::with_capacity(stretches.len());
    for stretch in stretches.drain(..) {
        result.extend(held.split(stretch.range()).map(|(pages, is_held)| Stretch {
            first: PageIndex(pages.start),
            pages: pages.end - pages.start,
            unwritten: stretch.unwritten && is_held,
            ..stretch
        }));
    }
    *stretches = result;
}

fn split(stretch: Stretch, parent: &Index, result: &mut Vec<Stretch>) {
    let end = stretch.first.0 + stretch.pages;
    let mut next = stretch.first.0;
    let mut position = parent.position(stretch.first);
    let mut push = |first: u64, end: u64, unwritten| {
        if end > first {
            result.push(Stretch {
                first: PageIndex(first),
                pages: end - first,
                unwritten,
                ..stretch
            });
        }
    };
    while next < end
        && let Some(extent) = parent.extent(position)
        && extent.first.0 < end
    {
        position += 1;
        // Only a pages file that was never punched is certain to have them.
        let stored = matches!(extent.place, Place::Stored { layer, .. }
            if parent.layers()[layer as usize].dense);
        let (from, to) = (extent.first.0.max(next), extent.end().0.min(end));
        push(next, from, false);
        push(from, to, stored);
        next = to;
    }
    push(next, end, false);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unwritten_pages_are_marked() {
        let stretch = |pages: Range<u64>, unwritten| Stretch {
            first: PageIndex(pages.start),
            pages: pages.end - pages.start,
            pinnable: false,
            of_kernel: false,
            swapped: false,
            zeros_stored: false,
            unwritten,
        };
        let plain = [stretch(10..20, false), stretch(30..40, false)];
        type Case<'a> = (&'a [(u64, u64)], &'a [Stretch]);
        let cases: [Case; 4] = [
            (&[], &plain),
            (&[(0, 10), (20, 30), (40, 50)], &plain),
            (&[(0, 50)], &[stretch(10..20, true), stretch(30..40, true)]),
            (
                &[(12, 14), (19, 31), (39, 40)],
                &[
                    stretch(10..12, false),
                    stretch(12..14, true),
                    stretch(14..19, false),
                    stretch(19..20, true),
                    stretch(30..31, true),
                    stretch(31..39, false),
                    stretch(39..40, true),
                ],
            ),
        ];
        for (unwritten, expected) in cases {
            let ranges: Vec<_> = unwritten.iter().map(|(start, end)| *start..*end).collect();
            let found = marked(&plain, &ranges, |pages| pages.unwritten = true);
            assert_eq!(found, expected, "{unwritten:?}");
        }
    }
}
