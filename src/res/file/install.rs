//! Installs open files during a restore.
//!
//! The restore opens every description in its own process, and the new processes inherit
//! them. Before it creates the first process, it moves the descriptors above all numbers that
//! the tree uses. Putting one in its place therefore never closes another.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use nix::libc;

use super::{
    Deferred, FileError, FileKind, KINDS, NO_DESCRIPTION, NOT_BY_PATH, Opened, Opener,
    RestoreOptions, Result, Usage, fown, ghost, owner::Holder,
};
use crate::{
    causes::with_sources,
    image::{
        Store,
        proto::{self, FdinfoEntry, FileEntry, VmaEntry},
        vma,
    },
    inject::{Arg, CallId, Lender, Script},
    sys::{fds, process},
    units::{HostPid, NsPid, PidMap, TargetFd},
};

/// The file-related part of a process of the tree.
#[derive(Clone, Copy, Debug)]
pub struct FileUser<'a> {
    /// Its number.
    pub pid: NsPid,
    /// Its process group.
    pub group: NsPid,
    /// The credentials of its thread group leader.
    pub creds: Option<&'a proto::CredsEntry>,
    /// Its descriptors.
    pub fds: &'a [FdinfoEntry],
}

/// All open files of the tree.
pub struct Installer<'a> {
    /// The processes that are alive, in the order of the images.
    processes: Vec<FileUser<'a>>,
    /// The entries of `files.img`.
    entries: &'a [FileEntry],
    /// The descriptions opened so far.
    pub opened: Opened,
    openers: Vec<Box<dyn Opener>>,
    /// The first descriptor number above all that the tree uses.
    lowest: i32,
    descriptions: HashMap<u32, Rc<OwnedFd>>,
    /// Files opened for uses other than a descriptor, by number in the images and access mode.
    others: HashMap<(u32, i32), OwnedFd>,
    /// Descriptions that a process has installed already: which process, and at which number.
    installed: HashMap<u32, (NsPid, TargetFd)>,
    /// Epolls that already watch their targets.
    watching: HashSet<u32>,
    /// Working and root directories in `/proc/PID`, which do not exist yet.
    deferred: HashSet<u32>,
    /// Lends descriptors to processes in a user namespace.
    pub lender: Option<Lender>,
    /// A pidfd of the restorer or the lender, for processes that cannot see it: they keep it until they have their
    /// deferred descriptors.
    director: Option<OwnedFd>,
}

impl std::fmt::Debug for Installer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Installer").field("opened", &self.opened).finish_non_exhaustive()
    }
}

impl<'a> Installer<'a> {
    /// Returns an installer that has not opened anything yet. `processes` are those that are
    /// alive, in the order of the images; `numbers` are all processes and threads of the tree.
    pub fn new(
        images: &Store,
        options: &RestoreOptions,
        entries: &'a [FileEntry],
        processes: Vec<FileUser<'a>>,
        numbers: HashSet<NsPid>,
        pids: PidMap,
    ) -> Self {
        let descriptors = processes.iter().flat_map(|process| process.fds);
        let highest = descriptors.map(|entry| entry.fd).max().unwrap_or(0);
        let lowest = i32::try_from(highest).unwrap_or(i32::MAX - 1) + 1;
        let mut opened = Opened::new(images, options, entries.to_vec(), pids);
        opened.processes = numbers;
        opened.holders = holders(&processes);
        opened.groups = processes.iter().map(|process| process.group).collect();
        opened.root_leads_group = processes.first().is_some_and(|root| root.group == root.pid);
        Self {
            processes,
            entries,
            opened,
            openers: KINDS.iter().map(|kind| (kind.opener)(options)).collect(),
            lowest,
            descriptions: HashMap::new(),
            others: HashMap::new(),
            installed: HashMap::new(),
            watching: HashSet::new(),
            deferred: HashSet::new(),
            lender: None,
            director: None,
        }
    }

    /// Opens all descriptions with descriptors in the tree. Runs after [`Self::make_memory`].
    pub fn open_descriptions(&mut self) -> Result<()> {
        let lender = self.lender.as_ref().map(Lender::pid);
        let pids = &self.opened.pids;
        if lender.is_some() || !pids.is_own_namespace() || pids.below().is_some() {
            let own = lender.unwrap_or(HostPid::own());
            let failed = |source| FileError::Restore {
                id: 0,
                step: "open",
                object: "a pidfd of the restorer".to_owned(),
                source,
            };
            let pidfd = process::pidfd_open(own).map_err(failed)?;
            let pidfd = fds::duplicate_from(pidfd.as_fd(), self.lowest).map_err(too_many(0))?;
            self.director = Some(pidfd);
        }
        // A file with a path that no descriptor refers to is a program or mapped.
        let descriptors = self.processes.iter().flat_map(|process| process.fds);
        let mut used: HashSet<u32> = descriptors.map(|entry| entry.id).collect();
        for opener in &self.openers {
            used.extend(opener.inside(&self.opened)?);
        }
        // Some other entries stand for a file of a process outside the tree, such as the sockets of
        // --ext-unix-sk: their kinds open nothing.
        let needed = used.clone();
        for entry in self.entries {
            let kind = FileKind::of(entry).map(|kind| &KINDS[kind]);
            if kind.is_none_or(|kind| kind.usage != Usage::Path) {
                used.insert(entry.id);
            }
        }
        for (position, opener) in self.openers.iter_mut().enumerate() {
            let is_wanted = |entry: &&FileEntry| {
                used.contains(&entry.id) && FileKind::of(entry) == Some(position)
            };
            let entries: Vec<FileEntry> = self.entries.iter().filter(is_wanted).cloned().collect();
            opener.open(&entries, &mut self.opened)?;
        }
        used.retain(|id| needed.contains(id) || self.opened.contains(*id));
        for id in &used {
            let fd =
                fds::duplicate_from(self.opened.get(*id)?, self.lowest).map_err(too_many(*id))?;
            // The old one is closed: a tree may have as many descriptors as the restorer.
            let fd = Rc::new(fd);
            self.opened.insert_shared(*id, Rc::clone(&fd));
            self.descriptions.insert(*id, fd);
        }
        let lowest = self.lowest;
        let keep = |fd: BorrowedFd<'_>| fds::duplicate_from(fd, lowest).map_err(too_many(0));
        for opener in &mut self.openers {
            opener.open_extra(&self.opened, &keep)?;
            opener.attach(&self.processes, &self.opened)?;
        }
        Ok(())
    }

    /// Opens a file for a use other than a descriptor, once. Returns its number, which is the
    /// same in all new processes.
    fn other(&mut self, id: u32, flags: i32, usage: Usage) -> Result<i32> {
        if let Some(fd) = self.others.get(&(id, flags)) {
            return Ok(fd.as_raw_fd());
        }
        let fd = match self.kind_used(id, usage) {
            Some((entry, kind)) => {
                let entry = entry.clone();
                self.openers[kind].reopen(&entry, flags, &mut self.opened)?
            }
            None if usage == Usage::Memory => {
                return Err(FileError::image(id, "it is mapped as a memfd, but is not one"));
            }
            None => return Err(FileError::image(id, NOT_BY_PATH)),
        };
        let fd = fds::duplicate_from(fd.as_fd(), self.lowest).map_err(too_many(id))?;
        let number = fd.as_raw_fd();
        self.others.insert((id, flags), fd);
        Ok(number)
    }

    /// Returns an entry and its kind, if files of that kind have this use.
    fn kind_used(&self, id: u32, usage: Usage) -> Option<(&FileEntry, usize)> {
        let entry = self.opened.entries.get(&id)?;
        let kind = FileKind::of(entry).filter(|kind| KINDS[*kind].usage == usage)?;
        Some((entry, kind))
    }

    /// Whether a working or root directory belongs to a process that does not exist yet.
    fn is_deferred(&self, id: u32) -> bool {
        self.kind_used(id, Usage::Path)
            .is_some_and(|(entry, kind)| self.openers[kind].is_deferred(entry, &self.opened))
    }

    /// Creates the shared memory objects that `memfd.img` describes, still empty. Returns their
    /// `shmid`s.
    pub fn make_memory(&mut self) -> Result<Vec<u64>> {
        let mut made = Vec::new();
        for opener in &mut self.openers {
            made.extend(opener.make_memory(&mut self.opened)?);
        }
        Ok(made)
    }

    /// Seals shared memory objects, after all of them were mapped and filled.
    pub fn seal(&mut self) -> Result<()> {
        self.openers.iter_mut().try_for_each(|opener| opener.seal(&self.opened))
    }

    /// Opens the program of a process.
    ///
    /// # Errors
    /// [`FileError::Image`] if the file is missing or differs from the one that was dumped.
    pub fn need_program(&mut self, id: u32) -> Result<()> {
        self.other(id, libc::O_RDONLY, Usage::Path).map(drop)
    }

    /// Opens a working or root directory.
    ///
    /// # Errors
    /// As [`Self::need_program`].
    pub fn need_directory(&mut self, id: u32) -> Result<()> {
        if self.is_deferred(id) {
            self.deferred.insert(id);
            return Ok(());
        }
        self.other(id, DIRECTORY_FLAGS, Usage::Path).map(drop)
    }

    /// Opens the file of a mapping.
    ///
    /// # Errors
    /// As [`Self::need_program`].
    pub fn need_mapped(&mut self, entry: &VmaEntry) -> Result<()> {
        let usage = if entry.status & vma::MEMFD != 0 {
            Usage::Memory
        } else if entry.status & (vma::FILE_PRIVATE | vma::FILE_SHARED) != 0 {
            Usage::Path
        } else {
            return Ok(());
        };
        let key = (file_id(entry)?, access(entry));
        self.other(key.0, key.1, usage)?;
        if entry.status & vma::FILE_PRIVATE != 0
            && let Some((file, kind)) = self.kind_used(key.0, usage)
            && let Some(fd) = self.others.get(&key)
        {
            self.openers[kind].check_unwritten(file, fd.as_fd(), &self.opened)?;
        }
        Ok(())
    }

    /// Moves the descriptors of anonymous shared memory, which has no entry in `files.img`,
    /// above all numbers that the tree uses.
    pub fn move_objects(&mut self) -> Result<()> {
        let objects: Vec<u64> = self.opened.objects.keys().copied().collect();
        for shmid in objects {
            let fd = fds::duplicate_from(self.opened.objects[&shmid].as_fd(), self.lowest)
                .map_err(too_many(0))?;
            self.opened.objects.insert(shmid, fd);
        }
        Ok(())
    }

    /// Returns the descriptor of the file of a mapping, valid in all new processes.
    ///
    /// # Errors
    /// [`FileError::Image`] if the file was not opened.
    pub fn for_mapping(&self, entry: &VmaEntry) -> Result<i32> {
        if entry.status & vma::ANON_SHARED != 0 {
            let object = self.opened.objects.get(&entry.shmid);
            let fd = object.ok_or_else(|| {
                let problem =
                    format!("shared memory {} is mapped but was not created", entry.shmid);
                FileError::image(0, problem)
            })?;
            return Ok(fd.as_raw_fd());
        }
        let key = (file_id(entry)?, access(entry));
        let fd =
            self.others.get(&key).ok_or_else(|| FileError::image(key.0, "it was not opened"))?;
        Ok(fd.as_raw_fd())
    }

    /// Returns the descriptor of a program, valid in all new processes.
    ///
    /// # Errors
    /// As [`Self::for_mapping`].
    pub fn program(&self, id: u32) -> Result<i32> {
        self.opened_path(id, libc::O_RDONLY)
    }

    fn opened_path(&self, id: u32, flags: i32) -> Result<i32> {
        let fd = self
            .others
            .get(&(id, flags))
            .ok_or_else(|| FileError::image(id, "it was not opened"))?;
        Ok(fd.as_raw_fd())
    }

    /// Whether a file of the images has this path.
    pub fn is_path(&self, id: u32, path: &[u8]) -> bool {
        let entry = self.opened.entries.get(&id).and_then(|entry| entry.reg.as_ref());
        entry.is_some_and(|entry| entry.name == path)
    }

    /// Whether a directory is deferred until all processes exist.
    pub fn is_deferred_directory(&self, id: u32) -> bool {
        self.deferred.contains(&id)
    }

    /// Returns the descriptor of a directory in all new processes, unless it is deferred.
    ///
    /// # Errors
    /// As [`Self::for_mapping`].
    pub fn directory(&self, id: u32) -> Result<i32> {
        self.opened_path(id, DIRECTORY_FLAGS)
    }

    /// Adds the calls by which a process takes a directory from the restorer, followed by the calls
    /// that `then` adds.
    ///
    /// # Errors
    /// As [`Self::for_mapping`].
    pub fn take_directory(
        &self,
        id: u32,
        script: &mut Script,
        then: impl FnOnce(Arg, &mut Script),
    ) -> Result<()> {
        let pidfd = self.open_director(script);
        let fd = take(pidfd, self.opened_path(id, DIRECTORY_FLAGS)?, script);
        then(fd.into(), script);
        close(fd.into(), script);
        self.close_director(pidfd, script);
        Ok(())
    }

    /// Adds the calls of a process that has become the leader of a session: see
    /// [`Opener::begin_session`].
    pub fn begin_session(&self, pid: NsPid, script: &mut Script) {
        self.openers.iter().for_each(|opener| opener.begin_session(pid, script));
    }

    /// Adds the calls that a process makes before it closes the descriptors inherited from the
    /// restorer.
    pub fn prepare(&mut self, pid: NsPid, script: &mut Script) -> Result<()> {
        let descriptions = &self.descriptions;
        let at = |id| Ok(TargetFd(description(descriptions, id)?.as_raw_fd()));
        for opener in &mut self.openers {
            opener.prepare_process(pid, &at, script)?;
        }
        Ok(())
    }

    /// Adds the calls that move all descriptors of a process to their numbers and close all
    /// others. Call it for the processes in the order of the images.
    pub fn install(&mut self, pid: NsPid, fds: &[FdinfoEntry], script: &mut Script) -> Result<()> {
        let mut numbers = BTreeMap::new();
        for entry in fds {
            let number = i32::try_from(entry.fd)
                .map_err(|_| FileError::image(entry.id, format!("descriptor {}", entry.fd)))?;
            numbers.insert(number, entry);
        }
        for (number, entry) in &numbers {
            let description = self.description(entry.id)?;
            let close = entry.flags & libc::FD_CLOEXEC.cast_unsigned() != 0;
            let flags = if close { libc::O_CLOEXEC } else { 0 };
            let what = format!("install descriptor {number}");
            script.call(
                what,
                libc::SYS_dup3,
                &[description.as_raw_fd().into(), (*number).into(), flags.into()],
            );
        }
        let mut next = 0;
        let kept = self.director.as_ref().map(|director| director.as_raw_fd());
        for number in numbers.keys().copied().chain(kept).chain([i32::MAX]) {
            if number > next {
                let last = if number == i32::MAX { u32::MAX } else { (number - 1).cast_unsigned() };
                let arguments = [next.into(), last.into(), 0.into()];
                script.call("close other descriptors", libc::SYS_close_range, &arguments);
            }
            next = number.saturating_add(1);
        }
        for (number, entry) in &numbers {
            if self.installed.contains_key(&entry.id) {
                continue;
            }
            self.installed.insert(entry.id, (pid, TargetFd(*number)));
            let Some(file) = self.opened.entries.get(&entry.id) else { continue };
            if let Some(kind) = FileKind::of(file) {
                self.openers[kind].install(file, TargetFd(*number), script)?;
            }
        }
        let at = |id| numbers.iter().find(|(_, entry)| entry.id == id).map(|(at, _)| TargetFd(*at));
        self.openers.iter_mut().try_for_each(|opener| opener.finish_process(pid, &at, script))
    }

    /// Opens the deferred descriptions and directories, once all processes and threads exist.
    /// Then fills the descriptions that hold others.
    pub fn open_deferred(&mut self) -> Result<()> {
        for id in self.deferred.clone() {
            self.other(id, DIRECTORY_FLAGS, Usage::Path)?;
        }
        let deferred: Vec<_> =
            self.opened.deferred.iter().map(|(id, deferred)| (*id, *deferred)).collect();
        for (id, deferred) in deferred {
            let fd = match (deferred, self.installed.get(&id)) {
                (Deferred::ByPath, _) => {
                    let Some((entry, kind)) = self.deferred_kind(id) else { continue };
                    self.openers[kind].open_deferred(&entry, &mut self.opened)?
                }
                (Deferred::Inside, Some((pid, number))) => {
                    let failed = |step| FileError::restore(id, step, format!("process {pid}"));
                    let pidfd =
                        process::pidfd_open(self.opened.pids.host(*pid)).map_err(failed("open"))?;
                    let got = process::pidfd_getfd(&pidfd, *number);
                    got.map_err(failed("take a descriptor from"))?
                }
                (Deferred::Inside, None) => continue,
            };
            let copy = fds::duplicate_from(fd.as_fd(), self.lowest).map_err(too_many(id))?;
            let copy = Rc::new(copy);
            self.opened.insert_shared(id, Rc::clone(&copy));
            self.descriptions.insert(id, copy);
        }
        for opener in &mut self.openers {
            opener.fill(&self.opened)?;
        }
        Ok(())
    }

    /// Adds the calls that move deferred descriptors to their numbers, and those that need all
    /// other files in place. The process takes the files from the restorer: they were opened
    /// after it was created, so it has not inherited them.
    pub fn install_deferred(
        &mut self,
        pid: NsPid,
        fds: &[FdinfoEntry],
        script: &mut Script,
    ) -> Result<()> {
        let is_first =
            |id: u32, number: i32| self.installed.get(&id) == Some(&(pid, TargetFd(number)));
        let mut wanted = Vec::new();
        for entry in fds {
            let number = entry.fd.cast_signed();
            match self.opened.deferred.get(&entry.id) {
                None => {}
                Some(Deferred::Inside) if is_first(entry.id, number) => {}
                Some(_) => {
                    wanted.push((self.description(entry.id)?.as_raw_fd(), number, entry.flags));
                }
            }
        }
        if !wanted.is_empty() {
            let pidfd = self.open_director(script);
            for (from, number, flags) in wanted {
                let fd = take(pidfd, from, script);
                let flags =
                    if flags & libc::FD_CLOEXEC.cast_unsigned() == 0 { 0 } else { libc::O_CLOEXEC };
                let what = format!("install descriptor {number}");
                script.call(what, libc::SYS_dup3, &[fd.into(), number.into(), flags.into()]);
                close(fd.into(), script);
            }
            self.close_director(pidfd, script);
        }
        for entry in fds {
            let Some(file) = self.opened.entries.get(&entry.id) else { continue };
            if let Some(kind) = FileKind::of(file)
                && self.watching.insert(entry.id)
            {
                self.openers[kind].watch(file, TargetFd(entry.fd.cast_signed()), script)?;
            }
        }
        Ok(())
    }

    /// Returns the calls by which a process takes state that its descriptors lack, such as file
    /// locks ([`Opener::take`]).
    ///
    /// # Errors
    /// The images contradict themselves.
    pub fn take(&mut self, pid: NsPid) -> Result<Vec<Script>> {
        let mut scripts = Vec::new();
        for opener in &mut self.openers {
            scripts.append(&mut opener.take(pid, &self.opened)?);
        }
        Ok(scripts)
    }

    /// Finishes what [`Self::take`] has begun, when all processes have made their calls.
    ///
    /// # Errors
    /// The state cannot be restored.
    pub fn after_take(&mut self) -> Result<()> {
        self.openers.iter_mut().try_for_each(|opener| opener.after_take(&self.opened))
    }

    /// Adds the calls that set which process receives signals for the descriptors of a process.
    /// All processes must exist, and this one must have its user IDs.
    pub fn own(&mut self, pid: NsPid, fds: &[FdinfoEntry], script: &mut Script) {
        let local = |owner| self.opened.pids.local(owner, pid);
        for entry in fds {
            let Some(file) = self.opened.entries.get(&entry.id) else { continue };
            if let (Some((owner, flags)), Ok(number)) = (fown::of(file), i32::try_from(entry.fd)) {
                fown::install(owner, flags, (TargetFd(number), &local), script);
            }
        }
    }

    fn description(&self, id: u32) -> Result<BorrowedFd<'_>> {
        description(&self.descriptions, id)
    }

    /// Returns a pidfd of the restorer in a process. Adds the call that opens it, unless the process
    /// has one.
    fn open_director(&self, script: &mut Script) -> Arg {
        if let Some(director) = &self.director {
            return director.as_raw_fd().into();
        }
        let own = nix::unistd::getpid().as_raw();
        let what = "open a pidfd of the restorer";
        script.call(what, libc::SYS_pidfd_open, &[own.into(), 0.into()]).into()
    }

    fn close_director(&self, pidfd: Arg, script: &mut Script) {
        if self.director.is_none() {
            close(pidfd, script);
        }
    }

    /// Adds the call by which a process gives up what it has kept for its deferred descriptors.
    pub fn forget_director(&self, script: &mut Script) {
        if let Some(director) = &self.director {
            close(director.as_raw_fd().into(), script);
        }
    }

    /// Starts descriptions that act on their own, such as timers.
    pub fn start(&mut self) -> Result<()> {
        for opener in &mut self.openers {
            opener.start(&self.opened)?;
        }
        Ok(())
    }

    /// Reconnects descriptions to peers outside the tree ([`Opener::reconnect`]).
    ///
    /// # Errors
    /// [`FileError`].
    pub fn reconnect(&mut self) -> Result<()> {
        self.openers.iter_mut().try_for_each(|opener| opener.reconnect(&self.opened))
    }

    /// Sets the positions of deferred files, which show the state of processes, once that state
    /// is final.
    pub fn position_deferred(&self) -> Result<()> {
        for id in self
            .opened
            .deferred
            .iter()
            .filter(|(_, deferred)| **deferred == Deferred::ByPath)
            .map(|l| l.0)
        {
            if let Some((entry, kind)) = self.deferred_kind(*id) {
                self.openers[kind].complete(&entry, &self.opened)?;
            }
        }
        Ok(())
    }

    /// Returns the entry of a deferred description, and its kind.
    fn deferred_kind(&self, id: u32) -> Option<(FileEntry, usize)> {
        let entry = self.opened.entries.get(&id)?;
        Some((entry.clone(), FileKind::of(entry)?))
    }

    /// Removes the link remaps, once the tree is restored.
    pub fn finish(&mut self) {
        if let Err(error) = ghost::remove_link_remaps(&mut self.opened) {
            log::warn!("{}", with_sources(&error));
        }
    }
}

/// Adds the call that takes a descriptor from it.
fn take(pidfd: Arg, number: i32, script: &mut Script) -> CallId {
    let arguments = [pidfd, number.into(), 0.into()];
    script.call("take a descriptor", libc::SYS_pidfd_getfd, &arguments)
}

fn close(fd: Arg, script: &mut Script) {
    script.call("close a descriptor", libc::SYS_close, &[fd]);
}

fn description(descriptions: &HashMap<u32, Rc<OwnedFd>>, id: u32) -> Result<BorrowedFd<'_>> {
    let fd = descriptions.get(&id).map(|fd| fd.as_fd());
    fd.ok_or_else(|| FileError::image(id, "it is used but was not opened"))
}

/// Returns the first process that has each description; the first process of all stands for
/// descriptions that no process has.
fn holders(processes: &[FileUser<'_>]) -> HashMap<u32, Holder> {
    let mut holders = HashMap::new();
    for process in processes {
        let Some(creds) = process.creds.cloned().map(Rc::new) else { continue };
        let holder = Holder { pid: process.pid, creds };
        for id in process.fds.iter().map(|entry| entry.id).chain([NO_DESCRIPTION]) {
            holders.entry(id).or_insert_with(|| holder.clone());
        }
    }
    holders
}

/// How working and root directories are opened.
const DIRECTORY_FLAGS: i32 = libc::O_PATH;

fn file_id(entry: &VmaEntry) -> Result<u32> {
    let id = u32::try_from(entry.shmid);
    id.map_err(|_| FileError::image(0, format!("a mapping has the file {}", entry.shmid)))
}

/// Returns the flags to open the file of a mapping with.
fn access(entry: &VmaEntry) -> i32 {
    let write = entry.prot & libc::PROT_WRITE.cast_unsigned() != 0;
    match entry.fdflags {
        Some(flags) => flags.cast_signed() & (libc::O_ACCMODE | libc::O_NOATIME),
        None if entry.status & vma::FILE_SHARED != 0 && write => libc::O_RDWR,
        None => libc::O_RDONLY,
    }
}

fn too_many(id: u32) -> impl Fn(nix::errno::Errno) -> FileError {
    move |source| {
        let object = "a descriptor above all that the tree uses (raise ulimit -n)".to_owned();
        FileError::Restore { id, step: "make room for", object, source }
    }
}
