//! Finds the pages of a snapshot's ancestors that it supersedes; changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::{Path, PathBuf},
};

use super::{DedupError, Result, plan::At};
use crate::{
    chain::{Chain, ChainError, Index, Layer, Place, SnapshotId, freed::stored},
    image::{MemoryId, Pagemap, Presence, punched},
    units::{PageRanges, page_bytes},
};

/// Pages of an ancestor's pages file.
#[derive(Debug)]
pub(super) struct Superseded {
    /// The memory of the pages.
    pub(super) memory: MemoryId,
    /// The pages file.
    pub(super) layer: Layer,
    /// The pages of the file that can be freed; empty if only pages that were recorded
    /// earlier may be left to free.
    pub(super) pages: PageRanges,
}

/// What a snapshot supersedes in its ancestors.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The pages that can be freed.
    pub(super) files: Vec<Superseded>,
    /// The ancestors that use some of the pages, by position: they can no longer be
    /// restored afterwards.
    pub(super) losers: Vec<SnapshotId>,
    /// Directories of other snapshots that need pages, and how many are kept for each.
    pub(super) kept_for: Vec<(PathBuf, u64)>,
}

/// A pages file: directory and number.
type FileName = (PathBuf, u32);

/// Returns the ancestors of a snapshot, from its parent down.
pub(super) fn ancestors(chain: &Chain, id: SnapshotId) -> Vec<SnapshotId> {
    let mut found = Vec::new();
    let mut next = id;
    while let Ok(Some(parent)) = chain.snapshot(next).parent {
        found.push(parent);
        next = parent;
    }
    found
}

/// Finds the pages that can be freed in the ancestors of a snapshot, because it holds the
/// same pages of the same memories itself. Other snapshots beside it and its ancestors keep
/// what they need.
///
/// # Errors
/// Unreadable images of the snapshot, of its ancestors, or of another snapshot that may
/// need pages.
pub(super) fn find(at: At) -> Result<Found> {
    let At { chain, id } = at;
    let path = ancestors(chain, id);
    let mut found = Found::default();
    for memory in chain.memories(id)? {
        let own = chain.index(id, memory)?;
        check_length(at, &own)?;
        let held: PageRanges = held(&own).collect();
        if held.is_empty() {
            continue;
        }
        for ancestor in &path {
            let images = &**chain.images(*ancestor);
            let pagemap = match images.whole_pagemap(memory) {
                // The memory begins above: what is below belongs to another memory.
                Err(error) if error.is_missing() => break,
                pagemap => pagemap?,
            };
            let (mut pages, total) = file_pages(&pagemap, &held);
            let gone = punched::read(images, &memory.pagemap_name(), pagemap.pages_id)?;
            gone.iter().flat_map(PageRanges::iter).for_each(|range| pages.remove(range));
            // An earlier run may not have freed all pages that it recorded.
            if !pages.is_empty() || gone.is_some() {
                let layer = Layer {
                    snapshot: *ancestor,
                    pages_id: pagemap.pages_id,
                    pages: total,
                    file: chain.enter_pages(*ancestor, pagemap.pages_id),
                    dense: false,
                };
                found.files.push(Superseded { memory, layer, pages });
            }
        }
    }
    keep(at, &path, &mut found)?;
    check_claims(chain, &found.files)?;
    found.losers = losers(chain, &path, &found.files);
    Ok(found)
}

/// Returns the pages of a memory that the snapshot's own pages file holds.
fn held(own: &Index) -> impl Iterator<Item = Range<u64>> {
    own.extents().filter_map(|extent| {
        let in_own = matches!(extent.place, Place::Stored { layer: 0, .. });
        in_own.then(|| extent.first.0..extent.end().0)
    })
}

/// Checks that a snapshot's pages files are as long as its pagemaps claim, because the
/// other copies will be freed.
fn check_length(at: At, own: &Index) -> Result<()> {
    let Some(layer) = own.layers().first().filter(|layer| layer.pages > 0) else { return Ok(()) };
    let file = at.chain.files().get(layer.file)?;
    let (len, wanted) = (file.stat()?.len, page_bytes(layer.pages));
    if len >= wanted {
        return Ok(());
    }
    Err(ChainError::Truncated {
        path: file.path().to_owned(),
        offset: len,
        wanted: wanted - len,
        end: len,
    }
    .into())
}

/// Returns which pages of a pages file belong to `held`, and how many pages it has.
fn file_pages(pagemap: &Pagemap, held: &PageRanges) -> (PageRanges, u64) {
    let (mut pages, mut before) = (PageRanges::new(), 0);
    for entry in pagemap.entries.iter().filter(|entry| entry.presence == Presence::Present) {
        for part in held.within(entry.first.0..entry.end().0) {
            let start = before + (part.start - entry.first.0);
            pages.insert(start..start + (part.end - part.start));
        }
        before += entry.pages;
    }
    (pages, before)
}

/// Excludes the pages that other snapshots need: those in the directories of the snapshot
/// and its ancestors, and those that these lead to.
fn keep(at: At, path: &[SnapshotId], found: &mut Found) -> Result<()> {
    let dir = |id: SnapshotId| at.chain.snapshot(id).path();
    let line: BTreeSet<&Path> = path.iter().copied().chain([at.id]).map(dir).collect();
    let mut wanted: BTreeMap<FileName, &mut PageRanges> = found
        .files
        .iter_mut()
        .map(|file| ((dir(file.layer.snapshot).to_owned(), file.layer.pages_id), &mut file.pages))
        .collect();
    let mut looked_at = BTreeSet::new();
    let above: BTreeSet<&Path> = line.iter().filter_map(|dir| dir.parent()).collect();
    for above in above {
        let beside = Chain::open(above)?;
        for id in beside.ids() {
            let other = beside.snapshot(id).path();
            if line.contains(other) || !looked_at.insert(other.to_owned()) {
                continue;
            }
            // A snapshot that descends from this one finds the freed pages here.
            let below = ancestors(&beside, id);
            if !below.iter().any(|id| line.contains(beside.snapshot(*id).path()))
                || below.iter().any(|id| beside.snapshot(*id).path() == dir(at.id))
            {
                continue;
            }
            let kept = take_out(&beside, id, &mut wanted)?;
            if kept > 0 {
                found.kept_for.push((other.to_owned(), kept));
            }
        }
    }
    Ok(())
}

/// Excludes the pages that one snapshot needs, and returns how many.
fn take_out(
    chain: &Chain,
    id: SnapshotId,
    wanted: &mut BTreeMap<FileName, &mut PageRanges>,
) -> Result<u64> {
    let unknown =
        |source| DedupError::Unknown { dir: chain.snapshot(id).path().to_owned(), source };
    let mut kept = 0;
    for memory in chain.memories(id)? {
        let index = chain.index(id, memory).map_err(unknown)?;
        for (layer, pages) in stored(&index) {
            let name = (chain.snapshot(layer.snapshot).path().to_owned(), layer.pages_id);
            if let Some(wanted) = wanted.get_mut(&name) {
                let before = wanted.pages();
                wanted.remove(pages);
                kept += before - wanted.pages();
            }
        }
    }
    Ok(kept)
}

/// Checks that only one memory claims each pages file.
fn check_claims(chain: &Chain, files: &[Superseded]) -> Result<()> {
    let snapshots: BTreeSet<SnapshotId> = files.iter().map(|file| file.layer.snapshot).collect();
    for id in snapshots {
        let mut claims = BTreeMap::new();
        for memory in chain.memories(id)? {
            let pages_id = chain.images(id).pagemap(memory)?.pages_id();
            if let Some(first) = claims.insert(pages_id, memory) {
                let (dir, second) = (chain.snapshot(id).path().to_owned(), memory);
                return Err(ChainError::SharedPages { dir, pages_id, first, second }.into());
            }
        }
    }
    Ok(())
}

/// Returns the ancestors that use freed pages.
fn losers(chain: &Chain, path: &[SnapshotId], files: &[Superseded]) -> Vec<SnapshotId> {
    let freed: BTreeMap<(SnapshotId, u32), &PageRanges> = files
        .iter()
        .map(|file| ((file.layer.snapshot, file.layer.pages_id), &file.pages))
        .collect();
    let memories: BTreeSet<MemoryId> = files.iter().map(|file| file.memory).collect();
    let snapshots: BTreeSet<SnapshotId> =
        files.iter().filter(|f| !f.pages.is_empty()).map(|f| f.layer.snapshot).collect();
    let finds_freed = |id: SnapshotId, memory: MemoryId| {
        // A broken snapshot cannot be restored anyway.
        let Ok(index) = chain.index(id, memory) else { return false };
        stored(&index).any(|(layer, pages)| {
            let freed = freed.get(&(layer.snapshot, layer.pages_id));
            freed.is_some_and(|freed| freed.within(pages).next().is_some())
        })
    };
    let loses = |id: &SnapshotId| {
        snapshots.contains(id) || memories.iter().any(|memory| finds_freed(*id, *memory))
    };
    path.iter().rev().copied().filter(loses).collect()
}
