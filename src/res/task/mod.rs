//! Process state other than threads, mappings and files: one file and one row in [`KINDS`] for
//! each kind.

mod dumpable;
mod handlers;
pub mod leader;
mod limits;
mod membarrier;
mod outside;
mod personality;
mod queue;
#[cfg(target_arch = "x86_64")]
mod segments;
mod state;
mod subreaper;
mod timers;

use super::{
    Result,
    attribute::memory,
    calls::{Calls, Own},
    mm::description,
};
use crate::{
    image::proto::{CoreEntry, MmEntry, RcriuAttribute, TaskCoreEntry},
    inject::{Answers, Script},
    proc::{Mapping, Stat},
    units::{HostPid, NsPid, PidMap},
};

pub use crate::image::tree::state::{ALIVE, DEAD, STOPPED};
pub use state::zombie;

/// All kinds, in the order in which they are dumped and restored.
pub const KINDS: &[&dyn Kind] = &[
    &state::State,
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
    &outside::Outside,
    &handlers::Handlers,
    &memory::Sealed,
    &memory::LockedLater,
    &dumpable::Dumpable,
];

/// A kind of process state.
///
/// The dump has the first live thread answer for the process. The methods for the restore are
/// its phases, in this order; [`crate::docs::phases`] says what exists in each.
pub trait Kind: Sync {
    /// Dump: adds the calls that only the process can make, and returns the function that
    /// records their results.
    fn ask(&self, of: Process, script: &mut Script) -> Result<Collect>;

    /// Restore: sets state that needs the restorer's descriptors: `program` refers to the
    /// program of the process. The process has its memory, but no other threads.
    fn place(&self, _of: &Restored<'_>, _program: i32, _script: &mut Script) {}

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
    fn wake(&self, _of: &Restored<'_>, _script: &mut Script) -> Result<()> {
        Ok(())
    }
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
    pub lock_later: memory::LockLater,
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
    /// The state that it has inherited from the restorer.
    pub own: &'a Own,
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
