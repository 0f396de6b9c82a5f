//! Why an open file could not be dumped or restored.

use std::path::PathBuf;

use nix::{errno::Errno, libc};
use thiserror::Error;

use crate::{
    image::ImageError,
    proc::ProcError,
    units::{HostPid, TargetFd},
};

/// The result of dumping or restoring an open file.
pub type Result<T, E = FileError> = std::result::Result<T, E>;

pub(super) fn file_of(pid: HostPid, fd: TargetFd) -> String {
    if fd.0 < 0 {
        format!("a file that process {pid} uses without a descriptor")
    } else {
        format!("descriptor {fd} of process {pid}")
    }
}

/// Why an open file could not be dumped or restored.
#[derive(Debug, Error)]
pub enum FileError {
    /// It is of a kind, or in a state, that is not dumped.
    #[error("{} is {what}\nhelp: {help}", file_of(*pid, *fd))]
    Unsupported {
        /// The process.
        pid: HostPid,
        /// The descriptor's number there, negative if it has none: the file is mapped, say, or
        /// on its way in a socket.
        fd: TargetFd,
        /// What it is, with its name, as in `the socket [1234], connected to 10.0.0.1:80`.
        what: String,
        /// What would help: the beginning of a sentence, in lower case.
        help: &'static str,
    },
    /// A system call failed while dumping.
    #[error("{step} {} ({link})", file_of(*pid, *fd))]
    Dump {
        /// The process.
        pid: HostPid,
        /// The descriptor's number there, negative if it has none.
        fd: TargetFd,
        /// What it leads to.
        link: String,
        /// What was attempted, as a verb: "read the counter of".
        step: &'static str,
        /// Why it failed.
        source: Errno,
    },
    /// An eventfd behaved as if another process used it.
    #[error(
        "find out whether an eventfd of process {pid}, which held {count:#x}, is a semaphore; \
         this kernel does not tell"
    )]
    Probe {
        /// A process that has it.
        pid: HostPid,
        /// What its counter was.
        count: u64,
        /// What went wrong.
        source: std::io::Error,
    },
    /// A system call failed while restoring.
    #[error("{step} {object} (file {id:#x} of the images)")]
    Restore {
        /// The number of the file in the images.
        id: u32,
        /// What was attempted, as a verb: "open", "bind".
        step: &'static str,
        /// The object: a path, an address.
        object: String,
        /// Why it failed.
        source: Errno,
    },
    /// Shared memory could not be made.
    #[error("{step} the shared memory {shmid}")]
    Memory {
        /// Its number in the images.
        shmid: u64,
        /// What was attempted, as a verb.
        step: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// What the images say cannot be, or is not restored here.
    #[error("file {id:#x} of the images: {problem}")]
    Image {
        /// The number of the file in the images.
        id: u32,
        /// What is wrong, found and expected.
        problem: String,
    },
    /// A file could not be read while dumping.
    #[error("read {path}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel opens a file in `/proc/PID/map_files` only for privileged programs
    /// (`proc_pid_map_files(5)`).
    #[error(
        "read {path}\nhelp: run rcriu as root, or give it CAP_CHECKPOINT_RESTORE",
        path = .path.display()
    )]
    Unprivileged {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// An image could not be read or written.
    #[error(transparent)]
    Images(#[from] ImageError),
    /// Something in `/proc` could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
}

impl FileError {
    /// Returns why the file at `path` could not be read while dumping.
    pub(super) fn read(path: PathBuf, source: std::io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EPERM) => Self::Unprivileged { path, source },
            _ => Self::Read { path, source },
        }
    }

    /// Returns [`FileError::Restore`] for a file of the images, ready for `map_err`.
    pub fn restore(
        id: u32,
        step: &'static str,
        object: impl AsRef<[u8]>,
    ) -> impl FnOnce(Errno) -> Self {
        move |source| {
            let object = String::from_utf8_lossy(object.as_ref()).into_owned();
            Self::Restore { id, step, object, source }
        }
    }

    /// Returns [`FileError::Image`].
    pub fn image(id: u32, problem: impl Into<String>) -> Self {
        Self::Image { id, problem: problem.into() }
    }
}
