//! State that the processes of a tree share: control groups, System V segments, and which stops
//! of children their parents have been notified of. One file and one row in [`KINDS`] for each
//! kind.

pub mod cgroup;
pub mod stops;
pub mod sysv;

use std::fs::File;

use super::{Result, mm::mapping::Object, task, thread};
use crate::{
    image::{
        ImageStore, SnapshotWriter,
        proto::{CoreEntry, InventoryEntry},
    },
    inject::{Answers, Script, Task},
    proc::Mapping,
    units::{HostPid, PidMap},
};

/// Options of the user that concern these kinds.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    /// Of cgroups.
    pub(crate) cgroups: cgroup::Options,
}

/// A kind that has begun a dump or a restore.
pub type Begun<T> = Result<Box<T>>;

/// Reads the images of one kind.
type Reader = fn(&Plan<'_>, &Options) -> Begun<dyn Restorer>;

/// A kind of state of the whole tree.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// Begins a dump.
    collector: fn(&[Task], &PidMap, &Options) -> Begun<dyn Collector>,
    /// Begins a restore by reading the images, before it creates anything; `None` if the kind
    /// has no images.
    restorer: Option<Reader>,
}

/// All kinds, in the order in which they are dumped and restored.
pub const KINDS: &[Kind] = &[
    Kind {
        collector: |_, _, options| cgroup::collector(options.cgroups),
        restorer: Some(|plan, options| cgroup::restorer(plan, options.cgroups)),
    },
    Kind { collector: |_, _, _| sysv::collector(), restorer: Some(|plan, _| sysv::restorer(plan)) },
    // The restore uses these entries when it releases the processes.
    Kind { collector: |tasks, pids, _| stops::collector(tasks, pids), restorer: None },
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

    /// Records a mapping of `object`.
    fn mapping(&mut self, _pid: HostPid, _mapping: &Mapping, _object: Object) -> Result<()> {
        Ok(())
    }

    /// Writes the images, and returns the memory objects whose bytes are to be dumped.
    fn finish(&mut self, _images: &SnapshotWriter) -> Result<Vec<Memory>> {
        Ok(Vec::new())
    }
}

/// Begins to dump all kinds of a stopped tree.
pub fn collectors(
    tasks: &[Task],
    pids: &PidMap,
    options: &Options,
) -> Result<Vec<Box<dyn Collector>>> {
    KINDS.iter().map(|kind| (kind.collector)(tasks, pids, options)).collect()
}

/// What the restore knows when the kinds begin.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// The snapshot.
    pub images: &'a dyn ImageStore,
    /// The inventory of the snapshot.
    pub inventory: &'a InventoryEntry,
    /// The cores of all threads of the tree.
    pub cores: Vec<&'a CoreEntry>,
}

/// Restores one kind.
pub trait Restorer: std::fmt::Debug {
    /// Creates what must exist before the first process, and returns the memory objects to
    /// fill.
    fn make(&self) -> Result<Vec<Memory>> {
        Ok(Vec::new())
    }

    /// Restores the state of a new thread, or of a new process before it gets memory.
    fn born(&self, _core: &CoreEntry, _pid: HostPid, _tid: HostPid) -> Result<()> {
        Ok(())
    }

    /// Finishes, once all processes have their memory.
    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

/// Begins to restore all kinds by reading their images.
pub fn restorers(plan: &Plan<'_>, options: &Options) -> Result<Vec<Box<dyn Restorer>>> {
    let restorers = KINDS.iter().filter_map(|kind| kind.restorer);
    restorers.map(|restorer| restorer(plan, options)).collect()
}
