//! Watches which processes open files (`fanotify(7)`).
#![expect(unsafe_code, reason = "fanotify_init(2) and fanotify_mark(2)")]

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::{errno::Errno, libc};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::units::HostPid;

/// `struct fanotify_event_metadata` (`linux/fanotify.h`).
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Event {
    bytes: u32,
    version: u8,
    _reserved: u8,
    metadata_bytes: u16,
    mask: u64,
    fd: i32,
    pid: i32,
}

const EVENT_BYTES: usize = size_of::<Event>();
const _: () = assert!(EVENT_BYTES == 24);

/// The size of the read buffer.
const BATCH_BYTES: usize = 4096;

/// Whether the kernel can watch openings of shared memory.
pub fn probe() -> bool {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let memory = nix::sys::memfd::memfd_create(c"rcriu", flags);
    Openings::new().is_ok_and(|openings| memory.is_ok_and(|fd| openings.watch(fd.as_fd()).is_ok()))
}

/// Watches files and reports whether other processes open them. A file is watched only while a
/// process uses it.
#[derive(Debug)]
pub struct Openings {
    file: File,
}

impl Openings {
    /// Creates a watch without files.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`; `EMFILE` if the user has too many.
    pub fn new() -> nix::Result<Self> {
        // Events carry file handles instead of descriptors, and are ignored.
        let flags =
            libc::FAN_CLOEXEC | libc::FAN_NONBLOCK | libc::FAN_CLASS_NOTIF | libc::FAN_REPORT_FID;
        let event_flags = libc::O_RDONLY | libc::O_CLOEXEC;
        // SAFETY: the call takes numbers.
        let fd = unsafe { libc::fanotify_init(flags, event_flags.cast_unsigned()) };
        let fd = Errno::result(fd)?;
        // SAFETY: the kernel has just created this descriptor, and no other code has it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
    }

    /// Watches an open file.
    ///
    /// # Errors
    /// `EINVAL` before Linux 5.19.
    pub fn watch(&self, file: BorrowedFd) -> nix::Result<()> {
        let flags = libc::FAN_MARK_ADD | libc::FAN_MARK_EVICTABLE;
        let path = format!("/proc/self/fd/{}\0", file.as_raw_fd());
        let (fanotify, path) = (self.file.as_raw_fd(), path.as_ptr().cast());
        // SAFETY: the path is a NUL-terminated string that lives until after the call.
        let result =
            unsafe { libc::fanotify_mark(fanotify, flags, libc::FAN_OPEN, libc::AT_FDCWD, path) };
        Errno::result(result).map(drop)
    }

    /// Consumes all events, and returns whether the process `own` has caused all of them. If the queue
    /// has overflowed, returns false.
    pub fn only_by(&self, own: HostPid) -> std::io::Result<bool> {
        let mut only = true;
        loop {
            let mut batch = [0_u8; BATCH_BYTES];
            let count = match (&self.file).read(&mut batch) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(only),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                count => count?,
            };
            let mut rest = &batch[..count];
            while let Ok((event, _)) = Event::read_from_prefix(rest) {
                let bytes = event.bytes as usize;
                only &= event.mask == libc::FAN_OPEN && event.pid == own.0;
                if bytes < EVENT_BYTES || bytes > rest.len() {
                    return Ok(false);
                }
                rest = &rest[bytes..];
            }
        }
    }
}

impl From<OwnedFd> for Openings {
    fn from(fd: OwnedFd) -> Self {
        Self { file: fd.into() }
    }
}

impl AsFd for Openings {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
