//! What can be wrong with an image file.

use std::{io, path::PathBuf};

use crate::units::PageIndex;

/// The result of reading or writing an image.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;

/// What went wrong with one image file, and where in it.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file could not be opened.
    #[error("open image {path}", path = .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file could not be read.
    #[error("read image {path} at offset {offset:#x}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Bytes before the place.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The file could not be written.
    #[error("write image {path}", path = .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file begins with a magic that no kind has, or not with its kind's.
    #[error("image {path} begins with magic {found:#010x}, expected {expected}", path = .path.display())]
    Magic {
        /// The file.
        path: PathBuf,
        /// The magic in the file.
        found: u32,
        /// What should have been there.
        expected: String,
    },
    /// The file ends too early.
    #[error(
        "image {path} is cut short: {wanted} bytes of {what} expected at offset {offset:#x}, found {found}",
        path = .path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes before the place.
        offset: u64,
        /// What should have been there.
        what: &'static str,
        /// How many bytes of it.
        wanted: u64,
        /// How many there were.
        found: u64,
    },
    /// A message that is larger than any of its kind can be.
    #[error("image {path} has a message of {length} bytes at offset {offset:#x}, at most {limit} expected", path = .path.display())]
    Oversized {
        /// The file.
        path: PathBuf,
        /// Bytes before the message.
        offset: u64,
        /// The length that the file gives.
        length: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// A message that is not valid protobuf of its type.
    #[error("image {path} has a malformed {message} at offset {offset:#x}: {problem}", path = .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Bytes before the message.
        offset: u64,
        /// The message's type.
        message: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A file that must hold one message holds another number of them.
    #[error("image {path} holds {found} messages, exactly one expected", path = .path.display())]
    Count {
        /// The file.
        path: PathBuf,
        /// How many there were, counting at most to 2.
        found: usize,
    },
    /// A pagemap entry that contradicts itself or its predecessor.
    #[error("pagemap {path}, entry {entry} at address {first}: {problem}", path = .path.display())]
    Pagemap {
        /// The file.
        path: PathBuf,
        /// The entry's position in the file, from 0.
        entry: u64,
        /// Its first page.
        first: PageIndex,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A journal of freed pages that belongs to another dump.
    #[error(
        "{path} names pages that were freed of another dump than the one beside it\nhelp: if that one \
         was dumped or copied into this directory since then, remove {path}",
        path = .path.display()
    )]
    Foreign {
        /// The journal.
        path: PathBuf,
    },
    /// A journal of freed pages that contradicts itself.
    #[error("journal of freed pages {path} at offset {offset:#x}: {problem}", path = .path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// Bytes before the place.
        offset: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An entry whose payload is not the one that its message announces.
    #[error("image {path}, entry {entry}: {problem}", path = .path.display())]
    Payload {
        /// The file.
        path: PathBuf,
        /// The entry's position in the file, from 0.
        entry: usize,
        /// What is wrong with it.
        problem: String,
    },
}

impl ImageError {
    /// Whether the file is not there, which for most images means that there is
    /// nothing of their kind.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Open { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}
