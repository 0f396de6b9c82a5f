//! Dumps descriptors of the test process, and restores them next to the originals.

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    rc::Rc,
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};
use tempfile::TempDir;

use super::{
    ConnectionsToRestore, DumpOptions, FileError, FileTable, FileUser, Inherited, Installer,
    Opened, Orphans, RestoreOptions, Result,
};
use crate::{
    image::{Directory, Kind, SnapshotWriter, proto, read_all},
    proc::{self, FdInfo},
    sys::process,
    units::{HostPid, NsPid, PidMap, TargetFd},
};

/// Returns `fstat(2)` of a descriptor.
pub(super) fn stat(fd: &BorrowedFd) -> libc::stat {
    nix::sys::stat::fstat(fd).unwrap()
}

fn status(fd: BorrowedFd) -> u32 {
    fcntl(fd, FcntlArg::F_GETFL).unwrap().cast_unsigned()
}

/// Adds a descriptor to an epoll instance, as the script of a restore does.
pub(super) fn watch(epoll: &OwnedFd, target: i32, events: u32, data: u64) {
    crate::sys::fds::watch(epoll.as_fd(), target, events, data).unwrap();
}

/// Descriptors to dump, by the numbers that the test gives them.
pub(super) struct Tree {
    pub(super) options: DumpOptions,
    /// The options of the restore.
    pub(super) inherited: Inherited,
    files: Vec<(u32, OwnedFd)>,
}

impl Tree {
    pub(super) fn new() -> Self {
        Self::with_options(DumpOptions::default())
    }

    pub(super) fn with_options(options: DumpOptions) -> Self {
        Self { options, inherited: Inherited::default(), files: Vec::new() }
    }

    pub(super) fn add(&mut self, id: u32, fd: OwnedFd) {
        self.files.push((id, fd));
    }

    fn collect(&self, images: &SnapshotWriter) -> Result<(FileTable, HashMap<u32, Before>)> {
        let mut table = FileTable::new(
            &self.options,
            PidMap::of_own_namespace(),
            HashSet::from([NsPid::of_image(HostPid::own().0)]),
        );
        let pidfd = process::pidfd_open(HostPid::own()).unwrap();
        let descriptors = crate::proc::Descriptors::open(HostPid::own()).unwrap();
        let mut before = HashMap::new();
        for (id, fd) in &self.files {
            let number = TargetFd(fd.as_raw_fd());
            let entry = table.collect_fd(HostPid::own(), &pidfd, &descriptors, number)?;
            before.insert(*id, Before::of(fd, entry));
        }
        table.write(images)?;
        Ok((table, before))
    }

    /// Dumps all descriptors, and closes them.
    pub(super) fn dump(self) -> Dumped {
        self.try_dump().unwrap()
    }

    pub(super) fn try_dump(self) -> Result<Dumped> {
        let dir = tempfile::tempdir().unwrap();
        let images = SnapshotWriter::begin(dir.path()).unwrap();
        let (mut table, before) = self.collect(&images)?;
        table.keep_link_remaps();
        images.commit(&proto::InventoryEntry::default()).unwrap();
        let entries = read_all(&dir.path().join(Kind::Files.file_name(0)), Kind::Files).unwrap();
        // Drop the table with all that it holds open: otherwise a FIFO would keep its contents.
        let (dir, before) = (Rc::new(dir), Rc::new(before));
        let DumpOptions { terminals, unix, validation, .. } = self.options;
        let connections = ConnectionsToRestore::default();
        let inherited = self.inherited;
        let orphans = Orphans::default();
        let options =
            RestoreOptions { terminals, orphans, unix, connections, validation, inherited };
        Ok(Dumped { dir, before, entries, options })
    }

    pub(super) fn restore(self) -> Restored {
        self.dump().restore()
    }

    /// Returns the error of a dump that must fail.
    pub(super) fn collect_error(self) -> Report {
        let dir = tempfile::tempdir().unwrap();
        let images = SnapshotWriter::begin(dir.path()).unwrap();
        Report(self.collect(&images).map(drop).unwrap_err())
    }

    /// Drops the table after collecting, as a failed dump does.
    pub(super) fn collect_and_drop(self) {
        let dir = tempfile::tempdir().unwrap();
        let images = SnapshotWriter::begin(dir.path()).unwrap();
        self.collect(&images).unwrap();
    }
}

/// An error with its causes.
pub(super) struct Report(FileError);

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = std::error::Error::source(&self.0);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// The state of a description before the dump.
#[derive(Debug)]
pub(super) struct Before {
    pub(super) stat: libc::stat,
    pub(super) flags: u32,
    pub(super) link: Vec<u8>,
    pub(super) info: FdInfo,
    /// Its entry in the `fdinfo` image.
    entry: proto::FdinfoEntry,
}

impl Before {
    fn of(fd: &OwnedFd, entry: proto::FdinfoEntry) -> Self {
        let number = TargetFd(fd.as_raw_fd());
        Self {
            stat: stat(&fd.as_fd()),
            flags: status(fd.as_fd()),
            link: proc::fd_link(HostPid::own(), number).unwrap(),
            info: proc::fdinfo(HostPid::own(), number).unwrap(),
            entry,
        }
    }
}

/// The images of a dump.
#[derive(Clone, Debug)]
pub(super) struct Dumped {
    dir: Rc<TempDir>,
    before: Rc<HashMap<u32, Before>>,
    /// The entries of `files.img`.
    pub(super) entries: Vec<proto::FileEntry>,
    pub(super) options: RestoreOptions,
}

impl Dumped {
    pub(super) fn images(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the entry in `files.img` of a descriptor of the test.
    pub(super) fn entry(&self, id: u32) -> &proto::FileEntry {
        let number = self.before[&id].entry.id;
        self.entries.iter().find(|entry| entry.id == number).unwrap()
    }

    /// Opens all descriptions.
    pub(super) fn open(&self) -> Result<Restored> {
        let fds: Vec<_> = self.before.values().map(|before| before.entry.clone()).collect();
        let process = FileUser {
            pid: NsPid::of_image(HostPid::own().0),
            group: NsPid::NONE,
            creds: None,
            fds: &fds,
        };
        let images = Directory::at(self.dir.path()).shared();
        let mut installer = Installer::new(
            &images,
            &self.options,
            &self.entries,
            vec![process],
            HashSet::new(),
            PidMap::of_own_namespace(),
        );
        installer.open_descriptions()?;
        installer.open_deferred()?;
        installer.start()?;
        Ok(Restored { dumped: self.clone(), opened: installer.opened })
    }

    pub(super) fn restore(self) -> Restored {
        self.open().unwrap_or_else(|error| panic!("{}", Report(error)))
    }

    /// Returns the error of a restore that must fail.
    pub(super) fn restore_error(self) -> Report {
        Report(self.open().map(drop).unwrap_err())
    }
}

/// The restored descriptors.
#[derive(Debug)]
pub(super) struct Restored {
    dumped: Dumped,
    opened: Opened,
}

impl Restored {
    pub(super) fn before(&self, id: u32) -> &Before {
        &self.dumped.before[&id]
    }

    pub(super) fn opened(&self) -> &Opened {
        &self.opened
    }

    pub(super) fn into_opened(self) -> Opened {
        // The restore has read the images already.
        self.opened
    }

    pub(super) fn images(&self) -> &Path {
        self.dumped.dir.path()
    }

    pub(super) fn entry(&self, id: u32) -> &proto::FileEntry {
        self.dumped.entry(id)
    }

    pub(super) fn get(&self, id: u32) -> BorrowedFd<'_> {
        self.opened.get(self.before(id).entry.id).unwrap()
    }

    pub(super) fn take(&self, id: u32) -> OwnedFd {
        self.get(id).try_clone_to_owned().unwrap()
    }

    /// Like [`Self::take`], but as a type of the standard library.
    pub(super) fn take_as<T: From<OwnedFd>>(&self, id: u32) -> T {
        self.take(id).into()
    }

    pub(super) fn flags(&self, id: u32) -> u32 {
        status(self.get(id))
    }

    pub(super) fn link(&self, id: u32) -> Vec<u8> {
        proc::fd_link(HostPid::own(), TargetFd(self.get(id).as_raw_fd())).unwrap()
    }

    pub(super) fn info(&self, id: u32) -> FdInfo {
        proc::fdinfo(HostPid::own(), TargetFd(self.get(id).as_raw_fd())).unwrap()
    }
}
