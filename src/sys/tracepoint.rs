//! Counters of what threads do, by the kernel's tracepoints (`perf_event_open(2)`).
//!
//! A counter belongs to one thread and whatever that creates, for as long as its
//! descriptor is open. The kernel counts in the thread that meets the tracepoint, so
//! nothing is lost and nobody has to listen.
#![expect(unsafe_code, reason = "perf_event_open(2) and its ioctls")]

use std::{
    ffi::CStr,
    fs::{self, File},
    io::{self, Read},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use nix::{errno::Errno, libc};
use zerocopy::{FromZeros, IntoBytes};

use crate::units::HostPid;

/// Where the kernel shows its tracepoints (`Documentation/trace/ftrace.rst`).
const PLACES: [&str; 2] = ["/sys/kernel/tracing/events", "/sys/kernel/debug/tracing/events"];

/// The beginning of `struct perf_event_attr` (`linux/perf_event.h`), which all kernels
/// take (`PERF_ATTR_SIZE_VER0`).
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

const ATTRIBUTES_BYTES: usize = size_of::<Attributes>();
const _: () = assert!(ATTRIBUTES_BYTES == 64);

/// `PERF_TYPE_TRACEPOINT`.
const TYPE_TRACEPOINT: u32 = 2;
/// `PERF_FORMAT_TOTAL_TIME_ENABLED` and `PERF_FORMAT_TOTAL_TIME_RUNNING`.
const FORMAT_TIMES: u64 = 1 << 0 | 1 << 1;
/// `perf_event_attr.inherit`: threads and processes that are created count as well.
const FLAG_INHERIT: u64 = 1 << 1;
/// `PERF_FLAG_FD_CLOEXEC`.
const FLAG_CLOEXEC: libc::c_ulong = 1 << 3;
/// `PERF_EVENT_IOC_SET_FILTER`: `_IOW('$', 6, char *)`.
const SET_FILTER: libc::Ioctl =
    1 << 30 | (size_of::<usize>() as libc::Ioctl) << 16 | (b'$' as libc::Ioctl) << 8 | 6;
const _: () = assert!(SET_FILTER == 0x4008_2406);

/// Something that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A process is created with a copy of the memory: `fork(2)` and what is like it,
    /// but neither threads nor `vfork(2)`.
    MemoryCopied,
    /// A mapping is made twice, by `mremap(2)` with an old size of 0 or with
    /// `MREMAP_DONTUNMAP`. Calls by the 32-bit and the x32 interface are not counted.
    MappingDoubled,
}

impl Event {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::MemoryCopied, Self::MappingDoubled];

    fn name(self) -> &'static str {
        match self {
            Self::MemoryCopied => "task/task_newtask",
            Self::MappingDoubled => "syscalls/sys_enter_mremap",
        }
    }

    /// Which of the events are meant (`Documentation/trace/events.rst`).
    fn filter(self) -> &'static CStr {
        match self {
            // `CLONE_VM`.
            Self::MemoryCopied => c"!(clone_flags & 0x100)",
            // `MREMAP_DONTUNMAP`.
            Self::MappingDoubled => c"old_len == 0 || flags & 4",
        }
    }

    /// Returns the number of the tracepoint.
    ///
    /// # Errors
    /// Those of reading the file of the one place where they are shown; without any,
    /// that there is none.
    pub fn number(self) -> io::Result<u64> {
        let mut missing = None;
        for place in PLACES {
            let path = Path::new(place).join(self.name()).join("id");
            match fs::read_to_string(path) {
                Ok(text) => {
                    return text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into());
                }
                Err(error) => missing = Some(error),
            }
        }
        Err(missing.expect("there are places"))
    }
}

/// Whether a program can make system calls by the x32 interface (`CONFIG_X86_X32_ABI`),
/// which tracepoints of system calls do not see.
pub fn has_unseen_calls() -> bool {
    /// `__X32_SYSCALL_BIT` (`asm/unistd.h`).
    const X32: libc::c_long = 0x4000_0000;
    // SAFETY: getppid takes nothing and changes nothing, by whatever interface.
    unsafe { libc::syscall(X32 | libc::SYS_getppid) >= 0 }
}

/// Begins to count the events with a `number` ([`Event::number`]) in a thread.
///
/// # Errors
/// What `perf_event_open(2)` returns: `EACCES` or `EPERM` without `CAP_PERFMON`;
/// `EINVAL` if the kernel's event has other fields.
pub fn count(event: Event, number: u64, thread: HostPid) -> nix::Result<OwnedFd> {
    let attributes = Attributes {
        kind: TYPE_TRACEPOINT,
        size: ATTRIBUTES_BYTES as u32,
        config: number,
        read_format: FORMAT_TIMES,
        flags: FLAG_INHERIT,
        ..Attributes::default()
    };
    let (any_cpu, no_group) = (-1, -1);
    // SAFETY: the kernel reads as many bytes of the structure as its size field says,
    // which are all it has.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            thread.0,
            any_cpu,
            no_group,
            FLAG_CLOEXEC,
        )
    };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("descriptors are ints")) };
    // SAFETY: the kernel reads a string that ends with zero and is there forever.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), SET_FILTER, event.filter().as_ptr()) };
    Errno::result(result)?;
    Ok(fd)
}

/// Reads a counter.
///
/// # Errors
/// What `read(2)` returns; `InvalidData` if it has not counted all the time.
pub fn read(counter: &File) -> io::Result<u64> {
    let mut values = <[u64; 3]>::new_zeroed();
    (&*counter).read_exact(values.as_mut_bytes())?;
    let [count, enabled, running] = values;
    if enabled == running { Ok(count) } else { Err(io::ErrorKind::InvalidData.into()) }
}
