//! State that the processes of a tree share: control groups, System V segments, semaphores, and
//! which stops of children their parents have been notified of. One file and one row in [`KINDS`]
//! for each kind.

pub mod cgroup;
mod lost;
mod permissions;
pub mod processor;
pub mod seccomp;
pub mod session;
mod stops;
mod sysv;
mod undo;

use std::{fs::File, path::PathBuf};

use super::{
    Result,
    calls::{Calls, OfRestorer},
    mm::mapping::Object,
    ns, task, thread,
};
use crate::{
    image::{
        self, ImageStore, SnapshotWriter,
        proto::{CoreEntry, InventoryEntry, VmaEntry},
    },
    inject::{Answers, Script, Task},
    proc::Mapping,
    units::{HostPid, LocalPid, NsPid, PidMap},
};

/// The user's options for a dump of these kinds.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct DumpOptions {
    /// Options for sessions and process groups.
    pub(crate) sessions: session::Options,
    /// Options for cgroups.
    pub(crate) cgroups: cgroup::Options,
    /// Options for the processor.
    pub(crate) processor: processor::Options,
}

/// The user's options for a restore of these kinds.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct RestoreOptions {
    /// Options for cgroups.
    pub(crate) cgroups: cgroup::Options,
    /// Options for the processor.
    pub(crate) processor: processor::Options,
}

/// Refuses a stopped tree.
type Check = fn(&[Task], &DumpOptions) -> Result<()>;

/// A tree that is stopped to be dumped.
#[derive(Clone, Copy, Debug)]
pub struct Dumped<'a> {
    /// Its processes, parents before children.
    pub tasks: &'a [Task],
    /// Their numbers.
    pub pids: &'a PidMap,
    /// The directories of its cgroups that were frozen.
    pub frozen_cgroups: &'a [PathBuf],
}

/// Begins to dump one kind.
type Beginner = fn(&Dumped<'_>, &DumpOptions) -> Begun<dyn Collector>;

/// A kind that has begun a dump or a restore.
pub type Begun<T> = Result<Box<T>>;

/// Reads the images of one kind.
type Reader = fn(&Plan<'_>, &RestoreOptions) -> Begun<dyn Restorer>;

/// A kind of state of the whole tree.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// Refuses state that rcriu does not dump, and warns about state that is lost, before the dump
    /// changes anything.
    check: Option<Check>,
    /// Begins a dump.
    collector: Option<Beginner>,
    /// Records the dumper's own state in the inventory.
    describe: Option<fn(&mut InventoryEntry)>,
    /// Begins a restore: reads the images, before the restore creates anything.
    restorer: Option<Reader>,
}

/// An empty row.
const NONE: Kind = Kind { check: None, collector: None, describe: None, restorer: None };

/// All kinds, in the order in which they are dumped and restored.
pub const KINDS: &[Kind] = &[
    // First: the others may open files.
    Kind { check: Some(|tasks, _| permissions::check(tasks)), ..NONE },
    Kind { check: Some(|tasks, _| lost::check(tasks)), ..NONE },
    Kind { check: Some(|tasks, options| session::check(tasks, options.sessions)), ..NONE },
    Kind {
        collector: Some(|_, options| processor::collector(options.processor)),
        restorer: Some(|plan, options| processor::restorer(plan, options.processor)),
        ..NONE
    },
    Kind {
        collector: Some(|of, options| cgroup::collector(of, &options.cgroups)),
        describe: Some(cgroup::describe),
        restorer: Some(|plan, options| cgroup::restorer(plan, &options.cgroups)),
        ..NONE
    },
    Kind {
        collector: Some(|of, _| sysv::collector(of.tasks, of.pids.ids())),
        restorer: Some(|plan, _| sysv::restorer(plan)),
        ..NONE
    },
    Kind {
        collector: Some(|of, _| stops::collector(of.tasks, of.pids)),
        restorer: Some(|_, _| stops::restorer()),
        ..NONE
    },
    Kind {
        collector: Some(|of, _| undo::collector(of.tasks)),
        restorer: Some(|_, _| undo::restorer()),
        ..NONE
    },
    Kind {
        collector: Some(|of, _| seccomp::collector(of.tasks)),
        restorer: Some(|plan, _| seccomp::restorer(plan)),
        ..NONE
    },
];

/// A shared memory object of the tree.
#[derive(Debug)]
pub struct Memory {
    /// Its `shmid` in the images.
    pub number: u64,
    /// Its name in messages.
    pub name: String,
    /// A descriptor to read or write its bytes.
    pub file: File,
}

/// Dumps one kind. Sees all processes of the tree, parents before children.
pub trait Collector {
    /// Adds the calls that only this process can make.
    fn ask(&mut self, _of: task::Process, _script: &mut Script) {}

    /// Records the results of these calls, after the kinds of [`task`] have recorded theirs.
    fn collect(&mut self, _of: &task::Stopped<'_>, _answers: &Answers, _images: &mut task::Images) {
    }

    /// Records the state of a thread.
    fn thread(&mut self, _of: thread::Thread, _core: &mut CoreEntry) -> Result<()> {
        Ok(())
    }

    /// Records a mapping of `object`, also in a pre-dump. Returns the number of the object in the
    /// images, if it is an object of this kind.
    fn mapping(
        &mut self,
        _pid: HostPid,
        _mapping: &Mapping,
        _object: Object,
    ) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Returns the memory objects whose bytes the dump must copy, once all mappings are recorded.
    fn memory(&mut self) -> Result<Vec<Memory>> {
        Ok(Vec::new())
    }

    /// Writes the images, after [`Self::memory`].
    fn write(&self, _images: &SnapshotWriter) -> image::Result<()> {
        Ok(())
    }
}

/// Records a mapping of `object` in all kinds. Returns the number of the object, if it belongs to
/// one of them.
pub fn mapping(
    collectors: &mut [Box<dyn Collector>],
    pid: HostPid,
    mapping: &Mapping,
    object: Object,
) -> Result<Option<u64>> {
    let mut number = None;
    for kind in collectors {
        number = kind.mapping(pid, mapping, object)?.or(number);
    }
    Ok(number)
}

/// Refuses a stopped tree that rcriu cannot dump, before the dump changes anything.
///
/// # Errors
/// The tree has state that rcriu does not dump.
pub fn check(tasks: &[Task], options: &DumpOptions) -> Result<()> {
    let checks = KINDS.iter().filter_map(|kind| kind.check);
    checks.into_iter().try_for_each(|check| check(tasks, options))
}

/// Records the dumper's own state of all kinds in the inventory.
pub fn describe(inventory: &mut InventoryEntry) {
    KINDS.iter().filter_map(|kind| kind.describe).for_each(|describe| describe(inventory));
}

/// Begins to dump all kinds of a stopped tree.
pub fn collectors(of: &Dumped<'_>, options: &DumpOptions) -> Result<Vec<Box<dyn Collector>>> {
    let collectors = KINDS.iter().filter_map(|kind| kind.collector);
    collectors.map(|begin| begin(of, options)).collect()
}

/// The part of the snapshot that the kinds read first.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// The snapshot.
    pub images: &'a dyn ImageStore,
    /// The inventory of the snapshot.
    pub inventory: &'a InventoryEntry,
    /// The threads of each process with their cores, the leader first.
    pub processes: Vec<Vec<(NsPid, &'a CoreEntry)>>,
    /// The state of the restorer.
    pub own: &'a OfRestorer,
    /// The namespaces that the tree gets for itself.
    pub namespaces: &'a ns::Wanted,
}

/// A restored child of a process.
#[derive(Clone, Copy, Debug)]
pub struct Child<'a> {
    /// Its number for calls of its parent.
    pub number: Option<LocalPid>,
    /// The core of its first thread.
    pub core: &'a CoreEntry,
}

/// Restores one kind.
pub trait Restorer: std::fmt::Debug {
    /// Creates what must exist before the processes get memory, and returns the memory objects to
    /// fill. `first` is the first process, if it is made already, in namespaces of its own.
    fn make(&self, _first: Option<HostPid>, _namespaces: &ns::Wanted) -> Result<Vec<Memory>> {
        Ok(Vec::new())
    }

    /// Adds the calls by which a process maps memory that [`Self::make`] has created, if that takes
    /// another call than `mmap(2)`. Returns whether this kind has created the memory.
    fn map(&self, _entry: &VmaEntry, _script: &mut Script) -> bool {
        false
    }

    /// Returns options of `ptrace(2)` with which all new processes must be traced.
    fn trace_options(&self) -> i32 {
        0
    }

    /// Restores the state of a new thread, or of a new process before it gets memory.
    fn born(&self, _core: &CoreEntry, _pid: HostPid, _tid: HostPid) -> Result<()> {
        Ok(())
    }

    /// Restores the state of a thread that has everything but its credentials: after the kinds of
    /// [`thread`], for the leader of a process first.
    fn set(&self, _of: &thread::Restored<'_>, _calls: &mut Calls<'_>) -> Result<()> {
        Ok(())
    }

    /// Finishes, once all processes have their memory.
    fn finish(&self) -> Result<()> {
        Ok(())
    }

    /// The next step lets the processes run; those that stay stopped have been let go.
    fn about_to_run(&self) {}

    /// Keeps what was made: the restore has succeeded.
    fn keep(&self) {}

    /// Adds the calls of a process that is a parent of `children`, which are dead in the images and
    /// have ended.
    fn children_ended(&self, _children: &[Child<'_>], _script: &mut Script) {}

    /// Adds the last calls of a process that is the parent of `children`, which have stopped. `parent`
    /// is the core of the process.
    fn children_stopped(&self, _parent: &CoreEntry, _children: &[Child<'_>], _script: &mut Script) {
    }
}

/// Begins to restore all kinds by reading their images.
pub fn restorers(plan: &Plan<'_>, options: &RestoreOptions) -> Result<Vec<Box<dyn Restorer>>> {
    let restorers = KINDS.iter().filter_map(|kind| kind.restorer);
    restorers.map(|restorer| restorer(plan, options)).collect()
}
