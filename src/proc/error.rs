//! Why something could not be read from `/proc`.

use std::{
    io,
    path::{Path, PathBuf},
};

use nix::errno::Errno;
use thiserror::Error;

use super::text::Defect;

/// The result of reading from `/proc`.
pub type Result<T> = std::result::Result<T, ProcError>;

/// Why something could not be read from `/proc`.
#[derive(Debug, Error)]
pub enum ProcError {
    /// The process, the thread or the descriptor is gone, or the kernel has no
    /// such file: `ENOENT` or `ESRCH`.
    #[error("find {}: gone", path.display())]
    Vanished {
        /// What was to be read.
        path: PathBuf,
    },
    /// The caller may not look at the process: `EACCES` or `EPERM`.
    #[error("read {}: not allowed", path.display())]
    Denied {
        /// What was to be read.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The kernel refused for another reason.
    #[error("read {}", path.display())]
    Read {
        /// What was to be read.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The text is not as the kernel writes it.
    #[error("parse {}: expected {what}, found {found:?}", path.display())]
    Malformed {
        /// What was read.
        path: PathBuf,
        /// What should have been there.
        what: &'static str,
        /// The beginning of what was there instead; empty if nothing was.
        found: String,
    },
}

impl ProcError {
    /// Returns whether what was to be read was not there (any more).
    pub const fn is_vanished(&self) -> bool {
        matches!(self, Self::Vanished { .. })
    }

    /// Sorts the kernel's answer to an attempt to read `path`.
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

    /// Adds the path to what a parser found wrong.
    pub(super) fn malformed(path: &Path, defect: Defect) -> Self {
        Self::Malformed { path: path.to_owned(), what: defect.what, found: defect.found }
    }
}
