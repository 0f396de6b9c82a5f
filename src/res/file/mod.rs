//! Open file descriptions.
//!
//! One file a kind, with both directions in it, and one row each in [`KINDS`].
//! A dump takes a duplicate of each descriptor (`pidfd_getfd(2)`), so that almost
//! everything can be asked of the description from outside. A restore opens each
//! description once, in this program; the new processes inherit it, so that
//! descriptions shared between processes are shared again without more ado.

mod descriptor;
mod error;
mod eventfd;
mod eventpoll;
mod fown;
mod ghost;
mod install;
mod late;
mod memfd;
mod options;
mod owner;
mod path;
mod pipe;
mod regular;
mod signalfd;
mod sock;
mod table;
#[cfg(test)]
mod testing;
mod timerfd;
mod tty;
mod validation;

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::{errno::Errno, libc};

use crate::{
    image::{SnapshotWriter, Store, proto},
    inject::Script,
    proc::FdInfo,
    units::{HostPid, NsPid, PidMap, TargetFd},
};

pub use self::{
    error::{FileError, Result},
    ghost::{Lost, Options as GhostOptions, Revived},
    install::{FileUser, Installer},
    options::{DumpOptions, External, Inherited, RestoreOptions},
    sock::unix::Options as UnixOptions,
    table::FileTable,
    tty::Options as TerminalOptions,
    validation::{BuildIds, Validation},
};

/// An open file description of the tree, while dumping.
#[derive(Debug)]
pub struct Description {
    /// Its number in the images.
    pub id: u32,
    /// A descriptor of this program that leads to the same description.
    pub fd: OwnedFd,
    /// A process that has it open.
    pub pid: HostPid,
    /// The descriptor's number in that process; -1 if it is none but was found in
    /// the queue of a socket.
    pub number: TargetFd,
    /// `fstat(2)`.
    pub stat: libc::stat,
    /// Status flags and access mode (`F_GETFL`).
    pub flags: u32,
    /// What `/proc/PID/fd/N` leads to.
    pub link: Vec<u8>,
    /// `/proc/PID/fdinfo/N`.
    pub info: FdInfo,
    /// Who is told of events (`F_GETOWN_EX`, `F_GETSIG`).
    pub fown: proto::FownEntry,
}

impl Description {
    /// Returns the status flags as images have them.
    pub fn status(&self) -> u32 {
        self.flags & !libc::O_CLOEXEC.cast_unsigned()
    }

    /// Returns [`FileError::Unsupported`] for this file.
    pub fn unsupported(&self, what: impl Into<String>, help: &'static str) -> FileError {
        FileError::Unsupported { pid: self.pid, fd: self.number, what: what.into(), help }
    }

    /// Returns [`FileError::Dump`] for this file, ready for `map_err`.
    pub fn failed(&self, step: &'static str) -> impl Fn(Errno) -> FileError + '_ {
        move |source| FileError::Dump {
            pid: self.pid,
            fd: self.number,
            link: String::from_utf8_lossy(&self.link).into_owned(),
            step,
            source,
        }
    }

    /// Whether the file has this type (`S_IFIFO`, ...; `inode(7)`).
    pub fn is_type(&self, format: libc::mode_t) -> bool {
        self.stat.st_mode & libc::S_IFMT == format
    }

    /// Whether the link is that of an anonymous inode of this name
    /// (`anon_inode:[eventfd]`).
    pub fn is_anonymous(&self, name: &str) -> bool {
        self.link.strip_prefix(b"anon_inode:") == Some(name.as_bytes())
    }
}

/// Takes in descriptions that are found inside others, such as descriptors that
/// are queued in a socket.
pub trait Intake {
    /// Enters a description, unless it is known, and returns its number. `from` is
    /// the file in which it was found.
    ///
    /// # Errors
    /// What keeps it from being looked at.
    fn enter(&mut self, fd: OwnedFd, from: &Description) -> Result<u32>;

    /// Returns a number for an entry of `files.img` that is no open description of
    /// the tree, such as the path of a FIFO (`fifo_entry.regf_id`).
    fn new_id(&mut self) -> u32;

    /// Adds an entry of `files.img` with such a number.
    fn push(&mut self, entry: proto::FileEntry);

    /// Returns an entry of `files.img` that was collected before.
    fn entry(&mut self, id: u32) -> Option<&mut proto::FileEntry>;

    /// Whether a process or thread with this number is in the tree.
    fn has_process(&self, pid: NsPid) -> bool;

    /// Returns the numbers that processes have in the images.
    fn pids(&self) -> &PidMap;

    /// Returns the files without names that were found so far, of all kinds. Who
    /// owns the table writes it ([`Lost::write`]) after all kinds are finished.
    fn lost(&mut self) -> &mut Lost;

    /// Returns the build-ids that are known so far, and how files are told apart.
    fn build_ids(&mut self) -> (&mut BuildIds, Validation);
}

/// Dumps the descriptions of one kind.
pub trait Collector {
    /// Whether the description is of this kind. Kinds are asked in the order of
    /// [`KINDS`].
    fn claims(&self, file: &Description) -> bool;

    /// Returns what `files.img` says of the description. Nothing may change by it.
    ///
    /// # Errors
    /// [`FileError::Unsupported`] for states that are not dumped; whatever fails.
    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry>;

    /// Adds entries for what is needed and belongs to no process of the tree, after all
    /// descriptions were collected, and checks that nothing else is missing.
    ///
    /// # Errors
    /// As [`Collector::collect`].
    fn settle(&mut self, _intake: &mut dyn Intake) -> Result<()> {
        Ok(())
    }

    /// Writes the other images of the kind, after all descriptions of the tree
    /// were collected, and checks that nothing they need is missing.
    ///
    /// # Errors
    /// As [`Collector::collect`].
    fn finish(&mut self, _images: &SnapshotWriter) -> Result<()> {
        Ok(())
    }
}

/// A number that no description has: the kernel's images begin with 1.
pub const NO_DESCRIPTION: u32 = 0;

/// Descriptions that were opened for a restore, by their numbers in the images.
#[derive(Debug)]
pub struct Opened {
    /// The images.
    pub images: Store,
    /// What is compared to tell a file from another one.
    pub validation: Validation,
    /// What the caller provides.
    pub inherited: Inherited,
    /// All entries of `files.img`, also of other kinds.
    pub entries: HashMap<u32, proto::FileEntry>,
    /// Files without names that were made again.
    pub revived: Revived,
    /// Build-ids of the files that were opened.
    pub build_ids: BuildIds,
    /// Shared memory by its `shmid`: what all mappings and descriptions of it
    /// come from. Who fills it may find it here, or put it here first.
    pub objects: HashMap<u64, OwnedFd>,
    /// Descriptions that stand for what cannot be opened yet.
    pub late: HashMap<u32, Late>,
    /// The processes and threads that will be there.
    pub processes: HashSet<NsPid>,
    /// Whether the first process of the tree leads its group.
    pub root_leads_group: bool,
    /// Which process here each number in the images is.
    pub pids: PidMap,
    /// A process that has each description; the other descriptions, which are queued
    /// somewhere, are taken to be of that of [`NO_DESCRIPTION`].
    pub holders: HashMap<u32, owner::Holder>,
    fds: HashMap<u32, OwnedFd>,
}

/// When a file is opened that is no file before the tree is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Late {
    /// By this program, when all processes and threads are there.
    ByPath,
    /// By [`Opener::install`], in the first process that has it. The others get the
    /// description from there.
    Inside,
}

impl Opened {
    /// Returns a table without descriptions for `images`.
    pub fn new(
        images: &Store,
        options: &RestoreOptions,
        entries: Vec<proto::FileEntry>,
        pids: PidMap,
    ) -> Self {
        let entries = entries.into_iter().map(|entry| (entry.id, entry)).collect();
        Self {
            images: Arc::clone(images),
            validation: options.validation,
            inherited: options.inherited.clone(),
            entries,
            revived: Revived::default(),
            build_ids: BuildIds::default(),
            objects: HashMap::new(),
            late: HashMap::new(),
            processes: HashSet::new(),
            root_leads_group: false,
            pids,
            holders: HashMap::new(),
            fds: HashMap::new(),
        }
    }

    /// Adds a description.
    pub fn insert(&mut self, id: u32, fd: OwnedFd) {
        self.fds.insert(id, fd);
    }

    /// Returns a description that was opened before.
    ///
    /// # Errors
    /// [`FileError::Image`] if there is none of this number.
    pub fn get(&self, id: u32) -> Result<BorrowedFd<'_>> {
        let missing = || FileError::Image { id, problem: "it is used but was not opened".into() };
        self.fds.get(&id).map(AsFd::as_fd).ok_or_else(missing)
    }

    /// Returns the process that a description is taken to be of.
    pub fn holder(&self, id: u32) -> Option<&owner::Holder> {
        self.holders.get(&id).or_else(|| self.holders.get(&NO_DESCRIPTION))
    }

    /// Whether a description was opened.
    pub fn contains(&self, id: u32) -> bool {
        self.fds.contains_key(&id)
    }

    /// Returns all descriptions.
    pub fn iter(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.fds.iter().map(|(id, fd)| (*id, fd.as_fd()))
    }
}

/// Restores the descriptions of one kind.
pub trait Opener {
    /// Makes the shared memory of the kind, without its bytes, in [`Opened::objects`], before
    /// anything is opened. Returns its `shmid`s.
    ///
    /// # Errors
    /// [`FileError::Memory`]; those of reading an image.
    fn make_memory(&mut self, _opened: &mut Opened) -> Result<Vec<u64>> {
        Ok(Vec::new())
    }

    /// Sets what keeps memory from being changed, after all of it was mapped and filled.
    ///
    /// # Errors
    /// [`FileError::Restore`].
    fn seal(&mut self, _opened: &Opened) -> Result<()> {
        Ok(())
    }

    /// Opens the descriptions of these entries, which are all of the kind, and
    /// adds them to `opened`. Nothing may depend on other kinds here.
    ///
    /// # Errors
    /// Whatever fails; what was opened by then is closed.
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()>;

    /// Puts into the descriptions what they hold of others, after those of all kinds
    /// were opened, also late.
    ///
    /// # Errors
    /// Whatever fails.
    fn fill(&mut self, _opened: &Opened) -> Result<()> {
        Ok(())
    }

    /// Returns the descriptions that are held inside of others of the kind, by what its
    /// images say.
    ///
    /// # Errors
    /// Those of reading an image.
    fn inside(&self, _opened: &Opened) -> Result<Vec<u32>> {
        Ok(Vec::new())
    }

    /// Makes what processes need beside the descriptors of the images, after the
    /// descriptions of all kinds were opened. `keep` returns a duplicate in no process's way.
    ///
    /// # Errors
    /// Whatever fails.
    fn carry(
        &mut self,
        _opened: &Opened,
        _keep: &dyn Fn(BorrowedFd<'_>) -> Result<OwnedFd>,
    ) -> Result<()> {
        Ok(())
    }

    /// Opens the file of an entry once more, with these flags, for something that is no
    /// descriptor: see [`Usage`].
    ///
    /// # Errors
    /// [`FileError::Image`] if it is another file; whatever fails.
    fn reopen(
        &mut self,
        entry: &proto::FileEntry,
        _flags: i32,
        _opened: &mut Opened,
    ) -> Result<OwnedFd> {
        Err(FileError::image(entry.id, NOT_BY_PATH))
    }

    /// Checks that a file of which a process has a private mapping is as it was. `fd` was
    /// opened by [`Opener::reopen`].
    ///
    /// # Errors
    /// [`FileError::Image`].
    fn check_unwritten(
        &self,
        _entry: &proto::FileEntry,
        _fd: BorrowedFd<'_>,
        _opened: &Opened,
    ) -> Result<()> {
        Ok(())
    }

    /// Whether the file is there only when all processes are, as those in `/proc/PID` are.
    fn is_late(&self, _entry: &proto::FileEntry, _opened: &Opened) -> bool {
        false
    }

    /// Opens a description that stood for what could not be opened yet ([`Late::ByPath`]).
    ///
    /// # Errors
    /// As [`Opener::reopen`].
    fn open_late(&mut self, entry: &proto::FileEntry, _opened: &mut Opened) -> Result<OwnedFd> {
        Err(FileError::image(entry.id, NOT_BY_PATH))
    }

    /// Sets what depends on the state of processes in a description that was opened late, when
    /// nothing of that changes any more.
    ///
    /// # Errors
    /// [`FileError::Restore`].
    fn complete(&self, _entry: &proto::FileEntry, _opened: &Opened) -> Result<()> {
        Ok(())
    }

    /// Adds the calls that have to be made in a process which has the description
    /// at the number `fd`, once for each description, when all descriptors of the
    /// process are in place.
    ///
    /// # Errors
    /// [`FileError::Image`].
    fn install(
        &mut self,
        _entry: &proto::FileEntry,
        _fd: TargetFd,
        _script: &mut Script,
    ) -> Result<()> {
        Ok(())
    }

    /// Like [`Opener::install`], after everything is in its place that is opened late.
    ///
    /// # Errors
    /// [`FileError::Image`].
    fn watch(
        &mut self,
        _entry: &proto::FileEntry,
        _fd: TargetFd,
        _script: &mut Script,
    ) -> Result<()> {
        Ok(())
    }

    /// Adds the calls that only this process can make, which is there and has what
    /// descriptions lead to: `at` tells at which number.
    ///
    /// # Errors
    /// What `at` returns.
    fn prepare_process(
        &mut self,
        _pid: NsPid,
        _at: &dyn Fn(u32) -> Result<TargetFd>,
        _script: &mut Script,
    ) -> Result<()> {
        Ok(())
    }

    /// Starts what runs by itself, such as timers, right before the tree goes on.
    ///
    /// # Errors
    /// Whatever fails.
    fn start(&mut self, _opened: &Opened) -> Result<()> {
        Ok(())
    }
}

/// Why [`Opener::reopen`] fails.
const NOT_BY_PATH: &str = "it is used as a file with a path, but is none in files.img";

/// What the files of a kind are used for beside descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// For nothing. All of them are opened, and stand for something even if no process has a
    /// descriptor of them.
    Descriptor,
    /// They are programs, directories that processes stand in, mapped files, or name a file
    /// of another kind. For a descriptor they are opened only if there is one.
    Path,
    /// They are shared memory that is mapped. Their bytes are dumped.
    Memory,
}

/// One row of the table of kinds.
#[derive(Clone, Copy)]
pub struct FileKind {
    /// What it is called in messages.
    pub name: &'static str,
    /// The types that it has in images.
    pub types: &'static [proto::FdTypes],
    /// What they are used for beside descriptors.
    pub usage: Usage,
    /// Makes what dumps it.
    pub collector: fn(&DumpOptions) -> Box<dyn Collector>,
    /// Makes what restores it.
    pub opener: fn(&RestoreOptions) -> Box<dyn Opener>,
}

impl std::fmt::Debug for FileKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl FileKind {
    /// Returns the position in [`KINDS`] of the kind that an entry is of.
    fn of(entry: &proto::FileEntry) -> Option<usize> {
        Self::of_type(entry.r#type)
    }

    /// Returns the position in [`KINDS`] of the kind with this type.
    fn of_type(number: i32) -> Option<usize> {
        KINDS.iter().position(|kind| kind.types.iter().any(|of| i32::from(*of) == number))
    }
}

/// All kinds. A description is of the first kind that claims it.
pub static KINDS: &[FileKind] = &[
    memfd::KIND,
    tty::KIND,
    regular::KIND,
    pipe::KIND,
    pipe::FIFO,
    eventfd::KIND,
    signalfd::KIND,
    timerfd::KIND,
    sock::inet::KIND,
    sock::netlink::KIND,
    sock::unix::KIND,
    sock::rest::KIND,
    eventpoll::KIND,
];
