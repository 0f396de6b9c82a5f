//! What the images of a snapshot are written to.

use std::{
    fmt,
    fs::File,
    io::{self, BufWriter, IoSlice, Write},
    path::{Path, PathBuf},
};

use prost::Message;

use super::snapshot::{DirectoryWriter, write_error};
use crate::image::{ImageWriter, Kind, Result, proto};

/// A store while a snapshot is written to it.
///
/// Files can be written side by side. None of them is part of a snapshot before
/// [`Self::commit`], and one that is dropped before leaves none.
pub trait StoreWriter: fmt::Debug + Send + Sync {
    /// Returns what messages call the store while it is written.
    fn name(&self) -> &Path;

    /// Creates a file that is not there yet.
    ///
    /// # Errors
    /// Why it cannot be created.
    fn create(&self, file: &str) -> io::Result<Box<dyn Output>>;

    /// Makes `parent`, as it was given, the snapshot's parent.
    ///
    /// # Errors
    /// Why it cannot be linked.
    fn link_parent(&self, parent: &Path) -> io::Result<()>;

    /// Makes everything that was written last. `begin` may let the disk begin with a file: it
    /// is called for all files of this machine before the first is waited for, so that the
    /// file system can commit them together.
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write).
    fn sync(&self, begin: &dyn Fn(&File)) -> Result<()>;

    /// Makes the store a snapshot, all at once. Its inventory was created last, and is not
    /// synced.
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write).
    fn commit(self: Box<Self>) -> Result<()>;
}

/// A file of a store that is written.
///
/// Images are written in a row, and pages from several threads, by offset: there are no
/// gaps in the end, but a store that needs bytes in order holds back what comes early.
pub trait Output: Write + fmt::Debug + Send + Sync {
    /// Writes bytes from `offset` on and returns how many, at least one. One call is one
    /// request to where the file is.
    ///
    /// # Errors
    /// Why they cannot be written.
    fn write_vectored_at(&self, buffers: &[IoSlice<'_>], offset: u64) -> io::Result<usize>;

    /// Returns the file of this machine that this is, if it is one.
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

/// Where the messages of an image go.
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

    /// Begins a snapshot in a store that is ready to be written.
    pub fn to(store: Box<dyn StoreWriter>) -> Self {
        Self { store }
    }

    /// Returns what messages call an image while it is written.
    pub fn path(&self, kind: Kind, number: u64) -> PathBuf {
        self.store.name().join(kind.file_name(number))
    }

    /// Creates an image of many messages.
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write); an image that was created
    /// before is one.
    pub fn create(&self, kind: Kind, number: u64) -> Result<ImageWriter<StoredOutput>> {
        let output = self.create_raw(kind, number)?;
        ImageWriter::new(&self.path(kind, number), BufWriter::new(output), kind)
    }

    /// Writes an image of these messages.
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

    /// Makes `parent`, as it was given, the snapshot's parent.
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write).
    pub fn link_parent(&self, parent: &Path) -> Result<()> {
        let link = || self.store.name().join(super::PARENT_LINK);
        self.store.link_parent(parent).map_err(|source| write_error(&link(), source))
    }

    /// Makes everything that was written last; see [`StoreWriter::sync`].
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write).
    pub fn sync(&self, begin: impl Fn(&File)) -> Result<()> {
        self.store.sync(&begin)
    }

    /// Makes the store a snapshot: what was one there before is gone from here on, and the
    /// inventory appears last.
    ///
    /// [`Self::sync`] comes first.
    ///
    /// # Errors
    /// [`ImageError::Write`](crate::image::ImageError::Write).
    pub fn commit(self, inventory: &proto::InventoryEntry) -> Result<()> {
        self.write(Kind::Inventory, 0, std::slice::from_ref(inventory))?;
        self.store.commit()
    }
}
