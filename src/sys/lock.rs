//! Locks image directories (`flock(2)`). A lock ends when its holder exits, in whatever way, and
//! leaves no file behind.

use std::{
    collections::HashMap,
    fmt,
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
};
use thiserror::Error;

/// How a directory is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// This process reads the directory; others may read it as well.
    Shared,
    /// This process changes the directory; no other process may use it.
    Exclusive,
}

/// A process that has locked a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its pid.
    pub pid: i32,
    /// The name of its program; empty if it has just exited.
    pub program: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = if self.program.is_empty() { "a process" } else { &self.program };
        write!(f, "{program} (pid {})", self.pid)
    }
}

/// Why a directory cannot be used now.
#[derive(Debug, Error)]
pub enum LockError {
    /// Another process uses the directory.
    #[error(
        "{path} is in use by {holder}\nhelp: wait until it has ended",
        path = .path.display(),
        holder = .holder.as_ref().map_or_else(|| "another program".to_owned(), ToString::to_string)
    )]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process, if it is in a visible pid namespace.
        holder: Option<Holder>,
    },
    /// The directory could not be locked.
    #[error("lock directory {path}", path = .path.display())]
    Failed {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// A file, identified by device and inode number.
type Identity = (u64, u64);

/// Locked directories. Dropping this unlocks them.
#[derive(Debug, Default)]
pub struct DirectoryLocks {
    held: HashMap<Identity, (Access, Flock<File>)>,
}

impl DirectoryLocks {
    /// Locks one more directory, without waiting. A directory that is already locked keeps the
    /// stronger of both locks.
    ///
    /// The process that is to hold the lock must take it itself, after any fork: other processes
    /// learn its pid. If the file system has no locks, the directory can still be read, with a
    /// warning.
    ///
    /// # Errors
    /// [`LockError::InUse`]; [`LockError::Failed`] if the directory cannot be opened, or cannot be
    /// locked for changes.
    pub fn take(&mut self, path: &Path, access: Access) -> Result<(), LockError> {
        let failed = |source| LockError::Failed { path: path.to_owned(), source };
        let flags = (OFlag::O_DIRECTORY | OFlag::O_CLOEXEC).bits();
        let dir = File::options().read(true).custom_flags(flags).open(path).map_err(failed)?;
        let stat = dir.metadata().map_err(failed)?;
        let identity = (stat.dev(), stat.ino());
        let mode = match access {
            Access::Shared => FlockArg::LockSharedNonblock,
            Access::Exclusive => FlockArg::LockExclusiveNonblock,
        };
        if self.held.get(&identity).is_some_and(|(held, _)| *held >= access) {
            return Ok(());
        }
        // Our own shared lock would conflict with an exclusive one.
        drop(self.held.remove(&identity));
        match Flock::lock(dir, mode) {
            Ok(lock) => {
                self.held.insert(identity, (access, lock));
                Ok(())
            }
            Err((dir, Errno::EWOULDBLOCK)) => {
                Err(LockError::InUse { path: path.to_owned(), holder: holder(&dir) })
            }
            // NFS without a lock daemon, and some other file systems.
            Err((_, errno @ (Errno::ENOLCK | Errno::EBADF | Errno::ENOTSUP | Errno::ENOSYS)))
                if access == Access::Shared =>
            {
                log::warn!(
                    "{}: cannot lock it, so other programs may change it: {errno}",
                    path.display()
                );
                Ok(())
            }
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }
}

/// Returns the process that has locked a directory; `None` if it is in another pid namespace or has
/// just released the lock.
fn holder(dir: &File) -> Option<Holder> {
    let inode = dir.metadata().ok()?.ino();
    let device = device(dir)?;
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let pid = locks.lines().find_map(|line| locker(line, device, inode))?;
    let program = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(Holder { pid, program: program.trim_end().to_owned() })
}

/// Returns the major and minor device number that `/proc/locks` shows for a file: that of its file
/// system. On btrfs, `stat(2)` returns another one for each subvolume.
fn device(dir: &File) -> Option<(u32, u32)> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", dir.as_raw_fd())).ok()?;
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim();
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mut ours = mounts.lines().filter(|line| line.split(' ').next() == Some(mount));
    let (major, minor) = ours.next()?.split(' ').nth(2)?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Returns the pid in a line of `/proc/locks` (`proc_locks(5)`), if the line is about a held `flock(2)`
/// on this file.
fn locker(line: &str, device: (u32, u32), inode: u64) -> Option<i32> {
    // NUMBER: [->] FLOCK ADVISORY MODE PID MAJOR:MINOR:INODE START END
    let mut words = line.split_whitespace().skip(1);
    if words.next() != Some("FLOCK") {
        return None;
    }
    let pid = words.nth(2)?.parse().ok()?;
    let mut file = words.next()?.split(':');
    let mut hexadecimal = || u32::from_str_radix(file.next()?, 16).ok();
    let found = (hexadecimal()?, hexadecimal()?);
    let same = found == device && file.next()?.parse() == Ok(inode);
    (same && pid > 0).then_some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_other_files_and_of_those_who_wait_are_left_out() {
        let line = "12: FLOCK  ADVISORY  WRITE 4711 fe:00:131 0 EOF";
        assert_eq!(locker(line, (0xfe, 0), 131), Some(4711));
        assert_eq!(locker(line, (0xfe, 0), 13), None);
        assert_eq!(locker(line, (0xfd, 0), 131), None);
        for other in [
            "12: -> FLOCK  ADVISORY  WRITE 4711 fe:00:131 0 EOF",
            "12: POSIX  ADVISORY  WRITE 4711 fe:00:131 0 EOF",
            "12: FLOCK  ADVISORY  WRITE 0 fe:00:131 0 EOF",
            "12: FLOCK  ADVISORY  WRITE",
            "",
        ] {
            assert_eq!(locker(other, (0xfe, 0), 131), None, "{other}");
        }
    }

    #[test]
    fn readers_share_and_who_changes_is_alone_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let take = |locks: &mut DirectoryLocks, access| locks.take(dir.path(), access);
        let (mut one, mut two) = (DirectoryLocks::default(), DirectoryLocks::default());
        take(&mut one, Access::Shared).unwrap();
        take(&mut two, Access::Shared).unwrap();
        let refused = take(&mut two, Access::Exclusive).unwrap_err();
        let LockError::InUse { holder: Some(holder), .. } = &refused else { panic!("{refused:?}") };
        assert_eq!(holder.pid.unsigned_abs(), std::process::id());
        let said = refused.to_string();
        let pid = format!("(pid {})", std::process::id());
        assert!(said.contains(&dir.path().display().to_string()) && said.contains(&pid), "{said}");
        drop(two);
        // Our own weaker lock does not conflict.
        take(&mut one, Access::Exclusive).unwrap();
        take(&mut one, Access::Shared).unwrap();
        let mut three = DirectoryLocks::default();
        take(&mut three, Access::Shared).unwrap_err();
        drop(one);
        take(&mut three, Access::Exclusive).unwrap();
    }
}
