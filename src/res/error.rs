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
    /// The process depends on a process outside the tree, or has state that rcriu does not dump.
    /// The dump finds this before it changes anything.
    #[error("process {pid} {what}\nhelp: {help}")]
    Refused {
        /// The process.
        pid: HostPid,
        /// What the process does or has, beginning with a verb.
        what: String,
        /// How the user can avoid it.
        help: &'static str,
    },
    /// The dump cannot find out what processes, threads and descriptors share.
    #[error(
        "compare what processes share with process {pid} (kcmp(2))\nhelp: run rcriu where no \
         seccomp filter forbids kcmp, on a kernel with CONFIG_KCMP"
    )]
    Compare {
        /// The process.
        pid: HostPid,
        /// The cause.
        source: Errno,
    },
    /// A system call about a process failed.
    #[error("{step} process {pid}")]
    Process {
        /// The process.
        pid: HostPid,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The cause.
        source: Errno,
    },
    /// A system call about a thread failed.
    #[error("{step} thread {tid}")]
    Thread {
        /// The thread.
        tid: HostPid,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The cause.
        source: Errno,
    },
    /// The images hold an invalid value, or one that this machine cannot restore.
    #[error("images of process {pid}: {problem}")]
    Image {
        /// The process or thread.
        pid: NsPid,
        /// The defect, and the expected value.
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
        /// The difference.
        problem: String,
    },
    /// The processor lacks what the tree may use, or cannot be compared.
    #[error("compare the processor with that of the images: {problem}")]
    Processor {
        /// The difference, and the way out.
        problem: String,
    },
    /// The images describe a namespace wrongly.
    #[error("images of namespace {number}: {problem}")]
    Namespace {
        /// The number of the namespace in the images.
        number: u32,
        /// The defect, and the expected value.
        problem: String,
    },
    /// rcriu may not map the ids of a user namespace.
    #[error(
        "map the users {users} and the groups {groups} into a user namespace, as user {user} and group \
         {group}\nhelp: run rcriu restore as root, or as the user and group to which alone the tree maps"
    )]
    Maps {
        /// The user of rcriu.
        user: u32,
        /// The group of rcriu.
        group: u32,
        /// The users to be mapped.
        users: String,
        /// The groups to be mapped.
        groups: String,
        /// The cause.
        source: Errno,
    },
    /// A mount could not be dumped or restored.
    #[error("{step} the mount at {point}", point = .point.display())]
    Mount {
        /// Its mount point.
        point: PathBuf,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A System V segment could not be found or recreated.
    #[error("System V segment {id}: {problem}")]
    Segment {
        /// Its id.
        id: u32,
        /// The defect, and the remedy.
        problem: String,
    },
    /// A message queue or a set of semaphores could not be examined or created.
    #[error("{step} {object}")]
    Ipc {
        /// Its kind and its id or name.
        object: String,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// Shared memory could not be examined or created.
    #[error("{step} shared memory {number}")]
    SharedMemory {
        /// Its `shmid` in the images.
        number: u64,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A file could not be read.
    #[error("read {path}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file in `/proc` could not be written.
    #[error("write {path}", path = .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
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

impl ResError {
    /// Returns the error for a thread with its own instance of state that all threads of a restored
    /// process share.
    pub(super) fn own_of_thread(pid: HostPid, tid: HostPid, what: &str) -> Self {
        Self::Refused {
            pid,
            what: format!("has a thread, {tid}, with {what} of its own (unshare(2), setns(2))"),
            help: "dump it when that thread has ended: threads of a restored process share theirs",
        }
    }
}
