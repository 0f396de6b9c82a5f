//! The root directory in which the paths of a tree are looked up: that of the tree's own mount
//! namespace, or that of rcriu.
//!
//! The files of a foreign mount namespace are foreign, too: a symbolic link there, also an absolute
//! one, never leads out of its root (`RESOLVE_IN_ROOT`, since Linux 5.6).

use std::{
    ffi::OsStr,
    io,
    ops::Deref,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    libc,
    sys::stat::{FileStat, Mode, fstat, lstat, stat},
    unistd::{chroot, fchdir},
};

use super::{process, visit};
use crate::units::HostPid;

/// The flags that `openat2(2)` takes of those that a description may have (`include/linux/fcntl.h`).
const VALID: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_DIRECT
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW
    | libc::O_NOATIME
    | libc::O_CLOEXEC
    | libc::O_NOCTTY
    | libc::O_TMPFILE
    | libc::O_PATH;

/// The flags that it takes together with `O_PATH`.
const VALID_WITH_PATH: i32 = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;

/// A root directory.
#[derive(Clone, Debug, Default)]
pub struct Root {
    /// `None` for that of rcriu.
    directory: Option<Arc<OwnedFd>>,
    /// The user and the group that make files below it, if they are not those of rcriu.
    maker: Option<(u32, u32)>,
}

impl Root {
    /// Returns that of rcriu.
    pub fn own() -> Self {
        Self::default()
    }

    /// Returns that of the mount namespace of a process, even if the process has changed its own
    /// (`chroot(2)`).
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN` and `CAP_SYS_CHROOT` there; `ENOENT` if the process is gone.
    pub fn of(pid: HostPid) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root =
            visit::in_mounts(pid, || open("/", flags, Mode::empty()).map_err(io::Error::from))?;
        Ok(Self::at(root))
    }

    /// Returns the root that this directory is.
    pub fn at(directory: OwnedFd) -> Self {
        Self { directory: Some(Arc::new(directory)), maker: None }
    }

    /// Has files below it made by this user and group: the file systems of a user namespace take no files
    /// of others than those that it maps.
    #[must_use]
    pub fn made_by(self, maker: Option<(u32, u32)>) -> Self {
        Self { maker, ..self }
    }

    /// Calls `make`, which makes files below it, or gives them names.
    pub fn make<T: Send>(&self, make: impl FnOnce() -> T + Send) -> T {
        match self.maker {
            Some(maker) => process::with_file_ids(maker, make),
            None => make(),
        }
    }

    /// Makes this the root directory of the calling thread, which must not share it with other threads
    /// (`CLONE_FS`), and its working directory.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_CHROOT`.
    pub fn enter(&self) -> nix::Result<()> {
        let Some(root) = &self.directory else { return Ok(()) };
        fchdir(root)?;
        chroot(".")
    }

    /// Whether this is the root of rcriu.
    pub fn is_own(&self) -> bool {
        self.directory.is_none()
    }

    /// Opens a file, as `open(2)` does for a process with this root directory.
    ///
    /// # Errors
    /// Those of `open(2)` and `openat2(2)`.
    pub fn open(&self, path: &[u8], flags: i32) -> nix::Result<OwnedFd> {
        self.open_with(path, flags, Mode::empty())
    }

    /// Creates a file without a name in a directory, with the flags of a description.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_tmpfile(&self, directory: &[u8], flags: i32) -> nix::Result<OwnedFd> {
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        self.make(|| self.open_with(directory, flags | libc::O_TMPFILE, mode))
    }

    fn open_with(&self, path: &[u8], flags: i32, mode: Mode) -> nix::Result<OwnedFd> {
        loop {
            let result = match &self.directory {
                None => open(path, OFlag::from_bits_retain(flags | libc::O_CLOEXEC), mode),
                Some(root) => open_below(root.as_fd(), path, flags, mode),
            };
            match result {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
    }

    /// Returns a path by which rcriu reaches a file, for calls that do not follow a symbolic link at
    /// the end of the path. The directory must exist, the file need not.
    ///
    /// # Errors
    /// Those of opening the directory.
    pub fn spell(&self, path: &Path) -> nix::Result<Spelled> {
        if self.is_own() {
            return Ok(Spelled { path: path.to_owned(), _directory: None });
        }
        let parent = path.parent().unwrap_or(Path::new("/"));
        let directory =
            self.open(parent.as_os_str().as_bytes(), libc::O_PATH | libc::O_DIRECTORY)?;
        let name = path.file_name().unwrap_or(OsStr::new("."));
        let path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
        Ok(Spelled { path, _directory: Some(directory) })
    }

    /// Examines the file to which a path leads.
    ///
    /// # Errors
    /// Those of `stat(2)`.
    pub fn stat(&self, path: &Path) -> nix::Result<FileStat> {
        if self.is_own() {
            return stat(path);
        }
        fstat(self.open(path.as_os_str().as_bytes(), libc::O_PATH)?)
    }

    /// Like [`Self::stat`], but does not follow a symbolic link at the end.
    ///
    /// # Errors
    /// Those of `lstat(2)`.
    pub fn lstat(&self, path: &Path) -> nix::Result<FileStat> {
        if self.is_own() {
            return lstat(path);
        }
        fstat(self.open(path.as_os_str().as_bytes(), libc::O_PATH | libc::O_NOFOLLOW)?)
    }
}

/// A path by which rcriu reaches a file. It is valid as long as this is.
#[derive(Debug)]
pub struct Spelled {
    path: PathBuf,
    _directory: Option<OwnedFd>,
}

impl Deref for Spelled {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl AsRef<Path> for Spelled {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

/// Opens a file below a directory, which is the root for that.
///
/// # Errors
/// Those of `openat2(2)`.
pub fn open_below(root: BorrowedFd, path: &[u8], flags: i32, mode: Mode) -> nix::Result<OwnedFd> {
    resolve(root, path, flags, mode, ResolveFlag::RESOLVE_IN_ROOT)
}

/// Opens a file with `O_PATH` on the mount of a directory. Fails with `EXDEV` if another mount is in
/// the way, and with `ELOOP` for a symbolic link.
///
/// # Errors
/// Those of `openat2(2)`.
pub fn name_on_mount(root: BorrowedFd, path: &[u8]) -> nix::Result<OwnedFd> {
    let how = ResolveFlag::RESOLVE_IN_ROOT
        | ResolveFlag::RESOLVE_NO_XDEV
        | ResolveFlag::RESOLVE_NO_SYMLINKS;
    resolve(root, path, libc::O_PATH | libc::O_NOFOLLOW, Mode::empty(), how)
}

fn resolve(
    root: BorrowedFd,
    path: &[u8],
    flags: i32,
    mode: Mode,
    how: ResolveFlag,
) -> nix::Result<OwnedFd> {
    let valid = if flags & libc::O_PATH == 0 { VALID } else { VALID_WITH_PATH };
    let flags = OFlag::from_bits_retain(flags & valid | libc::O_CLOEXEC);
    let how = OpenHow::new().flags(flags).mode(mode).resolve(how);
    let path = if path.is_empty() { b"." } else { path };
    loop {
        match openat2(root, path, how) {
            // A directory was renamed meanwhile.
            Err(Errno::EAGAIN) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn links_do_not_lead_out_of_a_root() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("inside");
        fs::create_dir_all(inside.join("a")).unwrap();
        fs::write(dir.path().join("secret"), "outside").unwrap();
        fs::write(inside.join("secret"), "inside").unwrap();
        symlink("/secret", inside.join("a/absolute")).unwrap();
        symlink("../../../secret", inside.join("a/relative")).unwrap();
        let root = Root::at(fs::File::open(&inside).unwrap().into());
        for name in ["/secret", "/a/absolute", "/a/relative"] {
            let file = root.open(name.as_bytes(), libc::O_RDONLY).unwrap();
            assert_eq!(io::read_to_string(fs::File::from(file)).unwrap(), "inside", "{name}");
        }
        let link = root.lstat(Path::new("/a/absolute")).unwrap();
        assert_eq!(link.st_mode & libc::S_IFMT, libc::S_IFLNK);
        let spelled = root.spell(Path::new("/a/new")).unwrap();
        fs::write(&spelled, "new").unwrap();
        assert_eq!(fs::read_to_string(inside.join("a/new")).unwrap(), "new");
        assert_eq!(
            name_on_mount(fs::File::open(&inside).unwrap().as_fd(), b"a/absolute/x").unwrap_err(),
            Errno::ELOOP
        );
    }
}
