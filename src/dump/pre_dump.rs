//! Pre-dump: dumps only memory, while the tree runs.
//!
//! The tree is stopped only to list its memory and to start the tracking of changes. The
//! following dump looks again at every page that the tree writes afterwards: with a tracker
//! because the page is dirty, without one because all pages are compared. So it does no
//! harm if a page is read while it is written, or is gone.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::PathBuf,
};

use super::{
    DumpError, Parent, Result,
    census::Census,
    commit,
    series::Series,
    stats::Stats,
    target::{self, Target},
    tracking::Tracking,
    tree,
};
use crate::{
    image::{
        MemoryId, proto,
        tree::{Arena, Arenas},
    },
    inject::{Frozen, Outcome, Task},
    pages::{Memory, Origin, ProcessMemory, scan},
    proc,
    res::{
        mm::mapping::{self, Object},
        tree as common,
    },
    step::stats,
    sys::{fds, pagemap::PagemapFile},
    units::{HostPid, PidMap},
};

/// `inventory_entry.pre_dump_mode`: memory was read while the tree ran
/// (`PRE_DUMP_READ` in CRIU).
const READ: u32 = 2;

/// The beginning of the link of a memfd's descriptor.
const MEMFD: &[u8] = b"/memfd:";

/// The memory of a stopped tree.
struct Found {
    memories: Vec<Memory>,
    /// Shared objects by the number in the names of their images.
    objects: BTreeMap<u64, File>,
    /// What the tree has in common.
    common: Vec<Box<dyn common::Collector>>,
}

/// Pre-dumps a stopped tree.
///
/// # Errors
/// Why its memory cannot be dumped; the tree runs on.
pub(super) fn run(
    (common_options, stats_options): (&common::DumpOptions, &stats::Options),
    (mut frozen, census): (Frozen, &Census),
    (pids, arenas): (&PidMap, Arenas),
    mut target: Target,
    (parent, series): (Option<&Parent>, Option<&Series>),
    mut tracking: Tracking,
    mut stats: Stats,
) -> Result<()> {
    let frozen_cgroups = frozen.cgroups();
    let of_tree = common::Dumped { tasks: &frozen.tasks, pids, frozen_cgroups: &frozen_cgroups };
    let common = common::collectors(&of_tree, common_options)?;
    let mut found = Found { memories: Vec::new(), objects: BTreeMap::new(), common };
    let tasks = frozen.tasks.iter_mut().enumerate();
    for (position, task) in tasks.filter(|(_, task)| !task.is_zombie()) {
        let is_alone = !arenas.is_shared(Arena::Memory, position);
        if arenas.owns(Arena::Memory, position) {
            census.explain(found.look_at(task, pids, is_alone, &mut tracking))?;
        } else {
            tracking.begin(task, &[], is_alone)?;
        }
        census.explain(found.look_at_descriptors(task.witness()))?;
    }
    let mut memories = found.memories;
    let mut objects = Vec::new();
    for (shmid, file) in found.objects {
        let name = format!("shared memory {shmid}");
        objects.push(Memory::of_object(shmid, file, name, true)?);
    }
    let tree: Vec<_> = frozen.tasks.iter().map(|task| task.pid).collect();
    tracking.look_at_shared(&tree, &mut objects);
    memories.append(&mut objects);
    for kind in &mut found.common {
        for common::Memory { number, name, file } in kind.memory()? {
            let memory = Memory::of_object(number, file, name, true)?;
            tracking.note_untracked(&memory);
            memories.push(memory);
        }
    }
    memories.sort_by_key(|memory| memory.id);
    stats.collected();
    census.check_stopped()?;
    census.explain(frozen.release(Outcome::Run).map_err(DumpError::from))?;
    stats.thawed();
    target::find_parents(&mut memories, parent, target.server.as_ref())?;
    if parent.is_some() {
        stats.untracked = tracking.untracked;
    }
    let Target { images, server } = &mut target;
    let copy = || target::copy(&mut memories, 1, (images, server.as_mut()), true);
    stats.copied = stats.copying(copy)?;
    let inventory =
        proto::InventoryEntry { pre_dump_mode: Some(READ), ..super::inventory(parent, series)? };
    let name = super::new_name()?;
    stats.syncing(|| commit(target, tracking, (&name, inventory), || census.check_running()))?;
    stats.finish(stats_options);
    Ok(())
}

impl Found {
    /// Finds the memory of a process; `is_alone` if no other process shares it.
    fn look_at(
        &mut self,
        task: &mut Task,
        pids: &PidMap,
        is_alone: bool,
        tracking: &mut Tracking,
    ) -> Result<()> {
        let pid = task.witness();
        let mappings = proc::smaps(pid)?;
        let watch = tracking.begin(task, &mappings, is_alone)?;
        let path = tree::proc_path(pid, "pagemap");
        let failed = |source| DumpError::File { path: path.clone(), source };
        let pagemap = PagemapFile::open(&path).map_err(failed)?;
        let mut stretches = Vec::new();
        for mapping in &mappings {
            let object = mapping::object(pid, mapping)?;
            if object == Object::Vsyscall {
                continue;
            }
            if object == Object::SharedMemory {
                tracking.note(pid, mapping);
                enter(&mut self.objects, mapping.inode, proc::map_file(pid, mapping))?;
            }
            common::mapping(&mut self.common, pid, mapping, object)?;
            if mapping::is_private(&mapping::entry(mapping, object, 0)) {
                tracking.untracked.private += scan::mapping(
                    &pagemap,
                    watch.as_deref(),
                    mapping,
                    tree::shown(object),
                    &mut stretches,
                )
                .map_err(failed)?;
            }
        }
        if let Some(watch) = watch {
            watch.scanned()?;
        }
        self.memories.push(Memory {
            id: MemoryId::Private(pids.ns(task.pid).image().into()),
            origin: Origin::Process(ProcessMemory::open(pid, &mappings)?),
            stretches,
            parent: None,
            running: true,
        });
        Ok(())
    }

    /// Finds memory that has a descriptor but no mapping.
    fn look_at_descriptors(&mut self, pid: HostPid) -> Result<()> {
        let descriptors = proc::Descriptors::open(pid)?;
        for number in descriptors.numbers()? {
            if descriptors.link(number)?.starts_with(MEMFD) {
                let path = tree::proc_path(pid, &format!("fd/{number}"));
                let failed = |source| DumpError::File { path: path.clone(), source };
                let inode = fs::metadata(&path).map_err(failed)?.ino();
                enter(&mut self.objects, inode, path)?;
            }
        }
        Ok(())
    }
}

fn enter(objects: &mut BTreeMap<u64, File>, shmid: u64, path: PathBuf) -> Result<()> {
    if let Entry::Vacant(place) = objects.entry(shmid) {
        place.insert(fds::open_noatime(&path).map_err(|source| DumpError::File { path, source })?);
    }
    Ok(())
}
