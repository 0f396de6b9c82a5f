//! What of a snapshot its parent has already: decided, and nothing changed.

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

/// A snapshot in its chain.
#[derive(Clone, Copy, Debug)]
pub(super) struct At<'a> {
    pub(super) chain: &'a Chain,
    pub(super) id: SnapshotId,
}

impl At<'_> {
    /// Returns the snapshot's directory: a chain of others is not deduplicated.
    pub(super) fn dir(&self) -> &Path {
        self.chain.snapshot(self.id).path()
    }

    /// Returns the directory and the number of the pages file of one of an index's
    /// layers.
    pub(super) fn pages_file(&self, index: &Index, layer: u32) -> (&Path, u32) {
        let layer = &index.layers()[layer as usize];
        (self.chain.snapshot(layer.snapshot).path(), layer.pages_id)
    }
}

/// What becomes of one memory.
#[derive(Debug)]
pub(super) struct MemoryPlan {
    /// The memory as it is.
    pub(super) memory: MemoryId,
    /// Its number afterwards: the one that its parent has.
    pub(super) becomes: MemoryId,
    /// The number of its pages file now.
    pub(super) pages_id: u32,
    /// All of its pages, resolved.
    pub(super) index: Arc<Index>,
    /// The same of what its parent has, if anything is left to that.
    pub(super) parent: Option<Arc<Index>>,
    /// The pages that are equal.
    pub(super) equal: Vec<Stretch>,
    /// Its new pagemap.
    pub(super) entries: Vec<PagemapEntry>,
    /// What is to be kept of its pages file: first page of the file, and how many.
    pub(super) kept: Vec<(u64, u64)>,
    /// If what is not kept is gone, and everything else keeps its place.
    pub(super) gone: Option<Gone>,
}

/// Pages of a pages file that are to be gone.
#[derive(Debug)]
pub(super) struct Gone {
    /// The pages of the file.
    pub(super) pages: PageRanges,
    /// How many pages the file has.
    pub(super) total: u64,
}

impl MemoryPlan {
    /// Returns how many pages leave the pages file.
    pub(super) fn shared_pages(&self) -> u64 {
        self.equal.iter().map(|(_, pages)| pages).sum()
    }

    /// Returns how many pages stay in it.
    pub(super) fn kept_pages(&self) -> u64 {
        self.kept.iter().map(|(_, pages)| pages).sum()
    }
}

/// What becomes of a snapshot.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// The memories that change.
    pub(super) memories: Vec<MemoryPlan>,
    /// Images, by their names, in which shared objects get other numbers: from, to.
    pub(super) renumbered: BTreeMap<String, BTreeMap<u64, u64>>,
}

/// What a snapshot may be asked to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Renumbering {
    /// Nothing: others depend on the numbers.
    None,
    /// Objects that one image names: a rename of that image changes all at once.
    OneImage,
    /// All.
    All,
}

/// A memory, and with which one of the parent it is compared.
struct Match {
    memory: MemoryId,
    parent: MemoryId,
}

/// Plans what of `child` is left to `parent`; both are as they are resolved now.
/// `total` is told how many pages are going to be compared, `progress` how many are.
///
/// # Errors
/// Images that cannot be read, and chains that are broken where they are needed.
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
        // What asks the parent already asks by its number.
        if pagemap.entries.iter().any(|entry| entry.presence == Presence::Parent) {
            other = memory;
        }
        let index = child.chain.index(child.id, memory)?;
        if index.extents().any(|extent| matches!(extent.place, Place::Punched { layer: 0, .. })) {
            log::warn!(
                "{}: {memory} has pages that were freed; left as it is",
                child.dir().display()
            );
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

/// Says which memory is compared with which. Processes are matched by pid, since that
/// is how the parent is asked, and shared objects by what they are if their numbers
/// can be changed, else by these. Whether it is the same process or object after all
/// is for the bytes to tell.
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
        // The images have 32 bits for the number of a memfd.
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

/// Returns the pages that a snapshot itself stores and whose parent has them stored,
/// too, beside one another.
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
            // An entry of the parent would change whether a restore may wait.
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

/// Returns where an extent's bytes are, if they are.
pub(super) fn stored(index: &Index, extent: &Extent) -> Option<(FileId, u64)> {
    match extent.place {
        Place::Stored { layer, file_page } => {
            Some((index.layers()[layer as usize].file, file_page))
        }
        _ => None,
    }
}

/// Divides the pages that are present into those that are left to the parent and those
/// that are kept. Returns all entries, and what is kept of the pages file.
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

/// Checks that what a chain says of a memory now, in `resolved`, is what `plan` began
/// with: the same pages, where they were or where equal ones are. Returns the pages
/// that are in the new pages file, beside those that they are copies of, to be
/// compared.
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
                Some(one) => Err(failed(one.first, "it is in one of them only")),
            };
        };
        let first = was.first;
        if was.first != is.first {
            return Err(failed(was.first.min(is.first), "it is in one of them only"));
        }
        let pages = was.pages.min(is.pages);
        if was.lazy != is.lazy {
            return Err(failed(first, "a restore may leave it for later in one of them only"));
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
            return Err(failed(first, "it is found in another place"));
        }
        old = rest(was, pages).or_else(|| before.next());
        new = rest(is, pages).or_else(|| after.next());
    }
}

/// Whether pages of the pages file are to be gone.
fn is_gone(plan: &MemoryPlan, file_page: u64, pages: u64) -> bool {
    let range = file_page..file_page + pages;
    plan.gone.as_ref().is_some_and(|gone| gone.pages.within(range.clone()).eq([range]))
}

/// Whether the parent has the pages from `first` on in this file from this page on.
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

/// Returns what is left of an extent behind its first pages.
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
