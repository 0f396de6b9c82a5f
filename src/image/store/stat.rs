//! The attributes of a stored file.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::{libc, sys::stat::FileStat};

use crate::units::BLOCK_BYTES;

/// The attributes of a file in a store, or of the store itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Whether it is a regular file.
    pub is_file: bool,
    /// Its length in bytes.
    pub len: u64,
    /// The number of bytes that it occupies in its store.
    pub allocated: u64,
    /// Permission bits, without the type.
    pub mode: u16,
    /// The owner.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// When it was last read.
    pub accessed: SystemTime,
    /// When its contents last changed.
    pub modified: SystemTime,
    /// When its attributes last changed.
    pub changed: SystemTime,
    /// Its identity: the device and the inode number.
    pub identity: (u64, u64),
}

impl Stat {
    /// Whether it occupies at least its length, so that it has no holes.
    pub fn is_dense(&self) -> bool {
        self.allocated >= self.len
    }
}

impl From<FileStat> for Stat {
    fn from(stat: FileStat) -> Self {
        let count = |number: i64| u64::try_from(number).unwrap_or(0);
        Self {
            is_file: stat.st_mode & libc::S_IFMT == libc::S_IFREG,
            len: count(stat.st_size),
            allocated: count(stat.st_blocks).saturating_mul(BLOCK_BYTES),
            // Bits 0 to 11; the file type is in the bits above.
            mode: u16::try_from(stat.st_mode & 0o7777).expect("twelve bits"),
            uid: stat.st_uid,
            gid: stat.st_gid,
            accessed: time(stat.st_atime, stat.st_atime_nsec),
            modified: time(stat.st_mtime, stat.st_mtime_nsec),
            changed: time(stat.st_ctime, stat.st_ctime_nsec),
            identity: (stat.st_dev, stat.st_ino),
        }
    }
}

fn time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let nanoseconds = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0));
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let second =
        if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    second.and_then(|second| second.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}
