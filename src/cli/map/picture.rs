//! The contents of a picture, independent of its format.

use std::{collections::BTreeMap, ops::Range, path::Path, sync::Arc};

use indicatif::BinaryBytes;

use super::Limits;
use crate::{
    chain::{
        Chain, SnapshotId,
        map::{Counts, Row, State, Survey, Surveyed},
    },
    cli::times,
    image::{Kind, MemoryId},
    units::{PAGE_SIZE, PageIndex, page_bytes},
    view::View,
};

/// A drawing of a chain.
#[derive(Debug)]
pub(super) struct Picture {
    pub(super) chain: String,
    pub(super) snapshots: Vec<Shot>,
    /// The memories that are drawn.
    pub(super) memories: Vec<Drawn>,
    /// The number of the others, and of the pages that dumps stored of them.
    pub(super) left_out: (usize, u64),
    /// Whether pages were compared.
    pub(super) twice: bool,
}

/// A snapshot.
#[derive(Debug)]
pub(super) struct Shot {
    pub(super) name: String,
    pub(super) date: Option<String>,
    pub(super) parent: Option<String>,
    pub(super) totals: Counts,
}

/// A memory.
#[derive(Debug)]
pub(super) struct Drawn {
    pub(super) surveyed: Surveyed,
    /// The memory's name, for people.
    pub(super) label: String,
    /// The names of mappings, by page.
    pub(super) names: Vec<(Range<u64>, String)>,
    pub(super) rows: Vec<Row>,
}

/// The look of a cell: the state of most of its pages, and another state that is highlighted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// [`State::Parent`], [`State::File`] or [`State::Zero`].
    pub(super) base: Option<State>,
    /// Another state, and how much of the cell is in it, from 1 to [`LEVELS`].
    pub(super) over: Option<(State, usize)>,
}

/// The levels of [`level`].
pub(super) const LEVELS: usize = 5;

/// The names of no share and of each level of [`level`].
pub(super) const SHARES: [&str; LEVELS + 1] =
    ["none", "below 1 %", "below 5 %", "below 20 %", "below 60 %", "more"];

/// Returns the level of a share, from 1 to [`LEVELS`], in steps that show small shares, too.
pub(super) fn level(pages: u64, of: u64) -> usize {
    /// The shares where the next level begins, in thousandths.
    const STEPS: [u128; LEVELS - 1] = [10, 50, 200, 600];
    let share = u128::from(pages) * 1000 / u128::from(of.max(1));
    1 + STEPS.iter().filter(|step| share >= **step).count()
}

impl Look {
    pub(super) fn of(cell: &Counts) -> Self {
        let most = |states: &[State]| {
            let there = states.iter().copied().filter(|state| cell.get(*state) > 0);
            // Of equals the first.
            there.rev().max_by_key(|state| cell.get(*state))
        };
        let over = most(&[State::Missing, State::Freed, State::Twice, State::Here]);
        Self {
            base: most(&[State::Parent, State::File, State::Zero]),
            over: over.map(|state| (state, level(cell.get(state), cell.pages()))),
        }
    }
}

impl Picture {
    /// Fills the cells, and finds the names of snapshots, memories and mappings.
    pub(super) fn of(
        path: &Path,
        chain: &Arc<Chain>,
        survey: &Survey<'_>,
        limits: Limits,
        twice: bool,
    ) -> Self {
        let name = |id: SnapshotId| chain.snapshot(id).name.clone();
        let snapshots = survey.snapshots.iter().zip(survey.totals()).map(|(id, totals)| {
            let inventory = chain.images(*id).stat(&Kind::Inventory.file_name(0));
            let date = inventory.ok().and_then(|stat| times::shown(stat.modified).ok());
            let parent = chain.snapshot(*id).parent.as_ref().ok().copied().flatten().map(name);
            Shot { name: name(*id), date, parent, totals }
        });
        let (drawn, rest) = survey.memories.split_at(limits.memories.min(survey.memories.len()));
        let left_out = (rest.len(), rest.iter().map(Surveyed::stored).sum());
        let grids = survey.grids(drawn, limits.columns, limits.rows);
        let mut names = Names { chain, views: BTreeMap::new() };
        let memories = drawn
            .iter()
            .zip(grids)
            .map(|(surveyed, rows)| {
                let last = surveyed.counts.iter().rposition(Option::is_some);
                let (label, names) = match last {
                    Some(at) => names.of(survey.snapshots[at], surveyed.memory),
                    None => (surveyed.memory.to_string(), Vec::new()),
                };
                Drawn { surveyed: surveyed.clone(), label, names, rows }
            })
            .collect();
        Self {
            chain: path.display().to_string(),
            snapshots: snapshots.collect(),
            memories,
            left_out,
            twice,
        }
    }

    /// Returns the number of pages in the snapshots' own files.
    pub(super) fn stored(&self) -> u64 {
        let own = |shot: &Shot| shot.totals.get(State::Here) + shot.totals.get(State::Twice);
        self.snapshots.iter().map(own).sum()
    }

    /// Returns the number of pages that images without parents would hold.
    pub(super) fn flat(&self) -> u64 {
        let kept = self.snapshots.iter().map(|shot| shot.totals.kept());
        kept.fold(0, u64::saturating_add)
    }

    /// Returns a line that describes the picture.
    pub(super) fn summary(&self) -> String {
        let memories = self.memories.len() + self.left_out.0;
        let count = |count: usize, one: &str, many: &str| {
            format!("{count} {}", if count == 1 { one } else { many })
        };
        format!(
            "{}, {}; {} of pages stored, {} without parents",
            count(self.snapshots.len(), "snapshot", "snapshots"),
            count(memories, "memory", "memories"),
            bytes(self.stored()),
            bytes(self.flat()),
        )
    }

    /// Returns a line about the memories that are not drawn.
    pub(super) fn rest(&self) -> Option<String> {
        let (memories, pages) = self.left_out;
        (memories > 0).then(|| {
            format!(
                "{memories} more are not drawn, with {} of stored pages; --all draws them",
                bytes(pages)
            )
        })
    }

    /// Returns the names of some snapshots.
    pub(super) fn named(&self, snapshots: &Range<usize>) -> String {
        let first = &self.snapshots[snapshots.start].name;
        match snapshots.len() {
            1 => first.clone(),
            _ => format!("{first} to {}", self.snapshots[snapshots.end - 1].name),
        }
    }

    /// Returns the states that occur in the picture.
    pub(super) fn states(&self) -> Vec<State> {
        let all = self.memories.iter().flat_map(|drawn| drawn.surveyed.counts.iter().flatten());
        let mut sum = Counts::default();
        all.for_each(|counts| sum += *counts);
        State::ALL.into_iter().filter(|state| sum.get(*state) > 0).collect()
    }
}

impl Drawn {
    /// Returns the number of pages that dumps stored in some snapshots, and of all pages there.
    pub(super) fn changed(&self, snapshots: Range<usize>) -> Option<(u64, u64)> {
        let mut found = None;
        for counts in self.surveyed.counts[snapshots].iter().flatten() {
            let (stored, kept) = found.unwrap_or((0, 0));
            found = Some((counts.stored() + stored, counts.kept() + kept));
        }
        found
    }

    /// Returns the addresses that columns show, `[first, end)`.
    pub(super) fn addresses(&self, columns: Range<usize>) -> Range<u64> {
        let axis = &self.surveyed.axis;
        let all = self.rows.first().map_or(0, |row| row.cells.len());
        let start = axis.page(axis.column(columns.start, all).start);
        let last = axis.column(columns.end.saturating_sub(1), all).end;
        PageIndex(start).address()..PageIndex(axis.page(last.saturating_sub(1)) + 1).address()
    }

    /// Returns the name of the mapping at an address.
    pub(super) fn name_at(&self, address: u64) -> Option<&str> {
        let page = PageIndex::holding(address).0;
        let found = self.names.iter().find(|(pages, _)| pages.contains(&page));
        found.map(|(_, name)| name.as_str())
    }
}

/// The names of processes, mappings and shared objects.
struct Names<'a> {
    chain: &'a Arc<Chain>,
    views: BTreeMap<SnapshotId, View>,
}

impl Names<'_> {
    /// Returns the name of a memory, and of its mappings by address; fewer if the images lack
    /// them.
    fn of(&mut self, id: SnapshotId, memory: MemoryId) -> (String, Vec<(Range<u64>, String)>) {
        /// The longest name, in characters.
        const LONGEST: usize = 40;
        let open = || View::new(Arc::clone(self.chain), id).without_mapped_files();
        let view = self.views.entry(id).or_insert_with(open);
        let named = match memory {
            MemoryId::Private(pid) => {
                let rows = view.processes().unwrap_or_default();
                let row = rows.into_iter().find(|row| u64::from(row.pid) == pid);
                row.map(|row| program(&row.command))
            }
            MemoryId::Shared(shmid) => {
                view.shared_names().ok().and_then(|mut names| names.remove(&shmid))
            }
        };
        let label = match named {
            Some(name) => {
                let name: String = name.chars().take(LONGEST).collect();
                format!("{memory} {name}")
            }
            None => memory.to_string(),
        };
        let mappings = match memory {
            MemoryId::Private(pid) => {
                let pid = u32::try_from(pid).ok();
                pid.and_then(|pid| view.mappings(pid).ok()).unwrap_or_default()
            }
            MemoryId::Shared(_) => Vec::new(),
        };
        let named = mappings
            .into_iter()
            .map(|row| (row.start / PAGE_SIZE..row.end.div_ceil(PAGE_SIZE), row.name));
        (label, named.filter(|(_, name)| !name.is_empty()).collect())
    }
}

/// Returns the name of the program of a command line.
fn program(command: &str) -> String {
    let first = command.split(' ').next().unwrap_or_default();
    first.rsplit('/').next().unwrap_or(first).to_owned()
}

/// Returns pages as bytes for people.
pub(super) fn bytes(pages: u64) -> String {
    BinaryBytes(page_bytes(pages)).to_string()
}

/// Returns the word for a state in documents that programs read: JSON, and classes of styles.
pub(super) fn word(state: State) -> &'static str {
    match state {
        State::Here => "here",
        State::Twice => "twice",
        State::Parent => "parent",
        State::Freed => "freed",
        State::Missing => "missing",
        State::File => "file",
        State::Zero => "zero",
    }
}

/// Returns what a legend calls a state.
pub(super) fn meaning(state: State) -> &'static str {
    match state {
        State::Here => "stored by this dump",
        State::Twice => "stored, but an older copy is too",
        State::Parent => "in a parent",
        State::Freed => "freed, or a hole",
        State::Missing => "in no image",
        State::File => "unchanged, in the mapped file",
        State::Zero => "zero",
    }
}

/// Returns a line for each state that occurs in some cells, with its size.
pub(super) fn shares(counts: &Counts) -> Vec<String> {
    let said = |state: State| {
        let pages = counts.get(state);
        match state {
            _ if pages == 0 => None,
            // Their columns may be shortened.
            State::File | State::Zero => Some(meaning(state).to_owned()),
            _ => Some(format!("{} {}", bytes(pages), meaning(state))),
        }
    };
    State::ALL.into_iter().filter_map(said).collect()
}
