//! POSIX message queues (`mq_overview(7)`).
#![expect(unsafe_code, reason = "no crate has these calls by kernel names")]

use std::{
    ffi::{CStr, CString},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

use nix::{dir::Dir, errno::Errno, fcntl::OFlag, libc, sys::stat::Mode};

/// `FSCONFIG_CMD_CREATE`, `FSOPEN_CLOEXEC`, `FSMOUNT_CLOEXEC` (`linux/mount.h`).
const CREATE: i32 = 6;
const FSOPEN_CLOEXEC: i32 = 1;
const FSMOUNT_CLOEXEC: i32 = 1;

/// `struct mq_attr` (`linux/mqueue.h`), without what is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueAttributes {
    /// The most messages.
    pub messages_max: i64,
    /// The most bytes of a message.
    pub message_bytes: i64,
    /// The messages in it.
    pub messages: i64,
}

fn empty() -> libc::mq_attr {
    // SAFETY: the structure has numbers only.
    unsafe { std::mem::zeroed() }
}

/// Returns the names, without the slash, of all queues of the IPC namespace that have one.
///
/// # Errors
/// `ENODEV` if the kernel has no queues; `EPERM`.
pub fn names() -> nix::Result<Vec<CString>> {
    let descriptor = |result| {
        let fd = i32::try_from(Errno::result::<libc::c_long>(result)?).expect("a descriptor");
        // SAFETY: the kernel has just created this descriptor.
        Ok::<_, Errno>(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    // A mount that is at no place.
    // SAFETY: the name is terminated and outlives the call.
    let context =
        descriptor(unsafe { libc::syscall(libc::SYS_fsopen, c"mqueue".as_ptr(), FSOPEN_CLOEXEC) })?;
    let (fd, none) = (context.as_raw_fd(), ptr::null::<u8>());
    // SAFETY: this command takes neither a name nor a value.
    Errno::result(unsafe { libc::syscall(libc::SYS_fsconfig, fd, CREATE, none, none, 0) })?;
    // SAFETY: the call takes numbers.
    let mount = descriptor(unsafe { libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, 0) })?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut found = Vec::new();
    for entry in Dir::openat(&mount, ".", flags, Mode::empty())?.iter() {
        let name = entry?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}

/// Opens a queue by its name without the slash (`mq_open(2)`).
///
/// # Errors
/// `ENOENT`.
pub fn open(name: &CStr, flags: i32) -> nix::Result<OwnedFd> {
    let flags = flags | libc::O_CLOEXEC;
    // SAFETY: the name is terminated and outlives the call.
    let fd =
        unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0, ptr::null::<u8>()) };
    let fd = i32::try_from(Errno::result(fd)?).expect("a descriptor");
    // SAFETY: the kernel has just created this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Creates a queue for the user alone, for reading and writing without waiting.
///
/// # Errors
/// `EEXIST`; `EMFILE` if the user may have no more (`RLIMIT_MSGQUEUE`).
pub fn create(name: &CStr, attributes: &QueueAttributes) -> nix::Result<OwnedFd> {
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let mut wanted = empty();
    wanted.mq_maxmsg = attributes.messages_max;
    wanted.mq_msgsize = attributes.message_bytes;
    let (name, wanted) = (name.as_ptr(), &raw const wanted);
    // SAFETY: the name is terminated, and both outlive the call, which only reads them.
    let fd = unsafe { libc::syscall(libc::SYS_mq_open, name, flags, 0o600, wanted) };
    let fd = i32::try_from(Errno::result(fd)?).expect("a descriptor");
    // SAFETY: the kernel has just created this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Removes the name of a queue.
pub fn unlink(name: &CStr) -> nix::Result<()> {
    // SAFETY: the name is terminated and outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) };
    Errno::result(done).map(drop)
}

/// Returns the attributes of a queue.
pub fn attributes(fd: BorrowedFd) -> nix::Result<QueueAttributes> {
    let mut found = empty();
    let (new, old) = (ptr::null::<u8>(), &raw mut found);
    // SAFETY: the kernel writes one structure to `found`, and reads nothing.
    let done = unsafe { libc::syscall(libc::SYS_mq_getsetattr, fd.as_raw_fd(), new, old) };
    Errno::result(done)?;
    Ok(QueueAttributes {
        messages_max: found.mq_maxmsg,
        message_bytes: found.mq_msgsize,
        messages: found.mq_curmsgs,
    })
}

/// Sends a message; does not wait if the queue was opened so.
pub fn send(fd: BorrowedFd, bytes: &[u8], priority: u32) -> nix::Result<()> {
    let (at, len) = (bytes.as_ptr(), bytes.len());
    let timeout = ptr::null::<libc::timespec>();
    // SAFETY: the bytes are borrowed until after the call, which only reads them.
    let done = unsafe {
        libc::syscall(libc::SYS_mq_timedsend, fd.as_raw_fd(), at, len, priority, timeout)
    };
    Errno::result(done).map(drop)
}
