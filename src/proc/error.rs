//! Errors of reading `/proc`.

use std::{
    io,
    path::{Path, PathBuf},
};

use nix::errno::Errno;
use thiserror::Error;

use super::text::Defect;

/// The result of reading `/proc`.
pub type Result<T> = std::result::Result<T, ProcError>;

/// An error of reading a file in `/proc`.
#[derive(Debug, Error)]
pub enum ProcError {
    /// The process, thread or descriptor does not exist (any more), or the kernel has no such
    /// file: `ENOENT` or `ESRCH`.
    #[error("read {}: it does not exist", path.display())]
    Vanished {
        /// The file.
        path: PathBuf,
    },
    /// The caller may not examine the process: `EACCES` or `EPERM`.
    #[error("read {}: not permitted", path.display())]
    Denied {
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
    /// Reading failed for another reason.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The text is not in the kernel's format.
    #[error("parse {}: expected {what}, found {found:?}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The expected text.
        what: &'static str,
        /// The start of what was found; empty if the text ended.
        found: String,
    },
}

impl ProcError {
    /// Whether the file did not exist (any more).
    pub const fn is_vanished(&self) -> bool {
        matches!(self, Self::Vanished { .. })
    }

    /// Returns the variant for an error of reading `path`.
    pub(super) fn from_io(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        let is_no_process = source.raw_os_error() == Some(Errno::ESRCH as i32);
        match source.kind() {
            io::ErrorKind::NotFound => Self::Vanished { path },
            _ if is_no_process => Self::Vanished { path },
            io::ErrorKind::PermissionDenied => Self::Denied { path, source },
            _ => Self::Read { path, source },
        }
    }

    /// Adds the path to the defect that a parser has found.
    pub(super) fn malformed(path: &Path, defect: Defect) -> Self {
        Self::Malformed { path: path.to_owned(), what: defect.what, found: defect.found }
    }
}
