//! Counts events by the kernel's tracepoints (`perf_event_open(2)`).
//!
//! A counter belongs to a thread and all that it creates, or to one processor, while its descriptor
//! is open. The kernel counts in the tracepoint itself, so no event is lost and no reader is needed.
//!
//! Tracefs shows the number by which a tracepoint is requested. Where tracefs is not mounted, as in
//! containers and on machines without systemd, rcriu opens it without a mount point.
#![expect(unsafe_code, reason = "perf_event_open(2) and its ioctls; fsopen(2) and fsmount(2)")]

use std::{
    ffi::CStr,
    fs::{self, File},
    io::{self, Read},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    sync::OnceLock,
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, openat},
    libc,
    sys::{
        stat::Mode,
        statfs::{FsType, fstatfs},
    },
};
use zerocopy::{FromZeros, IntoBytes};

use crate::{
    arch::native::OTHER_INTERFACE,
    fault::{self, Novelty},
    units::HostPid,
};

/// Where tracefs is usually mounted (`Documentation/trace/ftrace.rst`).
const MOUNTED: &str = "/sys/kernel/tracing";

/// Where debugfs mounts tracefs when the path is accessed.
const BELOW_DEBUGFS: &str = "/sys/kernel/debug/tracing";

/// `TRACEFS_MAGIC` (`linux/magic.h`).
const TRACEFS: FsType = FsType(0x7472_6163);

/// The start of `struct perf_event_attr` (`linux/perf_event.h`), which all kernels accept.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    config1: u64,
}

/// `PERF_ATTR_SIZE_VER0`.
const ATTRIBUTES_BYTES: u32 = 64;
const _: () = assert!(size_of::<Attributes>() == ATTRIBUTES_BYTES as usize);

/// `PERF_TYPE_TRACEPOINT`.
const TYPE_TRACEPOINT: u32 = 2;
/// `PERF_FORMAT_TOTAL_TIME_ENABLED` and `PERF_FORMAT_TOTAL_TIME_RUNNING`.
const FORMAT_TIMES: u64 = 1 << 0 | 1 << 1;
/// `perf_event_attr.inherit`: also count in threads and processes that are created.
const FLAG_INHERIT: u64 = 1 << 1;
/// `PERF_FLAG_FD_CLOEXEC`.
const FLAG_CLOEXEC: libc::c_ulong = 1 << 3;
/// `PERF_EVENT_IOC_SET_FILTER`: `_IOW('$', 6, char *)`.
const SET_FILTER: libc::Ioctl =
    1 << 30 | (size_of::<usize>() as libc::Ioctl) << 16 | (b'$' as libc::Ioctl) << 8 | 6;
const _: () = assert!(SET_FILTER == 0x4008_2406);

/// An event to count. Calls by the 32-bit or the x32 interface are not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A process is created with a copy of the memory: by `fork(2)` and the like, but not by
    /// `vfork(2)`, and not for threads.
    MemoryCopied,
    /// A mapping is duplicated: by `mremap(2)` with an old size of 0 or with `MREMAP_DONTUNMAP`.
    MappingDoubled,
    /// Pages of a file are removed by `MADV_REMOVE`.
    PagesRemoved,
    /// The same, by `process_madvise(2)`.
    PagesRemovedFrom,
    /// An io_uring is created, which can do the same and more.
    RingMade,
    /// A processor goes online or offline, and its counters with it.
    ProcessorChanged,
}

impl Event {
    /// Frequent events, counted in the relevant threads only. Each event makes creating a thread
    /// slower, by 6 to 10 microseconds.
    pub const COMMON: [Self; 2] = [Self::MemoryCopied, Self::RingMade];

    /// Events so rare that they are counted for the whole machine.
    pub const SELDOM: [Self; 4] =
        [Self::ProcessorChanged, Self::MappingDoubled, Self::PagesRemoved, Self::PagesRemovedFrom];

    fn name(self) -> &'static str {
        match self {
            Self::MemoryCopied => "task/task_newtask",
            Self::MappingDoubled => "syscalls/sys_enter_mremap",
            Self::PagesRemoved => "syscalls/sys_enter_madvise",
            Self::PagesRemovedFrom => "syscalls/sys_enter_process_madvise",
            Self::RingMade => "io_uring/io_uring_create",
            Self::ProcessorChanged => "cpuhp/cpuhp_enter",
        }
    }

    /// Returns the filter that selects the events (`Documentation/trace/events.rst`).
    fn filter(self) -> Option<&'static CStr> {
        match self {
            // `CLONE_VM`.
            Self::MemoryCopied => Some(c"!(clone_flags & 0x100)"),
            // The kernel rounds the size up to whole pages, so the largest sizes become 0.
            // 4 is `MREMAP_DONTUNMAP`.
            Self::MappingDoubled => {
                Some(c"old_len == 0 || old_len >= 0xfffffffffffff001 || flags & 4")
            }
            // `MADV_REMOVE` is 9. The event has the whole register, of which the kernel uses the
            // lower half.
            Self::PagesRemoved | Self::PagesRemovedFrom => {
                Some(c"behavior & 8 && behavior & 1 && !(behavior & 0xfffffff6)")
            }
            Self::RingMade | Self::ProcessorChanged => None,
        }
    }

    /// Returns the number of the tracepoint.
    fn number(self) -> io::Result<u64> {
        let path = Path::new("events").join(self.name()).join("id");
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let mut text = String::new();
        File::from(openat(tracefs()?, &path, flags, Mode::empty())?).read_to_string(&mut text)?;
        text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
    }
}

/// Returns the root of tracefs, and keeps it open: the kernel takes milliseconds to release a file
/// system without a mount point, possibly while other processes wait.
///
/// Prefers an existing mount, since older kernels treat a new one as a change of its options. Tries
/// debugfs last: accessing it creates a mount that stays.
fn tracefs() -> io::Result<&'static OwnedFd> {
    static ROOT: OnceLock<Result<OwnedFd, Errno>> = OnceLock::new();
    let find = || {
        let mounted = |path| {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let root = openat(AT_FDCWD, path, flags, Mode::empty())?;
            let kind = fstatfs(&root)?.filesystem_type();
            if kind == TRACEFS { Ok(root) } else { Err(Errno::ENOENT) }
        };
        if fault::is_without(Novelty::Tracefs) {
            return Err(Errno::ENODEV);
        }
        mounted(MOUNTED)
            .or_else(|_| detached(c"tracefs"))
            .or_else(|errno| mounted(BELOW_DEBUGFS).map_err(|_| errno))
    };
    ROOT.get_or_init(find).as_ref().map_err(|errno| (*errno).into())
}

/// Opens the root of a file system without a mount point (Linux 5.2).
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` in the owning user namespace; `ENODEV` if the kernel does not have
/// this file system.
fn detached(name: &CStr) -> nix::Result<OwnedFd> {
    /// `FSOPEN_CLOEXEC`, `FSCONFIG_CMD_CREATE` and `FSMOUNT_CLOEXEC` (`linux/mount.h`).
    const OPEN_CLOEXEC: libc::c_uint = 1;
    const CREATE: libc::c_uint = 6;
    const MOUNT_CLOEXEC: libc::c_uint = 1;
    let owned = |fd: libc::c_long| {
        let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
        // SAFETY: the kernel has just created this descriptor, and no other code has it.
        Ok::<_, Errno>(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), OPEN_CLOEXEC) })?;
    let nothing = std::ptr::null::<libc::c_char>();
    // SAFETY: this command takes neither key nor value.
    let made = unsafe {
        libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), CREATE, nothing, nothing, 0)
    };
    Errno::result(made)?;
    let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID;
    // SAFETY: the call takes numbers.
    owned(unsafe {
        libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), MOUNT_CLOEXEC, attributes)
    })
}

/// Tries to count events of a thread and of a processor.
///
/// # Errors
/// As [`count`].
pub fn probe() -> Result<(), CountError> {
    let first = processors()?.first().copied().unwrap_or(0);
    count(&Event::COMMON, &[Scope::Thread(HostPid(0))])?;
    count(&Event::SELDOM, &[Scope::Processor(first)]).map(drop)
}

/// Whether programs can make system calls by another interface, such as x32
/// (`CONFIG_X86_X32_ABI`), which the tracepoints do not see.
pub fn has_unseen_calls() -> bool {
    // SAFETY: getppid takes nothing and changes nothing, by whichever interface.
    OTHER_INTERFACE.is_some_and(|bit| unsafe { libc::syscall(bit | libc::SYS_getppid) >= 0 })
}

/// Where events are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// In a thread and all that it creates.
    Thread(HostPid),
    /// On a processor, in whichever thread runs there.
    Processor(u32),
}

/// Returns the numbers of the online processors.
///
/// # Errors
/// [`CountError::Processors`].
pub fn processors() -> Result<Vec<u32>, CountError> {
    let text = fs::read_to_string("/sys/devices/system/cpu/online");
    text.and_then(|text| numbers(text.trim()).ok_or_else(|| io::ErrorKind::InvalidData.into()))
        .map_err(|source| CountError::Processors { source })
}

/// Parses a list such as `0-2,5`.
fn numbers(list: &str) -> Option<Vec<u32>> {
    let mut numbers = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        numbers.extend(first.parse::<u32>().ok()?..=last.parse().ok()?);
    }
    Some(numbers)
}

/// Why events cannot be counted.
#[derive(Debug, thiserror::Error)]
pub enum CountError {
    /// Tracefs cannot be opened, or lacks the tracepoint.
    #[error("find the tracepoint {event} in tracefs")]
    Find {
        /// The name of the tracepoint.
        event: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The kernel refuses the counter: `EACCES` or `EPERM` without `CAP_PERFMON`.
    #[error("count {event} by perf_event_open")]
    Open {
        /// The name of the tracepoint.
        event: &'static str,
        /// The cause.
        source: Errno,
    },
    /// The list of processors cannot be read.
    #[error("list the processors")]
    Processors {
        /// The cause.
        source: io::Error,
    },
}

impl CountError {
    /// Returns how to fix it.
    pub fn help(&self) -> &'static str {
        let errno = match self {
            Self::Find { source, .. } => source.raw_os_error().map(Errno::from_raw),
            Self::Open { source, .. } => Some(*source),
            Self::Processors { .. } => return "mount /sys",
        };
        match (self, errno) {
            (Self::Find { .. }, Some(Errno::EPERM | Errno::EACCES)) => {
                "run rcriu with CAP_SYS_ADMIN outside of user namespaces, or mount tracefs at \
                 /sys/kernel/tracing"
            }
            (Self::Find { .. }, _) => {
                "use a kernel with tracefs and tracepoints (CONFIG_FTRACE_SYSCALLS)"
            }
            (_, Some(Errno::EPERM | Errno::EACCES)) => {
                "run rcriu with CAP_PERFMON outside of user namespaces, and without a seccomp \
                 filter that blocks perf_event_open"
            }
            (_, Some(Errno::EMFILE | Errno::ENFILE)) => "allow more open files (ulimit -n)",
            _ => "use a kernel with CONFIG_PERF_EVENTS",
        }
    }
}

/// Starts to count the events in all scopes.
///
/// # Errors
/// [`CountError`].
pub fn count(events: &[Event], scopes: &[Scope]) -> Result<Vec<OwnedFd>, CountError> {
    let mut counters = Vec::with_capacity(events.len() * scopes.len());
    for event in events {
        let name = event.name();
        let number = event.number().map_err(|source| CountError::Find { event: name, source })?;
        for scope in scopes {
            let counter = open(*event, number, *scope);
            counters.push(counter.map_err(|source| CountError::Open { event: name, source })?);
        }
    }
    Ok(counters)
}

/// Opens the counter of an event, whose tracepoint has this `number`.
///
/// # Errors
/// `EACCES` or `EPERM` without `CAP_PERFMON`; `EINVAL` if this kernel's event has other fields.
fn open(event: Event, number: u64, scope: Scope) -> nix::Result<OwnedFd> {
    let (thread, processor, flags) = match scope {
        Scope::Thread(thread) => (thread.0, -1, FLAG_INHERIT),
        Scope::Processor(number) => (-1, number.cast_signed(), 0),
    };
    let attributes = Attributes {
        kind: TYPE_TRACEPOINT,
        size: ATTRIBUTES_BYTES,
        config: number,
        read_format: FORMAT_TIMES,
        flags,
        ..Attributes::default()
    };
    let no_group = -1;
    // SAFETY: the kernel reads as many bytes of the structure as its size field says,
    // which are all it has.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            thread,
            processor,
            no_group,
            FLAG_CLOEXEC,
        )
    };
    let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just created this descriptor, and no other code has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if let Some(filter) = event.filter() {
        // SAFETY: the kernel reads a NUL-terminated string of static lifetime.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), SET_FILTER, filter.as_ptr()) };
        Errno::result(result)?;
    }
    Ok(fd)
}

/// Reads a counter.
///
/// # Errors
/// `InvalidData` if it has not counted all the time.
pub fn read(counter: &File) -> io::Result<u64> {
    let mut values = <[u64; 3]>::new_zeroed();
    (&*counter).read_exact(values.as_mut_bytes())?;
    let [count, enabled, running] = values;
    if enabled == running { Ok(count) } else { Err(io::ErrorKind::InvalidData.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_taken_apart() {
        assert_eq!(numbers("0"), Some(vec![0]));
        assert_eq!(numbers("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(numbers("0-x"), None);
        assert_eq!(numbers(""), None);
        assert!(!processors().unwrap().is_empty());
    }
}
