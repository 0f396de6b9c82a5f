//! Errors of image files.

use std::{io, path::PathBuf};

use crate::units::PageIndex;

/// The result of reading or writing an image.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;

/// Why an image file cannot be read or written, and where in it.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file could not be opened.
    #[error("open image {path}", path = .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file could not be read.
    #[error("read image {path} at offset {offset:#x}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Bytes before the place.
        offset: u64,
        /// The cause.
        source: io::Error,
    },
    /// The file could not be written.
    #[error("write image {path}", path = .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The magic is of no kind, or of another kind than expected.
    #[error("image {path} begins with magic {found:#010x}, expected {expected}", path = .path.display())]
    Magic {
        /// The file.
        path: PathBuf,
        /// The magic in the file.
        found: u32,
        /// The expected one.
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
        /// The offset of the missing bytes.
        offset: u64,
        /// What they should be.
        what: &'static str,
        /// How many bytes were expected there.
        wanted: u64,
        /// How many bytes are there.
        found: u64,
    },
    /// A message is longer than any message of its kind can be.
    #[error("image {path} has a message of {length} bytes at offset {offset:#x}, at most {limit} expected", path = .path.display())]
    Oversized {
        /// The file.
        path: PathBuf,
        /// The offset of the message.
        offset: u64,
        /// The length that the file claims.
        length: u64,
        /// The longest accepted length.
        limit: u64,
    },
    /// A message is not valid protobuf of its type.
    #[error("image {path} has a malformed {message} at offset {offset:#x}: {problem}", path = .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The offset of the message.
        offset: u64,
        /// The message's type.
        message: &'static str,
        /// The defect.
        problem: String,
    },
    /// A file that must hold exactly one message holds none, or more.
    #[error("image {path} holds {found} messages, exactly one expected", path = .path.display())]
    Count {
        /// The file.
        path: PathBuf,
        /// How many messages there are, counted up to 2.
        found: usize,
    },
    /// A pagemap entry contradicts itself or the entry before it.
    #[error("pagemap {path}, entry {entry} at address {first}: {problem}", path = .path.display())]
    Pagemap {
        /// The file.
        path: PathBuf,
        /// The entry's position in the file, from 0.
        entry: u64,
        /// Its first page.
        first: PageIndex,
        /// The defect.
        problem: &'static str,
    },
    /// A journal of freed pages belongs to another dump.
    #[error(
        "{path} names freed pages of another dump than the one beside it\nhelp: if that one \
         was dumped or copied into this directory since then, remove {path}",
        path = .path.display()
    )]
    Foreign {
        /// The journal.
        path: PathBuf,
    },
    /// A journal of freed pages contradicts itself.
    #[error("journal of freed pages {path} at offset {offset:#x}: {problem}", path = .path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// The offset of the defect.
        offset: u64,
        /// The defect.
        problem: &'static str,
    },
    /// The payload of an entry is not the one that its message announces.
    #[error("image {path}, entry {entry}: {problem}", path = .path.display())]
    Payload {
        /// The file.
        path: PathBuf,
        /// The entry's position in the file, from 0.
        entry: usize,
        /// The defect.
        problem: String,
    },
}

impl ImageError {
    /// Whether the file does not exist. For most kinds, that means that there is no state
    /// of that kind.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Open { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}
