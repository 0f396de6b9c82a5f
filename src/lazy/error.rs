//! Errors of supplying memory on demand.

use std::{io, path::PathBuf};

use nix::errno::Errno;

use crate::{
    chain::ChainError,
    sys::lock::LockError,
    units::{HostPid, RemoteAddr},
};

/// The result of supplying memory on demand.
pub type Result<T, E = LazyError> = std::result::Result<T, E>;

/// Why memory could not be supplied on demand.
#[derive(Debug, thiserror::Error)]
pub enum LazyError {
    /// Pages could not be read from the images.
    #[error("read the pages of process {pid} from {address} on")]
    Read {
        /// The process.
        pid: HostPid,
        /// The address of the first page, in the images.
        address: RemoteAddr,
        /// The cause.
        source: ChainError,
    },
    /// The kernel did not take pages.
    #[error("give process {pid} its pages from {address} on")]
    Supply {
        /// The process.
        pid: HostPid,
        /// The address of the first page.
        address: RemoteAddr,
        /// The cause.
        source: Errno,
    },
    /// The kernel did not report.
    #[error("{step} (pages of process {pid})")]
    Kernel {
        /// The process.
        pid: HostPid,
        /// The step that failed.
        step: &'static str,
        /// The cause.
        source: Errno,
    },
    /// A process could not be tied to the pager.
    #[error("let process {pid} end with the pager")]
    Arm {
        /// The process.
        pid: HostPid,
        /// The cause.
        source: io::Error,
    },
    /// The images could not be opened.
    #[error("open the images in {path}", path = .path.display())]
    Images {
        /// Their directory.
        path: PathBuf,
        /// The cause.
        source: ChainError,
    },
    /// The images lack a memory.
    #[error("{path} has no memory of process {id}", path = .path.display())]
    NoMemory {
        /// Their directory.
        path: PathBuf,
        /// The number of the process in the images.
        id: u64,
    },
    /// The images could not be locked.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The pager did not start, or the connection with it failed.
    #[error("{step} (pager)")]
    Pager {
        /// The step that failed.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The pager could not begin.
    #[error("the pager could not begin: {0}")]
    Refused(String),
}

impl LazyError {
    /// Adds a step to an error of the connection with the pager.
    pub(super) fn pager<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Pager { step, source: source.into() }
    }
}
