//! File locks: the lines of `/proc/locks`, which `/proc/PID/fdinfo/FD` repeats.

use super::text::{self, Defect, Parsed};

/// The kinds of file locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LockKind {
    /// A lock of a process, on a range of bytes (`F_SETLK`, `fcntl(2)`).
    Posix,
    /// A lock of an open file description, on the whole file (`flock(2)`).
    Flock,
    /// A lock of an open file description, on a range of bytes (`F_OFD_SETLK`).
    Ofd,
    /// A lease of an open file description (`F_SETLEASE`).
    Lease,
    /// Another kind, such as a delegation of the NFS server.
    Other,
}

/// The mode of a lock: its holder may read or write, and other processes may not interfere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LockMode {
    /// `F_RDLCK`, `LOCK_SH`.
    Read,
    /// `F_WRLCK`, `LOCK_EX`.
    Write,
    /// `F_UNLCK`: for a lease that its holder must release.
    None,
}

/// A lock that is held or waited for, as `/proc/locks` shows it (`lock_get_status`, `fs/locks.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileLock {
    /// Its kind.
    pub kind: LockKind,
    /// Its mode. For a lease that is being broken: the mode that it must have soon.
    pub mode: LockMode,
    /// Whether it is a lease that is being broken.
    pub is_breaking: bool,
    /// Whether the process still waits for the lock.
    pub is_waiting: bool,
    /// The process that asked for it; -1 for an open file description lock, 0 for a process that has
    /// ended or is outside of the pid namespace of this `/proc`.
    pub pid: i32,
    /// The major and minor number of the file system.
    pub device: (u32, u32),
    /// The inode number of the file; 0 for a process that waits until a lease is broken.
    pub inode: u64,
    /// The first byte.
    pub start: u64,
    /// The last byte; `None` if the lock extends to any future end of the file.
    pub last: Option<u64>,
}

impl FileLock {
    /// Whether both lines are about the same lock, even if they show another process for it.
    pub fn is_same(&self, other: &Self) -> bool {
        Self { pid: 0, ..*self } == Self { pid: 0, ..*other }
    }
}

/// Parses the text of `/proc/locks`.
pub(super) fn parse_locks(text: &[u8]) -> Parsed<Vec<FileLock>> {
    text::lines(text).map(parse_lock).collect()
}

/// Parses a line: `1: -> POSIX  ADVISORY  WRITE 23179 fe:00:10010652 0 EOF`.
pub(super) fn parse_lock(line: &[u8]) -> Parsed<FileLock> {
    let whole = || Defect::new("file lock", line);
    let (_, rest) = text::split_once(line, b':').ok_or_else(whole)?;
    let mut words = text::words(rest).peekable();
    let is_waiting = words.next_if_eq(&&b"->"[..]).is_some();
    let kind = match words.next().ok_or_else(whole)? {
        b"POSIX" => LockKind::Posix,
        b"FLOCK" => LockKind::Flock,
        b"OFDLCK" => LockKind::Ofd,
        b"LEASE" => LockKind::Lease,
        _ => LockKind::Other,
    };
    let is_breaking = words.next().ok_or_else(whole)? == b"BREAKING";
    let mode = match words.next().ok_or_else(whole)? {
        b"READ" => LockMode::Read,
        b"WRITE" | b"RW" => LockMode::Write,
        b"UNLCK" | b"NONE" => LockMode::None,
        _ => return Err(whole()),
    };
    let pid = text::signed(words.next().ok_or_else(whole)?, "pid of a lock")?;
    // A lease breaker has no file: `<none>:0`.
    let file = words.next().ok_or_else(whole)?;
    let mut file = if file == b"<none>:0" { b"0:0:0" } else { file }.split(|byte| *byte == b':');
    let mut number = |radix| text::unsigned(file.next().unwrap_or_default(), radix, "locked file");
    let (major, minor, inode) = (number(16)?, number(16)?, number(10)?);
    let start = text::unsigned(words.next().ok_or_else(whole)?, 10, "start of a lock")?;
    let last = match words.next().ok_or_else(whole)? {
        b"EOF" => None,
        last => Some(text::unsigned(last, 10, "end of a lock")?),
    };
    let narrow = |number: u64| u32::try_from(number).map_err(|_| whole());
    let device = (narrow(major)?, narrow(minor)?);
    Ok(FileLock { kind, mode, is_breaking, is_waiting, pid, device, inode, start, last })
}

#[cfg(test)]
mod tests {
    use super::*;
    use LockKind::{Flock, Lease, Ofd, Other, Posix};

    #[test]
    fn each_kind_of_line_is_understood() {
        let text = b"1: POSIX  ADVISORY  WRITE 23179 fe:00:10010652 128 255\n\
            2: FLOCK  ADVISORY  READ 7 00:1f:9 0 EOF\n\
            2: -> FLOCK  ADVISORY  WRITE 8 00:1f:9 0 EOF\n\
            3: OFDLCK ADVISORY  READ  -1 08:01:3 0 9223372036854775806\n\
            4: LEASE  ACTIVE    READ  7 08:01:4 0 EOF\n\
            5: LEASE  BREAKING  UNLCK 7 08:01:5 0 EOF\n\
            5: -> LEASE  BREAKER   WRITE 9 <none>:0 0 EOF\n\
            6: DELEG  ACTIVE    READ  0 08:01:6 0 EOF\n";
        let locks = parse_locks(text).unwrap();
        assert_eq!(
            locks[0],
            FileLock {
                kind: LockKind::Posix,
                mode: LockMode::Write,
                is_breaking: false,
                is_waiting: false,
                pid: 23179,
                device: (0xfe, 0),
                inode: 10_010_652,
                start: 128,
                last: Some(255),
            }
        );
        let kinds: Vec<_> = locks.iter().map(|lock| lock.kind).collect();
        assert_eq!(kinds, [Posix, Flock, Flock, Ofd, Lease, Lease, Lease, Other]);
        assert!(locks[2].is_waiting && !locks[1].is_waiting);
        assert_eq!((locks[3].pid, locks[3].last), (-1, Some(i64::MAX.unsigned_abs() - 1)));
        assert!(locks[5].is_breaking && !locks[4].is_breaking);
        assert_eq!(locks[5].mode, LockMode::None);
        assert!(locks[6].is_waiting && locks[6].inode == 0);
        assert!(locks[1].is_same(&FileLock { pid: 9, ..locks[1] }));
        assert!(!locks[1].is_same(&locks[2]));
    }

    #[test]
    fn a_broken_line_is_an_error() {
        for line in
            ["", "1: POSIX", "1: POSIX ADVISORY WRITE x fe:00:1 0 EOF", "1: A B READ 1 1 0 9"]
        {
            parse_lock(line.as_bytes()).unwrap_err();
        }
    }
}
