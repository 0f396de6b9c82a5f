//! The plan of a restore: the images of a tree, read and checked.

use std::{cell::RefCell, path::Path, sync::Arc, time::Duration};

use nix::time::{ClockId, clock_gettime};

use super::{Relations, RestoreError, Result, pids::Waiting};
use crate::{
    chain::{Chain, ChainError, Content, MemoryBytes, SnapshotId},
    image::{
        Directory, Kind, MemoryId, Store,
        proto::{self, VmaEntry},
        store::NO_DIRECTORY,
        tree::{self, Arena, Arenas, Births, Kin, place},
    },
    lazy,
    res::{
        calls::OfRestorer,
        file::{self, Installer, RestoreOptions},
        mm::mapping,
        ns,
        task::{self, DEAD},
        tree as common,
    },
    step::StepError,
    sys::lock::{Access, DirectoryLocks},
    units::{HostPid, NsPid, PageIndex, PidMap},
};

/// A process to be restored.
#[derive(Debug)]
pub(super) struct TaskPlan {
    pub(super) pid: NsPid,
    /// The position of its parent among the tasks; `None` for the root.
    pub(super) parent: Option<usize>,
    pub(super) group: NsPid,
    pub(super) session: NsPid,
    /// Its threads, the leader first.
    pub(super) threads: Vec<ThreadPlan>,
    /// The rest, if it is alive.
    pub(super) body: Option<Body>,
}

/// A thread to be restored.
#[derive(Debug)]
pub(super) struct ThreadPlan {
    pub(super) tid: NsPid,
    pub(super) core: proto::CoreEntry,
}

/// The state of a process that has not ended.
#[derive(Debug)]
pub(super) struct Body {
    pub(super) mm: proto::MmEntry,
    /// Its mappings and its ranges of guard pages, ascending.
    pub(super) vmas: Vec<proto::VmaEntry>,
    pub(super) guards: Vec<proto::VmaEntry>,
    pub(super) fs: proto::FsEntry,
    pub(super) fds: Vec<proto::FdinfoEntry>,
    /// Its private memory by address, unless it shares that of an earlier process.
    pub(super) memory: Option<MemoryBytes>,
    /// Whether pages are restored on demand where that is possible (`--lazy`).
    pub(super) lazy: bool,
}

impl Body {
    /// Returns what kinds of a process's state are told of it before it is made.
    pub(super) fn planned(&self) -> task::Planned<'_> {
        task::Planned { mm: &self.mm, fs: &self.fs }
    }

    /// Whether the images hold private pages of a mapping.
    pub(super) fn is_filled(&self, entry: &VmaEntry) -> bool {
        mapping::is_private(entry)
            && !mapping::is_vdso(entry)
            && self.memory.as_ref().is_some_and(|memory| {
                let range = PageIndex::holding(entry.start)..PageIndex::holding(entry.end);
                memory.index().stored_within(range).next().is_some()
            })
    }

    /// Whether the pages of a mapping are restored on demand.
    pub(super) fn is_lazy(&self, entry: &VmaEntry) -> bool {
        self.lazy && lazy::can_wait(entry) && self.is_filled(entry)
    }
}

impl TaskPlan {
    /// Returns the leader's core.
    pub(super) fn core(&self) -> &proto::CoreEntry {
        &self.threads[0].core
    }

    /// Returns its threads with their cores, the leader first.
    fn cores(&self) -> Vec<(NsPid, &proto::CoreEntry)> {
        self.threads.iter().map(|thread| (thread.tid, &thread.core)).collect()
    }

    /// Returns the signal that tells its parent of its end; 0 for none.
    pub(super) fn exit_signal(&self) -> u32 {
        tree::exit_signal(self.core())
    }

    /// Whether its first thread has ended while others live.
    pub(super) fn is_leaderless(&self) -> bool {
        self.core().tc.as_ref().is_some_and(|task| task.rcriu_leader_exited.is_some())
    }

    /// Returns its part in the files of the tree, if it is alive.
    fn file_user(&self) -> Option<file::FileUser<'_>> {
        let body = self.body.as_ref()?;
        let creds = self.core().thread_core.as_ref().and_then(|core| core.creds.as_ref());
        Some(file::FileUser { pid: self.pid, group: self.group, creds, fds: &body.fds })
    }

    /// Returns the process's state, see [`crate::image::tree::state`].
    pub(super) fn state(&self) -> u32 {
        self.core().tc.as_ref().map_or(DEAD, |task| task.task_state)
    }
}

/// A tree to be restored.
#[derive(Debug)]
pub(super) struct Plan {
    /// Parents before their children.
    pub(super) tasks: Vec<TaskPlan>,
    pub(super) files: Vec<proto::FileEntry>,
    pub(super) births: Births,
    /// What processes share.
    pub(super) arenas: Arenas,
    /// Translates pids of the images to pids here.
    pub(super) pids: PidMap,
    pub(super) chain: Arc<Chain>,
    pub(super) snapshot: SnapshotId,
    /// The namespaces that the tree gets for itself.
    pub(super) namespaces: RefCell<ns::Wanted>,
    /// State of the whole tree.
    pub(super) common: Vec<Box<dyn common::Restorer>>,
    /// The inventory, in which the dump describes itself.
    inventory: proto::InventoryEntry,
    /// Whether the new parent of the root, which is this program, exits as soon as the tree runs.
    pub(super) parent_exits: bool,
    /// The time since boot at the dump, if known.
    uptime: Option<Duration>,
}

impl Plan {
    /// Returns the images.
    pub(super) fn images(&self) -> &Store {
        self.chain.images(self.snapshot)
    }

    /// Returns the installer, which opens the files of the tree and gives them to its
    /// processes.
    pub(super) fn installer(&self, options: &RestoreOptions) -> Installer<'_> {
        let threads = self.tasks.iter().flat_map(|task| &task.threads);
        let numbers = threads.map(|thread| thread.tid).collect();
        let processes = self.tasks.iter().filter_map(TaskPlan::file_user).collect();
        Installer::new(self.images(), options, &self.files, processes, numbers, self.pids.clone())
    }

    /// Returns what messages call a file of the images, see [`place::of_file`].
    pub(super) fn place_of(&self, id: u32) -> String {
        let uses = self.tasks.iter().filter_map(|task| {
            let Body { mm, vmas, fs, fds, .. } = task.body.as_ref()?;
            Some(place::Uses { pid: task.pid.image(), fds, fs, mm, vmas })
        });
        place::of_file(id, &self.files, uses)
    }

    /// Reads the images in `dir`. Locks them against changes, or against any use if the
    /// restore changes them.
    ///
    /// # Errors
    /// A missing, malformed or contradictory image; a program that holds the lock.
    pub(super) fn read(
        dir: &Path,
        relations: Relations,
        namespaces: &ns::Options,
        mut locks: Option<(&mut DirectoryLocks, Access)>,
    ) -> Result<Self> {
        let mut lock =
            |dir: &Path| locks.as_mut().map_or(Ok(()), |(locks, access)| locks.take(dir, *access));
        let problem = |problem: String| StepError::Directory { path: dir.to_owned(), problem };
        if dir.is_file() {
            return Err(problem(NO_DIRECTORY.into()).into());
        }
        lock(dir)?;
        if !dir.join(Kind::Inventory.file_name(0)).exists() {
            let what =
                "it has no inventory.img, so it is not a complete dump\nhelp: name one with -D";
            return Err(problem(what.into()).into());
        }
        let images = Directory::at(dir);
        if tree::is_pre_dump(&images) {
            return Err(problem("it has no pstree.img; is it a pre-dump?".into()).into());
        }
        let (tree, problems) = tree::read(&images, file::is_restored);
        require_sound(dir, &problems)?;
        let canonical = dir.canonicalize().map_err(|error| problem(error.to_string()))?;
        let chain = Arc::new(Chain::open(&canonical)?);
        let snapshot =
            chain.at(&canonical).ok_or_else(|| problem("it is not an image directory".into()))?;
        if let Some(base) = chain.snapshot(chain.base(snapshot)).directory() {
            lock(base)?;
        }
        let kin = Kin::of(&tree.tasks);
        let below = tree::below(&tree.tasks).map_err(|(pid, problem)| RestoreError::Relation {
            pid: NsPid::of_image(pid),
            problem,
        })?;
        let births = Births::plan(&kin, relations.shell_job, relations.sibling)
            .map_err(|(pid, problem)| RestoreError::Relation { pid, problem })?;
        let tasks = Vec::with_capacity(tree.tasks.len());
        let uptime = tree.inventory.dump_uptime.map(Duration::from_micros);
        let files = tree.files;
        let alive = tree.tasks.iter().zip(&kin);
        let alive = alive.filter_map(|(task, kin)| Some((kin.pid, task.body.as_ref()?.ids)));
        let dumpers = tree.inventory.root_ids.as_ref();
        let namespaces = ns::Wanted::read(&images, dumpers, alive, namespaces)?;
        let pids = if namespaces.has_pids() {
            PidMap::of_other_namespace()
        } else {
            PidMap::of_own_namespace()
        };
        let pids = pids.with_ids(namespaces.ids()).with_below(below);
        let (common, inventory) = (Vec::new(), tree.inventory);
        let arenas = Arenas::new(kin.iter().map(|kin| kin.ids).collect());
        let mut plan = Self {
            tasks,
            files,
            births,
            arenas,
            pids,
            chain,
            snapshot,
            namespaces: RefCell::new(namespaces),
            common,
            inventory,
            parent_exits: false,
            uptime,
        };
        for (position, task) in tree.tasks.into_iter().enumerate() {
            let task = plan.task(task, position, &kin)?;
            plan.tasks.push(task);
        }
        plan.check_pids()?;
        Ok(plan)
    }

    /// Has memory restored on demand where that is possible.
    pub(super) fn make_lazy(&mut self) {
        for body in self.tasks.iter_mut().filter_map(|task| task.body.as_mut()) {
            body.lazy = true;
        }
    }

    /// Plans a process, and finds its memory.
    fn task(&self, task: tree::Task, position: usize, all: &[Kin]) -> Result<TaskPlan> {
        let kin = all[position];
        let threads = task.threads.into_iter();
        let threads =
            threads.map(|(tid, core)| ThreadPlan { tid: NsPid::of_image(tid), core }).collect();
        let body = task.body.map(|body| -> Result<Body> {
            // Among processes that share memory, one has it in the images, and the first
            // gets it.
            let mut memory = None;
            if self.arenas.owns(Arena::Memory, position) {
                for sharer in self.arenas.sharers(Arena::Memory, position) {
                    memory = self.memory_of(all[sharer].pid)?;
                    if memory.is_some() {
                        break;
                    }
                }
            }
            let memory = memory.filter(|memory| !memory.is_empty());
            let tree::Body { mm, vmas, guards, fs, fds, ids: _ } = body;
            Ok(Body { mm, vmas, guards, fs, fds, memory, lazy: false })
        });
        Ok(TaskPlan {
            pid: kin.pid,
            parent: kin.parent,
            group: NsPid::of_image(task.entry.pgid),
            session: kin.session,
            threads,
            body: body.transpose()?,
        })
    }

    /// Returns the stored private memory of a process.
    fn memory_of(&self, pid: NsPid) -> Result<Option<MemoryBytes>> {
        match self.chain.index(self.snapshot, MemoryId::Private(pid.image().into())) {
            Ok(index) => {
                let end = PageIndex::END.address();
                Ok(Some(MemoryBytes::new(Arc::clone(&self.chain), index, end)))
            }
            Err(ChainError::NoMemory { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Checks that every pid is free, or waits until it is.
    fn check_pids(&self) -> Result<()> {
        let waiting = Waiting::begin();
        let mut threads = self.tasks.iter().flat_map(|task| &task.threads);
        threads.try_for_each(|thread| waiting.until_free(self.host(thread.tid)))
    }

    /// Returns the pid here for a pid of the images.
    pub(super) fn host(&self, pid: NsPid) -> HostPid {
        self.pids.host(pid)
    }

    /// Returns how far the clocks that start at boot are behind those of the dump: after a
    /// reboot, on another machine, or in another time namespace.
    pub(super) fn clocks_lost(&self) -> Option<Duration> {
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?;
        if self.namespaces.borrow().has_clocks() {
            return None;
        }
        self.uptime?.checked_sub(Duration::from(now)).filter(|lost| !lost.is_zero())
    }

    /// Prepares the state of the whole tree.
    ///
    /// # Errors
    /// What is missing.
    pub(super) fn find_common(
        &mut self,
        options: &common::RestoreOptions,
        own: &OfRestorer,
    ) -> Result<()> {
        let processes = self.tasks.iter().map(TaskPlan::cores).collect();
        let images = &**self.images();
        let namespaces = &*self.namespaces.borrow();
        let inventory = &self.inventory;
        let plan = common::Plan { images, inventory, processes, own, namespaces };
        let common = common::restorers(&plan, options)?;
        self.common = common;
        Ok(())
    }

    /// Whether the leader of a session or group is not a process of the tree.
    pub(super) fn is_outside(&self, leader: NsPid) -> bool {
        !self.tasks.iter().any(|task| task.pid == leader)
    }
}

/// Checks that a restore supports everything that the images hold.
fn require_sound(dir: &Path, problems: &[tree::Problem]) -> Result<()> {
    // Defects come before unsupported state.
    let worst = problems.iter().find(|problem| problem.is_broken).or(problems.first());
    let Some(worst) = worst else { return Ok(()) };
    let mut problem = worst.to_string();
    if problems.len() > 1 {
        let more = problems.len() - 1;
        problem.push_str(&format!(
            " (and {more} more problems)\nhelp: `imgfs check {}` lists all of them",
            dir.display()
        ));
    }
    Err(StepError::Directory { path: dir.to_owned(), problem }.into())
}
