//! What a tree has in common: its control groups, its System V segments, what parents were
//! told of their children. A file for each kind, with a row in [`KINDS`].

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

/// What the user says of the kinds.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    /// Of cgroups.
    pub(crate) cgroups: cgroup::Options,
}

/// One kind's part in a dump or a restore.
pub type Begun<T> = Result<Box<T>>;

/// Reads the images of one kind.
type Reader = fn(&Plan<'_>, &Options) -> Begun<dyn Restorer>;

/// A kind of state that a tree has in common.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// Begins to dump it.
    collector: fn(&[Task], &PidMap, &Options) -> Begun<dyn Collector>,
    /// Reads its images, before anything is made; `None` if it has none.
    restorer: Option<Reader>,
}

/// Every kind, in the order in which it is asked, written and made.
pub const KINDS: &[Kind] = &[
    Kind {
        collector: |_, _, options| cgroup::collector(options.cgroups),
        restorer: Some(|plan, options| cgroup::restorer(plan, options.cgroups)),
    },
    Kind { collector: |_, _, _| sysv::collector(), restorer: Some(|plan, _| sysv::restorer(plan)) },
    // Its restore is the order in which processes are let go.
    Kind { collector: |tasks, pids, _| stops::collector(tasks, pids), restorer: None },
];

/// Memory that processes of a tree share.
#[derive(Debug)]
pub struct Memory {
    /// Its number in the images.
    pub number: u64,
    /// What it is called.
    pub name: String,
    /// Its bytes.
    pub file: File,
}

/// Looks at all processes of a tree that is dumped, parents before their children.
pub trait Collector {
    /// Adds the questions to a process.
    fn ask(&mut self, _of: task::Process, _script: &mut Script) {}

    /// Takes what the process has answered, after what it has itself.
    fn collect(&mut self, _of: &task::Stopped<'_>, _answers: &Answers, _images: &mut task::Images) {
    }

    /// Looks at a thread.
    ///
    /// # Errors
    /// What keeps something from being read.
    fn thread(&mut self, _of: thread::Thread, _core: &mut CoreEntry) -> Result<()> {
        Ok(())
    }

    /// Looks at a mapping of `object` that a process has.
    ///
    /// # Errors
    /// What keeps something from being read, or cannot be dumped.
    fn mapping(&mut self, _pid: HostPid, _mapping: &Mapping, _object: Object) -> Result<()> {
        Ok(())
    }

    /// Writes the images, and returns the memory that was found and is to be copied.
    ///
    /// # Errors
    /// Those of writing images.
    fn finish(&mut self, _images: &SnapshotWriter) -> Result<Vec<Memory>> {
        Ok(Vec::new())
    }
}

/// Begins to dump all kinds of a stopped tree.
///
/// # Errors
/// What keeps something from being read.
pub fn collectors(
    tasks: &[Task],
    pids: &PidMap,
    options: &Options,
) -> Result<Vec<Box<dyn Collector>>> {
    KINDS.iter().map(|kind| (kind.collector)(tasks, pids, options)).collect()
}

/// What is to be restored.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// The images.
    pub images: &'a dyn ImageStore,
    /// What the dumper says of itself.
    pub inventory: &'a InventoryEntry,
    /// The cores of all threads of the tree.
    pub cores: Vec<&'a CoreEntry>,
}

/// Gives back to a tree what it had in common.
pub trait Restorer: std::fmt::Debug {
    /// Makes what has to be there before the first process, and returns the memory that is
    /// to be filled.
    ///
    /// # Errors
    /// What cannot be made.
    fn make(&self) -> Result<Vec<Memory>> {
        Ok(Vec::new())
    }

    /// Changes a new process before it has memory, or a new thread.
    ///
    /// # Errors
    /// What cannot be set.
    fn born(&self, _core: &CoreEntry, _pid: HostPid, _tid: HostPid) -> Result<()> {
        Ok(())
    }

    /// Does what is left when all processes have their memory.
    ///
    /// # Errors
    /// What cannot be done.
    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

/// Reads the images of all kinds.
///
/// # Errors
/// What is wrong with the images, or missing here.
pub fn restorers(plan: &Plan<'_>, options: &Options) -> Result<Vec<Box<dyn Restorer>>> {
    let restorers = KINDS.iter().filter_map(|kind| kind.restorer);
    restorers.map(|restorer| restorer(plan, options)).collect()
}
