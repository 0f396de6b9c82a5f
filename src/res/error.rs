//! Errors of dumping and restoring process state.

use std::{io, path::PathBuf};

use nix::errno::Errno;

use super::tree::cgroup::CgroupError;
use crate::{
    image::ImageError,
    inject::InjectError,
    proc::ProcError,
    units::{HostPid, NsPid},
};

/// The result of dumping or restoring process state.
pub type Result<T, E = ResError> = std::result::Result<T, E>;

/// Why process state could not be dumped or restored.
#[derive(Debug, thiserror::Error)]
pub enum ResError {
    /// The process has state that rcriu does not dump.
    #[error("process {pid} cannot be dumped: {what}")]
    Unsupported {
        /// The process or thread.
        pid: HostPid,
        /// The state, and how to avoid it.
        what: String,
    },
    /// A system call about a thread failed.
    #[error("{step} thread {tid}")]
    Thread {
        /// The thread.
        tid: HostPid,
        /// The attempted step, as a verb.
        step: &'static str,
        /// Why it failed.
        source: Errno,
    },
    /// The images hold an invalid value, or one that this machine cannot restore.
    #[error("images of process {pid}: {problem}")]
    Image {
        /// The process or thread.
        pid: NsPid,
        /// What was found, and what was expected.
        problem: String,
    },
    /// This kernel is not the one that the tree was dumped on.
    #[error(
        "the vDSO of process {pid} differs from this kernel's ({problem})\n\
         help: restore on the kernel that the process was dumped on"
    )]
    OtherKernel {
        /// The process.
        pid: HostPid,
        /// What differs.
        problem: String,
    },
    /// The images describe a namespace wrongly.
    #[error("images of namespace {number}: {problem}")]
    Namespace {
        /// The number of the namespace in the images.
        number: u32,
        /// What was found, and what was expected.
        problem: String,
    },
    /// A System V segment could not be found or recreated.
    #[error("System V segment {id}: {problem}")]
    Segment {
        /// Its id.
        id: u32,
        /// What is wrong, and how to fix it.
        problem: String,
    },
    /// Shared memory could not be examined or created.
    #[error("{step} shared memory {number}")]
    SharedMemory {
        /// Its `shmid` in the images.
        number: u64,
        /// The attempted step, as a verb.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A file could not be read.
    #[error("read {path}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file in `/proc` could not be written.
    #[error("write {path}", path = .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An image could not be read or written.
    #[error(transparent)]
    Images(#[from] ImageError),
    /// A file in `/proc` could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// A control group differs from that of the dump.
    #[error(transparent)]
    Cgroup(CgroupError),
    /// A system call could not be injected into the process.
    #[error(transparent)]
    Inject(#[from] InjectError),
}
