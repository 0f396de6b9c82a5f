//! Why memory was not copied.

use std::{io, path::PathBuf};

use crate::{
    chain::ChainError,
    fault::Injected,
    image::ImageError,
    units::{HostPid, RemoteAddr},
};

/// The result of copying memory.
pub type Result<T, E = PagesError> = std::result::Result<T, E>;

/// Why memory was not copied.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The program was asked to stop.
    #[error("asked to stop")]
    Cancelled,
    /// A file of a process could not be opened.
    #[error("read {path}", path = .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Memory of a process could not be read.
    #[error("read {len:#x} bytes at {address} of process {pid}")]
    ReadMemory {
        /// The process.
        pid: HostPid,
        /// Where.
        address: RemoteAddr,
        /// How many.
        len: u64,
        /// Why it failed.
        source: io::Error,
    },
    /// Shared memory could not be read.
    #[error("read shared memory {name} at offset {offset:#x}")]
    ReadObject {
        /// The object.
        name: String,
        /// Where.
        offset: u64,
        /// Why it failed.
        source: io::Error,
    },
    /// A pages file could not be written.
    #[error("write {path}", path = .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The parent chain cannot be used.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// A pagemap could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A test asked for it.
    #[error(transparent)]
    Fault(#[from] Injected),
}
