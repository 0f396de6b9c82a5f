//! Why a page server has not received all pages.

use std::{ffi::OsString, io, path::PathBuf};

use crate::{
    chain::ChainError,
    fault::Injected,
    image::{ImageError, MemoryId, PagemapEntry},
    pages::{PagesError, tls::TlsError, wire::WireError},
    sys::lock::LockError,
};

/// The result of a step of a page server.
pub type Result<T, E = PageServerError> = std::result::Result<T, E>;

/// Why a page server has not received all pages. It leaves no images.
#[derive(Debug, thiserror::Error)]
pub enum PageServerError {
    /// The directory for the images cannot be used.
    #[error("use the image directory {path}: {problem}", path = .path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The directory already holds a dump.
    #[error(
        "{dir} holds {name}, which belongs to another dump\nhelp: use an empty directory, or remove that \
         dump", dir = .dir.display(), name = .name.display()
    )]
    HasDump {
        /// The directory.
        dir: PathBuf,
        /// An image in it.
        name: OsString,
    },
    /// The address is not known.
    #[error("find the address {address}")]
    Address {
        /// The address, as the user gave it.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("listen on {address}")]
    Listen {
        /// The address.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// A descriptor is not a socket.
    #[error("use descriptor {fd} (--ps-socket)")]
    Socket {
        /// The descriptor.
        fd: i32,
        /// The cause.
        source: io::Error,
    },
    /// No client could be accepted.
    #[error("wait for a client")]
    Accept(#[source] io::Error),
    /// The connection cannot be encrypted.
    #[error("encrypt the connection of the client")]
    Tls(#[from] TlsError),
    /// Bytes of the client could not be received, or an answer not be sent.
    #[error("{step}")]
    Connection {
        /// The step.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The client has gone before it had sent everything.
    #[error("the client has ended the connection before it said that it has sent all pages")]
    Cut,
    /// The client has sent something that is not part of the protocol.
    #[error("message {number} of the client\nhelp: is the client a dump by rcriu or CRIU 4.2?")]
    Message {
        /// Its number, from 0.
        number: u64,
        /// The cause.
        source: WireError,
    },
    /// The client has asked for something else than to take pages.
    #[error("message {number} of the client asks for pages, but this server only takes them")]
    Asked {
        /// Its number, from 0.
        number: u64,
    },
    /// Pages of a memory that was not begun.
    #[error("the client has sent pages of memory {memory:#x} while {open} is open")]
    NotOpen {
        /// The number of the memory in the message.
        memory: u64,
        /// What is open.
        open: String,
    },
    /// Pages that are not behind those that came before.
    #[error(
        "{memory}: the client has sent {pages} pages at {first} after pages up to {end}",
        pages = .entry.pages, first = .entry.first
    )]
    Order {
        /// The memory.
        memory: MemoryId,
        /// The pages.
        entry: PagemapEntry,
        /// The page after those that came before.
        end: crate::units::PageIndex,
    },
    /// Pages that the parent should have.
    #[error(
        "{memory}: {pages} pages at {first} are in the parent according to the client, but the parent of \
         {dir} does not have them all\nhelp: give the directory of the previous dump (--prev-images-dir)",
        pages = .entry.pages, first = .entry.first, dir = .dir.display()
    )]
    NotInParent {
        /// The directory.
        dir: PathBuf,
        /// The memory.
        memory: MemoryId,
        /// The pages.
        entry: PagemapEntry,
    },
    /// The directory is in use.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The parent chain cannot be used.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// An image could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Pages could not be written.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// A test has requested a failure.
    #[error(transparent)]
    Fault(#[from] Injected),
}
