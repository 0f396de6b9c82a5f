//! Turns full dumps into a chain: `rcriu dedup --link`.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{
    DedupError, Progress, Result,
    free::require_directory,
    plan::{self, At, Plan, Renumbering},
    stage::{Stage, copy_file, copy_pages, recover, relative, snapshot_at},
};
use crate::{
    chain::{self, Chain, ChainError, Summary, disk_bytes},
    image::{
        Directory, Kind, PARENT_LINK, desc, proto, read_one,
        store::{
            DirectoryWriter, StoreWriter,
            snapshot::{DEDUP_STAGE, names, write_error},
        },
    },
    sys::{
        fds,
        lock::{Access, DirectoryLocks},
    },
    units::page_bytes,
};

/// The options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkOptions {
    /// The snapshots, the oldest first.
    pub dirs: Vec<PathBuf>,
    /// Write new directories, `DIR.linked`, and leave the originals alone.
    pub keep_originals: bool,
}

/// The result for one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linked {
    /// The snapshot, or its new copy.
    pub dir: PathBuf,
    /// Its parent; `None` if a link would gain nothing.
    pub parent: Option<PathBuf>,
    /// Pages that it now takes from the parent.
    pub shared_pages: u64,
    /// How many shared objects got the number that they have in the parent.
    pub renumbered: usize,
    /// How many bytes the snapshot occupied on disk.
    pub bytes_before: u64,
    /// How many bytes it occupies now.
    pub bytes_after: u64,
}

/// Links snapshots into a chain: each takes the pages that it has in common with the
/// previous one from there. At every moment each snapshot reads as before, and the next run
/// finishes the work of a run that was killed.
///
/// # Errors
/// Snapshots that are in use, out of order, of different trees, or linked otherwise; then
/// nothing is changed. Snapshots that cannot be read or written.
pub fn link(options: &LinkOptions, progress: &dyn Progress) -> Result<Vec<Linked>> {
    let dirs = directories(&options.dirs)?;
    let access = if options.keep_originals { Access::Shared } else { Access::Exclusive };
    let mut locks = DirectoryLocks::default();
    for dir in &dirs {
        locks.take(dir, access)?;
        let chain = Chain::open(dir)?;
        let base = chain.base(snapshot_at(&chain, dir)?);
        locks.take(chain.directory(base)?, access)?;
    }
    let given = dirs.iter().zip(&options.dirs).skip(1);
    let copies: Vec<PathBuf> = if options.keep_originals {
        given.map(|(dir, name)| copy_of(dir, name)).collect::<Result<_>>()?
    } else {
        for dir in &dirs {
            if recover(dir)? {
                log::warn!("{}: finished the work of an interrupted run", dir.display());
            }
        }
        Vec::new()
    };
    for pair in dirs.windows(2) {
        check_order(&pair[1], &pair[0])?;
        check_parent(&pair[1], &pair[0])?;
    }
    let mut linked = Vec::new();
    let mut parent = dirs[0].clone();
    for (number, dir) in dirs.iter().enumerate().skip(1) {
        let copy = copies.get(number - 1);
        if let Some(copy) = copy
            && is_finished(copy, dir, &parent)?
        {
            log::info!("{}: made by an earlier run", copy.display());
            linked.push(made_before(copy, dir)?);
            parent.clone_from(copy);
            continue;
        }
        let one = link_one(dir, &parent, copy.map(PathBuf::as_path), progress)?;
        parent.clone_from(&one.dir);
        linked.push(one);
    }
    Ok(linked)
}

/// Returns the named directories.
fn directories(named: &[PathBuf]) -> Result<Vec<PathBuf>> {
    if named.len() < 2 {
        return Err(DedupError::TooFew);
    }
    let (mut dirs, mut seen) = (Vec::new(), BTreeSet::new());
    for dir in named {
        let failed = |source| DedupError::File { step: "find", path: dir.clone(), source };
        let canonical = dir.canonicalize().map_err(failed)?;
        require_directory(dir)?;
        if !canonical.join(Kind::Inventory.file_name(0)).is_file() {
            return Err(DedupError::NoSnapshot { dir: dir.clone() });
        }
        if !seen.insert(canonical.clone()) {
            return Err(DedupError::Twice { dir: dir.clone() });
        }
        dirs.push(canonical);
    }
    Ok(dirs)
}

/// Returns the directory for the copy of a snapshot.
fn copy_of(dir: &Path, named: &Path) -> Result<PathBuf> {
    let name = dir.file_name().ok_or_else(|| DedupError::NoSnapshot { dir: named.to_owned() })?;
    let mut name = name.to_owned();
    name.push(".linked");
    let path = dir.with_file_name(name);
    Ok(path)
}

/// Whether `copy` is a finished copy of `dir`, linked to `parent` or to nothing. The
/// unfinished copy of a killed run has no inventory.
///
/// # Errors
/// [`DedupError::Exists`] if it is something else.
fn is_finished(copy: &Path, dir: &Path, parent: &Path) -> Result<bool> {
    let inventory = |dir: &Path| fs::read(dir.join(Kind::Inventory.file_name(0)));
    let found = match inventory(copy) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        found => found.ok(),
    };
    let exists = || DedupError::Exists { path: copy.to_owned() };
    if found.is_none() || found != inventory(dir).ok() {
        return Err(exists());
    }
    check_parent(copy, parent).map(|()| true).map_err(|_| exists())
}

/// Returns the result for a copy that an earlier run has finished.
fn made_before(copy: &Path, dir: &Path) -> Result<Linked> {
    let chain = Chain::open(copy)?;
    let id = snapshot_at(&chain, copy)?;
    let parent = chain.snapshot(id).parent.as_ref().ok().copied().flatten();
    let in_parent = |dir: &Path| -> Result<u64> {
        let chain = Chain::open(dir)?;
        Ok(Summary::of(&chain, snapshot_at(&chain, dir)?)?.total().in_parent)
    };
    Ok(Linked {
        dir: copy.to_owned(),
        parent: parent.map(|parent| chain.snapshot(parent).path().to_owned()),
        shared_pages: in_parent(copy)?.saturating_sub(in_parent(dir)?),
        renumbered: 0,
        bytes_before: disk_bytes(&Directory::at(dir))?,
        bytes_after: disk_bytes(&Directory::at(copy))?,
    })
}

/// Checks that a snapshot was not dumped before its parent. Copying changes dates, and
/// booting resets the time since boot: only if both say so, it is an error.
fn check_order(dir: &Path, parent: &Path) -> Result<()> {
    let when = |dir: &Path| -> Result<(SystemTime, Option<u64>)> {
        let path = dir.join(Kind::Inventory.file_name(0));
        let inventory: proto::InventoryEntry = read_one(&path, Kind::Inventory)?;
        let date = fs::metadata(&path).and_then(|meta| meta.modified());
        let date = date.map_err(|source| DedupError::File { step: "look at", path, source })?;
        Ok((date, inventory.dump_uptime))
    };
    let ((date, uptime), (before, uptime_before)) = (when(dir)?, when(parent)?);
    let earlier = uptime.zip(uptime_before).is_none_or(|(now, before)| now < before);
    if date < before && earlier {
        return Err(DedupError::Order { dir: dir.to_owned(), parent: parent.to_owned() });
    }
    Ok(())
}

/// Checks that a snapshot has no other parent.
fn check_parent(dir: &Path, parent: &Path) -> Result<()> {
    let chain = Chain::open(dir)?;
    match &chain.snapshot(snapshot_at(&chain, dir)?).parent {
        Ok(None) => Ok(()),
        Ok(Some(found)) if chain.snapshot(*found).path() == parent => Ok(()),
        Ok(Some(found)) => Err(DedupError::OtherParent {
            dir: dir.to_owned(),
            found: chain.snapshot(*found).path().to_owned(),
            expected: parent.to_owned(),
        }),
        Err(link) => Err(ChainError::Link(link.clone()).into()),
    }
}

/// Links one snapshot to the previous one, in place or in a copy.
fn link_one(
    dir: &Path,
    parent_dir: &Path,
    copy: Option<&Path>,
    progress: &dyn Progress,
) -> Result<Linked> {
    let (chain, parent_chain) = (Chain::open(dir)?, Chain::open(parent_dir)?);
    let child = At { chain: &chain, id: snapshot_at(&chain, dir)? };
    let parent = At { chain: &parent_chain, id: snapshot_at(&parent_chain, parent_dir)? };
    let renumbering = if copy.is_some() {
        Renumbering::All
    } else if !chain::children(dir)?.is_empty() {
        Renumbering::None
    } else {
        Renumbering::OneImage
    };
    let more = |pages| progress.more(page_bytes(pages));
    let done = |pages| progress.done(page_bytes(pages));
    let plan = plan::plan(child, parent, renumbering, &more, &done)?;
    let bytes_before = disk_bytes(&Directory::at(dir))?;
    let was_linked = !matches!(chain.snapshot(child.id).parent, Ok(None));
    let gained = !plan.memories.is_empty();
    for memory in &plan.memories {
        log::info!(
            "{}: {}: {} pages come from the parent now, {} are kept",
            dir.display(),
            memory.memory,
            memory.shared_pages(),
            memory.kept_pages()
        );
    }
    let dir = match copy {
        None => {
            if gained {
                Stage::make(dir, &plan, child, Some(parent), progress)?
                    .publish(Some(parent_dir))?;
            }
            dir
        }
        Some(copy) => {
            let linked_to = (gained || was_linked).then_some(parent_dir);
            write_copy(copy, &plan, (child, parent), linked_to, progress)?;
            copy
        }
    };
    Ok(Linked {
        dir: dir.to_owned(),
        parent: (gained || was_linked).then(|| parent_dir.to_owned()),
        shared_pages: plan.memories.iter().map(plan::MemoryPlan::shared_pages).sum(),
        renumbered: plan.memories.iter().filter(|memory| memory.memory != memory.becomes).count(),
        bytes_before,
        bytes_after: disk_bytes(&Directory::at(dir))?,
    })
}

/// Writes a copy of a snapshot according to the plan.
fn write_copy(
    dir: &Path,
    plan: &Plan,
    (child, parent): (At, At),
    linked_to: Option<&Path>,
    progress: &dyn Progress,
) -> Result<()> {
    let failed = |step, path: &Path| {
        let path = path.to_owned();
        move |source| DedupError::File { step, path, source }
    };
    let mode = fs::metadata(child.dir()).map_err(failed("look at", child.dir()))?.permissions();
    match DirBuilder::new().mode(mode.mode()).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(write_error(dir, error).into());
        }
        _ => {}
    }
    let mut locks = DirectoryLocks::default();
    locks.take(dir, Access::Exclusive)?;
    // The unfinished copy of a killed run has no inventory, and is made again.
    let left = dir.join(DEDUP_STAGE);
    match fs::remove_dir_all(&left) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(write_error(&left, error).into());
        }
        _ => {}
    }
    let stage = Stage::make(dir, plan, child, Some(parent), progress)?;
    let images = DirectoryWriter::begin(dir)?;
    let replaced: BTreeSet<String> = plan
        .memories
        .iter()
        .flat_map(|memory| {
            [memory.memory.pagemap_name(), Kind::Pages.file_name(memory.pages_id.into())]
        })
        .chain(plan.renumbered.keys().cloned())
        .collect();
    let inventory = Kind::Inventory.file_name(0);
    for name in names(child.dir())? {
        let Some(name) = name.to_str() else { continue };
        let Some((desc, _)) = desc::by_file_name(name) else { continue };
        if replaced.contains(name) || name == inventory {
            continue;
        }
        let (from, to) = (child.dir().join(name), images.path_of(name));
        if desc.kind == Kind::Pages { copy_pages(&from, &to)? } else { copy_file(&from, &to)? }
    }
    for (path, name) in stage.files().into_iter().flatten() {
        let target = images.path_of(&name);
        fs::rename(&path, &target).map_err(|source| write_error(&target, source))?;
    }
    if let Some(parent) = linked_to {
        let link = images.path_of(PARENT_LINK);
        let linked = images.link_parent(&relative(dir, parent));
        linked.map_err(|source| write_error(&link, source))?;
    }
    stage.taken()?;
    images.sync(&|file| fds::start_writeback(file, 0, 0))?;
    Ok(images.commit_as(&child.dir().join(inventory))?)
}
