//! Why a part of the view cannot be shown.

use std::path::PathBuf;

use crate::{chain::ChainError, image::ImageError};

/// The result of asking the view.
pub type Result<T, E = ViewError> = std::result::Result<T, E>;

/// Why the view has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The chain has none.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// An image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is no node with this inode number.
    #[error("no node has inode number {ino}")]
    NoSuchNode {
        /// The inode number.
        ino: u64,
    },
    /// A directory has no entry of this name.
    #[error("{dir} has no entry {name:?}")]
    NoSuchEntry {
        /// The directory's path in the view.
        dir: String,
        /// The name.
        name: String,
    },
    /// A file was used as a directory.
    #[error("{path} is not a directory")]
    NotADirectory {
        /// The file's path in the view.
        path: String,
    },
    /// A directory was used as a file.
    #[error("{path} is a directory")]
    IsADirectory {
        /// The directory's path in the view.
        path: String,
    },
    /// The attributes of a file that the view shows could not be read.
    #[error("read the attributes of {path}", path = .path.display())]
    Attributes {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file or directory could not be written.
    #[error("write {path}", path = .path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// An image whose text would be too long to hold in memory.
    #[error("the text of {path} would be longer than {limit} bytes: use rcriu show", path = .path.display())]
    TooLong {
        /// The image.
        path: PathBuf,
        /// The longest text that is made.
        limit: usize,
    },
}
