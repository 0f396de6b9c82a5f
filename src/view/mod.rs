//! The tree that a mount shows, without FUSE.
//!
//! The root is a complete image directory of one snapshot that has no parent. Everything is
//! read on demand: listing a directory reads names and pagemap heads, and an index is built
//! when a file that needs it is looked up.

mod address_space;
mod core;
mod error;
mod flat;
mod flatten;
mod json;
mod mapped;
mod notes;
mod process;

mod seek;
mod shared;
mod tables;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod thread;
mod tree;
mod whole_file;

use std::{
    fs::Metadata,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

pub use self::core::CoreFile;
pub use address_space::AddressSpace;
pub use error::{Result, ViewError};
pub use flatten::flatten;
pub use process::Process;
pub use seek::seek;
pub use tables::Tables;
pub use tree::{DirEntry, Ino, ROOT, View};
pub use whole_file::WholeFile;

pub use crate::chain::Whence;
use crate::chain::{BackingFile, Content, FlatPages};

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeType {
    /// A directory.
    Directory,
    /// A regular file.
    File,
}

/// A node's attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attr {
    /// The inode number, the same in every mount of the chain.
    pub ino: Ino,
    /// What the node is.
    pub kind: NodeType,
    /// Length in bytes.
    pub size: u64,
    /// Space taken, in units of [`BLOCK_BYTES`](crate::units::BLOCK_BYTES).
    pub blocks: u64,
    /// Permission bits, without the file type.
    pub mode: u16,
    /// Number of names.
    pub nlink: u32,
    /// The owner.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// When it was last read.
    pub atime: SystemTime,
    /// When its content last changed.
    pub mtime: SystemTime,
    /// When its attributes last changed.
    pub ctime: SystemTime,
}

/// A file that is ready to be read.
#[derive(Clone, Debug)]
pub struct OpenFile {
    /// The file's bytes.
    pub content: Arc<dyn Content>,
    /// The one file on disk that the content is, from its first byte to its
    /// last, if it is.
    pub whole: Option<Arc<BackingFile>>,
    /// The content, if it is a pages file without parents.
    pub pages: Option<Arc<FlatPages>>,
}

/// Converts a time of `stat(2)`.
fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let nanoseconds = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0));
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let second =
        if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    second.and_then(|second| second.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}

/// Returns the attributes of a file on disk, under another inode number.
fn attr_of(ino: Ino, kind: NodeType, meta: &Metadata) -> Attr {
    use std::os::unix::fs::MetadataExt;
    Attr {
        ino,
        kind,
        size: meta.len(),
        blocks: meta.blocks(),
        // Bits 0 to 11; the file type is above them.
        mode: u16::try_from(meta.mode() & 0o7777).expect("twelve bits"),
        nlink: 1,
        uid: meta.uid(),
        gid: meta.gid(),
        atime: time(meta.atime(), meta.atime_nsec()),
        mtime: time(meta.mtime(), meta.mtime_nsec()),
        ctime: time(meta.ctime(), meta.ctime_nsec()),
    }
}
