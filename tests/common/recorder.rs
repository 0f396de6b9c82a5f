//! A file system that writes down what is done to it, and the states in which a power
//! cut could have left it.
//!
//! It needs no device, sees what whole programs do, and goes through the same states
//! each time. The rules are those of fsync(2) and no more: what was done to a file's
//! bytes lasts when that file was synced afterwards, and what was done to a directory's
//! names when that directory was. Of all else any part may be there, see [`choices`].

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ffi::{OsStr, OsString},
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::{FileExt, symlink},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fuser::{
    BackgroundSession, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use tempfile::TempDir;

use super::{Cap, require};

const PAGE: u64 = 4096;

const ROOT: u64 = 1;

/// Nothing is remembered by the kernel.
const TTL: Duration = Duration::ZERO;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Node {
    /// Bytes, and the pages of them that are holes.
    File(Vec<u8>, BTreeSet<u64>),
    Dir(BTreeMap<OsString, u64>),
    Link(PathBuf),
}

/// A name in a directory.
type Name = (u64, OsString);

#[derive(Clone, Debug)]
enum Op {
    Make(u64, Node),
    Write(u64, u64, Vec<u8>),
    Cut(u64, u64),
    Punch(u64, u64, u64),
    Enter(Name, u64),
    Leave(Name),
    Move(Name, Name),
    Sync(u64),
}

impl Op {
    /// The files and directories of which one must be synced for this to last, the one
    /// first that it counts as a change of.
    fn changes(&self) -> Vec<u64> {
        match self {
            Self::Make(..) | Self::Sync(_) => Vec::new(),
            Self::Write(ino, ..) | Self::Cut(ino, _) | Self::Punch(ino, ..) => vec![*ino],
            Self::Enter((dir, _), _) | Self::Leave((dir, _)) => vec![*dir],
            // A rename is there as a whole or not at all.
            Self::Move((from, _), (to, _)) => vec![*to, *from],
        }
    }
}

/// All files by their numbers.
#[derive(Clone, Debug, Default)]
struct Tree(BTreeMap<u64, Node>);

impl Tree {
    fn dir(&mut self, ino: u64) -> Option<&mut BTreeMap<OsString, u64>> {
        match self.0.get_mut(&ino) {
            Some(Node::Dir(names)) => Some(names),
            _ => None,
        }
    }

    /// Does what an operation says, as far as what it is about is there.
    fn apply(&mut self, op: &Op) {
        let pages = |from: u64, to: u64| from.div_ceil(PAGE)..to / PAGE;
        match op {
            Op::Make(ino, node) => drop(self.0.insert(*ino, node.clone())),
            Op::Write(ino, offset, data) => {
                if let Some(Node::File(bytes, holes)) = self.0.get_mut(ino) {
                    let (from, to) = (*offset, offset + data.len() as u64);
                    if bytes.len() as u64 <= to {
                        holes.extend(pages(bytes.len() as u64, from));
                        bytes.resize(bytes.len().max(size(to)), 0);
                    }
                    bytes[size(from)..size(to)].copy_from_slice(data);
                    holes.retain(|page| !(from / PAGE..to.div_ceil(PAGE)).contains(page));
                }
            }
            Op::Cut(ino, len) => {
                if let Some(Node::File(bytes, holes)) = self.0.get_mut(ino) {
                    holes.extend(pages(bytes.len() as u64, *len));
                    holes.retain(|page| page * PAGE < *len);
                    bytes.resize(size(*len), 0);
                }
            }
            Op::Punch(ino, offset, len) => {
                if let Some(Node::File(bytes, holes)) = self.0.get_mut(ino) {
                    let end = (offset + len).min(bytes.len() as u64);
                    if *offset < end {
                        bytes[size(*offset)..size(end)].fill(0);
                        holes.extend(pages(*offset, end));
                    }
                }
            }
            Op::Enter((dir, name), ino) => {
                if let Some(names) = self.dir(*dir) {
                    names.insert(name.clone(), *ino);
                }
            }
            Op::Leave((dir, name)) => {
                if let Some(names) = self.dir(*dir) {
                    names.remove(name);
                }
            }
            Op::Move((from, old), (to, new)) => {
                let moved = self.dir(*from).and_then(|names| names.remove(old));
                if let (Some(ino), Some(names)) = (moved, self.dir(*to)) {
                    names.insert(new.clone(), ino);
                }
            }
            Op::Sync(_) => {}
        }
    }

    /// What is found below a directory.
    fn walk(&self, dir: u64, path: &Path, found: &mut BTreeMap<PathBuf, Node>) {
        let Some(Node::Dir(names)) = self.0.get(&dir) else { return };
        for (name, ino) in names {
            let path = path.join(name);
            match self.0.get(ino) {
                Some(Node::Dir(_)) => {
                    found.insert(path.clone(), Node::Dir(BTreeMap::new()));
                    self.walk(*ino, &path, found);
                }
                Some(node) => drop(found.insert(path, node.clone())),
                None => {}
            }
        }
    }
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).expect("files of tests are small")
}

/// The files that a power cut could have left.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State(BTreeMap<PathBuf, Node>);

impl State {
    /// The bytes of the files and the targets of the links in a directory.
    pub fn files(&self, dir: &Path) -> BTreeMap<&Path, &[u8]> {
        let inside = |path: &PathBuf| path.parent() == Some(dir);
        let files = self.0.iter().filter(|(path, _)| inside(path));
        files
            .filter_map(|(path, node)| match node {
                Node::File(bytes, _) => Some((path.as_path(), bytes.as_slice())),
                Node::Link(target) => Some((path.as_path(), target.as_os_str().as_encoded_bytes())),
                Node::Dir(_) => None,
            })
            .collect()
    }

    /// Writes the files to a directory.
    pub fn write(&self, dir: &Path) {
        for (path, node) in &self.0 {
            let path = dir.join(path);
            match node {
                Node::Dir(_) => fs::create_dir(&path).unwrap(),
                Node::Link(target) => symlink(target, &path).unwrap(),
                Node::File(bytes, holes) => {
                    let file = fs::File::create(&path).unwrap();
                    file.set_len(bytes.len() as u64).unwrap();
                    for (number, page) in (0..).zip(bytes.chunks(size(PAGE))) {
                        if !holes.contains(&number) {
                            file.write_all_at(page, number * PAGE).unwrap();
                        }
                    }
                }
            }
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    tree: Tree,
    /// What the tree was when recording began.
    begin: Tree,
    log: Vec<Op>,
    next: u64,
}

impl Inner {
    fn act(&mut self, op: Op) {
        self.tree.apply(&op);
        self.log.push(op);
    }

    fn make(&mut self, dir: u64, name: &OsStr, node: Node) -> u64 {
        self.next += 1;
        let ino = self.next;
        self.act(Op::Make(ino, node));
        self.act(Op::Enter((dir, name.to_owned()), ino));
        ino
    }

    fn find(&self, dir: u64, name: &OsStr) -> Option<u64> {
        match self.tree.0.get(&dir)? {
            Node::Dir(names) => names.get(name).copied(),
            _ => None,
        }
    }

    fn attr(&self, ino: u64) -> Option<FileAttr> {
        let (kind, size, blocks) = match self.tree.0.get(&ino)? {
            Node::File(bytes, holes) => {
                let pages = (bytes.len() as u64).div_ceil(PAGE) - holes.len() as u64;
                (FileType::RegularFile, bytes.len() as u64, pages * 8)
            }
            Node::Dir(_) => (FileType::Directory, 0, 0),
            Node::Link(target) => (FileType::Symlink, target.as_os_str().len() as u64, 0),
        };
        Some(FileAttr {
            ino: INodeNo(ino),
            size,
            blocks,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        })
    }
}

/// The file system, mounted until it is dropped.
#[derive(Debug)]
pub struct Recorder {
    inner: Arc<Mutex<Inner>>,
    dir: TempDir,
    session: Option<BackgroundSession>,
}

impl Recorder {
    pub fn mount() -> Self {
        Self::mount_with(true)
    }

    /// Mounts one of which parts of files can be freed, or not.
    pub fn mount_with(punching: bool) -> Self {
        require(Cap::Fuse);
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree([(ROOT, Node::Dir(BTreeMap::new()))].into());
        let inner = Inner { tree, next: ROOT, ..Inner::default() };
        let inner = Arc::new(Mutex::new(inner));
        let served = Served(Arc::clone(&inner), punching);
        let session = fuser::spawn_mount(served, dir.path(), &fuser::Config::default()).unwrap();
        Self { inner, dir, session: Some(session) }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Takes all that is there as being on disk.
    pub fn begin(&self) {
        let mut inner = self.inner.lock().unwrap();
        inner.begin = inner.tree.clone();
        inner.log.clear();
    }

    /// The state that there is now.
    pub fn now(&self) -> State {
        let mut found = BTreeMap::new();
        self.inner.lock().unwrap().tree.walk(ROOT, Path::new(""), &mut found);
        State(found)
    }

    /// Every state that a power cut could have left since.
    pub fn states(&self) -> Vec<State> {
        let inner = self.inner.lock().unwrap();
        let mut seen = HashSet::new();
        let mut states = Vec::new();
        for end in 0..=inner.log.len() {
            let log = &inner.log[..end];
            let synced = |at: usize, inos: &[u64]| {
                log[at..].iter().any(|op| matches!(op, Op::Sync(ino) if inos.contains(ino)))
            };
            // What may not last, by what it changes.
            let mut open: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
            for (at, op) in log.iter().enumerate() {
                let changes = op.changes();
                if let Some(first) = changes.first()
                    && !synced(at, &changes)
                {
                    open.entry(*first).or_default().push(at);
                }
            }
            for lost in choices(&open) {
                let mut tree = inner.begin.clone();
                for (at, op) in log.iter().enumerate() {
                    if !lost.contains(&at) {
                        tree.apply(op);
                    }
                }
                let mut found = BTreeMap::new();
                tree.walk(ROOT, Path::new(""), &mut found);
                let mut hasher = DefaultHasher::new();
                found.hash(&mut hasher);
                if seen.insert(hasher.finish()) {
                    states.push(State(found));
                }
            }
        }
        states
    }
}

/// Which changes may be lost: none, all, any one alone, all but one, and for each file
/// and directory the last ones of it, with all changes of the others or none.
fn choices(open: &BTreeMap<u64, Vec<usize>>) -> Vec<HashSet<usize>> {
    let all: HashSet<usize> = open.values().flatten().copied().collect();
    let mut choices = vec![HashSet::new(), all.clone()];
    for changes in open.values() {
        for kept in 0..=changes.len() {
            let lost: HashSet<usize> = changes[kept..].iter().copied().collect();
            let own: HashSet<usize> = changes.iter().copied().collect();
            choices.push(all.difference(&own).chain(&lost).copied().collect());
            choices.push(lost);
        }
        // Nor need they come to the disk in their order.
        for one in changes {
            choices.push(HashSet::from([*one]));
            choices.push(all.iter().copied().filter(|at| at != one).collect());
        }
    }
    choices
}

impl Drop for Recorder {
    fn drop(&mut self) {
        drop(self.session.take());
    }
}

/// The file system as it is served, and whether parts of files can be freed.
struct Served(Arc<Mutex<Inner>>, bool);

impl Served {
    fn entry(inner: &Inner, ino: u64, reply: ReplyEntry) {
        match inner.attr(ino) {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let inner = self.0.lock().unwrap();
        match inner.find(parent.0, name) {
            Some(ino) => Self::entry(&inner, ino, reply),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.lock().unwrap().attr(ino.0) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut inner = self.0.lock().unwrap();
        if let Some(size) = size {
            inner.act(Op::Cut(ino.0, size));
        }
        match inner.attr(ino.0) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.0.lock().unwrap().tree.0.get(&ino.0) {
            Some(Node::Link(target)) => reply.data(target.as_os_str().as_encoded_bytes()),
            _ => reply.error(Errno::EINVAL),
        }
    }

    fn mkdir(&self, _: &Request, dir: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        let mut inner = self.0.lock().unwrap();
        let ino = inner.make(dir.0, name, Node::Dir(BTreeMap::new()));
        Self::entry(&inner, ino, reply);
    }

    fn unlink(&self, _: &Request, dir: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.0.lock().unwrap().act(Op::Leave((dir.0, name.to_owned())));
        reply.ok();
    }

    fn rmdir(&self, _: &Request, dir: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let mut inner = self.0.lock().unwrap();
        let found = inner.find(dir.0, name).and_then(|ino| inner.tree.0.get(&ino).cloned());
        match found {
            Some(Node::Dir(names)) if names.is_empty() => {
                inner.act(Op::Leave((dir.0, name.to_owned())));
                reply.ok();
            }
            _ => reply.error(Errno::ENOTEMPTY),
        }
    }

    fn symlink(&self, _: &Request, dir: INodeNo, name: &OsStr, to: &Path, reply: ReplyEntry) {
        let mut inner = self.0.lock().unwrap();
        let ino = inner.make(dir.0, name, Node::Link(to.to_owned()));
        Self::entry(&inner, ino, reply);
    }

    fn rename(
        &self,
        _: &Request,
        dir: INodeNo,
        name: &OsStr,
        new_dir: INodeNo,
        new_name: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = ((dir.0, name.to_owned()), (new_dir.0, new_name.to_owned()));
        self.0.lock().unwrap().act(Op::Move(from, to));
        reply.ok();
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        len: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.0.lock().unwrap().tree.0.get(&ino.0) {
            Some(Node::File(bytes, _)) => {
                let end = bytes.len().min(size(offset) + len as usize);
                reply.data(bytes.get(size(offset)..end).unwrap_or_default());
            }
            _ => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.0.lock().unwrap().act(Op::Write(ino.0, offset, data.to_owned()));
        reply.written(u32::try_from(data.len()).unwrap());
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.lock().unwrap().act(Op::Sync(ino.0));
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.lock().unwrap().act(Op::Sync(ino.0));
        reply.ok();
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let inner = self.0.lock().unwrap();
        let Some(Node::Dir(names)) = inner.tree.0.get(&ino.0) else {
            return reply.error(Errno::ENOTDIR);
        };
        for (position, (name, ino)) in (1..).zip(names).skip(size(offset)) {
            let kind = inner.attr(*ino).map_or(FileType::RegularFile, |attr| attr.kind);
            if reply.add(INodeNo(*ino), position, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn create(
        &self,
        _: &Request,
        dir: INodeNo,
        name: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let mut inner = self.0.lock().unwrap();
        let ino = inner.make(dir.0, name, Node::File(Vec::new(), BTreeSet::new()));
        let attr = inner.attr(ino).unwrap();
        reply.created(&TTL, &attr, Generation(0), FileHandle(0), FopenFlags::empty());
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        len: u64,
        _: i32,
        reply: ReplyEmpty,
    ) {
        if !self.1 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        self.0.lock().unwrap().act(Op::Punch(ino.0, offset, len));
        reply.ok();
    }

    fn lseek(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let inner = self.0.lock().unwrap();
        let Some(Node::File(bytes, holes)) = inner.tree.0.get(&ino.0) else {
            return reply.error(Errno::EINVAL);
        };
        let (offset, len) = (offset.cast_unsigned(), bytes.len() as u64);
        let pages = offset / PAGE..len.div_ceil(PAGE);
        let mut wanted = pages.filter(|page| holes.contains(page) == (whence == libc::SEEK_HOLE));
        let found = wanted.next().map(|page| (page * PAGE).max(offset));
        match found.or((whence == libc::SEEK_HOLE).then_some(len)) {
            Some(at) if offset < len => reply.offset(at.cast_signed()),
            _ => reply.error(Errno::ENXIO),
        }
    }
}
