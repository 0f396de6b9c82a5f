//! Stores that take the images of a new snapshot.

use std::{
    fmt,
    fs::File,
    io::{self, BufWriter, IoSlice, Write},
    path::{Path, PathBuf},
};

use prost::Message;

use super::snapshot::{DirectoryWriter, Part, write_error};
use crate::image::{ImageWriter, Kind, Result, proto};

/// A store to which a snapshot is being written.
///
/// Files can be written in parallel. [`Self::commit`] makes them a snapshot; a writer that
/// is dropped without it leaves no files.
pub trait StoreWriter: fmt::Debug + Send + Sync {
    /// Returns the name of the store in messages while it is written.
    fn name(&self) -> &Path;

    /// Creates a file, which must not exist.
    ///
    /// # Errors
    /// The cause.
    fn create(&self, file: &str) -> io::Result<Box<dyn Output>>;

    /// Links `parent`, as the user gave it, as the parent of the snapshot.
    ///
    /// # Errors
    /// The cause.
    fn link_parent(&self, parent: &Path) -> io::Result<()>;

    /// Has images of a kind that are the same as images of the same kind in the directory of the parent, byte
    /// for byte, take no room of their own. Returns how many; a store that cannot share keeps its own.
    ///
    /// # Errors
    /// The cause.
    fn share(&self, _kind: Kind, _parent: &Path) -> io::Result<usize> {
        Ok(0)
    }

    /// Makes everything that was written durable. Calls `begin` for all files of the file
    /// system before it waits for the first, so that `begin` can start write-back and the
    /// file system can commit the files together.
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write).
    fn sync(&self, begin: &dyn Fn(&File)) -> Result<()>;

    /// Turns the files into a snapshot, atomically. The inventory was created last, and is
    /// not synced yet.
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write).
    fn commit(self: Box<Self>) -> Result<()>;
}

/// A file that is being written to a store.
///
/// Most images are written in order; pages are written by several threads, by offset. In
/// the end there are no gaps. A store that needs the bytes in order holds back those that
/// come early.
pub trait Output: Write + fmt::Debug + Send + Sync {
    /// Writes bytes from `offset` on and returns how many, at least one. One call is one
    /// request to the store.
    ///
    /// # Errors
    /// The cause.
    fn write_vectored_at(&self, buffers: &[IoSlice<'_>], offset: u64) -> io::Result<usize>;

    /// Returns the underlying file, if there is one.
    fn file(&self) -> Option<&File>;
}

impl Output for File {
    fn write_vectored_at(&self, buffers: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
        Ok(nix::sys::uio::pwritev(self, buffers, offset)?)
    }

    fn file(&self) -> Option<&File> {
        Some(self)
    }
}

/// The output of an image writer.
pub type StoredOutput = BufWriter<Box<dyn Output>>;

/// Writes the images of one snapshot.
#[derive(Debug)]
pub struct SnapshotWriter {
    store: Box<dyn StoreWriter>,
}

impl SnapshotWriter {
    /// Begins a snapshot in the directory `dir`.
    ///
    /// # Errors
    /// As [`DirectoryWriter::begin`].
    pub fn begin(dir: &Path) -> Result<Self> {
        Ok(Self::to(Box::new(DirectoryWriter::begin(dir)?)))
    }

    /// Begins a part of a snapshot in the directory `dir`.
    ///
    /// # Errors
    /// As [`DirectoryWriter::begin`].
    pub fn begin_part(dir: &Path, part: Part) -> Result<Self> {
        Ok(Self::to(Box::new(DirectoryWriter::begin_part(dir, part)?)))
    }

    /// Begins a snapshot in a store.
    pub fn to(store: Box<dyn StoreWriter>) -> Self {
        Self { store }
    }

    /// Returns the path of an image in messages while it is written.
    pub fn path(&self, kind: Kind, number: u64) -> PathBuf {
        self.store.name().join(kind.file_name(number))
    }

    /// Creates an image that will hold many messages.
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write); also if the image was
    /// created before.
    pub fn create(&self, kind: Kind, number: u64) -> Result<ImageWriter<StoredOutput>> {
        let output = self.create_raw(kind, number)?;
        ImageWriter::new(&self.path(kind, number), BufWriter::new(output), kind)
    }

    /// Writes an image with these messages.
    ///
    /// # Errors
    /// As [`Self::create`].
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
    /// As [`Self::create`].
    pub fn create_raw(&self, kind: Kind, number: u64) -> Result<Box<dyn Output>> {
        let created = self.store.create(&kind.file_name(number));
        created.map_err(|source| write_error(&self.path(kind, number), source))
    }

    /// Links `parent`, as the user gave it, as the parent of the snapshot.
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write).
    pub fn link_parent(&self, parent: &Path) -> Result<()> {
        let link = || self.store.name().join(super::PARENT_LINK);
        self.store.link_parent(parent).map_err(|source| write_error(&link(), source))
    }

    /// Has images of a kind that the parent has, too, take no room of their own, see [`StoreWriter::share`].
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write).
    pub fn share(&self, kind: Kind, parent: &Path) -> Result<usize> {
        let shared = self.store.share(kind, parent);
        shared.map_err(|source| write_error(self.store.name(), source))
    }

    /// Makes everything that was written durable, see [`StoreWriter::sync`].
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write).
    pub fn sync(&self, begin: impl Fn(&File)) -> Result<()> {
        self.store.sync(&begin)
    }

    /// Writes the inventory and completes the snapshot; the snapshot that was there before
    /// is gone.
    ///
    /// The caller calls [`Self::sync`] first.
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write).
    pub fn commit(self, inventory: &proto::InventoryEntry) -> Result<()> {
        self.write(Kind::Inventory, 0, std::slice::from_ref(inventory))?;
        self.store.commit()
    }

    /// Completes [`Part::Pages`] of a snapshot.
    ///
    /// The caller calls [`Self::sync`] first.
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write).
    pub fn commit_pages(self) -> Result<()> {
        self.store.commit()
    }
}
