//! The tables that the processes of a snapshot share.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::UNIX_EPOCH,
};

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

/// A value that is computed on first use, and then shared.
///
/// Callers wait while another computes it. A failure is not cached.
#[derive(Debug)]
struct Lazy<T>(Mutex<Option<Arc<T>>>);

impl<T> Default for Lazy<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> Lazy<T> {
    fn get<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<Arc<T>, E> {
        let mut value = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = &*value {
            return Ok(Arc::clone(value));
        }
        let made = Arc::new(make()?);
        Ok(Arc::clone(value.insert(made)))
    }
}

/// The tables of one snapshot that its processes share: the process tree, and
/// the files that may be mapped.
///
/// They are read when first needed and kept as long as this is.
#[derive(Debug)]
pub struct Tables {
    chain: Arc<Chain>,
    snapshot: SnapshotId,
    tree: Lazy<Vec<proto::PstreeEntry>>,
    mapped: Lazy<MappedFiles>,
    shared: Lazy<BTreeMap<u64, SharedObject>>,
    files: Lazy<OpenFiles>,
    held: Lazy<Held>,
    mapped_files: bool,
}

impl Tables {
    /// Stands for the tables of `snapshot`; reads nothing.
    pub fn new(chain: Arc<Chain>, snapshot: SnapshotId) -> Self {
        Self {
            chain,
            snapshot,
            tree: Lazy::default(),
            mapped: Lazy::default(),
            shared: Lazy::default(),
            files: Lazy::default(),
            held: Lazy::default(),
            mapped_files: true,
        }
    }

    /// Leaves out the contents of files that the images only name.
    pub fn without_mapped_files(mut self) -> Self {
        self.mapped_files = false;
        self
    }

    /// Returns the chain.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// Returns the snapshot's number in the chain.
    pub fn snapshot(&self) -> SnapshotId {
        self.snapshot
    }

    /// Returns the snapshot's images.
    pub fn images(&self) -> &Store {
        self.chain.images(self.snapshot)
    }

    /// Returns what messages call the snapshot.
    pub(super) fn path(&self) -> &Path {
        self.images().name()
    }

    /// Returns the snapshot's processes, those without memory among them.
    ///
    /// # Errors
    /// [`ViewError::Image`](super::ViewError::Image).
    pub fn tree(&self) -> Result<Arc<Vec<proto::PstreeEntry>>> {
        Ok(self.tree.get(|| self.images().messages(Kind::Pstree, 0))?)
    }

    /// Returns the files that processes may map.
    ///
    /// # Errors
    /// [`ViewError::Image`](super::ViewError::Image).
    pub(super) fn mapped(&self) -> Result<Arc<MappedFiles>> {
        self.mapped.get(|| MappedFiles::load(self.images(), self.mapped_files))
    }

    /// Returns the open files.
    ///
    /// # Errors
    /// [`ViewError::Image`](super::ViewError::Image).
    pub(super) fn files(&self) -> Result<Arc<OpenFiles>> {
        self.files.get(|| OpenFiles::load(self))
    }

    /// Returns what the images hold of files.
    ///
    /// # Errors
    /// [`ViewError::Image`](super::ViewError::Image).
    pub(super) fn held(&self) -> Result<Arc<Held>> {
        self.held.get(|| Held::load(self))
    }

    /// Reads what the process `pid` maps; `None` if it has no address space.
    pub(super) fn mm(&self, pid: u32) -> Result<Option<proto::MmEntry>> {
        read_mm(self, pid)
    }

    /// Returns the key of a System V segment.
    pub(super) fn segment_key(&self, shmid: u64) -> Result<Option<u32>> {
        Ok(self.shared()?.get(&shmid).and_then(|object| object.key))
    }

    /// Returns when the snapshot was made, in seconds since 1970; 0 if nothing tells.
    pub(super) fn dumped_at(&self) -> u64 {
        let stat = self.images().stat(&Kind::Inventory.file_name(0));
        let time = stat.ok().map(|stat| stat.modified);
        let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        since.map_or(0, |since| since.as_secs())
    }

    /// Returns the shared objects by their shmids.
    ///
    /// # Errors
    /// [`ViewError::Image`](super::ViewError::Image).
    pub(super) fn shared(&self) -> Result<Arc<BTreeMap<u64, SharedObject>>> {
        self.shared.get(|| shared::load(self))
    }
}
