//! The files that hold the bytes: opened when first needed, closed again when
//! many others were needed since.

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

/// A file that was entered into [`Files`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(u32);

/// An open file that bytes are read from.
#[derive(Debug)]
pub struct BackingFile {
    file: Box<dyn StoredFile>,
    path: PathBuf,
    mapping: OnceLock<Option<MmapRaw>>,
}

impl BackingFile {
    /// Returns the file of this machine that the bytes are in, for what only those can;
    /// `None` if they are in a store that has none.
    pub fn file(&self) -> Option<&File> {
        self.file.file()
    }

    /// Returns the bytes as they are stored.
    pub(super) fn stored(&self) -> &dyn StoredFile {
        &*self.file
    }

    /// Returns what messages call the file: its path when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file's bytes in memory, for system calls to copy from: as many
    /// as there were when this was first called. `None` if it cannot be mapped.
    ///
    /// It must not be read in any other way: where a file has become shorter there are no
    /// bytes, and a reader is killed by SIGBUS.
    pub fn mapping(&self) -> Option<&MmapRaw> {
        let map = || {
            let (file, start) = self.file.within()?;
            let len = usize::try_from(self.file.stat().ok()?.len).ok()?;
            MmapOptions::new().offset(start).len(len).map_raw_read_only(file).ok()
        };
        self.mapping.get_or_init(map).as_ref()
    }

    /// Returns the file's attributes now.
    ///
    /// # Errors
    /// [`ChainError::Open`].
    pub fn stat(&self) -> Result<Stat> {
        self.file.stat().map_err(|source| ChainError::Open { path: self.path.clone(), source })
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
        let Some((file, begin)) = self.file.within() else { return Ok(0) };
        // What lies behind the bytes of a part of a file is something else's.
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

/// Which file it was when it was first opened: [`Stat::identity`].
type Identity = (u64, u64);

/// Where a file is.
#[derive(Clone, Debug)]
enum Place {
    /// At its path on this machine.
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

    /// Enters a file of a store, which need not exist yet, and returns its number; the same
    /// for the same file.
    pub fn enter(&self, store: &Store, name: &str) -> FileId {
        let place = || Place::In(Arc::clone(store), name.into());
        self.enter_at(&store.path_of(name), place)
    }

    /// Enters a file of this machine that is in no store, such as a mapped one.
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

    /// Returns the open file, opening it if need be.
    ///
    /// # Errors
    /// [`ChainError::Open`]; [`ChainError::Replaced`] if the path has come to
    /// lead to another file since it was first opened.
    pub fn get(&self, id: FileId) -> Result<Arc<BackingFile>> {
        let (path, place) = {
            let mut inner = self.lock();
            if let Some(file) = inner.open.get(&id) {
                return Ok(Arc::clone(file));
            }
            let entry = &inner.entries[id.0 as usize];
            (PathBuf::from(&entry.path), entry.place.clone())
        };
        // Opening may wait for a disk or a network; other threads must not wait with us.
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
