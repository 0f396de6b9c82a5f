//! Files known by their path: what the dump records of them, and how the restore finds and opens
//! them again.
//!
//! These are programs, working directories and mapped files. Some other kinds of files, such as
//! FIFOs and terminals, also have a path.

use std::{
    ffi::OsStr,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        stat::fstat,
        statfs::{FsType, HUGETLBFS_MAGIC, fstatfs},
    },
};

use super::{
    Description, FileError, Intake, Opened, Result, descriptor, error::file_of, ghost, validation,
};
use crate::{
    image::{
        self,
        proto::{self, FdTypes},
    },
    proc,
    sys::root::Root,
    units::{HostPid, NsPid, TargetFd},
};

/// Magic numbers of file systems (`include/uapi/linux/magic.h`).
const PROC_SUPER_MAGIC: libc::__fsword_t = 0x9fa0;
pub(super) const DEVPTS_SUPER_MAGIC: libc::__fsword_t = 0x1cd1;
const SECRETMEM_MAGIC: libc::__fsword_t = 0x5345_434d;
const MQUEUE_MAGIC: libc::__fsword_t = 0x1980_0202;
/// The suffix of links to deleted files.
const DELETED: &[u8] = b" (deleted)";
/// The mode without the file type.
const PERMISSIONS: u32 = 0o7777;
/// The prefix of links to memfds.
const MEMFD: &[u8] = b"/memfd:";
/// Where `/proc` is mounted.
const PROC: &[u8] = b"/proc/";

/// Builds the entry of a file that is known by its path.
///
/// # Errors
/// [`FileError::Unsupported`] if no path leads to it.
pub fn entry_of(file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
    entry_with_id(file, file.id, intake)
}

/// Builds such an entry with the number `id`, for files whose own number belongs to an entry of
/// another kind.
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
        mnt_id: intake.mount_of(file),
        ..Default::default()
    };
    let external = external_name(file);
    if intake.deleted_files().is_external(&external) {
        entry.name = external.into_bytes();
        entry.ext = Some(true);
    } else {
        entry.name = name(file, id, intake)?;
    }
    // A file opened for appending only, such as a log, may have grown by the time of the restore.
    let flags = file.flags.cast_signed();
    let appended = flags & libc::O_ACCMODE == libc::O_WRONLY && flags & libc::O_APPEND != 0;
    if file.is_type(libc::S_IFREG) && !appended {
        entry.size = Some(file.stat.st_size.cast_unsigned());
    }
    if entry.ext.is_none() {
        let may_read =
            !file.has_write_lease() && !intake.listeners().hear_of(file, intake.root_of(file));
        let (known, validation) = intake.build_ids();
        validation::record(file, &mut entry, validation, known, may_read);
    }
    Ok(proto::FileEntry { r#type: FdTypes::Reg.into(), id, reg: Some(entry), ..Default::default() })
}

/// Returns the name of a file for `--external`.
fn external_name(file: &Description) -> String {
    format!("file[{:x}:{:x}]", file.info.mnt_id, file.stat.st_ino)
}

/// Returns the path of a file, after checking that the restore can find the file by it.
fn name(file: &Description, id: u32, intake: &mut dyn Intake) -> Result<Vec<u8>> {
    if file.link.first() != Some(&b'/') {
        let what = format!(
            "{}, which has no path in the mount namespace of rcriu",
            String::from_utf8_lossy(&file.link)
        );
        return Err(file.unsupported(what, "run rcriu where the file can be seen"));
    }
    let without_mark = || file.link.strip_suffix(DELETED).unwrap_or(&file.link);
    let file_system = fstatfs(&file.fd).map_err(file.failed("find the file system of"))?;
    match file_system.filesystem_type() {
        FsType(PROC_SUPER_MAGIC) => {
            check_process_file(file, intake)?;
            return Ok(file.link.clone());
        }
        // Only the process itself may read secret memory, and no path leads to it.
        FsType(SECRETMEM_MAGIC) => {
            let help = "have the program unmap and close it: only the program itself may read it";
            return Err(file.unsupported("secret memory (memfd_secret(2))", help));
        }
        FsType(MQUEUE_MAGIC) => {
            let what = format!("the message queue {}", String::from_utf8_lossy(&file.link));
            return Err(file.unsupported(what, "close it"));
        }
        // The kernel creates a terminal's file together with the terminal.
        FsType(DEVPTS_SUPER_MAGIC) => return Ok(without_mark().to_vec()),
        _ => {}
    }
    if file.stat.st_nlink == 0 {
        let name = without_mark().to_vec();
        // A mount may show a deleted file, which then has a path.
        let found = intake.root_of(file).stat(Path::new(OsStr::from_bytes(&name)));
        if found.is_ok_and(|found| is_same(&found, &file.stat)) {
            return Ok(name);
        }
        // The ghost could not be written again: files of huge pages take writes only by mappings.
        if file_system.filesystem_type() == HUGETLBFS_MAGIC && file.is_type(libc::S_IFREG) {
            let what = format!("the deleted file {} of huge pages", String::from_utf8_lossy(&name));
            return Err(file.unsupported(what, "give it a name, or use a memfd (MFD_HUGETLB)"));
        }
        if file.is_type(libc::S_IFREG) && intake.listeners().hear_of(file, intake.root_of(file)) {
            let what = format!(
                "the deleted file {}, which the tree watches for being read",
                String::from_utf8_lossy(&name)
            );
            return Err(file.unsupported(what, "have the program remove that watch"));
        }
        // Only the program of a process gets here: images have no other place for its memfd.
        if name.starts_with(MEMFD) {
            log::warn!(
                "process {} executes the memfd {}: after a restore, /proc/{}/exe is a copy of it, \
                 and the restore must be allowed to create a file in /",
                file.pid,
                String::from_utf8_lossy(&name),
                file.pid
            );
        }
        intake.deleted_files().ghost(file, &name, id)?;
        return Ok(name);
    }
    let path = Path::new(OsStr::from_bytes(&file.link));
    let root = intake.root_of(file).clone();
    let found = if file.is_type(libc::S_IFLNK) { root.lstat(path) } else { root.stat(path) };
    match found {
        Ok(found) if is_same(&found, &file.stat) => Ok(file.link.clone()),
        // The name is gone, or another file has it.
        Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR) => {
            if is_outside(file) {
                let what = format!(
                    "{} ({}), on a mount that is not in the mount namespace of the process",
                    path.display(),
                    external_name(file)
                );
                let help = "close it, or give the name in parentheses to --external, and a file at the restore \
                            (--inherit-fd)";
                return Err(file.unsupported(what, help));
            }
            if let Some(point) = hidden_below(file, path, &root) {
                let what = format!(
                    "{}, which is hidden: another file system is mounted over it at {}",
                    path.display(),
                    point.display()
                );
                let help = "unmount that before dumping, or close the file";
                return Err(file.unsupported(what, help));
            }
            let name = without_mark().to_vec();
            if file.is_type(libc::S_IFDIR) {
                let what = format!(
                    "the directory {}, which is no longer there under this name",
                    String::from_utf8_lossy(&name)
                );
                return Err(file.unsupported(what, "close it, or give it its name back"));
            }
            ghost::link(file, &name, id, intake)?;
            Ok(name)
        }
        Err(errno) => Err(file.failed("find the path of")(errno)),
    }
}

/// Whether the mount namespace of the process lacks the mount of a file.
fn is_outside(file: &Description) -> bool {
    let mounts = proc::mounts_of(file.pid).unwrap_or_default();
    !mounts.is_empty() && mounts.iter().all(|mount| mount.id != file.info.mnt_id)
}

/// Returns where another file system is mounted over the path of a file.
fn hidden_below<'a>(file: &Description, path: &'a Path, root: &Root) -> Option<&'a Path> {
    let own = HostPid::own();
    let mount_of = |path: &Path| {
        let flags = (libc::O_PATH | libc::O_NOFOLLOW).cast_unsigned();
        let fd = descriptor::open(root, path.as_os_str().as_bytes(), flags).ok()?;
        Some(proc::fdinfo(own, TargetFd(fd.as_raw_fd())).ok()?.mnt_id)
    };
    // The nearest existing ancestor is on the file's own mount, unless another mount hides that.
    let (mut point, mount) =
        path.ancestors().find_map(|path| mount_of(path).map(|mount| (path, mount)))?;
    if mount == file.info.mnt_id {
        return None;
    }
    while let Some(above) = point.parent().filter(|above| mount_of(above) == Some(mount)) {
        point = above;
    }
    Some(point)
}

fn is_same(a: &libc::stat, b: &libc::stat) -> bool {
    (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
}

/// Returns the process or thread to which a path in `/proc` belongs.
pub(super) fn process_of(path: &[u8]) -> Option<NsPid> {
    let number = path.strip_prefix(PROC)?.split(|byte| *byte == b'/').next().and_then(number);
    number.map(NsPid::of_image)
}

fn number(component: &[u8]) -> Option<i32> {
    let digits = component.iter().all(u8::is_ascii_digit);
    digits.then(|| std::str::from_utf8(component).ok()?.parse().ok()).flatten()
}

/// Checks that the restore can find a file in `/proc`, and warns about files of processes outside
/// the tree.
fn check_process_file(file: &Description, intake: &dyn Intake) -> Result<()> {
    let path = String::from_utf8_lossy(&file.link);
    // For a process or thread that has ended, the kernel shows `(deleted)`.
    if intake.root_of(file).lstat(Path::new(OsStr::from_bytes(&file.link))).is_err() {
        let what = format!("{path}, of a process or thread that has ended");
        return Err(file.unsupported(what, "close it"));
    }
    match process_of(&file.link) {
        Some(pid) if !intake.has_process(pid) => {
            log::warn!(
                "{} is {path}, and process {pid} is not in the tree: the restore opens the file of \
                 whichever process has this pid then",
                file_of(file.pid, file.number)
            );
            Ok(())
        }
        None if !file.link.starts_with(PROC)
            && file.link.split(|byte| *byte == b'/').any(|name| number(name).is_some()) =>
        {
            let what =
                format!("{path}, perhaps of a process, in a proc file system other than /proc");
            Err(file.unsupported(what, "open it in /proc, or close it"))
        }
        _ => Ok(()),
    }
}

/// Whether the file belongs to a process or thread of the tree in `/proc`, or is on a mount that is not
/// there yet, so the restore must defer opening it.
pub fn is_deferred(entry: &proto::RegFileEntry, opened: &Opened) -> bool {
    let is_on = |mount: i32| opened.later_mounts.contains(&mount);
    entry.mnt_id.is_some_and(is_on)
        || process_of(&entry.name).is_some_and(|pid| opened.processes.contains(&pid))
}

/// Opens the file of an entry with `flags`, which may differ from its own, as they do for a
/// mapping. Does not set the position.
///
/// # Errors
/// [`FileError::Image`] if its size or mode shows that it is not the file that was dumped.
pub fn open_entry(entry: &proto::RegFileEntry, flags: i32, opened: &mut Opened) -> Result<OwnedFd> {
    let flags = flags.cast_unsigned();
    let failed = |step| FileError::restore(entry.id, step, &entry.name);
    let external = entry.ext == Some(true);
    let key =
        if external { &entry.name } else { entry.name.strip_prefix(b"/").unwrap_or_default() };
    if let Some(given) = opened.inherited.duplicate(key).map_err(failed("inherit"))? {
        if external {
            return descriptor::reopen(given.as_fd(), flags).map_err(failed("open the inherited"));
        }
        return Ok(given);
    }
    if external {
        let name = String::from_utf8_lossy(&entry.name);
        let problem = format!("it is external; provide it with --inherit-fd 'fd[N]:{name}'");
        return Err(FileError::image(entry.id, problem));
    }
    if let Some(fd) = ghost::open(entry, flags, opened)? {
        let stat = fstat(&fd).map_err(failed("examine"))?;
        check(entry, &stat, flags)?;
        validation::check(entry, fd.as_fd(), &stat, opened)?;
        return Ok(fd);
    }
    // Check the file before opening it: another file may be a FIFO, which would block, or a device,
    // which may do anything.
    let named = descriptor::name(opened.root_of(entry), &entry.name, flags).map_err(|errno| {
        match (errno, process_of(&entry.name)) {
            (Errno::ENOENT | Errno::ESRCH, Some(pid)) => {
                let problem = format!(
                    "it is {}, but process {pid}, which was not part of the tree, does not exist\nhelp: \
                     start one with this pid, or close the file before dumping",
                    String::from_utf8_lossy(&entry.name)
                );
                FileError::image(entry.id, problem)
            }
            _ => failed("open")(errno),
        }
    })?;
    let stat = fstat(&named).map_err(failed("examine"))?;
    check(entry, &stat, flags)?;
    validation::check(entry, named.as_fd(), &stat, opened)?;
    if descriptor::is_path(flags) {
        return Ok(named);
    }
    if flags & libc::O_NOFOLLOW.cast_unsigned() == 0 {
        return descriptor::reopen(named.as_fd(), flags).map_err(failed("open"));
    }
    // Opening through /proc would drop the flag.
    let fd = descriptor::open(opened.root_of(entry), &entry.name, flags).map_err(failed("open"))?;
    let now = fstat(&fd).map_err(failed("examine"))?;
    if is_same(&now, &stat) { Ok(fd) } else { Err(failed("open")(Errno::ESTALE)) }
}

fn check(entry: &proto::RegFileEntry, stat: &libc::stat, flags: u32) -> Result<()> {
    let name = || String::from_utf8_lossy(&entry.name);
    let format = |mode: u32| mode & libc::S_IFMT;
    let was = entry.mode.map_or(libc::S_IFREG, format);
    // Without a recorded mode, the entry is for a file, a directory or a device.
    let other = match entry.mode {
        Some(_) => was != format(stat.st_mode),
        // Opening a FIFO for reading and writing does not block.
        None => {
            format(stat.st_mode) == libc::S_IFIFO
                && flags.cast_signed() & libc::O_ACCMODE != libc::O_RDWR
        }
    };
    if other {
        let say = |mode| image::regular::type_name(mode).unwrap_or("a regular file");
        let problem = format!(
            "{} is {}, but was {} when it was dumped\nhelp: restore what was there",
            name(),
            say(stat.st_mode),
            say(was)
        );
        return Err(FileError::image(entry.id, problem));
    }
    if let Some(size) = entry.size
        && size != stat.st_size.cast_unsigned()
    {
        let help = if stat.st_size.cast_unsigned() > size {
            format!(
                "if it has only grown, keep a copy and truncate it (truncate -s {size} {}), or \
                 restore a later snapshot",
                name()
            )
        } else {
            "put the old file back".to_owned()
        };
        let problem = format!(
            "{} has {} bytes, but had {size} when it was dumped\nhelp: {help}",
            name(),
            stat.st_size
        );
        return Err(FileError::image(entry.id, problem));
    }
    if let Some(mode) = entry.mode
        && mode != stat.st_mode
    {
        let problem = format!(
            "{} has mode {:o}, but had {mode:o} when it was dumped\nhelp: restore the mode (chmod {:o})",
            name(),
            stat.st_mode,
            mode & PERMISSIONS
        );
        return Err(FileError::image(entry.id, problem));
    }
    Ok(())
}
