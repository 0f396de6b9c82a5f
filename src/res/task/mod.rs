//! Process state other than threads, mappings and files: one file and one row in [`KINDS`] for
//! each kind.

mod children;
mod dumpable;
mod fs;
mod handlers;
mod leader;
mod limits;
mod membarrier;
mod personality;
mod proc_files;
mod queue;
#[cfg(target_arch = "x86_64")]
mod segments;
mod sharing;
mod state;
mod subreaper;
mod terminal;
mod timers;

use std::path::PathBuf;

use super::{
    Result,
    attribute::memory,
    calls::{Calls, OfRestorer},
    file::{self, FileTable, Installer},
    mm::{aio, description, policies, vdso},
    thread,
};
use crate::{
    image::{
        self, SnapshotWriter,
        proto::{CoreEntry, FsEntry, MmEntry, RcriuAttribute, TaskCoreEntry, VmaEntry},
        tree::{Arena, Arenas},
    },
    inject::{Answers, Script, Task, Tracee},
    proc::{Mapping, Stat},
    units::{HostPid, LocalPid, NsPid, PidMap},
};

pub use crate::image::tree::state::{ALIVE, DEAD, STOPPED};
pub use leader::open as open_process;
pub use memory::LockLater;
pub use sharing::compare;
pub use state::zombie;

/// All kinds, in the order in which they are dumped and restored.
pub const KINDS: &[&dyn Kind] = &[
    &sharing::Sharing,
    &leader::Leader,
    &state::State,
    &fs::Fs,
    &vdso::Vdso,
    &description::Description,
    // Contexts come before the limits of descriptors and memory.
    &aio::Contexts,
    // Pending signals come before timers, which may add more.
    &queue::Queue,
    // Timers come before the limits, which could forbid them.
    &timers::Timers,
    &personality::Personality,
    &subreaper::Subreaper,
    &terminal::Terminal,
    &children::Children,
    &membarrier::Membarrier,
    #[cfg(target_arch = "x86_64")]
    &segments::Segments,
    &limits::Limits,
    &proc_files::ProcFiles,
    &handlers::Handlers,
    &policies::Policies,
    &memory::Sealed,
    &memory::LockedLater,
    &dumpable::Dumpable,
];

/// A kind of process state.
///
/// The dump has the first live thread answer for the process. The methods for the restore are
/// its phases, in this order; [`crate::docs::phases`] says what exists in each.
pub trait Kind: Sync {
    /// Dump: refuses a process with state that rcriu does not dump, before the dump changes
    /// anything.
    ///
    /// # Errors
    /// [`ResError::Refused`](super::ResError::Refused), or the state cannot be read.
    fn check(&self, _of: &Checked<'_>) -> Result<()> {
        Ok(())
    }

    /// Dump: adds the calls that only the process can make, and returns the function that
    /// records their results.
    fn ask(&self, _of: &Calling<'_>, _script: &mut Script) -> Result<Collect> {
        Ok(Box::new(|_, _, _| Ok(())))
    }

    /// Dump: enters the files that the process uses without a descriptor, after its descriptors.
    ///
    /// # Errors
    /// A file cannot be dumped.
    fn enter(&self, _of: Process, _files: &mut FileTable, _: &mut Images) -> file::Result<()> {
        Ok(())
    }

    /// Dump: writes the kind's own image of the process, under `number`.
    ///
    /// # Errors
    /// The image cannot be written.
    fn write(&self, _of: &Images, _number: u64, _into: &SnapshotWriter) -> image::Result<()> {
        Ok(())
    }

    /// Returns the names of the attributes that the kind has in the images
    /// ([`super::attribute`]).
    fn attributes(&self) -> &'static [&'static str] {
        &[]
    }

    /// Dump: takes out of the core of the thread that has answered first what belongs to one that
    /// has ended and that the images need all the same, and returns the core of that.
    ///
    /// # Errors
    /// The state cannot be read.
    fn split_leader(
        &self,
        _of: &Stopped<'_>,
        _first: &Tracee,
        _core: &mut CoreEntry,
    ) -> Result<Option<CoreEntry>> {
        Ok(None)
    }

    /// Restore: opens the files that the process uses other than by descriptors and mappings,
    /// before the process exists.
    ///
    /// # Errors
    /// A file cannot be opened.
    fn open(&self, _of: &Planned<'_>, _files: &mut Installer<'_>) -> file::Result<()> {
        Ok(())
    }

    /// Restore: checks the address space after all memory is mapped, and before it is filled.
    /// `vmas` are its mappings in the images.
    ///
    /// # Errors
    /// The address space differs from the images.
    fn check_mappings(&self, _pid: HostPid, _vmas: &[VmaEntry]) -> Result<()> {
        Ok(())
    }

    /// Restore: sets state when the process has its memory, but only one thread, and still has the
    /// descriptors of the restorer.
    ///
    /// # Errors
    /// A file was not opened.
    fn place(&self, _: &Restored<'_>, _: &Installer<'_>, _: &mut Script) -> file::Result<()> {
        Ok(())
    }

    /// Restore: sets state that depends on deferred files, which exist only once all processes and
    /// threads do.
    ///
    /// # Errors
    /// A file was not opened.
    fn place_deferred(
        &self,
        _: &Restored<'_>,
        _: &Installer<'_>,
        _: &mut Script,
    ) -> file::Result<()> {
        Ok(())
    }

    /// Restore: sets state that needs the privileges of the restorer. All threads exist.
    fn set(&self, _of: &Restored<'_>, _calls: &mut Calls<'_>) -> Result<()> {
        Ok(())
    }

    /// Restore: sets state that would disturb creating the zombies of the tree. The process
    /// still has the privileges of the restorer.
    fn before_credentials(&self, _of: &Restored<'_>, _script: &mut Script) {}

    /// Restore: sets what a change of credentials resets.
    fn after_credentials(&self, _of: &Restored<'_>, _script: &mut Script) {}

    /// Restore: adds the last calls of the process. Pending signals may exist from here on.
    fn last_calls(&self, _of: &Restored<'_>, _script: &mut Script) -> Result<()> {
        Ok(())
    }

    /// Restore: adds the call that exits the thread group leader, if it had exited.
    fn end(&self, _of: &Restored<'_>, _script: &mut Script) {}
}

/// Records in the images what a process has answered.
pub type Collect = Box<dyn FnOnce(&Stopped<'_>, &Answers, &mut Images) -> Result<()>>;

/// A process of a tree that is being dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// The process.
    pub pid: HostPid,
    /// A live thread of the process, through which `/proc` shows what its threads share.
    pub witness: HostPid,
}

/// A stopped process that the dump checks.
#[derive(Clone, Copy, Debug)]
pub struct Checked<'a> {
    /// Its threads.
    pub task: &'a Task,
    /// Whether only its memory is dumped.
    pub memory_only: bool,
}

impl Process {
    /// Returns the path of a file in the directory of the process in `/proc`.
    pub fn path(self, file: &str) -> PathBuf {
        format!("/proc/{}/{file}", self.witness).into()
    }
}

impl From<&Task> for Process {
    fn from(task: &Task) -> Self {
        Self { pid: task.pid, witness: task.witness() }
    }
}

/// A stopped process that is about to make its calls.
#[derive(Clone, Copy, Debug)]
pub struct Calling<'a> {
    /// The process.
    pub of: Process,
    /// Its mappings.
    pub mappings: &'a [Mapping],
}

/// A stopped process that has made its calls.
#[derive(Clone, Copy, Debug)]
pub struct Stopped<'a> {
    /// The process.
    pub of: Process,
    /// The signal that stopped it before the dump, or 0.
    pub stopped_by: i32,
    /// The signals that its first thread blocks.
    pub blocked: u64,
    /// Its `/proc/PID/stat`.
    pub stat: &'a Stat,
    /// Its mappings.
    pub mappings: &'a [Mapping],
    /// Maps pids of the host to pids of the images.
    pub pids: &'a PidMap,
    /// How the process locks new memory, as seen from the scratch memory mapped into it.
    pub lock_later: LockLater,
}

/// The image entries of a process.
#[derive(Clone, Debug, Default)]
pub struct Images {
    /// The part of the core of its leader that belongs to the process.
    pub core: TaskCoreEntry,
    /// Attributes of the process, stored in the core of its leader.
    pub attributes: Vec<RcriuAttribute>,
    /// Its address space, without mappings.
    pub mm: MmEntry,
    /// Its root, working directory and umask.
    pub fs: FsEntry,
}

/// If the thread group leader has exited, splits its core from `core`, the core of the first live
/// thread. Returns `None` if the leader is alive.
///
/// # Errors
/// The state cannot be read.
pub fn split_leader(
    of: &Stopped<'_>,
    first: &Tracee,
    core: &mut CoreEntry,
) -> Result<Option<CoreEntry>> {
    for kind in KINDS {
        if let Some(other) = kind.split_leader(of, first, core)? {
            return Ok(Some(other));
        }
    }
    Ok(None)
}

impl Images {
    /// Enters the files that the process uses without a descriptor.
    ///
    /// # Errors
    /// A file cannot be dumped.
    pub fn enter_files(&mut self, of: Process, files: &mut FileTable) -> file::Result<()> {
        KINDS.iter().try_for_each(|kind| kind.enter(of, files, self))
    }

    /// Writes the kinds' own images of the process, under `number`.
    ///
    /// # Errors
    /// An image cannot be written.
    pub fn write(&self, number: u64, into: &SnapshotWriter) -> image::Result<()> {
        KINDS.iter().try_for_each(|kind| kind.write(self, number, into))
    }
}

/// The images of a process that the restore will create.
#[derive(Clone, Copy, Debug)]
pub struct Planned<'a> {
    /// Its address space.
    pub mm: &'a MmEntry,
    /// Its root, working directory and umask.
    pub fs: &'a FsEntry,
}

impl Planned<'_> {
    /// Opens the files that the process uses other than by descriptors and mappings.
    ///
    /// # Errors
    /// A file cannot be opened.
    pub fn open_files(&self, files: &mut Installer<'_>) -> file::Result<()> {
        KINDS.iter().try_for_each(|kind| kind.open(self, files))
    }
}

/// A new process that the restore fills with the state of one in the images.
#[derive(Clone, Copy, Debug)]
pub struct Restored<'a> {
    /// The pid in the images.
    pub pid: NsPid,
    /// The pid on this host.
    pub host: HostPid,
    /// The core of its leader.
    pub core: &'a CoreEntry,
    /// Its address space.
    pub mm: &'a MmEntry,
    /// Its root, working directory and umask.
    pub fs: &'a FsEntry,
    /// The objects that processes share, and the position of this process among the processes.
    pub arenas: (&'a Arenas, usize),
    /// The state that it inherits from the restorer.
    pub own: &'a OfRestorer,
    /// The numbers of all processes.
    pub pids: &'a PidMap,
}

impl Restored<'_> {
    /// Returns the number of a process or thread for calls of this one.
    ///
    /// # Errors
    /// It has none in this pid namespace.
    pub fn local(&self, pid: NsPid) -> Result<LocalPid> {
        thread::local(pid, self.pid, self.pids)
    }

    /// Whether the process owns this object. Otherwise it was created with the object of an earlier
    /// process.
    pub fn owns(&self, arena: Arena) -> bool {
        self.arenas.0.owns(arena, self.arenas.1)
    }
}

/// Refuses a process with state that rcriu does not dump, before the dump changes anything.
///
/// # Errors
/// The process has such state.
pub fn check(of: &Checked<'_>) -> Result<()> {
    KINDS.iter().try_for_each(|kind| kind.check(of))
}

/// Adds the calls of all kinds for a process.
pub fn ask(of: &Calling<'_>, script: &mut Script) -> Result<Vec<Collect>> {
    KINDS.iter().map(|kind| kind.ask(of, script)).collect()
}

/// Builds the image entries of a process that has made its calls.
pub fn collect(kinds: Vec<Collect>, of: &Stopped<'_>, answers: &Answers) -> Result<Images> {
    let mut images = Images::default();
    for collect in kinds {
        collect(of, answers, &mut images)?;
    }
    Ok(images)
}
