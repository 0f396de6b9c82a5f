//! Images in an archive that is read in place.
//!
//! Container engines export a checkpoint as a tar archive. Its headers are read once. After that,
//! each member is a range of the archive's file, and code that maps, copies or reads a file of a
//! directory does the same with that range. No member is unpacked, so that no name in an archive
//! ever becomes a path.

mod cache;
mod compressed;
mod error;
mod file_tree;
mod inode;
mod members;
mod oci;
mod records;
mod seekable;
mod slice;
mod sparse;
#[cfg(test)]
mod tests;
mod write;

use std::{
    fs::File,
    io::{self, IoSliceMut},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

pub use cache::Cache;
use cache::Held;
use compressed::{Counted, Format};
pub use error::ArchiveError;
pub use file_tree::{FileTree, TreeEntry};
pub use inode::Inode;
use members::{Member, Members, Node, Rules};
use oci::Digest;
use seekable::Seekable;
use slice::{Base, Slice};
pub use write::{ArchiveWriter, CopyError};

use super::{
    Beside, BrokenLink, ImageStore, Input, Opening, Stat, Store, StoredFile, beside, directory,
};
use crate::{
    causes::with_sources,
    image::{Kind, PARENT_LINK, regular},
};

/// The snapshots of an archive, and the remains of failed dumps in it.
#[derive(Debug)]
pub struct Archived {
    /// The snapshots.
    pub snapshots: Vec<Store>,
    /// The names, for messages, of directories with images but no inventory.
    pub unfinished: Vec<PathBuf>,
}

/// Opens an archive, and the archives that may hold the parents of its snapshots.
///
/// # Errors
/// [`ArchiveError`], as the source of an [`io::Error`] that is one of
/// [`io::ErrorKind::InvalidData`]; an archive that cannot be opened.
pub(super) fn find(path: &Path, opening: &Opening) -> io::Result<Archived> {
    let mut archives = Archive::open_all(path, opening)?;
    let own = archives.len();
    for previous in &opening.previous {
        let open = || Archive::open_all(&previous.canonicalize()?, opening);
        let named = |error: io::Error| {
            io::Error::new(error.kind(), format!("{}: {error}", previous.display()))
        };
        archives.extend(open().map_err(named)?);
    }
    let archives: Arc<[Arc<Archive>]> = archives.into();
    let mut found = Archived { snapshots: Vec::new(), unfinished: Vec::new() };
    for (position, archive) in archives.iter().enumerate().take(own) {
        let images = |folder: &str| ArchiveImages::new(&archives, position, folder);
        found.snapshots.extend(archive.snapshots().map(|folder| images(folder).shared()));
        found.unfinished.extend(archive.unfinished().map(|folder| images(folder).name));
    }
    Ok(found)
}

/// Whether a directory is an OCI image layout.
pub(super) fn is_layout(dir: &Path) -> bool {
    dir.join(oci::MARK).is_file() && dir.join(oci::INDEX).is_file()
}

/// An open archive.
#[derive(Debug)]
struct Archive {
    path: PathBuf,
    bytes: Base,
    members: Members,
    /// The metadata of the archive's own file.
    stat: Stat,
    owner: Option<u32>,
    /// The digest of an archive that is read in place, which only a check compares.
    unverified: Option<Unverified>,
}

/// A file that is read in place, and the digest that it should have.
#[derive(Debug)]
struct Unverified {
    stored: Base,
    digest: Digest,
    result: OnceLock<Result<(), String>>,
}

impl Archive {
    /// Opens an archive, or the layers of all checkpoints in an OCI image layout: a directory,
    /// or an archive of one.
    fn open_all(path: &Path, opening: &Opening) -> io::Result<Vec<Arc<Self>>> {
        if path.is_dir() {
            let open = |blob: &str| -> io::Result<Base> {
                Ok(Arc::new(regular::open(&path.join(blob))?.0))
            };
            let layers = oci::layers(&open)?.into_iter();
            let archive =
                |layer: oci::Layer| Self::open(&path.join(layer.path), Some(layer.digest), opening);
            return layers.map(|layer| archive(layer).map(Arc::new)).collect();
        }
        let archive = Self::open(path, None, opening)?;
        if archive.file("", oci::MARK).is_none() || archive.file("", oci::INDEX).is_none() {
            return Ok(vec![Arc::new(archive)]);
        }
        let open = |blob: &str| -> io::Result<Base> {
            let (folder, name) = blob.rsplit_once('/').unwrap_or(("", blob));
            let slice = archive.file(folder, name).map(|member| archive.slice(member));
            slice.map(|slice| Arc::new(slice) as Base).ok_or(io::ErrorKind::NotFound.into())
        };
        let layers = oci::layers(&open)?.into_iter();
        layers.map(|layer| archive.layer(layer, opening).map(Arc::new)).collect()
    }

    /// Opens a layer of the image layout that the archive holds.
    fn layer(&self, layer: oci::Layer, opening: &Opening) -> io::Result<Self> {
        let key = || format!("{}-{}", cache::key(&self.stat, None), layer.digest.digits());
        let stored = Arc::clone(&layer.file);
        let (bytes, unverified) = unpacked(stored, Some(&layer.digest), key, opening)?;
        Ok(Self {
            path: self.path.join(&layer.path),
            members: Members::read(&*bytes, Rules::Checkpoint)?,
            bytes,
            stat: self.stat,
            owner: self.owner,
            unverified,
        })
    }

    fn file(&self, folder: &str, name: &str) -> Option<&Member> {
        match self.members.folder(folder)?.get(name)? {
            Node::File(member) => Some(member),
            _ => None,
        }
    }

    fn slice(&self, member: &Member) -> Slice {
        Slice::new(Arc::clone(&self.bytes), member.body.clone(), self.file_stat(member))
    }

    fn open(path: &Path, digest: Option<Digest>, opening: &Opening) -> io::Result<Self> {
        let (file, found) = regular::open(path)?;
        let key = || cache::key(&found.into(), None);
        let (bytes, unverified) = unpacked(Arc::new(file), digest.as_ref(), key, opening)?;
        let members = Members::read(&*bytes, Rules::Checkpoint)?;
        Ok(Self {
            path: path.to_owned(),
            bytes,
            members,
            stat: found.into(),
            owner: directory::sole_writer(found.st_mode, found.st_uid, found.st_gid),
            unverified,
        })
    }

    /// Returns the directories that hold a snapshot. A directory `parent` inside such a directory
    /// is a copy of its parent, and is found only as the parent.
    fn snapshots(&self) -> impl Iterator<Item = &str> {
        let folders = self.members.folders().map(|(path, _)| path);
        folders.filter(|path| {
            let copy = path.strip_suffix(PARENT_LINK).and_then(|above| {
                above.strip_suffix('/').or_else(|| above.is_empty().then_some(above))
            });
            self.has_inventory(path) && !copy.is_some_and(|above| self.has_inventory(above))
        })
    }

    fn unfinished(&self) -> impl Iterator<Item = &str> {
        let has_images =
            |folder: &members::Folder| folder.keys().any(|name| directory::is_early_image(name));
        let folders = self.members.folders();
        let folders = folders.filter(move |(_, folder)| has_images(folder)).map(|(path, _)| path);
        folders.filter(|path| !self.has_inventory(path))
    }

    fn has_inventory(&self, folder: &str) -> bool {
        self.file(folder, &Kind::Inventory.file_name(0)).is_some()
    }

    /// Returns the one snapshot of the archive, if there are not several.
    fn only_snapshot(&self) -> Option<&str> {
        let mut snapshots = self.snapshots();
        snapshots.next().filter(|_| snapshots.next().is_none())
    }

    /// Returns the archive's name without extensions, such as `pre` for `pre.tar.gz`.
    fn stem(&self) -> Option<&str> {
        self.path.file_name()?.to_str()?.split('.').next()
    }

    fn file_stat(&self, member: &Member) -> Stat {
        let len = member.body.len();
        let offset = match &member.body {
            slice::Body::Dense { offset, .. } => *offset,
            slice::Body::Sparse { extents, .. } => extents.first().map_or(0, |first| first.offset),
        };
        let (device, inode) = self.stat.identity;
        Stat {
            is_file: true,
            len,
            allocated: member.body.allocated(),
            // A user may read the images if the user may read the archive.
            mode: self.stat.mode & READ_WRITE,
            accessed: member.modified,
            modified: member.modified,
            changed: member.modified,
            identity: (device.rotate_left(u32::BITS) ^ inode, offset),
            ..self.stat
        }
    }

    fn folder_stat(&self) -> Stat {
        let readable = self.stat.mode & READ;
        Stat { is_file: false, len: 0, allocated: 0, mode: readable | readable >> 2, ..self.stat }
    }
}

/// Returns the tar archive that a file stores: the file itself, its frames, which are decoded when
/// they are read, or the unpacked archive in the cache. Compares the file with its digest before
/// unpacking it; returns the digest with a file that is read in place.
fn unpacked(
    stored: Base,
    digest: Option<&Digest>,
    key: impl FnOnce() -> String,
    opening: &Opening,
) -> io::Result<(Base, Option<Unverified>)> {
    let format = Format::of(&*stored)?;
    let unverified = || {
        let (stored, result) = (Arc::clone(&stored), OnceLock::new());
        digest.map(|digest| Unverified { stored, digest: digest.clone(), result })
    };
    match format {
        Format::Tar => return Ok((Arc::clone(&stored), unverified())),
        Format::Zstd => {
            if let Some(seekable) = Seekable::open(&stored)? {
                return Ok((Arc::new(seekable), unverified()));
            }
        }
        Format::Gzip => {}
    }
    let total = stored.stat()?.len;
    let counted = Counted::new(Arc::clone(&stored));
    let decoder = || {
        if let Some(digest) = digest {
            digest.verify(&*stored, &mut |read| opening.progress.tell(read, total))?;
        }
        Ok(format.decoder(Arc::clone(&counted) as Base))
    };
    let mut progress = || opening.progress.tell(counted.count(), total);
    let held = opening.cache.unpacked(&key(), decoder, &mut progress)?;
    Ok((Arc::new(Unpacked(held)), None))
}

/// An unpacked archive, which stays in the cache while it is read.
#[derive(Debug)]
struct Unpacked(Held);

impl StoredFile for Unpacked {
    fn stat(&self) -> io::Result<Stat> {
        StoredFile::stat(&*self.0)
    }

    fn read_vectored_at(&self, buffers: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        self.0.read_vectored_at(buffers, offset)
    }

    fn file(&self) -> Option<&File> {
        Some(&self.0)
    }
}

/// The mode bits that allow reading, and reading and writing (`inode(7)`).
const READ: u16 = 0o444;
const READ_WRITE: u16 = 0o666;

/// The images in one directory of an archive.
#[derive(Clone, Debug)]
struct ArchiveImages {
    archives: Arc<[Arc<Archive>]>,
    /// Which archive.
    position: usize,
    folder: String,
    name: PathBuf,
}

impl ArchiveImages {
    fn new(archives: &Arc<[Arc<Archive>]>, position: usize, folder: &str) -> Self {
        let mut name = archives[position].path.clone();
        if !folder.is_empty() {
            name.push(folder);
        }
        Self { archives: Arc::clone(archives), position, folder: folder.to_owned(), name }
    }

    fn shared(self) -> Store {
        Arc::new(self)
    }

    fn archive(&self) -> &Archive {
        &self.archives[self.position]
    }

    fn node(&self, file: &str) -> io::Result<&Node> {
        let folder = self.archive().members.folder(&self.folder);
        folder.and_then(|folder| folder.get(file)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn slice(&self, file: &str) -> io::Result<Slice> {
        let archive = self.archive();
        match self.node(file)? {
            Node::File(member) => Ok(archive.slice(member)),
            Node::Folder => Err(regular::not_regular("a directory")),
            Node::Link(_) => Err(regular::not_regular("a symbolic link")),
            Node::Pipe | Node::CharDevice | Node::BlockDevice => {
                Err(regular::not_regular("a FIFO or device"))
            }
        }
    }

    fn elsewhere(&self, position: usize, folder: &str) -> Option<Store> {
        let archive = &self.archives[position];
        let found = archive.has_inventory(folder);
        found.then(|| Self::new(&self.archives, position, folder).shared())
    }

    /// Finds the snapshot to which a link called `parent` leads: in this archive, or in one of the
    /// others, as if all were unpacked side by side.
    fn linked(&self, target: &str) -> Option<Store> {
        let above: Vec<&str> = self.folder.split('/').filter(|part| !part.is_empty()).collect();
        let resolved = members::resolve(&above, target);
        let others = || (1..self.archives.len()).filter(|position| *position != self.position);
        if let Some(folder) = &resolved {
            let here = std::iter::once(self.position);
            let mut found = here.chain(others()).filter_map(|at| self.elsewhere(at, folder));
            if let Some(store) = found.next() {
                return Some(store);
            }
        }
        // An archive of one image directory: made as its name says, or the only one given.
        let last = target.rsplit('/').find(|part| !part.is_empty());
        let mut named = others().filter(|at| self.archives[*at].stem() == last);
        let at = named.next().or_else(|| {
            let mut all = others();
            all.next().filter(|_| all.next().is_none())
        })?;
        self.elsewhere(at, self.archives[at].only_snapshot()?)
    }
}

impl ImageStore for ArchiveImages {
    fn name(&self) -> &Path {
        &self.name
    }

    fn open(&self, file: &str) -> io::Result<Input> {
        Ok(self.slice(file)?.input())
    }

    fn open_at_random(&self, file: &str) -> io::Result<Box<dyn StoredFile>> {
        Ok(Box::new(self.slice(file)?))
    }

    fn stat(&self, file: &str) -> io::Result<Stat> {
        Ok(match self.node(file)? {
            Node::File(member) => self.archive().file_stat(member),
            _ => self.archive().folder_stat(),
        })
    }

    fn stat_store(&self) -> io::Result<Stat> {
        Ok(self.archive().folder_stat())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let folder = self.archive().members.folder(&self.folder);
        Ok(folder.into_iter().flat_map(|folder| folder.keys().cloned()).collect())
    }

    fn allocated(&self) -> io::Result<u64> {
        let folder = self.archive().members.folder(&self.folder);
        let bytes = folder.into_iter().flat_map(|folder| folder.values()).map(|node| match node {
            Node::File(member) => member.body.allocated(),
            _ => 0,
        });
        Ok(bytes.fold(0, u64::saturating_add))
    }

    fn parent(&self) -> Result<Option<Store>, BrokenLink> {
        match self.node(PARENT_LINK) {
            Ok(Node::Link(target)) => self.linked(target).map(Some).ok_or_else(|| BrokenLink {
                target: target.into(),
                problem: "the archive holds no image directory of that name\nhelp: if \
                          another one does, give it with --previous ARCHIVE"
                    .to_owned(),
            }),
            Ok(Node::Folder) => {
                let folder = format!("{}/{PARENT_LINK}", self.folder);
                let folder = folder.trim_start_matches('/');
                self.elsewhere(self.position, folder).map(Some).ok_or_else(|| BrokenLink {
                    target: PARENT_LINK.into(),
                    problem: directory::NO_INVENTORY.to_owned(),
                })
            }
            Ok(_) => Err(BrokenLink {
                target: PARENT_LINK.into(),
                problem: "that is not a directory".to_owned(),
            }),
            Err(_) => Ok(None),
        }
    }

    fn owner(&self) -> Option<u32> {
        self.archive().owner
    }

    fn verify(&self) -> Result<(), String> {
        let Some(Unverified { stored, digest, result }) = &self.archive().unverified else {
            return Ok(());
        };
        let compare =
            || digest.verify(&**stored, &mut |_| ()).map_err(|error| with_sources(&error));
        result.get_or_init(compare).clone()
    }

    fn beside(&self) -> io::Result<Vec<Beside>> {
        let archive = self.archive();
        let above = match self.folder.rsplit_once('/') {
            Some((above, _)) => above,
            None if self.folder.is_empty() => return Ok(Vec::new()),
            None => "",
        };
        let files_in = |folder: &str| -> Vec<(&str, &Member)> {
            let folder = archive.members.folder(folder).into_iter().flatten();
            let file = folder.filter_map(|(name, node)| match node {
                Node::File(member) => Some((name.as_str(), member)),
                _ => None,
            });
            file.collect()
        };
        let mut found = Vec::new();
        let mut add = |name: String, member: &Member| {
            found.push(Beside { name, file: Box::new(archive.slice(member)) });
        };
        let here = files_in(above);
        if !here.iter().any(|(name, _)| *name == beside::CONFIG) {
            return Ok(Vec::new());
        }
        for (name, member) in here {
            if beside::FILES.contains(&name) {
                add(name.to_owned(), member);
            }
        }
        for folder in beside::FOLDERS {
            for (name, member) in files_in(format!("{above}/{folder}").trim_start_matches('/')) {
                add(format!("{folder}/{name}"), member);
            }
        }
        Ok(found)
    }

    fn directory(&self) -> Option<&Path> {
        None
    }
}
