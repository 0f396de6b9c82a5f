//! The nodes of the tree: names, inode numbers, and contents.

use std::{collections::HashMap, sync::Arc};

use xxhash_rust::xxh3::xxh3_64;

use super::{Attr, NodeType, proc};
use crate::{chain::SnapshotId, image::MemoryId};

/// An inode number.
pub type Ino = u64;

/// The inode number of the root (`FUSE_ROOT_ID`, `linux/fuse.h`).
pub const ROOT: Ino = 1;

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The entry's inode number.
    pub ino: Ino,
    /// The type of the entry.
    pub kind: NodeType,
    /// The name of the entry.
    pub name: String,
}

/// The directories that present a snapshot to users and ordinary tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    Core,
    Json,
    Mem,
    Shmem,
}

/// The content of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A whole snapshot; at the root, also the other snapshots of the chain.
    Snapshot(SnapshotId),
    /// One of the groups of a snapshot.
    Group(SnapshotId, Group),
    /// The snapshots of the chain.
    Snapshots,
    /// A stored image, unchanged.
    Image(SnapshotId),
    /// A pagemap without parents.
    Pagemap(SnapshotId, MemoryId),
    /// The pages file for this pagemap.
    Pages(SnapshotId, MemoryId),
    /// The bytes of a shared object.
    Shmem(SnapshotId, u64),
    /// The mappings of a process.
    Mem(SnapshotId, u32),
    /// One mapping, by its addresses.
    Mapping(SnapshotId, u32, u64, u64),
    /// A process as a core file.
    Core(SnapshotId, u32),
    /// A node in `files` with its path there. That of a directory is empty or ends with a slash;
    /// that of a file with several names is the same for all of them.
    Held(SnapshotId, String, NodeType),
    /// The directory of links to shared objects by name.
    ShmemNames(SnapshotId),
    /// The directory of processes that map shared objects.
    ShmemUsers(SnapshotId),
    /// The directory of links to the shared objects that a process maps.
    ShmemUser(SnapshotId, u32),
    /// A link to a shared object, from this many directories below the snapshot's.
    ShmemLink(SnapshotId, u32, u64),
    /// A node below `proc`.
    Proc(SnapshotId, proc::Node),
    /// The file that describes the mount.
    Readme(SnapshotId),
    /// The text of an image.
    Json(SnapshotId, Box<What>, String),
}

impl What {
    pub(super) fn kind(&self) -> NodeType {
        match self {
            Self::Snapshot(_)
            | Self::Group(..)
            | Self::Snapshots
            | Self::Mem(..)
            | Self::ShmemNames(_)
            | Self::ShmemUsers(_)
            | Self::ShmemUser(..) => NodeType::Directory,
            Self::ShmemLink(..) => NodeType::Link,
            Self::Held(.., kind) => *kind,
            Self::Proc(_, node) => node.kind(),
            _ => NodeType::File,
        }
    }
}

/// A file or directory that was listed or looked up.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) ino: Ino,
    pub(super) parent: Ino,
    pub(super) name: String,
    /// The names from the root, separated by slashes; empty for the root.
    pub(super) path: String,
    pub(super) what: What,
}

/// All nodes so far, and the results about them.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) nodes: HashMap<Ino, Arc<Node>>,
    /// The entries of directories that were listed.
    pub(super) listings: HashMap<Ino, Arc<[Arc<Node>]>>,
    /// Nodes that no listing has, by directory and name.
    pub(super) unlisted: HashMap<(Ino, String), Arc<Node>>,
    /// The attributes of files with computed contents.
    pub(super) attrs: HashMap<Ino, Attr>,
}

/// Adds a node. Its inode number is `wanted` or, without one, the hash of its path, which is the same
/// in every mount. If the number is taken, uses the next free one. Names of one file have one number.
pub(super) fn enter(
    nodes: &mut HashMap<Ino, Arc<Node>>,
    dir: &Node,
    name: String,
    what: What,
    wanted: Option<Ino>,
) -> Arc<Node> {
    let path = path_of(dir, &name, &what);
    let mut ino = wanted.unwrap_or_else(|| xxh3_64(path.as_bytes()));
    let is_taken = |ino| nodes.get(&ino).is_some_and(|other| other.path != path);
    while ino <= ROOT || is_taken(ino) {
        ino = ino.wrapping_add(1);
    }
    let node = Arc::new(Node { ino, parent: dir.ino, name, path, what });
    nodes.entry(ino).or_insert_with(|| Arc::clone(&node));
    node
}

/// Returns the path of an entry of a directory from the root; of a file with several names, that of
/// the first.
fn path_of(dir: &Node, name: &str, what: &What) -> String {
    let whole = format!("{}/", dir.path);
    if let (What::Held(_, above, _), What::Held(_, path, kind)) = (&dir.what, what)
        && *kind != NodeType::Directory
        && let Some(files) = whole.strip_suffix(above.as_str())
    {
        return format!("{files}{path}");
    }
    format!("{}{name}", whole.trim_start_matches('/'))
}
