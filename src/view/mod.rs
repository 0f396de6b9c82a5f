//! The tree that a mount shows, without FUSE.
//!
//! The root is a complete image directory of one snapshot, without a parent. Everything is read on
//! demand: listing a directory reads names and the heads of pagemaps; looking up a file builds the
//! index that it needs.

mod address_space;
mod core;
mod error;
mod extract;
mod files;
mod flat;
mod flatten;
mod held;
mod json;
mod listing;
mod mapped;
mod node;
mod notes;
mod open;
mod proc;
mod process;
mod readme;
mod rows;
mod seek;
mod shared;
mod tables;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod thread;
mod tmpfs;
mod tree;
mod whole_file;

use std::{sync::Arc, time::SystemTime};

pub use self::core::CoreFile;
pub use address_space::AddressSpace;
pub use error::{Result, ViewError};
pub use extract::{Incomplete, extract};
pub use flatten::{flatten, flatten_to_archive};
pub use node::{DirEntry, Ino, ROOT};
pub use proc::{DescriptorRow, MappingRow, ProcessRow};
pub use process::Process;
pub use seek::seek;
pub use tables::Tables;
pub use tree::View;
pub use whole_file::WholeFile;

pub use crate::chain::Whence;
use crate::{
    chain::{BackingFile, Content, FlatPages},
    image::store::Stat,
    units::BLOCK_BYTES,
};

/// A part of the tree that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// `core`.
    Core,
    /// `files`.
    Files,
    /// `json`.
    Json,
    /// `mem`.
    Mem,
    /// `proc`.
    Proc,
    /// `shmem`, `shmem-by-name` and `shmem-by-process`.
    Shmem,
    /// `snapshots`.
    Snapshots,
}

impl Part {
    /// All parts.
    pub const ALL: [Self; 7] =
        [Self::Core, Self::Files, Self::Json, Self::Mem, Self::Proc, Self::Shmem, Self::Snapshots];

    /// Returns the name of its directory; of several, that of the main one.
    pub fn name(self) -> &'static str {
        match self {
            Self::Core => "core",
            Self::Files => "files",
            Self::Json => "json",
            Self::Mem => "mem",
            Self::Proc => "proc",
            Self::Shmem => "shmem",
            Self::Snapshots => "snapshots",
        }
    }
}

/// The type of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeType {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
    /// A pipe, the target of a descriptor, or a FIFO in a tmpfs.
    Pipe,
    /// A socket, the target of a descriptor.
    Socket,
    /// A character device, in a tmpfs.
    CharDevice,
    /// A block device, in a tmpfs.
    BlockDevice,
}

impl NodeType {
    /// Whether it is none of the types that have contents or entries, or lead elsewhere.
    pub fn is_special(self) -> bool {
        !matches!(self, Self::Directory | Self::File | Self::Link)
    }
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
    /// The allocated size, in units of [`BLOCK_BYTES`].
    pub blocks: u64,
    /// Permission bits, without the file type.
    pub mode: u16,
    /// The number of names.
    pub nlink: u32,
    /// The owner.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// The number of a device; 0 for others.
    pub device: u32,
    /// When it was last read.
    pub atime: SystemTime,
    /// When its content last changed.
    pub mtime: SystemTime,
    /// When its attributes last changed.
    pub ctime: SystemTime,
}

/// An open file.
#[derive(Clone, Debug)]
pub struct OpenFile {
    /// The contents.
    pub content: Arc<dyn Content>,
    /// The stored file that has exactly these contents, if there is one.
    pub whole: Option<Arc<BackingFile>>,
    /// The contents as a pages file without parents, if they are one.
    pub pages: Option<Arc<FlatPages>>,
}

/// Returns the start of a name, at most `limit` bytes.
fn shortened(name: &str, limit: usize) -> &str {
    let end = (0..=limit.min(name.len())).rev().find(|end| name.is_char_boundary(*end));
    &name[..end.unwrap_or(0)]
}

/// Returns the attributes of a stored file, with another inode number.
fn attr_of(ino: Ino, kind: NodeType, stat: &Stat) -> Attr {
    Attr {
        ino,
        kind,
        size: stat.len,
        blocks: stat.allocated / BLOCK_BYTES,
        mode: stat.mode,
        nlink: 1,
        uid: stat.uid,
        gid: stat.gid,
        device: 0,
        atime: stat.accessed,
        mtime: stat.modified,
        ctime: stat.changed,
    }
}
