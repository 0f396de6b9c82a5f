//! The files that hold the bytes. A file is opened when first needed, and closed after many
//! others have been used since.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::File,
    io::{self, IoSliceMut},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use lru::LruCache;
use memmap2::{MmapOptions, MmapRaw};
use nix::{errno::Errno, fcntl::copy_file_range};

use super::{ChainError, Result};
use crate::image::{
    Store, regular,
    store::{Stat, StoredFile},
};

/// A file in [`Files`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(u32);

/// An open file that holds bytes.
#[derive(Debug)]
pub struct BackingFile {
    file: Box<dyn StoredFile>,
    path: PathBuf,
    mapping: OnceLock<Option<MmapRaw>>,
}

impl BackingFile {
    /// Returns a file that messages call `path`.
    pub fn new(file: Box<dyn StoredFile>, path: PathBuf) -> Self {
        Self { file, path, mapping: OnceLock::new() }
    }

    /// Returns the underlying file; `None` if the store of the bytes is not based on files.
    pub fn file(&self) -> Option<&File> {
        self.file.file()
    }

    /// Returns the stored file.
    pub(super) fn stored(&self) -> &dyn StoredFile {
        &*self.file
    }

    /// Returns the path of the file in messages, as it was when the file was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns a mapping of the file as a source for system calls, with the length that the
    /// file had at the first call; `None` if it cannot be mapped.
    ///
    /// The caller must not read the mapping itself: if the file has shrunk, the access
    /// raises SIGBUS.
    pub fn mapping(&self) -> Option<&MmapRaw> {
        let map = || {
            let (file, start) = self.file.within()?;
            let len = usize::try_from(self.file.stat().ok()?.len).ok()?;
            MmapOptions::new().offset(start).len(len).map_raw_read_only(file).ok()
        };
        self.mapping.get_or_init(map).as_ref()
    }

    /// Returns the current attributes of the file.
    ///
    /// # Errors
    /// [`ChainError::Open`].
    pub fn stat(&self) -> Result<Stat> {
        self.file.stat().map_err(|source| ChainError::Open { path: self.path.clone(), source })
    }

    /// Fills `buffers` in order from the bytes at `offset`.
    ///
    /// # Errors
    /// [`ChainError::Read`]; [`ChainError::Truncated`] if the file ends too early.
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
            match self.file.read_vectored_at(buffers, offset) {
                Ok(0) => {
                    return Err(ChainError::Truncated {
                        path: self.path.clone(),
                        offset,
                        wanted,
                        end: self.stat().map_or(offset, |stat| stat.len),
                    });
                }
                Ok(read) => {
                    IoSliceMut::advance_slices(&mut buffers, read);
                    offset += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(failed(source)),
            }
        }
        Ok(())
    }
}

impl BackingFile {
    /// Lets the kernel copy `len` bytes from `start` on to `offset` in `target`, or share
    /// their blocks. Returns how many bytes it did: fewer if the kernel cannot do it, or if
    /// this file ends too early.
    ///
    /// # Errors
    /// Errors of writing to `target`.
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
        let Some((file, begin)) = self.file.within() else { return Ok(0) };
        // In an archive, bytes after the end belong to another file.
        let len = len.min(self.file.stat()?.len.saturating_sub(start));
        let (mut from_at, mut to_at) = (position(begin + start)?, position(offset)?);
        let mut copied = 0;
        while copied < len {
            let rest = usize::try_from(len - copied).unwrap_or(usize::MAX);
            match copy_file_range(file, Some(&mut from_at), target, Some(&mut to_at), rest) {
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

/// The identity of a file when it was first opened: [`Stat::identity`].
type Identity = (u64, u64);

/// Where a file is.
#[derive(Clone, Debug)]
enum Place {
    /// In the file system, at its path.
    Here,
    /// In a store, under this name.
    In(Store, Arc<str>),
}

#[derive(Debug)]
struct Entry {
    path: Arc<OsStr>,
    place: Place,
    identity: Option<Identity>,
}

#[derive(Debug)]
struct Inner {
    entries: Vec<Entry>,
    /// By path, as strings: those hash several times faster.
    by_path: HashMap<Arc<OsStr>, FileId>,
    open: LruCache<FileId, Arc<BackingFile>>,
}

/// Files by number, of which a limited number is open at a time.
///
/// A file stays open while it is in use or was used recently, so a chain of any depth holds
/// at most `capacity` descriptors between two requests.
#[derive(Debug)]
pub struct Files {
    inner: Mutex<Inner>,
}

impl Files {
    /// Returns an empty set that keeps up to `capacity` files open.
    pub fn new(capacity: NonZeroUsize) -> Self {
        Self {
            inner: Mutex::new(Inner {
                entries: Vec::new(),
                by_path: HashMap::new(),
                open: LruCache::new(capacity),
            }),
        }
    }

    /// Adds a file of a store, which need not exist yet, and returns its number; always the
    /// same number for the same file.
    pub fn enter(&self, store: &Store, name: &str) -> FileId {
        let place = || Place::In(Arc::clone(store), name.into());
        self.enter_at(&store.path_of(name), place)
    }

    /// Adds a file that is in no store, such as a mapped file.
    pub fn enter_path(&self, path: &Path) -> FileId {
        self.enter_at(path, || Place::Here)
    }

    fn enter_at(&self, path: &Path, place: impl FnOnce() -> Place) -> FileId {
        let mut inner = self.lock();
        if let Some(id) = inner.by_path.get(path.as_os_str()) {
            return *id;
        }
        let id = FileId(u32::try_from(inner.entries.len()).expect("fewer files than 2^32"));
        let path: Arc<OsStr> = path.as_os_str().into();
        inner.entries.push(Entry { path: Arc::clone(&path), place: place(), identity: None });
        inner.by_path.insert(path, id);
        id
    }

    /// Returns the open file, opening it if necessary.
    ///
    /// # Errors
    /// [`ChainError::Open`]; [`ChainError::Replaced`] if the path now leads to another file
    /// than when it was first opened.
    pub fn get(&self, id: FileId) -> Result<Arc<BackingFile>> {
        let (path, place) = {
            let mut inner = self.lock();
            if let Some(file) = inner.open.get(&id) {
                return Ok(Arc::clone(file));
            }
            let entry = &inner.entries[id.0 as usize];
            (PathBuf::from(&entry.path), entry.place.clone())
        };
        // Opening may wait for a disk or a network; other threads must not wait as well.
        let open = || {
            let file: Box<dyn StoredFile> = match &place {
                Place::Here => Box::new(regular::open(&path)?.0),
                Place::In(store, name) => store.open_at_random(name)?,
            };
            let identity = file.stat()?.identity;
            io::Result::Ok((file, identity))
        };
        let (file, identity) =
            open().map_err(|source| ChainError::Open { path: path.clone(), source })?;
        let mut inner = self.lock();
        let known = inner.entries[id.0 as usize].identity.get_or_insert(identity);
        if *known != identity {
            return Err(ChainError::Replaced { path });
        }
        let file = Arc::new(BackingFile::new(file, path));
        let evicted = inner.open.push(id, Arc::clone(&file));
        drop(inner);
        drop(evicted); // closing, too, may wait
        Ok(file)
    }

    /// Returns how many files the set keeps open.
    pub fn open_count(&self) -> usize {
        self.lock().open.len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // No code panics while it holds the lock with inconsistent data.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
