//! Plans which pages a snapshot can take from its parent; changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use super::{
    DedupError, Result,
    compare::{self, Pair, Stretch},
    objects::{ImageName, Objects},
};
use crate::{
    chain::{Chain, ChainError, Extent, FileId, Index, Place, SnapshotId},
    image::{MemoryId, PagemapEntry, Presence},
    units::{PageIndex, PageRanges},
};

/// A snapshot and its chain.
#[derive(Clone, Copy, Debug)]
pub(super) struct At<'a> {
    pub(super) chain: &'a Chain,
    pub(super) id: SnapshotId,
}

impl At<'_> {
    /// Returns the snapshot's directory: only directories are deduplicated.
    pub(super) fn dir(&self) -> &Path {
        self.chain.snapshot(self.id).path()
    }

    /// Returns the directory and number of the pages file of a layer of an index.
    pub(super) fn pages_file(&self, index: &Index, layer: u32) -> (&Path, u32) {
        let layer = &index.layers()[layer as usize];
        (self.chain.snapshot(layer.snapshot).path(), layer.pages_id)
    }
}

/// The plan for one memory.
#[derive(Debug)]
pub(super) struct MemoryPlan {
    /// The memory.
    pub(super) memory: MemoryId,
    /// Its number afterwards, which is that in the parent.
    pub(super) becomes: MemoryId,
    /// The number of its current pages file.
    pub(super) pages_id: u32,
    /// Its index.
    pub(super) index: Arc<Index>,
    /// The index of the matching memory in the parent, if pages come from there.
    pub(super) parent: Option<Arc<Index>>,
    /// The equal pages.
    pub(super) equal: Vec<Stretch>,
    /// Its new pagemap.
    pub(super) entries: Vec<PagemapEntry>,
    /// The parts of its pages file that are kept: first page and number of pages.
    pub(super) kept: Vec<(u64, u64)>,
    /// Pages that will be gone, if the others keep their place in the file.
    pub(super) gone: Option<Gone>,
}

/// Pages of a pages file that will be gone.
#[derive(Debug)]
pub(super) struct Gone {
    /// The pages of the file.
    pub(super) pages: PageRanges,
    /// How many pages the file has.
    pub(super) total: u64,
}

impl MemoryPlan {
    /// Returns how many pages the parent provides.
    pub(super) fn shared_pages(&self) -> u64 {
        self.equal.iter().map(|(_, pages)| pages).sum()
    }

    /// Returns how many pages are kept.
    pub(super) fn kept_pages(&self) -> u64 {
        self.kept.iter().map(|(_, pages)| pages).sum()
    }
}

/// The plan for a snapshot.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// The memories that change.
    pub(super) memories: Vec<MemoryPlan>,
    /// Images by name in which shared objects get other numbers: from, to.
    pub(super) renumbered: BTreeMap<String, BTreeMap<u64, u64>>,
}

/// Which shared objects may be renumbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Renumbering {
    /// None: other snapshots depend on the numbers.
    None,
    /// Objects that one image names: its rename changes all references at once.
    OneImage,
    /// All objects.
    All,
}

/// A memory, and the memory of the parent that it is compared with.
struct Match {
    memory: MemoryId,
    parent: MemoryId,
}

/// Plans which pages of `child` come from `parent`; both chains are as they are now.
/// `total` gets the number of pages to compare, `progress` the number of pages done.
///
/// # Errors
/// Unreadable images; chains that are broken where they are needed.
pub(super) fn plan(
    child: At,
    parent: At,
    renumbering: Renumbering,
    total: &dyn Fn(u64),
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Plan> {
    let (memories, there) = (child.chain.memories(child.id)?, parent.chain.memories(parent.id)?);
    let objects = Objects::read(child.chain, child.id)?;
    let older = Objects::read(parent.chain, parent.id)?;
    if !memories.is_empty() && !there.is_empty() && !related(&memories, &there, &objects, &older) {
        return Err(DedupError::DifferentTrees {
            dir: child.dir().to_owned(),
            parent: parent.dir().to_owned(),
        });
    }
    let matches = matches(&memories, &there, &objects, &older, renumbering);
    let mut compared = Vec::new();
    for Match { memory, parent: mut other } in matches {
        let pagemap = child.chain.images(child.id).whole_pagemap(memory)?;
        // A memory that already asks the parent uses the parent's number.
        if pagemap.entries.iter().any(|entry| entry.presence == Presence::Parent) {
            other = memory;
        }
        let index = child.chain.index(child.id, memory)?;
        if index.extents().any(|extent| matches!(extent.place, Place::Punched { layer: 0, .. })) {
            log::warn!("{}: {memory} has freed pages, and is left as it is", child.dir().display());
            continue;
        }
        let older = match parent.chain.index(parent.id, other) {
            Err(ChainError::NoMemory { .. }) => continue,
            older => older?,
        };
        let pairs = pairs(&index, &older);
        total(pairs.iter().map(|pair| pair.pages).sum());
        compared.push((memory, other, pagemap, index, older, pairs));
    }
    let mut plan = Plan::default();
    for (memory, becomes, pagemap, index, older, pairs) in compared {
        let equal = compare::equal(&pairs, child.chain.files(), parent.chain.files(), progress)?;
        if equal.is_empty() {
            continue;
        }
        if memory != becomes {
            plan.renumber(&objects, memory, becomes);
        }
        let (entries, kept) = divide(&pagemap.entries, &equal);
        plan.memories.push(MemoryPlan {
            memory,
            becomes,
            pages_id: pagemap.pages_id,
            index,
            parent: Some(older),
            equal,
            entries,
            kept,
            gone: None,
        });
    }
    Ok(plan)
}

impl Plan {
    fn renumber(&mut self, objects: &Objects, memory: MemoryId, becomes: MemoryId) {
        let (MemoryId::Shared(from), MemoryId::Shared(to)) = (memory, becomes) else { return };
        for (kind, number) in objects.renumbered_in(from).unwrap_or_default() {
            let image = kind.file_name(*number);
            self.renumbered.entry(image).or_default().insert(from, to);
        }
    }
}

/// Whether two snapshots have a process or an object in common.
fn related(memories: &[MemoryId], there: &[MemoryId], objects: &Objects, older: &Objects) -> bool {
    let known: BTreeSet<_> = there.iter().collect();
    memories.iter().any(|memory| known.contains(memory)) || !objects.found_in(older).is_empty()
}

/// Matches the memories of the snapshot with those of the parent: processes by pid, since
/// the parent is asked by pid, and shared objects by identity if they can be renumbered,
/// otherwise by number. Whether a match is really the same process or object does not
/// matter: the bytes are compared.
fn matches(
    memories: &[MemoryId],
    there: &[MemoryId],
    objects: &Objects,
    older: &Objects,
    renumbering: Renumbering,
) -> Vec<Match> {
    let here: BTreeSet<MemoryId> = memories.iter().copied().collect();
    let there: BTreeSet<MemoryId> = there.iter().copied().collect();
    let found = objects.found_in(older);
    let may_become = |from: u64, to: u64| {
        let named_by: Option<&[ImageName]> = objects.renumbered_in(from);
        let possible = match renumbering {
            Renumbering::None => false,
            Renumbering::OneImage => named_by.is_some_and(|images| images.len() == 1),
            Renumbering::All => named_by.is_some_and(|images| !images.is_empty()),
        };
        // The number of a memfd has 32 bits in images.
        possible
            && u32::try_from(to).is_ok()
            && !objects.has(to)
            && !here.contains(&MemoryId::Shared(to))
    };
    let parent_of = |memory: MemoryId| match memory {
        MemoryId::Private(_) => memory,
        MemoryId::Shared(shmid) => match found.get(&shmid) {
            Some(other) if *other != shmid && may_become(shmid, *other) => MemoryId::Shared(*other),
            _ => memory,
        },
    };
    memories
        .iter()
        .map(|memory| Match { memory: *memory, parent: parent_of(*memory) })
        .filter(|found| there.contains(&found.parent))
        .collect()
}

/// Returns the pages that both the snapshot itself and its parent store, in pairs.
fn pairs(own: &Index, parent: &Index) -> Vec<Pair> {
    let mut pairs = Vec::new();
    let mut position = 0;
    for extent in own.extents() {
        // Layer 0 is the snapshot itself.
        let Place::Stored { layer: 0, file_page } = extent.place else { continue };
        let own_file = own.layers()[0].file;
        while parent.extent(position).is_some_and(|older| older.end() <= extent.first) {
            position += 1;
        }
        for older in (position..).map_while(|position| parent.extent(position)) {
            if older.first >= extent.end() {
                break;
            }
            let first = older.first.max(extent.first);
            let pages = older.end().min(extent.end()).0 - first.0;
            // An entry that refers to the parent would change whether a restore may load
            // the page later.
            if let Some((file, page)) = stored(parent, &older)
                && older.lazy == extent.lazy
            {
                pairs.push(Pair {
                    first,
                    pages,
                    left: (own_file, file_page + (first.0 - extent.first.0)),
                    right: (file, page + (first.0 - older.first.0)),
                });
            }
        }
    }
    pairs
}

/// Returns where the bytes of an extent are stored, if they are.
pub(super) fn stored(index: &Index, extent: &Extent) -> Option<(FileId, u64)> {
    match extent.place {
        Place::Stored { layer, file_page } => {
            Some((index.layers()[layer as usize].file, file_page))
        }
        _ => None,
    }
}

/// Divides the present pages into those that the parent provides and those that are kept.
/// Returns all entries, and the kept parts of the pages file.
fn divide(entries: &[PagemapEntry], equal: &[Stretch]) -> (Vec<PagemapEntry>, Vec<(u64, u64)>) {
    let (mut divided, mut kept) = (Vec::<PagemapEntry>::new(), Vec::<(u64, u64)>::new());
    let mut push = |entry: PagemapEntry| match divided.last_mut() {
        Some(last)
            if last.end() == entry.first
                && (last.presence, last.lazy) == (entry.presence, entry.lazy) =>
        {
            last.pages += entry.pages;
        }
        _ => divided.push(entry),
    };
    let mut keep = |file_page: u64, pages: u64| match kept.last_mut() {
        Some((first, count)) if *first + *count == file_page => *count += pages,
        _ => kept.push((file_page, pages)),
    };
    let (mut file_page, mut equal) = (0, equal.iter().peekable());
    for entry in entries {
        if entry.presence != Presence::Present {
            push(*entry);
            continue;
        }
        let mut next = entry.first;
        while next < entry.end() {
            while equal.next_if(|(first, pages)| first.0 + pages <= next.0).is_some() {}
            let (presence, until) = match equal.peek() {
                Some((first, pages)) if *first <= next => {
                    (Presence::Parent, PageIndex(first.0 + pages))
                }
                Some((first, _)) => (Presence::Present, *first),
                None => (Presence::Present, entry.end()),
            };
            let pages = until.min(entry.end()).0 - next.0;
            push(PagemapEntry { first: next, pages, presence, lazy: entry.lazy });
            if presence == Presence::Present {
                keep(file_page, pages);
            }
            file_page += pages;
            next.0 += pages;
        }
    }
    (divided, kept)
}

/// Checks that the chain now resolves a memory (`resolved`) to the same pages as before
/// `plan`: in the same places, or where equal pages are. Returns the pages of the new pages
/// file, each with the page that it is a copy of, for comparison.
///
/// # Errors
/// [`DedupError::Verify`].
pub(super) fn check(
    plan: &MemoryPlan,
    resolved: &Index,
    (child, parent, staged): (At, Option<At>, At),
) -> Result<Vec<Pair>> {
    let failed = |first, problem| DedupError::Verify {
        dir: child.dir().to_owned(),
        memory: plan.memory,
        first,
        problem,
    };
    let mut pairs = Vec::new();
    let (mut before, mut after) = (plan.index.extents(), resolved.extents());
    let (mut old, mut new) = (before.next(), after.next());
    let mut equal = plan.equal.iter().peekable();
    loop {
        let (Some(was), Some(is)) = (old, new) else {
            return match old.or(new) {
                None => Ok(pairs),
                Some(one) => Err(failed(one.first, "only one of them has it")),
            };
        };
        let first = was.first;
        if was.first != is.first {
            return Err(failed(was.first.min(is.first), "only one of them has it"));
        }
        let pages = was.pages.min(is.pages);
        if was.lazy != is.lazy {
            return Err(failed(first, "only in one of them a restore may load it later"));
        }
        let same = match (was.place, is.place) {
            (
                Place::Stored { layer: a, file_page: x },
                Place::Stored { layer: b, file_page: y },
            ) => {
                let now = staged.pages_file(resolved, b);
                if b == 0 {
                    pairs.push(Pair {
                        first,
                        pages,
                        left: (plan.index.layers()[a as usize].file, x),
                        right: (resolved.layers()[0].file, y),
                    });
                    true
                } else if a != 0 {
                    child.pages_file(&plan.index, a) == now && x == y
                } else {
                    while equal.next_if(|(from, count)| from.0 + count <= first.0).is_some() {}
                    let covered = equal.peek().is_some_and(|(from, count)| {
                        *from <= first && first.0 + pages <= from.0 + count
                    });
                    covered
                        && parent
                            .is_some_and(|parent| in_parent(plan, parent, first, pages, now, y))
                }
            }
            (
                Place::Stored { layer: 0, file_page: x }
                | Place::Punched { layer: 0, file_page: x },
                Place::Punched { layer: 0, file_page: y },
            ) => x == y && is_gone(plan, x, pages),
            (
                Place::Punched { layer: a, file_page: x },
                Place::Punched { layer: b, file_page: y },
            ) => child.pages_file(&plan.index, a) == staged.pages_file(resolved, b) && x == y,
            (a, b) => a == b,
        };
        if !same {
            return Err(failed(first, "it is in another place"));
        }
        old = rest(was, pages).or_else(|| before.next());
        new = rest(is, pages).or_else(|| after.next());
    }
}

/// Whether pages of the pages file will be gone.
fn is_gone(plan: &MemoryPlan, file_page: u64, pages: u64) -> bool {
    let range = file_page..file_page + pages;
    plan.gone.as_ref().is_some_and(|gone| gone.pages.within(range.clone()).eq([range]))
}

/// Whether the parent has the pages from `first` on in this file, starting with this page
/// of the file.
fn in_parent(
    plan: &MemoryPlan,
    parent: At,
    first: PageIndex,
    pages: u64,
    file: (&Path, u32),
    file_page: u64,
) -> bool {
    let Some(index) = &plan.parent else { return false };
    let mut done = 0;
    while done < pages {
        let page = PageIndex(first.0 + done);
        let Some(extent) = index.find(page) else { return false };
        let Place::Stored { layer, file_page: begin } = extent.place else { return false };
        let same = parent.pages_file(index, layer) == file
            && begin + (page.0 - extent.first.0) == file_page + done;
        if !same {
            return false;
        }
        done += extent.end().0 - page.0;
    }
    true
}

/// Returns the rest of an extent after its first pages.
fn rest(extent: Extent, pages: u64) -> Option<Extent> {
    let place = match extent.place {
        Place::Stored { layer, file_page } => Place::Stored { layer, file_page: file_page + pages },
        place => place,
    };
    let first = PageIndex(extent.first.0 + pages);
    let left = extent.pages - pages;
    (left > 0).then_some(Extent { first, pages: left, place, ..extent })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_divided_where_pages_are_equal() {
        let entry = |first, pages, presence| PagemapEntry {
            first: PageIndex(first),
            pages,
            presence,
            lazy: false,
        };
        use Presence::{Absent, Parent, Present};
        let entries = [
            entry(0, 4, Present),
            entry(4, 2, Parent),
            entry(6, 2, Present),
            entry(10, 1, Absent),
            entry(20, 10, Present),
        ];
        let equal = [(PageIndex(2), 2), (PageIndex(6), 1), (PageIndex(22), 3), (PageIndex(27), 3)];
        let (divided, kept) = divide(&entries, &equal);
        assert_eq!(
            divided,
            [
                entry(0, 2, Present),
                entry(2, 5, Parent),
                entry(7, 1, Present),
                entry(10, 1, Absent),
                entry(20, 2, Present),
                entry(22, 3, Parent),
                entry(25, 2, Present),
                entry(27, 3, Parent),
            ]
        );
        // Of the file: 0-1, 5, 6-7, 11-12.
        assert_eq!(kept, [(0, 2), (5, 3), (11, 2)]);
        assert_eq!(divide(&entries, &[]).0, entries);
    }
}
