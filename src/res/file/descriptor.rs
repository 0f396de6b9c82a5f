//! Opening and adjusting descriptors of this program.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, open as open_path},
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::Mode,
    unistd::{Whence, lseek},
};

/// Flags that an open file keeps but that would do something when it is opened
/// again, or that the kernel does not take then.
const NOT_AGAIN: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC;

/// The bit of `O_TMPFILE` that is not `O_DIRECTORY`.
const TMPFILE: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// `O_LARGEFILE` as the kernel has it (`include/uapi/asm-generic/fcntl.h`); to the
/// C library it is 0. What was opened by path has it.
pub(super) const LARGE_FILE: u32 = 0o100_000;

/// A position that is not restored, because the file has none.
pub(super) const NO_POSITION: u64 = u64::MAX;

/// Whether the flags are those of a descriptor that only names a file.
pub(super) fn is_path(flags: u32) -> bool {
    flags.cast_signed() & libc::O_PATH != 0
}

/// Opens a file as it was opened before. The terminal, if it is one, does not
/// become the controlling one.
pub(super) fn open(path: &[u8], flags: u32) -> nix::Result<OwnedFd> {
    let mut flags = flags.cast_signed() & !NOT_AGAIN;
    if flags & TMPFILE != 0 {
        flags &= !libc::O_TMPFILE;
    }
    let flags = OFlag::from_bits_retain(flags | libc::O_NOCTTY | libc::O_CLOEXEC);
    loop {
        match open_path(path, flags, Mode::empty()) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Returns a descriptor that only names what is at a path, which nothing happens to by
/// that: a FIFO is not waited for, a device does nothing. Other flags than those that say
/// what a path leads to are not looked at.
pub(super) fn name(path: &[u8], flags: u32) -> nix::Result<OwnedFd> {
    let way = flags & (libc::O_NOFOLLOW | libc::O_DIRECTORY).cast_unsigned();
    open(path, way | libc::O_PATH.cast_unsigned())
}

/// Whether a file was made without a name, which leaves it the right to be given one.
pub(super) fn is_tmpfile(flags: u32) -> bool {
    flags.cast_signed() & TMPFILE != 0
}

/// Makes a file without a name in a directory, open as one that was made so before.
pub(super) fn open_tmpfile(dir: &[u8], flags: u32) -> nix::Result<OwnedFd> {
    let flags = flags.cast_signed() & !NOT_AGAIN | libc::O_TMPFILE | libc::O_CLOEXEC;
    open_path(dir, OFlag::from_bits_retain(flags), Mode::S_IRUSR | Mode::S_IWUSR)
}

/// Returns the path under which a descriptor of this program can be opened again.
pub(super) fn path_of(fd: BorrowedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Makes a description of its own of what a descriptor leads to.
pub(super) fn reopen(fd: BorrowedFd, flags: u32) -> nix::Result<OwnedFd> {
    open(path_of(fd).as_bytes(), flags & !libc::O_NOFOLLOW.cast_unsigned())
}

/// Returns what `poll(2)` tells of a descriptor now.
pub(super) fn events(fd: BorrowedFd) -> nix::Result<PollFlags> {
    let mut polled = [PollFd::new(fd, PollFlags::POLLIN | PollFlags::POLLOUT)];
    poll(&mut polled, PollTimeout::ZERO)?;
    Ok(polled[0].revents().unwrap_or(PollFlags::empty()))
}

/// Sets the status flags that can be set, but for `O_ASYNC`, for which there must
/// be an owner first.
pub(super) fn set_status(fd: BorrowedFd, flags: u32) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(flags.cast_signed() & !libc::O_ASYNC);
    fcntl(fd, FcntlArg::F_SETFL(flags)).map(drop)
}

/// Sets the position, if the file has one.
pub(super) fn seek(fd: BorrowedFd, position: u64, flags: u32) -> nix::Result<()> {
    if is_path(flags) || position == NO_POSITION {
        return Ok(());
    }
    match lseek(fd, position.cast_signed(), Whence::SeekSet) {
        Err(Errno::ESPIPE) if position == 0 => Ok(()),
        result => result.map(drop),
    }
}
