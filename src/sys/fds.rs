//! Creates and examines descriptors.
#![expect(unsafe_code, reason = "system calls that no crate of ours wraps")]

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use nix::{errno::Errno, libc};

use crate::units::HostPid;

/// `F_GETOWNER_UIDS` (`include/uapi/asm-generic/fcntl.h`, Linux 3.6).
const F_GETOWNER_UIDS: libc::c_int = 17;
/// `F_GETOWN_EX` and `F_GETSIG` (the same file), which `libc` lacks.
const F_GETOWN_EX: libc::c_int = 16;
const F_GETSIG: libc::c_int = 11;
/// `KCMP_EPOLL_TFD` (`include/uapi/linux/kcmp.h`, Linux 4.13).
const KCMP_EPOLL_TFD: libc::c_int = 7;
/// `linux/sockios.h`.
const SIOCOUTQNSD: libc::Ioctl = 0x894b;
/// `TFD_IOC_SET_TICKS` (`include/uapi/linux/timerfd.h`, Linux 3.17).
const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400;
const _: () = assert!(
    TFD_IOC_SET_TICKS
        == (1 << 30) | (size_of::<u64>() as libc::Ioctl) << 16 | (b'T' as libc::Ioctl) << 8
);
/// The size of the kernel's signal set, which differs from the C library's.
const SIGSET_BYTES: usize = 8;

/// The receiver of the signals of a descriptor (`struct f_owner_ex`,
/// `include/uapi/asm-generic/fcntl.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Owner {
    /// `F_OWNER_*`.
    pub kind: i32,
    /// A thread, process or process group; 0 for none.
    pub pid: HostPid,
}
const _: () = assert!(size_of::<Owner>() == 8);

/// Starts write-back of `len` bytes of a file from `offset` on, or of everything after it if `len` is
/// 0, without waiting (`sync_file_range(2)`). This is a hint: file systems without a disk ignore
/// it, and only `fsync(2)` reports errors.
pub fn start_writeback(file: &File, offset: u64, len: u64) {
    if let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) {
        // SAFETY: the call takes numbers, and the descriptor is open until it returns.
        unsafe {
            libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE)
        };
    }
}

/// Identifies a file that an epoll instance watches (`struct kcmp_epoll_slot`,
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct EpollSlot {
    /// The descriptor of the epoll instance.
    pub epoll: u32,
    /// The descriptor that was added.
    pub target: u32,
    /// The position among the files added under this number.
    pub offset: u32,
}
const _: () = assert!(size_of::<EpollSlot>() == 12);

/// The setting of a timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimerSetting {
    /// Seconds and nanoseconds until the next expiration, or of its time.
    pub value: (u64, u64),
    /// Seconds and nanoseconds between expirations.
    pub interval: (u64, u64),
}

/// Takes ownership of a descriptor that the kernel has just created.
fn made(number: libc::c_long) -> nix::Result<OwnedFd> {
    let number = Errno::result(number)?;
    let number = libc::c_int::try_from(number).map_err(|_| Errno::EBADF)?;
    // SAFETY: the callers pass the result of a call that creates a descriptor; no other code
    // has its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Opens a file for reading without changing its access time, if the caller owns it or has
/// `CAP_FOWNER`.
pub fn open_noatime(path: impl AsRef<Path>) -> io::Result<File> {
    let open = |flags| File::options().read(true).custom_flags(flags).open(&path);
    match open(libc::O_NOATIME) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => open(0),
        result => result,
    }
}

/// Duplicates a descriptor of this process by its number, such as an inherited one.
pub fn duplicate(number: i32) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes and returns numbers; it changes no descriptor.
    made(unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) }.into())
}

/// Duplicates a descriptor to the lowest free number that is at least `lowest`.
pub fn duplicate_from(fd: BorrowedFd, lowest: i32) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes and returns numbers; it changes no descriptor.
    made(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, lowest) }.into())
}

/// Applies an operation of `flock(2)` to a descriptor.
pub fn flock(fd: BorrowedFd, operation: libc::c_int) -> nix::Result<()> {
    // SAFETY: the call takes numbers, and the descriptor is open until it returns.
    Errno::result(unsafe { libc::flock(fd.as_raw_fd(), operation) }).map(drop)
}

/// Returns the receiver of the signals of a descriptor, and the signal; 0 stands for `SIGIO`.
pub fn owner(fd: BorrowedFd) -> nix::Result<(Owner, u32)> {
    let mut owner = Owner { kind: 0, pid: HostPid(0) };
    // SAFETY: the kernel writes a `struct f_owner_ex`, whose layout is asserted.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner) })?;
    // SAFETY: the call takes no pointer.
    let signal = Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) })?;
    Ok((owner, signal.unsigned_abs()))
}

/// Returns the real and the effective user id that signals of a descriptor are sent with.
///
/// # Errors
/// `EINVAL` without `CONFIG_CHECKPOINT_RESTORE`.
pub fn owner_uids(fd: BorrowedFd) -> nix::Result<[u32; 2]> {
    let mut uids = [0_u32; 2];
    // SAFETY: the kernel writes two `uid_t`, for which there is room.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWNER_UIDS, uids.as_mut_ptr()) };
    Errno::result(result)?;
    Ok(uids)
}

/// Creates an eventfd with the counter 0.
pub fn eventfd(flags: libc::c_int) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes no pointer.
    made(unsafe { libc::eventfd(0, flags) }.into())
}

/// Creates an epoll instance that watches nothing.
pub fn epoll() -> nix::Result<OwnedFd> {
    // SAFETY: the call takes no pointer.
    made(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }.into())
}

/// Adds a descriptor to an epoll instance.
pub fn watch(epoll: BorrowedFd, target: i32, events: u32, data: u64) -> nix::Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    let (epoll, add) = (epoll.as_raw_fd(), libc::EPOLL_CTL_ADD);
    // SAFETY: the kernel reads a `struct epoll_event`.
    Errno::result(unsafe { libc::epoll_ctl(epoll, add, target, &raw mut event) }).map(drop)
}

/// Creates a signalfd for the signals in `mask`: bit `N - 1` stands for signal `N`.
pub fn signalfd(mask: u64) -> nix::Result<OwnedFd> {
    let flags = libc::SFD_CLOEXEC;
    // SAFETY: the kernel reads `SIGSET_BYTES` bytes from `mask`, which has them.
    made(unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, SIGSET_BYTES, flags) })
}

/// Creates a disarmed timerfd.
pub fn timerfd(clock: libc::clockid_t) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes no pointer.
    made(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) }.into())
}

/// Arms or disarms a timerfd.
pub fn set_timer(fd: BorrowedFd, flags: libc::c_int, setting: TimerSetting) -> nix::Result<()> {
    let time = |(seconds, nanoseconds): (u64, u64)| libc::timespec {
        tv_sec: seconds.cast_signed(),
        tv_nsec: nanoseconds.cast_signed(),
    };
    let setting =
        libc::itimerspec { it_interval: time(setting.interval), it_value: time(setting.value) };
    let old = std::ptr::null_mut();
    // SAFETY: the kernel reads `setting`, which lives until after the call.
    let result = unsafe { libc::timerfd_settime(fd.as_raw_fd(), flags, &raw const setting, old) };
    Errno::result(result).map(drop)
}

/// Returns the time left of a timerfd, and its interval.
///
/// The kernel rearms an expired periodic timer only when a process reads it, as this call does.
pub fn timer(fd: BorrowedFd) -> nix::Result<TimerSetting> {
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut setting = libc::itimerspec { it_interval: zero, it_value: zero };
    // SAFETY: the kernel writes an `itimerspec`.
    Errno::result(unsafe { libc::timerfd_gettime(fd.as_raw_fd(), &raw mut setting) })?;
    let time = |time: libc::timespec| (time.tv_sec.cast_unsigned(), time.tv_nsec.cast_unsigned());
    Ok(TimerSetting { value: time(setting.it_value), interval: time(setting.it_interval) })
}

/// Sets the number of expirations of a timerfd.
///
/// # Errors
/// `ENOTTY` without `CONFIG_CHECKPOINT_RESTORE`, `EINVAL` for 0.
pub fn set_timer_ticks(fd: BorrowedFd, ticks: u64) -> nix::Result<()> {
    // SAFETY: the kernel reads a `u64`, as the number of the ioctl says.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    Errno::result(result).map(drop)
}

/// Returns the time of a clock in seconds and nanoseconds.
pub fn clock(clock: libc::clockid_t) -> nix::Result<(u64, u64)> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes a `timespec`.
    Errno::result(unsafe { libc::clock_gettime(clock, &raw mut time) })?;
    Ok((time.tv_sec.cast_unsigned(), time.tv_nsec.cast_unsigned()))
}

/// Creates a memfd. `flags` are `MFD_*`, including the size of huge pages.
pub fn memfd(name: &CStr, flags: libc::c_uint) -> nix::Result<OwnedFd> {
    // SAFETY: the name is a NUL-terminated string that lives until after the call.
    made(unsafe { libc::memfd_create(name.as_ptr(), flags | libc::MFD_CLOEXEC) }.into())
}

/// Returns the number of bytes that can be read (`FIONREAD`).
pub fn readable_bytes(fd: BorrowedFd) -> nix::Result<u32> {
    count(fd, libc::FIONREAD)
}

/// Returns the number of bytes, including the FIN, that a TCP socket has yet to send or that its
/// peer has not acknowledged (`SIOCOUTQ`).
///
/// # Errors
/// The error of `ioctl(2)`.
pub fn unacknowledged_bytes(fd: BorrowedFd) -> nix::Result<u32> {
    count(fd, libc::TIOCOUTQ)
}

/// Returns the number of bytes, including the FIN, that a TCP socket has never sent (`SIOCOUTQNSD`,
/// `linux/sockios.h`).
///
/// # Errors
/// The error of `ioctl(2)`.
pub fn unsent_bytes(fd: BorrowedFd) -> nix::Result<u32> {
    count(fd, SIOCOUTQNSD)
}

fn count(fd: BorrowedFd, request: libc::Ioctl) -> nix::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: each request that this is called with writes an `int`.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut bytes) })?;
    Ok(bytes.unsigned_abs())
}

/// Whether the descriptor `fd` of process `pid` refers to the file that an epoll instance of the same
/// process watches.
pub fn is_epoll_target(pid: HostPid, fd: i32, slot: EpollSlot) -> nix::Result<bool> {
    // SAFETY: the kernel reads a `struct kcmp_epoll_slot`, whose size is asserted.
    let result =
        unsafe { libc::syscall(libc::SYS_kcmp, pid.0, pid.0, KCMP_EPOLL_TFD, fd, &raw const slot) };
    Errno::result(result).map(|order| order == 0)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd};

    use super::*;

    #[test]
    fn the_kernel_knows_these_calls() {
        let event = eventfd(libc::EFD_SEMAPHORE).unwrap();
        assert_eq!(owner(event.as_fd()).unwrap(), (Owner { kind: 0, pid: HostPid(0) }, 0));
        owner_uids(event.as_fd()).unwrap();
        signalfd(1 << 9).unwrap();
        epoll().unwrap();
        memfd(c"name", libc::MFD_ALLOW_SEALING).unwrap();
        let timer = timerfd(libc::CLOCK_MONOTONIC).unwrap();
        set_timer(timer.as_fd(), 0, TimerSetting { value: (9, 0), interval: (0, 1) }).unwrap();
        set_timer_ticks(timer.as_fd(), 3).unwrap();
        clock(libc::CLOCK_MONOTONIC).unwrap();
        let (read, mut write) = std::io::pipe().unwrap();
        write.write_all(b"abc").unwrap();
        assert_eq!(readable_bytes(read.as_fd()).unwrap(), 3);
        let copy = duplicate(read.as_raw_fd()).unwrap();
        assert_eq!(readable_bytes(copy.as_fd()).unwrap(), 3);
        assert_eq!(duplicate(-1).unwrap_err(), Errno::EBADF);
    }
}
