//! Restores file locks.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::ErrorKind,
    os::{fd::BorrowedFd, unix::fs::OpenOptionsExt},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
    sys::stat::{fstat, major, minor},
};

use super::{BREAKING, FLOCK, InWords, LEASE, OFD, POSIX, dump::name_of};
use crate::{
    image::{
        Kind,
        proto::{FileEntry, FileLockEntry},
    },
    inject::Script,
    proc::{self, FileLock, LockMode},
    res::file::{
        FileError, FileUser, NO_DESCRIPTION, Opened, Opener, Result, descriptor, error::errno, fown,
    },
    sys::fds,
    units::{HostPid, NsPid, TargetFd},
};

/// `F_SETLEASE` (`include/uapi/linux/fcntl.h`), which `libc` has for few targets.
const F_SETLEASE: i32 = 1024;

/// How many locks a process takes in one script.
const LOCKS_PER_SCRIPT: usize = 500;

/// The locks of the images.
#[derive(Debug, Default)]
pub(super) struct Locks {
    entries: Vec<FileLockEntry>,
    locks: Vec<Lock>,
}

/// A lock with the description that it is for.
#[derive(Clone, Debug)]
struct Lock {
    file: u32,
    entry: FileLockEntry,
    mode: LockMode,
}

impl Lock {
    fn of(file: u32, entry: FileLockEntry) -> Result<Self> {
        let mode = match entry.r#type & !BREAKING {
            0 => Some(LockMode::Read),
            1 => Some(LockMode::Write),
            2 => Some(LockMode::None),
            _ => None,
        };
        let is_breaking = entry.flag == LEASE && entry.r#type & BREAKING != 0;
        match (entry.flag, mode) {
            (POSIX | FLOCK | OFD, Some(mode @ (LockMode::Read | LockMode::Write)))
                if entry.r#type & BREAKING == 0 =>
            {
                Ok(Self { file, entry, mode })
            }
            (LEASE, Some(mode)) if is_breaking || mode != LockMode::None => {
                Ok(Self { file, entry, mode })
            }
            (flag, _) => {
                let problem =
                    format!("filelocks.img has a lock of kind {flag} and type {}", entry.r#type);
                Err(FileError::image(file, problem))
            }
        }
    }

    fn is_breaking(&self) -> bool {
        self.entry.r#type & BREAKING != 0
    }

    /// Returns the argument of `F_SETLK`.
    fn range(&self) -> libc::flock {
        let kind = if self.mode == LockMode::Write { libc::F_WRLCK } else { libc::F_RDLCK };
        let narrow = |number: i32| libc::c_short::try_from(number).expect("a small constant");
        libc::flock {
            l_type: narrow(kind),
            l_whence: narrow(libc::SEEK_SET),
            l_start: self.entry.start,
            l_len: self.entry.len,
            l_pid: 0,
        }
    }

    /// Checks that no other process holds a lock that conflicts. A lease is not checked.
    fn check_free(&self, opened: &Opened) -> Result<()> {
        let fd = opened.get(self.file)?;
        let mut range = self.range();
        let is_free = |range: &libc::flock| i32::from(range.l_type) == libc::F_UNLCK;
        let checked = match self.entry.flag {
            POSIX => fcntl(fd, FcntlArg::F_GETLK(&mut range)).map(|_| is_free(&range)),
            OFD => fcntl(fd, FcntlArg::F_OFD_GETLK(&mut range)).map(|_| is_free(&range)),
            FLOCK => match fds::flock(fd, self.operation()) {
                // The kernel shows the process that takes the lock, so this must not be rcriu.
                Ok(()) => fds::flock(fd, libc::LOCK_UN).map(|()| true),
                Err(Errno::EAGAIN) => Ok(false),
                Err(errno) => Err(errno),
            },
            _ => Ok(true),
        };
        match checked {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.refused(fd)),
            Err(errno) => {
                Err(FileError::restore(self.file, "look for locks of", "the file")(errno))
            }
        }
    }

    /// Takes the lock of a description that no process has a descriptor of.
    fn take(&self, opened: &Opened) -> Result<()> {
        let fd = opened.get(self.file)?;
        let taken = match self.entry.flag {
            FLOCK => fds::flock(fd, self.operation()),
            OFD => fcntl(fd, FcntlArg::F_OFD_SETLK(&self.range())).map(drop),
            _ => Err(Errno::EINVAL),
        };
        taken.map_err(FileError::restore(self.file, "lock", "the file"))
    }

    /// Returns the operation for `flock(2)`.
    fn operation(&self) -> i32 {
        let mode = if self.mode == LockMode::Read { libc::LOCK_SH } else { libc::LOCK_EX };
        mode | libc::LOCK_NB
    }

    /// Returns the lease to take, for one that is being broken as it was before.
    fn lease_before(&self, opened: &Opened) -> i32 {
        let flags = opened.entries.get(&self.file).and_then(fown::of).map_or(0, |(_, flags)| flags);
        // Only write leases can be taken by descriptions for writing, and only these become read
        // leases. Otherwise, it makes no difference.
        let can_write = flags.cast_signed() & libc::O_ACCMODE != libc::O_RDONLY;
        match (self.mode, self.is_breaking()) {
            (LockMode::Write, _) | (LockMode::Read, true) => libc::F_WRLCK,
            (LockMode::None, _) if can_write => libc::F_WRLCK,
            _ => libc::F_RDLCK,
        }
    }

    /// Returns the error for a lock that another process holds.
    fn refused(&self, fd: BorrowedFd) -> FileError {
        let own = nix::unistd::getpid().as_raw();
        let mut locks = proc::locks().unwrap_or_default();
        locks.retain(|lock| !lock.is_waiting && lock.pid != own);
        let holder = fstat(fd).ok().and_then(|stat| {
            // On btrfs, `stat(2)` returns another device than the locks show.
            let is_on_device = |lock: &&FileLock| {
                (lock.device.0.into(), lock.device.1.into())
                    == (major(stat.st_dev), minor(stat.st_dev))
            };
            let mut same = locks.iter().filter(|lock| lock.inode == stat.st_ino);
            same.clone().find(is_on_device).or_else(|| same.next())
        });
        let holder = holder.map_or_else(
            || "another process holds a lock on it".to_owned(),
            |lock| format!("{} holds {} on it", name_of(HostPid(lock.pid)), InWords(lock)),
        );
        let problem = format!(
            "it was locked when it was dumped, but now {holder}\nhelp: end that process, or have it \
             release the lock, and restore again"
        );
        FileError::image(self.file, problem)
    }

    /// Adds the calls by which a process takes the lock by the descriptor `fd`.
    fn taken_by(&self, fd: TargetFd, opened: &Opened, script: &mut Script) {
        let caller = NsPid::of_image(self.entry.pid);
        let local = |pid| opened.pids.local(pid, caller);
        let again = |step| {
            format!(
                "{step} descriptor {fd} again (another process may have taken a lock or opened it)"
            )
        };
        let command = match self.entry.flag {
            FLOCK => {
                let arguments = [fd.0.into(), self.operation().into()];
                script.call(again("lock"), libc::SYS_flock, &arguments);
                return;
            }
            POSIX => Some(libc::F_SETLK),
            OFD => Some(libc::F_OFD_SETLK),
            _ => None,
        };
        if let Some(command) = command {
            let range = self.range();
            let mut bytes = [range.l_type, range.l_whence].map(i16::to_ne_bytes).concat();
            bytes.resize(size_of::<i64>(), 0);
            bytes.extend([range.l_start, range.l_len, 0].map(i64::to_ne_bytes).concat());
            let range = script.bytes(&bytes);
            let arguments = [fd.0.into(), command.into(), range.into()];
            script.call(again("lock"), libc::SYS_fcntl, &arguments);
            return;
        }
        let owner = opened.entries.get(&self.file).and_then(fown::of);
        let owner = owner.map(|(owner, _)| owner);
        let owner = owner.filter(|owner| owner.pid != 0 && !self.is_breaking());
        if let Some(owner) = owner {
            // Otherwise, the kernel makes the process the owner.
            fown::install(owner, 0, (fd, &local), script);
        }
        let arguments = [fd.0.into(), F_SETLEASE.into(), self.lease_before(opened).into()];
        script.call(again("take the lease of"), libc::SYS_fcntl, &arguments);
        if owner.is_none() {
            let arguments = [fd.0.into(), libc::F_SETOWN.into(), 0.into()];
            script.call("remove the owner of a descriptor", libc::SYS_fcntl, &arguments);
        }
    }

    /// Breaks a lease, as the dumped one was being broken.
    fn break_again(&self, opened: &Opened) -> Result<()> {
        let path = descriptor::path_of(opened.get(self.file)?);
        let write = self.mode == LockMode::None;
        let mut open = File::options();
        open.read(!write).write(write).custom_flags(libc::O_NONBLOCK);
        let failure = match open.open(&path) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => errno(&error),
            // The lease is gone.
            Ok(_) => Errno::ESTALE,
        };
        Err(FileError::restore(self.file, "break the lease of", "the file")(failure))
    }
}

impl Opener for Locks {
    fn open(&mut self, _: &[FileEntry], opened: &mut Opened) -> Result<()> {
        let entries = opened.images.messages_if_any::<FileLockEntry>(Kind::FileLocks, 0)?;
        self.entries = entries.unwrap_or_default();
        Ok(())
    }

    fn attach(&mut self, users: &[FileUser<'_>], opened: &Opened) -> Result<()> {
        let entries = std::mem::take(&mut self.entries);
        if entries.is_empty() {
            return Ok(());
        }
        let wanted: HashSet<i32> = entries.iter().map(|entry| entry.fd).collect();
        let mut files = HashMap::new();
        for user in users {
            let fds = user.fds.iter().filter(|fd| wanted.contains(&fd.fd.cast_signed()));
            files.extend(fds.map(|fd| ((user.pid.raw(), fd.fd.cast_signed()), fd.id)));
        }
        for entry in entries {
            let (pid, fd) = (entry.pid, entry.fd);
            let file = entry.rcriu_file.or_else(|| files.get(&(pid, fd)).copied());
            let file = file.ok_or_else(|| {
                let problem = format!(
                    "filelocks.img has a lock of descriptor {fd} of process {pid}, which is not open"
                );
                FileError::image(NO_DESCRIPTION, problem)
            })?;
            let lock = Lock::of(file, entry)?;
            if lock.entry.rcriu_file.is_some() {
                lock.take(opened)?;
            } else if !opened.deferred.contains_key(&file) {
                lock.check_free(opened)?;
            }
            self.locks.push(lock);
        }
        Ok(())
    }

    fn take(&mut self, pid: NsPid, opened: &Opened) -> Result<Vec<Script>> {
        let is_own = |lock: &&Lock| lock.entry.pid == pid.raw() && lock.entry.rcriu_file.is_none();
        let own: Vec<&Lock> = self.locks.iter().filter(is_own).collect();
        let scripts = own.chunks(LOCKS_PER_SCRIPT).map(|locks| {
            let mut script = Script::new();
            for lock in locks {
                lock.taken_by(TargetFd(lock.entry.fd), opened, &mut script);
            }
            script
        });
        Ok(scripts.collect())
    }

    fn after_take(&mut self, opened: &Opened) -> Result<()> {
        let mut breaking = self.locks.iter().filter(|lock| lock.is_breaking());
        breaking.try_for_each(|lock| lock.break_again(opened))
    }
}
