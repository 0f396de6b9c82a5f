//! Images in a directory, beside which other image directories may be.

use std::{
    fs::{self, File},
    io::{self, IoSliceMut},
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    sys::{
        stat::{fstat, stat},
        uio::preadv,
    },
    unistd::{Whence as FileWhence, lseek},
};

use super::{Beside, BrokenLink, ImageStore, Input, Stat, Store, StoredFile, Whence, beside};
use crate::{
    image::{Kind, PARENT_LINK, desc, regular},
    units::BLOCK_BYTES,
};

/// Group or others can create files in a directory: `S_IWOTH`, `S_IWGRP` (`inode(7)`).
const OTHERS_WRITE: u32 = 0o002;
const GROUP_WRITES: u32 = 0o020;

/// What is wrong with a directory that a link called `parent` leads to.
pub(super) const NO_INVENTORY: &str =
    "that directory has no inventory.img, so it is not an image directory";

/// An image directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// Returns the store of the directory at `path`, which need not exist yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Returns the store in a form that several owners can share.
    pub fn shared(self) -> Store {
        Arc::new(self)
    }

    /// Returns the directory to which the parent link leads, also one without an inventory: a page
    /// server has only pages.
    ///
    /// # Errors
    /// [`BrokenLink`] if there is no directory.
    pub fn parent_of_pages(&self) -> Result<Option<Self>, BrokenLink> {
        Ok(linked_dir(&self.path)?.map(|(path, _)| Self { path }))
    }

    /// Determines what the directory holds.
    pub fn probe(&self) -> Probe {
        if has_inventory(&self.path) {
            let link = fs::read_link(self.path.join(PARENT_LINK)).ok();
            Probe::Snapshot { parent: link.and_then(|link| sibling(&self.path, &link)) }
        } else if has_images(&self.path) {
            Probe::Unfinished
        } else {
            Probe::Nothing
        }
    }
}

/// What a directory holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A snapshot.
    Snapshot {
        /// The name of the parent's store, if the link has the usual form `../NAME`. That
        /// directory need not exist, and may itself be a link.
        parent: Option<PathBuf>,
    },
    /// The remains of a dump that failed.
    Unfinished,
    /// No images.
    Nothing,
}

impl ImageStore for Directory {
    fn name(&self) -> &Path {
        &self.path
    }

    fn open(&self, file: &str) -> io::Result<Input> {
        open_file(&self.path.join(file))
    }

    fn open_at_random(&self, file: &str) -> io::Result<Box<dyn StoredFile>> {
        let (file, _) = regular::open(&self.path.join(file))?;
        Ok(Box::new(file))
    }

    fn stat(&self, file: &str) -> io::Result<Stat> {
        Ok(stat(&self.path.join(file))?.into())
    }

    fn stat_store(&self) -> io::Result<Stat> {
        Ok(stat(&self.path)?.into())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    fn allocated(&self) -> io::Result<u64> {
        let mut bytes = 0;
        for entry in fs::read_dir(&self.path)? {
            let meta = entry?.metadata()?;
            bytes += if meta.is_file() { meta.blocks() * BLOCK_BYTES } else { 0 };
        }
        Ok(bytes)
    }

    fn parent(&self) -> Result<Option<Store>, BrokenLink> {
        let parent = parent_dir(&self.path)?;
        Ok(parent.map(|path| Self { path }.shared()))
    }

    /// Considers the owners of the directory and of its inventory, and the users who can
    /// write to the directory.
    fn owner(&self) -> Option<u32> {
        let meta = fs::symlink_metadata(&self.path).ok()?;
        let inventory = self.path.join(Kind::Inventory.file_name(0));
        let inventory = fs::symlink_metadata(inventory).ok()?;
        let owner = sole_writer(meta.mode(), meta.uid(), meta.gid());
        owner.filter(|owner| inventory.uid() == *owner)
    }

    fn beside(&self) -> io::Result<Vec<Beside>> {
        let Some(above) = self.path.parent().filter(|above| above.join(beside::CONFIG).is_file())
        else {
            return Ok(Vec::new());
        };
        let mut names: Vec<String> = beside::FILES.map(str::to_owned).into();
        for folder in beside::FOLDERS {
            let Ok(entries) = fs::read_dir(above.join(folder)) else { continue };
            for entry in entries {
                names.extend(
                    entry?.file_name().into_string().map(|name| format!("{folder}/{name}")),
                );
            }
        }
        names.sort_unstable();
        let mut found = Vec::new();
        for name in names {
            match regular::open(&above.join(&name)) {
                Ok((file, _)) => found.push(Beside { name, file: Box::new(file) }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    let problem = format!("{}: {error}", above.join(name).display());
                    return Err(io::Error::new(error.kind(), problem));
                }
            }
        }
        Ok(found)
    }

    fn directory(&self) -> Option<&Path> {
        Some(&self.path)
    }
}

impl StoredFile for File {
    fn stat(&self) -> io::Result<Stat> {
        Ok(fstat(self)?.into())
    }

    fn read_vectored_at(&self, buffers: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        Ok(preadv(self, buffers, position(offset)?)?)
    }

    /// A file system without hole detection reports none.
    fn seek(&self, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
        let file_whence = match whence {
            Whence::Data => FileWhence::SeekData,
            Whence::Hole => FileWhence::SeekHole,
        };
        match lseek(self, position(offset)?, file_whence) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            // There is no data up to the end; or the file has shrunk, which the next read
            // reports.
            Err(Errno::ENXIO) => Ok((whence == Whence::Hole).then_some(offset)),
            Err(Errno::EINVAL) => Ok((whence == Whence::Data).then_some(offset)),
            Err(errno) => Err(errno.into()),
        }
    }

    fn file(&self) -> Option<&File> {
        Some(self)
    }
}

/// Returns the one user who can write to a file or directory of this mode and these owners;
/// `None` if several can. A group that has the number of the owner is taken for that user
/// alone.
pub(super) fn sole_writer(mode: u32, uid: u32, gid: u32) -> Option<u32> {
    let group = mode & GROUP_WRITES != 0 && gid != uid;
    (mode & OTHERS_WRITE == 0 && !group).then_some(uid)
}

fn position(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Opens a file of the file system for reading from the start.
pub(in crate::image) fn open_file(path: &Path) -> io::Result<Input> {
    let (file, found) = regular::open(path)?;
    let Stat { len, allocated, .. } = found.into();
    Ok(Input { bytes: Box::new(file), len, allocated })
}

/// Whether a directory holds a snapshot.
pub(crate) fn has_inventory(dir: &Path) -> bool {
    dir.join(Kind::Inventory.file_name(0)).is_file()
}

/// Whether a directory holds pagemaps or cores, which a dump writes early.
fn has_images(dir: &Path) -> bool {
    let image = |entry: io::Result<fs::DirEntry>| {
        let name = entry.ok()?.file_name();
        Some(is_early_image(name.to_str()?))
    };
    fs::read_dir(dir).is_ok_and(|mut entries| entries.any(|entry| image(entry) == Some(true)))
}

/// Whether a file of this name is an image that a dump writes early.
pub(super) fn is_early_image(name: &str) -> bool {
    desc::by_file_name(name).is_some_and(|(desc, _)| {
        matches!(desc.kind, Kind::Pagemap | Kind::ShmemPagemap | Kind::Core)
    })
}

/// Returns the subdirectories of a directory, and the directories that its links lead to.
pub(crate) fn directories(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mut dirs = Vec::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            dirs.push(entry.path());
        } else if kind.is_symlink()
            && let Ok(dir) = entry.path().canonicalize()
            && dir.is_dir()
        {
            // Such as `latest`, whose target may be in the list already.
            dirs.push(dir);
        }
    }
    Ok(dirs)
}

fn broken(target: &Path, problem: &str) -> BrokenLink {
    BrokenLink { target: target.to_owned(), problem: problem.to_owned() }
}

/// Returns the image directory that the parent link of `dir` leads to, if there is a link.
fn parent_dir(dir: &Path) -> Result<Option<PathBuf>, BrokenLink> {
    match linked_dir(dir)? {
        None => Ok(None),
        Some((parent, _)) if has_inventory(&parent) => Ok(Some(parent)),
        Some((_, target)) => Err(broken(&target, NO_INVENTORY)),
    }
}

/// Returns the directory that the parent link of `dir` leads to, if there is a link, and the link.
fn linked_dir(dir: &Path) -> Result<Option<(PathBuf, PathBuf)>, BrokenLink> {
    let link = dir.join(PARENT_LINK);
    let target = match fs::read_link(&link) {
        Ok(target) => target,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // Not a link: a directory of that name is accepted, too.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => PathBuf::from(PARENT_LINK),
        Err(error) => return Err(broken(&link, &error.to_string())),
    };
    // Canonicalizing takes a system call for each component of the path, and most links
    // lead to a directory beside this one.
    let is_directory = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let beside = sibling(dir, &target).filter(is_directory);
    match beside.map_or_else(|| link.canonicalize(), Ok) {
        Ok(parent) if parent.is_dir() => Ok(Some((parent, target))),
        Ok(_) => Err(broken(&target, "that is not a directory")),
        Err(error) => Err(broken(&target, &error.to_string())),
    }
}

/// Returns the path that a link of the usual form, `../NAME`, in the directory `dir` leads
/// to.
fn sibling(dir: &Path, link: &Path) -> Option<PathBuf> {
    let mut parts = link.strip_prefix("..").ok()?.components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(name)), None) => Some(dir.parent()?.join(name)),
        _ => None,
    }
}
