//! Open file descriptions.
//!
//! Each kind has one file, which both dumps and restores it, and one row in [`KINDS`].
//!
//! The dump duplicates every descriptor of the tree with `pidfd_getfd(2)`, so it can read
//! most of the state of a description from outside. The restore opens each description once,
//! in its own process. The new processes inherit it, so descriptions that processes shared
//! are shared again.

mod deferred;
mod descriptor;
mod error;
mod eventfd;
mod eventpoll;
mod fown;
mod ghost;
mod install;
mod listeners;
mod lock;
mod memfd;
mod mqueue;
mod namespace;
mod network;
mod options;
mod owner;
mod path;
mod pidfd;
mod pipe;
mod regular;
mod signalfd;
mod sock;
mod table;
#[cfg(test)]
mod testing;
mod timerfd;
mod tty;
mod tun;
mod unsupported;
mod validation;
mod watch;

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    ffi::OsStr,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    rc::Rc,
    sync::Arc,
};

use nix::{errno::Errno, libc};

use crate::{
    image::{SnapshotWriter, Store, proto},
    inject::{Helpers, Script},
    proc::{FdInfo, LockKind, LockMode},
    res::{
        ResError,
        ns::{OfTree, Roots, Wanted},
    },
    sys::{root::Root, visit::Place},
    units::{HostPid, NsPid, PidMap, TargetFd},
};

pub use self::{
    error::{FileError, Result},
    ghost::{DeletedFiles, Options as GhostOptions, Recreated},
    install::{FileUser, Installer},
    listeners::Listeners,
    lock::Options as LockOptions,
    network::{Made, Network},
    options::{DumpOptions, External, Inherited, RestoreOptions},
    sock::{
        inet::{
            Connections, DumpOptions as ConnectionsToDump, PacketLock,
            RestoreOptions as ConnectionsToRestore, end_repairs,
        },
        unix::Options as UnixOptions,
    },
    table::FileTable,
    tty::{Options as TerminalOptions, Orphans, TakeMaster, return_bytes as return_terminal_bytes},
    validation::{BuildIds, Validation},
    watch::Options as WatchOptions,
};

/// An open file description of the tree, during a dump.
#[derive(Debug)]
pub struct Description {
    /// Its number in the images.
    pub id: u32,
    /// A duplicate of the descriptor, in the dumper.
    pub fd: OwnedFd,
    /// A process that has it open.
    pub pid: HostPid,
    /// The descriptor's number in that process; -1 for a file without one, such as a file
    /// queued in a socket.
    pub number: TargetFd,
    /// `fstat(2)`.
    pub stat: libc::stat,
    /// Status flags and access mode (`F_GETFL`).
    pub flags: u32,
    /// The target of `/proc/PID/fd/N`.
    pub link: Vec<u8>,
    /// `/proc/PID/fdinfo/N`.
    pub info: FdInfo,
    /// The process that receives signals for the file (`F_GETOWN_EX`, `F_GETSIG`).
    pub fown: proto::FownEntry,
    /// The network namespace of a socket.
    pub network: Option<Rc<Network>>,
}

impl Description {
    /// Returns the number of the network namespace of a socket.
    pub fn network_number(&self) -> u32 {
        let number = self.network.as_ref().map(|network| network.number);
        number.expect("sockets have a network namespace")
    }

    /// Returns the status flags in the form of the images: without `O_CLOEXEC`.
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

    /// Whether the description has a write lease, which opening the file again would break.
    pub fn has_write_lease(&self) -> bool {
        let mut leases = self.info.locks.iter().filter(|lock| lock.kind == LockKind::Lease);
        leases.any(|lease| lease.mode != LockMode::Read || lease.is_breaking)
    }

    /// Whether the file is an anonymous inode with this name (`[eventfd]` for
    /// `anon_inode:[eventfd]`).
    pub fn is_anonymous(&self, name: &str) -> bool {
        self.link.strip_prefix(b"anon_inode:") == Some(name.as_bytes())
    }
}

/// A descriptor by which a process holds locks, during a dump.
#[derive(Clone, Copy, Debug)]
pub struct Locked<'a> {
    /// The process, or a thread of it.
    pub pid: HostPid,
    /// The descriptor; -1 for a file that is only queued in a socket.
    pub number: TargetFd,
    /// The number of the description in the images.
    pub file: u32,
    /// The target of `/proc/PID/fd/N`.
    pub link: &'a [u8],
    /// `/proc/PID/fdinfo/N`, with the locks.
    pub info: &'a FdInfo,
}

/// What a kind may ask of the file table during a dump, and add to it.
pub trait Intake {
    /// Enters a description that was found inside the file `from`, such as a descriptor
    /// queued in a socket. Returns its number, which may be known already.
    fn enter(&mut self, fd: OwnedFd, from: &Description) -> Result<u32>;

    /// Returns a number for an entry of `files.img` that is not an open description, such as
    /// the path of a FIFO (`fifo_entry.regf_id`).
    fn new_id(&mut self) -> u32;

    /// Adds an entry of `files.img` that has such a number.
    fn push(&mut self, entry: proto::FileEntry);

    /// Returns an entry of `files.img` that was collected earlier.
    fn entry(&mut self, id: u32) -> Option<&mut proto::FileEntry>;

    /// Whether the tree has a process or thread with this number.
    fn has_process(&self, pid: NsPid) -> bool;

    /// Returns the map between the pids of the images and of the host.
    fn pids(&self) -> &PidMap;

    /// Returns the namespaces of the tree.
    fn namespaces(&self) -> &OfTree;

    /// Returns the root directories in which paths of the tree are looked up.
    fn roots(&self) -> &Roots;

    /// Returns the one in which the path of a file is looked up.
    fn root_of(&self, file: &Description) -> &Root {
        self.roots().root(self.place_of(file))
    }

    /// Returns the position among [`Self::roots`] of the one below which a file is.
    fn place_of(&self, file: &Description) -> usize {
        let path = Path::new(OsStr::from_bytes(&file.link));
        let is_there = |root: &Root| {
            let found =
                if file.is_type(libc::S_IFLNK) { root.lstat(path) } else { root.stat(path) };
            found.is_ok_and(|stat| {
                (stat.st_dev, stat.st_ino) == (file.stat.st_dev, file.stat.st_ino)
            })
        };
        self.roots().position_of_file(file.info.mnt_id, self.pids().ns(file.pid), is_there)
    }

    /// Returns the mount of a file as images name it.
    fn mount_of(&self, file: &Description) -> Option<i32> {
        self.roots().mount_at(self.place_of(file), file.info.mnt_id)
    }

    /// Returns the deleted files found so far, of all kinds. The file table writes them
    /// ([`DeletedFiles::write`]) after all kinds have finished.
    fn deleted_files(&mut self) -> &mut DeletedFiles;

    /// Returns the files whose reads the tree is notified of.
    fn listeners(&self) -> &Listeners;

    /// Returns the build IDs found so far, and the `--file-validation` method.
    fn build_ids(&mut self) -> (&mut BuildIds, Validation);
}

/// Dumps the descriptions of one kind.
pub trait Collector {
    /// Whether the description is of this kind. [`KINDS`] are tried in order.
    fn claims(&self, file: &Description) -> bool;

    /// Builds the entry of `files.img` for a description. Must not change any state.
    ///
    /// # Errors
    /// [`FileError::Unsupported`] for state that rcriu does not dump.
    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry>;

    /// Sees a descriptor by which a process holds file locks, before the description is collected.
    ///
    /// # Errors
    /// [`FileError::Unsupported`] for locks that rcriu does not dump.
    fn locked(&mut self, _at: &Locked<'_>) -> Result<()> {
        Ok(())
    }

    /// Adds entries for files outside the tree that the collected descriptions need. Runs
    /// after all descriptions were collected, and checks that nothing else is missing.
    fn after_collect(&mut self, _intake: &mut dyn Intake) -> Result<()> {
        Ok(())
    }

    /// Writes the other images of the kind. Runs after [`Collector::after_collect`] of all kinds, and
    /// checks that nothing that these images need is missing.
    fn finish(&mut self, _images: &SnapshotWriter) -> Result<()> {
        Ok(())
    }

    /// Records state of the kind in the inventory, after [`Collector::finish`].
    fn note(&self, _inventory: &mut proto::InventoryEntry) {}

    /// Prepares for the dump killing the tree, so that the kernel sends nothing to peers outside
    /// the tree. `dump` is the unique name of the dump.
    ///
    /// # Errors
    /// [`FileError::Dump`].
    fn prepare_kill(&mut self, _dump: &str) -> Result<()> {
        Ok(())
    }
}

/// A number that no description has: numbers start at 1.
pub const NO_DESCRIPTION: u32 = 0;

/// The descriptions that a restore has opened, by their numbers in the images.
#[derive(Debug)]
pub struct Opened {
    /// The snapshot that is restored.
    pub images: Store,
    /// How the restore checks that a file is the one that was dumped.
    pub validation: Validation,
    /// The descriptors that the user provides for external resources.
    pub inherited: Inherited,
    /// All entries of `files.img`, of every kind.
    pub entries: HashMap<u32, proto::FileEntry>,
    /// Deleted files that the restore has recreated.
    pub recreated: Recreated,
    /// Build IDs of the files opened so far.
    pub build_ids: BuildIds,
    /// Shared memory objects by `shmid`; all mappings and descriptions of an object use this
    /// one. The first kind that needs an object creates it here.
    pub objects: HashMap<u64, OwnedFd>,
    /// Deferred descriptions, which are placeholders for now.
    pub deferred: HashMap<u32, Deferred>,
    /// All processes and threads of the tree.
    pub processes: HashSet<NsPid>,
    /// The process groups of all living processes of the tree.
    pub groups: HashSet<NsPid>,
    /// Whether the root process of the tree leads its process group.
    pub root_leads_group: bool,
    /// Maps pids of the images to pids of the host.
    pub pids: PidMap,
    /// The mounts that are made only with the first process of a pid namespace.
    pub later_mounts: HashSet<i32>,
    /// The root directories in which the paths of the images are looked up.
    pub roots: Roots,
    /// The network namespaces of the tree.
    pub networks: Rc<Made>,
    /// The IPC namespaces of the tree that the first process is not in, by number.
    pub ipc_namespaces: HashMap<u32, std::fs::File>,
    /// Masters of pseudoterminals that are open already, since a mount shows their slaves.
    pub masters: RefCell<Vec<OwnedFd>>,
    /// Makes processes that make calls with the ids of others.
    pub helpers: Helpers,
    /// A process that has each description open. The entry for [`NO_DESCRIPTION`] stands for
    /// descriptions that are only queued in a socket.
    pub holders: HashMap<u32, owner::Holder>,
    fds: HashMap<u32, Rc<OwnedFd>>,
}

/// How a deferred description is opened: one that cannot exist before the tree does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deferred {
    /// The restore opens it once all processes and threads exist.
    ByPath,
    /// [`Opener::install`] opens it in the first process that has it. The restore then
    /// duplicates it for the other processes.
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
            later_mounts: HashSet::new(),
            images: Arc::clone(images),
            validation: options.validation,
            inherited: options.inherited.clone(),
            entries,
            recreated: Recreated::default(),
            build_ids: BuildIds::default(),
            objects: HashMap::new(),
            deferred: HashMap::new(),
            processes: HashSet::new(),
            groups: HashSet::new(),
            root_leads_group: false,
            pids,
            roots: Roots::default(),
            networks: Rc::default(),
            ipc_namespaces: HashMap::new(),
            masters: RefCell::default(),
            helpers: Helpers::default(),
            holders: HashMap::new(),
            fds: HashMap::new(),
        }
    }

    /// Sets the namespaces of the tree, whose first process exists.
    ///
    /// # Errors
    /// A process is gone, or rcriu may not enter its namespaces.
    pub fn set_namespaces(
        &mut self,
        made: &mut Wanted,
        first: HostPid,
    ) -> std::result::Result<(), ResError> {
        self.roots = made.roots(first)?;
        self.later_mounts = made.later_mounts().into_iter().collect();
        let path = || format!("/proc/{first}/ns/{}", network::NAME).into();
        let failed = |source| ResError::Read { path: path(), source };
        let networks = Rc::get_mut(&mut self.networks).expect("no file is open");
        if let Some(number) = made.number_of(network::NAME) {
            networks.set_home(number, first).map_err(failed)?;
        }
        for (number, entrance) in made.others(network::NAME).map_err(failed)? {
            networks.add(number, entrance);
        }
        self.ipc_namespaces = made.others(Place::Ipc.file()).map_err(failed)?.into_iter().collect();
        for (number, devices) in made.take_devices() {
            networks.hold(number, devices);
        }
        Ok(())
    }

    /// Adds a description.
    pub fn insert(&mut self, id: u32, fd: OwnedFd) {
        self.fds.insert(id, Rc::new(fd));
    }

    /// Adds a description, or replaces its descriptor; other code may hold the same descriptor.
    pub fn insert_shared(&mut self, id: u32, fd: Rc<OwnedFd>) {
        self.fds.insert(id, fd);
    }

    /// Returns the descriptor of a description, to hold it.
    pub fn shared(&self, id: u32) -> Option<Rc<OwnedFd>> {
        self.fds.get(&id).cloned()
    }

    /// Returns a description that is open.
    ///
    /// # Errors
    /// [`FileError::Image`] if no description has this number.
    pub fn get(&self, id: u32) -> Result<BorrowedFd<'_>> {
        let missing = || FileError::Image { id, problem: "it is used but was not opened".into() };
        self.fds.get(&id).map(|fd| fd.as_fd()).ok_or_else(missing)
    }

    /// Returns a process that has the description, or the fallback for queued ones.
    pub fn holder(&self, id: u32) -> Option<&owner::Holder> {
        self.holders.get(&id).or_else(|| self.holders.get(&NO_DESCRIPTION))
    }

    /// Returns the root directory in which the path of a file is looked up.
    pub fn root_of(&self, entry: &proto::RegFileEntry) -> &Root {
        self.roots.of_mount(entry.mnt_id)
    }

    /// Returns the root directory in which the paths of a description without a mount are looked up:
    /// that of a process which has it open.
    pub fn root_for(&self, id: u32) -> &Root {
        let holder = self.holder(id);
        holder.map_or(self.roots.of_mount(None), |holder| self.roots.of_process(holder.pid))
    }

    /// Whether a description is open.
    pub fn contains(&self, id: u32) -> bool {
        self.fds.contains_key(&id)
    }

    /// Returns all open descriptions.
    pub fn iter(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.fds.iter().map(|(id, fd)| (*id, fd.as_fd()))
    }
}

/// Restores the descriptions of one kind.
pub trait Opener {
    /// Creates the shared memory objects of the kind in [`Opened::objects`], still empty.
    /// Runs before any file is opened. Returns their `shmid`s.
    fn make_memory(&mut self, _opened: &mut Opened) -> Result<Vec<u64>> {
        Ok(Vec::new())
    }

    /// Seals shared memory objects, after all of them were mapped and filled.
    fn seal(&mut self, _opened: &Opened) -> Result<()> {
        Ok(())
    }

    /// Opens the descriptions of these entries, which are all entries of the kind, and
    /// adds them to `opened`. Must not depend on other kinds.
    ///
    /// # Errors
    /// The first entry that cannot be opened. The descriptions opened before it are closed.
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()>;

    /// Puts other descriptions into those of the kind, such as those queued in a socket. Runs
    /// after all kinds have opened theirs, the deferred ones included.
    fn fill(&mut self, _opened: &Opened) -> Result<()> {
        Ok(())
    }

    /// Sees all processes with their descriptors, after all kinds have opened their descriptions and
    /// before any process exists. The deferred ones are still placeholders.
    ///
    /// # Errors
    /// State that belongs to a descriptor cannot be restored.
    fn attach(&mut self, _users: &[FileUser<'_>], _opened: &Opened) -> Result<()> {
        Ok(())
    }

    /// Returns the calls by which process `pid` takes state that its descriptors lack, such as file
    /// locks. All its descriptors are in place, and it still has the privileges of the
    /// restorer.
    fn take(&mut self, _pid: NsPid, _opened: &Opened) -> Result<Vec<Script>> {
        Ok(Vec::new())
    }

    /// Runs after all processes have made the calls of [`Opener::take`].
    ///
    /// # Errors
    /// The state cannot be restored.
    fn after_take(&mut self, _opened: &Opened) -> Result<()> {
        Ok(())
    }

    /// Returns the descriptions that the images of the kind say are queued inside its own.
    fn inside(&self, _opened: &Opened) -> Result<Vec<u32>> {
        Ok(Vec::new())
    }

    /// Opens files that processes need besides their descriptors, after all kinds have
    /// opened their descriptions. `keep` duplicates a descriptor above all numbers that the
    /// tree uses.
    fn open_extra(
        &mut self,
        _opened: &Opened,
        _keep: &dyn Fn(BorrowedFd<'_>) -> Result<OwnedFd>,
    ) -> Result<()> {
        Ok(())
    }

    /// Opens the file of an entry again with `flags`, for a use other than a descriptor: see
    /// [`Usage`].
    ///
    /// # Errors
    /// [`FileError::Image`] if the path now leads to another file.
    fn reopen(
        &mut self,
        entry: &proto::FileEntry,
        _flags: i32,
        _opened: &mut Opened,
    ) -> Result<OwnedFd> {
        Err(FileError::image(entry.id, NOT_BY_PATH))
    }

    /// Checks that a privately mapped file has not changed since the dump. `fd` comes from
    /// [`Opener::reopen`].
    ///
    /// # Errors
    /// [`FileError::Image`] if it has.
    fn check_unwritten(
        &self,
        _entry: &proto::FileEntry,
        _fd: BorrowedFd<'_>,
        _opened: &Opened,
    ) -> Result<()> {
        Ok(())
    }

    /// Whether the file cannot exist before all processes do, like those in `/proc/PID`.
    fn is_deferred(&self, _entry: &proto::FileEntry, _opened: &Opened) -> bool {
        false
    }

    /// Opens a deferred description ([`Deferred::ByPath`]).
    fn open_deferred(&mut self, entry: &proto::FileEntry, _opened: &mut Opened) -> Result<OwnedFd> {
        Err(FileError::image(entry.id, NOT_BY_PATH))
    }

    /// Restores what depends on the state of processes in a deferred description, once that
    /// state is final.
    fn complete(&self, _entry: &proto::FileEntry, _opened: &Opened) -> Result<()> {
        Ok(())
    }

    /// Adds the calls that only a process which has the description, as `fd`, can make. Runs
    /// once for each description, when all descriptors of the process are in place.
    fn install(
        &mut self,
        _entry: &proto::FileEntry,
        _fd: TargetFd,
        _script: &mut Script,
    ) -> Result<()> {
        Ok(())
    }

    /// Adds the calls that register events of other descriptors. Runs like
    /// [`Opener::install`], but after the deferred descriptions are in place.
    fn watch(
        &mut self,
        _entry: &proto::FileEntry,
        _fd: TargetFd,
        _script: &mut Script,
    ) -> Result<()> {
        Ok(())
    }

    /// Adds the calls of process `pid` when it has become the leader of a session, before it makes
    /// other processes of it. It has the descriptors of the restorer.
    fn begin_session(&self, _pid: NsPid, _script: &mut Script) {}

    /// Adds the calls that only process `pid` can make, before its descriptors are installed.
    /// `at` returns the number of a description in that process.
    fn prepare_process(
        &mut self,
        _pid: NsPid,
        _at: &dyn Fn(u32) -> Result<TargetFd>,
        _script: &mut Script,
    ) -> Result<()> {
        Ok(())
    }

    /// Like [`Opener::prepare_process`], but adds the calls that the process makes once its
    /// descriptors are installed. `at` returns `None` for a description that it does not have.
    fn finish_process(
        &mut self,
        _pid: NsPid,
        _at: &dyn Fn(u32) -> Option<TargetFd>,
        _script: &mut Script,
    ) -> Result<()> {
        Ok(())
    }

    /// Starts descriptions that act on their own, such as timers, right before the tree resumes.
    fn start(&mut self, _opened: &Opened) -> Result<()> {
        Ok(())
    }

    /// Reconnects descriptions to peers outside the tree. Runs after all steps that may fail, since
    /// peers notice it. It is the counterpart of [`Collector::prepare_kill`].
    ///
    /// # Errors
    /// The error of the first description that cannot be reconnected.
    fn reconnect(&mut self, _opened: &Opened) -> Result<()> {
        Ok(())
    }
}

/// The reason why [`Opener::reopen`] fails.
const NOT_BY_PATH: &str = "it is used as a file with a path, but files.img has none for it";

/// How files of a kind are used besides by descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// Nothing else. The restore opens every entry, even one that no process has a descriptor
    /// of: it may stand for a file outside the tree.
    Descriptor,
    /// Programs, working and root directories, mapped files, paths of files of other kinds.
    /// The restore opens an entry as a description only if a process has a descriptor of it.
    Path,
    /// Mapped shared memory, whose bytes are dumped.
    Memory,
}

/// One row of the table of kinds.
#[derive(Clone, Copy)]
pub struct FileKind {
    /// Its name in messages.
    pub name: &'static str,
    /// Its entry types in `files.img`.
    pub types: &'static [proto::FdTypes],
    /// How it is used besides by descriptors.
    pub usage: Usage,
    /// Creates the dumping half.
    pub collector: fn(&DumpOptions) -> Box<dyn Collector>,
    /// Creates the restoring half.
    pub opener: fn(&RestoreOptions) -> Box<dyn Opener>,
}

impl std::fmt::Debug for FileKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl FileKind {
    /// Returns the index in [`KINDS`] of the kind of an entry.
    fn of(entry: &proto::FileEntry) -> Option<usize> {
        Self::of_type(entry.r#type)
    }

    /// Returns the index in [`KINDS`] of the kind that has this type.
    fn of_type(number: i32) -> Option<usize> {
        KINDS.iter().position(|kind| kind.types.iter().any(|of| i32::from(*of) == number))
    }
}

/// Whether a restore supports files of a type: whether a kind has it.
pub fn is_restored(file: proto::FdTypes) -> bool {
    FileKind::of_type(file.into()).is_some()
}

/// All kinds. The first one that claims a description dumps it.
pub static KINDS: &[FileKind] = &[
    memfd::KIND,
    tty::KIND,
    // Its queues are regular files, too.
    mqueue::KIND,
    // Its path leads to a device, too.
    tun::KIND,
    regular::KIND,
    pipe::KIND,
    pipe::FIFO,
    eventfd::KIND,
    signalfd::KIND,
    timerfd::KIND,
    watch::INOTIFY,
    watch::FANOTIFY,
    pidfd::KIND,
    namespace::KIND,
    sock::inet::KIND,
    sock::netlink::KIND,
    sock::packet::KIND,
    sock::unix::KIND,
    sock::unsupported::KIND,
    eventpoll::KIND,
    unsupported::KIND,
    // Claims no description.
    lock::KIND,
];
