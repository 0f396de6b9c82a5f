//! Opens and creates files of an image directory, which another user may control. No other
//! code decides which files may be opened there.
//!
//! Only regular files are images: opening a FIFO would block, and reading a device may
//! never end or have side effects. New files hold memory, so only their owner can read
//! them, whatever the umask says. They are never created through a link.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use nix::{
    fcntl::{OFlag, openat},
    libc,
    sys::stat::{FileStat, Mode, fstat},
};

/// Permissions of new files, which hold the memory of processes.
const FILE_MODE: u32 = 0o600;

/// Opens a regular file for reading, and returns its attributes as well.
///
/// # Errors
/// What `open(2)` returns; [`io::ErrorKind::InvalidInput`] for a file of another type.
pub fn open(path: &Path) -> io::Result<(File, FileStat)> {
    open_with(path, File::options().read(true), OFlag::empty())
}

/// Opens a regular file for reading and writing. A symbolic link is refused: its target may
/// be any file of any user.
///
/// # Errors
/// As [`open`].
pub fn open_to_change(path: &Path) -> io::Result<(File, FileStat)> {
    open_with(path, File::options().read(true).write(true), OFlag::O_NOFOLLOW)
}

fn open_with(path: &Path, options: &mut OpenOptions, flags: OFlag) -> io::Result<(File, FileStat)> {
    // Without O_NONBLOCK, opening a FIFO of this name would block.
    let flags = flags | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = options.custom_flags(flags.bits()).open(path).map_err(|error| {
        if error.raw_os_error() == Some(libc::ELOOP) && path.is_symlink() {
            not_regular("a symbolic link")
        } else {
            error
        }
    })?;
    // `File::metadata` takes twice as long.
    let stat = fstat(&file)?;
    if stat.st_mode & libc::S_IFMT == libc::S_IFREG {
        Ok((file, stat))
    } else {
        Err(not_regular(type_name(stat.st_mode).unwrap_or("a regular file")))
    }
}

/// Returns the error of opening a file that is `name`, such as a directory.
pub(super) fn not_regular(name: &str) -> io::Error {
    let problem = format!("it is {name}, not a regular file");
    io::Error::new(io::ErrorKind::InvalidInput, problem)
}

/// Returns what messages call a file of this mode; `None` for a regular file.
pub fn type_name(mode: u32) -> Option<&'static str> {
    match mode & libc::S_IFMT {
        libc::S_IFREG => None,
        libc::S_IFDIR => Some("a directory"),
        libc::S_IFIFO => Some("a FIFO"),
        libc::S_IFCHR | libc::S_IFBLK => Some("a device"),
        libc::S_IFSOCK => Some("a socket"),
        libc::S_IFLNK => Some("a symbolic link"),
        _ => Some("of an unknown type"),
    }
}

/// Creates an empty file that only its owner can access. It must not exist.
///
/// # Errors
/// What `open(2)` returns; `EEXIST` also for a symbolic link of this name.
pub fn create(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(FILE_MODE).open(path)
}

/// Like [`create`], in an open directory.
///
/// # Errors
/// As [`create`].
pub fn create_at(dir: &File, name: &str) -> io::Result<File> {
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    Ok(openat(dir, name, flags, Mode::from_bits_truncate(FILE_MODE))?.into())
}

/// Reads a small regular file.
///
/// # Errors
/// As [`open`]; [`io::ErrorKind::FileTooLarge`] for a file of more than `limit` bytes.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let (file, _) = open(path)?;
    let mut bytes = Vec::new();
    if file.take(limit + 1).read_to_end(&mut bytes)? as u64 > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        for (path, name) in [
            (path.as_path(), "a FIFO"),
            (dir.path(), "a directory"),
            (Path::new("/dev/zero"), "a device"),
        ] {
            let problem = open(path).unwrap_err().to_string();
            assert_eq!(problem, format!("it is {name}, not a regular file"));
            read(path, 10).unwrap_err();
        }
        open_to_change(&path).unwrap_err();
        let link = dir.path().join("link");
        fs::write(dir.path().join("target"), "").unwrap();
        std::os::unix::fs::symlink("target", &link).unwrap();
        open(&link).unwrap();
        let problem = open_to_change(&link).unwrap_err().to_string();
        assert_eq!(problem, "it is a symbolic link, not a regular file");
    }

    #[test]
    fn what_is_created_is_private_and_never_behind_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("file"), dir.path().join("link"));
        let file = create(&path).unwrap();
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        std::os::unix::fs::symlink(dir.path().join("target"), &link).unwrap();
        create(&link).unwrap_err();
        assert!(!dir.path().join("target").exists());
        fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        assert_eq!(read(&path, 4).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }
}
