use std::fs;

use super::*;
use crate::{
    chain::testing::{MEMORY, TestChain, entry},
    image::{Kind, Presence},
    units::{PAGE_LEN, PageRanges},
};

fn survey<'a>(chain: &'a Chain, twice: &'a Twice) -> Survey<'a> {
    Survey::of(chain, chain.ids().collect(), twice, |_| true)
}

/// The cells of the only memory.
fn one(survey: &Survey<'_>, columns: usize, rows: usize) -> Vec<Row> {
    survey.grids(&survey.memories, columns, rows).remove(0)
}

/// The states of some counts with how many pages are in each.
fn states(counts: &Counts) -> Vec<(State, u64)> {
    let all = State::ALL.into_iter().map(|state| (state, counts.get(state)));
    all.filter(|(_, pages)| *pages > 0).collect()
}

#[test]
fn pages_are_counted_where_they_are() {
    let mut disk = TestChain::new();
    disk.push(&[entry(0, 8, Presence::Present)]);
    disk.push(&[
        entry(0, 3, Presence::Parent),
        entry(3, 2, Presence::Present),
        entry(5, 2, Presence::Parent),
        entry(7, 1, Presence::Absent),
    ]);
    // One page of two is there.
    let pages = disk.dir(2).join(Kind::Pages.file_name(7));
    fs::File::options().write(true).open(pages).unwrap().set_len(4096).unwrap();
    let (chain, twice) = (disk.open(), Twice::default());
    let survey = survey(&chain, &twice);
    assert_eq!(survey.problems, Vec::<String>::new());
    let surveyed = &survey.memories[0];
    assert_eq!(surveyed.memory, MEMORY);
    let counts: Vec<_> = surveyed.counts.iter().map(|counts| states(&counts.unwrap())).collect();
    use State::{Here, Missing, Parent};
    assert_eq!(counts, [vec![(Here, 8)], vec![(Here, 1), (Parent, 5), (Missing, 2)]]);
    // As many columns as pages: each cell is one.
    let rows = one(&survey, 100, 100);
    assert_eq!(rows.len(), 2);
    let cells: Vec<_> = rows[1].cells.iter().map(|cell| states(cell)[0]).collect();
    let expected = [Parent, Parent, Parent, Here, Missing, Parent, Parent, Missing];
    assert_eq!(cells, expected.map(|state| (state, 1)));
    // Fewer: the sums are the same.
    let rows = one(&survey, 3, 1);
    assert_eq!((rows.len(), rows[0].cells.len(), rows[0].snapshots.clone()), (1, 3, 0..2));
    let mut sum = Counts::default();
    rows[0].cells.iter().for_each(|cell| sum += *cell);
    assert_eq!(states(&sum), [(Here, 9), (Parent, 5), (Missing, 2)]);
}

#[test]
fn copies_and_holes_are_seen() {
    let mut disk = TestChain::new();
    disk.push(&[entry(0, 4, Presence::Present)]);
    disk.push(&[entry(2, 3, Presence::Present)]);
    let write = |layer: usize, pages: &[u8]| {
        let bytes: Vec<u8> = pages.iter().flat_map(|value| [*value; PAGE_LEN]).collect();
        fs::write(disk.dir(layer).join(Kind::Pages.file_name(7)), bytes).unwrap();
    };
    write(1, &[1, 2, 1, 3]);
    write(2, &[4, 3, 2]);
    let chain = disk.open();
    let found = twice(&chain, &|_, _| true, &mut |_, _| {}).unwrap();
    let [first, second] = [0, 1].map(|at| chain.ids().nth(at).unwrap());
    assert_eq!(found.of(first, MEMORY), std::slice::from_ref(&(2..3)));
    assert_eq!(found.of(second, MEMORY), std::slice::from_ref(&(1..3)));
    let survey = survey(&chain, &found);
    let counts: Vec<_> =
        survey.memories[0].counts.iter().map(|counts| states(&counts.unwrap())).collect();
    assert_eq!(counts[0], [(State::Here, 3), (State::Twice, 1)]);
    assert_eq!(counts[1], [(State::Here, 1), (State::Twice, 2)]);
    // Only what is asked for is read.
    let found = twice(&chain, &|id, _| id == second, &mut |_, _| {}).unwrap();
    assert_eq!(found, Twice::default());
    // What is a hole was freed.
    fs::File::create(disk.dir(2).join("pages-7.img")).unwrap().set_len(3 * 4096).unwrap();
    let (chain, none) = (disk.open(), Twice::default());
    let survey = self::survey(&chain, &none);
    assert_eq!(states(&survey.memories[0].counts[1].unwrap()), [(State::Freed, 3)]);
}

#[test]
fn what_cannot_be_read_is_told_and_left_out() {
    let mut disk = TestChain::new();
    disk.push(&[entry(0, 4, Presence::Present)]);
    disk.push(&[entry(0, 4, Presence::Parent)]);
    fs::write(disk.dir(2).join(MEMORY.pagemap_name()), b"no pagemap").unwrap();
    let (chain, twice) = (disk.open(), Twice::default());
    let survey = survey(&chain, &twice);
    assert_eq!(survey.problems.len(), 1, "{:?}", survey.problems);
    assert!(survey.memories[0].counts[1].is_none());
    assert!(one(&survey, 4, 4)[1].cells.iter().all(|c| c.pages() == 0));
}

#[test]
fn long_gaps_are_left_out_and_empty_mappings_are_short() {
    let ranges = |all: &[Range<u64>]| {
        let mut ranges = PageRanges::new();
        all.iter().for_each(|range| ranges.insert(range.clone()));
        ranges
    };
    let axis = Axis::new(
        &ranges(&[100..1124, 1125..2125, 1 << 30..(1 << 30) + 1000]),
        &ranges(&[0..3000, 1 << 40..1 << 41]),
    );
    let drawn: Vec<_> = axis.segments().iter().map(|s| (s.first, s.pages, s.drawn)).collect();
    assert_eq!(
        drawn,
        [
            (0, 100, 11),
            (100, 2025, 2025),
            (2125, 875, 11),
            (1 << 30, 1000, 1000),
            (1 << 40, 1 << 40, 11)
        ]
    );
    assert_eq!(axis.place(100), 11);
    assert_eq!((axis.page(11), axis.page(12)), (100, 101));
    assert_eq!(axis.place(1 << 50), axis.drawn());
    // All that is spread arrives, whatever the number of columns.
    for columns in [1, 7, 80, 3000] {
        let mut sum = 0;
        axis.spread(100..1 << 31, columns, |column, pages| {
            assert!(column < columns && pages > 0);
            sum += pages;
        });
        assert_eq!(sum, 2025 + 11 + 1000);
    }
}
