//! Why the state of a process could not be dumped or restored.

use std::{io, path::PathBuf};

use nix::errno::Errno;

use super::tree::cgroup::CgroupError;
use crate::{
    image::ImageError,
    inject::InjectError,
    proc::ProcError,
    units::{HostPid, NsPid},
};

/// The result of dumping or restoring state of a process.
pub type Result<T, E = ResError> = std::result::Result<T, E>;

/// Why the state of a process could not be dumped or restored.
#[derive(Debug, thiserror::Error)]
pub enum ResError {
    /// It is in a state that is not dumped.
    #[error("process {pid} cannot be dumped: {what}")]
    Unsupported {
        /// The process or thread.
        pid: HostPid,
        /// The state, and what would help.
        what: String,
    },
    /// A system call about a thread failed.
    #[error("{step} thread {tid}")]
    Thread {
        /// The thread.
        tid: HostPid,
        /// What was attempted, as a verb.
        step: &'static str,
        /// Why it failed.
        source: Errno,
    },
    /// What the images say of it cannot be, or cannot be on this machine.
    #[error("images of process {pid}: {problem}")]
    Image {
        /// The process or thread.
        pid: NsPid,
        /// What is wrong, found and expected.
        problem: String,
    },
    /// The kernel is another one than the tree was dumped on.
    #[error(
        "process {pid} has a vDSO that this kernel does not have ({problem})\n\
         help: restore it on the kernel that it was dumped on"
    )]
    OtherKernel {
        /// The process.
        pid: HostPid,
        /// What differs.
        problem: String,
    },
    /// What the images say of a namespace cannot be.
    #[error("images of namespace {number}: {problem}")]
    Namespace {
        /// Its number in the images.
        number: u32,
        /// What is wrong, found and expected.
        problem: String,
    },
    /// A System V segment could not be found or made again.
    #[error("System V segment {id}: {problem}")]
    Segment {
        /// Its id.
        id: u32,
        /// What is in the way, and what would help.
        problem: String,
    },
    /// Shared memory could not be looked at or made.
    #[error("{step} the shared memory {number}")]
    SharedMemory {
        /// Its number in the images.
        number: u64,
        /// What was attempted, as a verb.
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
    /// Something in `/proc` could not be written.
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
    /// Something in `/proc` could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// A control group is not as it was.
    #[error(transparent)]
    Cgroup(CgroupError),
    /// The process could not be made to work for this program.
    #[error(transparent)]
    Inject(#[from] InjectError),
}
