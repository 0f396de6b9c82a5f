//! An image directory that is being written.
//!
//! Images are written in a hidden subdirectory and moved up when all of them are on disk,
//! the inventory last. So a directory with an inventory is complete, and a dump that fails
//! or is killed leaves the earlier contents of the directory intact.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, open, openat, renameat},
    libc,
    sys::stat::{Mode, SFlag, fstat, fstatat, mkdirat},
    unistd::{UnlinkatFlags, geteuid, linkat, symlinkat, unlinkat},
};

use super::writer::{Output, StoreWriter};
use crate::{
    image::{ImageError, Kind, MemoryId, Result, desc, regular},
    parallel,
};

/// The hidden subdirectory, where images are until they are complete.
const UNFINISHED: &str = ".unfinished";

/// The hidden subdirectory of a page server. A dump may use the same directory at the same time.
const RECEIVED: &str = ".received";

/// The name of the link to the parent snapshot.
pub const PARENT_LINK: &str = "parent";

/// The name of a link to an image of the parent until it takes the place of the own one. It is no image.
const SHARED: &str = ".shared";

/// How many bytes of two images are compared at once.
const COMPARED_BYTES: usize = 64 << 10;

/// The subdirectory in which a deduplication keeps new images until they replace the old
/// ones.
pub(crate) const DEDUP_STAGE: &str = ".dedup";

/// The number of files that are synced at the same time. Each sync waits for the disk to flush its
/// cache, and one flush serves several files; a dump of 1,000 connections has 1,000 files.
const SYNCS_AT_ONCE: usize = 16;

/// Permissions of image directories, which hold the memory of processes.
pub(crate) const DIRECTORY_MODE: u32 = 0o700;

/// Which images of a snapshot a writer writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of them.
    Whole,
    /// All but pages and pagemaps, which a page server may write to the same directory.
    WithoutPages,
    /// Only pages and pagemaps, without an inventory.
    Pages,
}

impl Part {
    fn stage(self) -> &'static str {
        if self == Self::Pages { RECEIVED } else { UNFINISHED }
    }
}

/// A directory to which a snapshot is being written.
///
/// All operations use descriptors of the two directories: another user who can write to the
/// upper one may replace the hidden one, or an image, by a link.
#[derive(Debug)]
pub struct DirectoryWriter {
    dir: PathBuf,
    unfinished: PathBuf,
    opened_dir: File,
    opened_unfinished: File,
    part: Part,
    committed: bool,
}

impl DirectoryWriter {
    /// Begins a snapshot in `dir`, which must exist. Removes the remains of an unfinished
    /// snapshot; a complete one stays until [`StoreWriter::commit`].
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn begin(dir: &Path) -> Result<Self> {
        Self::begin_part(dir, Part::Whole)
    }

    /// Begins a part of a snapshot, like [`Self::begin`].
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn begin_part(dir: &Path, part: Part) -> Result<Self> {
        let unfinished = dir.join(part.stage());
        match fs::remove_dir_all(&unfinished) {
            Ok(()) => log::warn!("{}: removed the remains of a failed dump", dir.display()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(write_error(&unfinished, source)),
        }
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |errno: Errno| write_error(&path, errno.into())
        };
        let directory = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened_dir = open(dir, directory, Mode::empty()).map_err(failed(dir))?;
        let mode = Mode::from_bits_truncate(DIRECTORY_MODE);
        mkdirat(&opened_dir, part.stage(), mode).map_err(failed(&unfinished))?;
        let flags = directory | OFlag::O_NOFOLLOW;
        let opened_unfinished = openat(&opened_dir, part.stage(), flags, Mode::empty())
            .and_then(|opened| match fstat(&opened)? {
                stat if stat.st_uid == geteuid().as_raw() => Ok(opened),
                // Another program has just made the directory.
                _ => Err(Errno::EPERM),
            })
            .map_err(failed(&unfinished))?;
        Ok(Self {
            dir: dir.to_owned(),
            unfinished,
            opened_dir: opened_dir.into(),
            opened_unfinished: opened_unfinished.into(),
            part,
            committed: false,
        })
    }

    /// Returns the path at which an image of this name is written.
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.unfinished.join(name)
    }

    /// Completes the snapshot with a copy of the inventory of another one, with the same
    /// modification time.
    ///
    /// # Errors
    /// As [`StoreWriter::commit`].
    pub fn commit_as(mut self, inventory: &Path) -> Result<()> {
        let path = self.path_of(&Kind::Inventory.file_name(0));
        let copy = || {
            let (mut source, _) = regular::open(inventory)?;
            let name = Kind::Inventory.file_name(0);
            let mut target = regular::create_at(&self.opened_unfinished, &name)?;
            io::copy(&mut source, &mut target)?;
            target.set_modified(source.metadata()?.modified()?)
        };
        copy().map_err(|source| write_error(&path, source))?;
        self.publish_all()
    }

    fn publish_all(&mut self) -> Result<()> {
        let inventory = OsString::from(Kind::Inventory.file_name(0));
        let has_inventory = self.part != Part::Pages;
        if has_inventory {
            self.sync_file(&inventory)?;
        }
        self.remove_old()?;
        let mut names = names_in(&self.opened_unfinished, &self.unfinished)?;
        // Without an inventory, pagemaps tell what there is.
        names.sort_by_key(|name| name.to_str().and_then(MemoryId::of_pagemap).is_some());
        for name in names.iter().filter(|name| **name != inventory) {
            self.publish(name)?;
        }
        self.sync_dir()?;
        if has_inventory {
            self.publish(&inventory)?;
        }
        self.committed = true;
        unlinkat(&self.opened_dir, self.part.stage(), UnlinkatFlags::RemoveDir)
            .map_err(|errno| write_error(&self.unfinished, errno.into()))?;
        self.sync_dir()?;
        if let Ok(dir) = self.dir.canonicalize()
            && let Some(above) = dir.parent()
        {
            sync(above)?;
        }
        Ok(())
    }

    /// Syncs the names in the hidden directory.
    fn sync_dir(&self) -> Result<()> {
        self.opened_dir.sync_all().map_err(|source| write_error(&self.dir, source))
    }

    /// Syncs a file that is not published yet.
    fn sync_file(&self, name: &OsStr) -> Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        openat(&self.opened_unfinished, name, flags, Mode::empty())
            .map_err(io::Error::from)
            .and_then(|file| File::from(file).sync_all())
            .map_err(|source| write_error(&self.unfinished.join(name), source))
    }

    /// Replaces an image by a hard link to an open file. Whether that was possible.
    fn link_as(&self, file: &File, name: &OsStr) -> io::Result<bool> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = AtFlags::AT_SYMLINK_FOLLOW;
        match linkat(AT_FDCWD, path.as_str(), &self.opened_unfinished, SHARED, flags) {
            Ok(()) => {}
            // On another file system, or one without links, or with too many of them; or deleted meanwhile.
            Err(
                Errno::EXDEV | Errno::EPERM | Errno::EOPNOTSUPP | Errno::EMLINK | Errno::ENOENT,
            ) => {
                return Ok(false);
            }
            Err(errno) => return Err(errno.into()),
        }
        renameat(&self.opened_unfinished, SHARED, &self.opened_unfinished, name)?;
        Ok(true)
    }

    fn publish(&self, name: &OsStr) -> Result<()> {
        renameat(&self.opened_unfinished, name, &self.opened_dir, name)
            .map_err(|errno| write_error(&self.dir.join(name), errno.into()))
    }

    /// Removes the images of an older dump that are of this part; first those that make it a snapshot.
    fn remove_old(&self) -> Result<()> {
        let remove =
            |name: &OsStr| match unlinkat(&self.opened_dir, name, UnlinkatFlags::NoRemoveDir) {
                Err(errno) if errno != Errno::ENOENT => {
                    Err(write_error(&self.dir.join(name), errno.into()))
                }
                _ => Ok(()),
            };
        let inventory = OsString::from(Kind::Inventory.file_name(0));
        let complete = self.part != Part::Pages
            && (self.dir.join(&inventory).exists() || self.dir.join(PARENT_LINK).is_symlink());
        if complete {
            remove(&inventory)?;
            self.sync_dir()?;
        }
        for name in names_in(&self.opened_dir, &self.dir)? {
            let kind = name.to_str().and_then(desc::by_file_name).map(|(desc, _)| desc.kind);
            // These name pages of other files, and would now seem to name ours.
            let misleading = kind == Some(Kind::Punched) || name == PARENT_LINK;
            let is_old = match self.part {
                Part::Whole => misleading || complete && kind.is_some(),
                Part::WithoutPages => {
                    misleading || complete && kind.is_some_and(|kind| !is_of_pages(kind))
                }
                Part::Pages => kind.is_some_and(is_of_pages),
            };
            if is_old {
                remove(&name)?;
            }
        }
        Ok(())
    }
}

impl StoreWriter for DirectoryWriter {
    fn name(&self) -> &Path {
        &self.unfinished
    }

    fn create(&self, file: &str) -> io::Result<Box<dyn Output>> {
        Ok(Box::new(regular::create_at(&self.opened_unfinished, file)?))
    }

    fn link_parent(&self, parent: &Path) -> io::Result<()> {
        Ok(symlinkat(parent, &self.opened_unfinished, PARENT_LINK)?)
    }

    /// By hard links. Images are never changed in place, except those of pages.
    fn share(&self, kind: Kind, parent: &Path) -> io::Result<usize> {
        let is_of_kind = |name: &OsString| {
            let found = name.to_str().and_then(desc::by_file_name);
            found.is_some_and(|(desc, _)| desc.kind == kind)
        };
        let listed = |names: Result<Vec<OsString>>| names.map_err(io::Error::other);
        let opened = File::open(parent)?;
        let mut others = Vec::new();
        for name in listed(names_in(&opened, parent))?.iter().filter(|name| is_of_kind(name)) {
            // What is no file of this user, or a link to one, may change.
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let Ok(file) = openat(&opened, name.as_os_str(), flags, Mode::empty()) else {
                continue;
            };
            let stat = fstat(&file)?;
            let is_file = SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT) == SFlag::S_IFREG;
            if is_file && stat.st_uid == geteuid().as_raw() {
                others.push((File::from(file), stat.st_size));
            }
        }
        let mut shared = 0;
        let own = listed(names_in(&self.opened_unfinished, &self.unfinished))?;
        for name in own.iter().filter(|name| is_of_kind(name)) {
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let file = openat(&self.opened_unfinished, name.as_os_str(), flags, Mode::empty())?;
            let file = File::from(file);
            let bytes = fstat(&file)?.st_size;
            for (other, _) in others.iter().filter(|(_, size)| *size == bytes) {
                if are_same(&file, other)? && self.link_as(other, name)? {
                    shared += 1;
                    break;
                }
            }
        }
        Ok(shared)
    }

    fn sync(&self, begin: &dyn Fn(&File)) -> Result<()> {
        sync_opened(&self.opened_unfinished, &self.unfinished, begin)
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        self.publish_all()
    }
}

impl Drop for DirectoryWriter {
    /// Removes what was written if the snapshot was not committed.
    fn drop(&mut self) {
        if !self.committed
            && let Err(error) = fs::remove_dir_all(&self.unfinished)
        {
            log::warn!("cannot remove {}: {error}", self.unfinished.display());
        }
    }
}

/// Whether a page server writes images of this kind.
fn is_of_pages(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Pagemap | Kind::ShmemPagemap | Kind::Pages | Kind::Punched | Kind::ReceivedId
    )
}

/// Returns the name of an image in a directory that would be taken for one of a new dump whose pages
/// are written elsewhere: an inventory or, if `pages`, one of those that a page server writes.
///
/// # Errors
/// [`ImageError::Open`].
pub fn leftover(dir: &Path, pages: bool) -> Result<Option<OsString>> {
    let mut names = names(dir)?.into_iter();
    Ok(names.find(|name| {
        let kind = name.to_str().and_then(desc::by_file_name).map(|(desc, _)| desc.kind);
        kind.is_some_and(|kind| kind == Kind::Inventory || pages && is_of_pages(kind))
    }))
}

/// Whether two files have the same bytes.
fn are_same(one: &File, other: &File) -> io::Result<bool> {
    let (mut of_one, mut of_other) = (vec![0; COMPARED_BYTES], vec![0; COMPARED_BYTES]);
    let mut offset = 0;
    loop {
        let bytes = one.read_at(&mut of_one, offset)?;
        if bytes == 0 {
            return Ok(other.read_at(&mut of_other, offset)? == 0);
        }
        match other.read_exact_at(&mut of_other[..bytes], offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            read => read?,
        }
        if of_one[..bytes] != of_other[..bytes] {
            return Ok(false);
        }
        offset += bytes as u64;
    }
}

/// Returns the names in a directory, sorted.
pub(crate) fn names(dir: &Path) -> Result<Vec<OsString>> {
    let failed = |source| ImageError::Open { path: dir.to_owned(), source };
    names_in(&File::open(dir).map_err(failed)?, dir)
}

/// Returns the names in an open directory, sorted; errors name `path`.
fn names_in(dir: &File, path: &Path) -> Result<Vec<OsString>> {
    let failed = |errno: Errno| ImageError::Open { path: path.to_owned(), source: errno.into() };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut entries = Dir::openat(dir, ".", flags, Mode::empty()).map_err(failed)?;
    let mut names = Vec::new();
    for entry in entries.iter() {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    names.sort_unstable_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
    Ok(names)
}

/// Syncs a file, or the names in a directory.
pub(crate) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|source| write_error(path, source))
}

/// Syncs all files of a directory and their names; `begin` as for [`StoreWriter::sync`].
pub(crate) fn sync_all(dir: &Path, begin: impl Fn(&File)) -> Result<()> {
    let opened = File::open(dir).map_err(|source| write_error(dir, source))?;
    sync_opened(&opened, dir, begin)
}

/// Like [`sync_all`], for an open directory; errors name `path`.
fn sync_opened(dir: &File, path: &Path, begin: impl Fn(&File)) -> Result<()> {
    let mut files = Vec::new();
    for name in names_in(dir, path)? {
        let failed = |errno: Errno| write_error(&path.join(&name), errno.into());
        let stat = fstatat(dir, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW).map_err(failed)?;
        if SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT) != SFlag::S_IFREG {
            continue;
        }
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = openat(dir, name.as_os_str(), flags, Mode::empty()).map_err(failed)?;
        let file = File::from(file);
        begin(&file);
        files.push((path.join(name), file));
    }
    let next = AtomicUsize::new(0);
    let sync_some = || -> Result<()> {
        while let Some((path, file)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            file.sync_all().map_err(|source| write_error(path, source))?;
        }
        Ok(())
    };
    let threads = files.len().clamp(1, SYNCS_AT_ONCE);
    parallel::on_threads(threads, &sync_some).into_iter().collect::<Result<()>>()?;
    dir.sync_all().map_err(|source| write_error(path, source))
}

pub(crate) fn write_error(path: &Path, source: io::Error) -> ImageError {
    ImageError::Write { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::image::{SnapshotWriter, proto, read_one};

    fn inventory(version: u32) -> proto::InventoryEntry {
        proto::InventoryEntry { img_version: version, ..Default::default() }
    }

    #[test]
    fn a_snapshot_replaces_the_one_before_only_when_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let read = || {
            let path = dir.path().join("inventory.img");
            read_one::<proto::InventoryEntry>(&path, Kind::Inventory).map(|entry| entry.img_version)
        };
        let first = SnapshotWriter::begin(dir.path()).unwrap();
        first.link_parent(Path::new("../0")).unwrap();
        first.write(Kind::Pstree, 0, &[proto::PstreeEntry::default()]).unwrap();
        read().unwrap_err();
        first.sync(|_| {}).unwrap();
        first.commit(&inventory(1)).unwrap();
        assert_eq!(read().unwrap(), 1);
        assert!(dir.path().join("parent").is_symlink());

        drop(SnapshotWriter::begin(dir.path()).unwrap());
        assert_eq!(read().unwrap(), 1);
        assert!(dir.path().join("pstree.img").exists());

        fs::write(dir.path().join("punched-1.img"), "").unwrap();
        let second = SnapshotWriter::begin(dir.path()).unwrap();
        second.commit(&inventory(2)).unwrap();
        assert_eq!(read().unwrap(), 2);
        assert_eq!(names(dir.path()).unwrap(), ["inventory.img"]);

        // A user has removed the inventory, but not the other files.
        fs::remove_file(dir.path().join("inventory.img")).unwrap();
        fs::write(dir.path().join("punched-1.img"), "").unwrap();
        let third = SnapshotWriter::begin(dir.path()).unwrap();
        third.commit(&inventory(3)).unwrap();
        assert_eq!(names(dir.path()).unwrap(), ["inventory.img"]);
    }

    #[test]
    fn images_that_the_parent_has_take_no_room() {
        let dir = tempfile::tempdir().unwrap();
        let dump = |name: &str, parent: Option<&Path>, texts: &[(u64, &str)]| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            let images = SnapshotWriter::begin(&path).unwrap();
            for (number, text) in texts {
                let mut image = images.create(Kind::TmpfsDev, *number).unwrap();
                image.raw(text.as_bytes()).unwrap();
                image.finish().unwrap();
            }
            let shared = parent.map(|parent| images.share(Kind::TmpfsDev, parent).unwrap());
            images.commit(&inventory(1)).unwrap();
            (path, shared)
        };
        let (first, _) = dump("1", None, &[(1, "same"), (2, "old!"), (3, "moved"), (4, "gone")]);
        let wanted = [(1, "same"), (2, "new!"), (5, "moved"), (6, "longer")];
        let (second, shared) = dump("2", Some(&first), &wanted);
        assert_eq!(shared, Some(2));
        let image = |dir: &Path, number: u64| dir.join(Kind::TmpfsDev.file_name(number));
        let inode = |path: PathBuf| fs::metadata(path).unwrap().ino();
        assert_eq!(inode(image(&second, 1)), inode(image(&first, 1)));
        assert_eq!(inode(image(&second, 5)), inode(image(&first, 3)));
        for (number, text) in wanted {
            assert_eq!(fs::read_to_string(image(&second, number)).unwrap(), text);
        }
        assert_eq!(fs::read_to_string(image(&first, 2)).unwrap(), "old!");
        assert!(!names(&second).unwrap().iter().any(|name| name == SHARED));
        // A link to a file that is no image of ours.
        fs::remove_file(image(&first, 1)).unwrap();
        fs::write(dir.path().join("else"), "same").unwrap();
        std::os::unix::fs::symlink("../else", image(&first, 1)).unwrap();
        let (third, _) = dump("3", Some(&first), &[(1, "same")]);
        fs::write(dir.path().join("else"), "else").unwrap();
        let text = fs::read_to_string(image(&third, 1)).unwrap();
        assert_eq!(text, "same");
    }
}
