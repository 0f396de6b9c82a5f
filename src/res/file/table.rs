//! The open files of a tree, during a dump: which descriptions exist, and which processes share
//! them.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashMap, HashSet},
    ffi::OsStr,
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::PathBuf,
    rc::Rc,
};

use nix::{
    libc,
    sys::stat::{FileStat, fstat, makedev},
};

use super::{
    BuildIds, Collector, DeletedFiles, Description, DumpOptions, FileError, FileKind, Intake,
    KINDS, Listeners, Locked, Result, Usage, Validation, descriptor, fown, network::Seen, owner,
    path,
};
use crate::{
    image::{Kind, SnapshotWriter, proto, split_files},
    proc::{self, FdInfo, Mapping},
    res::ns::{OfTree, Roots},
    sys::{
        fds,
        process::{self, Shared},
        tun,
    },
    units::{HostPid, NsPid, PidMap, TargetFd},
};

/// The value of [`Description::number`] for files without a descriptor.
const NO_DESCRIPTOR: TargetFd = TargetFd(-1);

/// All open files of a tree.
pub struct FileTable {
    own: HostPid,
    collectors: Vec<Option<Box<dyn Collector>>>,
    state: Known,
}

/// The part of the table that kinds may use while they collect a description.
struct Known {
    own: HostPid,
    pids: PidMap,
    namespaces: Rc<OfTree>,
    /// Where paths of the tree are looked up.
    roots: Roots,
    /// The processes and threads of the tree.
    processes: HashSet<NsPid>,
    next_id: u32,
    /// Descriptions by device and inode, sorted by `kcmp(2)`.
    known: HashMap<(u64, u64), Vec<(u32, OwnedFd)>>,
    /// Files known by path, by mount namespace, device, inode and path.
    paths: HashMap<(usize, u64, u64, Vec<u8>), u32>,
    /// Mapped files, by the mount namespace of the process and what `/proc/PID/maps` shows of them.
    mapped: HashMap<(usize, u32, u32, u64, Vec<u8>), u32>,
    /// Descriptions found inside other files and not collected yet.
    pending: Vec<Pending>,
    entries: Vec<proto::FileEntry>,
    types: HashMap<u32, i32>,
    deleted: DeletedFiles,
    build_ids: BuildIds,
    listeners: Listeners,
    validation: Validation,
    networks: Seen,
}

struct Pending {
    id: u32,
    fd: OwnedFd,
    pid: HostPid,
}

impl Known {
    fn new_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id
    }

    /// Examines a file. Its owner is that of the images.
    fn examine(&self, fd: impl AsFd) -> nix::Result<FileStat> {
        let mut stat = fstat(fd)?;
        (stat.st_uid, stat.st_gid) = self.pids.ids().ns_owner((stat.st_uid, stat.st_gid));
        Ok(stat)
    }

    /// Returns the number of a description, and gives `fd` back if the description is new.
    fn identify(&mut self, fd: OwnedFd) -> Result<(u32, Option<OwnedFd>)> {
        let failed = |step| FileError::restore(0, step, "a descriptor");
        let stat = fstat(&fd).map_err(failed("examine"))?;
        let known = self.known.entry((stat.st_dev, stat.st_ino)).or_default();
        let mut failure = None;
        let position = known.binary_search_by(|(_, known)| {
            let pair = Shared::File(known.as_raw_fd(), fd.as_raw_fd());
            process::kcmp(self.own, self.own, pair).unwrap_or_else(|errno| {
                failure = Some(errno);
                Ordering::Less
            })
        });
        if let Some(errno) = failure {
            return Err(failed("compare by kcmp(2)")(errno));
        }
        match position {
            Ok(position) => Ok((known[position].0, None)),
            Err(position) => {
                // Keep a duplicate, to compare later descriptors with.
                let kept = fd.try_clone();
                let kept = kept.map_err(|_| failed("duplicate")(nix::errno::Errno::EMFILE))?;
                self.next_id += 1;
                known.insert(position, (self.next_id, kept));
                Ok((self.next_id, Some(fd)))
            }
        }
    }
}

impl Intake for Known {
    fn enter(&mut self, fd: OwnedFd, from: &Description) -> Result<u32> {
        let (id, new) = self.identify(fd)?;
        if let Some(fd) = new {
            self.pending.push(Pending { id, fd, pid: from.pid });
        }
        Ok(id)
    }

    fn new_id(&mut self) -> u32 {
        Self::new_id(self)
    }

    fn push(&mut self, entry: proto::FileEntry) {
        self.entries.push(entry);
    }

    fn entry(&mut self, id: u32) -> Option<&mut proto::FileEntry> {
        self.entries.iter_mut().find(|entry| entry.id == id)
    }

    fn has_process(&self, pid: NsPid) -> bool {
        self.processes.contains(&pid)
    }

    fn pids(&self) -> &PidMap {
        &self.pids
    }

    fn namespaces(&self) -> &OfTree {
        &self.namespaces
    }

    fn roots(&self) -> &Roots {
        &self.roots
    }

    fn deleted_files(&mut self) -> &mut DeletedFiles {
        &mut self.deleted
    }

    fn listeners(&self) -> &Listeners {
        &self.listeners
    }

    fn build_ids(&mut self) -> (&mut BuildIds, Validation) {
        (&mut self.build_ids, self.validation)
    }
}

impl std::fmt::Debug for FileTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileTable").field("entries", &self.state.entries).finish_non_exhaustive()
    }
}

impl FileTable {
    /// Returns an empty table for a tree of these processes and threads.
    pub fn new(options: &DumpOptions, pids: PidMap, processes: HashSet<NsPid>) -> Self {
        let own = HostPid::own();
        Self {
            own,
            collectors: KINDS.iter().map(|kind| Some((kind.collector)(options))).collect(),
            state: Known {
                own,
                pids,
                namespaces: Rc::default(),
                roots: Roots::default(),
                processes,
                next_id: 0,
                known: HashMap::new(),
                paths: HashMap::new(),
                mapped: HashMap::new(),
                pending: Vec::new(),
                entries: Vec::new(),
                types: HashMap::new(),
                deleted: DeletedFiles::new(&options.ghosts, &options.external),
                build_ids: BuildIds::default(),
                listeners: Listeners::default(),
                validation: options.validation,
                networks: Seen::default(),
            },
        }
    }

    /// Sets the namespaces of the tree, and the root directories in which its paths are looked up.
    pub fn set_namespaces(&mut self, namespaces: Rc<OfTree>, roots: Roots) {
        self.state.namespaces = namespaces;
        self.state.roots = roots;
    }

    /// Notes of which files' reads a process is notified. Must be called for all processes first.
    ///
    /// # Errors
    /// The errors of reading `/proc`.
    pub fn add_listeners(&mut self, pid: HostPid) -> Result<()> {
        self.state.listeners.add(pid)
    }

    /// Collects all descriptors of a process and returns the entries of its `fdinfo` image.
    pub fn collect_fds(
        &mut self,
        pid: HostPid,
        pidfd: &OwnedFd,
    ) -> Result<Vec<proto::FdinfoEntry>> {
        let mut entries = Vec::new();
        let descriptors = proc::Descriptors::open(pid)?;
        for number in descriptors.numbers()? {
            entries.push(self.collect_fd(pid, pidfd, &descriptors, number)?);
        }
        self.collect_pending()?;
        Ok(entries)
    }

    /// Collects one descriptor of a process.
    pub(super) fn collect_fd(
        &mut self,
        pid: HostPid,
        pidfd: &OwnedFd,
        descriptors: &proc::Descriptors,
        number: TargetFd,
    ) -> Result<proto::FdinfoEntry> {
        let fd = process::pidfd_getfd(pidfd, number).map_err(|source| FileError::Dump {
            pid,
            fd: number,
            link: "unknown".into(),
            step: "duplicate",
            source,
        })?;
        let info = descriptors.info(number)?;
        let close_on_exec = info.flags & libc::O_CLOEXEC.cast_unsigned() != 0;
        let (id, new) = self.state.identify(fd)?;
        if !info.locks.is_empty() {
            let link = descriptors.link(number)?;
            self.locked(&Locked { pid, number, file: id, link: &link, info: &info })?;
        }
        if let Some(fd) = new {
            let link = descriptors.link(number)?;
            self.collect(id, fd, pid, number, link, info)?;
            // A file that a socket has queued may also have a descriptor, whose entry needs
            // the file's type.
            self.collect_pending()?;
        }
        Ok(proto::FdinfoEntry {
            id,
            flags: if close_on_exec { libc::FD_CLOEXEC.cast_unsigned() } else { 0 },
            r#type: self.state.types.get(&id).copied().unwrap_or_default(),
            fd: number.0.cast_unsigned(),
            xattr_security_selinux: None,
        })
    }

    fn collect_pending(&mut self) -> Result<()> {
        while let Some(Pending { id, fd, pid }) = self.state.pending.pop() {
            let ours = TargetFd(fd.as_raw_fd());
            let link = proc::fd_link(self.own, ours)?;
            let info = proc::fdinfo(self.own, ours)?;
            if !info.locks.is_empty() {
                let number = NO_DESCRIPTOR;
                self.locked(&Locked { pid, number, file: id, link: &link, info: &info })?;
            }
            self.collect(id, fd, pid, NO_DESCRIPTOR, link, info)?;
        }
        Ok(())
    }

    /// Shows a descriptor that holds locks to all kinds.
    fn locked(&mut self, at: &Locked<'_>) -> Result<()> {
        self.collectors.iter_mut().flatten().try_for_each(|kind| kind.locked(at))
    }

    fn describe(
        &mut self,
        id: u32,
        fd: OwnedFd,
        pid: HostPid,
        number: TargetFd,
        link: Vec<u8>,
        info: FdInfo,
    ) -> Result<Description> {
        let failed = |step, link: &[u8]| {
            let link = String::from_utf8_lossy(link).into_owned();
            move |source| FileError::Dump { pid, fd: number, link, step, source }
        };
        let stat = self.state.examine(&fd).map_err(failed("examine", &link))?;
        // This flag is that of the descriptor.
        let flags = info.flags & !libc::O_CLOEXEC.cast_unsigned();
        let fown = fown::read(fd.as_fd(), flags, &self.state.pids)
            .map_err(failed("read the owner of", &link))?;
        let mut file =
            Description { id, fd, pid, number, stat, flags, link, info, fown, network: None };
        let is_tun = tun::is_tun(stat.st_mode, stat.st_rdev) && !descriptor::is_path(flags);
        if file.is_type(libc::S_IFSOCK) || is_tun {
            let network = self.state.networks.of(file.fd.as_fd(), pid, &self.state.namespaces);
            let network = network.map_err(file.failed("find the network namespace of"))?;
            file.network = Some(network.map_err(|inode| {
                let kind = if is_tun { tun::PATH } else { "a socket" };
                let what = format!(
                    "{kind} of the network namespace net:[{inode}], which no process of the tree is in"
                );
                file.unsupported(what, "have the program close it, then try again")
            })?);
        }
        Ok(file)
    }

    fn collect(
        &mut self,
        id: u32,
        fd: OwnedFd,
        pid: HostPid,
        number: TargetFd,
        link: Vec<u8>,
        info: FdInfo,
    ) -> Result<()> {
        let file = self.describe(id, fd, pid, number, link, info)?;
        let claimed = self
            .collectors
            .iter()
            .position(|kind| kind.as_ref().is_some_and(|kind| kind.claims(&file)));
        let Some(position) = claimed else {
            let what = String::from_utf8_lossy(&file.link).into_owned();
            return Err(file.unsupported(what, "files of this kind are not dumped; close it"));
        };
        // Take the collector out of the list: it may enter the files that it finds.
        let mut collector = self.collectors[position].take().expect("only one is out");
        let visit = file.network.as_ref().map(|network| network.visit());
        let visit = visit.transpose().map_err(file.failed("enter the network namespace of"));
        let entry = visit.and_then(|_visit| collector.collect(&file, &mut self.state));
        self.collectors[position] = Some(collector);
        let mut entry = entry?;
        entry.owner = entry.owner.or_else(|| owner::read(&file));
        self.state.types.insert(id, entry.r#type);
        self.state.entries.push(entry);
        Ok(())
    }

    /// Enters a file that is known by its path, and returns its number. `path` leads to the
    /// file, such as `/proc/PID/exe`.
    pub fn enter_path(&mut self, pid: HostPid, path: PathBuf) -> Result<u32> {
        let failed = |source| FileError::read(path.clone(), source);
        let file =
            File::options().read(true).custom_flags(libc::O_PATH).open(&path).map_err(failed)?;
        let link = std::fs::read_link(&path).map_err(failed)?;
        let link = std::os::unix::ffi::OsStringExt::into_vec(link.into_os_string());
        let fd = OwnedFd::from(file);
        let stat = self.state.examine(&fd).map_err(|errno| failed(errno.into()))?;
        let info = || proc::fdinfo(self.own, TargetFd(fd.as_raw_fd()));
        let mut space = 0;
        if self.state.roots.are_several() {
            space = self.state.roots.position(info()?.mnt_id, self.state.pids.ns(pid));
        }
        let key = (space, stat.st_dev, stat.st_ino, link);
        if let Some(id) = self.state.paths.get(&key) {
            return Ok(*id);
        }
        let info = info()?;
        let id = self.state.new_id();
        let mut file = Description {
            id,
            fd,
            pid,
            number: NO_DESCRIPTOR,
            stat,
            flags: 0,
            link: key.3.clone(),
            info,
            fown: proto::FownEntry::default(),
            network: None,
        };
        file.info.pos = 0;
        let entry = path::entry_of(&file, &mut self.state)?;
        self.state.entries.push(entry);
        self.state.paths.insert(key, id);
        Ok(id)
    }

    /// Enters a mapped file, and returns its number. Most files are mapped several times, by
    /// several processes, so the answer is cached.
    pub fn enter_mapped(&mut self, pid: HostPid, mapping: &Mapping) -> Result<u32> {
        let Mapping { dev_major, dev_minor, inode, .. } = *mapping;
        let space = self.state.roots.position_of_process(self.state.pids.ns(pid));
        let key = (space, dev_major, dev_minor, inode, mapping.name.clone());
        if let Some(id) = self.state.mapped.get(&key) {
            return Ok(*id);
        }
        let id = match self.enter_path(pid, proc::map_file(pid, mapping)) {
            Err(error @ FileError::Unprivileged { .. }) => {
                let Some(file) = by_name(pid, mapping) else { return Err(error) };
                self.enter_path(pid, format!("/proc/self/fd/{}", file.as_raw_fd()).into())?
            }
            entered => entered?,
        };
        self.state.mapped.insert(key, id);
        Ok(id)
    }

    /// Enters a mapped shared memory object, to which `path` leads, and returns its number.
    pub fn enter_object(&mut self, pid: HostPid, path: PathBuf) -> Result<u32> {
        let failed = |source| FileError::read(path.clone(), source);
        let file = File::open(&path).map_err(failed)?;
        let link = std::fs::read_link(&path).map_err(failed)?;
        let link = std::os::unix::ffi::OsStringExt::into_vec(link.into_os_string());
        let (id, new) = self.state.identify(file.into())?;
        if let Some(fd) = new {
            let info = proc::fdinfo(self.own, TargetFd(fd.as_raw_fd()))?;
            self.collect(id, fd, pid, NO_DESCRIPTOR, link, info)?;
        }
        Ok(id)
    }

    /// Returns all shared memory objects, mapped or not, by inode number, each with a readable
    /// descriptor.
    pub fn shared_memory(&self) -> Result<BTreeMap<u64, OwnedFd>> {
        let mut found = BTreeMap::new();
        for ((_, inode), descriptions) in &self.state.known {
            for (id, fd) in descriptions {
                let kind = self.state.types.get(id).and_then(|number| FileKind::of_type(*number));
                let is_memory = kind.is_some_and(|kind| KINDS[kind].usage == Usage::Memory);
                if is_memory && !found.contains_key(inode) {
                    let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
                    let file = fds::open_noatime(&path)
                        .map_err(|source| FileError::Read { path, source })?;
                    found.insert(*inode, file.into());
                }
            }
        }
        Ok(found)
    }

    /// Writes all images of open files. Reads the ghost files, so the tree must still be
    /// stopped.
    pub fn write(&mut self, images: &SnapshotWriter) -> Result<()> {
        self.collect_pending()?;
        for position in 0..self.collectors.len() {
            let mut collector = self.collectors[position].take().expect("none is out");
            let done = collector.after_collect(&mut self.state);
            self.collectors[position] = Some(collector);
            done?;
        }
        self.collect_pending()?;
        for collector in self.collectors.iter_mut().flatten() {
            collector.finish(images)?;
        }
        self.state.deleted.write(images)?;
        // CRIU needs the entry of a socket before those of sockets that are connected to it.
        let is_connected =
            |entry: &proto::FileEntry| entry.usk.as_ref().is_some_and(|socket| socket.peer != 0);
        self.state.entries.sort_by_key(|entry| (is_connected(entry), entry.id));
        let entries = split_files(std::mem::take(&mut self.state.entries));
        Ok(images.write(Kind::Files, 0, &entries)?)
    }

    /// Records state of open files in the inventory ([`Collector::note`]).
    pub fn note(&self, inventory: &mut proto::InventoryEntry) {
        self.collectors.iter().flatten().for_each(|collector| collector.note(inventory));
    }

    /// Prepares for the dump killing the tree ([`Collector::prepare_kill`]).
    ///
    /// # Errors
    /// The errors of [`Collector::prepare_kill`].
    pub fn prepare_kill(&mut self, dump: &str) -> Result<()> {
        self.collectors.iter_mut().flatten().try_for_each(|collector| collector.prepare_kill(dump))
    }

    /// Keeps the link remaps.
    pub fn keep_link_remaps(&mut self) {
        self.state.deleted.keep_link_remaps();
    }

    /// Warns about link remaps that a restore needs and that are about to be removed.
    pub fn warn_about_link_remaps(&self) {
        self.state.deleted.warn_about_link_remaps();
    }
}

/// Opens the file of a mapping by its name, for an ordinary user, who may not open it otherwise.
fn by_name(pid: HostPid, mapping: &Mapping) -> Option<File> {
    let name = OsStr::from_bytes(mapping.name.strip_prefix(b"/")?);
    let path = PathBuf::from(format!("/proc/{pid}/root")).join(name);
    let file = File::options().read(true).custom_flags(libc::O_PATH).open(path).ok()?;
    let stat = fstat(&file).ok()?;
    let device = makedev(mapping.dev_major.into(), mapping.dev_minor.into());
    ((stat.st_dev, stat.st_ino) == (device, mapping.inode)).then_some(file)
}
