//! The files of each tmpfs that a dump has packed, by the paths that the processes saw.
//!
//! CRIU packs the contents of a tmpfs of a mount namespace into an archive, which is named after the
//! device or, in older images, after the mount. It is unpacked when a directory of it is listed.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry as Slot},
    path::PathBuf,
    sync::Arc,
};

use super::{
    NodeType, Result, Tables, ViewError, WholeFile,
    held::{Entry, printable},
    tables::Lazy,
};
use crate::{
    chain::{BackingFile, Content},
    image::{
        Kind, desc, proto,
        store::{FileTree, Inode, TreeEntry},
    },
};

/// The tmpfs of a snapshot.
#[derive(Debug, Default)]
pub(super) struct Systems(Vec<System>);

#[derive(Debug)]
struct System {
    /// Where it was mounted: without slashes at its ends; empty for a root.
    place: String,
    /// The file name of the image.
    image: String,
    files: Lazy<FileTree>,
}

/// The mounts of all namespaces, each by its number, and by the device that it shows.
#[derive(Debug, Default)]
struct Mounts {
    by_id: HashMap<u64, proto::MntEntry>,
    /// By device: a mount of its root if there is one, otherwise of a directory; the one with the
    /// shortest path.
    by_device: HashMap<u64, proto::MntEntry>,
}

impl Mounts {
    fn add(&mut self, mounts: Vec<proto::MntEntry>) {
        let key = |mount: &proto::MntEntry| (mount.root != b"/", mount.mountpoint.len());
        for mount in mounts {
            self.by_id.entry(mount.mnt_id.into()).or_insert_with(|| mount.clone());
            match self.by_device.entry(mount.root_dev.into()) {
                Slot::Occupied(other) if key(other.get()) <= key(&mount) => {}
                slot => drop(slot.insert_entry(mount)),
            }
        }
    }
}

impl Systems {
    /// Finds the images and where their file systems were mounted.
    pub(super) fn load(tables: &Tables) -> Result<Self> {
        let mut names = tables.chain().list(tables.snapshot())?;
        names.sort_unstable();
        let mut packed = Vec::new();
        let mut mounts = Mounts::default();
        for name in names {
            let Some((desc, number)) = desc::by_file_name(&name) else { continue };
            match desc.kind {
                Kind::TmpfsDev | Kind::TmpfsImg => packed.push((name, desc.kind, number)),
                Kind::Mnts => mounts.add(tables.images().messages(Kind::Mnts, number)?),
                _ => {}
            }
        }
        let mut systems = Vec::new();
        let mut taken: HashMap<String, u32> = HashMap::new();
        for (image, kind, number) in packed {
            let mount = match kind {
                Kind::TmpfsDev => mounts.by_device.get(&number),
                _ => mounts.by_id.get(&number),
            };
            let mount = mount.map(|mount| place(&mount.mountpoint));
            let mut place = mount.unwrap_or_else(|| format!("unmounted-{number}"));
            let copies = taken.entry(place.clone()).or_default();
            *copies += 1;
            if *copies > 1 {
                place = format!("{place}.{copies}");
            }
            systems.push(System { place, image, files: Lazy::default() });
        }
        Ok(Self(systems))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the entries of a directory, whose path is empty or ends with a slash.
    pub(super) fn children(&self, tables: &Tables, path: &str) -> Result<BTreeMap<String, Entry>> {
        let mut children = BTreeMap::new();
        if let Some((system, inside)) = self.at(path) {
            let files = system.files(tables)?;
            let entries = files.entries(inside.trim_end_matches('/'));
            children.extend(entries.map(|(name, entry)| {
                let kind = match entry {
                    TreeEntry::Directory => NodeType::Directory,
                    TreeEntry::File => NodeType::File,
                    TreeEntry::Link => NodeType::Link,
                    TreeEntry::Pipe => NodeType::Pipe,
                    TreeEntry::CharDevice => NodeType::CharDevice,
                    TreeEntry::BlockDevice => NodeType::BlockDevice,
                };
                let first = self.first_name(system, &files, &format!("{inside}{name}"));
                (name.to_owned(), Entry { kind, first })
            }));
        }
        // A mount hides the files below its mount point.
        let below = self.0.iter().filter_map(|system| system.place.strip_prefix(path));
        let next = below.filter_map(|rest| rest.split('/').next());
        children.extend(
            next.filter(|name| !name.is_empty())
                .map(|name| (name.to_owned(), Entry::of(NodeType::Directory))),
        );
        Ok(children)
    }

    /// Opens a regular file.
    pub(super) fn open(&self, tables: &Tables, path: &str) -> Result<Arc<dyn Content>> {
        let missing = || ViewError::NoSuchEntry { dir: "tmpfs".to_owned(), name: path.to_owned() };
        let (system, inside) = self.at(path).ok_or_else(missing)?;
        let file = system.files(tables)?.file(inside).ok_or_else(missing)?;
        let file = BackingFile::new(file, system.path(tables).join(inside));
        Ok(Arc::new(WholeFile::new(Arc::new(file))?))
    }

    /// Returns the target of a symbolic link.
    pub(super) fn target(&self, tables: &Tables, path: &str) -> Result<String> {
        let missing = || ViewError::NoSuchEntry { dir: "tmpfs".to_owned(), name: path.to_owned() };
        let (system, inside) = self.at(path).ok_or_else(missing)?;
        let files = system.files(tables)?;
        files.link(inside).map(str::to_owned).ok_or_else(missing)
    }

    /// Calls `look` with what the archive says about a file or directory; `None` if it says nothing,
    /// as of the directories above a mount point.
    pub(super) fn inode<T>(
        &self,
        tables: &Tables,
        path: &str,
        look: impl FnOnce(&Inode) -> T,
    ) -> Result<Option<T>> {
        let Some((system, inside)) = self.at(path) else { return Ok(None) };
        let files = system.files(tables)?;
        Ok(files.inode(inside.trim_end_matches('/')).map(look))
    }

    /// Returns the first name of a file that has several, unless a mount hides that name.
    fn first_name(&self, system: &System, files: &FileTree, inside: &str) -> Option<String> {
        let first = &files.inode(inside).filter(|inode| inode.name != inside)?.name;
        let path = format!("{}/{first}", system.place);
        let path = path.trim_start_matches('/');
        let (shown, _) = self.at(path)?;
        std::ptr::eq(shown, system).then(|| path.to_owned())
    }

    /// Returns the file system that a path lies in, and the path there.
    fn at<'a>(&self, path: &'a str) -> Option<(&System, &'a str)> {
        let inside = |place: &str| match path.strip_prefix(place) {
            Some(rest) if place.is_empty() => Some(rest),
            Some(rest) => rest.strip_prefix('/'),
            None => None,
        };
        let found = self.0.iter().filter_map(|system| Some((system, inside(&system.place)?)));
        found.max_by_key(|(system, _)| system.place.len())
    }
}

impl System {
    fn path(&self, tables: &Tables) -> PathBuf {
        tables.images().path_of(&self.image)
    }

    fn files(&self, tables: &Tables) -> Result<Arc<FileTree>> {
        self.files.get(|| {
            let path = self.path(tables);
            let files = FileTree::open(&**tables.images(), &self.image, tables.chain().cache());
            files.map_err(|source| ViewError::Tmpfs { path, source })
        })
    }
}

fn place(mountpoint: &[u8]) -> String {
    let parts = mountpoint.split(|byte| *byte == b'/');
    let is_root = parts.clone().all(|part| matches!(part, b"" | b"."));
    if is_root { String::new() } else { printable(mountpoint)[1..].to_owned() }
}
