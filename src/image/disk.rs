//! The operations that change image directories. There are few, so that tests can record
//! which of them a program does, and in which order.

use std::{
    fmt,
    fs::{self, File},
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use nix::fcntl::{FallocateFlags, fallocate};

use super::regular;

/// A file that is open to be changed.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    path: PathBuf,
}

impl DiskFile {
    /// Returns the open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the path by which the file was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The operations. The provided methods go to the file system, see [`Kernel`]; an
/// implementation that records them calls these.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Opens a regular file for reading and writing.
    ///
    /// # Errors
    /// The errors of `open(2)`.
    fn open(&self, path: &Path) -> io::Result<DiskFile> {
        let (file, _) = regular::open_to_change(path)?;
        Ok(DiskFile { file, path: path.to_owned() })
    }

    /// Creates an empty file, and replaces a file of that name.
    ///
    /// # Errors
    /// The errors of `open(2)`.
    fn create(&self, path: &Path) -> io::Result<DiskFile> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = regular::create(path)?;
        Ok(DiskFile { file, path: path.to_owned() })
    }

    /// Writes bytes at `offset`.
    ///
    /// # Errors
    /// The errors of `pwrite(2)`.
    fn write_at(&self, file: &DiskFile, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.file.write_all_at(bytes, offset)
    }

    /// Cuts a file to `len` bytes.
    ///
    /// # Errors
    /// The errors of `ftruncate(2)`.
    fn set_len(&self, file: &DiskFile, len: u64) -> io::Result<()> {
        file.file.set_len(len)
    }

    /// Waits until a file's bytes are on the disk.
    ///
    /// # Errors
    /// The errors of `fsync(2)`.
    fn sync(&self, file: &DiskFile) -> io::Result<()> {
        file.file.sync_all()
    }

    /// Waits until the names in a directory are on the disk.
    ///
    /// # Errors
    /// The errors of `fsync(2)`.
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    /// Renames a file, and replaces a file that has the new name.
    ///
    /// # Errors
    /// The errors of `rename(2)`.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    /// Frees the bytes `range` of a file and keeps its length (`FALLOC_FL_PUNCH_HOLE`,
    /// `fallocate(2)`).
    ///
    /// # Errors
    /// What `fallocate(2)` returns; `EOPNOTSUPP` where the file system cannot punch holes.
    fn punch(&self, file: &DiskFile, range: Range<u64>) -> io::Result<()> {
        let too_far = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let offset = i64::try_from(range.start).map_err(too_far)?;
        let len = i64::try_from(range.end - range.start).map_err(too_far)?;
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        loop {
            match fallocate(&file.file, mode, offset, len) {
                Err(nix::errno::Errno::EINTR) => {}
                result => return Ok(result?),
            }
        }
    }
}

/// The file system, without a recorder.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kernel;

impl Disk for Kernel {}
