//! Why a tree was not dumped.

use std::{io, path::PathBuf};

use nix::errno::Errno;

use crate::{
    action::ActionError,
    arch::NotBuilt,
    chain::ChainError,
    dedup::DedupError,
    fault::Injected,
    image::ImageError,
    inject::InjectError,
    pages::PagesError,
    proc::ProcError,
    res::{ResError, file::FileError},
    sys::lock::LockError,
    track::TrackError,
    units::HostPid,
};

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
        "process {pid} {how} while it was dumped: the images are not complete and were removed; \
         dump what is left of the tree again"
    )]
    Died {
        /// The process.
        pid: HostPid,
        /// What became of it, beginning with a verb.
        how: String,
    },
    /// The kernel would kill a process if it were given memory.
    #[error(
        "process {pid} cannot be asked for its state: that takes {needed} bytes of memory for a \
         moment, and its cgroup {group} has {left} left, so that the kernel would kill it; raise \
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
        "rcriu itself is in the tree of process {pid}, and cannot dump itself; run it from \
         another shell, or start it apart from the tree: setsid -f rcriu dump ..."
    )]
    Inside {
        /// The root of the tree.
        pid: HostPid,
    },
    /// The tree depends on what is outside of it, or is in a state that is not
    /// dumped.
    #[error("process {pid} {what}; {help}")]
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
        "process {pid} has {what} of its own, which is not dumped yet: run this program inside, by \
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
        "tell by kcmp(2) what process {pid} shares; run rcriu where no filter of system calls \
         forbids it, on a kernel with CONFIG_KCMP"
    )]
    Compare {
        /// The process.
        pid: HostPid,
        /// Why.
        source: Errno,
    },
    /// The program was asked to stop.
    #[error("asked to stop; the tree runs on")]
    Cancelled,
    /// A system call about a process failed.
    #[error("{step} process {pid}")]
    Process {
        /// The process.
        pid: HostPid,
        /// What was attempted, as a verb.
        step: &'static str,
        /// Why it failed.
        source: Errno,
    },
    /// A file could not be read.
    #[error("read {path}", path = .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory for the images cannot be used.
    #[error("images directory {path}: {problem}", path = .path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong, and what would help.
        problem: String,
    },
    /// Other snapshots find pages in the directory.
    #[error(
        "{dir} is the parent of {children}, which a dump into it would change: name another \
         directory with -D, or remove those first",
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
    /// The parent chain cannot be used.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// An image could not be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An open file could not be dumped.
    #[error(transparent)]
    OpenFile(#[from] FileError),
    /// State of a process could not be dumped.
    #[error(transparent)]
    State(#[from] ResError),
    /// A process could not be stopped or made to work for this program.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Changes could not be tracked in the way that was asked for.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// Something in `/proc` could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// A program of the user failed.
    #[error(transparent)]
    Action(#[from] ActionError),
    /// Nothing can be freed in the ancestors.
    #[error(transparent)]
    Dedup(#[from] DedupError),
    /// A directory is in use by another program.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Processes of this machine cannot be handled yet.
    #[error(transparent)]
    NotBuilt(#[from] NotBuilt),
    /// A test asked for it.
    #[error(transparent)]
    Fault(#[from] Injected),
}

impl From<PagesError> for DumpError {
    fn from(error: PagesError) -> Self {
        match error {
            PagesError::Cancelled => Self::Cancelled,
            error => Self::Pages(error),
        }
    }
}
