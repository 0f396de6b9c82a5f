//! Dumps descriptors of the test itself, and restores them beside.

use std::{
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};
use tempfile::TempDir;

use super::{
    BuildIds, Collector, Description, FileError, Intake, KINDS, Opened, Opener, Policy, Result,
    Validation, fown, lost::Lost,
};
use crate::{
    image::{Kind, SnapshotWriter, proto, read_all},
    proc::{self, FdInfo},
    units::{HostPid, TargetFd},
};

/// The first number of entries that are no descriptions.
const FIRST_NEW_ID: u32 = 1000;

fn own_pid() -> HostPid {
    HostPid(std::process::id().cast_signed())
}

/// Returns `fstat(2)` of a descriptor.
pub(super) fn stat(fd: &BorrowedFd) -> libc::stat {
    nix::sys::stat::fstat(fd).unwrap()
}

fn status(fd: BorrowedFd) -> u32 {
    fcntl(fd, FcntlArg::F_GETFL).unwrap().cast_unsigned()
}

/// Describes a descriptor of the test.
fn describe(id: u32, fd: &OwnedFd) -> Description {
    let number = TargetFd(fd.as_raw_fd());
    let flags = status(fd.as_fd());
    Description {
        id,
        fd: fd.try_clone().unwrap(),
        pid: own_pid(),
        number,
        stat: stat(&fd.as_fd()),
        flags,
        link: proc::fd_link(own_pid(), number).unwrap(),
        info: proc::fdinfo(own_pid(), number).unwrap(),
        fown: fown::read(fd.as_fd(), flags).unwrap(),
    }
}

/// Adds a descriptor to an epoll by the script of a restore would.
pub(super) fn watch(epoll: &OwnedFd, target: i32, events: u32, data: u64) {
    crate::sys::fds::watch(epoll.as_fd(), target, events, data).unwrap();
}

/// Takes in what is found inside others.
struct TestIntake {
    next: u32,
    pushed: Vec<proto::FileEntry>,
    lost: Lost,
    build_ids: BuildIds,
}

impl Intake for TestIntake {
    fn enter(&mut self, _: OwnedFd, _: &Description) -> Result<u32> {
        unreachable!("nothing is queued here")
    }

    fn new_id(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    fn push(&mut self, entry: proto::FileEntry) {
        self.pushed.push(entry);
    }

    fn has_process(&self, pid: i32) -> bool {
        pid == std::process::id().cast_signed()
    }

    fn entry(&mut self, id: u32) -> Option<&mut proto::FileEntry> {
        self.pushed.iter_mut().find(|entry| entry.id == id)
    }

    fn lost(&mut self) -> &mut Lost {
        &mut self.lost
    }

    fn build_ids(&mut self) -> (&mut BuildIds, Validation) {
        (&mut self.build_ids, Validation::BuildId)
    }
}

/// Descriptors to be dumped.
pub(super) struct Tree {
    pub(super) policy: Policy,
    files: Vec<(u32, OwnedFd)>,
}

impl Tree {
    pub(super) fn new() -> Self {
        let policy = Policy { ghost_limit_bytes: 1 << 20, ..Policy::default() };
        Self { policy, files: Vec::new() }
    }

    pub(super) fn add(&mut self, id: u32, fd: OwnedFd) {
        self.files.push((id, fd));
    }

    fn collect(&self, images: &SnapshotWriter) -> Result<(HashMap<u32, Description>, TestIntake)> {
        let mut collectors: Vec<Box<dyn Collector>> =
            KINDS.iter().map(|kind| (kind.collector)(&self.policy)).collect();
        let lost = Lost::new(&self.policy);
        let mut intake = TestIntake {
            next: FIRST_NEW_ID,
            pushed: Vec::new(),
            lost,
            build_ids: BuildIds::default(),
        };
        let mut before = HashMap::new();
        for (id, fd) in &self.files {
            let file = describe(*id, fd);
            let collector = collectors.iter_mut().find(|collector| collector.claims(&file));
            let collector = collector.unwrap_or_else(|| panic!("nobody claims {file:?}"));
            let entry = collector.collect(&file, &mut intake)?;
            assert_eq!(entry.id, *id);
            intake.push(entry);
            before.insert(*id, file);
        }
        for collector in &mut collectors {
            collector.finish(images)?;
        }
        intake.lost.write(images)?;
        Ok((before, intake))
    }

    /// Dumps all, and closes them.
    pub(super) fn dump(self) -> Dumped {
        let dir = tempfile::tempdir().unwrap();
        let images = SnapshotWriter::begin(dir.path()).unwrap();
        let (before, mut intake) = self.collect(&images).unwrap();
        intake.lost.keep_links();
        images.write(Kind::Files, 0, &intake.pushed).unwrap();
        images.commit(&proto::InventoryEntry::default()).unwrap();
        // What was dumped is closed, or a FIFO would keep what is in it.
        let before = before.into_iter().map(|(id, file)| (id, Before::from(file))).collect();
        Dumped { dir, before, policy: self.policy }
    }

    pub(super) fn restore(self) -> Restored {
        self.dump().restore()
    }

    /// Returns why the dump fails.
    pub(super) fn collect_error(self) -> Report {
        let dir = tempfile::tempdir().unwrap();
        let images = SnapshotWriter::begin(dir.path()).unwrap();
        Report(self.collect(&images).map(drop).unwrap_err())
    }

    /// Fails after all was collected.
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

/// What is known of a description that was dumped.
pub(super) struct Before {
    pub(super) stat: libc::stat,
    pub(super) flags: u32,
    pub(super) link: Vec<u8>,
    pub(super) info: FdInfo,
}

impl From<Description> for Before {
    fn from(file: Description) -> Self {
        Self { stat: file.stat, flags: file.flags, link: file.link, info: file.info }
    }
}

/// Images of descriptors.
pub(super) struct Dumped {
    dir: TempDir,
    before: HashMap<u32, Before>,
    pub(super) policy: Policy,
}

impl Dumped {
    pub(super) fn images(&self) -> &Path {
        self.dir.path()
    }

    fn open(self) -> Result<Restored> {
        let path = self.dir.path().join(Kind::Files.file_name(0));
        let entries: Vec<proto::FileEntry> = read_all(&path, Kind::Files).unwrap();
        let mut opened = Opened::new(self.dir.path(), self.policy.clone(), entries.clone());
        let mut openers: Vec<Box<dyn Opener>> = Vec::new();
        for kind in KINDS {
            let mut opener = (kind.opener)(&self.policy);
            // Entries that are only the paths of others are no descriptions.
            let own: Vec<proto::FileEntry> = entries
                .iter()
                .filter(|entry| kind.types.contains(&entry.r#type()) && entry.id < FIRST_NEW_ID)
                .cloned()
                .collect();
            opener.open(&own, &mut opened)?;
            openers.push(opener);
        }
        for opener in &mut openers {
            opener.fill(&opened)?;
        }
        for opener in &mut openers {
            opener.start(&opened)?;
        }
        Ok(Restored { dumped: self, opened })
    }

    pub(super) fn restore(self) -> Restored {
        self.open().unwrap_or_else(|error| panic!("{}", Report(error)))
    }

    /// Returns why the restore fails.
    pub(super) fn restore_error(self) -> Report {
        Report(self.open().map(drop).unwrap_err())
    }
}

/// Descriptors that were restored.
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
        // The images are read already.
        self.opened
    }

    pub(super) fn images(&self) -> &Path {
        self.dumped.dir.path()
    }

    pub(super) fn entry(&self, id: u32) -> &proto::FileEntry {
        &self.opened.entries[&id]
    }

    pub(super) fn get(&self, id: u32) -> BorrowedFd<'_> {
        self.opened.get(id).unwrap()
    }

    pub(super) fn take(&self, id: u32) -> OwnedFd {
        self.get(id).try_clone_to_owned().unwrap()
    }

    pub(super) fn flags(&self, id: u32) -> u32 {
        status(self.get(id))
    }

    pub(super) fn link(&self, id: u32) -> Vec<u8> {
        proc::fd_link(own_pid(), TargetFd(self.get(id).as_raw_fd())).unwrap()
    }

    pub(super) fn info(&self, id: u32) -> FdInfo {
        proc::fdinfo(own_pid(), TargetFd(self.get(id).as_raw_fd())).unwrap()
    }
}
