//! Errors of the view.

use std::path::PathBuf;

use crate::{chain::ChainError, image::ImageError};

/// The result of a request to the view.
pub type Result<T, E = ViewError> = std::result::Result<T, E>;

/// Errors of the view.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The chain cannot provide the contents.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// An image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No node has this inode number.
    #[error("no node has inode number {ino}")]
    NoSuchNode {
        /// The inode number.
        ino: u64,
    },
    /// A directory has no entry with this name.
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
    /// Another node was used as a symbolic link.
    #[error("{path} is not a symbolic link")]
    NotALink {
        /// The node's path in the view.
        path: String,
    },
    /// The attributes of a shown file could not be read.
    #[error("read the attributes of {path}", path = .path.display())]
    Attributes {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file or directory could not be written.
    #[error("write {path}", path = .path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A directory to write to has entries already.
    #[error("{path} is not empty\nhelp: choose another directory, which need not exist", path = .path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// The files in an image of a tmpfs could not be read.
    #[error("read the files in {path}", path = .path.display())]
    Tmpfs {
        /// The image.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The text of an image would be too long to hold in memory.
    #[error("the text of {path} would be longer than {limit} bytes\nhelp: use rcriu show", path = .path.display())]
    TooLong {
        /// The image.
        path: PathBuf,
        /// The longest possible text.
        limit: usize,
    },
    /// The snapshot is a pre-dump, which has memory but no processes.
    #[error("{dir} is a pre-dump: it has memory, but no processes", dir = .dir.display())]
    NoTree {
        /// The image directory.
        dir: PathBuf,
    },
    /// The snapshot does not have this process.
    #[error("{dir} has no process {pid}: expected it in pstree.img", dir = .dir.display())]
    NoSuchProcess {
        /// The image directory.
        dir: PathBuf,
        /// The requested pid.
        pid: u32,
    },
    /// The process had no memory when it was dumped.
    #[error(
        "{dir} has no memory of process {pid}: it was a zombie or had no address space",
        dir = .dir.display()
    )]
    NoAddressSpace {
        /// The image directory.
        dir: PathBuf,
        /// The process.
        pid: u32,
    },
    /// The pages of the images have an unsupported size.
    #[error(
        "{dir}: process {pid} has pages of {size} bytes: only images with pages of 4096 are read",
        dir = .dir.display()
    )]
    PageSize {
        /// The image directory.
        dir: PathBuf,
        /// The process.
        pid: u32,
        /// The page size in bytes.
        size: u64,
    },
    /// A mapping contradicts itself or another one.
    #[error(
        "{dir}: process {pid} has a mapping {start:#x}-{end:#x} that cannot be: {problem}",
        dir = .dir.display()
    )]
    BadVma {
        /// The image directory.
        dir: PathBuf,
        /// The process.
        pid: u32,
        /// The mapping's first address.
        start: u64,
        /// The first address after it.
        end: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A mapping refers to a file that no image describes.
    #[error(
        "{dir}: process {pid} maps file {id} at {start:#x}, which no image describes",
        dir = .dir.display()
    )]
    NoSuchFile {
        /// The image directory.
        dir: PathBuf,
        /// The process.
        pid: u32,
        /// The mapping's first address.
        start: u64,
        /// The number of the file in the images.
        id: u64,
    },
    /// A core file cannot describe this thread.
    #[error("{dir}: thread {tid} has no core file: {problem}", dir = .dir.display())]
    BadThread {
        /// The image directory.
        dir: PathBuf,
        /// The thread.
        tid: u32,
        /// What is missing or wrong.
        problem: String,
    },
    /// The core file would exceed the largest possible file size.
    #[error("{dir}: the core file of process {pid} would not fit into 2^63 bytes", dir = .dir.display())]
    CoreTooLarge {
        /// The image directory.
        dir: PathBuf,
        /// The process.
        pid: u32,
    },
}
