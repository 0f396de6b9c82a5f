//! Why a tree was not restored.

use std::{io, path::PathBuf};

use nix::errno::Errno;

use crate::{
    lazy::LazyError,
    res::file::FileError,
    step::StepError,
    units::{HostPid, NsPid, RemoteAddr},
};

/// The result of a step of a restore.
pub type Result<T, E = RestoreError> = std::result::Result<T, E>;

/// Why a tree was not restored. No process of it is left.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A pid of the images is in use.
    #[error(
        "process {pid} cannot be restored: its pid is in use by process {holder} ({name}){state}\n\
         help: end that process, or restore the tree in a pid namespace of its own"
    )]
    PidInUse {
        /// The process or thread of the images.
        pid: HostPid,
        /// The process that holds the pid.
        holder: HostPid,
        /// The name of that process.
        name: String,
        /// More about it: that it is a zombie, or only holds the pid as that of its session
        /// or group.
        state: String,
    },
    /// The images contradict themselves, or hold state that a restore does not support.
    #[error("images of process {pid}: {problem}")]
    Images {
        /// The process.
        pid: NsPid,
        /// The problem.
        problem: String,
    },
    /// A restore cannot make processes that are related like these.
    #[error("process {pid} cannot be restored: {problem}")]
    Relation {
        /// The process.
        pid: NsPid,
        /// How it is related to which process.
        problem: String,
    },
    /// Memory could not be prepared for a restore on demand.
    #[error("{step} for process {pid} (--lazy){}", userfault_help(*source))]
    Userfault {
        /// The process.
        pid: HostPid,
        /// The step that failed.
        step: &'static str,
        /// The cause.
        source: Errno,
    },
    /// Memory cannot be restored on demand.
    #[error(transparent)]
    Lazy(#[from] LazyError),
    /// A process could not be made.
    #[error("make process {pid}{}", spawn_help(*source))]
    Spawn {
        /// Its pid.
        pid: HostPid,
        /// The cause.
        source: Errno,
    },
    /// A process could not be made in namespaces of its own.
    #[error(
        "make process {pid} in {what} of its own\nhelp: this takes CAP_SYS_ADMIN; an ordinary user may \
         restore trees that have a user and a pid namespace of their own: unshare -Urpf"
    )]
    SpawnInside {
        /// Its pid.
        pid: NsPid,
        /// Which namespaces.
        what: String,
        /// The cause.
        source: Errno,
    },
    /// Memory could not be filled.
    #[error("write {len:#x} bytes at {address} of process {pid}")]
    WriteMemory {
        /// The process.
        pid: HostPid,
        /// Where.
        address: RemoteAddr,
        /// How many.
        len: u64,
        /// The cause.
        source: Errno,
    },
    /// The images are behind a mount that frees no pages.
    #[error(
        "the images are read through the mount at {path}, which frees no pages and keeps other \
         programs from freeing them\nhelp: mount them with --punch, or unmount them and restore from {behind}",
        path = .path.display(), behind = .behind.display()
    )]
    MountedReadOnly {
        /// The mount.
        path: PathBuf,
        /// The images behind it.
        behind: PathBuf,
    },
    /// A mount did not free the restored pages.
    #[error("let the mount free what was restored")]
    Commit {
        /// The cause.
        source: Errno,
    },
    /// The restore failed after it had freed pages.
    #[error(
        "{pages} pages were freed in the images before the restore failed, as --auto-dedup=now \
         asks: the images can no longer be restored"
    )]
    Spent {
        /// How many.
        pages: u64,
        /// The cause.
        source: Box<RestoreError>,
    },
    /// The memory of a process that was already filled could not be read.
    #[error("read {len:#x} bytes at {address} of process {pid}")]
    ReadMemory {
        /// The process.
        pid: HostPid,
        /// Where.
        address: RemoteAddr,
        /// How many.
        len: u64,
        /// The cause.
        source: io::Error,
    },
    /// Shared memory could not be made or filled.
    #[error("{step} the shared memory {shmid}")]
    Object {
        /// The object's number in the images.
        shmid: u64,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A file could not be written.
    #[error("write {path}", path = .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The images contradict themselves about a file, or the file is not as it was.
    #[error("{place}: {problem}")]
    WrongFile {
        /// The file: its user and its path.
        place: String,
        /// The problem and the remedy.
        problem: String,
    },
    /// A system call on a file failed.
    #[error("{step} {object} ({place})")]
    FileCall {
        /// The file: its user and its path.
        place: String,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The object: a path, an address.
        object: String,
        /// The cause.
        source: Errno,
    },
    /// A step failed that a dump has, too.
    #[error(transparent)]
    Step(StepError),
}

impl<E> From<E> for RestoreError
where
    StepError: From<E>,
{
    fn from(error: E) -> Self {
        Self::Step(error.into())
    }
}

impl RestoreError {
    /// Replaces the number of a file in the images by what messages call the file.
    pub(super) fn located(self, place: impl Fn(u32) -> String) -> Self {
        match self {
            Self::Step(StepError::OpenFile(FileError::Image { id, problem })) => {
                Self::WrongFile { place: place(id), problem }
            }
            Self::Step(StepError::OpenFile(FileError::Restore { id, step, object, source })) => {
                Self::FileCall { place: place(id), step, object, source }
            }
            error => error,
        }
    }
}

/// Returns what the user can do if rcriu may not choose pids.
fn spawn_help(source: Errno) -> &'static str {
    if source == Errno::EPERM {
        " with this pid\nhelp: run rcriu as root or with CAP_CHECKPOINT_RESTORE, or start trees in a user and a \
         pid namespace of their own, which an ordinary user may restore: unshare -Urpf"
    } else {
        ""
    }
}

fn userfault_help(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM => {
            "\nhelp: restore it without --lazy, or as root outside of user namespaces: pages on demand \
             need CAP_SYS_PTRACE, since system calls wait for them, too"
        }
        Errno::ENOSYS => "\nhelp: restore it without --lazy: this kernel has no userfaultfd",
        _ => "",
    }
}
