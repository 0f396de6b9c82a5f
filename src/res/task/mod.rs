//! What a process has besides its threads, mappings and files: a file for each kind, with
//! a row in [`KINDS`].

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

/// Every kind, in the order in which it is asked and set.
pub const KINDS: &[&dyn Kind] = &[
    &state::State,
    &description::Description,
    // What waits comes before what runs by itself.
    &queue::Queue,
    // Timers are made before a limit forbids it.
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

/// A kind of state that a process has.
///
/// Its first thread answers and acts for it. The methods of a restore are its phases, in
/// this order; [`crate::docs::phases`] says what is there at each.
pub trait Kind: Sync {
    /// Dump: adds the questions that only the process can answer, and returns what notes
    /// the state when they are answered.
    ///
    /// # Errors
    /// What keeps it from being asked.
    fn ask(&self, of: Process, script: &mut Script) -> Result<Collect>;

    /// Restore: sets the state when the process has its memory, but no other threads and
    /// not its own descriptors yet: `program` is one that leads to its program.
    fn place(&self, _of: &Restored<'_>, _program: i32, _script: &mut Script) {}

    /// Restore: sets the state when all threads are there and have the credentials of this
    /// program.
    ///
    /// # Errors
    /// What cannot be set.
    fn set(&self, _of: &Restored<'_>, _calls: &mut Calls<'_>) -> Result<()> {
        Ok(())
    }

    /// Restore: sets, before the process gets its credentials, what was in the way of
    /// those that had to end.
    fn before_credentials(&self, _of: &Restored<'_>, _script: &mut Script) {}

    /// Restore: sets what changing credentials resets.
    fn after_credentials(&self, _of: &Restored<'_>, _script: &mut Script) {}

    /// Restore: adds the last calls of the process. Signals may wait for it afterwards.
    ///
    /// # Errors
    /// What is wrong with the images.
    fn wake(&self, _of: &Restored<'_>, _script: &mut Script) -> Result<()> {
        Ok(())
    }
}

/// Notes in the images of a process what it has answered.
pub type Collect = Box<dyn FnOnce(&Stopped<'_>, &Answers, &mut Images) -> Result<()>>;

/// A process of a tree that is dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// The process.
    pub pid: HostPid,
    /// The thread of it that shows what all of them share.
    pub witness: HostPid,
}

/// A process that was stopped and has answered.
#[derive(Clone, Copy, Debug)]
pub struct Stopped<'a> {
    /// Which it is.
    pub of: Process,
    /// The signal that had stopped it before, or 0.
    pub stopped_by: i32,
    /// The signals that its first thread blocks.
    pub blocked: u64,
    /// What the kernel shows of it.
    pub stat: &'a Stat,
    /// Its mappings.
    pub mappings: &'a [Mapping],
    /// The numbers that processes have in the images.
    pub pids: &'a PidMap,
    /// What the memory told that was mapped to ask it.
    pub lock_later: memory::LockLater,
}

/// What images say of a process.
#[derive(Clone, Debug, Default)]
pub struct Images {
    /// Its part of the core of its first thread.
    pub core: TaskCoreEntry,
    /// Attributes of the process, which are in the core of its first thread.
    pub attributes: Vec<RcriuAttribute>,
    /// Its address space, without mappings.
    pub mm: MmEntry,
}

/// A new process that is to become one of the images.
#[derive(Clone, Copy, Debug)]
pub struct Restored<'a> {
    /// The process in the images.
    pub pid: NsPid,
    /// The process here.
    pub host: HostPid,
    /// The core of its first thread.
    pub core: &'a CoreEntry,
    /// Its address space.
    pub mm: &'a MmEntry,
    /// What this program has itself.
    pub own: &'a Own,
}

/// Adds the questions about all kinds.
///
/// # Errors
/// What keeps it from being asked.
pub fn ask(of: Process, script: &mut Script) -> Result<Vec<Collect>> {
    KINDS.iter().map(|kind| kind.ask(of, script)).collect()
}

/// Returns what images say of a process that has answered.
///
/// # Errors
/// What keeps something from being read, or cannot be dumped.
pub fn collect(kinds: Vec<Collect>, of: &Stopped<'_>, answers: &Answers) -> Result<Images> {
    let mut images = Images::default();
    for collect in kinds {
        collect(of, answers, &mut images)?;
    }
    Ok(images)
}
