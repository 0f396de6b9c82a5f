//! Why images were not deduplicated.

use std::{io, path::PathBuf};

use crate::{
    chain::ChainError,
    fault::Injected,
    image::{ImageError, MemoryId},
    sys::lock::LockError,
    units::PageIndex,
};

/// The result of a step of a deduplication.
pub type Result<T, E = DedupError> = std::result::Result<T, E>;

/// Why images were not deduplicated. Every snapshot still reads as before.
#[derive(Debug, thiserror::Error)]
pub enum DedupError {
    /// There are not enough directories to link.
    #[error("there is nothing to link\nhelp: name two image directories or more, the oldest first")]
    TooFew,
    /// A directory was named twice.
    #[error("{dir} is named twice", dir = .dir.display())]
    Twice {
        /// The directory.
        dir: PathBuf,
    },
    /// A directory is not a complete dump.
    #[error("{dir} has no inventory.img, so it is not a complete dump", dir = .dir.display())]
    NoSnapshot {
        /// The directory.
        dir: PathBuf,
    },
    /// A file was named in place of a directory.
    #[error(
        "{path} is a file: only images in directories are deduplicated\nhelp: unpack an archive, and \
         name the image directory in it",
        path = .path.display()
    )]
    NotADirectory {
        /// The file.
        path: PathBuf,
    },
    /// The snapshots are not in the order in which they were dumped.
    #[error(
        "{dir} was dumped before {parent}, by its date and its uptime\nhelp: name the oldest first",
        dir = .dir.display(), parent = .parent.display()
    )]
    Order {
        /// The older snapshot.
        dir: PathBuf,
        /// The younger snapshot, which the user named first.
        parent: PathBuf,
    },
    /// The snapshots are unrelated.
    #[error(
        "{dir} and {parent} have no process and no shared object in common: they are dumps of \
         different trees",
        dir = .dir.display(), parent = .parent.display()
    )]
    DifferentTrees {
        /// A snapshot.
        dir: PathBuf,
        /// The snapshot before it.
        parent: PathBuf,
    },
    /// A snapshot already has another parent.
    #[error(
        "the parent of {dir} is already {found}, not {expected}\nhelp: name {found} before {dir}",
        dir = .dir.display(), found = .found.display(), expected = .expected.display()
    )]
    OtherParent {
        /// The snapshot.
        dir: PathBuf,
        /// Its parent.
        found: PathBuf,
        /// The snapshot that the user named before it.
        expected: PathBuf,
    },
    /// The result would not read like the original.
    #[error(
        "{dir}: {memory} at {first} would not read as before ({problem}): nothing was changed",
        dir = .dir.display()
    )]
    Verify {
        /// The snapshot.
        dir: PathBuf,
        /// The memory.
        memory: MemoryId,
        /// The page.
        first: PageIndex,
        /// The difference.
        problem: &'static str,
    },
    /// Files of this file system cannot share blocks.
    #[error(
        "files on the file system of {path} (type {file_system}) cannot share blocks\nhelp: \
         move the images to btrfs, or to xfs with reflink=1, or use --link or -D",
        path = .path.display()
    )]
    NoSharing {
        /// A pages file.
        path: PathBuf,
        /// The type of its file system, as `statfs(2)` tells it.
        file_system: String,
    },
    /// The pages that another snapshot needs cannot be determined.
    #[error(
        "{dir} may need pages that would be freed, and cannot be read\nhelp: repair it, or move it \
         elsewhere",
        dir = .dir.display()
    )]
    Unknown {
        /// The other snapshot's directory.
        dir: PathBuf,
        /// Why it cannot be read.
        source: ChainError,
    },
    /// A snapshot has no ancestors.
    #[error("{dir} has no parent in which anything could be freed", dir = .dir.display())]
    NoParent {
        /// The snapshot.
        dir: PathBuf,
    },
    /// The directory for the new images exists.
    #[error("{path} already exists\nhelp: remove or rename it", path = .path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
    },
    /// No number is free for another pages file.
    #[error("{dir} has no number left for another pages file", dir = .dir.display())]
    Numbers {
        /// The snapshot.
        dir: PathBuf,
    },
    /// A file could not be read, written or removed.
    #[error("{step} {path}", path = .path.display())]
    File {
        /// The attempted step, as a verb.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The chain has a defect.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// An image could not be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A directory is in use by another program.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A test asked for it.
    #[error(transparent)]
    Fault(#[from] Injected),
}
