//! State of single threads: one file and one row in [`KINDS`] for each kind.

mod alternate_stack;
mod creds;
mod death_signal;
mod dispatch;
mod futexes;
mod name;
mod ports;
mod queue;
pub mod registers;
mod rseq;
mod scheduling;
mod seccomp;
mod shadow_stack;

pub use creds::{ProfileError, check_profile};

use super::{
    ResError, Result, attribute,
    calls::{Calls, OfRestorer},
};
use crate::{
    arch::Machine,
    image::proto::{self, CoreEntry, ThreadCoreEntry},
    inject::{Answers, Script, Tracee},
    proc::{self, Status},
    units::{HostPid, IdMap, LocalPid, NsPid, PidMap},
};

/// All kinds, in the order in which they are dumped and restored.
pub const KINDS: &[&dyn Kind] = &[
    &seccomp::Seccomp,
    &shadow_stack::ShadowStack,
    &dispatch::Dispatch,
    &ports::Ports,
    &ports::LocalStorage,
    &registers::Registers,
    &futexes::Futexes,
    &alternate_stack::AlternateStack,
    &rseq::Rseq,
    &name::Name,
    &scheduling::Scheduling,
    &creds::Creds,
    &death_signal::DeathSignal,
    &queue::Queue,
    // Attributes come last: some follow from the scheduling policy, others forbid later calls.
    &attribute::Attributes,
];

/// A kind of thread state.
///
/// The methods for the restore are its phases, in this order; [`crate::docs::phases`] says what
/// exists in each.
pub trait Kind: Sync {
    /// Dump: refuses a thread with state that rcriu does not dump, before the dump changes
    /// anything.
    ///
    /// # Errors
    /// [`ResError::Refused`], or the errors of reading `/proc`.
    fn check(&self, _of: &Stopped<'_>) -> Result<()> {
        Ok(())
    }

    /// Dump: adds the calls that only the thread can make, and returns the function that
    /// records their results.
    fn ask(&self, _of: Thread, _script: &mut Script) -> Collect {
        Box::new(|_, _, _| Ok(()))
    }

    /// Dump: turns the state in `core`, the copy of the core of a live thread, into that of the
    /// thread group leader, which has exited.
    ///
    /// # Errors
    /// The state cannot be read.
    fn exited(&self, _of: &Exited<'_>, _core: &mut CoreEntry) -> Result<()> {
        Ok(())
    }

    /// Restore: sets state while the thread has the credentials of the restorer.
    fn set(&self, _of: &Restored<'_>, _calls: &mut Calls<'_>) -> Result<()> {
        Ok(())
    }

    /// Restore: sets the credentials. The thread may have few privileges afterwards.
    fn set_credentials(&self, _of: &Restored<'_>, _script: &mut Script) {}

    /// Restore: adds the last calls of the thread. Pending signals may exist from here on.
    fn last_calls(&self, _of: &Restored<'_>, _script: &mut Script) -> Result<()> {
        Ok(())
    }

    /// Restore: sets the state that the thread resumes with by `ptrace(2)`, after its last call.
    /// `of` is the thread in the images, `tid` the same thread on this host.
    fn set_resume_state(&self, _core: &CoreEntry, _of: NsPid, _tid: HostPid) -> Result<()> {
        Ok(())
    }
}

/// Records in a core what a thread has answered.
pub type Collect = Box<dyn FnOnce(&Stopped<'_>, &Answers, &mut CoreEntry) -> Result<()>>;

/// A thread of a tree that is being dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Its process.
    pub pid: HostPid,
    /// A live thread of the process, through which `/proc` shows what its threads share.
    pub witness: HostPid,
    /// The thread.
    pub tid: HostPid,
}

impl Thread {
    /// Whether the thread also answers for its process.
    pub fn is_first(self) -> bool {
        self.tid == self.witness
    }
}

/// A stopped thread.
#[derive(Clone, Copy, Debug)]
pub struct Stopped<'a> {
    /// The thread.
    pub of: Thread,
    /// Its state as `ptrace(2)` shows it.
    pub thread: &'a Tracee,
    /// Its `/proc/PID/task/TID/status`.
    pub status: &'a Status,
}

impl Stopped<'_> {
    /// Returns [`ResError::Refused`] for state of this thread.
    fn refused(&self, what: &str, help: &'static str) -> ResError {
        let what = format!("has {what} in thread {}", self.of.tid);
        ResError::Refused { pid: self.of.pid, what, help }
    }
}

/// A thread group leader that has exited while other threads of its process live.
#[derive(Clone, Copy, Debug)]
pub struct Exited<'a> {
    /// Its tid, which is the pid of the process.
    pub tid: HostPid,
    /// Its `/proc/PID/task/TID/status`.
    pub status: &'a Status,
}

/// A new thread that the restore fills with the state of one in the images.
#[derive(Clone, Copy, Debug)]
pub struct Restored<'a> {
    /// The pid of its process in the images.
    pub pid: NsPid,
    /// Its tid in the images.
    pub tid: NsPid,
    /// The pid of its process on this host.
    pub host_pid: HostPid,
    /// Its tid on this host.
    pub host_tid: HostPid,
    /// Its core in the images.
    pub core: &'a CoreEntry,
    /// Whether its session belongs to the tree; otherwise it is the restorer's.
    pub session_in_tree: bool,
    /// Whether the parent of its process exits as soon as the tree runs.
    pub parent_exits: bool,
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
        local(pid, self.pid, self.pids)
    }
}

/// Returns the number of a process or thread for calls of the process `caller`.
///
/// # Errors
/// It has none in the pid namespace of the caller.
pub fn local(pid: NsPid, caller: NsPid, pids: &PidMap) -> Result<LocalPid> {
    pids.local(pid, caller).ok_or_else(|| ResError::Image {
        pid: caller,
        problem: format!(
            "it refers to {pid}, which has no number in the pid namespace of the process"
        ),
    })
}

/// Refuses a thread with state that rcriu does not dump, before the dump changes anything.
///
/// # Errors
/// The thread has such state.
pub fn check(of: Thread, thread: &Tracee) -> Result<()> {
    let stopped = Stopped { of, thread, status: thread.status()? };
    KINDS.iter().try_for_each(|kind| kind.check(&stopped))
}

/// Adds the calls of all kinds for a thread.
pub fn ask(of: Thread, script: &mut Script) -> Vec<Collect> {
    KINDS.iter().map(|kind| kind.ask(of, script)).collect()
}

/// Builds the core of a thread that has made its calls.
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

/// Turns the copy of another thread's core into the core of a leader that has exited.
///
/// # Errors
/// The state of the leader cannot be read.
pub fn exited(tid: HostPid, ids: &IdMap, core: &mut CoreEntry) -> Result<()> {
    let of = Exited { tid, status: &proc::thread_status(tid, tid)?.inside(ids) };
    KINDS.iter().try_for_each(|kind| kind.exited(&of, core))
}

/// Sets the state that a thread resumes with: see [`Kind::set_resume_state`].
pub fn set_resume_state(core: &CoreEntry, of: NsPid, tid: HostPid) -> Result<()> {
    KINDS.iter().try_for_each(|kind| kind.set_resume_state(core, of, tid))
}

/// Returns the part of a core that belongs to the thread alone.
pub fn own(core: &mut CoreEntry) -> &mut ThreadCoreEntry {
    core.thread_core.get_or_insert_default()
}
