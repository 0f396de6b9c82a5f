//! Where the images of a snapshot are.
//!
//! Readers ask an [`ImageStore`] for images by kind and number, and never for a path or a
//! descriptor. Such a store is a [`Directory`], or an archive that is read in place. Others to
//! come are an object store, from which bytes are requested by offset and length, and a
//! stream that is written once and in order. What only a directory can do is asked for
//! by name ([`ImageStore::directory`], [`StoredFile::file`]); callers then fall back, or
//! refuse.

mod archive;
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

pub use archive::{ArchiveError, Archived};
pub use directory::{Directory, Probe};
pub(crate) use directory::{directories, has_inventory};
pub use snapshot::{DirectoryWriter, PARENT_LINK};
pub use stat::Stat;
pub use writer::{Output, SnapshotWriter, StoreWriter, StoredOutput};

pub(super) use directory::open_file;

/// A store that several hold.
pub type Store = Arc<dyn ImageStore>;

/// What is found at a path.
#[derive(Debug)]
pub enum Found {
    /// A snapshot.
    Snapshot(Store),
    /// Directories, of which each may be one.
    Several(Vec<Directory>),
    /// Snapshots in an archive.
    Archived(Archived),
}

/// How images are looked for that need not be in directories.
#[derive(Debug, Default)]
pub struct Opening {
    /// Archives with snapshots that those of an archive have as their parents.
    pub previous: Vec<PathBuf>,
}

/// What is wrong with an archive where only a directory will do.
pub const NO_DIRECTORY: &str =
    "it is not a directory\nhelp: an archive has to be mounted: imgfs mount ARCHIVE DIR";

/// Finds the images at `path`, a directory: those of one snapshot, or of several side by side.
///
/// # Errors
/// What keeps the directory from being read; [`io::ErrorKind::NotADirectory`].
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
    if !root.is_dir() {
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
/// A file that is not there is [`io::ErrorKind::NotFound`] in every method. Names come from
/// the table of kinds or from [`Self::list`]; they have no slashes.
pub trait ImageStore: fmt::Debug + Send + Sync {
    /// Returns what messages call the store, which is unique among all stores; the path of
    /// a directory.
    fn name(&self) -> &Path;

    /// Opens a file to be read from its first byte on.
    ///
    /// # Errors
    /// Why it cannot be opened; [`io::ErrorKind::InvalidInput`] for what is no regular file.
    fn open(&self, file: &str) -> io::Result<Input>;

    /// Opens a file to be read at any place.
    ///
    /// # Errors
    /// As [`Self::open`].
    fn open_at_random(&self, file: &str) -> io::Result<Box<dyn StoredFile>>;

    /// Looks at a file, which need not be one that can be opened.
    ///
    /// # Errors
    /// Why it cannot be looked at.
    fn stat(&self, file: &str) -> io::Result<Stat>;

    /// Looks at the store itself.
    ///
    /// # Errors
    /// Why it cannot be looked at.
    fn stat_store(&self) -> io::Result<Stat>;

    /// Returns the names of all files, in no order. Names that are not UTF-8, which no image
    /// has, are left out.
    ///
    /// # Errors
    /// Why they cannot be listed.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Returns how many bytes all files together take where they are stored.
    ///
    /// # Errors
    /// Why they cannot be looked at.
    fn allocated(&self) -> io::Result<u64>;

    /// Opens the store of the parent, if there is one.
    ///
    /// # Errors
    /// [`BrokenLink`] if it cannot be found, or holds no snapshot.
    fn parent(&self) -> Result<Option<Store>, BrokenLink>;

    /// Returns the one user who can have put the images there; `None` if several can.
    fn owner(&self) -> Option<u32>;

    /// Returns the directory that the store is: its files can be changed, locked and punched
    /// there. `None` for a store that is none.
    fn directory(&self) -> Option<&Path>;
}

/// A file that is read from its first byte on.
#[derive(Debug)]
pub struct Input {
    /// Its bytes.
    pub bytes: Box<dyn Stream>,
    /// How many there are.
    pub len: u64,
    /// How many of them take room, roughly: the others are holes.
    pub allocated: u64,
}

/// Bytes in a row.
pub trait Stream: Read + fmt::Debug + Send {}

impl<T: Read + fmt::Debug + Send> Stream for T {}

/// A file that is read at any place, by several threads at a time.
pub trait StoredFile: fmt::Debug + Send + Sync {
    /// Looks at the file as it is now.
    ///
    /// # Errors
    /// Why it cannot be looked at.
    fn stat(&self) -> io::Result<Stat>;

    /// Reads bytes from `offset` on into `buffers`, one after the other, and returns how many:
    /// none only at the end of the file. One call is one request to where the file is.
    ///
    /// # Errors
    /// Why they cannot be read.
    fn read_vectored_at(&self, buffers: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize>;

    /// Returns the first offset at or after `offset` at which the file has what is sought;
    /// `None` if there is none up to its end. A store without holes need not know better.
    ///
    /// # Errors
    /// Why it cannot be found out.
    fn seek(&self, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
        let len = self.stat()?.len;
        Ok(match whence {
            Whence::Data => (offset < len).then_some(offset),
            Whence::Hole => Some(offset.max(len)),
        })
    }

    /// Returns the file of this machine that this is, for what only those can: to be passed
    /// through FUSE.
    fn file(&self) -> Option<&File>;

    /// Returns the file of this machine in which this lies in a row, and where it begins
    /// there, for what works with a part of a file, too: to be mapped, or copied within the
    /// kernel.
    fn within(&self) -> Option<(&File, u64)> {
        self.file().map(|file| (file, 0))
    }
}

/// What is sought in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// The next byte that is stored.
    Data,
    /// The next byte that is not; the end of a file counts as one.
    Hole,
}

/// A link to a parent that leads nowhere good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokenLink {
    /// Where it leads.
    pub target: PathBuf,
    /// What is there.
    pub problem: String,
}
