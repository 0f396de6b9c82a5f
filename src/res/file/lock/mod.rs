//! File locks (`--file-locks`): POSIX locks, `flock(2)`, open file description locks and leases.
//!
//! A POSIX lock belongs to the processes that share a descriptor table, and closing any descriptor
//! of the file there releases it. Locks of `flock(2)`, open file description locks and leases belong
//! to the description, so all processes that have it hold them. A process takes all of them by
//! itself, once all its descriptors are in place: the kernel shows which process took a lock, and
//! the signal of a lease names the descriptor by which it was taken.
//!
//! If a lease was being broken, the restorer breaks it again. The process is not notified twice, but
//! it has the whole time until the kernel revokes the lease (`/proc/sys/fs/lease-break-time`) once
//! more.
//!
//! A dump that ends the tree releases its locks. If another process takes one before the restore,
//! the restore fails and names that process.

mod dump;
mod restore;

use std::fmt;

use super::{FileKind, Usage};
use crate::{
    image::proto::FileLockEntry,
    proc::{FileLock, LockKind, LockMode},
};

pub(super) const KIND: FileKind = FileKind {
    name: "file lock",
    types: &[],
    usage: Usage::Descriptor,
    collector: |options| Box::new(dump::Locks::new(options.locks)),
    opener: |_| Box::<restore::Locks>::default(),
};

/// The user's options for file locks.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    is_wanted: bool,
}

impl Options {
    /// `is_wanted`: locks are dumped (`--file-locks`). Otherwise a tree that holds any is refused.
    pub fn new(is_wanted: bool) -> Self {
        Self { is_wanted }
    }
}

/// `file_lock_entry.flag` (CRIU, `criu/include/file-lock.h`).
const POSIX: u32 = 1;
const FLOCK: u32 = 2;
const OFD: u32 = 4;
const LEASE: u32 = 8;

/// `file_lock_entry.type`: `F_RDLCK`, `F_WRLCK` or `F_UNLCK`; for a lease perhaps with this bit.
const BREAKING: u32 = 4;

/// Returns what the images have of a lock besides its owner; `None` for a kind without a number.
fn to_image(lock: &FileLock) -> Option<FileLockEntry> {
    let flag = match lock.kind {
        LockKind::Posix => POSIX,
        LockKind::Flock => FLOCK,
        LockKind::Ofd => OFD,
        LockKind::Lease => LEASE,
        LockKind::Other => return None,
    };
    let mode = match lock.mode {
        LockMode::Read => 0,
        LockMode::Write => 1,
        LockMode::None => 2,
    };
    let bytes = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    Some(FileLockEntry {
        flag,
        r#type: mode | if lock.is_breaking { BREAKING } else { 0 },
        start: bytes(lock.start),
        // 0 stands for all bytes, as in `struct flock`.
        len: lock.last.map_or(0, |last| bytes((last + 1).saturating_sub(lock.start))),
        ..Default::default()
    })
}

/// A lock in words: `a POSIX write lock on bytes 0 to 99`.
#[derive(Clone, Copy, Debug)]
struct InWords<'a>(&'a FileLock);

impl fmt::Display for InWords<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FileLock { kind, mode, is_breaking, start, last, .. } = *self.0;
        if kind == LockKind::Lease && is_breaking {
            return f.write_str("a lease that is being broken");
        }
        let mode = match mode {
            LockMode::Read => "read",
            LockMode::Write => "write",
            LockMode::None => "void",
        };
        match kind {
            LockKind::Posix => write!(f, "a POSIX {mode} lock")?,
            LockKind::Flock => write!(f, "a {mode} lock of flock(2)")?,
            LockKind::Ofd => write!(f, "an open file description {mode} lock")?,
            LockKind::Lease => write!(f, "a {mode} lease")?,
            LockKind::Other => write!(f, "a {mode} delegation")?,
        }
        match last {
            None if start == 0 => Ok(()),
            None => write!(f, " from byte {start} on"),
            Some(last) => write!(f, " on bytes {start} to {last}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_has_the_numbers_of_criu() {
        let lock = FileLock {
            kind: LockKind::Ofd,
            mode: LockMode::Write,
            is_breaking: false,
            is_waiting: false,
            pid: -1,
            device: (8, 1),
            inode: 3,
            start: 10,
            last: Some(19),
        };
        let entry = to_image(&lock).unwrap();
        assert_eq!((entry.flag, entry.r#type, entry.start, entry.len), (OFD, 1, 10, 10));
        assert_eq!(
            InWords(&lock).to_string(),
            "an open file description write lock on bytes 10 to 19"
        );
        let rest = FileLock { last: None, kind: LockKind::Posix, mode: LockMode::Read, ..lock };
        assert_eq!(to_image(&rest).map(|entry| (entry.flag, entry.len)), Some((POSIX, 0)));
        assert_eq!(InWords(&rest).to_string(), "a POSIX read lock from byte 10 on");
        let lease = FileLock {
            kind: LockKind::Lease,
            mode: LockMode::None,
            is_breaking: true,
            start: 0,
            ..rest
        };
        assert_eq!(to_image(&lease).map(|entry| entry.r#type), Some(2 | BREAKING));
        assert!(to_image(&FileLock { kind: LockKind::Other, ..lease }).is_none());
    }
}
