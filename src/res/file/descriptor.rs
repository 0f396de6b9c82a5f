//! Opens and adjusts descriptors of rcriu itself.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{Whence, lseek},
};

use crate::sys::root::Root;

/// Flags that a description keeps, but that must not be passed to `open(2)` again: they would
/// have an effect, or the kernel rejects them.
const NOT_AGAIN: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC;

/// The bit of `O_TMPFILE` that is not `O_DIRECTORY`.
const TMPFILE: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// The kernel's `O_LARGEFILE` (`include/uapi/asm-generic/fcntl.h`); in the C library it is 0. The
/// kernel sets it for all files opened by path.
pub(super) const LARGE_FILE: u32 = 0o100_000;

/// The position of a file that has none.
pub(super) const NO_POSITION: u64 = u64::MAX;

/// Whether the descriptor only refers to a path (`O_PATH`).
pub(super) fn is_path(flags: u32) -> bool {
    flags.cast_signed() & libc::O_PATH != 0
}

/// Opens a file with the flags of a description. A terminal does not become the controlling
/// terminal.
pub(super) fn open(root: &Root, path: &[u8], flags: u32) -> nix::Result<OwnedFd> {
    let mut flags = flags.cast_signed() & !NOT_AGAIN;
    if flags & TMPFILE != 0 {
        flags &= !libc::O_TMPFILE;
    }
    root.open(path, flags | libc::O_NOCTTY)
}

/// Returns an `O_PATH` descriptor of a file. Opening it has no side effect: it neither waits for
/// the peer of a FIFO nor calls a device driver. Of `flags`, only those that say which file the
/// path leads to are used.
pub(super) fn name(root: &Root, path: &[u8], flags: u32) -> nix::Result<OwnedFd> {
    let way = flags & (libc::O_NOFOLLOW | libc::O_DIRECTORY).cast_unsigned();
    open(root, path, way | libc::O_PATH.cast_unsigned())
}

/// Whether the file was created with `O_TMPFILE`; it may still be given a name.
pub(super) fn is_tmpfile(flags: u32) -> bool {
    flags.cast_signed() & TMPFILE != 0
}

/// Creates a file without a name in `dir`, with the flags of a description.
pub(super) fn open_tmpfile(root: &Root, dir: &[u8], flags: u32) -> nix::Result<OwnedFd> {
    root.open_tmpfile(dir, flags.cast_signed() & !NOT_AGAIN)
}

/// Returns a path by which rcriu can open the file of a descriptor again.
pub(super) fn path_of(fd: BorrowedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Opens a new description of the file of a descriptor.
pub(super) fn reopen(fd: BorrowedFd, flags: u32) -> nix::Result<OwnedFd> {
    open(&Root::own(), path_of(fd).as_bytes(), flags & !libc::O_NOFOLLOW.cast_unsigned())
}

/// Returns the current events of a descriptor (`poll(2)`).
pub(super) fn events(fd: BorrowedFd) -> nix::Result<PollFlags> {
    events_among(fd, PollFlags::POLLIN | PollFlags::POLLOUT)
}

/// Returns which of these events a descriptor has now.
pub(super) fn events_among(fd: BorrowedFd, among: PollFlags) -> nix::Result<PollFlags> {
    let mut polled = [PollFd::new(fd, among)];
    poll(&mut polled, PollTimeout::ZERO)?;
    Ok(polled[0].revents().unwrap_or(PollFlags::empty()))
}

/// Sets the status flags that `F_SETFL` can set, except `O_ASYNC`, which needs an owner first.
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
