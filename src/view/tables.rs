//! The tables of a snapshot that its processes share.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::UNIX_EPOCH,
};

use lru::LruCache;

use super::{
    Result,
    files::OpenFiles,
    held::Held,
    mapped::MappedFiles,
    process::read_mm,
    shared::{self, SharedObject},
};
use crate::{
    chain::{Chain, SnapshotId},
    image::{Kind, Store, proto},
};

/// How many `mm` entries are kept.
const MMS_KEPT: NonZeroUsize = NonZeroUsize::new(8).expect("not zero");

/// A value that is computed on first use and then shared.
///
/// Other callers wait meanwhile. A failure is not cached.
#[derive(Debug)]
pub(super) struct Lazy<T>(Mutex<Option<Arc<T>>>);

impl<T> Default for Lazy<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> Lazy<T> {
    pub(super) fn get<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<Arc<T>, E> {
        let mut value = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = &*value {
            return Ok(Arc::clone(value));
        }
        let made = Arc::new(make()?);
        Ok(Arc::clone(value.insert(made)))
    }
}

/// The tables of one snapshot that its processes share, such as the process tree and the open
/// files.
///
/// Each is read on first use, and kept.
#[derive(Debug)]
pub struct Tables {
    chain: Arc<Chain>,
    snapshot: SnapshotId,
    tree: Lazy<Vec<proto::PstreeEntry>>,
    mapped: Lazy<MappedFiles>,
    shared: Lazy<BTreeMap<u64, SharedObject>>,
    files: Lazy<OpenFiles>,
    held: Lazy<Held>,
    cgroups: Lazy<Vec<proto::CgSetEntry>>,
    mms: Mutex<LruCache<u32, Option<Arc<proto::MmEntry>>>>,
    mapped_files: bool,
}

impl Tables {
    /// Returns the tables of `snapshot` without reading anything.
    pub fn new(chain: Arc<Chain>, snapshot: SnapshotId) -> Self {
        Self {
            chain,
            snapshot,
            tree: Lazy::default(),
            mapped: Lazy::default(),
            shared: Lazy::default(),
            files: Lazy::default(),
            held: Lazy::default(),
            cgroups: Lazy::default(),
            mms: Mutex::new(LruCache::new(MMS_KEPT)),
            mapped_files: true,
        }
    }

    /// Leaves out the contents of files that are not in the images.
    pub fn without_mapped_files(mut self) -> Self {
        self.mapped_files = false;
        self
    }

    /// Returns the chain.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// Returns the number of the snapshot in the chain.
    pub fn snapshot(&self) -> SnapshotId {
        self.snapshot
    }

    /// Returns the snapshot's images.
    pub fn images(&self) -> &Store {
        self.chain.images(self.snapshot)
    }

    /// Returns the name of the snapshot in messages.
    pub(super) fn path(&self) -> &Path {
        self.images().name()
    }

    /// Returns the processes of the snapshot, including those without memory.
    pub fn tree(&self) -> Result<Arc<Vec<proto::PstreeEntry>>> {
        Ok(self.tree.get(|| self.images().messages(Kind::Pstree, 0))?)
    }

    /// Returns the mapped files.
    pub(super) fn mapped(&self) -> Result<Arc<MappedFiles>> {
        self.mapped.get(|| MappedFiles::load(self.images(), self.mapped_files))
    }

    /// Returns the open files.
    pub(super) fn files(&self) -> Result<Arc<OpenFiles>> {
        self.files.get(|| OpenFiles::load(self))
    }

    /// Returns the contents of files that the images hold.
    pub(super) fn held(&self) -> Result<Arc<Held>> {
        self.held.get(|| Held::load(self))
    }

    /// Returns the `mm` entry of the process `pid`; `None` if it has no address space. Keeps those of
    /// recently used processes, since the files of a process are read in a row.
    pub(super) fn mm(&self, pid: u32) -> Result<Option<Arc<proto::MmEntry>>> {
        let kept = || self.mms.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mm) = kept().get(&pid) {
            return Ok(mm.clone());
        }
        let mm = read_mm(self, pid)?.map(Arc::new);
        kept().put(pid, mm.clone());
        Ok(mm)
    }

    /// Returns the sets of cgroups; empty if the dump has not recorded them.
    pub(super) fn cgroups(&self) -> Result<Arc<Vec<proto::CgSetEntry>>> {
        self.cgroups.get(|| {
            let image: Option<proto::CgroupEntry> =
                self.images().message_if_any(Kind::Cgroup, 0)?;
            Ok(image.map(|image| image.sets).unwrap_or_default())
        })
    }

    /// Returns the key of a System V segment.
    pub(super) fn segment_key(&self, shmid: u64) -> Result<Option<u32>> {
        Ok(self.shared()?.get(&shmid).and_then(|object| object.key))
    }

    /// Returns the time of the dump in seconds since 1970; 0 if it is unknown.
    pub(super) fn dumped_at(&self) -> u64 {
        let stat = self.images().stat(&Kind::Inventory.file_name(0));
        let time = stat.ok().map(|stat| stat.modified);
        let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        since.map_or(0, |since| since.as_secs())
    }

    /// Returns the shared objects by shmid.
    pub(super) fn shared(&self) -> Result<Arc<BTreeMap<u64, SharedObject>>> {
        self.shared.get(|| shared::load(self))
    }
}
