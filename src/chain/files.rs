//! The files that hold the bytes: opened when first needed, closed again when
//! many others were needed since.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{File, Metadata},
    io::{self, IoSliceMut},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use lru::LruCache;
use memmap2::{MmapOptions, MmapRaw};
use nix::{errno::Errno, fcntl::copy_file_range, sys::uio::preadv};

use super::{ChainError, Result};
use crate::image::regular;

/// A file that was entered into [`Files`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(u32);

/// An open file that bytes are read from.
#[derive(Debug)]
pub struct BackingFile {
    file: File,
    path: PathBuf,
    mapping: OnceLock<Option<MmapRaw>>,
}

impl BackingFile {
    /// Returns the open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the file's path when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file's bytes in memory, for system calls to copy from: as many
    /// as there were when this was first called. `None` if it cannot be mapped.
    ///
    /// It must not be read in any other way: where a file has become shorter there are no
    /// bytes, and a reader is killed by SIGBUS.
    pub fn mapping(&self) -> Option<&MmapRaw> {
        let map = || MmapOptions::new().map_raw_read_only(&self.file).ok();
        self.mapping.get_or_init(map).as_ref()
    }

    /// Returns the file's attributes now.
    ///
    /// # Errors
    /// [`ChainError::Open`].
    pub fn metadata(&self) -> Result<Metadata> {
        self.file.metadata().map_err(|source| ChainError::Open { path: self.path.clone(), source })
    }

    /// Fills `buffers` one after the other from the bytes at `offset`.
    ///
    /// # Errors
    /// [`ChainError::Read`]; [`ChainError::Truncated`] if the file ends before.
    pub fn read_exact_at(&self, mut buffers: &mut [IoSliceMut], mut offset: u64) -> Result<()> {
        let length = |buffers: &[IoSliceMut]| buffers.iter().map(|b| b.len() as u64).sum();
        while !buffers.is_empty() {
            let wanted = length(buffers);
            let failed = |source| ChainError::Read {
                path: self.path.clone(),
                offset,
                length: wanted,
                source,
            };
            let position =
                i64::try_from(offset).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
            match preadv(&self.file, buffers, position) {
                Ok(0) => {
                    return Err(ChainError::Truncated {
                        path: self.path.clone(),
                        offset,
                        wanted,
                        end: self.metadata().map_or(offset, |meta| meta.len()),
                    });
                }
                Ok(read) => {
                    IoSliceMut::advance_slices(&mut buffers, read);
                    offset += read as u64;
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        Ok(())
    }
}

impl BackingFile {
    /// Lets the kernel copy `len` bytes from `start` on to `offset` in `target`, which
    /// may share blocks instead, and returns how many bytes it did: not all where it
    /// cannot, or where this file ends before.
    ///
    /// # Errors
    /// What writing to `target` returns.
    pub fn copy_in_kernel(
        &self,
        start: u64,
        len: u64,
        target: &File,
        offset: u64,
    ) -> io::Result<u64> {
        let position = |offset| {
            i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))
        };
        let (mut from_at, mut to_at) = (position(start)?, position(offset)?);
        let mut copied = 0;
        while copied < len {
            let rest = usize::try_from(len - copied).unwrap_or(usize::MAX);
            match copy_file_range(&self.file, Some(&mut from_at), target, Some(&mut to_at), rest) {
                Ok(0) => break,
                Ok(count) => copied += count as u64,
                Err(Errno::EINTR) => {}
                Err(Errno::EXDEV | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(copied)
    }
}

/// Which file it was when it was first opened: device and inode number.
type Identity = (u64, u64);

#[derive(Debug)]
struct Entry {
    path: Arc<OsStr>,
    identity: Option<Identity>,
}

#[derive(Debug)]
struct Inner {
    entries: Vec<Entry>,
    /// By paths as strings, which are hashed in a fraction of the time.
    by_path: HashMap<Arc<OsStr>, FileId>,
    open: LruCache<FileId, Arc<BackingFile>>,
}

/// Files by number, of which a bounded number is open at a time.
///
/// A file is open as long as it is in use or was used recently, so that a chain
/// of any depth takes at most `capacity` descriptors between two requests.
#[derive(Debug)]
pub struct Files {
    inner: Mutex<Inner>,
}

impl Files {
    /// Makes an empty set of files that keeps up to `capacity` of them open.
    pub fn new(capacity: NonZeroUsize) -> Self {
        Self {
            inner: Mutex::new(Inner {
                entries: Vec::new(),
                by_path: HashMap::new(),
                open: LruCache::new(capacity),
            }),
        }
    }

    /// Enters a file, which need not exist yet, and returns its number; the same
    /// for the same path.
    pub fn enter(&self, path: &Path) -> FileId {
        let mut inner = self.lock();
        if let Some(id) = inner.by_path.get(path.as_os_str()) {
            return *id;
        }
        let id = FileId(u32::try_from(inner.entries.len()).expect("fewer files than 2^32"));
        let path: Arc<OsStr> = path.as_os_str().into();
        inner.entries.push(Entry { path: Arc::clone(&path), identity: None });
        inner.by_path.insert(path, id);
        id
    }

    /// Returns the open file, opening it if need be.
    ///
    /// # Errors
    /// [`ChainError::Open`]; [`ChainError::Replaced`] if the path has come to
    /// lead to another file since it was first opened.
    pub fn get(&self, id: FileId) -> Result<Arc<BackingFile>> {
        let path = {
            let mut inner = self.lock();
            if let Some(file) = inner.open.get(&id) {
                return Ok(Arc::clone(file));
            }
            PathBuf::from(&inner.entries[id.0 as usize].path)
        };
        // Opening may wait for a disk or a network; other threads must not wait with us.
        let open = || {
            let (file, stat) = regular::open(&path)?;
            io::Result::Ok((file, (stat.st_dev, stat.st_ino)))
        };
        let (file, identity) =
            open().map_err(|source| ChainError::Open { path: path.clone(), source })?;
        let mut inner = self.lock();
        let known = inner.entries[id.0 as usize].identity.get_or_insert(identity);
        if *known != identity {
            return Err(ChainError::Replaced { path });
        }
        let file = Arc::new(BackingFile { file, path, mapping: OnceLock::new() });
        let evicted = inner.open.push(id, Arc::clone(&file));
        drop(inner);
        drop(evicted); // closing, too, may wait
        Ok(file)
    }

    /// Returns how many files are open, not counting those that only users hold.
    pub fn open_count(&self) -> usize {
        self.lock().open.len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock in a state worth distrusting.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
