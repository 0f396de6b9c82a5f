//! Names of UNIX sockets.
//!
//! A name is the address that the program has passed to `bind(2)`: either a path, often a relative
//! one, with the NUL byte that the kernel appends; or an abstract name, which begins with a NUL
//! byte. To bind a socket to a relative path again, the restore uses a thread that changes to the
//! directory that the path is relative to.

use std::{
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt, PermissionsExt},
        },
    },
    path::{Path, PathBuf},
    thread,
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, open},
    libc,
    sched::{CloneFlags, unshare},
    sys::stat::{FileStat, Mode, fstat, stat, umask},
    unistd::{Gid, Uid, chdir, fchownat},
};

use crate::{
    image::proto,
    res::file::{
        Description, FileError, Result,
        error::errno,
        sock::{diag, held, opts::Subject},
    },
    sys::{
        root::{self, Root},
        socket,
    },
    units::IdMap,
};

/// The suffix of `/proc/PID/fd/N` for a deleted file.
const DELETED: &str = " (deleted)";

/// Permission bits of a file's mode.
const PERMISSIONS: u32 = 0o7777;

/// The umask while a socket is bound, until the file gets its own mode.
const PRIVATE: Mode = Mode::from_bits_retain(0o177);

/// Returns a name in messages.
pub(super) fn display(name: &[u8]) -> String {
    match name.split_first() {
        None => "unnamed".to_owned(),
        Some((0, rest)) => format!("@{}", String::from_utf8_lossy(rest).replace('\0', "@")),
        Some(_) => String::from_utf8_lossy(path_bytes(name)).into_owned(),
    }
}

/// Whether the name is a path.
pub(super) fn is_path(name: &[u8]) -> bool {
    name.first().is_some_and(|first| *first != 0)
}

fn path_bytes(name: &[u8]) -> &[u8] {
    name.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The fields of a socket's entry that describe its file.
#[derive(Debug, Default)]
pub(super) struct NamedFile {
    pub(super) perms: Option<proto::FilePermsEntry>,
    /// The directory that a relative path is relative to.
    pub(super) dir: Option<Vec<u8>>,
    pub(super) deleted: bool,
}

/// Examines the file that a socket is bound to by the path `name`.
///
/// # Errors
/// [`FileError::Unsupported`] if the file was renamed.
pub(super) fn look_at_file(
    file: &Description,
    name: &[u8],
    inode: Option<(u32, u32)>,
    (what, ids, root): (&str, &IdMap, &Root),
) -> Result<NamedFile> {
    let step = "examine the file of";
    let name = Path::new(OsStr::from_bytes(path_bytes(name)));
    let process = PathBuf::from(format!("/proc/{}", file.pid));
    let target = target(&process, name, root).ok();
    let (stat, path) = match socket::unix_file(file.fd.as_fd()) {
        Ok(opened) => {
            let stat = fstat(&opened).map_err(file.failed(step))?;
            let link = format!("/proc/self/fd/{}", opened.as_raw_fd());
            let path = fs::read_link(link).map_err(|error| file.failed(step)(errno(&error)))?;
            (stat, path)
        }
        Err(Errno::EPERM) => {
            return look_from_process(file, name, target, inode, (what, ids));
        }
        Err(errno) => return Err(file.failed(step)(errno)),
    };
    let text = path.as_os_str().as_bytes();
    let undeleted = text.strip_suffix(DELETED.as_bytes());
    let deleted = stat.st_nlink == 0 || undeleted.is_some();
    let path = Path::new(OsStr::from_bytes(undeleted.unwrap_or(text)));
    let same =
        target.is_some_and(|found| (found.st_ino, found.st_dev) == (stat.st_ino, stat.st_dev));
    let dir = if name.is_absolute() {
        None
    } else if let Some(dir) = without_end(path, name) {
        Some(dir)
    } else if same {
        let cwd = fs::read_link(process.join("cwd")).map_err(|e| file.failed(step)(errno(&e)))?;
        Some(cwd)
    } else {
        return Err(renamed(file, what, path));
    };
    if name.is_absolute() && !deleted && !same && path != name {
        return Err(renamed(file, what, path));
    }
    Ok(NamedFile { perms: Some(permissions(&stat, ids)), dir: dir.map(text_of), deleted })
}

/// Examines the file to which a name leads now, as the process sees it.
///
/// A symbolic link of a mount namespace leads to a file of that namespace: `/proc/PID/root/NAME`
/// would follow an absolute link into rcriu's own.
fn target(process: &Path, name: &Path, root: &Root) -> nix::Result<FileStat> {
    if name.is_absolute() {
        let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let own = open(&process.join("root"), directory, Mode::empty())?;
        let name = name.as_os_str().as_bytes();
        return fstat(root::open_below(own.as_fd(), name, libc::O_PATH, Mode::empty())?);
    }
    let cwd = process.join("cwd");
    if root.is_own() {
        return stat(&cwd.join(name));
    }
    let cwd = fs::read_link(cwd).map_err(|error| errno(&error))?;
    root.stat(&cwd.join(name))
}

/// Like [`look_at_file`], for a kernel that does not open the file of a socket for rcriu.
fn look_from_process(
    file: &Description,
    name: &Path,
    target: Option<FileStat>,
    inode: Option<(u32, u32)>,
    (what, ids): (&str, &IdMap),
) -> Result<NamedFile> {
    let stat =
        target.filter(|stat| inode.is_some_and(|(inode, _)| u64::from(inode) == stat.st_ino));
    if stat.is_none() && !name.is_absolute() {
        let what = format!("{what}, whose file is not in the current directory of the process");
        return Err(file.unsupported(what, "run rcriu with CAP_NET_ADMIN"));
    }
    let dir = if name.is_absolute() {
        None
    } else {
        let cwd = format!("/proc/{}/cwd", file.pid);
        Some(fs::read_link(cwd).map_err(|e| file.failed("read the directory of")(errno(&e)))?)
    };
    Ok(NamedFile {
        deleted: stat.is_none(),
        perms: Some(stat.map_or_else(
            || proto::FilePermsEntry { mode: libc::S_IFSOCK | 0o700, uid: 0, gid: 0 },
            |stat| permissions(&stat, ids),
        )),
        dir: dir.map(text_of),
    })
}

fn renamed(file: &Description, what: &str, path: &Path) -> FileError {
    let what = format!("{what}, whose file is now {}", path.display());
    file.unsupported(
        what,
        "images cannot hold the new name: have the program bind it under that name",
    )
}

fn permissions(stat: &FileStat, ids: &IdMap) -> proto::FilePermsEntry {
    let (uid, gid) = ids.ns_owner((stat.st_uid, stat.st_gid));
    proto::FilePermsEntry { mode: stat.st_mode, uid, gid }
}

fn text_of(path: PathBuf) -> Vec<u8> {
    path.into_os_string().into_encoded_bytes()
}

/// Returns the directory in which `name` leads to `path`.
fn without_end(path: &Path, name: &Path) -> Option<PathBuf> {
    let mut rest = path.components();
    for part in name.components().rev() {
        if part != std::path::Component::CurDir && rest.next_back() != Some(part) {
            return None;
        }
    }
    Some(rest.as_path().to_owned())
}

/// What happens to the file that binding a socket creates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// It stays, and replaces the file of a socket that no process has open.
    Replacing,
    /// It stays, unless a file exists already, which then stays instead.
    Yielding,
    /// It is deleted, as it was before the dump.
    Not,
}

/// Binds a socket to the name in its entry, if it has one. Returns the file if the name is a path.
pub(super) fn bind(
    fd: BorrowedFd,
    entry: &proto::UnixSkEntry,
    keep: Keep,
    restored: &Subject,
    root: &Root,
) -> Result<Option<OwnedFd>> {
    if entry.name.is_empty() {
        return Ok(None);
    }
    if !is_path(&entry.name) {
        held::retry(|| socket::bind_unix(fd, &entry.name)).map_err(restored.failed("bind"))?;
        return Ok(None);
    }
    let file = root.make(|| {
        thread::scope(|scope| scope.spawn(|| bind_path(fd, entry, keep, restored, root)).join())
    });
    let file = file.expect("binding does not panic")?;
    set_permissions(file.as_fd(), entry, restored)?;
    Ok(Some(file))
}

/// Binds a socket to a path. Runs in a thread of its own, since it changes the working directory.
fn bind_path(
    fd: BorrowedFd,
    entry: &proto::UnixSkEntry,
    keep: Keep,
    restored: &Subject,
    root: &Root,
) -> Result<OwnedFd> {
    unshare(CloneFlags::CLONE_FS).map_err(restored.failed("prepare a thread for"))?;
    root.enter().map_err(restored.failed("enter the root directory for"))?;
    umask(PRIVATE);
    let path = Path::new(OsStr::from_bytes(path_bytes(&entry.name)));
    let dir = entry.name_dir.as_deref().map(|dir| Path::new(OsStr::from_bytes(dir)));
    let mut made = Vec::new();
    if keep == Keep::Not {
        let above = dir.unwrap_or(Path::new(".")).join(path);
        make_missing(above.parent(), &mut made)
            .map_err(|error| restored.failed("create the directory of")(errno(&error)))?;
    }
    if let Some(dir) = dir {
        chdir(dir).map_err(restored.failed("enter the directory of"))?;
    }
    let aside = make_room(path, keep, restored)?;
    let file = bind_here(fd, entry, path, restored);
    let mut undo = Ok(());
    if file.is_ok() && (keep == Keep::Not || aside.is_some()) {
        undo = fs::remove_file(path);
    }
    if let Some(aside) = aside {
        undo = undo.and(fs::rename(aside, path));
    }
    if dir.is_some() {
        undo = undo.and(std::env::set_current_dir("/"));
    }
    for dir in made.iter().rev() {
        undo = undo.and(fs::remove_dir(dir));
    }
    let file = file?;
    undo.map_err(|error| restored.failed("remove the file of")(errno(&error)))?;
    Ok(file)
}

fn bind_here(
    fd: BorrowedFd,
    entry: &proto::UnixSkEntry,
    path: &Path,
    restored: &Subject,
) -> Result<OwnedFd> {
    socket::bind_unix(fd, &entry.name).map_err(restored.failed("bind"))?;
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(restored.failed("open the file of"))
}

/// Sets the owner and the mode of the file of a socket.
fn set_permissions(file: BorrowedFd, entry: &proto::UnixSkEntry, restored: &Subject) -> Result<()> {
    let Some(perms) = &entry.file_perms else { return Ok(()) };
    let stat = fstat(file).map_err(restored.failed("examine the file of"))?;
    if (stat.st_uid, stat.st_gid) != (perms.uid, perms.gid) {
        let owner = (Some(Uid::from_raw(perms.uid)), Some(Gid::from_raw(perms.gid)));
        fchownat(file, "", owner.0, owner.1, AtFlags::AT_EMPTY_PATH)
            .map_err(restored.failed("set the owner of"))?;
    }
    let mode = fs::Permissions::from_mode(perms.mode & PERMISSIONS);
    fs::set_permissions(format!("/proc/self/fd/{}", file.as_raw_fd()), mode)
        .map_err(|error| restored.failed("set the permissions of")(errno(&error)))
}

/// Creates the missing directories up to `dir`, and lists them.
fn make_missing(dir: Option<&Path>, made: &mut Vec<PathBuf>) -> io::Result<()> {
    let Some(dir) = dir.filter(|dir| !dir.as_os_str().is_empty() && !dir.exists()) else {
        return Ok(());
    };
    make_missing(dir.parent(), made)?;
    fs::create_dir(dir)?;
    made.push(dir.to_owned());
    Ok(())
}

/// Moves or removes the file at `path`. Returns the new path of a file that must be moved back.
fn make_room(path: &Path, keep: Keep, restored: &Subject) -> Result<Option<PathBuf>> {
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(None) };
    let failed = |step| move |error: io::Error| restored.failed(step)(errno(&error));
    if keep != Keep::Replacing {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".rcriu-{}", std::process::id()));
        fs::rename(path, &name).map_err(failed("move aside the file at the name of"))?;
        return Ok(Some(name.into()));
    }
    let is_free = || if is_in_use(&found) { Err(Errno::EADDRINUSE) } else { Ok(()) };
    if !found.file_type().is_socket() {
        return Err(restored.failed("bind")(Errno::EADDRINUSE));
    }
    held::retry(is_free).map_err(restored.failed("bind"))?;
    log::debug!("{}: removing a socket that no process has open", path.display());
    fs::remove_file(path).map_err(failed("remove an old file of"))?;
    Ok(None)
}

/// Whether an open socket is bound to this file.
fn is_in_use(file: &fs::Metadata) -> bool {
    // The kernel's device numbers have 20 bits for the minor one (`linux/kdev_t.h`).
    let device = (libc::major(file.dev()) << 20) | libc::minor(file.dev());
    diag::unix_sockets().is_ok_and(|sockets| {
        sockets.values().any(|socket| {
            socket.file.is_some_and(|found| {
                (u64::from(found.0), found.1) == (file.ino() & u64::from(u32::MAX), device)
            })
        })
    })
}

/// Opens the file of a socket with the name `name`, relative to `dir`, with `O_PATH`.
pub(super) fn open_in(root: &Root, dir: &[u8], name: &[u8]) -> nix::Result<OwnedFd> {
    let path = Path::new(OsStr::from_bytes(dir)).join(OsStr::from_bytes(path_bytes(name)));
    root.open(path.as_os_str().as_bytes(), libc::O_PATH | libc::O_NOFOLLOW)
}

/// Returns a name to connect to the socket of this file, even if its path is gone.
pub(super) fn path_of(file: BorrowedFd) -> Vec<u8> {
    format!("/proc/self/fd/{}\0", file.as_raw_fd()).into_bytes()
}

/// Connects a socket to a bound one: by its file if it has one, otherwise by its name.
pub(super) fn connect(fd: BorrowedFd, name: &[u8], file: Option<BorrowedFd>) -> nix::Result<()> {
    let path = file.map(path_of);
    socket::connect_unix(fd, path.as_deref().unwrap_or(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_a_relative_name_is_what_is_left_of_the_path() {
        let dir = |path: &str, name: &str| {
            without_end(Path::new(path), Path::new(name)).map(|dir| dir.display().to_string())
        };
        assert_eq!(dir("/a/b/c", "c").as_deref(), Some("/a/b"));
        assert_eq!(dir("/a/b/c", "./b/c").as_deref(), Some("/a"));
        assert_eq!(dir("/a/b/c", "../b/c"), None);
        assert_eq!(dir("/a/bc", "c"), None);
    }

    #[test]
    fn names_are_told_apart_for_messages() {
        assert_eq!(display(b""), "unnamed");
        assert_eq!(display(b"\0a\0b"), "@a@b");
        assert_eq!(display(b"/tmp/x\0"), "/tmp/x");
        assert!(is_path(b"x\0") && !is_path(b"\0x") && !is_path(b""));
    }
}
