//! Open files and directories of a mount.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use fuser::BackingId;

use crate::view::{DirEntry, Ino, OpenFile};

/// An open directory, with the entries that it had when it was opened, `.` and `..`
/// included.
#[derive(Debug)]
pub(super) struct OpenDir {
    pub entries: Vec<DirEntry>,
}

/// Open files and directories, by their handles.
#[derive(Debug, Default)]
pub(super) struct Handles {
    files: RwLock<Numbered<OpenFile>>,
    dirs: RwLock<Numbered<OpenDir>>,
    inodes: Mutex<HashMap<Ino, OpenInode>>,
}

#[derive(Debug)]
struct Numbered<T> {
    next: u64,
    open: HashMap<u64, Arc<T>>,
}

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Self { next: 1, open: HashMap::new() }
    }
}

/// How all handles of an inode are read: the kernel refuses to mix pass-through and other reads,
/// and requires the same backing file for all of them.
#[derive(Debug)]
struct OpenInode {
    handles: usize,
    backing: Option<Arc<BackingId>>,
}

impl<T> Numbered<T> {
    fn enter(&mut self, value: T) -> u64 {
        let number = self.next;
        self.next += 1;
        self.open.insert(number, Arc::new(value));
        number
    }
}

impl Handles {
    /// Adds an open file. `register` registers its backing file with the kernel; it is
    /// called only for the first handle of the inode.
    ///
    /// Returns the handle; also the backing file if the kernel reads only from that, otherwise the
    /// reason.
    pub(super) fn enter_file(
        &self,
        ino: Ino,
        file: OpenFile,
        register: impl FnOnce(&OpenFile) -> io::Result<Option<BackingId>>,
    ) -> (u64, io::Result<Option<Arc<BackingId>>>) {
        let mut inodes = self.inodes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut refused = None;
        let inode = inodes.entry(ino).or_insert_with(|| {
            let backing = register(&file).unwrap_or_else(|error| {
                refused = Some(error);
                None
            });
            OpenInode { handles: 0, backing: backing.map(Arc::new) }
        });
        inode.handles += 1;
        let backing = inode.backing.clone();
        drop(inodes);
        let number = self.files.write().unwrap_or_else(PoisonError::into_inner).enter(file);
        (number, refused.map_or(Ok(backing), Err))
    }

    /// Returns an open file.
    pub(super) fn file(&self, number: u64) -> Option<Arc<OpenFile>> {
        self.files.read().unwrap_or_else(PoisonError::into_inner).open.get(&number).cloned()
    }

    /// Whether any file of an inode is open.
    pub(super) fn is_open(&self, ino: Ino) -> bool {
        self.inodes.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&ino)
    }

    /// Removes an open file, and with the last one of an inode its backing file. Returns
    /// the file, and whether it was the last of its inode.
    pub(super) fn close_file(&self, ino: Ino, number: u64) -> Option<(Arc<OpenFile>, bool)> {
        let file =
            self.files.write().unwrap_or_else(PoisonError::into_inner).open.remove(&number)?;
        let mut last = false;
        let mut inodes = self.inodes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inode) = inodes.get_mut(&ino) {
            inode.handles -= 1;
            last = inode.handles == 0;
            if last {
                inodes.remove(&ino);
            }
        }
        Some((file, last))
    }

    /// Adds an open directory and returns its handle.
    pub(super) fn enter_dir(&self, dir: OpenDir) -> u64 {
        self.dirs.write().unwrap_or_else(PoisonError::into_inner).enter(dir)
    }

    /// Returns an open directory.
    pub(super) fn dir(&self, number: u64) -> Option<Arc<OpenDir>> {
        self.dirs.read().unwrap_or_else(PoisonError::into_inner).open.get(&number).cloned()
    }

    pub(super) fn close_dir(&self, number: u64) {
        self.dirs.write().unwrap_or_else(PoisonError::into_inner).open.remove(&number);
    }
}
