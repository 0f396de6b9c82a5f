//! Dumps a tree of processes: the order of the phases.
//!
//! The dump stops the tree, checks it, collects its state and copies its memory. Then it
//! syncs the images. Only then the directory becomes a snapshot, and the tree runs on or is
//! killed. If anything fails before that, the tree runs on.

mod census;
mod check;
mod error;
mod live;
mod options;
mod pre_dump;
mod room;
mod series;
mod stats;
mod target;
mod tracking;
mod tree;

use std::{
    fs,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};

pub use error::{DumpError, Result};
pub use live::Options as LiveOptions;
pub use options::{Goal, Options, Store};
pub use series::new_directory;

pub use crate::track::Tracker;
use crate::{
    action::{Actions, Stage},
    arch,
    causes::{tell, with_sources},
    chain::{self, Chain, SnapshotId},
    dedup,
    fault::{self, Point},
    image::{
        Kind,
        disk::Kernel,
        proto,
        tree::{ArenaIds, Arenas},
    },
    inject::{Frozen, Outcome, living},
    lazy, proc,
    res::{
        file::{DumpOptions, FileTable},
        ns, tree as common,
    },
    step::StepError,
    sys::{
        cancel,
        lock::{Access, DirectoryLocks},
        output,
    },
    units::{HostPid, PidMap},
};
use census::Census;
use live::Live;
use series::Series;
use stats::Stats;
use target::Target;
use tracking::Tracking;
use tree::Collection;

/// The version of the format (`inventory_entry.img_version`): each image begins with the
/// common magic.
const FORMAT_VERSION: u32 = 2;

/// Dumps a tree of processes.
///
/// # Errors
/// Why the tree was not dumped; it runs on.
pub fn run(options: &Options) -> Result<()> {
    let Options {
        root,
        goal,
        store,
        freeze,
        common,
        namespaces,
        files,
        track,
        live,
        actions,
        stats,
    } = options;
    let (root, goal) = (*root, *goal);
    let stats_options = stats;
    arch::check_built()?;
    if proc::stat(root).is_err_and(|error| error.is_vanished()) {
        return Err(DumpError::NoProcess { pid: root });
    }
    let images_dir = check_directory(&store.images_dir)?;
    check_outside(root)?;
    lazy::await_pagers(root, &mut |pid| {
        let message = format!("waits until the pager of process {pid} has supplied all memory");
        tell(log::Level::Info, &message);
    })?;
    let actions = Actions::new(actions, &images_dir);
    let mut locks = DirectoryLocks::default();
    locks.take(&images_dir, Access::Exclusive)?;
    check_children(&images_dir)?;
    let series = store.chain.as_deref().map(|dir| Series::open(dir, root)).transpose()?;
    let parents = (store, series.as_ref());
    let (link, parent) = find_parent(parents, &images_dir, &mut locks)?.unzip();
    crate::sys::process::raise_descriptor_limit();
    actions.run(Stage::PreDump, Some(root))?;
    let mut stats = Stats::default();
    let server = target::connect(store, parent.as_ref())?;
    // Before the tree is stopped, so that it is dropped when the tree runs again.
    let mut live = live.map(Live::new);
    let mut frozen = stats.freezing(|| Frozen::freeze(root, *freeze))?;
    stats.frozen();
    let census = Census::take(&frozen.tasks)?;
    let pids = ns::pids_of(&frozen.tasks)?;
    log::info!("stopped {} processes", frozen.tasks.len());
    // Before any file is opened: a program of the tree may decide whether that is allowed.
    let own_namespaces = ns::OfTree::of(&frozen.tasks);
    let of_namespaces = (&own_namespaces, namespaces);
    let arenas = check::tree(&frozen.tasks, &pids, goal, (common, of_namespaces))?;
    if live.is_some() {
        Live::check(&frozen, goal)?;
    }
    let network = NetworkLock::take(&actions, root, goal)?;
    let mut target = Target::begin(&store.images_dir, server)?;
    if let Some(link) = &link {
        target.images.link_parent(link)?;
    }
    // A pre-dump injects nothing, unless changes are to be tracked.
    if !goal.is_pre_dump() || track.for_next() {
        let more = live.as_ref().map_or(Ok(0), |_| Live::bytes_needed(&frozen.tasks))?;
        room::check(&frozen.tasks, more)?;
    }
    let since = parent.as_ref().map(|(chain, id)| (chain.as_ref(), *id));
    let tracking = Tracking::new(*track, goal, since)?;
    match goal {
        Goal::Memory => {
            let stopped = (frozen, &census);
            let of_tree = (&pids, Arenas::new(arenas));
            let parent = (parent.as_ref(), series.as_ref());
            let options = (common, stats_options);
            pre_dump::run(options, stopped, of_tree, target, parent, tracking, stats)?;
        }
        Goal::Tree(outcome) => {
            let dumped = dump_stopped(
                (common, namespaces, files, outcome),
                (&mut frozen, live.as_mut()),
                (pids, arenas, own_namespaces),
                &mut target,
                parent.as_ref(),
                tracking,
                &mut stats,
            );
            let dumped = census.explain(dumped)?;
            let target = (target, inventory(parent.as_ref(), series.as_ref())?);
            let stopped = (frozen, network, &census);
            finish(
                (root, &actions),
                stopped,
                target,
                dumped,
                (outcome, live.as_mut()),
                &mut stats,
            )?;
            stats.finish(stats_options);
        }
    }
    if store.free_parent && store.server.is_none() && parent.is_some() {
        free_superseded(&images_dir);
    }
    if let Some(series) = series {
        match series.keep(&images_dir) {
            Ok(dir) => log::info!("the next dump finds this one at {}", dir.display()),
            Err(error) => log::warn!(
                "the dump is complete, but could not be copied for the next one (--chain): {error}"
            ),
        }
    }
    Ok(())
}

/// Tells the user's actions that the tree is about to send packets again, unless the dump ends it.
struct NetworkLock<'a>(Option<(&'a Actions<'a>, HostPid)>);

impl<'a> NetworkLock<'a> {
    /// Runs the actions of a tree that was just stopped. A pre-dump has none.
    fn take(actions: &'a Actions<'a>, root: HostPid, goal: Goal) -> Result<Self> {
        if goal.is_pre_dump() {
            return Ok(Self(None));
        }
        let lock = Self(Some((actions, root)));
        actions.run(Stage::NetworkLock, Some(root))?;
        actions.run(Stage::QueryExtFiles, Some(root))?;
        Ok(lock)
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for NetworkLock<'_> {
    fn drop(&mut self) {
        if let Some((actions, root)) = self.0 {
            actions.run_anyway(Stage::NetworkUnlock, root);
        }
    }
}

/// Checks that this program is not in the tree of `root`.
fn check_outside(root: HostPid) -> Result<()> {
    let mut pid = HostPid::own();
    while pid.0 > 0 {
        if pid == root {
            return Err(DumpError::Inside { pid });
        }
        pid = proc::stat(pid)?.ppid;
    }
    Ok(())
}

/// Frees the pages in the ancestors that the new snapshot supersedes. A failure is only a
/// warning: the snapshot is complete, and the pages can be freed later.
fn free_superseded(images_dir: &Path) {
    let mut tell = |freed: &dedup::Freed| {
        for dir in &freed.lost {
            log::warn!("{}: can no longer be restored; its descendants can", dir.display());
        }
        for (dir, pages) in &freed.kept_for {
            log::info!("{}: needs {pages} pages, which are kept", dir.display());
        }
    };
    let options = dedup::FreeOptions { dir: images_dir.to_owned(), rewrite: false };
    match dedup::free_locked(&options, Arc::new(Kernel), &mut tell, &()) {
        Ok(freed) => log::info!("freed {} pages in the ancestors", freed.pages),
        Err(error) => log::warn!(
            "the dump is complete, but not all the pages that it supersedes were freed: {}\nhelp: \
             rcriu dedup -D {} frees them",
            with_sources(&error),
            images_dir.display()
        ),
    }
}

/// Syncs the images and ends the stop. A tree that runs on does so before the sync, since
/// its images are complete in memory and it need not wait for the disk; unless an action
/// script is to see the complete images while the tree is stopped. With `live`, it always does.
fn finish(
    (root, actions): (HostPid, &Actions<'_>),
    (frozen, network, census): (Frozen, NetworkLock<'_>, &Census),
    (mut target, mut inventory): (Target, proto::InventoryEntry),
    (mut files, tracking): (FileTable, Tracking),
    (outcome, live): (Outcome, Option<&mut Live>),
    stats: &mut Stats,
) -> Result<()> {
    let mut frozen = Some(frozen);
    // Dropped before the tree is released if a step fails.
    let mut network = Some(network);
    if outcome == Outcome::Run {
        files.warn_about_link_remaps();
    }
    if outcome == Outcome::Run && (actions.is_empty() || live.is_some()) {
        census.check_stopped()?;
        network = None;
        let released = frozen.take().map_or(Ok(()), |frozen| frozen.release(outcome));
        census.explain(released.map_err(DumpError::from))?;
        stats.thawed();
    }
    if let Some(live) = live {
        live.finish(&mut target, stats)?;
    }
    // A process of a tree that runs on may exit by now: the images are complete.
    let check = || frozen.as_ref().map_or(Ok(()), |_| census.check_stopped());
    let name = new_name()?;
    files.note(&mut inventory);
    stats.syncing(|| commit(target, tracking, (&name, inventory), check))?;
    // If a script fails, the tree runs on.
    actions.run(Stage::PostDump, Some(root))?;
    if let Some(frozen) = frozen {
        if outcome != Outcome::Run {
            files.keep_link_remaps();
        }
        let mut frozen = frozen;
        if outcome == Outcome::Kill {
            frozen.set_doomed(true)?;
            if let Err(error) = files.prepare_kill(&name) {
                frozen.set_doomed(false)?;
                return Err(error.into());
            }
        }
        if outcome == Outcome::Run {
            drop(network);
            frozen.release(outcome)?;
        } else {
            frozen.release(outcome)?;
            network.into_iter().for_each(NetworkLock::keep);
        }
        stats.thawed();
    }
    Ok(())
}

/// Returns a name that no other dump has.
fn new_name() -> Result<String> {
    let path = PathBuf::from("/proc/sys/kernel/random/uuid");
    let name = fs::read_to_string(&path).map_err(|source| DumpError::File { path, source })?;
    Ok(name.trim().to_owned())
}

/// Syncs the images, makes them a snapshot, and lets tracking start from it. Calls `check`
/// just before the commit.
fn commit(
    target: Target,
    tracking: Tracking,
    (name, mut inventory): (&str, proto::InventoryEntry),
    check: impl FnOnce() -> Result<()>,
) -> Result<()> {
    inventory.dump_criu_run_id = Some(name.as_bytes().to_vec());
    target.commit(&inventory, check)?;
    tracking.commit(name);
    Ok(())
}

/// The parent chain and the snapshot in it.
type Parent = (Arc<Chain>, SnapshotId);

/// Returns the name of the parent dump, for the inventory.
fn parent_name(parent: Option<&Parent>) -> Result<Option<Vec<u8>>> {
    let Some((chain, id)) = parent else { return Ok(None) };
    Ok(Some(chain::dump_name(&**chain.images(*id))?))
}

/// Writes all images except the inventory.
fn dump_stopped(
    (common, namespaces, files, outcome): (
        &common::DumpOptions,
        &ns::Options,
        &DumpOptions,
        Outcome,
    ),
    (frozen, live): (&mut Frozen, Option<&mut Live>),
    (pids, arenas, own_namespaces): (PidMap, Vec<ArenaIds>, ns::OfTree),
    target: &mut Target,
    parent: Option<&Parent>,
    tracking: Tracking,
    stats: &mut Stats,
) -> Result<(FileTable, Tracking)> {
    let numbers = frozen.tasks.iter().flat_map(|task| {
        let threads = task.threads.iter().map(|thread| pids.ns(thread.tid));
        threads.chain([pids.ns(task.pid)])
    });
    let mut files = FileTable::new(files, pids.clone(), numbers.collect());
    let own_namespaces = Rc::new(own_namespaces);
    let roots = own_namespaces.roots(&frozen.tasks, &pids)?;
    files.set_namespaces(Rc::clone(&own_namespaces), roots);
    for task in living(&frozen.tasks) {
        files.add_listeners(task.witness())?;
    }
    let frozen_cgroups = frozen.cgroups();
    let of_tree =
        common::Dumped { tasks: &frozen.tasks, pids: &pids, frozen_cgroups: &frozen_cgroups };
    let common = common::collectors(&of_tree, common)?;
    let of_tree = (pids, arenas, own_namespaces);
    let Target { images, server } = target;
    let mut collection = Collection::new(images, of_tree, files, tracking, common, &frozen.tasks);
    collection.spaces = live.is_some().then(Vec::new);
    collection.namespaces(&frozen.tasks, namespaces)?;
    for (position, task) in frozen.tasks.iter_mut().enumerate() {
        if cancel::is_cancelled() {
            return Err(DumpError::Cancelled);
        }
        collection.task(task, position)?;
        fault::hit(Point::DumpAsked)?;
    }
    collection.finish()?;
    fault::hit(Point::DumpFiles)?;
    let mut memories = std::mem::take(&mut collection.memories);
    target::find_parents(&mut memories, parent, server.as_ref())?;
    stats.collected();
    if let Some(live) = live {
        let spaces = collection.spaces.take().unwrap_or_default();
        live.begin(&mut frozen.tasks, &spaces, memories, (images, server.as_mut()), stats)?;
    } else {
        let early = outcome != Outcome::Run;
        let copy = || target::copy(&mut memories, 1, (images, server.as_mut()), early);
        stats.copied = stats.copying(copy)?;
    }
    if let Some((chain, snapshot)) = parent {
        stats.untracked = collection.tracking.untracked;
        if let Some(dir) = chain.snapshot(*snapshot).directory() {
            let shared = images.share(Kind::TmpfsDev, dir)?;
            log::info!("{shared} file systems in memory are as in the parent");
        }
    }
    Ok((collection.files, collection.tracking))
}

/// Checks that a dump into this directory breaks no snapshot beside it. If another snapshot
/// has it as its parent, that one would find other pages there. A snapshot without children
/// may be replaced, as CRIU does.
fn check_children(images_dir: &Path) -> Result<()> {
    if !images_dir.join(Kind::Inventory.file_name(0)).exists() {
        return Ok(());
    }
    let children = chain::children(images_dir)?;
    if children.is_empty() {
        return Ok(());
    }
    let name = |dir: &PathBuf| dir.file_name().map(|name| name.to_string_lossy().into_owned());
    let children: Vec<String> = children.iter().filter_map(name).collect();
    Err(DumpError::HasChildren { dir: images_dir.to_owned(), children: children.join(", ") })
}

/// Returns the absolute path of a directory.
fn check_directory(path: &Path) -> Result<PathBuf> {
    let problem = match path.canonicalize() {
        Ok(found) if found.is_dir() => match output::check_directory(path) {
            Ok(()) => return Ok(found),
            Err(error) => error.to_string(),
        },
        Ok(_) => "it is not a directory".to_owned(),
        Err(error) => format!("{error}\nhelp: make it, or name another one with -D"),
    };
    Err(StepError::Directory { path: path.to_owned(), problem }.into())
}

/// Opens the parent that the user names, or the newest one of the series that can be used. Returns the
/// link to it, too.
fn find_parent(
    (store, series): (&Store, Option<&Series>),
    images_dir: &Path,
    locks: &mut DirectoryLocks,
) -> Result<Option<(PathBuf, Parent)>> {
    if let Some(link) = &store.parent {
        let parent = open_parent(store, images_dir, link, locks)?;
        return Ok(Some((link.clone(), parent)));
    }
    for link in series.map_or_else(Vec::new, |series| series.parents(images_dir)) {
        let parent = open_parent(store, images_dir, &link, locks);
        match parent.and_then(|parent| require_ancestors(&parent).map(|()| parent)) {
            Ok(parent) => {
                log::info!("the parent is {}", link.display());
                return Ok(Some((link, parent)));
            }
            Err(error) => log::warn!(
                "{} cannot be the parent of this dump: {}",
                link.display(),
                with_sources(&error)
            ),
        }
    }
    Ok(None)
}

/// Checks that all ancestors of a parent are there.
fn require_ancestors((chain, id): &Parent) -> Result<()> {
    let mut id = *id;
    loop {
        chain.require_version(id)?;
        chain.require_bond(id).map_err(chain::ChainError::from)?;
        match &chain.snapshot(id).parent {
            Ok(Some(parent)) => id = *parent,
            Ok(None) => return Ok(()),
            Err(error) => return Err(chain::ChainError::from(error.clone()).into()),
        }
    }
}

/// Opens the chain of the directory that `--prev-images-dir` names, relative to the images
/// directory. Locks it against changes, or against any use if pages are to be freed in it.
fn open_parent(
    store: &Store,
    images_dir: &Path,
    parent: &Path,
    locks: &mut DirectoryLocks,
) -> Result<(Arc<Chain>, SnapshotId)> {
    let path = store.images_dir.join(parent);
    let problem = |path: PathBuf, problem: String| StepError::Directory { path, problem };
    let dir = path.canonicalize().map_err(|error| {
        problem(path.clone(), format!("{error}\nhelp: --prev-images-dir is relative to -D"))
    })?;
    if images_dir == dir {
        return Err(problem(path, "it cannot be its own parent".to_owned()).into());
    }
    locks.take(&dir, if store.free_parent { Access::Exclusive } else { Access::Shared })?;
    let chain = Arc::new(Chain::open(&dir)?);
    if chain.at(images_dir).is_some() {
        // A child of the directory may be elsewhere, not beside it.
        let children = dir.display().to_string();
        return Err(DumpError::HasChildren { dir: images_dir.to_owned(), children });
    }
    let id = chain.at(&dir).ok_or_else(|| {
        problem(dir, "it has no inventory.img, so it is not a complete dump".to_owned())
    })?;
    if store.free_parent {
        dedup::lock_ancestors(&chain, id, locks)?;
        dedup::check_freeing(&chain, id, Arc::new(Kernel))?;
    } else {
        locks.take(chain.directory(chain.base(id))?, Access::Shared)?;
    }
    Ok((chain, id))
}

fn inventory(parent: Option<&Parent>, series: Option<&Series>) -> Result<proto::InventoryEntry> {
    let uptime = clock_gettime(ClockId::CLOCK_BOOTTIME).map_err(|source| StepError::Process {
        pid: HostPid::own(),
        step: "read the clock for",
        source,
    })?;
    let uptime = Duration::from(uptime);
    let mut inventory = proto::InventoryEntry {
        img_version: FORMAT_VERSION,
        fdinfo_per_id: Some(true),
        root_ids: Some(ns::own_ids()),
        ns_per_id: Some(true),
        lsmtype: Some(proto::Lsmtype::NoLsm.into()),
        dump_uptime: u64::try_from(uptime.as_micros()).ok(),
        rcriu_parent_run_id: parent_name(parent)?,
        ..Default::default()
    };
    common::describe(&mut inventory);
    if let Some(series) = series {
        series.describe(&mut inventory);
    }
    Ok(inventory)
}
