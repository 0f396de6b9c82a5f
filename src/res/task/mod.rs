//! Process state other than threads, mappings and files: one file and one row in [`KINDS`] for
//! each kind.

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
mod timers;

use std::path::PathBuf;

use super::{
    Result,
    attribute::memory,
    calls::{Calls, Own},
    file::{self, FileTable, Installer},
    mm::{description, policies, vdso},
};
use crate::{
    image::{
        self, SnapshotWriter,
        proto::{CoreEntry, FsEntry, MmEntry, RcriuAttribute, TaskCoreEntry, VmaEntry},
        tree::{Arena, Arenas},
    },
    inject::{Answers, Script, Task, Tracee},
    proc::{Mapping, Stat},
    units::{HostPid, NsPid, PidMap},
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
    // Pending signals come before timers, which may add more.
    &queue::Queue,
    // Timers come before the limits, which could forbid them.
    &timers::Timers,
    &personality::Personality,
    &subreaper::Subreaper,
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
    /// Dump: refuses a state that cannot be kept, before anything is changed.
    ///
    /// # Errors
    /// [`ResError::Refused`](super::ResError::Refused); what keeps something from being read.
    fn check(&self, _of: &Checked<'_>) -> Result<()> {
        Ok(())
    }

    /// Dump: adds the calls that only the process can make, and returns the function that
    /// records their results.
    fn ask(&self, _of: Process, _script: &mut Script) -> Result<Collect> {
        Ok(Box::new(|_, _, _| Ok(())))
    }

    /// Dump: enters the files that the process has beside descriptors, after those of its
    /// descriptors.
    ///
    /// # Errors
    /// What keeps them from being dumped.
    fn enter(&self, _of: Process, _files: &mut FileTable, _: &mut Images) -> file::Result<()> {
        Ok(())
    }

    /// Dump: writes an image that the kind has for itself, under the number of the process.
    ///
    /// # Errors
    /// Those of writing it.
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
    /// What keeps something from being read.
    fn divide(
        &self,
        _of: &Stopped<'_>,
        _first: &Tracee,
        _core: &mut CoreEntry,
    ) -> Result<Option<CoreEntry>> {
        Ok(None)
    }

    /// Restore: opens the files that the process has beside descriptors and mappings, before
    /// it is made.
    ///
    /// # Errors
    /// What keeps them from being opened.
    fn open(&self, _of: &Planned<'_>, _files: &mut Installer<'_>) -> file::Result<()> {
        Ok(())
    }

    /// Restore: looks at the address space when all is mapped and nothing is filled; `vmas` are
    /// its mappings in the images.
    ///
    /// # Errors
    /// What is not as it was.
    fn mapped(&self, _pid: HostPid, _vmas: &[VmaEntry]) -> Result<()> {
        Ok(())
    }

    /// Restore: sets the state when the process has its memory, but no other threads, and still
    /// the descriptors of this program.
    ///
    /// # Errors
    /// A file that was not opened.
    fn place(&self, _: &Restored<'_>, _: &Installer<'_>, _: &mut Script) -> file::Result<()> {
        Ok(())
    }

    /// Restore: sets what depends on files that are there only when all processes and threads
    /// are.
    ///
    /// # Errors
    /// A file that was not opened.
    fn place_late(&self, _: &Restored<'_>, _: &Installer<'_>, _: &mut Script) -> file::Result<()> {
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

    /// Restore: adds the call by which the first thread ends when it has woken, if it does.
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

/// A process that was stopped and is checked.
#[derive(Clone, Copy, Debug)]
pub struct Checked<'a> {
    /// Its threads.
    pub task: &'a Task,
    /// Nothing but its memory is dumped.
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

/// Returns the core that the images have of a thread that has ended, taken out of `core` of the
/// thread that has answered first; `None` if all is that thread's own.
///
/// # Errors
/// What keeps something from being read.
pub fn divide(of: &Stopped<'_>, first: &Tracee, core: &mut CoreEntry) -> Result<Option<CoreEntry>> {
    for kind in KINDS {
        if let Some(other) = kind.divide(of, first, core)? {
            return Ok(Some(other));
        }
    }
    Ok(None)
}

impl Images {
    /// Enters the files that the process has beside descriptors.
    ///
    /// # Errors
    /// What keeps them from being dumped.
    pub fn enter_files(&mut self, of: Process, files: &mut FileTable) -> file::Result<()> {
        KINDS.iter().try_for_each(|kind| kind.enter(of, files, self))
    }

    /// Writes the images that kinds have for themselves, under the number of the process.
    ///
    /// # Errors
    /// Those of writing them.
    pub fn write(&self, number: u64, into: &SnapshotWriter) -> image::Result<()> {
        KINDS.iter().try_for_each(|kind| kind.write(self, number, into))
    }
}

/// What images say of a process that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Planned<'a> {
    /// Its address space.
    pub mm: &'a MmEntry,
    /// Its root, working directory and umask.
    pub fs: &'a FsEntry,
}

impl Planned<'_> {
    /// Opens the files that it has beside descriptors and mappings.
    ///
    /// # Errors
    /// What keeps them from being opened.
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
    /// What processes have in common, and the position of this one among them.
    pub arenas: (&'a Arenas, usize),
    /// The state that it has inherited from the restorer.
    pub own: &'a Own,
}

impl Restored<'_> {
    /// Whether no process before it has the same, which it was made with then.
    pub fn owns(&self, arena: Arena) -> bool {
        self.arenas.0.owns(arena, self.arenas.1)
    }
}

/// Refuses a process with a state that cannot be kept, before anything is changed.
///
/// # Errors
/// What it has.
pub fn check(of: &Checked<'_>) -> Result<()> {
    KINDS.iter().try_for_each(|kind| kind.check(of))
}

/// Adds the calls of all kinds for a process.
pub fn ask(of: Process, script: &mut Script) -> Result<Vec<Collect>> {
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
