//! Watches of file systems: `inotify(7)`, `fanotify(7)`, and files by handle.
#![expect(unsafe_code, reason = "system calls that no crate of ours wraps")]

use std::{
    ffi::CString,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::{errno::Errno, libc};

/// `INOTIFY_IOC_SETNEXTWD` (`include/uapi/linux/inotify.h`, Linux 4.16, with
/// `CONFIG_CHECKPOINT_RESTORE`).
const INOTIFY_IOC_SETNEXTWD: libc::Ioctl = 0x4004_4900;
const _: () = assert!(
    INOTIFY_IOC_SETNEXTWD
        == (1 << 30) | (size_of::<i32>() as libc::Ioctl) << 16 | (b'I' as libc::Ioctl) << 8
);

/// The most bytes of a file handle (`MAX_HANDLE_SZ`, `include/linux/exportfs.h`).
pub const HANDLE_BYTES: usize = 128;

/// `struct file_handle` (`include/linux/fs.h`) with room for any handle.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    handle: [u8; HANDLE_BYTES],
}
const _: () = assert!(size_of::<Handle>() == 8 + HANDLE_BYTES);

fn made(number: libc::c_int) -> nix::Result<OwnedFd> {
    let number = Errno::result(number)?;
    // SAFETY: the callers pass the result of a call that creates a descriptor; no other code
    // has its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Returns a path of an open file that leads to the file itself, even to a symbolic link.
fn path_of(file: BorrowedFd) -> CString {
    CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("digits have no NUL")
}

/// Creates an inotify instance.
pub fn inotify() -> nix::Result<OwnedFd> {
    // SAFETY: the call takes a number.
    made(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) })
}

/// Has the next watch of an inotify instance get the number `wd`, or a higher one if it is taken.
pub fn set_next_watch(inotify: BorrowedFd, wd: i32) -> nix::Result<()> {
    // SAFETY: the call takes numbers, and the descriptor is open until it returns.
    Errno::result(unsafe { libc::ioctl(inotify.as_raw_fd(), INOTIFY_IOC_SETNEXTWD, wd) }).map(drop)
}

/// Watches an open file, and returns the number of the watch.
pub fn add_watch(inotify: BorrowedFd, file: BorrowedFd, mask: u32) -> nix::Result<i32> {
    let path = path_of(file);
    // SAFETY: the path is terminated and outlives the call.
    Errno::result(unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask) })
}

/// Removes a watch.
pub fn remove_watch(inotify: BorrowedFd, wd: i32) -> nix::Result<()> {
    // SAFETY: the call takes numbers.
    Errno::result(unsafe { libc::inotify_rm_watch(inotify.as_raw_fd(), wd) }).map(drop)
}

/// Creates a fanotify group.
pub fn fanotify(flags: u32, event_flags: u32) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes numbers.
    made(unsafe { libc::fanotify_init(flags, event_flags) })
}

/// Changes the marks of a fanotify group on an open file, its mount or its file system.
pub fn mark(fanotify: BorrowedFd, flags: u32, mask: u64, file: BorrowedFd) -> nix::Result<()> {
    let path = path_of(file);
    let fanotify = fanotify.as_raw_fd();
    // SAFETY: the path is terminated and outlives the call.
    Errno::result(unsafe {
        libc::fanotify_mark(fanotify, flags, mask, libc::AT_FDCWD, path.as_ptr())
    })
    .map(drop)
}

/// Opens a file by its handle with `O_PATH`. `mount` is any file on a mount of its file system.
///
/// # Errors
/// `ESTALE` if there is no such file; `EPERM` without `CAP_DAC_READ_SEARCH`; `EINVAL` for a handle
/// that is too long.
pub fn open_by_handle(mount: BorrowedFd, kind: u32, bytes: &[u8]) -> nix::Result<OwnedFd> {
    let len = u32::try_from(bytes.len()).map_err(|_| Errno::EINVAL)?;
    let kind = i32::try_from(kind).map_err(|_| Errno::EINVAL)?;
    let mut handle = Handle { bytes: len, kind, handle: [0; HANDLE_BYTES] };
    handle.handle.get_mut(..bytes.len()).ok_or(Errno::EINVAL)?.copy_from_slice(bytes);
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the handle has the layout of `struct file_handle` and outlives the call.
    let result = unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw mut handle, flags)
    };
    made(libc::c_int::try_from(result).map_err(|_| Errno::EBADF)?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_watch_gets_the_number_that_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::open(dir.path()).unwrap();
        let inotify = inotify().unwrap();
        set_next_watch(inotify.as_fd(), 4711).unwrap();
        assert_eq!(add_watch(inotify.as_fd(), file.as_fd(), libc::IN_CREATE), Ok(4711));
        assert_eq!(set_next_watch(inotify.as_fd(), -1), Err(Errno::EINVAL));
    }

    #[test]
    fn a_handle_that_is_too_long_is_refused() {
        let root = std::fs::File::open("/").unwrap();
        let refused = open_by_handle(root.as_fd(), 1, &[0; HANDLE_BYTES + 1]);
        assert_eq!(refused.unwrap_err(), Errno::EINVAL);
    }
}
