//! Reasons why changes are not tracked, and their remedies.

use std::io;

use nix::errno::Errno;

use crate::{
    causes::with_sources, inject::InjectError, proc::ProcError, sys::tracepoint::CountError,
    units::HostPid,
};

/// A reason why changes are not tracked. The dump then compares all pages.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The keeper does not answer, or gives an invalid answer.
    #[error("keep the tracking of process {pid}")]
    Keeper {
        /// The process.
        pid: HostPid,
        /// The cause.
        source: io::Error,
    },
    /// Another dump has restarted the tracking meanwhile.
    #[error("the tracking of process {pid} was restarted by another dump")]
    Overtaken {
        /// The process.
        pid: HostPid,
    },
    /// A system call failed.
    #[error("{step} of process {pid}")]
    Kernel {
        /// The process.
        pid: HostPid,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The kernel does not support it, or this program lacks the privilege.
    #[error("{what}")]
    Missing {
        /// The missing support or privilege, as a clause.
        what: &'static str,
        /// The remedy.
        help: &'static str,
    },
    /// A device or ring writes to the memory without the kernel's page tables.
    #[error("process {pid} {what}, which writes to memory without being seen")]
    Unseen {
        /// The process.
        pid: HostPid,
        /// The property of the process, as a clause that begins with a verb.
        what: &'static str,
    },
    /// The kernel shows the state of a process through its first thread, which has ended.
    #[error("the first thread of process {pid} has exited while others live")]
    Leaderless {
        /// The process.
        pid: HostPid,
    },
    /// Another process shares the memory, and its writes are not tracked.
    #[error("process {pid} shares its memory with another one")]
    SharedMemory {
        /// The process.
        pid: HostPid,
    },
    /// It is unknown which processes open shared memory.
    #[error("{step}")]
    Openings {
        /// The attempted step, as a verb.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// Operations on shared memory cannot be counted.
    #[error(transparent)]
    Count(#[from] CountError),
    /// Work in the process failed.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Something in `/proc` could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
}

/// A reason why changes are not tracked, and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hindrance {
    /// The untracked memory, and the reason.
    pub what: String,
    /// The remedy.
    pub help: String,
}

impl Hindrance {
    /// Returns the reason why `what` is not tracked.
    pub fn of(what: &str, error: &TrackError) -> Self {
        Self { what: format!("{what}: {}", with_sources(error)), help: error.help().to_owned() }
    }
}

impl TrackError {
    /// Returns the remedy.
    pub fn help(&self) -> &'static str {
        match self {
            Self::Keeper { .. } => {
                "kill the rcriu-keep of this process: the next dump starts another one"
            }
            Self::Overtaken { .. } => "run one dump of a process at a time",
            Self::Missing { help, .. } => help,
            Self::Unseen { .. } => "none: such memory is always compared",
            Self::SharedMemory { .. } => "none: such memory is always compared",
            Self::Leaderless { .. } => "let main wait for its threads (pthread_join(3))",
            Self::Openings { .. } => {
                "run rcriu with CAP_SYS_ADMIN outside of user namespaces, on Linux 5.19 or newer"
            }
            Self::Count(error) => error.help(),
            Self::Kernel { .. } | Self::Inject(_) | Self::Proc(_) => "see the log at -v4",
        }
    }

    pub(super) fn kernel(pid: HostPid, step: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::Kernel { pid, step, source: errno.into() }
    }
}
