//! Dumps file locks.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashSet},
};

use super::{InWords, Options, to_image};
use crate::{
    causes::tell,
    image::{
        Kind, SnapshotWriter,
        proto::{FileEntry, FileLockEntry},
    },
    proc::{self, FileLock, LockKind},
    res::file::{Collector, Description, FileError, Intake, Locked, Result},
    sys::process::{self, Shared},
    units::{HostPid, TargetFd},
};

/// The locks of a description, or those that a process has taken by it.
#[derive(Clone, Debug)]
struct Held {
    /// A process that has the description, or a thread of it.
    pid: HostPid,
    /// The descriptor there; negative for a file that is only queued in a socket.
    number: TargetFd,
    link: String,
    locks: Vec<FileLock>,
}

/// The locks of the tree.
#[derive(Debug, Default)]
pub(super) struct Locks {
    options: Options,
    /// By description, and for POSIX locks also by process.
    found: BTreeMap<(u32, Option<HostPid>), Held>,
    entries: Vec<FileLockEntry>,
    /// What the user must know if the dump ends the tree.
    warnings: Vec<String>,
}

impl Locks {
    pub(super) fn new(options: Options) -> Self {
        Self { options, ..Self::default() }
    }

    /// Returns the entries of the images.
    fn entries(&self, intake: &dyn Intake) -> Result<Vec<FileLockEntry>> {
        let mut entries = Vec::new();
        for ((file, _), held) in &self.found {
            let is_queued = held.number.0 < 0;
            if is_queued && held.locks.iter().any(|lock| lock.kind == LockKind::Lease) {
                let what = format!("{}, on which it has a lease", held.link);
                let help = "have the program receive the file from the socket";
                let (pid, fd) = (held.pid, held.number);
                return Err(FileError::Unsupported { pid, fd, what, help });
            }
            // No process has the number 0, so CRIU passes over the entry.
            let pid = if is_queued { HostPid(0) } else { proc::status(held.pid)?.tgid };
            for lock in &held.locks {
                let pid = if takes_for(HostPid(lock.pid), pid) { HostPid(lock.pid) } else { pid };
                entries.extend(to_image(lock).map(|entry| FileLockEntry {
                    pid: intake.pids().ns(pid).raw(),
                    fd: held.number.0,
                    rcriu_file: is_queued.then_some(*file),
                    ..entry
                }));
            }
        }
        Ok(entries)
    }

    /// Looks for processes outside the tree that hold a lock of the tree as well, or would take it
    /// when the tree ends; and for locks of the tree that no descriptor shows.
    fn look_around(&mut self, intake: &dyn Intake) -> Result<()> {
        let in_tree = |pid: HostPid| intake.has_process(intake.pids().ns(pid));
        let mut known: Vec<(&str, FileLock)> = Vec::new();
        for held in self.found.values() {
            known.extend(held.locks.iter().map(|lock| (&*held.link, *lock)));
        }
        let mut unseen = Vec::new();
        let mut warnings = Vec::new();
        for lock in proc::locks()? {
            let pid = HostPid(lock.pid);
            let file = known
                .iter()
                .find(|(_, other)| (other.device, other.inode) == (lock.device, lock.inode));
            match file {
                Some((link, _)) if lock.is_waiting && !in_tree(pid) => warnings.push(format!(
                    "{} waits for {} on {link}: it may get the lock now that the tree ends\nhelp: \
                     restore the tree when that process has released it",
                    name_of(pid),
                    InWords(&lock)
                )),
                _ if !lock.is_waiting
                    && in_tree(pid)
                    && matches!(lock.kind, LockKind::Flock | LockKind::Lease)
                    && !known.iter().any(|(_, other)| other.is_same(&lock)) =>
                {
                    unseen.push(lock);
                }
                _ => {}
            }
        }
        let of_files = known.iter().filter(|(_, lock)| lock.kind != LockKind::Posix);
        let wanted: Vec<FileLock> =
            of_files.map(|(_, lock)| *lock).chain(unseen.iter().copied()).collect();
        for (pid, lock) in held_outside(&wanted, &in_tree)? {
            unseen.retain(|other| !other.is_same(&lock));
            if let Some((link, _)) = known.iter().find(|(_, other)| other.is_same(&lock)) {
                warnings.push(format!(
                    "{} is outside the tree and has the same open file {link}, so it keeps {} when \
                     the tree ends\nhelp: restore the tree when that process has closed it",
                    name_of(pid),
                    InWords(&lock)
                ));
            }
        }
        // The JVM does that with its performance data.
        for lock in unseen.extract_if(.., |lock| lock.kind == LockKind::Flock) {
            let (major, minor) = lock.device;
            let warning = format!(
                "{} has mapped the inode {} of the device {major}:{minor} and closed the file, and \
                 holds {}: a restored process does not hold it\nhelp: if other programs rely on the \
                 lock, have the program release it, or unmap the file, before the dump",
                name_of(HostPid(lock.pid)),
                lock.inode,
                InWords(&lock)
            );
            tell(log::Level::Warn, &warning);
        }
        if let Some(lock) = unseen.first() {
            let (major, minor) = lock.device;
            let what = format!(
                "the inode {} of the device {major}:{minor}, on which it holds {}",
                lock.inode,
                InWords(lock)
            );
            let help = "have the program release the lock, or unmap the file that it has closed";
            return Err(FileError::Unsupported {
                pid: HostPid(lock.pid),
                fd: TargetFd(-1),
                what,
                help,
            });
        }
        self.warnings = warnings;
        Ok(())
    }
}

/// Returns which of these locks of open file descriptions belong to descriptions that processes
/// outside the tree have.
fn held_outside(
    locks: &[FileLock],
    in_tree: &dyn Fn(HostPid) -> bool,
) -> Result<Vec<(HostPid, FileLock)>> {
    let mut found = Vec::new();
    if locks.is_empty() {
        return Ok(found);
    }
    let inodes: HashSet<u64> = locks.iter().map(|lock| lock.inode).collect();
    let own = HostPid::own();
    for pid in proc::pids()?.into_iter().filter(|pid| *pid != own && !in_tree(*pid)) {
        let mut of_process = HashSet::new();
        // A process that has exited has no descriptors left.
        for number in proc::fds(pid).unwrap_or_default() {
            let Ok(info) = proc::fdinfo(pid, number) else { continue };
            for lock in info.locks.iter().filter(|lock| inodes.contains(&lock.inode)) {
                if locks.iter().any(|known| known.is_same(lock)) && of_process.insert(*lock) {
                    found.push((pid, *lock));
                }
            }
        }
    }
    Ok(found)
}

/// Whether the process that took a lock is another one than `pid`, and shares its descriptors.
fn takes_for(taker: HostPid, pid: HostPid) -> bool {
    let is_other = taker.0 > 0 && pid.0 > 0 && taker != pid;
    is_other && process::kcmp(taker, pid, Shared::Files) == Ok(Ordering::Equal)
}

/// Names a process in a message.
pub(super) fn name_of(pid: HostPid) -> String {
    match proc::comm(pid, pid) {
        Ok(name) => format!("process {pid} ({})", String::from_utf8_lossy(&name)),
        // Open file description locks and processes outside of the pid namespace.
        Err(_) => "another process".to_owned(),
    }
}

impl Collector for Locks {
    fn claims(&self, _: &Description) -> bool {
        false
    }

    fn collect(&mut self, file: &Description, _: &mut dyn Intake) -> Result<FileEntry> {
        Err(file.unsupported("a file that only has locks", "close it"))
    }

    fn locked(&mut self, at: &Locked<'_>) -> Result<()> {
        let link = String::from_utf8_lossy(at.link);
        for lock in &at.info.locks {
            let refused = |help| {
                let what = format!("{link}, on which it holds {}", InWords(lock));
                Err(FileError::Unsupported { pid: at.pid, fd: at.number, what, help })
            };
            if lock.kind == LockKind::Other {
                return refused("have the program release it: locks of this kind are not dumped");
            }
            if !self.options.is_wanted {
                return refused("dump the locks, too, with --file-locks");
            }
        }
        for owner in [None, Some(at.pid)] {
            let is_owned = |lock: &&FileLock| (lock.kind == LockKind::Posix) == owner.is_some();
            let locks: Vec<FileLock> = at.info.locks.iter().filter(is_owned).copied().collect();
            let key = (at.file, owner);
            // A file that was first found in a socket may also have a descriptor. If possible, the
            // process that took the lock takes it again.
            let is_better = |known: &Held| {
                let took = |held: HostPid| locks.iter().any(|lock| lock.pid == held.0);
                known.number.0 < 0 || took(at.pid) && !took(known.pid)
            };
            if !locks.is_empty() && self.found.get(&key).is_none_or(is_better) {
                let link = link.clone().into_owned();
                self.found.insert(key, Held { pid: at.pid, number: at.number, link, locks });
            }
        }
        Ok(())
    }

    fn after_collect(&mut self, intake: &mut dyn Intake) -> Result<()> {
        self.entries = self.entries(intake)?;
        self.look_around(intake)
    }

    fn finish(&mut self, images: &SnapshotWriter) -> Result<()> {
        if !self.entries.is_empty() {
            images.write(Kind::FileLocks, 0, &self.entries)?;
        }
        Ok(())
    }

    fn prepare_kill(&mut self, _dump: &str) -> Result<()> {
        self.warnings.iter().for_each(|warning| tell(log::Level::Warn, warning));
        Ok(())
    }
}
