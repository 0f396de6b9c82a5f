//! `userfaultfd(2)`: asynchronous write protection, where the kernel lets writes pass and records
//! them. [`super::missing`] has the other use, pages that are supplied on demand.
//!
//! A descriptor belongs to the memory of the process that has created it, but any process that has
//! it may register ranges of that memory.
#![expect(unsafe_code, reason = "ioctls of userfaultfd")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::{errno::Errno, libc};

use crate::units::RemoteAddr;

/// The flags to create a descriptor with (`userfaultfd(2)`).
///
/// `UFFD_USER_MODE_ONLY` (`linux/userfaultfd.h`, Linux 5.11) needs no privilege. It excludes faults in
/// the kernel, which a handler would have to resolve. Asynchronous protection has no handler: writes
/// by the kernel pass and are recorded as well.
pub const MAKE_FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK | 1;

/// `UFFD_API` (`linux/userfaultfd.h`).
const UFFD_API: u64 = 0xaa;

/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM` (Linux 5.19), `UFFD_FEATURE_WP_UNPOPULATED`
/// (Linux 6.4) and `UFFD_FEATURE_WP_ASYNC` (Linux 6.7).
const FEATURES: u64 = 1 << 12 | 1 << 13 | 1 << 15;

/// `UFFDIO_REGISTER_MODE_WP`.
const REGISTER_MODE_WP: u64 = 1 << 1;

/// `struct uffdio_api` (`linux/userfaultfd.h`).
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<Api>() == 24);

/// `struct uffdio_register` (`linux/userfaultfd.h`).
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<Register>() == 32);

/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`.
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
/// `_IOWR(0xaa, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;

/// Returns the number of an ioctl that reads and writes a structure of `bytes`
/// (`asm-generic/ioctl.h`).
pub(super) const fn iowr(number: u8, bytes: usize) -> libc::Ioctl {
    3 << 30 | (bytes as libc::Ioctl) << 16 | 0xaa << 8 | number as libc::Ioctl
}

const _: () = assert!(UFFDIO_API == iowr(0x3f, size_of::<Api>()));
const _: () = assert!(UFFDIO_REGISTER == iowr(0x00, size_of::<Register>()));

/// Sets up a new descriptor with these features.
pub(super) fn set_up(fd: BorrowedFd, features: u64) -> nix::Result<()> {
    let mut api = Api { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the structure has the size that the number says and outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) };
    Errno::result(result).map(drop)
}

/// Registers `[start, end)`. Threads of the process may wait for the descriptor's holder from now on, as
/// the mode and the features say.
pub(super) fn register(fd: BorrowedFd, (start, end): (u64, u64), mode: u64) -> nix::Result<()> {
    let mut range = Register { start, len: end - start, mode, ioctls: 0 };
    // SAFETY: as above; the call changes no bytes of the memory.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut range) };
    Errno::result(result).map(drop)
}

/// A descriptor with asynchronous write protection.
#[derive(Debug)]
pub struct WriteProtect {
    fd: OwnedFd,
}

impl WriteProtect {
    /// Sets up a descriptor that this or another process has just created.
    ///
    /// # Errors
    /// `EINVAL` if the kernel does not support asynchronous write protection (before Linux 6.7).
    pub fn set_up(fd: OwnedFd) -> nix::Result<Self> {
        set_up(fd.as_fd(), FEATURES)?;
        Ok(Self { fd })
    }

    /// Takes over a descriptor that is set up already.
    pub fn resume(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Registers `[start, end)`, which may span several mappings. Ranges registered with this
    /// descriptor before stay unchanged.
    ///
    /// # Errors
    /// `EBUSY` if part of it is registered with another descriptor; `ENOMEM` if the memory no longer
    /// exists, as after `execve(2)`; `EINVAL` for ranges without mappings.
    pub fn register(&self, start: RemoteAddr, end: RemoteAddr) -> nix::Result<()> {
        // With asynchronous protection, no thread ever waits for this process.
        register(self.fd.as_fd(), (start.0, end.0), REGISTER_MODE_WP)
    }
}

impl AsFd for WriteProtect {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<WriteProtect> for OwnedFd {
    fn from(protect: WriteProtect) -> Self {
        protect.fd
    }
}
