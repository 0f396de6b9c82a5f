//! Pages on demand by `userfaultfd(2)`: a thread that touches a page which is not there waits until
//! another process supplies it.
//!
//! The kernel also reports what changes the address space (`UFFD_FEATURE_EVENT_*`), and the thread
//! that changes it waits until the report is read.
#![expect(unsafe_code, reason = "ioctls of userfaultfd, and descriptors that the kernel makes")]

use std::{
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::{errno::Errno, libc};

use super::userfaultfd::{self, iowr};

/// The flags to create a descriptor with. Without `UFFD_USER_MODE_ONLY`, faults of system calls wait,
/// too, which needs `CAP_SYS_PTRACE`.
pub const MAKE_FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// `UFFD_FEATURE_EVENT_FORK`, `_REMAP`, `_REMOVE` and `_UNMAP` (`linux/userfaultfd.h`, Linux 4.11).
/// That of forks needs `CAP_SYS_PTRACE`.
const FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;

/// `UFFDIO_REGISTER_MODE_MISSING`.
const REGISTER_MODE_MISSING: u64 = 1;

/// `struct uffdio_copy` (`linux/userfaultfd.h`).
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

const _: () = assert!(size_of::<Copy>() == 40);

/// `struct uffdio_zeropage` (`linux/userfaultfd.h`).
#[repr(C)]
struct ZeroPage {
    start: u64,
    len: u64,
    mode: u64,
    zeroed: i64,
}

const _: () = assert!(size_of::<ZeroPage>() == 32);

/// `struct uffdio_range` (`linux/userfaultfd.h`).
#[repr(C)]
struct WakeRange {
    start: u64,
    len: u64,
}

const _: () = assert!(size_of::<WakeRange>() == 16);

/// `_IOR(0xaa, 0x02, struct uffdio_range)`.
const UFFDIO_WAKE: libc::Ioctl = 0x8010_aa02;
/// `_IOWR(0xaa, 0x03, struct uffdio_copy)`.
const UFFDIO_COPY: libc::Ioctl = iowr(0x03, size_of::<Copy>());
/// `_IOWR(0xaa, 0x04, struct uffdio_zeropage)`.
const UFFDIO_ZEROPAGE: libc::Ioctl = iowr(0x04, size_of::<ZeroPage>());

/// `struct uffd_msg` (`linux/userfaultfd.h`).
#[repr(C)]
#[derive(Clone, Copy)]
struct Raw {
    event: u8,
    reserved: [u8; 7],
    arguments: [u64; 3],
}

const _: () = assert!(size_of::<Raw>() == 32);

/// How many messages are read at a time.
const MESSAGES: usize = 32;

/// A message of the kernel.
#[derive(Debug)]
pub enum Message {
    /// A thread waits for the page at this address.
    Fault(u64),
    /// The process was forked; the descriptor is that of the child's memory.
    Forked(MissingPages),
    /// Pages have moved: from, to, and the length in bytes.
    Moved(u64, u64, u64),
    /// Pages read as zeros from now on (`madvise(2)`).
    Removed(Range<u64>),
    /// Pages are no longer mapped.
    Unmapped(Range<u64>),
}

/// A descriptor for the missing pages of a process.
#[derive(Debug)]
pub struct MissingPages {
    fd: OwnedFd,
}

impl MissingPages {
    /// Sets up a descriptor that another process has just created.
    ///
    /// # Errors
    /// `EPERM` if this process lacks `CAP_SYS_PTRACE`.
    pub fn set_up(fd: OwnedFd) -> nix::Result<Self> {
        userfaultfd::set_up(fd.as_fd(), FEATURES)?;
        Ok(Self { fd })
    }

    /// Takes over a descriptor that is set up already.
    pub fn resume(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Registers a range of private memory without a file.
    ///
    /// # Errors
    /// `EBUSY` if part of it is registered with another descriptor; `EINVAL` for other memory.
    pub fn register(&self, range: &Range<u64>) -> nix::Result<()> {
        userfaultfd::register(self.fd.as_fd(), (range.start, range.end), REGISTER_MODE_MISSING)
    }

    /// Supplies pages from `address` on, and wakes the threads that wait for them. Returns how many
    /// bytes it has supplied.
    ///
    /// # Errors
    /// Only if the first page fails: `EEXIST` if it is there; `EAGAIN` while a message is to be read;
    /// `ENOENT` if no registered mapping holds all of the pages; `ESRCH` if the memory is gone.
    pub fn supply(&self, address: u64, bytes: &[u8]) -> nix::Result<u64> {
        let (src, len) = (bytes.as_ptr().addr() as u64, bytes.len() as u64);
        let mut copy = Copy { dst: address, src, len, mode: 0, copied: 0 };
        // SAFETY: the structure has the size that the number says, and it and the bytes outlive the
        // call; the kernel writes only to the memory of the process, where no page was.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) };
        outcome(result, copy.copied)
    }

    /// Supplies a page of zeros, and wakes the threads that wait for it.
    ///
    /// # Errors
    /// As [`Self::supply`].
    pub fn supply_zeros(&self, range: &Range<u64>) -> nix::Result<u64> {
        let len = range.end - range.start;
        let mut zero = ZeroPage { start: range.start, len, mode: 0, zeroed: 0 };
        // SAFETY: as above.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut zero) };
        outcome(result, zero.zeroed)
    }

    /// Wakes the threads that wait for pages of a range, to look again.
    ///
    /// # Errors
    /// Those of `ioctl(2)`.
    pub fn wake(&self, range: &Range<u64>) -> nix::Result<()> {
        let mut wake = WakeRange { start: range.start, len: range.end - range.start };
        // SAFETY: as above.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WAKE, &raw mut wake) };
        Errno::result(result).map(drop)
    }

    /// Reads messages; none if there are none.
    ///
    /// # Errors
    /// Those of `read(2)`.
    pub fn messages(&self) -> nix::Result<Vec<Message>> {
        let mut raw = [Raw { event: 0, reserved: [0; 7], arguments: [0; 3] }; MESSAGES];
        // SAFETY: the kernel writes whole messages into the array, any bytes of which are valid ones.
        let read =
            unsafe { libc::read(self.fd.as_raw_fd(), raw.as_mut_ptr().cast(), size_of_val(&raw)) };
        let bytes = match Errno::result(read) {
            Ok(bytes) => usize::try_from(bytes).expect("not negative"),
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Vec::new()),
            Err(errno) => return Err(errno),
        };
        Ok(raw[..bytes / size_of::<Raw>()].iter().filter_map(message).collect())
    }
}

/// Returns what was supplied: the kernel reports an error, or how far it came before one.
fn outcome(result: libc::c_int, supplied: i64) -> nix::Result<u64> {
    match Errno::result(result) {
        Ok(_) => Ok(supplied.cast_unsigned()),
        Err(_) if supplied > 0 => Ok(supplied.cast_unsigned()),
        Err(errno) => Err(errno),
    }
}

/// Decodes a message; `None` for one of a feature that was not asked for.
fn message(raw: &Raw) -> Option<Message> {
    /// `UFFD_EVENT_*` (`linux/userfaultfd.h`).
    const PAGEFAULT: u8 = 0x12;
    const FORK: u8 = 0x13;
    const REMAP: u8 = 0x14;
    const REMOVE: u8 = 0x15;
    const UNMAP: u8 = 0x16;
    let [first, second, third] = raw.arguments;
    Some(match raw.event {
        // The flags come first.
        PAGEFAULT => Message::Fault(second),
        FORK => {
            let number = i32::try_from(first & u64::from(u32::MAX)).ok()?;
            // SAFETY: the kernel has just made this descriptor for this process, with this message.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            Message::Forked(MissingPages { fd })
        }
        REMAP => Message::Moved(first, second, third),
        REMOVE => Message::Removed(first..second),
        UNMAP => Message::Unmapped(first..second),
        _ => return None,
    })
}

impl AsFd for MissingPages {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<MissingPages> for OwnedFd {
    fn from(pages: MissingPages) -> Self {
        pages.fd
    }
}
