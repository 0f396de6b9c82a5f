//! What each thread has for itself: a file for each kind, with a row in [`KINDS`].

mod alternate_stack;
pub mod creds;
mod death_signal;
mod futexes;
mod name;
mod queue;
pub mod registers;
mod rseq;
pub mod scheduling;

use super::{
    Result, attribute,
    calls::{Calls, Own},
};
use crate::{
    arch::Machine,
    image::proto::{self, CoreEntry, ThreadCoreEntry},
    inject::{Answers, Script, Tracee},
    proc::Status,
    units::{HostPid, NsPid},
};

/// Every kind, in the order in which it is asked and set.
pub const KINDS: &[&dyn Kind] = &[
    &registers::Registers,
    &futexes::Futexes,
    &alternate_stack::AlternateStack,
    &rseq::Rseq,
    &name::Name,
    &scheduling::Scheduling,
    &creds::Creds,
    &death_signal::DeathSignal,
    &queue::Queue,
    // What they set follows from the policy, or keeps others from being set.
    &attribute::Attributes,
];

/// A kind of state that each thread has.
///
/// The methods of a restore are its phases, in this order; [`crate::docs::phases`] says
/// what is there at each.
pub trait Kind: Sync {
    /// Dump: adds the questions that only the thread can answer, and returns what notes
    /// the state when they are answered.
    fn ask(&self, of: Thread, script: &mut Script) -> Collect;

    /// Restore: sets the state while the thread has the credentials of this program.
    ///
    /// # Errors
    /// What cannot be set.
    fn set(&self, _of: &Restored<'_>, _calls: &mut Calls<'_>) -> Result<()> {
        Ok(())
    }

    /// Restore: gives the thread its credentials, after which it may be unable to do much.
    fn set_credentials(&self, _of: &Restored<'_>, _script: &mut Script) {}

    /// Restore: adds the last calls of the thread. Signals may wait for it afterwards.
    ///
    /// # Errors
    /// What is wrong with the images.
    fn wake(&self, _of: &Restored<'_>, _script: &mut Script) -> Result<()> {
        Ok(())
    }

    /// Restore: sets, from outside, with what a thread goes on that makes no more calls: `of`
    /// of the images, which is `tid` here.
    ///
    /// # Errors
    /// What cannot be set.
    fn dress(&self, _core: &CoreEntry, _of: NsPid, _tid: HostPid) -> Result<()> {
        Ok(())
    }
}

/// Notes in a core what a thread has answered.
pub type Collect = Box<dyn FnOnce(&Stopped<'_>, &Answers, &mut CoreEntry) -> Result<()>>;

/// A thread of a tree that is dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Its process.
    pub pid: HostPid,
    /// The thread of that process which shows what all of them share.
    pub witness: HostPid,
    /// The thread.
    pub tid: HostPid,
}

impl Thread {
    /// Whether it answers for its process, too.
    pub fn is_first(self) -> bool {
        self.tid == self.witness
    }
}

/// A thread that was stopped and has answered.
#[derive(Clone, Copy, Debug)]
pub struct Stopped<'a> {
    /// Which it is.
    pub of: Thread,
    /// What is known of it from stopping it.
    pub thread: &'a Tracee,
    /// What the kernel shows of it.
    pub status: &'a Status,
}

/// A new thread that is to become one of the images.
#[derive(Clone, Copy, Debug)]
pub struct Restored<'a> {
    /// Its process in the images.
    pub pid: NsPid,
    /// The thread in the images.
    pub tid: NsPid,
    /// Its process here.
    pub host_pid: HostPid,
    /// The thread here.
    pub host_tid: HostPid,
    /// What the images say of it.
    pub core: &'a CoreEntry,
    /// Whether its session is one of the tree, and not that of this program.
    pub own_session: bool,
    /// What this program has itself.
    pub own: &'a Own,
}

/// Adds the questions about all kinds.
pub fn ask(of: Thread, script: &mut Script) -> Vec<Collect> {
    KINDS.iter().map(|kind| kind.ask(of, script)).collect()
}

/// Returns what an image says of a thread that has answered.
///
/// # Errors
/// What keeps something from being read.
pub fn collect(kinds: Vec<Collect>, of: &Stopped<'_>, answers: &Answers) -> Result<CoreEntry> {
    let mut core = CoreEntry {
        mtype: Machine::NATIVE.march().into(),
        thread_core: Some(ThreadCoreEntry {
            seccomp_mode: Some(proto::SeccompMode::Disabled.into()),
            ..Default::default()
        }),
        ..Default::default()
    };
    for collect in kinds {
        collect(of, answers, &mut core)?;
    }
    Ok(core)
}

/// Gives a thread that makes no more calls what it goes on with: `of` of the images, which is
/// `tid` here.
///
/// # Errors
/// What cannot be set.
pub fn dress(core: &CoreEntry, of: NsPid, tid: HostPid) -> Result<()> {
    KINDS.iter().try_for_each(|kind| kind.dress(core, of, tid))
}

/// Returns what a core says of its thread alone, to fill it in.
pub fn own(core: &mut CoreEntry) -> &mut ThreadCoreEntry {
    core.thread_core.get_or_insert_default()
}
