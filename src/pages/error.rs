//! Errors of copying memory.

use std::{io, path::PathBuf};

use super::tls::TlsError;
use crate::{
    chain::ChainError,
    fault::Injected,
    image::ImageError,
    units::{HostPid, RemoteAddr},
};

/// The result of copying memory.
pub type Result<T, E = PagesError> = std::result::Result<T, E>;

/// Why memory could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The user or the system has asked rcriu to stop.
    #[error("asked to stop")]
    Cancelled,
    /// A file of a process could not be opened.
    #[error("read {path}", path = .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Memory of a process could not be read.
    #[error("read {len:#x} bytes at {address} of process {pid}")]
    ReadMemory {
        /// The process.
        pid: HostPid,
        /// The start address.
        address: RemoteAddr,
        /// The length in bytes.
        len: u64,
        /// The cause.
        source: io::Error,
    },
    /// Shared memory could not be read.
    #[error("read shared memory {name} at offset {offset:#x}")]
    ReadObject {
        /// The object, as messages call it.
        name: String,
        /// The offset in bytes.
        offset: u64,
        /// The cause.
        source: io::Error,
    },
    /// A pages file could not be written.
    #[error("write {path}", path = .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A page server does not do its part.
    #[error("page server {name}: {step}\nhelp: the log of the page server may tell more")]
    Server {
        /// Its address.
        name: String,
        /// What failed.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The address of a page server is not known.
    #[error("find the page server {name}")]
    NoServer {
        /// The address, as the user gave it.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// The connection to a page server cannot be encrypted.
    #[error("page server {name}: encrypt the connection")]
    Tls {
        /// Its address.
        name: String,
        /// The cause.
        source: TlsError,
    },
    /// The parent chain cannot be used.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// A pagemap could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A test has requested a failure.
    #[error(transparent)]
    Fault(#[from] Injected),
}
