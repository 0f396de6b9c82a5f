//! The tree: looking up, listing and describing nodes.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroUsize,
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use lru::LruCache;

use super::{
    Attr, NodeType, OpenFile, Part, Result, Tables, ViewError,
    address_space::Spaces,
    attr_of,
    held::TMPFS,
    node::{DirEntry, Group, Ino, Node, ROOT, Table, What, enter},
    proc::{self, Proc},
};
use crate::{
    chain::{Chain, SnapshotId},
    image::store::Inode,
    units::BLOCK_BYTES,
};

/// How many snapshots' tables are cached.
const TABLES_KEPT: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");

/// The tree that a mount of a chain shows.
#[derive(Debug)]
pub struct View {
    pub(super) chain: Arc<Chain>,
    pub(super) tip: SnapshotId,
    table: RwLock<Table>,
    tables: Mutex<LruCache<SnapshotId, Arc<Tables>>>,
    pub(super) spaces: Spaces,
    mapped_files: bool,
    /// The parts that are left out.
    pub(super) without: BTreeSet<Part>,
    /// The only user and group that may access the files.
    shown_to: Option<(u32, u32)>,
    /// Whether the files of a tmpfs have the owners that they had.
    owners: bool,
}

impl View {
    /// Shows the snapshot `tip` of a chain at the root, and all others below `snapshots`.
    pub fn new(chain: Arc<Chain>, tip: SnapshotId) -> Self {
        let root = Node {
            ino: ROOT,
            parent: ROOT,
            name: String::new(),
            path: String::new(),
            what: What::Snapshot(tip),
        };
        let mut table = Table::default();
        table.nodes.insert(ROOT, Arc::new(root));
        let tables = Mutex::new(LruCache::new(TABLES_KEPT));
        Self {
            chain,
            tip,
            table: RwLock::new(table),
            tables,
            spaces: Spaces::default(),
            mapped_files: true,
            without: BTreeSet::new(),
            shown_to: None,
            owners: true,
        }
    }

    /// Leaves out of address spaces and core files the contents of files that are not in the images:
    /// only a user who may read these files may see them.
    #[must_use]
    pub fn without_mapped_files(mut self) -> Self {
        self.mapped_files = false;
        self
    }

    /// Leaves parts of the tree out.
    #[must_use]
    pub fn without(mut self, parts: impl IntoIterator<Item = Part>) -> Self {
        self.without.extend(parts);
        self
    }

    /// Gives all files to one user, and access to no other, regardless of the owner of the images.
    #[must_use]
    pub fn shown_to(mut self, uid: u32, gid: u32) -> Self {
        self.shown_to = Some((uid, gid));
        self
    }

    /// Gives the files of each tmpfs to the owner of the images, who can read all of them, as if an
    /// ordinary user had unpacked them.
    #[must_use]
    pub fn without_owners(mut self) -> Self {
        self.owners = false;
        self
    }

    /// Returns the chain.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// Returns the snapshot at the root.
    pub fn tip(&self) -> SnapshotId {
        self.tip
    }

    /// Returns the attributes of the entry `name` of the directory `parent`.
    ///
    /// # Errors
    /// [`ViewError::NoSuchEntry`]; errors of reading the entry.
    pub fn lookup(&self, parent: Ino, name: &str) -> Result<Attr> {
        let dir = self.node(parent)?;
        let entries = self.listing(&dir)?;
        let node = match entries.binary_search_by(|node| node.name.as_str().cmp(name)) {
            Ok(position) => Arc::clone(&entries[position]),
            Err(_) => self.hidden(&dir, name)?.ok_or_else(|| ViewError::NoSuchEntry {
                dir: format!("/{}", dir.path),
                name: name.to_owned(),
            })?,
        };
        self.node_attr(&node)
    }

    /// Like [`Self::lookup`], but in a directory of processes, a thread `reader` that looks up its own
    /// number finds the root process of the tree, if no process has that number. Programs such as
    /// `ps` expect to find themselves.
    ///
    /// # Errors
    /// Like [`Self::lookup`].
    pub fn lookup_for(&self, parent: Ino, name: &str, reader: u32) -> Result<Attr> {
        let missing = match self.lookup(parent, name) {
            Err(error @ ViewError::NoSuchEntry { .. }) => error,
            found => return found,
        };
        let dir = self.node(parent)?;
        let What::Proc(id, proc::Node::Root) = dir.what else { return Err(missing) };
        if name != reader.to_string() {
            return Err(missing);
        }
        let Some(pid) = Proc::new(&self.tables(id), &self.spaces).itself()? else {
            return Err(missing);
        };
        // All readers share one node.
        let what = What::Proc(id, proc::Node::Process(pid));
        self.node_attr(&self.unlisted(&dir, "reader", what))
    }

    /// Returns a node that no listing has.
    fn hidden(&self, dir: &Node, name: &str) -> Result<Option<Arc<Node>>> {
        let What::Proc(id, node) = &dir.what else { return Ok(None) };
        let found = Proc::new(&self.tables(*id), &self.spaces).hidden(node, name)?;
        Ok(found.map(|node| self.unlisted(dir, name, What::Proc(*id, node))))
    }

    fn unlisted(&self, dir: &Node, name: &str, what: What) -> Arc<Node> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let key = (dir.ino, name.to_owned());
        let table = &mut *table;
        let node = table.unlisted.entry(key).or_insert_with(|| {
            // Programs know pipes and sockets by their inode numbers.
            let number = match what {
                What::Proc(_, proc::Node::Pipe(ino) | proc::Node::Socket(ino)) => Some(ino.into()),
                _ => None,
            };
            enter(&mut table.nodes, dir, name.to_owned(), what, number)
        });
        Arc::clone(node)
    }

    /// Returns the attributes of a node.
    ///
    /// # Errors
    /// [`ViewError::NoSuchNode`]; errors of reading the node.
    pub fn attr(&self, ino: Ino) -> Result<Attr> {
        self.node_attr(&*self.node(ino)?)
    }

    /// Returns the path of a node in the view, for messages.
    pub fn path(&self, ino: Ino) -> String {
        self.node(ino).map_or_else(|_| format!("inode {ino}"), |node| format!("/{}", node.path))
    }

    /// Returns the entries of a directory in the order of their names, without `.` and `..`, and the
    /// inode number of its parent.
    ///
    /// # Errors
    /// [`ViewError::NotADirectory`]; errors of reading the directory.
    pub fn entries(&self, ino: Ino) -> Result<(Ino, Vec<DirEntry>)> {
        let dir = self.node(ino)?;
        let entries = self.listing(&dir)?;
        let entry = |node: &Arc<Node>| DirEntry {
            ino: node.ino,
            kind: node.what.kind(),
            name: node.name.clone(),
        };
        Ok((dir.parent, entries.iter().map(entry).collect()))
    }

    /// Returns the image directory that a directory shows completely, if there is one.
    pub fn image_dir(&self, ino: Ino) -> Option<&Path> {
        match self.node(ino).ok()?.what {
            What::Snapshot(id) => self.chain.snapshot(id).directory(),
            _ => None,
        }
    }

    /// Whether a node is a pages file of the snapshot at the root.
    pub fn is_shown_pages(&self, ino: Ino) -> bool {
        let node = self.node(ino);
        node.is_ok_and(|node| node.parent == ROOT && matches!(node.what, What::Pages(..)))
    }

    /// Opens a file.
    ///
    /// # Errors
    /// [`ViewError::IsADirectory`]; errors of reading the file.
    pub fn open(&self, ino: Ino) -> Result<OpenFile> {
        let node = self.node(ino)?;
        self.open_what(&node.what, &node.name)
    }

    fn node(&self, ino: Ino) -> Result<Arc<Node>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.nodes.get(&ino).cloned().ok_or(ViewError::NoSuchNode { ino })
    }

    /// Returns the nodes in a directory, sorted by name.
    fn listing(&self, dir: &Node) -> Result<Arc<[Arc<Node>]>> {
        {
            let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(listing) = table.listings.get(&dir.ino) {
                return Ok(Arc::clone(listing));
            }
        }
        let mut children = match &dir.what {
            What::Snapshot(id) => self.snapshot_children(*id, dir.ino == ROOT)?,
            What::Snapshots => self
                .chain
                .ids()
                .map(|id| (self.chain.snapshot(id).name.clone(), What::Snapshot(id)))
                .collect(),
            What::Group(id, Group::Core) => self.processes_with_memory(*id, What::Core)?,
            What::Group(id, Group::Json) => self.json_children(*id)?,
            What::Group(id, Group::Mem) => self.processes_with_memory(*id, What::Mem)?,
            What::Group(id, Group::Shmem) => self.shmem_children(*id)?,
            What::Mem(id, pid) => self.mapping_children(*id, *pid)?,
            What::Held(id, path, NodeType::Directory) => self.held_children(*id, path)?,
            What::ShmemNames(id) => self.shmem_names(*id)?,
            What::ShmemUsers(id) => self.processes_with_memory(*id, What::ShmemUser)?,
            What::ShmemUser(id, pid) => self.shmem_of(*id, *pid)?,
            What::Proc(id, node) if node.kind() == NodeType::Directory => {
                self.proc_children(*id, node)?
            }
            _ => return Err(ViewError::NotADirectory { path: format!("/{}", dir.path) }),
        };
        children.sort_by(|a, b| a.0.cmp(&b.0));
        children.dedup_by(|a, b| a.0 == b.0);
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let table = &mut *table;
        let listing = table.listings.entry(dir.ino).or_insert_with(|| {
            children
                .into_iter()
                .map(|(name, what)| enter(&mut table.nodes, dir, name, what, None))
                .collect()
        });
        Ok(Arc::clone(listing))
    }

    /// Returns the tables that the processes of a snapshot share.
    pub(super) fn tables(&self, id: SnapshotId) -> Arc<Tables> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let chain = || {
            let tables = Tables::new(Arc::clone(&self.chain), id);
            Arc::new(if self.mapped_files { tables } else { tables.without_mapped_files() })
        };
        Arc::clone(tables.get_or_insert(id, chain))
    }

    fn node_attr(&self, node: &Node) -> Result<Attr> {
        let mut attr = self.images_attr(node)?;
        if let What::Held(id, path, kind) = &node.what {
            let tables = self.tables(*id);
            tables.held()?.inode(&tables, path, |inode| self.describe(inode, *kind, &mut attr))?;
            if path == TMPFS {
                // Its files have the modes that they had, but only the owner of the images may read them.
                attr.mode &= 0o700;
            }
        }
        if let Some((uid, gid)) = self.shown_to {
            (attr.uid, attr.gid) = (uid, gid);
            attr.mode &= 0o700;
        }
        Ok(attr)
    }

    /// Fills in the attributes of a file of a tmpfs.
    fn describe(&self, inode: &Inode, kind: NodeType, attr: &mut Attr) {
        (attr.atime, attr.mtime, attr.ctime) = (inode.accessed, inode.modified, inode.changed);
        attr.device = inode.device;
        if kind != NodeType::Link {
            attr.mode = inode.mode;
        }
        if kind != NodeType::Directory {
            attr.nlink = inode.links;
        }
        if self.owners {
            (attr.uid, attr.gid) = (inode.uid, inode.gid);
        } else {
            attr.mode |= if kind == NodeType::Directory { 0o500 } else { 0o400 };
        }
    }

    /// Returns the extended attributes that a file of a tmpfs had; none of others.
    ///
    /// # Errors
    /// [`ViewError::NoSuchNode`]; errors of reading the tmpfs.
    pub fn xattrs(&self, ino: Ino) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
        let node = self.node(ino)?;
        let What::Held(id, path, _) = &node.what else { return Ok(BTreeMap::new()) };
        let tables = self.tables(*id);
        let found = tables.held()?.inode(&tables, path, |inode| inode.xattrs.clone())?;
        Ok(found.unwrap_or_default())
    }

    /// Returns the attributes of a node according to the files of the images.
    fn images_attr(&self, node: &Node) -> Result<Attr> {
        // The allocated size of a file changes when pages are freed.
        let lasting = !self.chain.has_freed();
        if lasting && node.what.kind() == NodeType::File && !matches!(node.what, What::Image(_)) {
            let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(attr) = table.attrs.get(&node.ino) {
                return Ok(attr.clone());
            }
        }
        let origin = self.origin(&node.what, &node.name);
        let stat = origin
            .stat()
            .map_err(|source| ViewError::Attributes { path: origin.path(), source })?;
        let mut attr = attr_of(node.ino, node.what.kind(), &stat);
        match node.what {
            What::Image(_) => return Ok(attr),
            _ if node.what.kind() == NodeType::Directory => {
                attr.size = 0;
                attr.blocks = 0;
                // One for `.`, one for the entry in the parent, one for `..` of each subdirectory.
                let entries = self.listing(node)?;
                let below = entries.iter().filter(|n| n.what.kind() == NodeType::Directory).count();
                attr.nlink = 2 + u32::try_from(below).unwrap_or(u32::MAX - 2);
                attr.mode |= (attr.mode & 0o444) >> 2;
                return Ok(attr);
            }
            _ => {}
        }
        if node.what.kind() == NodeType::Link {
            attr.size = self.target(&node.what)?.len() as u64;
            (attr.blocks, attr.mode) = (0, 0o777);
            return Ok(attr);
        }
        if node.what.kind().is_special() {
            (attr.size, attr.blocks, attr.mode) = (0, 0, 0o600);
            return Ok(attr);
        }
        if matches!(node.what, What::Proc(_, proc::Node::Memory(_))) {
            // As in procfs: a reader must know which addresses are mapped.
            (attr.size, attr.blocks, attr.mode) = (0, 0, attr.mode & 0o400);
            return Ok(attr);
        }
        let content = self.open_what(&node.what, &node.name)?.content;
        attr.atime = attr.mtime;
        attr.size = content.len();
        attr.blocks = content.allocated().div_ceil(BLOCK_BYTES);
        // Mapped files are read with the rights of the images' owner, not of the reader. Images
        // also tell command lines and names of deleted files.
        let from_images = matches!(
            node.what,
            What::Image(_) | What::Pagemap(..) | What::Pages(..) | What::Shmem(..) | What::Json(..)
        );
        attr.mode &= if from_images { 0o444 } else { 0o400 };
        if lasting {
            let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
            table.attrs.insert(node.ino, attr.clone());
        }
        Ok(attr)
    }

    /// Returns the target of a symbolic link.
    ///
    /// # Errors
    /// [`ViewError::NotALink`]; errors of reading the link.
    pub fn link(&self, ino: Ino) -> Result<Vec<u8>> {
        let node = self.node(ino)?;
        match node.what.kind() {
            NodeType::Link => self.target(&node.what),
            _ => Err(ViewError::NotALink { path: format!("/{}", node.path) }),
        }
    }
}
