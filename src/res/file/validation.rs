//! Checks that a file is the one that was dumped (`--file-validation`).
//!
//! For a regular file, the dump records the size. For a program or library it also records the
//! build ID, as CRIU does; for any other regular file, the time of the last write. The restore
//! rejects a file whose size or build ID differs. It rejects another time only if a process maps
//! the file privately: the pages that the process has not changed come from the file.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    os::fd::{AsFd, BorrowedFd},
};

use jiff::Timestamp;
use nix::{
    errno::Errno,
    libc,
    sys::{
        stat::fstat,
        statfs::{
            BPF_FS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, FsType,
            SECURITYFS_MAGIC, SYSFS_MAGIC, TRACEFS_MAGIC, fstatfs,
        },
    },
};

use super::{Description, FileError, Opened, Result, descriptor};
use crate::image::{build_id, proto};

/// The smallest ELF file: its header.
const ELF_BYTES: i64 = 64;

/// Magic numbers of file systems where reading a file may have side effects
/// (`include/uapi/linux/magic.h`, `fs/configfs/mount.c`).
const CONFIGFS_MAGIC: libc::__fsword_t = 0x6265_6570;
const EFIVARFS_MAGIC: libc::__fsword_t = 0xde5e_81e4;
const NOT_READ: [FsType; 9] = [
    BPF_FS_MAGIC,
    CGROUP_SUPER_MAGIC,
    CGROUP2_SUPER_MAGIC,
    DEBUGFS_MAGIC,
    SECURITYFS_MAGIC,
    SYSFS_MAGIC,
    TRACEFS_MAGIC,
    FsType(CONFIGFS_MAGIC),
    FsType(EFIVARFS_MAGIC),
];

/// What the dump records of a file, and the restore compares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Validation {
    /// The size, and the build ID or the time of the last write.
    #[default]
    BuildId,
    /// Only the size.
    FileSize,
}

/// Build IDs, each read once, and which files were compared by them.
#[derive(Debug, Default)]
pub struct BuildIds {
    /// By device and inode.
    known: HashMap<(u64, u64), Option<Vec<u8>>>,
    /// Files with the same build ID as in the images.
    same: HashSet<(u64, u64)>,
    /// Files of which only the size could be compared.
    unsure: HashSet<(u64, u64)>,
}

impl BuildIds {
    /// Returns the build ID of a regular file. The descriptor need not be readable.
    fn get(&mut self, fd: BorrowedFd, stat: &libc::stat) -> nix::Result<Option<&[u8]>> {
        let known = match self.known.entry((stat.st_dev, stat.st_ino)) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => new.insert(read(fd, stat)?),
        };
        Ok(known.as_deref())
    }

    /// Logs how many files were compared, and by what.
    pub fn log(&self) {
        log::info!(
            "{} files have the recorded build IDs; {} files could be compared by size only",
            self.same.len(),
            self.unsure.len()
        );
    }
}

fn read(fd: BorrowedFd, stat: &libc::stat) -> nix::Result<Option<Vec<u8>>> {
    if stat.st_size < ELF_BYTES || NOT_READ.contains(&fstatfs(fd)?.filesystem_type()) {
        return Ok(None);
    }
    // Reading the file here must not change its access time.
    let plain = (libc::O_RDONLY | libc::O_NONBLOCK).cast_unsigned();
    let file = match descriptor::reopen(fd, plain | libc::O_NOATIME.cast_unsigned()) {
        Err(Errno::EPERM) => descriptor::reopen(fd, plain)?,
        file => file?,
    };
    build_id::read(&File::from(file)).map_err(|error| crate::sys::errno(&error))
}

fn time_of(stat: &libc::stat) -> i64 {
    build_id::time_ns(stat.st_mtime, stat.st_mtime_nsec)
}

/// Records the build ID or the time of the last write of a file. `may_read`: opening and reading
/// the file changes nothing for the tree.
pub(super) fn record(
    file: &Description,
    entry: &mut proto::RegFileEntry,
    validation: Validation,
    known: &mut BuildIds,
    may_read: bool,
) {
    // The images hold the bytes of a deleted file.
    if validation == Validation::FileSize || entry.size.is_none() || file.stat.st_nlink == 0 {
        return;
    }
    if !may_read {
        known.known.insert((file.stat.st_dev, file.stat.st_ino), None);
    }
    match known.get(file.fd.as_fd(), &file.stat) {
        Ok(Some(id)) => {
            entry.build_id = build_id::to_words(id);
            return;
        }
        Ok(None) => {}
        Err(errno) => {
            let name = String::from_utf8_lossy(&file.link);
            log::info!("cannot read the build ID of {name}, so it is not recorded: {errno}");
        }
    }
    entry.rcriu_mtime_ns = Some(time_of(&file.stat));
}

/// Checks that a file has the size and the build ID that were recorded.
pub(super) fn check(
    entry: &proto::RegFileEntry,
    fd: BorrowedFd,
    stat: &libc::stat,
    opened: &mut Opened,
) -> Result<()> {
    let is_regular = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
    if opened.validation == Validation::FileSize || entry.size.is_none() || !is_regular {
        return Ok(());
    }
    let name = String::from_utf8_lossy(&entry.name);
    let key = (stat.st_dev, stat.st_ino);
    if entry.build_id.is_empty() {
        match entry.rcriu_mtime_ns {
            None if opened.build_ids.unsure.insert(key) => {
                log::debug!("{name}: comparing only the size: the images have no build ID");
            }
            Some(time) if time != time_of(stat) => {
                log::info!("{name} was written since the dump, but its size is the same");
            }
            _ => {}
        }
        return Ok(());
    }
    let failed = FileError::restore(entry.id, "read the build ID of", &entry.name);
    let found = opened.build_ids.get(fd, stat).map_err(failed)?;
    if build_id::is_same(found, &entry.build_id) {
        opened.build_ids.same.insert(key);
        return Ok(());
    }
    let found = found.map(build_id::to_words).map_or_else(
        || "no build ID".to_owned(),
        |words| format!("build ID {}", build_id::show(&words)),
    );
    let problem = format!(
        "{name} has {found}, but had build ID {} when it was dumped\nhelp: put the old file \
         back, or accept this one with --file-validation=filesize",
        build_id::show(&entry.build_id)
    );
    Err(FileError::image(entry.id, problem))
}

/// Checks that a privately mapped file was not written since the dump. Does nothing if the
/// images have a build ID, which [`check`] compares.
pub fn check_unwritten(
    entry: &proto::RegFileEntry,
    fd: BorrowedFd,
    validation: Validation,
) -> Result<()> {
    let Some(time) = entry.rcriu_mtime_ns.filter(|_| entry.build_id.is_empty()) else {
        return Ok(());
    };
    let failed = FileError::restore(entry.id, "examine", &entry.name);
    let found = time_of(&fstat(fd).map_err(failed)?);
    if found == time || validation == Validation::FileSize {
        return Ok(());
    }
    let show = |time: i64| {
        Timestamp::from_nanosecond(time.into()).map_or_else(|_| time.to_string(), |t| t.to_string())
    };
    let problem = format!(
        "{} was written at {}, but when it was dumped it had been written at {}, and a process has \
         it mapped; put the old file back, or accept this one with \
         --file-validation=filesize",
        String::from_utf8_lossy(&entry.name),
        show(found),
        show(time)
    );
    Err(FileError::image(entry.id, problem))
}
