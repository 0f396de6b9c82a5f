//! Frees the pages in a snapshot's ancestors that it supersedes: `rcriu dedup -D` and
//! `rcriu dump --auto-dedup`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    DedupError, Progress, Result,
    plan::{At, Gone, MemoryPlan, Plan},
    stage::{Stage, recover, snapshot_at},
    superseded::{self, Found},
};
use crate::{
    chain::{Chain, ChainError, Freeing, SnapshotId, disk_bytes},
    image::{
        Disk, punched,
        store::snapshot::{sync, sync_all},
    },
    sys::{
        fds,
        lock::{Access, DirectoryLocks},
        process,
    },
    units::page_bytes,
};

/// What is freed, or has been freed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Directories of ancestors that can no longer be restored, the oldest first.
    pub lost: Vec<PathBuf>,
    /// Other snapshots that need superseded pages, and how many are kept for each.
    pub kept_for: Vec<(PathBuf, u64)>,
    /// How many pages are freed.
    pub pages: u64,
    /// How many bytes the ancestors occupied on disk.
    pub bytes_before: u64,
    /// How many bytes they occupy now.
    pub bytes_after: u64,
}

/// The snapshot, and how to free.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeOptions {
    /// The snapshot's directory.
    pub dir: PathBuf,
    /// Rewrite a pages file if the file system cannot punch holes in it.
    pub rewrite: bool,
}

/// Frees the pages in the ancestors of a snapshot that the snapshot itself holds. Calls
/// `tell` with what will be freed before it changes anything and before it calls `progress`.
///
/// # Errors
/// Directories that are in use; a chain that cannot be read; a file system that cannot
/// punch holes, unless files may be rewritten. Then nothing is changed.
pub fn free(
    options: &FreeOptions,
    disk: Arc<dyn Disk>,
    tell: &mut dyn FnMut(&Freed),
    progress: &dyn Progress,
) -> Result<Freed> {
    let dir = &options.dir;
    require_directory(dir)?;
    let mut locks = DirectoryLocks::default();
    locks.take(dir, Access::Exclusive)?;
    let chain = Chain::open(dir)?;
    let id = snapshot_at(&chain, dir)?;
    if let Err(link) = &chain.snapshot(id).parent {
        return Err(ChainError::Link(link.clone()).into());
    }
    if superseded::ancestors(&chain, id).is_empty() {
        return Err(DedupError::NoParent { dir: dir.to_owned() });
    }
    lock_ancestors(&chain, id, &mut locks)?;
    for snapshot in chain.snapshots() {
        if let Some(dir) = snapshot.directory() {
            recover(dir)?;
        }
    }
    drop(chain);
    free_locked(options, disk, tell, progress)
}

/// Checks that images are not in an archive.
pub(super) fn require_directory(path: &Path) -> Result<()> {
    if path.is_file() {
        return Err(DedupError::NotADirectory { path: path.to_owned() });
    }
    Ok(())
}

/// Locks the ancestors of a snapshot for changing them.
///
/// # Errors
/// [`DedupError::Lock`].
pub fn lock_ancestors(chain: &Chain, id: SnapshotId, locks: &mut DirectoryLocks) -> Result<()> {
    // One descriptor for each.
    process::raise_descriptor_limit();
    for ancestor in superseded::ancestors(chain, id) {
        locks.take(chain.directory(ancestor)?, Access::Exclusive)?;
    }
    Ok(())
}

/// Checks that pages of a snapshot and its ancestors can be freed, as far as that is known
/// before a new snapshot supersedes them.
///
/// # Errors
/// As [`free`].
pub fn check_freeing(chain: &Arc<Chain>, id: SnapshotId, disk: Arc<dyn Disk>) -> Result<()> {
    let mut freeing = Freeing::new(Arc::clone(chain), disk);
    for memory in chain.memories(id)? {
        freeing.prepare_all(&*chain.index(id, memory)?)?;
    }
    Ok(())
}

/// Like [`free`], for a caller that has locked the directories.
///
/// # Errors
/// As [`free`].
pub fn free_locked(
    options: &FreeOptions,
    disk: Arc<dyn Disk>,
    tell: &mut dyn FnMut(&Freed),
    progress: &dyn Progress,
) -> Result<Freed> {
    let dir = &options.dir;
    let chain = Arc::new(Chain::open(dir)?);
    let id = snapshot_at(&chain, dir)?;
    let found = superseded::find(At { chain: &chain, id })?;
    let mut freeing = Freeing::new(Arc::clone(&chain), disk);
    let prepared =
        found.files.iter().try_for_each(|file| freeing.prepare(file.memory, &file.layer));
    let rewrite = match prepared {
        Err(ChainError::NoPunching { .. }) if options.rewrite => true,
        prepared => {
            prepared?;
            false
        }
    };
    let mut freed = told(&chain, id, &found)?;
    tell(&freed);
    // The copies of the freed pages must be on disk.
    let dir = chain.directory(id)?;
    sync_all(dir, |file| fds::start_writeback(file, 0, 0))?;
    if let Some(above) = dir.parent() {
        sync(above)?;
    }
    if rewrite {
        rewrite_files(&chain, &found, progress)?;
    } else {
        for file in &found.files {
            for pages in file.pages.iter() {
                freeing.note(file.memory, &file.layer, pages)?;
            }
        }
        progress.more(page_bytes(freeing.noted_pages()));
        freeing.sync()?;
        freeing.free(&mut |pages| progress.done(page_bytes(pages)))?;
    }
    freed.bytes_after = ancestors_bytes(&chain, id)?;
    Ok(freed)
}

/// Rewrites pages files without the freed pages. The other pages keep their place, so the
/// file has holes; a journal names them like punched pages.
fn rewrite_files(chain: &Chain, found: &Found, progress: &dyn Progress) -> Result<()> {
    let mut plans: BTreeMap<SnapshotId, Plan> = BTreeMap::new();
    for file in found.files.iter().filter(|file| !file.pages.is_empty()) {
        let snapshot = file.layer.snapshot;
        let images = &**chain.images(snapshot);
        let name = file.memory.pagemap_name();
        let mut pages = file.pages.clone();
        // Pages that were freed earlier.
        if let Some(gone) = punched::read(images, &name, file.layer.pages_id)? {
            pages.extend(&gone);
        }
        let total = file.layer.pages;
        let kept = pages.split(0..total).filter(|(_, gone)| !gone);
        let kept = kept.map(|(range, _)| (range.start, range.end - range.start)).collect();
        plans.entry(snapshot).or_default().memories.push(MemoryPlan {
            memory: file.memory,
            becomes: file.memory,
            pages_id: file.layer.pages_id,
            index: chain.index(snapshot, file.memory)?,
            parent: None,
            equal: Vec::new(),
            entries: images.whole_pagemap(file.memory)?.entries,
            kept,
            gone: Some(Gone { pages, total }),
        });
    }
    // Newest first: the index of a snapshot remains valid for its ancestors.
    for (id, plan) in plans.into_iter().rev() {
        let at = |id| At { chain, id };
        let parent = chain.snapshot(id).parent.as_ref().ok().copied().flatten();
        let stage = Stage::make(chain.directory(id)?, &plan, at(id), parent.map(at), progress)?;
        stage.publish(None)?;
    }
    Ok(())
}

/// Returns what the user is told before anything is changed.
fn told(chain: &Chain, id: SnapshotId, found: &Found) -> Result<Freed> {
    let bytes = ancestors_bytes(chain, id)?;
    Ok(Freed {
        lost: found.losers.iter().map(|id| chain.snapshot(*id).path().to_owned()).collect(),
        kept_for: found.kept_for.clone(),
        pages: found.files.iter().map(|file| file.pages.pages()).sum(),
        bytes_before: bytes,
        bytes_after: bytes,
    })
}

fn ancestors_bytes(chain: &Chain, id: SnapshotId) -> Result<u64> {
    let mut bytes = 0;
    for ancestor in superseded::ancestors(chain, id) {
        bytes += disk_bytes(&**chain.images(ancestor))?;
    }
    Ok(bytes)
}
