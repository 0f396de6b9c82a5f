//! Directories, names and inode numbers.

use std::{
    collections::HashMap,
    io,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use lru::LruCache;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    AddressSpace, Attr, CoreFile, NodeType, OpenFile, Process, Result, Tables, ViewError,
    WholeFile, attr_of, flat, json,
};
use crate::{
    chain::{Chain, ChainError, Content, FlatPages, SnapshotId},
    image::{ImageStore, Kind, MemoryId, desc, store::Stat},
    units::BLOCK_BYTES,
};

/// An inode number.
pub type Ino = u64;

/// The inode number of the root (`FUSE_ROOT_ID`, `linux/fuse.h`).
pub const ROOT: Ino = 1;

/// The name of the directory that holds the trees of all snapshots.
const SNAPSHOTS: &str = "snapshots";

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The entry's inode number.
    pub ino: Ino,
    /// What it is.
    pub kind: NodeType,
    /// What it is called.
    pub name: String,
}

/// The directories that show a snapshot to people and ordinary tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Group {
    Core,
    Json,
    Mem,
    Shmem,
}

const GROUPS: [(&str, Group); 4] =
    [("core", Group::Core), ("json", Group::Json), ("mem", Group::Mem), ("shmem", Group::Shmem)];

/// How many snapshots' tables are cached.
const TABLES_KEPT: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");

/// What a node shows.
#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    /// All of a snapshot; in the root, besides the snapshots of the chain.
    Snapshot(SnapshotId),
    /// One of a snapshot's groups.
    Group(SnapshotId, Group),
    /// The snapshots of the chain.
    Snapshots,
    /// A file of the image directory as it is.
    Image(SnapshotId),
    /// A pagemap without parents.
    Pagemap(SnapshotId, MemoryId),
    /// The pages file that belongs to it.
    Pages(SnapshotId, MemoryId),
    /// The bytes of a shared object.
    Shmem(SnapshotId, u64),
    /// The address space of a process.
    Mem(SnapshotId, u32),
    /// A process as a core file.
    Core(SnapshotId, u32),
    /// An image of the snapshot's directory as text.
    Json(SnapshotId, Box<What>, String),
}

impl What {
    fn kind(&self) -> NodeType {
        match self {
            Self::Snapshot(_) | Self::Group(..) | Self::Snapshots => NodeType::Directory,
            _ => NodeType::File,
        }
    }
}

#[derive(Debug)]
struct Node {
    ino: Ino,
    parent: Ino,
    name: String,
    /// Slash-separated names from the root, which has none.
    path: String,
    what: What,
}

#[derive(Debug, Default)]
struct Table {
    nodes: HashMap<Ino, Arc<Node>>,
    /// The entries of the directories that have been looked into.
    listings: HashMap<Ino, Arc<[Arc<Node>]>>,
    /// The attributes of files that are put together.
    attrs: HashMap<Ino, Attr>,
}

/// The tree that a mount of a chain shows.
#[derive(Debug)]
pub struct View {
    chain: Arc<Chain>,
    tip: SnapshotId,
    table: RwLock<Table>,
    tables: Mutex<LruCache<SnapshotId, Arc<Tables>>>,
    mapped_files: bool,
    /// The user and the group that everything is shown to alone.
    shown_to: Option<(u32, u32)>,
}

impl View {
    /// Presents the snapshot `tip` of a chain, and beneath it all others.
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
        Self { chain, tip, table: RwLock::new(table), tables, mapped_files: true, shown_to: None }
    }

    /// Leaves out of address spaces and core files what is in files that the images only
    /// name: only a user who may read them can open them.
    #[must_use]
    pub fn without_mapped_files(mut self) -> Self {
        self.mapped_files = false;
        self
    }

    /// Shows everything to one user alone, whatever the owner of the images.
    #[must_use]
    pub fn shown_to(mut self, uid: u32, gid: u32) -> Self {
        self.shown_to = Some((uid, gid));
        self
    }

    /// Returns the chain that is shown.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// Returns the snapshot that the root shows.
    pub fn tip(&self) -> SnapshotId {
        self.tip
    }

    /// Returns the attributes of the entry `name` of the directory `parent`.
    ///
    /// # Errors
    /// [`ViewError::NoSuchEntry`], and what keeps the entry from being shown.
    pub fn lookup(&self, parent: Ino, name: &str) -> Result<Attr> {
        let dir = self.node(parent)?;
        let entries = self.listing(&dir)?;
        let found = entries.binary_search_by(|node| node.name.as_str().cmp(name));
        let position = found.map_err(|_| ViewError::NoSuchEntry {
            dir: format!("/{}", dir.path),
            name: name.to_owned(),
        })?;
        self.node_attr(&entries[position])
    }

    /// Returns the attributes of a node.
    ///
    /// # Errors
    /// [`ViewError::NoSuchNode`], and what keeps the node from being shown.
    pub fn attr(&self, ino: Ino) -> Result<Attr> {
        self.node_attr(&*self.node(ino)?)
    }

    /// Returns a node's path in the view, for messages.
    pub fn path(&self, ino: Ino) -> String {
        self.node(ino).map_or_else(|_| format!("inode {ino}"), |node| format!("/{}", node.path))
    }

    /// Returns the entries of a directory, without `.` and `..`, in the order
    /// of their names, and the inode number of the directory above.
    ///
    /// # Errors
    /// [`ViewError::NotADirectory`], and what keeps it from being read.
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

    /// Returns the image directory that a directory shows, if it shows one whole.
    pub fn image_dir(&self, ino: Ino) -> Option<&Path> {
        match self.node(ino).ok()?.what {
            What::Snapshot(id) => self.chain.snapshot(id).directory(),
            _ => None,
        }
    }

    /// Whether a node is a pages file of the snapshot that is shown, in the root.
    pub fn is_shown_pages(&self, ino: Ino) -> bool {
        let node = self.node(ino);
        node.is_ok_and(|node| node.parent == ROOT && matches!(node.what, What::Pages(..)))
    }

    /// Makes a file ready to be read.
    ///
    /// # Errors
    /// [`ViewError::IsADirectory`], and what keeps it from being read.
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
            What::Group(id, Group::Core) => self.processes(*id, What::Core)?,
            What::Group(id, Group::Json) => self.json_children(*id)?,
            What::Group(id, Group::Mem) => self.processes(*id, What::Mem)?,
            What::Group(id, Group::Shmem) => self.shmem_children(*id)?,
            _ => return Err(ViewError::NotADirectory { path: format!("/{}", dir.path) }),
        };
        children.sort_by(|a, b| a.0.cmp(&b.0));
        children.dedup_by(|a, b| a.0 == b.0);
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let table = &mut *table;
        let listing = table.listings.entry(dir.ino).or_insert_with(|| {
            children
                .into_iter()
                .map(|(name, what)| enter(&mut table.nodes, dir, name, what))
                .collect()
        });
        Ok(Arc::clone(listing))
    }

    /// Returns what a snapshot's directory holds.
    fn snapshot_children(&self, id: SnapshotId, root: bool) -> Result<Vec<(String, What)>> {
        let images = self.chain.images(id);
        let mut children: Vec<(String, What)> = GROUPS
            .iter()
            .map(|(name, group)| ((*name).to_owned(), What::Group(id, *group)))
            .collect();
        if root {
            children.push((SNAPSHOTS.to_owned(), What::Snapshots));
        }
        // What belongs to a memory takes precedence over a file of that name.
        for memory in self.chain.memories(id)? {
            children.push((memory.pagemap_name(), What::Pagemap(id, memory)));
            // A pagemap without a readable head says so when it is read.
            if let Ok(reader) = images.pagemap(memory) {
                let pages = Kind::Pages.file_name(reader.pages_id().into());
                children.push((pages, What::Pages(id, memory)));
            }
        }
        for name in self.chain.list(id)? {
            // It is about the pages file on disk, which has others than the one here.
            let kind = desc::by_file_name(&name).map(|(desc, _)| desc.kind);
            let journal = kind == Some(Kind::Punched);
            // A file that has an image's name and is no image is an error to its reader. If
            // it were left out, a copy would look complete.
            let is_file = || images.stat(&name).is_ok_and(|stat| stat.is_file);
            if (kind.is_some() || is_file()) && !journal {
                children.push((name, What::Image(id)));
            }
        }
        Ok(children)
    }

    fn shmem_children(&self, id: SnapshotId) -> Result<Vec<(String, What)>> {
        let objects = self.tables(id).shared()?;
        Ok(objects.keys().map(|shmid| (shmid.to_string(), What::Shmem(id, *shmid))).collect())
    }

    /// Returns an entry for each process of a snapshot that had memory.
    fn processes(
        &self,
        id: SnapshotId,
        what: impl Fn(SnapshotId, u32) -> What,
    ) -> Result<Vec<(String, What)>> {
        let images = self.chain.images(id);
        // A pre-dump has no tree of processes, and nothing but pages.
        if !images.has(Kind::Pstree, 0) {
            return Ok(Vec::new());
        }
        let tree = self.tables(id).tree()?;
        let pids = tree.iter().map(|process| process.pid);
        let alive = pids.filter(|pid| images.has(Kind::Mm, (*pid).into()));
        Ok(alive.map(|pid| (pid.to_string(), what(id, pid))).collect())
    }

    /// Returns what the processes of a snapshot have in common.
    fn tables(&self, id: SnapshotId) -> Arc<Tables> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let chain = || {
            let tables = Tables::new(Arc::clone(&self.chain), id);
            Arc::new(if self.mapped_files { tables } else { tables.without_mapped_files() })
        };
        Arc::clone(tables.get_or_insert(id, chain))
    }

    fn json_children(&self, id: SnapshotId) -> Result<Vec<(String, What)>> {
        let images = self.snapshot_children(id, false)?.into_iter();
        let text = |(image, what): (String, What)| {
            let name = json::name(&image)?;
            (what.kind() == NodeType::File).then(|| (name, What::Json(id, Box::new(what), image)))
        };
        Ok(images.filter_map(text).collect())
    }

    fn node_attr(&self, node: &Node) -> Result<Attr> {
        let mut attr = self.owners_attr(node)?;
        if let Some((uid, gid)) = self.shown_to {
            (attr.uid, attr.gid) = (uid, gid);
            attr.mode &= 0o700;
        }
        Ok(attr)
    }

    /// Returns the attributes that the images give a node.
    fn owners_attr(&self, node: &Node) -> Result<Attr> {
        // The space that a file takes changes when pages are freed.
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
            What::Snapshot(_) | What::Group(..) | What::Snapshots => {
                attr.size = 0;
                attr.blocks = 0;
                // `.`, the name in the directory above, and one for each below.
                let entries = self.listing(node)?;
                let below = entries.iter().filter(|n| n.what.kind() == NodeType::Directory).count();
                attr.nlink = 2 + u32::try_from(below).unwrap_or(u32::MAX - 2);
                attr.mode |= (attr.mode & 0o444) >> 2;
                return Ok(attr);
            }
            _ => {}
        }
        let content = self.open_what(&node.what, &node.name)?.content;
        attr.atime = attr.mtime;
        attr.size = content.len();
        attr.blocks = content.allocated().div_ceil(BLOCK_BYTES);
        // Mapped files are read with the rights of the images' owner, not of the reader.
        attr.mode &=
            if matches!(node.what, What::Mem(..) | What::Core(..)) { 0o400 } else { 0o444 };
        if lasting {
            let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
            table.attrs.insert(node.ino, attr.clone());
        }
        Ok(attr)
    }

    /// Returns what gives a node its owner, mode and times.
    fn origin(&self, what: &What, name: &str) -> Origin<'_> {
        let whole = |id: SnapshotId| Origin { images: &**self.chain.images(id), file: None };
        let file = |id: SnapshotId, name: String| Origin { file: Some(name), ..whole(id) };
        match what {
            What::Snapshot(id) | What::Group(id, _) => whole(*id),
            What::Snapshots => whole(self.tip),
            What::Image(id) => file(*id, name.to_owned()),
            What::Json(_, image, name) => self.origin(image, name),
            What::Pagemap(id, memory) | What::Pages(id, memory) => file(*id, memory.pagemap_name()),
            What::Shmem(id, shmid) => {
                let pagemap = MemoryId::Shared(*shmid).pagemap_name();
                if self.chain.images(*id).stat(&pagemap).is_ok() {
                    file(*id, pagemap)
                } else {
                    file(*id, Kind::Inventory.file_name(0))
                }
            }
            What::Mem(id, pid) | What::Core(id, pid) => {
                file(*id, Kind::Mm.file_name((*pid).into()))
            }
        }
    }

    /// Opens what a file called `name` shows.
    fn open_what(&self, what: &What, name: &str) -> Result<OpenFile> {
        let chain = &self.chain;
        match what {
            What::Snapshot(_) | What::Group(..) | What::Snapshots => {
                Err(ViewError::IsADirectory { path: name.to_owned() })
            }
            What::Image(id) => {
                let file = chain.files().get(chain.files().enter(chain.images(*id), name))?;
                let content = Arc::new(WholeFile::new(Arc::clone(&file))?);
                Ok(OpenFile { content, whole: Some(file), pages: None })
            }
            What::Pagemap(id, memory) => {
                let index = chain.index(*id, *memory)?;
                let content = flat::pagemap(&self.origin(what, name).path(), &index)?;
                Ok(OpenFile { content: Arc::new(content), whole: None, pages: None })
            }
            What::Pages(id, memory) => {
                self.check_claims(*id, *memory)?;
                let pages = FlatPages::new(Arc::clone(chain), chain.index(*id, *memory)?);
                let whole = match pages.whole_file() {
                    Some(layer) => Some(chain.files().get(layer.file)?),
                    None => None,
                };
                let whole =
                    whole.filter(|file| file.stat().is_ok_and(|stat| stat.len == pages.len()));
                let pages = Arc::new(pages);
                let content = Arc::clone(&pages) as Arc<dyn Content>;
                Ok(OpenFile { content, whole, pages: Some(pages) })
            }
            What::Shmem(id, shmid) => {
                let content = flat::shmem(&self.tables(*id), *shmid)?;
                Ok(OpenFile { content, whole: None, pages: None })
            }
            What::Mem(id, pid) => {
                let content = Arc::new(self.address_space(*id, *pid)?);
                Ok(OpenFile { content, whole: None, pages: None })
            }
            What::Core(id, pid) => {
                let space = Arc::new(self.address_space(*id, *pid)?);
                Ok(OpenFile { content: Arc::new(CoreFile::open(space)?), whole: None, pages: None })
            }
            What::Json(_, image, name) => {
                let open = self.open_what(image, name)?;
                let content = json::render(&self.origin(image, name).path(), &*open.content)?;
                Ok(OpenFile { content: Arc::new(content), whole: None, pages: None })
            }
        }
    }

    fn address_space(&self, id: SnapshotId, pid: u32) -> Result<AddressSpace> {
        Ok(AddressSpace::new(Arc::new(Process::load(&self.tables(id), pid)?)))
    }

    /// Checks that no other memory of the snapshot has the same pages file.
    fn check_claims(&self, id: SnapshotId, memory: MemoryId) -> Result<()> {
        let images = self.chain.images(id);
        let pages_id = |memory: MemoryId| images.pagemap(memory).map(|pagemap| pagemap.pages_id());
        let claimed = pages_id(memory)?;
        for other in self.chain.memories(id)? {
            if other != memory && pages_id(other).is_ok_and(|id| id == claimed) {
                return Err(ViewError::Chain(ChainError::SharedPages {
                    dir: images.name().to_owned(),
                    pages_id: claimed,
                    first: memory,
                    second: other,
                }));
            }
        }
        Ok(())
    }
}

/// A store, or a file in it.
struct Origin<'a> {
    images: &'a dyn ImageStore,
    file: Option<String>,
}

impl Origin<'_> {
    fn path(&self) -> PathBuf {
        match &self.file {
            Some(file) => self.images.path_of(file),
            None => self.images.name().to_owned(),
        }
    }

    fn stat(&self) -> io::Result<Stat> {
        match &self.file {
            Some(file) => self.images.stat(file),
            None => self.images.stat_store(),
        }
    }
}

/// Makes a node and gives it a number: the hash of its path, so that it is the
/// same in every mount, or the next free one should two paths have the same.
fn enter(nodes: &mut HashMap<Ino, Arc<Node>>, dir: &Node, name: String, what: What) -> Arc<Node> {
    let path = if dir.path.is_empty() { name.clone() } else { format!("{}/{name}", dir.path) };
    let mut ino = xxh3_64(path.as_bytes());
    while ino <= ROOT || nodes.contains_key(&ino) {
        ino = ino.wrapping_add(1);
    }
    let node = Arc::new(Node { ino, parent: dir.ino, name, path, what });
    nodes.insert(ino, Arc::clone(&node));
    node
}
