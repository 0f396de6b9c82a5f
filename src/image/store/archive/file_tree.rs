//! The contents of a file system that an image holds as a compressed archive.
//!
//! CRIU packs the contents of a tmpfs with GNU tar and gzip. Like an archive of images, this one
//! is unpacked into the cache and read in place.

use std::{io, sync::Arc};

use super::{
    Cache, Opening, Unpacked, cache,
    compressed::Format,
    inode::Inode,
    members::{Member, Members, Node, Rules},
    slice::{Base, Slice},
    unpacked,
};
use crate::image::store::{ImageStore, Stat, StoredFile};

/// The directories and files of a file system.
#[derive(Debug)]
pub struct FileTree {
    archive: Base,
    members: Members,
    /// The metadata of the image.
    stat: Stat,
}

/// An entry of a directory of a [`FileTree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeEntry {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
    /// A FIFO.
    Pipe,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
}

impl FileTree {
    /// Reads the names in the archive that is stored in the image `file`.
    ///
    /// # Errors
    /// What keeps the image from being read or unpacked; [`super::ArchiveError`], as the source of an
    /// [`io::Error`] that is one of [`io::ErrorKind::InvalidData`].
    pub fn open(images: &dyn ImageStore, file: &str, cache: &Cache) -> io::Result<Self> {
        let stored: Base = Arc::from(images.open_at_random(file)?);
        let stat = stored.stat()?;
        let opening = Opening { cache: cache.clone(), ..Opening::default() };
        let key = || cache::key(&stat, None);
        let archive: Base = match unpacked(Arc::clone(&stored), None, key, &opening) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let decoder = Format::of(&*stored)?.decoder(stored);
                Arc::new(Unpacked(cache.unnamed(decoder)?))
            }
            unpacked => unpacked?.0,
        };
        let members = Members::read(&*archive, Rules::FileSystem)?;
        Ok(Self { archive, members, stat })
    }

    /// Returns what the archive says about a file or directory; `None` if it has no member for it,
    /// as for some directories.
    pub fn inode(&self, path: &str) -> Option<&Inode> {
        self.members.inode(path)
    }

    /// Returns the entries of the directory `path`, which has no slash at its ends; the root's is
    /// empty.
    pub fn entries(&self, path: &str) -> impl Iterator<Item = (&str, TreeEntry)> {
        self.members.folder(path).into_iter().flatten().map(|(name, node)| {
            let entry = match node {
                Node::File(_) => TreeEntry::File,
                Node::Folder => TreeEntry::Directory,
                Node::Link(_) => TreeEntry::Link,
                Node::Pipe => TreeEntry::Pipe,
                Node::CharDevice => TreeEntry::CharDevice,
                Node::BlockDevice => TreeEntry::BlockDevice,
            };
            (name.as_str(), entry)
        })
    }

    /// Returns the contents of a regular file; `None` if there is none of that path.
    pub fn file(&self, path: &str) -> Option<Box<dyn StoredFile>> {
        let Node::File(member) = self.node(path)? else { return None };
        Some(Box::new(self.slice(member)))
    }

    /// Returns the target of a symbolic link, which can be anywhere; `None` if there is none of that
    /// path.
    pub fn link(&self, path: &str) -> Option<&str> {
        let Node::Link(target) = self.node(path)? else { return None };
        Some(target)
    }

    fn node(&self, path: &str) -> Option<&Node> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.members.folder(folder)?.get(name)
    }

    fn slice(&self, member: &Member) -> Slice {
        let stat = Stat {
            len: member.body.len(),
            allocated: member.body.allocated(),
            modified: member.modified,
            ..self.stat
        };
        Slice::new(Arc::clone(&self.archive), member.body.clone(), stat)
    }
}
