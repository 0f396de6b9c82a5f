//! Files that are opened by path: regular files, directories, harmless devices, and
//! descriptors that only name a file.

use std::{
    collections::HashSet,
    ffi::OsStr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        stat::{fstat, lstat, major, minor, stat},
        statfs::{FsType, HUGETLBFS_MAGIC, fstatfs},
    },
};

use super::{
    Collector, Description, FileError, Intake, Kind, Opened, Opener, Policy, Result, descriptor,
    late, lost, revived, tty, validation,
};
use crate::{
    image::{
        self,
        proto::{self, FdTypes},
    },
    inject::Script,
    units::TargetFd,
};

/// The kind's row.
pub(super) const KIND: Kind = Kind {
    name: "file",
    types: &[FdTypes::Reg],
    collector: |policy: &Policy| Box::new(Files { policy: policy.clone(), ..Files::default() }),
    opener: |_: &Policy| Box::new(Files::default()),
};

/// The major number of memory devices (`include/uapi/linux/major.h`).
const MEM_MAJOR: u64 = 1;
/// Memory devices without any state: null, zero, full, random and urandom
/// (`drivers/char/mem.c`).
const HARMLESS_DEVICES: [u64; 5] = [3, 5, 7, 8, 9];
/// Types of file systems (`include/uapi/linux/magic.h`).
const PROC_SUPER_MAGIC: libc::__fsword_t = 0x9fa0;
const DEVPTS_SUPER_MAGIC: libc::__fsword_t = 0x1cd1;
const SECRETMEM_MAGIC: libc::__fsword_t = 0x5345_434d;
const MQUEUE_MAGIC: libc::__fsword_t = 0x1980_0202;
/// What links to files without names end with.
const DELETED: &[u8] = b" (deleted)";
/// Where processes are seen.
const PROC: &[u8] = b"/proc/";

#[derive(Default)]
struct Files {
    policy: Policy,
    /// Those that are opened when their process is there.
    late: HashSet<u32>,
}

impl Collector for Files {
    fn claims(&self, file: &Description) -> bool {
        // What is elsewhere than on a file system belongs to other kinds.
        if file.link.first() != Some(&b'/') && !file.link.starts_with(b"(unreachable)") {
            return false;
        }
        match file.stat.st_mode & libc::S_IFMT {
            _ if descriptor::is_path(file.flags) => true,
            libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK | libc::S_IFBLK => true,
            libc::S_IFCHR => !tty::is_terminal(file, &self.policy),
            _ => false,
        }
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
        if !descriptor::is_path(file.flags) {
            let name = || String::from_utf8_lossy(&file.link).into_owned();
            let device = file.stat.st_rdev;
            let is_harmless =
                major(device) == MEM_MAJOR && HARMLESS_DEVICES.contains(&minor(device));
            if file.is_type(libc::S_IFBLK) || file.is_type(libc::S_IFCHR) && !is_harmless {
                return Err(file.unsupported(format!("the device {}", name()), "close it"));
            }
        }
        entry_of(file, intake)
    }
}

/// Returns the entry of a file that is known by its path: also of a program, a
/// working directory, or a mapped file.
///
/// # Errors
/// [`FileError::Unsupported`] if it has no path under which it could be found
/// again; what the system calls return.
pub fn entry_of(file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
    entry_with_id(file, file.id, intake)
}

/// Returns such an entry with the number `id`, for files that have another entry,
/// of another kind, under their own.
///
/// # Errors
/// As [`entry_of`].
pub fn entry_with_id(
    file: &Description,
    id: u32,
    intake: &mut dyn Intake,
) -> Result<proto::FileEntry> {
    let mut entry = proto::RegFileEntry {
        id,
        flags: file.status(),
        pos: if descriptor::is_path(file.flags) { 0 } else { file.info.pos },
        fown: file.fown,
        mode: Some(file.stat.st_mode),
        ..Default::default()
    };
    let external = format!("file[{:x}:{:x}]", file.info.mnt_id, file.stat.st_ino);
    if intake.lost().is_external(&external) {
        entry.name = external.into_bytes();
        entry.ext = Some(true);
    } else {
        entry.name = name(file, id, intake)?;
    }
    // What is only appended to, such as a log, may well have grown.
    let flags = file.flags.cast_signed();
    let appended = flags & libc::O_ACCMODE == libc::O_WRONLY && flags & libc::O_APPEND != 0;
    if file.is_type(libc::S_IFREG) && !appended {
        entry.size = Some(file.stat.st_size.cast_unsigned());
    }
    if entry.ext.is_none() {
        let (known, validation) = intake.build_ids();
        validation::record(file, &mut entry, validation, known);
    }
    Ok(proto::FileEntry { r#type: FdTypes::Reg.into(), id, reg: Some(entry), ..Default::default() })
}

/// Returns the name of a file, after making sure that it can be found by it.
fn name(file: &Description, id: u32, intake: &mut dyn Intake) -> Result<Vec<u8>> {
    if file.link.first() != Some(&b'/') {
        let what = format!("{}, which has no path here", String::from_utf8_lossy(&file.link));
        return Err(file.unsupported(what, "run this program where the file can be seen"));
    }
    let without_mark = || file.link.strip_suffix(DELETED).unwrap_or(&file.link);
    let file_system = fstatfs(&file.fd).map_err(file.failed("find the file system of"))?;
    match file_system.filesystem_type() {
        FsType(PROC_SUPER_MAGIC) => {
            if let Some(process) = process_directory(&file.link)
                && !Path::new(OsStr::from_bytes(process)).exists()
            {
                let what =
                    format!("{} of a process that has ended", String::from_utf8_lossy(&file.link));
                return Err(file.unsupported(what, "close it"));
            }
            return Ok(file.link.clone());
        }
        // Not to be read by anyone else, and without a name to open it by.
        FsType(SECRETMEM_MAGIC) => {
            return Err(file.unsupported("secret memory (memfd_secret(2))", "close it"));
        }
        FsType(MQUEUE_MAGIC) => {
            let what = format!("the message queue {}", String::from_utf8_lossy(&file.link));
            return Err(file.unsupported(what, "close it"));
        }
        // Made by the kernel, with the terminal or not at all.
        FsType(DEVPTS_SUPER_MAGIC) => return Ok(without_mark().to_vec()),
        _ => {}
    }
    if file.stat.st_nlink == 0 {
        let name = without_mark().to_vec();
        // Its bytes could not be written where it is made again: only mappings write there.
        if file_system.filesystem_type() == HUGETLBFS_MAGIC && file.is_type(libc::S_IFREG) {
            let what = format!("the deleted file {} of huge pages", String::from_utf8_lossy(&name));
            return Err(file.unsupported(what, "give it a name, or use a memfd (MFD_HUGETLB)"));
        }
        intake.lost().ghost(file, &name, id)?;
        return Ok(name);
    }
    let path = Path::new(OsStr::from_bytes(&file.link));
    let found = if file.is_type(libc::S_IFLNK) { lstat(path) } else { stat(path) };
    match found {
        Ok(found) if is_same(&found, &file.stat) => Ok(file.link.clone()),
        // Somebody else has the name now, or nobody.
        Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR) => {
            let name = without_mark().to_vec();
            if file.is_type(libc::S_IFDIR) {
                let what = format!(
                    "the directory {}, which is not there under this name",
                    String::from_utf8_lossy(&name)
                );
                return Err(file.unsupported(what, "close it, or give it back its name"));
            }
            lost::link(file, &name, id, intake)?;
            Ok(name)
        }
        Err(errno) => Err(file.failed("find the path of")(errno)),
    }
}

fn is_same(a: &libc::stat, b: &libc::stat) -> bool {
    (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
}

/// Returns the directory of the process that a path in `/proc` goes through.
fn process_directory(path: &[u8]) -> Option<&[u8]> {
    let rest = path.strip_prefix(PROC)?;
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let ends = matches!(rest.get(digits), None | Some(b'/' | b' '));
    (digits > 0 && ends).then(|| &path[..PROC.len() + digits])
}

/// Opens the file of an entry with these flags, which may differ from its own, as
/// for a mapping; the position is not set.
///
/// # Errors
/// [`FileError::Image`] if the file is not the one that was dumped, as far as can
/// be told from its size and mode; what the system calls return.
pub fn open_entry(entry: &proto::RegFileEntry, flags: i32, opened: &mut Opened) -> Result<OwnedFd> {
    let flags = flags.cast_unsigned();
    let failed = |step| FileError::restore(entry.id, step, &entry.name);
    let external = entry.ext == Some(true);
    let key =
        if external { &entry.name } else { entry.name.strip_prefix(b"/").unwrap_or_default() };
    if let Some(given) = opened.policy.inherited(key).map_err(failed("inherit"))? {
        if external {
            return descriptor::reopen(given.as_fd(), flags).map_err(failed("open the inherited"));
        }
        return Ok(given);
    }
    if external {
        let name = String::from_utf8_lossy(&entry.name);
        let problem = format!("it is external; give it with --inherit-fd 'fd[N]:{name}'");
        return Err(FileError::image(entry.id, problem));
    }
    if let Some(fd) = revived::open(entry, flags, opened)? {
        let stat = fstat(&fd).map_err(failed("look at"))?;
        check(entry, &stat)?;
        validation::check(entry, fd.as_fd(), &stat, opened)?;
        return Ok(fd);
    }
    // What is not what was dumped is not opened: a FIFO would be waited for, a device may
    // do anything.
    let named = descriptor::name(&entry.name, flags).map_err(failed("open"))?;
    let stat = fstat(&named).map_err(failed("look at"))?;
    check(entry, &stat)?;
    validation::check(entry, named.as_fd(), &stat, opened)?;
    if descriptor::is_path(flags) {
        return Ok(named);
    }
    if flags & libc::O_NOFOLLOW.cast_unsigned() == 0 {
        return descriptor::reopen(named.as_fd(), flags).map_err(failed("open"));
    }
    // The flag would be lost on the way through /proc.
    let fd = descriptor::open(&entry.name, flags).map_err(failed("open"))?;
    let now = fstat(&fd).map_err(failed("look at"))?;
    if is_same(&now, &stat) { Ok(fd) } else { Err(failed("open")(Errno::ESTALE)) }
}

fn check(entry: &proto::RegFileEntry, stat: &libc::stat) -> Result<()> {
    let name = || String::from_utf8_lossy(&entry.name);
    let format = |mode: u32| mode & libc::S_IFMT;
    let was = entry.mode.map_or(libc::S_IFREG, format);
    // Without a recorded mode, a file or directory or device is what an entry like this
    // is of.
    let other = match entry.mode {
        Some(_) => was != format(stat.st_mode),
        None => matches!(format(stat.st_mode), libc::S_IFIFO | libc::S_IFSOCK),
    };
    if other {
        let say = |mode| image::regular::type_name(mode).unwrap_or("a regular file");
        let problem = format!(
            "{} is {}, but was {} when it was dumped; put back what was there",
            name(),
            say(stat.st_mode),
            say(was)
        );
        return Err(FileError::image(entry.id, problem));
    }
    if let Some(size) = entry.size
        && size != stat.st_size.cast_unsigned()
    {
        let problem =
            format!("{} has {} bytes, but had {size} when it was dumped", name(), stat.st_size);
        return Err(FileError::image(entry.id, problem));
    }
    if let Some(mode) = entry.mode
        && mode != stat.st_mode
    {
        let problem =
            format!("{} has mode {:o}, but had {mode:o} when it was dumped", name(), stat.st_mode);
        return Err(FileError::image(entry.id, problem));
    }
    Ok(())
}

impl Opener for Files {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        for entry in entries {
            let file = inner(entry)?;
            let fd = match open_entry(file, file.flags.cast_signed(), opened) {
                Err(FileError::Restore { source: Errno::ENOENT | Errno::ESRCH, .. })
                    if process_directory(&file.name).is_some() =>
                {
                    self.late.insert(entry.id);
                    late::placeholder(entry.id, opened)?
                }
                result => {
                    let fd = result?;
                    let positioned = descriptor::seek(fd.as_fd(), file.pos, file.flags);
                    positioned.map_err(FileError::restore(entry.id, "position", &file.name))?;
                    fd
                }
            };
            opened.insert(entry.id, fd);
        }
        Ok(())
    }

    fn install(
        &mut self,
        entry: &proto::FileEntry,
        fd: TargetFd,
        script: &mut Script,
    ) -> Result<()> {
        if self.late.contains(&entry.id) {
            let file = inner(entry)?;
            late::install(entry.id, &file.name, file.flags, file.pos, fd, script)?;
        }
        Ok(())
    }
}

fn inner(entry: &proto::FileEntry) -> Result<&proto::RegFileEntry> {
    let missing = || FileError::image(entry.id, "it is a file without its entry");
    entry.reg.as_ref().ok_or_else(missing)
}

#[cfg(test)]
mod tests;
