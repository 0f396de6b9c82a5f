//! An image directory while it is written.
//!
//! Images are made in a hidden directory inside the one that was asked for and
//! moved into it when all of them are on disk, the inventory last. So a
//! directory that holds an inventory is complete, and a dump that fails, or is
//! killed, leaves what was there before.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, DirBuilder, File},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, symlink},
    },
    path::{Path, PathBuf},
};

use prost::Message;

use super::{ImageError, ImageWriter, Kind, Result, desc, proto, regular};

/// Where images are until they are complete.
const UNFINISHED: &str = ".unfinished";

/// The name of the link to the parent directory.
pub const PARENT_LINK: &str = "parent";

/// Where a deduplication has new images until they replace others: in the directory
/// itself.
pub(crate) const DEDUP_STAGE: &str = ".dedup";

/// Permissions of directories with images: memory is secret.
pub(crate) const DIRECTORY_MODE: u32 = 0o700;

/// Writes the images of one snapshot.
#[derive(Debug)]
pub struct SnapshotWriter {
    dir: PathBuf,
    unfinished: PathBuf,
    committed: bool,
}

impl SnapshotWriter {
    /// Begins a snapshot in `dir`, which must exist. What is left of one that was
    /// not finished is removed; a complete one stays until [`Self::commit`].
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn begin(dir: &Path) -> Result<Self> {
        let unfinished = dir.join(UNFINISHED);
        match fs::remove_dir_all(&unfinished) {
            Ok(()) => log::warn!("{}: removed what a failed dump had left", dir.display()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(write_error(&unfinished, source)),
        }
        DirBuilder::new()
            .mode(DIRECTORY_MODE)
            .create(&unfinished)
            .map_err(|source| write_error(&unfinished, source))?;
        Ok(Self { dir: dir.to_owned(), unfinished, committed: false })
    }

    /// Returns the path at which an image is written.
    pub fn path(&self, kind: Kind, number: u64) -> PathBuf {
        self.path_of(&kind.file_name(number))
    }

    /// Returns the path at which an image of this name is written.
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.unfinished.join(name)
    }

    /// Creates an image of many messages.
    ///
    /// # Errors
    /// [`ImageError::Write`]; an image that was created before is one.
    pub fn create(&self, kind: Kind, number: u64) -> Result<ImageWriter> {
        ImageWriter::create(&self.path(kind, number), kind)
    }

    /// Writes an image of these messages.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn write<M: Message>(&self, kind: Kind, number: u64, messages: &[M]) -> Result<()> {
        let mut image = self.create(kind, number)?;
        for message in messages {
            image.message(message)?;
        }
        image.finish().map(drop)
    }

    /// Creates a file without magic, such as one of pages.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn create_raw(&self, kind: Kind, number: u64) -> Result<File> {
        let path = self.path(kind, number);
        regular::create(&path).map_err(|source| write_error(&path, source))
    }

    /// Makes `parent`, as it was given, the snapshot's parent.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn link_parent(&self, parent: &Path) -> Result<()> {
        let path = self.unfinished.join(PARENT_LINK);
        symlink(parent, &path).map_err(|source| write_error(&path, source))
    }

    /// Brings everything that was written to the disk. `begin` may let the disk begin
    /// with a file: it is called for all files before the first is waited for, so that
    /// the file system can commit them together.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn sync(&self, begin: impl Fn(&File)) -> Result<()> {
        sync_all(&self.unfinished, begin)
    }

    /// Makes the directory a snapshot: what was one before is gone from here on,
    /// and the inventory appears last.
    ///
    /// [`Self::sync`] comes first.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn commit(self, inventory: &proto::InventoryEntry) -> Result<()> {
        self.write(Kind::Inventory, 0, std::slice::from_ref(inventory))?;
        self.publish_all()
    }

    /// Makes the directory a snapshot with a copy of another one's inventory, of the
    /// same date.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub fn commit_as(self, inventory: &Path) -> Result<()> {
        let path = self.path(Kind::Inventory, 0);
        let copy = || {
            let (mut source, _) = regular::open(inventory)?;
            let mut target = regular::create(&path)?;
            io::copy(&mut source, &mut target)?;
            target.set_modified(source.metadata()?.modified()?)
        };
        copy().map_err(|source| write_error(&path, source))?;
        self.publish_all()
    }

    fn publish_all(mut self) -> Result<()> {
        sync(&self.path(Kind::Inventory, 0))?;
        self.remove_old()?;
        let inventory = OsString::from(Kind::Inventory.file_name(0));
        for name in names(&self.unfinished)? {
            if name != inventory {
                self.publish(&name)?;
            }
        }
        sync(&self.dir)?;
        self.publish(&inventory)?;
        self.committed = true;
        fs::remove_dir(&self.unfinished).map_err(|source| write_error(&self.unfinished, source))?;
        sync(&self.dir)?;
        if let Ok(dir) = self.dir.canonicalize()
            && let Some(above) = dir.parent()
        {
            sync(above)?;
        }
        Ok(())
    }

    fn publish(&self, name: &OsStr) -> Result<()> {
        let path = self.dir.join(name);
        fs::rename(self.unfinished.join(name), &path).map_err(|source| write_error(&path, source))
    }

    /// Removes the images of an older dump, first what makes them a snapshot.
    fn remove_old(&self) -> Result<()> {
        let remove = |name: &OsStr| {
            let path = self.dir.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(write_error(&path, error))
                }
                _ => Ok(()),
            }
        };
        let inventory = OsString::from(Kind::Inventory.file_name(0));
        let complete =
            self.dir.join(&inventory).exists() || self.dir.join(PARENT_LINK).is_symlink();
        if complete {
            remove(&inventory)?;
            sync(&self.dir)?;
        }
        for name in names(&self.dir)? {
            let kind = name.to_str().and_then(desc::by_file_name).map(|(desc, _)| desc.kind);
            // What names pages of other files must not be taken for ours.
            let misleading = kind == Some(Kind::Punched) || name == PARENT_LINK;
            if misleading || complete && kind.is_some() {
                remove(&name)?;
            }
        }
        Ok(())
    }
}

impl Drop for SnapshotWriter {
    /// Removes what was written of a snapshot that did not become one.
    fn drop(&mut self) {
        if !self.committed
            && let Err(error) = fs::remove_dir_all(&self.unfinished)
        {
            log::warn!("cannot remove {}: {error}", self.unfinished.display());
        }
    }
}

/// Returns the names in a directory, sorted.
pub(crate) fn names(dir: &Path) -> Result<Vec<OsString>> {
    let failed = |source| ImageError::Open { path: dir.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        names.push(entry.map_err(failed)?.file_name());
    }
    names.sort_unstable_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
    Ok(names)
}

/// Brings a file, or the names in a directory, to the disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|source| write_error(path, source))
}

/// Brings all files of a directory, and their names, to the disk; `begin` as for
/// [`SnapshotWriter::sync`].
pub(crate) fn sync_all(dir: &Path, begin: impl Fn(&File)) -> Result<()> {
    let mut files = Vec::new();
    for name in names(dir)? {
        let path = dir.join(name);
        let is_file = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
        if is_file {
            let file = File::open(&path).map_err(|source| write_error(&path, source))?;
            begin(&file);
            files.push((path, file));
        }
    }
    for (path, file) in files {
        file.sync_all().map_err(|source| write_error(&path, source))?;
    }
    sync(dir)
}

pub(crate) fn write_error(path: &Path, source: io::Error) -> ImageError {
    ImageError::Write { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::read_one;

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

        // Somebody has removed the inventory, and not all else.
        fs::remove_file(dir.path().join("inventory.img")).unwrap();
        fs::write(dir.path().join("punched-1.img"), "").unwrap();
        let third = SnapshotWriter::begin(dir.path()).unwrap();
        third.commit(&inventory(3)).unwrap();
        assert_eq!(names(dir.path()).unwrap(), ["inventory.img"]);
    }
}
