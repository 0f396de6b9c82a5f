//! Why a tree was not dumped.

use std::{io, path::PathBuf};

use nix::errno::Errno;

use crate::{dedup::DedupError, pages::PagesError, step::StepError, units::HostPid};

/// The result of a step of a dump.
pub type Result<T, E = DumpError> = std::result::Result<T, E>;

/// Why a tree was not dumped. It runs on.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// There is no such process.
    #[error("there is no process {pid}")]
    NoProcess {
        /// What was asked for.
        pid: HostPid,
    },
    /// A process of the tree has died while it was dumped.
    #[error(
        "process {pid} {how} while it was dumped, so the incomplete images were removed\nhelp: dump \
         the rest of the tree again"
    )]
    Died {
        /// The process.
        pid: HostPid,
        /// What became of it, beginning with a verb.
        how: String,
    },
    /// The kernel would kill a process if it were given memory.
    #[error(
        "reading the state of process {pid} takes {needed} bytes of memory for a moment, but its \
         cgroup {group} has only {left} left, and the kernel would kill the process\nhelp: raise \
         the limit for the time of the dump", group = .group.display()
    )]
    NoRoom {
        /// The process.
        pid: HostPid,
        /// The directory of the control group.
        group: PathBuf,
        /// Bytes that are left in it.
        left: u64,
        /// Bytes that are needed.
        needed: u64,
    },
    /// This program is a descendant of what it is to dump.
    #[error(
        "rcriu itself is in the tree of process {pid}, and cannot dump itself\nhelp: run it from \
         another shell, or start it apart from the tree: setsid -f rcriu dump ..."
    )]
    Inside {
        /// The root of the tree.
        pid: HostPid,
    },
    /// The tree depends on what is outside of it, or is in a state that is not
    /// dumped.
    #[error("process {pid} {what}\nhelp: {help}")]
    Unsupported {
        /// The process.
        pid: HostPid,
        /// What it does or has, beginning with a verb.
        what: String,
        /// What would help.
        help: &'static str,
    },
    /// A process lives in namespaces that are not those of this program.
    #[error(
        "process {pid} has {what} of its own, which is not dumped yet\nhelp: run rcriu inside: \
         nsenter -t {pid} {flags} rcriu dump ..."
    )]
    Namespaces {
        /// The process.
        pid: HostPid,
        /// Which, with their numbers.
        what: String,
        /// The options of nsenter(1) that enter them.
        flags: String,
    },
    /// It cannot be told what processes, threads and descriptors share.
    #[error(
        "compare what processes share with process {pid} (kcmp(2))\nhelp: run rcriu where no \
         seccomp filter forbids kcmp, on a kernel with CONFIG_KCMP"
    )]
    Compare {
        /// The process.
        pid: HostPid,
        /// Why.
        source: Errno,
    },
    /// The program was asked to stop.
    #[error("interrupted: the tree runs on")]
    Cancelled,
    /// A file could not be read.
    #[error("read {path}", path = .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Other snapshots find pages in the directory.
    #[error(
        "{dir} is the parent of {children}, which a dump into it would change\nhelp: name \
         another directory with -D, or remove those first",
        dir = .dir.display()
    )]
    HasChildren {
        /// The directory.
        dir: PathBuf,
        /// Their names.
        children: String,
    },
    /// Memory could not be copied.
    #[error(transparent)]
    Pages(PagesError),
    /// Nothing can be freed in the ancestors.
    #[error(transparent)]
    Dedup(#[from] DedupError),
    /// A step failed that a restore has, too.
    #[error(transparent)]
    Step(StepError),
}

impl<E> From<E> for DumpError
where
    StepError: From<E>,
{
    fn from(error: E) -> Self {
        Self::Step(error.into())
    }
}

impl From<PagesError> for DumpError {
    fn from(error: PagesError) -> Self {
        match error {
            PagesError::Cancelled => Self::Cancelled,
            error => Self::Pages(error),
        }
    }
}
