//! Open files: opened by this program, inherited by all processes, and put at their
//! numbers there.
//!
//! The descriptors are moved above all numbers that the tree uses before the first
//! process is made, so that putting one into its place never closes another.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use nix::libc;

use super::{
    FileError, FileKind, KINDS, Late, NO_DESCRIPTION, NOT_BY_PATH, Opened, Opener, RestoreOptions,
    Result, Usage, fown, ghost, owner::Holder,
};
use crate::{
    causes::with_sources,
    image::{
        Store,
        proto::{self, FdinfoEntry, FileEntry, FsEntry, VmaEntry},
        vma,
    },
    inject::{Arg, CallId, Script},
    sys::{fds, process},
    units::{NsPid, PidMap, TargetFd},
};

/// A process of the tree, as far as it matters for its files.
#[derive(Clone, Copy, Debug)]
pub struct FileUser<'a> {
    /// Its number.
    pub pid: NsPid,
    /// Its process group.
    pub group: NsPid,
    /// The credentials of its leader.
    pub creds: Option<&'a proto::CredsEntry>,
    /// Its descriptors.
    pub fds: &'a [FdinfoEntry],
}

/// All open files of the tree.
pub struct Installer<'a> {
    /// The processes that live, in the order of the images.
    processes: Vec<FileUser<'a>>,
    /// The entries of `files.img`.
    entries: &'a [FileEntry],
    /// What was opened so far.
    pub opened: Opened,
    openers: Vec<Box<dyn Opener>>,
    /// Descriptors above all that the tree uses.
    lowest: i32,
    descriptions: HashMap<u32, OwnedFd>,
    /// Files that are opened for something else than a descriptor, by number and
    /// access mode.
    others: HashMap<(u32, i32), OwnedFd>,
    /// Descriptions that were finished in some process, and where.
    installed: HashMap<u32, (NsPid, TargetFd)>,
    /// Those that watch others and do so by now.
    watching: HashSet<u32>,
    /// Directories that processes stand in and that are not there yet.
    late: HashSet<u32>,
}

impl std::fmt::Debug for Installer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Installer").field("opened", &self.opened).finish_non_exhaustive()
    }
}

impl<'a> Installer<'a> {
    /// Returns an installer that has not opened anything yet. `processes` are those that
    /// live, in the order of the images; `numbers` are all processes and threads of the tree.
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
            late: HashSet::new(),
        }
    }

    /// Opens what descriptors of the tree lead to. Shared memory was made before.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn open_descriptions(&mut self) -> Result<()> {
        // Files with a path that no descriptor leads to are programs or are mapped.
        let descriptors = self.processes.iter().flat_map(|process| process.fds);
        let mut used: HashSet<u32> = descriptors.map(|entry| entry.id).collect();
        for opener in &self.openers {
            used.extend(opener.inside(&self.opened)?);
        }
        // Some of the others stand for what a program outside of the tree has, as the
        // sockets of --ext-unix-sk do: nothing is opened for them.
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
        for id in used.iter().filter(|id| needed.contains(id) || self.opened.contains(**id)) {
            let fd =
                fds::duplicate_from(self.opened.get(*id)?, self.lowest).map_err(too_many(*id))?;
            self.descriptions.insert(*id, fd);
        }
        let lowest = self.lowest;
        let keep = |fd: BorrowedFd<'_>| fds::duplicate_from(fd, lowest).map_err(too_many(0));
        for opener in &mut self.openers {
            opener.carry(&self.opened, &keep)?;
        }
        Ok(())
    }

    /// Returns the number that a file has in all new processes which is opened for
    /// something else than a descriptor.
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
                return Err(FileError::image(id, "it is mapped as a memfd, but is none"));
            }
            None => return Err(FileError::image(id, NOT_BY_PATH)),
        };
        let fd = fds::duplicate_from(fd.as_fd(), self.lowest).map_err(too_many(id))?;
        let number = fd.as_raw_fd();
        self.others.insert((id, flags), fd);
        Ok(number)
    }

    /// Returns an entry and its kind, if that can be used so.
    fn kind_used(&self, id: u32, usage: Usage) -> Option<(&FileEntry, usize)> {
        let entry = self.opened.entries.get(&id)?;
        let kind = FileKind::of(entry).filter(|kind| KINDS[*kind].usage == usage)?;
        Some((entry, kind))
    }

    /// Whether a directory that processes stand in is that of a process, and not there
    /// yet.
    fn is_late(&self, id: u32) -> bool {
        self.kind_used(id, Usage::Path)
            .is_some_and(|(entry, kind)| self.openers[kind].is_late(entry, &self.opened))
    }

    /// Makes the shared memory that has entries among the files, without its bytes. Returns
    /// its `shmid`s.
    ///
    /// # Errors
    /// [`FileError::Memory`].
    pub fn make_memory(&mut self) -> Result<Vec<u64>> {
        let mut made = Vec::new();
        for opener in &mut self.openers {
            made.extend(opener.make_memory(&mut self.opened)?);
        }
        Ok(made)
    }

    /// Seals memory, after everything was mapped and filled.
    ///
    /// # Errors
    /// [`FileError::Restore`].
    pub fn seal(&mut self) -> Result<()> {
        self.openers.iter_mut().try_for_each(|opener| opener.seal(&self.opened))
    }

    /// Opens the file that a process executes.
    ///
    /// # Errors
    /// [`FileError`]: it is missing, or is another.
    pub fn need_program(&mut self, id: u32) -> Result<()> {
        self.other(id, libc::O_RDONLY, Usage::Path).map(drop)
    }

    /// Opens a directory that a process stands in.
    ///
    /// # Errors
    /// As [`Self::need_program`].
    pub fn need_directory(&mut self, id: u32) -> Result<()> {
        if self.is_late(id) {
            self.late.insert(id);
            return Ok(());
        }
        self.other(id, STAND, Usage::Path).map(drop)
    }

    /// Opens what a mapping maps.
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

    /// Moves the descriptors of shared memory to where they are in no process's way.
    /// Anonymous shared memory has no file in the images, but an object.
    ///
    /// # Errors
    /// [`FileError::Restore`].
    pub fn move_objects(&mut self) -> Result<()> {
        let objects: Vec<u64> = self.opened.objects.keys().copied().collect();
        for shmid in objects {
            let fd = fds::duplicate_from(self.opened.objects[&shmid].as_fd(), self.lowest)
                .map_err(too_many(0))?;
            self.opened.objects.insert(shmid, fd);
        }
        Ok(())
    }

    /// Returns the descriptor, in all new processes, for a mapping of a file.
    ///
    /// # Errors
    /// [`FileError::Image`] if there is none.
    pub fn for_mapping(&self, entry: &VmaEntry) -> Result<i32> {
        if entry.status & vma::ANON_SHARED != 0 {
            let object = self.opened.objects.get(&entry.shmid);
            let fd = object.ok_or_else(|| {
                let problem = format!("shared memory {} is mapped but was not made", entry.shmid);
                FileError::image(0, problem)
            })?;
            return Ok(fd.as_raw_fd());
        }
        let key = (file_id(entry)?, access(entry));
        let fd =
            self.others.get(&key).ok_or_else(|| FileError::image(key.0, "it was not opened"))?;
        Ok(fd.as_raw_fd())
    }

    /// Returns the descriptor, in all new processes, of the program of a process.
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

    /// Adds the calls that give a process its root, working directory and umask.
    ///
    /// # Errors
    /// As [`Self::for_mapping`].
    pub fn stand(&self, fs: &FsEntry, script: &mut Script) -> Result<()> {
        let is_slash = self
            .opened
            .entries
            .get(&fs.root_id)
            .and_then(|entry| entry.reg.as_ref())
            .is_some_and(|reg| reg.name == b"/");
        if !is_slash && !self.late.contains(&fs.root_id) {
            change_root(self.opened_path(fs.root_id, STAND)?.into(), script);
        }
        if !self.late.contains(&fs.cwd_id) {
            let cwd = self.opened_path(fs.cwd_id, STAND)?;
            script.call("enter the working directory", libc::SYS_fchdir, &[cwd.into()]);
        }
        if let Some(umask) = fs.umask {
            script.call("set the umask", libc::SYS_umask, &[umask.into()]);
        }
        Ok(())
    }

    /// Adds the calls of a process that need the descriptors of this program.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn prepare(&mut self, pid: NsPid, script: &mut Script) -> Result<()> {
        let descriptions = &self.descriptions;
        let at = |id| Ok(TargetFd(description(descriptions, id)?.as_raw_fd()));
        for opener in &mut self.openers {
            opener.prepare_process(pid, &at, script)?;
        }
        Ok(())
    }

    /// Adds the calls that put all descriptors of a process into their places and
    /// close all others. Tasks come in the order of the images.
    ///
    /// # Errors
    /// [`FileError`].
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
        for number in numbers.keys().copied().chain([i32::MAX]) {
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
        Ok(())
    }

    /// Opens what could not be opened before all processes and threads were there, and
    /// fills what may hold any of the files.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn open_late(&mut self) -> Result<()> {
        for id in self.late.clone() {
            self.other(id, STAND, Usage::Path)?;
        }
        let late: Vec<_> = self.opened.late.iter().map(|(id, late)| (*id, *late)).collect();
        for (id, late) in late {
            let fd = match (late, self.installed.get(&id)) {
                (Late::ByPath, _) => {
                    let Some((entry, kind)) = self.late_kind(id) else { continue };
                    self.openers[kind].open_late(&entry, &mut self.opened)?
                }
                (Late::Inside, Some((pid, number))) => {
                    let failed = |step| FileError::restore(id, step, format!("process {pid}"));
                    let pidfd =
                        process::pidfd_open(self.opened.pids.host(*pid)).map_err(failed("open"))?;
                    let got = process::pidfd_getfd(&pidfd, *number);
                    got.map_err(failed("take a descriptor from"))?
                }
                (Late::Inside, None) => continue,
            };
            let copy = fds::duplicate_from(fd.as_fd(), self.lowest).map_err(too_many(id))?;
            self.descriptions.insert(id, copy);
            self.opened.insert(id, fd);
        }
        for opener in &mut self.openers {
            opener.fill(&self.opened)?;
        }
        Ok(())
    }

    /// Adds the calls by which a process enters directories that were opened late. It takes
    /// them from this program.
    ///
    /// # Errors
    /// As [`Self::for_mapping`].
    pub fn stand_late(&self, fs: &FsEntry, script: &mut Script) -> Result<()> {
        let (root, cwd) = (fs.root_id, fs.cwd_id);
        let late = [root, cwd].map(|id| self.late.contains(&id));
        if late == [false; 2] {
            return Ok(());
        }
        let pidfd = open_director(script);
        if late[0] {
            let fd = take(pidfd, self.opened_path(root, STAND)?, script);
            change_root(fd.into(), script);
            close(fd.into(), script);
        }
        let fd = take(pidfd, self.opened_path(cwd, STAND)?, script);
        script.call("enter the working directory", libc::SYS_fchdir, &[fd.into()]);
        close(fd.into(), script);
        close(pidfd.into(), script);
        Ok(())
    }

    /// Adds the calls that put into their places what was opened late, and those that
    /// need all other files to be in place. The process gets the files from this program,
    /// which it was made too early to inherit them from.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn install_late(
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
            match self.opened.late.get(&entry.id) {
                None => {}
                Some(Late::Inside) if is_first(entry.id, number) => {}
                Some(_) => {
                    wanted.push((self.description(entry.id)?.as_raw_fd(), number, entry.flags));
                }
            }
        }
        if !wanted.is_empty() {
            let pidfd = open_director(script);
            for (from, number, flags) in wanted {
                let fd = take(pidfd, from, script);
                let flags =
                    if flags & libc::FD_CLOEXEC.cast_unsigned() == 0 { 0 } else { libc::O_CLOEXEC };
                let what = format!("install descriptor {number}");
                script.call(what, libc::SYS_dup3, &[fd.into(), number.into(), flags.into()]);
                close(fd.into(), script);
            }
            close(pidfd.into(), script);
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

    /// Adds the calls that say who is told of events of the descriptors of a process,
    /// when all processes exist and it has its user ids.
    pub fn own(&mut self, fds: &[FdinfoEntry], script: &mut Script) {
        for entry in fds {
            let Some(file) = self.opened.entries.get(&entry.id) else { continue };
            if let (Some((owner, flags)), Ok(number)) = (fown::of(file), i32::try_from(entry.fd)) {
                fown::install(owner, flags, TargetFd(number), script);
            }
        }
    }

    fn description(&self, id: u32) -> Result<BorrowedFd<'_>> {
        description(&self.descriptions, id)
    }

    /// Starts what runs by itself.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn start(&mut self) -> Result<()> {
        for opener in &mut self.openers {
            opener.start(&self.opened)?;
        }
        Ok(())
    }

    /// Sets the positions of files that show the state of processes, when nothing of that
    /// changes any more.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn position_late(&self) -> Result<()> {
        for id in self.opened.late.iter().filter(|(_, late)| **late == Late::ByPath).map(|l| l.0) {
            if let Some((entry, kind)) = self.late_kind(*id) {
                self.openers[kind].complete(&entry, &self.opened)?;
            }
        }
        Ok(())
    }

    /// Returns the entry of a description that is opened late, and its kind.
    fn late_kind(&self, id: u32) -> Option<(FileEntry, usize)> {
        let entry = self.opened.entries.get(&id)?;
        Some((entry.clone(), FileKind::of(entry)?))
    }

    /// Cleans up when the tree is restored.
    pub fn finish(&mut self) {
        if let Err(error) = ghost::remove_links(&mut self.opened) {
            log::warn!("{}", with_sources(&error));
        }
    }
}

fn change_root(fd: Arg, script: &mut Script) {
    script.call("enter the root directory", libc::SYS_fchdir, &[fd]);
    let here = script.string(c".");
    script.call("change the root directory", libc::SYS_chroot, &[here.into()]);
}

/// Adds the call by which a process gets a descriptor of this program.
fn open_director(script: &mut Script) -> CallId {
    let own = nix::unistd::getpid().as_raw();
    script.call("open this program", libc::SYS_pidfd_open, &[own.into(), 0.into()])
}

/// Adds the call by which it takes a descriptor from there.
fn take(pidfd: CallId, number: i32, script: &mut Script) -> CallId {
    let arguments = [pidfd.into(), number.into(), 0.into()];
    script.call("take a descriptor", libc::SYS_pidfd_getfd, &arguments)
}

fn close(fd: Arg, script: &mut Script) {
    script.call("close a descriptor", libc::SYS_close, &[fd]);
}

fn description(descriptions: &HashMap<u32, OwnedFd>, id: u32) -> Result<BorrowedFd<'_>> {
    let fd = descriptions.get(&id).map(AsFd::as_fd);
    fd.ok_or_else(|| FileError::image(id, "it is used but was not opened"))
}

/// Returns the first process that has each description, and the first of all for those that
/// none has.
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

/// How directories are opened that processes stand in.
const STAND: i32 = libc::O_PATH;

fn file_id(entry: &VmaEntry) -> Result<u32> {
    let id = u32::try_from(entry.shmid);
    id.map_err(|_| FileError::image(0, format!("a mapping has the file {}", entry.shmid)))
}

/// Returns how the file of a mapping is opened.
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
        let object = "a descriptor above all that the tree uses (see ulimit -n)".to_owned();
        FileError::Restore { id, step: "make room for", object, source }
    }
}
