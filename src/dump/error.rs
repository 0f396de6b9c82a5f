//! Why a tree was not dumped.

use std::{io, path::PathBuf};

use crate::{
    dedup::DedupError, lazy::LazyError, pages::PagesError, step::StepError, units::HostPid,
};

/// The result of a step of a dump.
pub type Result<T, E = DumpError> = std::result::Result<T, E>;

/// Why a tree was not dumped. The tree runs on.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// There is no such process.
    #[error("there is no process {pid}")]
    NoProcess {
        /// The pid that the user gave.
        pid: HostPid,
    },
    /// A process of the tree died during the dump.
    #[error(
        "process {pid} {how} while it was dumped, so the incomplete images were removed\nhelp: dump \
         the rest of the tree again"
    )]
    Died {
        /// The process.
        pid: HostPid,
        /// How it died; begins with a verb.
        how: String,
    },
    /// The process has no room for scratch memory in its cgroup: the kernel would kill it.
    #[error(
        "reading the state of process {pid} takes {needed} bytes of memory for a moment, but its \
         cgroup {group} has only {left} left, and the kernel would kill the process\nhelp: raise \
         the limit for the time of the dump", group = .group.display()
    )]
    NoRoom {
        /// The process.
        pid: HostPid,
        /// The directory of the cgroup.
        group: PathBuf,
        /// Bytes that are left in it.
        left: u64,
        /// Bytes that are needed.
        needed: u64,
    },
    /// The memory of the tree is not all there, and the wait for that failed.
    #[error(transparent)]
    Lazy(#[from] LazyError),
    /// This program is a descendant of the root of the tree.
    #[error(
        "rcriu itself is in the tree of process {pid}, and cannot dump itself\nhelp: run it from \
         another shell, or start it apart from the tree: setsid -f rcriu dump ..."
    )]
    Inside {
        /// The root of the tree.
        pid: HostPid,
    },
    /// The pages go to a page server, and the directory already has some.
    #[error(
        "{dir} holds {name}, and pages of another dump would be taken for those of this one, which go to \
         the page server\nhelp: use an empty directory, or remove that dump", dir = .dir.display()
    )]
    HasPages {
        /// The directory.
        dir: PathBuf,
        /// An image in it.
        name: String,
    },
    /// Too much memory would be copied while the tree is stopped.
    #[error(
        "--live copies shared memory, huge pages and memory that a fork leaves out while the tree is \
         stopped: {bytes} bytes, more than {limit}; most of that is {largest}\nhelp: allow more with \
         --live-stopped SIZE, or dump without --live"
    )]
    LiveLimit {
        /// How much it is.
        bytes: u64,
        /// How much it may be.
        limit: u64,
        /// The largest part.
        largest: String,
    },
    /// The tree was stopped before, by its cgroup.
    #[error(
        "the cgroup {group} of the tree is frozen, so the tree would not run during the dump\nhelp: dump \
         it without --live", group = .group.display()
    )]
    LiveFrozen {
        /// The directory of the cgroup.
        group: PathBuf,
    },
    /// The process that keeps the memory of another has ended.
    #[error(
        "the copy-on-write copy of process {pid} that --live reads was killed; the tree runs on\nhelp: if \
         memory has run out, leave more for the pages that the tree writes during the dump, or dump it \
         without --live"
    )]
    LiveLost {
        /// The process of the tree.
        pid: HostPid,
    },
    /// The directory of `--chain` cannot be used.
    #[error("use the directory of dumps {path} (--chain)", path = .path.display())]
    Series {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A signal interrupted the dump.
    #[error("interrupted: the tree runs on")]
    Cancelled,
    /// A file could not be read.
    #[error("read {path}", path = .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
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
        /// The names of those snapshots.
        children: String,
    },
    /// Memory could not be copied.
    #[error(transparent)]
    Pages(PagesError),
    /// Pages in the ancestors cannot be freed.
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
