//! Files that rcriu writes at given paths: logs, pid files, statistics.
//!
//! In a directory such as `/tmp`, any user can create a link, or a file, under the name of rcriu's
//! next file, to read its output or to have it overwrite another file. So rcriu follows a link in a
//! directory that others can write to only if the link belongs to rcriu's user or to the owner of
//! the directory. Linux does the same with `fs.protected_symlinks` in sticky directories. This
//! module checks it for each component of a path, whatever that setting is.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, FcntlArg, OFlag, fcntl, open, openat, readlinkat},
    libc,
    sys::{
        stat::{FileStat, Mode, fstat, fstatat},
        statfs::{PROC_SUPER_MAGIC, fstatfs},
    },
    unistd::{ftruncate, geteuid},
};

/// The mode of a new file: a log may quote memory.
const FILE_MODE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// The most links on a path (`MAXSYMLINKS`, `include/linux/namei.h`).
const LINKS: usize = 40;

/// What happens to an existing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It is truncated.
    Replaced,
    /// New text is appended.
    Continued,
}

/// The current directory of a path walk.
struct Place {
    /// The directory.
    dir: OwnedFd,
    /// Its path, for messages.
    shown: PathBuf,
}

/// Opens a file for writing, and creates it with access for its owner only if it does not exist.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`], with an explanation, for a link or a file that another user
/// may have planted.
pub fn create(path: &Path, existing: Existing) -> io::Result<File> {
    let mut walk = Walk::new(path)?;
    let mut flags = OFlag::O_WRONLY
        | OFlag::O_CREAT
        | OFlag::O_NOFOLLOW
        | OFlag::O_NONBLOCK
        | OFlag::O_NOCTTY
        | OFlag::O_CLOEXEC;
    if existing == Existing::Continued {
        flags |= OFlag::O_APPEND;
    }
    loop {
        let name = walk.reach_last()?;
        let Place { dir, shown } = &walk.at;
        let file = match openat(dir, name.as_os_str(), flags, FILE_MODE) {
            // In a sticky directory, opening a link fails with EACCES.
            Err(Errno::ELOOP | Errno::EACCES) if is_link(dir, &name) => {
                if !is_proc(dir) {
                    walk.follow(&name)?;
                    continue;
                }
                let through = flags - OFlag::O_NOFOLLOW - OFlag::O_CREAT;
                openat(dir, name.as_os_str(), through, FILE_MODE)?
            }
            file => file?,
        };
        let stat = fstat(&file)?;
        check_file(&stat, &fstat(dir)?, &shown.join(&name))?;
        let status = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(status - OFlag::O_NONBLOCK))?;
        if existing == Existing::Replaced && stat.st_mode & libc::S_IFMT == libc::S_IFREG {
            ftruncate(&file, 0)?;
        }
        return Ok(file.into());
    }
}

/// Checks that no other user has placed a link on the path of a directory, or in its place.
///
/// # Errors
/// As [`create`].
pub fn check_directory(path: &Path) -> io::Result<()> {
    let mut walk = Walk::new(path)?;
    while !walk.left.is_empty() {
        walk.step()?;
    }
    Ok(())
}

/// Walks a path component by component.
struct Walk {
    at: Place,
    /// The remaining components.
    left: VecDeque<OsString>,
    links: usize,
}

impl Walk {
    fn new(path: &Path) -> io::Result<Self> {
        let at = Place { dir: directory(".")?, shown: PathBuf::new() };
        let mut walk = Self { at, left: VecDeque::new(), links: 0 };
        walk.prepend(path.as_os_str())?;
        Ok(walk)
    }

    /// Inserts a path before the remaining components.
    fn prepend(&mut self, path: &OsStr) -> io::Result<()> {
        if path.as_bytes().first() == Some(&b'/') {
            self.at = Place { dir: directory("/")?, shown: PathBuf::from("/") };
        }
        let names = path.as_bytes().split(|byte| *byte == b'/').filter(|name| !name.is_empty());
        for name in names.rev() {
            self.left.push_front(OsStr::from_bytes(name).to_owned());
        }
        Ok(())
    }

    /// Walks to the directory of the last component, and returns that component.
    fn reach_last(&mut self) -> io::Result<OsString> {
        while self.left.len() > 1 {
            self.step()?;
        }
        self.left.pop_front().ok_or_else(|| Errno::EISDIR.into())
    }

    /// Walks one component.
    fn step(&mut self) -> io::Result<()> {
        let Some(name) = self.left.pop_front() else { return Ok(()) };
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let next = openat(&self.at.dir, name.as_os_str(), flags, Mode::empty())?;
        match fstat(&next)?.st_mode & libc::S_IFMT {
            libc::S_IFLNK if is_proc(&self.at.dir) => {
                let through = (flags - OFlag::O_NOFOLLOW) | OFlag::O_DIRECTORY;
                self.at.dir = openat(&self.at.dir, name.as_os_str(), through, Mode::empty())?;
            }
            libc::S_IFLNK => return self.follow(&name),
            libc::S_IFDIR => self.at.dir = next,
            _ => return Err(Errno::ENOTDIR.into()),
        }
        self.at.shown.push(name);
        Ok(())
    }

    /// Follows the link `name`, if that is safe.
    fn follow(&mut self, name: &OsStr) -> io::Result<()> {
        self.links += 1;
        if self.links > LINKS {
            return Err(Errno::ELOOP.into());
        }
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let link = openat(&self.at.dir, name, flags, Mode::empty())?;
        let (owner, dir) = (fstat(&link)?.st_uid, fstat(&self.at.dir)?);
        if others_write(&dir) && owner != geteuid().as_raw() && owner != dir.st_uid {
            let link = self.at.shown.join(name);
            return Err(refused(format!(
                "{} is a symbolic link of user {owner} in a directory that others can write to\n\
                 help: remove it, or use another path",
                link.display()
            )));
        }
        let target = readlinkat(&link, "")?;
        self.prepend(&target)
    }
}

fn directory(path: &str) -> nix::Result<OwnedFd> {
    open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

fn is_link(dir: &OwnedFd, name: &OsStr) -> bool {
    let stat = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW);
    stat.is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFLNK)
}

/// Whether the directory is in `/proc`, where links may lead to open files.
fn is_proc(dir: &OwnedFd) -> bool {
    fstatfs(dir).is_ok_and(|stat| stat.filesystem_type() == PROC_SUPER_MAGIC)
}

/// Whether users other than its owner can create files in a directory.
fn others_write(dir: &FileStat) -> bool {
    dir.st_mode & (libc::S_IWGRP | libc::S_IWOTH) != 0
}

/// Checks that other users have not planted this file in a directory that they can write to: they
/// could read what rcriu writes, or it could be a hard link to another file.
fn check_file(file: &FileStat, dir: &FileStat, path: &Path) -> io::Result<()> {
    let may_be_laid = matches!(file.st_mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFIFO);
    if !may_be_laid || dir.st_mode & libc::S_IWOTH == 0 {
        return Ok(());
    }
    let problem = if file.st_uid != geteuid().as_raw() && file.st_uid != dir.st_uid {
        format!("belongs to user {}", file.st_uid)
    } else if file.st_nlink > 1 {
        "has a second name (hard link)".to_owned()
    } else {
        return Ok(());
    };
    Err(refused(format!(
        "{} {problem} and is in a directory that others can write to\nhelp: remove it, or use \
         another path",
        path.display()
    )))
}

fn refused(problem: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, problem)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Write,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    };

    use super::*;

    #[test]
    fn files_are_private_and_links_of_ones_own_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        create(&path, Existing::Replaced).unwrap().write_all(b"123").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        create(&path, Existing::Continued).unwrap().write_all(b"4").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"1234");
        create(&path, Existing::Replaced).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        // Relative and absolute links, to directories, and to files that do not exist yet.
        fs::create_dir(dir.path().join("below")).unwrap();
        symlink("below", dir.path().join("there")).unwrap();
        symlink(dir.path().join("there/../there/new"), dir.path().join("below/link")).unwrap();
        create(&dir.path().join("there/link"), Existing::Replaced).unwrap();
        assert!(dir.path().join("below/new").is_file());
        check_directory(&dir.path().join("there")).unwrap();
        symlink("circle", dir.path().join("circle")).unwrap();
        create(&dir.path().join("circle"), Existing::Replaced).unwrap_err();
        create(dir.path(), Existing::Replaced).unwrap_err();
        create(Path::new("/dev/null"), Existing::Replaced).unwrap();
        let through = format!("/proc/self/fd/{}", 2);
        create(Path::new(&through), Existing::Continued).unwrap();
    }

    #[test]
    fn a_file_with_two_names_is_not_written_where_others_could_have_laid_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("log"), dir.path().join("other"));
        fs::write(&path, "kept").unwrap();
        fs::hard_link(&path, &other).unwrap();
        create(&path, Existing::Continued).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        let problem = create(&path, Existing::Replaced).unwrap_err().to_string();
        assert!(problem.contains("has a second name"), "{problem}");
        assert_eq!(fs::read(&path).unwrap(), b"kept");
    }
}
