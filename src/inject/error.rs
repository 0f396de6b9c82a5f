//! Errors of injecting system calls into other processes.

use std::path::PathBuf;

use nix::errno::Errno;

use crate::{
    arch::Machine,
    fault::Injected,
    proc::ProcError,
    units::{HostPid, RemoteAddr},
};

/// The result of injecting system calls.
pub type Result<T, E = InjectError> = std::result::Result<T, E>;

/// Why system calls could not be injected.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// A request of `ptrace(2)` failed.
    #[error("{step} thread {tid}")]
    Trace {
        /// The thread.
        tid: HostPid,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The cause.
        source: Errno,
    },
    /// The process may not be traced.
    #[error("stop process {tid}: {why}")]
    Denied {
        /// The process.
        tid: HostPid,
        /// The process that traces it already, or the missing privilege.
        why: String,
    },
    /// The thread executes 32-bit code.
    #[error("thread {tid} executes 32-bit code, which rcriu does not dump\nhelp: build the program for {machine}", machine = Machine::NATIVE.name())]
    Code32 {
        /// The thread.
        tid: HostPid,
    },
    /// The thread is still returning from the calls of a dump that was killed.
    #[error(
        "thread {tid} is still returning from the work of a dump that was killed\nhelp: resume its \
         process if it is stopped, and try again in a moment"
    )]
    Returning {
        /// The thread.
        tid: HostPid,
    },
    /// The seccomp filters of a thread cannot be suspended.
    #[error(
        "suspend the seccomp filters of thread {tid} (PTRACE_O_SUSPEND_SECCOMP)\nhelp: run rcriu with \
         CAP_SYS_ADMIN outside of user namespaces, and without a seccomp filter of its own"
    )]
    Filtered {
        /// The thread.
        tid: HostPid,
        /// The cause.
        source: Errno,
    },
    /// The process is in a frozen cgroup.
    #[error("process {pid} is in the cgroup {}, which is frozen\nhelp: thaw it first: {thaw}", .cgroup.display())]
    FrozenCgroup {
        /// The process.
        pid: HostPid,
        /// The cgroup that was frozen: its own, or an ancestor.
        cgroup: PathBuf,
        /// A shell command that thaws it.
        thaw: String,
    },
    /// The thread waits for a child that shares its memory.
    #[error(
        "thread {tid} waits for its vfork(2) child, which has neither executed a program nor exited\n\
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
        /// The purpose of the call, as a verb.
        what: String,
        /// The cause.
        source: Errno,
    },
    /// The thread did not stop as expected.
    #[error("thread {tid} {what} while it worked for rcriu")]
    Lost {
        /// The thread.
        tid: HostPid,
        /// What happened to it.
        what: String,
    },
    /// Its memory could not be read or written.
    #[error("{step} {len:#x} bytes at {address} of process {tid}")]
    Memory {
        /// The thread.
        tid: HostPid,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The start address.
        address: RemoteAddr,
        /// The length in bytes.
        len: u64,
        /// The cause.
        source: Errno,
    },
    /// The process has no system call instruction to use.
    #[error("process {tid} has no executable memory with a system call instruction")]
    NoSyscall {
        /// The process.
        tid: HostPid,
    },
    /// The process has room neither for scratch memory nor for data on its stack.
    #[error(
        "process {tid} has no room for injected system calls: its limits (RLIMIT_AS, \
         RLIMIT_DATA, or RLIMIT_MEMLOCK with MCL_FUTURE) or PR_SET_MDWE forbid scratch \
         memory, and the end of its stack is in use\nhelp: raise the limits with prlimit(1)"
    )]
    NoRoom {
        /// The thread.
        tid: HostPid,
    },
    /// The script does not fit into the scratch memory.
    #[error("{bytes} bytes of system calls for process {tid}, at most {limit} fit")]
    TooLong {
        /// The thread.
        tid: HostPid,
        /// The size of the script.
        bytes: usize,
        /// The size of the scratch memory.
        limit: usize,
    },
    /// The tree creates processes faster than they can be stopped.
    #[error("the tree of process {root} creates processes faster than they can be stopped")]
    Restless {
        /// The root process of the tree.
        root: HostPid,
    },
    /// The children of the process go into another pid namespace.
    #[error(
        "process {pid} creates its children in another pid namespace (unshare), where the copy of its \
         memory (--live) cannot be\nhelp: dump it without --live"
    )]
    OtherNamespace {
        /// The process.
        pid: HostPid,
    },
    /// The tree has too many processes for `--live`.
    #[error("--live dumps at most 4096 processes\nhelp: dump the tree without --live")]
    Shadows,
    /// A file in `/proc` could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// A test has requested a failure.
    #[error(transparent)]
    Fault(#[from] Injected),
}

impl InjectError {
    /// Returns a constructor of [`InjectError::Trace`] for `map_err`.
    pub(super) fn trace(tid: HostPid, step: &'static str) -> impl Fn(Errno) -> Self {
        move |source| Self::Trace { tid, step, source }
    }
}
