//! What tells a file from another one at the same path (`--file-validation`).
//!
//! Of a regular file, images have the size, and the build-id if it is a program or a
//! library that has one, as CRIU's; of any other, the time at which it was last written.
//! A restore refuses another size or build-id, and another time if the file is mapped
//! privately: what the process has not changed of such memory comes from the file.

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

/// Types of file systems whose files do something when they are read
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

/// What is recorded of files, and compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Validation {
    /// The size, and the build-id or the time.
    #[default]
    BuildId,
    /// The size alone.
    FileSize,
}

/// Build-ids of files, each of which is read once, and what was compared.
#[derive(Debug, Default)]
pub struct BuildIds {
    /// By device and inode.
    known: HashMap<(u64, u64), Option<Vec<u8>>>,
    /// Files that were the same by build-id.
    same: HashSet<(u64, u64)>,
    /// Files of which nothing but the size is recorded.
    unsure: HashSet<(u64, u64)>,
}

impl BuildIds {
    /// Returns the build-id of a regular file, whatever the descriptor is good for.
    ///
    /// # Errors
    /// What keeps it from being read.
    fn get(&mut self, fd: BorrowedFd, stat: &libc::stat) -> nix::Result<Option<&[u8]>> {
        let known = match self.known.entry((stat.st_dev, stat.st_ino)) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(new) => new.insert(read(fd, stat)?),
        };
        Ok(known.as_deref())
    }

    /// Tells the log what was compared.
    pub fn log(&self) {
        log::info!(
            "{} files have the same build-ids; of {} only the sizes could be compared",
            self.same.len(),
            self.unsure.len()
        );
    }
}

fn read(fd: BorrowedFd, stat: &libc::stat) -> nix::Result<Option<Vec<u8>>> {
    if stat.st_size < ELF_BYTES || NOT_READ.contains(&fstatfs(fd)?.filesystem_type()) {
        return Ok(None);
    }
    // To look at a file is not to use it: its time of access stays.
    let plain = (libc::O_RDONLY | libc::O_NONBLOCK).cast_unsigned();
    let file = match descriptor::reopen(fd, plain | libc::O_NOATIME.cast_unsigned()) {
        Err(Errno::EPERM) => descriptor::reopen(fd, plain)?,
        file => file?,
    };
    build_id::read(&File::from(file))
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

fn time_of(stat: &libc::stat) -> i64 {
    build_id::time_ns(stat.st_mtime, stat.st_mtime_nsec)
}

/// Enters what tells a file, whose size is in `entry`, from another one.
pub(super) fn record(
    file: &Description,
    entry: &mut proto::RegFileEntry,
    validation: Validation,
    known: &mut BuildIds,
) {
    // A file without a name is in the images itself.
    if validation == Validation::FileSize || entry.size.is_none() || file.stat.st_nlink == 0 {
        return;
    }
    match known.get(file.fd.as_fd(), &file.stat) {
        Ok(Some(id)) => {
            entry.build_id = build_id::to_words(id);
            return;
        }
        Ok(None) => {}
        Err(errno) => {
            let name = String::from_utf8_lossy(&file.link);
            log::info!("the build-id of {name} is not recorded, as it cannot be read: {errno}");
        }
    }
    entry.rcriu_mtime_ns = Some(time_of(&file.stat));
}

/// Checks that the file to which `fd` leads is the build that was dumped.
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
                log::debug!("{name}: only the size is recorded, and compared");
            }
            Some(time) if time != time_of(stat) => {
                log::info!("{name} was written since it was dumped, and has the same size");
            }
            _ => {}
        }
        return Ok(());
    }
    let failed = FileError::restore(entry.id, "read the build-id of", &entry.name);
    let found = opened.build_ids.get(fd, stat).map_err(failed)?;
    if build_id::is_same(found, &entry.build_id) {
        opened.build_ids.same.insert(key);
        return Ok(());
    }
    let found = found.map(build_id::to_words).map_or_else(
        || "no build-id".to_owned(),
        |words| format!("build-id {}", build_id::show(&words)),
    );
    let problem = format!(
        "{name} has {found}, but had build-id {} when it was dumped\nhelp: put back the file that was \
         there, or take this one as it is with --file-validation=filesize",
        build_id::show(&entry.build_id)
    );
    Err(FileError::image(entry.id, problem))
}

/// Checks that a file which a process maps privately was not written since it was dumped,
/// unless a build-id has told that already.
///
/// # Errors
/// [`FileError::Image`].
pub fn check_unwritten(
    entry: &proto::RegFileEntry,
    fd: BorrowedFd,
    validation: Validation,
) -> Result<()> {
    let Some(time) = entry.rcriu_mtime_ns.filter(|_| entry.build_id.is_empty()) else {
        return Ok(());
    };
    let failed = FileError::restore(entry.id, "look at", &entry.name);
    let found = time_of(&fstat(fd).map_err(failed)?);
    if found == time || validation == Validation::FileSize {
        return Ok(());
    }
    let show = |time: i64| {
        Timestamp::from_nanosecond(time.into()).map_or_else(|_| time.to_string(), |t| t.to_string())
    };
    let problem = format!(
        "{} was written at {}, but when it was dumped it had been written at {}, and a process has \
         it mapped; put back the file that was there, or take this one as it is with \
         --file-validation=filesize",
        String::from_utf8_lossy(&entry.name),
        show(found),
        show(time)
    );
    Err(FileError::image(entry.id, problem))
}
