//! Checks of open files, and of everything that refers to them.

use std::collections::{BTreeMap, BTreeSet};

use nix::libc;

use super::{Body, IsRestored, Problems, Tree, place};
use crate::image::{ImageStore, Kind, Remap, ipc::memory_of, proto, vma};
use proto::{FdTypes, FileEntry};

/// The highest possible number of a descriptor (`sysctl_nr_open_max`, `fs/file.c`).
const HIGHEST_FD: u32 = i32::MAX.cast_unsigned() & !63;

/// The number of the IPC namespace in images without numbers of namespaces.
const IPC_NAMESPACE: u64 = 3;

const NANOSECONDS: u64 = 1_000_000_000;

/// Flags of `timerfd_settime(2)` (`linux/timerfd.h`).
const SETTIME_FLAGS: u32 = 3;

/// Returns what is wrong with the entry of a timerfd, if anything.
pub fn timer_problem(entry: &proto::TimerfdEntry) -> Option<String> {
    if entry.settime_flags & !SETTIME_FLAGS != 0 {
        return Some(format!("unknown flags {:#x} of a timer", entry.settime_flags));
    }
    let largest = i64::MAX.cast_unsigned() / 2;
    let fits = entry.vnsec.max(entry.insec) < NANOSECONDS && entry.vsec.max(entry.isec) <= largest;
    (!fits).then(|| "a timer with an impossible time".to_owned())
}

/// Returns the id in the type-specific entry of a file; `None` without one.
fn inner_id(file: &FileEntry) -> Option<u32> {
    match file.r#type() {
        FdTypes::Reg => file.reg.as_ref().map(|entry| entry.id),
        FdTypes::Pipe => file.pipe.as_ref().map(|entry| entry.id),
        FdTypes::Fifo => file.fifo.as_ref().map(|entry| entry.id),
        FdTypes::Inetsk => file.isk.as_ref().map(|entry| entry.id),
        FdTypes::Unixsk => file.usk.as_ref().map(|entry| entry.id),
        FdTypes::Eventfd => file.efd.as_ref().map(|entry| entry.id),
        FdTypes::Eventpoll => file.epfd.as_ref().map(|entry| entry.id),
        FdTypes::Inotify => file.ify.as_ref().map(|entry| entry.id),
        FdTypes::Signalfd => file.sgfd.as_ref().map(|entry| entry.id),
        FdTypes::Packetsk => file.psk.as_ref().map(|entry| entry.id),
        FdTypes::Tty => file.tty.as_ref().map(|entry| entry.id),
        FdTypes::Fanotify => file.ffy.as_ref().map(|entry| entry.id),
        FdTypes::Netlinksk => file.nlsk.as_ref().map(|entry| entry.id),
        FdTypes::Ns => file.nsf.as_ref().map(|entry| entry.id),
        FdTypes::Tunf => file.tunf.as_ref().map(|entry| entry.id),
        FdTypes::Ext => file.ext.as_ref().map(|entry| entry.id),
        FdTypes::Timerfd => file.tfd.as_ref().map(|entry| entry.id),
        FdTypes::Memfd => file.memfd.as_ref().map(|entry| entry.id),
        FdTypes::Bpfmap => file.bpf.as_ref().map(|entry| entry.id),
        FdTypes::Pidfd => file.pidfd.as_ref().map(|entry| entry.id),
        FdTypes::Und | FdTypes::CtlTty | FdTypes::AutofsPipe => Some(file.id),
    }
}

/// Checks the table of open files, and everything that refers to it. `is_restored` says which
/// types of files a restore supports.
pub(super) fn check(
    images: &dyn ImageStore,
    tree: &Tree,
    is_restored: IsRestored,
    problems: &mut Problems,
) {
    let (files, memfds) = (BTreeMap::new(), BTreeMap::new());
    let mut table = Table { images, tree, is_restored, files, memfds, problems };
    table.enter(&tree.files);
    for file in &tree.files {
        table.file(file);
    }
    let mut epolls = BTreeSet::new();
    let segments = table.segments();
    for task in &tree.tasks {
        if let Some(body) = &task.body {
            table.body(task.entry.pid, body, &segments, &mut epolls);
        }
    }
    table.queues();
    table.remaps();
}

struct Table<'a, 'b> {
    images: &'a dyn ImageStore,
    tree: &'a Tree,
    is_restored: IsRestored,
    files: BTreeMap<u32, &'a FileEntry>,
    /// By `inode_id`.
    memfds: BTreeMap<u64, proto::MemfdInodeEntry>,
    problems: &'b mut Problems,
}

impl<'a> Table<'a, '_> {
    fn wrong(&mut self, id: u32, problem: &str) {
        let place = self.place(id);
        self.problems.broken(format!("{place}: {problem}"));
    }

    fn place(&self, id: u32) -> String {
        let uses = self.tree.tasks.iter().filter_map(|task| {
            let Body { mm, vmas, fs, fds, .. } = task.body.as_ref()?;
            Some(place::Uses { pid: task.entry.pid, fds, fs, mm, vmas })
        });
        place::of_file(id, &self.tree.files, uses)
    }

    /// Reads an optional image.
    fn read<M: prost::Message + prost::Name + Default>(&mut self, kind: Kind, id: u64) -> Vec<M> {
        let messages = self.images.messages_if_any(kind, id);
        self.problems.image(messages).flatten().unwrap_or_default()
    }

    fn enter(&mut self, files: &'a [FileEntry]) {
        for file in files {
            if self.files.insert(file.id, file).is_some() {
                self.wrong(file.id, "two files have this id");
            }
        }
        let mut shmids = BTreeSet::new();
        for inode in self.read::<proto::MemfdInodeEntry>(Kind::MemfdInode, 0) {
            if !shmids.insert(inode.shmid) || self.memfds.contains_key(&inode.inode_id) {
                let (id, shmid) = (inode.inode_id, inode.shmid);
                self.problems.broken(format!("memfd.img has the object {id} ({shmid}) twice"));
            }
            if i64::try_from(inode.size).is_err() {
                let (id, size) = (inode.inode_id, inode.size);
                self.problems.broken(format!("memfd.img says that object {id} has {size} bytes"));
            }
            self.memfds.insert(inode.inode_id, inode);
        }
    }

    /// Returns the numbers of the System V segments of the IPC namespaces of the tree.
    fn segments(&mut self) -> BTreeSet<u64> {
        let mut namespaces = BTreeSet::new();
        for task in self.tree.tasks.iter().filter(|task| task.body.is_some()) {
            let number = task.entry.pid.into();
            let ids = self.images.message_if_any::<proto::TaskKobjIdsEntry>(Kind::Ids, number);
            let number = ids.ok().flatten().and_then(|ids| ids.ipc_ns_id);
            namespaces.insert(number.map_or(IPC_NAMESPACE, u64::from));
        }
        let read = |number| self.read::<proto::IpcShmEntry>(Kind::IpcnsShm, number);
        let segments: Vec<_> = namespaces.into_iter().flat_map(read).collect();
        segments.iter().map(memory_of).collect()
    }

    fn is_path(&self, id: u32) -> bool {
        self.files.get(&id).is_some_and(|file| file.reg.is_some())
    }

    fn file(&mut self, file: &FileEntry) {
        let id = file.id;
        let Ok(of) = FdTypes::try_from(file.r#type) else {
            return self.wrong(id, &format!("it is of type {}, which is unknown", file.r#type));
        };
        if !(self.is_restored)(of) {
            let name = of.as_str_name();
            let place = self.place(id);
            let problem = format!("{place}: it is of type {name}, which is not restored");
            return self.problems.not_restored(problem);
        }
        match inner_id(file) {
            None => {
                let name = of.as_str_name();
                return self
                    .wrong(id, &format!("it is of type {name}, without the entry for that"));
            }
            Some(inner) if inner != id => {
                return self.wrong(id, &format!("its entry has another id, {inner:#x}"));
            }
            Some(_) => {}
        }
        match of {
            FdTypes::Reg => self.path(id, file),
            FdTypes::Fifo => {
                let path = file.fifo.as_ref().and_then(|fifo| fifo.regf_id).unwrap_or(id);
                if !self.is_path(path) {
                    self.wrong(id, "it is a FIFO without its path");
                }
            }
            FdTypes::Tty => self.terminal(id, file),
            FdTypes::Timerfd => {
                if let Some(problem) = file.tfd.as_ref().and_then(timer_problem) {
                    self.wrong(id, &problem);
                }
            }
            FdTypes::Memfd => {
                let inode = file.memfd.as_ref().map(|memfd| u64::from(memfd.inode_id));
                if inode.is_none_or(|inode| !self.memfds.contains_key(&inode)) {
                    self.wrong(id, &format!("memfd.img has no object {}", inode.unwrap_or(0)));
                }
            }
            _ => {}
        }
    }

    /// Checks that a path has the form that the kernel gives it: absolute, and without
    /// `..`.
    fn path(&mut self, id: u32, file: &FileEntry) {
        let Some(reg) = &file.reg else { return };
        let up = || reg.name.split(|byte| *byte == b'/').any(|part| part == b"..");
        if reg.ext != Some(true) && (!reg.name.starts_with(b"/") || up()) || reg.name.contains(&0) {
            let name = String::from_utf8_lossy(&reg.name);
            self.wrong(id, &format!("its path is {name:?}, which the kernel would not report"));
        }
    }

    fn terminal(&mut self, id: u32, file: &FileEntry) {
        let Some(tty) = &file.tty else { return };
        let infos = self.read::<proto::TtyInfoEntry>(Kind::TtyInfo, 0);
        let Some(info) = infos.iter().find(|info| info.id == tty.tty_info_id) else {
            let problem = format!("tty-info.img has no terminal {:#x}", tty.tty_info_id);
            return self.wrong(id, &problem);
        };
        match info.r#type() {
            proto::TtyType::Unknown => self.wrong(id, "it is a terminal of an unknown type"),
            proto::TtyType::ExtTty => {}
            _ if !self.is_path(tty.regf_id.unwrap_or(id)) => {
                self.wrong(id, "it is a terminal without its path");
            }
            proto::TtyType::Pty if info.pty.is_none() => {
                self.wrong(id, "it is a pseudoterminal without a number");
            }
            _ => {}
        }
    }

    /// Checks the files of a process. `epolls` are those of the processes before it.
    fn body(
        &mut self,
        pid: u32,
        body: &'_ Body,
        segments: &BTreeSet<u64>,
        epolls: &mut BTreeSet<u32>,
    ) {
        let wrong = |problems: &mut Problems, problem: String| {
            problems.broken(format!("images of process {pid}: {problem}"));
        };
        let mut numbers = BTreeSet::new();
        for entry in &body.fds {
            let (fd, id) = (entry.fd, entry.id);
            if fd > HIGHEST_FD {
                wrong(self.problems, format!("it has a descriptor {fd}"));
            }
            if !numbers.insert(fd) {
                wrong(self.problems, format!("it has descriptor {fd} twice"));
            }
            match self.files.get(&id) {
                None => {
                    let problem = format!(
                        "its descriptor {fd} is file {id:#x}, which files.img does not have"
                    );
                    wrong(self.problems, problem);
                }
                Some(file) if file.r#type != entry.r#type => {
                    let problem = format!(
                        "its descriptor {fd} is file {id:#x} of type {}, which is of type {}",
                        entry.r#type, file.r#type
                    );
                    wrong(self.problems, problem);
                }
                Some(_) => {}
            }
        }
        for entry in &body.fds {
            let epoll = self.files.get(&entry.id).and_then(|file| file.epfd.as_ref());
            let Some(epoll) = epoll.filter(|_| epolls.insert(entry.id)) else { continue };
            // An epoll keeps watching a closed descriptor, but a restore cannot add one.
            if let Some(target) = epoll.tfd.iter().find(|target| !numbers.contains(&target.tfd)) {
                let problem = format!(
                    "its epoll at descriptor {} watches descriptor {}, which it does not have",
                    entry.fd, target.tfd
                );
                wrong(self.problems, problem);
            }
        }
        for (what, id) in [
            ("program", body.mm.exe_file_id),
            ("root directory", body.fs.root_id),
            ("working directory", body.fs.cwd_id),
        ] {
            if !self.is_path(id) {
                let problem = format!("its {what} is file {id:#x}, which has no path");
                wrong(self.problems, problem);
            }
        }
        for entry in &body.vmas {
            let missing = if entry.status & vma::SYSVIPC != 0 {
                (!segments.contains(&entry.shmid)).then_some("not a segment in the images")
            } else if entry.status & vma::MEMFD != 0 {
                (!self.is_memfd(entry.shmid)).then_some("not a memfd in the images")
            } else if entry.status & (vma::FILE_PRIVATE | vma::FILE_SHARED) != 0 {
                let is_path = u32::try_from(entry.shmid).is_ok_and(|id| self.is_path(id));
                (!is_path).then_some("not a file with a path")
            } else {
                None
            };
            if let Some(missing) = missing {
                let problem = format!(
                    "the mapping {:#x}-{:#x} maps {:#x}, which is {missing}",
                    entry.start, entry.end, entry.shmid
                );
                wrong(self.problems, problem);
            }
        }
    }

    fn is_memfd(&self, id: u64) -> bool {
        let file = u32::try_from(id).ok().and_then(|id| self.files.get(&id));
        file.and_then(|file| file.memfd.as_ref())
            .is_some_and(|memfd| self.memfds.contains_key(&memfd.inode_id.into()))
    }

    /// Checks the messages that wait in the queues of sockets.
    fn queues(&mut self) {
        for (to, control) in self.read_queues() {
            if control.r#type != libc::SCM_RIGHTS.cast_unsigned() {
                let place = self.place(to);
                self.problems.not_restored(format!(
                    "{place}: its queue holds control messages of type {}, which are not restored",
                    control.r#type
                ));
            } else if let Some(id) = control.rights.iter().find(|id| !self.files.contains_key(id)) {
                let place = self.place(to);
                self.problems.broken(format!(
                    "{place}: its queue holds file {id:#x}, which files.img does not have"
                ));
            }
        }
    }

    /// Returns the sockets in whose queues data waits, with the control messages.
    fn read_queues(&mut self) -> Vec<(u32, proto::ScmEntry)> {
        let mut image = match self.images.image(Kind::SkQueues, 0) {
            Err(error) if error.is_missing() => return Vec::new(),
            image => match self.problems.image(image) {
                Some(image) => image,
                None => return Vec::new(),
            },
        };
        let mut found = Vec::new();
        let mut read = || -> Result<(), crate::image::ImageError> {
            while let Some(packet) = image.next_message::<proto::SkPacketEntry>()? {
                image.skip(packet.length.into(), "data")?;
                for control in packet.scm {
                    found.push((packet.id_for, control));
                }
            }
            Ok(())
        };
        let result = read();
        self.problems.image(result);
        found
    }

    /// Checks the files that lost their names.
    fn remaps(&mut self) {
        for remap in self.read::<proto::RemapFilePathEntry>(Kind::RemapFpath, 0) {
            // In older images the number alone gives the type; these are not checked.
            if remap.remap_type.is_none() {
                continue;
            }
            match Remap::of(&remap) {
                Ok(Remap::Linked(id)) if !self.is_path(id) => {
                    let problem = format!("its link remap is file {id:#x}, which has no path");
                    self.wrong(remap.orig_id, &problem);
                }
                Ok(Remap::Ghost(id)) => {
                    if !self.images.has(Kind::GhostFile, id.into()) {
                        let name = Kind::GhostFile.file_name(id.into());
                        self.wrong(
                            remap.orig_id,
                            &format!("it is a ghost file, but {name} does not exist"),
                        );
                    }
                }
                Ok(Remap::Process(_)) => {
                    let place = self.place(remap.orig_id);
                    self.problems.not_restored(format!(
                        "{place}: it belongs to a process that had ended, and is not restored"
                    ));
                }
                Err(problem) => self.wrong(remap.orig_id, &problem),
                Ok(Remap::Linked(_)) => {}
            }
        }
    }
}
