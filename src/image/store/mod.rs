//! Stores of images.
//!
//! Readers ask an [`ImageStore`] for images by kind and number, never for a path or a descriptor.
//! A store is a [`Directory`], or an archive that is read in place. Others will follow: an object
//! store that serves ranges of bytes, a stream that is written once and in order. Code that needs
//! a real directory or file asks for it ([`ImageStore::directory`], [`StoredFile::file`]); without
//! one, it falls back or reports an error.

mod archive;
mod beside;
mod directory;
#[cfg(test)]
pub(crate) mod memory;
mod reading;
pub(crate) mod snapshot;
mod stat;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    fmt,
    fs::File,
    io::{self, IoSliceMut, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

pub use archive::{
    ArchiveError, ArchiveWriter, Archived, Cache, CopyError, FileTree, Inode, TreeEntry,
};
pub use beside::Beside;
pub use directory::{Directory, Probe};
pub(crate) use directory::{directories, has_inventory};
pub use snapshot::{DirectoryWriter, PARENT_LINK, Part, leftover};
pub use stat::Stat;
pub use writer::{Output, SnapshotWriter, StoreWriter, StoredOutput};

pub(super) use directory::open_file;

/// A store with several owners.
pub type Store = Arc<dyn ImageStore>;

/// The images at a path.
#[derive(Debug)]
pub enum Found {
    /// A snapshot.
    Snapshot(Store),
    /// Directories, each of which may be a snapshot.
    Several(Vec<Directory>),
    /// Snapshots in an archive.
    Archived(Archived),
}

/// Options for finding images, also in archives.
#[derive(Debug, Default)]
pub struct Opening {
    /// Archives that hold the parents of snapshots in an archive.
    pub previous: Vec<PathBuf>,
    /// The cache for compressed archives.
    pub cache: Cache,
    /// The receiver of progress reports.
    pub progress: Progress,
}

/// Receives the progress of long work: the bytes done, and all bytes.
#[derive(Default)]
pub struct Progress(pub Option<Box<dyn Fn(u64, u64)>>);

impl Progress {
    fn tell(&self, done: u64, total: u64) {
        if let Some(tell) = &self.0 {
            tell(done, total);
        }
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Progress").finish_non_exhaustive()
    }
}

/// The problem of an archive where only a directory is accepted.
pub const NO_DIRECTORY: &str =
    "it is not a directory\nhelp: an archive has to be mounted: imgfs mount ARCHIVE DIR";

/// Finds the images in the directory `path`: one snapshot, or several side by side.
///
/// # Errors
/// An unreadable directory; [`io::ErrorKind::NotADirectory`].
pub fn find(path: &Path) -> io::Result<Found> {
    let root = path.canonicalize()?;
    if !root.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, NO_DIRECTORY));
    }
    find_in_directory(root)
}

/// Finds the images at `path`: a directory as for [`find`], or an archive.
///
/// # Errors
/// What keeps the place from being read; [`ArchiveError`], as the source of an error.
pub fn find_anywhere(path: &Path, opening: &Opening) -> io::Result<Found> {
    let root = path.canonicalize()?;
    if !root.is_dir() || archive::is_layout(&root) {
        return archive::find(&root, opening).map(Found::Archived);
    }
    if !opening.previous.is_empty() {
        let problem = "only an archive takes snapshots from other archives (--previous)";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    find_in_directory(root)
}

fn find_in_directory(root: PathBuf) -> io::Result<Found> {
    if has_inventory(&root) {
        return Ok(Found::Snapshot(Directory::at(root).shared()));
    }
    Ok(Found::Several(directories(&root)?.into_iter().map(Directory::at).collect()))
}

/// The files of one snapshot, by their names.
///
/// Every method returns [`io::ErrorKind::NotFound`] for a file that does not exist. Names
/// come from the table of kinds or from [`Self::list`], and contain no slash.
pub trait ImageStore: fmt::Debug + Send + Sync {
    /// Returns the name of the store in messages, which no other store has; for a
    /// directory, its path.
    fn name(&self) -> &Path;

    /// Opens a file for reading from the start.
    ///
    /// # Errors
    /// The cause; [`io::ErrorKind::InvalidInput`] for a file that is not regular.
    fn open(&self, file: &str) -> io::Result<Input>;

    /// Opens a file for reading at any offset.
    ///
    /// # Errors
    /// As [`Self::open`].
    fn open_at_random(&self, file: &str) -> io::Result<Box<dyn StoredFile>>;

    /// Returns the attributes of a file, also of one that cannot be opened.
    ///
    /// # Errors
    /// The cause.
    fn stat(&self, file: &str) -> io::Result<Stat>;

    /// Returns the attributes of the store itself.
    ///
    /// # Errors
    /// The cause.
    fn stat_store(&self) -> io::Result<Stat>;

    /// Returns the names of all files, in no particular order, without those that are not
    /// UTF-8: no image has such a name.
    ///
    /// # Errors
    /// The cause.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Returns the number of bytes that all files together occupy in the store.
    ///
    /// # Errors
    /// The cause.
    fn allocated(&self) -> io::Result<u64>;

    /// Opens the store of the parent, if there is one.
    ///
    /// # Errors
    /// [`BrokenLink`] if the parent does not exist, or is not a snapshot.
    fn parent(&self) -> Result<Option<Store>, BrokenLink>;

    /// Returns the only user who can have written the images; `None` if several users can.
    fn owner(&self) -> Option<u32>;

    /// Compares the bytes of the whole store with a digest, if one is known.
    ///
    /// # Errors
    /// What is wrong with them.
    fn verify(&self) -> Result<(), String> {
        Ok(())
    }

    /// Returns the files that a container engine exported beside the images, in order.
    ///
    /// # Errors
    /// Why they cannot be opened.
    fn beside(&self) -> io::Result<Vec<Beside>> {
        Ok(Vec::new())
    }

    /// Returns the directory of the store, in which files can be changed, locked and
    /// punched; `None` for other stores.
    fn directory(&self) -> Option<&Path>;
}

/// A file that is read from the start.
#[derive(Debug)]
pub struct Input {
    /// Its bytes.
    pub bytes: Box<dyn Stream>,
    /// Its length.
    pub len: u64,
    /// The approximate number of stored bytes; the others are holes.
    pub allocated: u64,
}

/// A sequence of bytes.
pub trait Stream: Read + fmt::Debug + Send {}

impl<T: Read + fmt::Debug + Send> Stream for T {}

/// A file that several threads can read at any offset.
pub trait StoredFile: fmt::Debug + Send + Sync {
    /// Returns the current attributes of the file.
    ///
    /// # Errors
    /// The cause.
    fn stat(&self) -> io::Result<Stat>;

    /// Reads bytes from `offset` into `buffers`, in order, and returns their number: 0 only at the
    /// end of the file. One call is one request to the store.
    ///
    /// # Errors
    /// The cause.
    fn read_vectored_at(&self, buffers: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize>;

    /// Returns the first offset at or after `offset` where `whence` applies; `None` if
    /// there is none up to the end of the file. A store without holes may report data
    /// everywhere.
    ///
    /// # Errors
    /// The cause.
    fn seek(&self, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
        let len = self.stat()?.len;
        Ok(match whence {
            Whence::Data => (offset < len).then_some(offset),
            Whence::Hole => Some(offset.max(len)),
        })
    }

    /// Returns the underlying file of this machine, for pass-through by FUSE.
    fn file(&self) -> Option<&File>;

    /// Returns the file of this machine that contains this one contiguously, and the offset in it,
    /// for operations that work with a part of a file: mapping, or copying in the kernel.
    fn within(&self) -> Option<(&File, u64)> {
        self.file().map(|file| (file, 0))
    }
}

/// The target of [`StoredFile::seek`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// The next stored byte.
    Data,
    /// The next byte in a hole; the end of a file counts as a hole.
    Hole,
}

/// A parent link that does not lead to a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokenLink {
    /// The target of the link.
    pub target: PathBuf,
    /// What is wrong with the target.
    pub problem: String,
}
