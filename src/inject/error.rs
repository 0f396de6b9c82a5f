//! What can go wrong with work in other processes.

use std::path::PathBuf;

use nix::errno::Errno;

use crate::{
    arch::Machine,
    fault::Injected,
    proc::ProcError,
    units::{HostPid, RemoteAddr},
};

/// The result of work in another process.
pub type Result<T, E = InjectError> = std::result::Result<T, E>;

/// Why work in another process failed.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// A request of `ptrace(2)` failed.
    #[error("{step} thread {tid}")]
    Trace {
        /// The thread.
        tid: HostPid,
        /// What was attempted, as a verb.
        step: &'static str,
        /// Why it failed.
        source: Errno,
    },
    /// It may not be traced.
    #[error("stop process {tid}: {why}")]
    Denied {
        /// The process.
        tid: HostPid,
        /// The process that traces it already, or the privilege that is missing.
        why: String,
    },
    /// A thread that executes 32-bit code.
    #[error("thread {tid} executes 32-bit code, which is not dumped\nhelp: build the program for {machine}", machine = Machine::NATIVE.name())]
    Narrow {
        /// The thread.
        tid: HostPid,
    },
    /// It has not come home yet from a dump that was killed.
    #[error(
        "thread {tid} is still on its way back from the work of a dump that was killed\nhelp: let \
         its process go on if it is stopped, and try again in a moment"
    )]
    Abroad {
        /// The thread.
        tid: HostPid,
    },
    /// It is in a cgroup that is frozen.
    #[error("process {pid} is in the cgroup {}, which is frozen\nhelp: thaw it first: {thaw}", .cgroup.display())]
    FrozenCgroup {
        /// The process.
        pid: HostPid,
        /// The cgroup that was frozen: its own, or one above.
        cgroup: PathBuf,
        /// A command.
        thaw: String,
    },
    /// It waits for a child that has its memory.
    #[error(
        "thread {tid} waits for a vfork(2) child that has neither executed a program nor ended\n\
         help: let the child do so, or give it more time with --timeout"
    )]
    Vfork {
        /// The thread.
        tid: HostPid,
    },
    /// A system call failed in the other process.
    #[error("{what} in process {tid}")]
    Call {
        /// The thread that made it.
        tid: HostPid,
        /// What it was for, as a verb.
        what: String,
        /// Why it failed.
        source: Errno,
    },
    /// The thread did not come back as it should.
    #[error("thread {tid} {what} while it worked for this program")]
    Lost {
        /// The thread.
        tid: HostPid,
        /// What became of it.
        what: String,
    },
    /// Its memory could not be read or written.
    #[error("{step} {len:#x} bytes at {address} of process {tid}")]
    Memory {
        /// The thread.
        tid: HostPid,
        /// What was attempted, as a verb.
        step: &'static str,
        /// Where.
        address: RemoteAddr,
        /// How many.
        len: u64,
        /// Why it failed.
        source: Errno,
    },
    /// A process that nothing can be injected into.
    #[error("process {tid} has no executable memory with a system call instruction")]
    NoSyscall {
        /// The process.
        tid: HostPid,
    },
    /// There is neither room for scratch memory nor for data on the stack.
    #[error(
        "process {tid} has no room for this program to work in: its limits (RLIMIT_AS, \
         RLIMIT_DATA, or RLIMIT_MEMLOCK with MCL_FUTURE) or PR_SET_MDWE allow for no scratch \
         memory, and the end of its stack is in use\nhelp: raise the limits with prlimit(1)"
    )]
    NoRoom {
        /// The thread.
        tid: HostPid,
    },
    /// A script that does not fit into scratch memory.
    #[error("{bytes} bytes of system calls for process {tid}, at most {limit} fit")]
    TooLong {
        /// The thread.
        tid: HostPid,
        /// Bytes of the script.
        bytes: usize,
        /// Bytes of scratch memory.
        limit: usize,
    },
    /// The tree does not come to rest.
    #[error("the tree of process {root} makes new processes faster than they can be stopped")]
    Restless {
        /// The tree's root.
        root: HostPid,
    },
    /// Something in `/proc` could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// A test asked for it.
    #[error(transparent)]
    Fault(#[from] Injected),
}

impl InjectError {
    /// Returns [`InjectError::Trace`], ready for `map_err`.
    pub(super) fn trace(tid: HostPid, step: &'static str) -> impl Fn(Errno) -> Self {
        move |source| Self::Trace { tid, step, source }
    }
}
