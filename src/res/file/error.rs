//! Errors of dumping and restoring open files.

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
    /// The file is of a kind, or in a state, that rcriu does not dump.
    #[error("{} is {what}\nhelp: {help}", file_of(*pid, *fd))]
    Unsupported {
        /// The process.
        pid: HostPid,
        /// Its descriptor number there; negative if it has none, because it is mapped or queued
        /// in a socket.
        fd: TargetFd,
        /// What the file is, with its name: `the socket [1234], connected to 10.0.0.1:80`.
        what: String,
        /// How to avoid it: a clause in lower case.
        help: &'static str,
    },
    /// A system call of the dump failed.
    #[error("{step} {} ({link})", file_of(*pid, *fd))]
    Dump {
        /// The process.
        pid: HostPid,
        /// Its descriptor number there; negative if it has none.
        fd: TargetFd,
        /// The target of its link in `/proc/PID/fd`.
        link: String,
        /// The attempted step, as a verb: "read the counter of".
        step: &'static str,
        /// The cause.
        source: Errno,
    },
    /// An eventfd behaved as if another process used it.
    #[error(
        "find out whether an eventfd of process {pid}, which held {count:#x}, is a semaphore; \
         this kernel does not tell"
    )]
    Probe {
        /// A process that has the eventfd open.
        pid: HostPid,
        /// The value of its counter.
        count: u64,
        /// The cause.
        source: std::io::Error,
    },
    /// A system call of the restore failed.
    #[error("{step} {object} (file {id:#x} of the images)")]
    Restore {
        /// The number of the file in the images.
        id: u32,
        /// The attempted step, as a verb: "open", "bind".
        step: &'static str,
        /// The object: a path, an address.
        object: String,
        /// The cause.
        source: Errno,
    },
    /// A shared memory object could not be created.
    #[error("{step} shared memory {shmid}")]
    Memory {
        /// Its `shmid` in the images.
        shmid: u64,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The images hold an invalid value, or one that this machine cannot restore.
    #[error("file {id:#x} of the images: {problem}")]
    Image {
        /// The number of the file in the images.
        id: u32,
        /// The defect, and the expected value.
        problem: String,
    },
    /// The dump could not read a file.
    #[error("read {path}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The kernel opens files in `/proc/PID/map_files` only for privileged processes
    /// (`proc_pid_map_files(5)`).
    #[error(
        "read {path}\nhelp: run rcriu as root, or give it CAP_CHECKPOINT_RESTORE",
        path = .path.display()
    )]
    Unprivileged {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A network namespace of the tree could not be entered.
    #[error("enter a network namespace of the tree (setns(2))")]
    Network {
        /// The cause.
        source: std::io::Error,
    },
    /// Packets of the tree's connections are held back still.
    #[error("let packets of the tree's connections pass again (nftables, iptables)")]
    Packets {
        /// The cause.
        source: std::io::Error,
    },
    /// An image could not be read or written.
    #[error(transparent)]
    Images(#[from] ImageError),
    /// A file in `/proc` could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
}

impl FileError {
    /// Returns the error for a file that the dump could not read.
    pub(super) fn read(path: PathBuf, source: std::io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EPERM) => Self::Unprivileged { path, source },
            _ => Self::Read { path, source },
        }
    }

    /// Returns a constructor of [`FileError::Restore`] for `map_err`.
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

pub(super) use crate::sys::errno;
