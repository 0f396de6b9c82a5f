//! Probes features of the kernel by using them.
#![expect(unsafe_code, reason = "system calls that may not be there")]

mod child;
mod memory;
pub mod named;

use std::{
    fs::{self, File},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    sync::OnceLock,
};

use nix::{errno::Errno, libc};

use crate::fault::{self, Novelty};

use self::{child::Child, memory::Page};
use super::{
    fanotify,
    kernel_memory::{self, KernelMemory},
    process, tracepoint,
};

/// The features of this kernel that this process may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// `PTRACE_SEIZE` and `PTRACE_INTERRUPT` of a child.
    pub ptrace_seize: bool,
    /// `PTRACE_GETSIGMASK` and `PTRACE_PEEKSIGINFO` (Linux 3.11).
    pub ptrace_signals: bool,
    /// `PTRACE_GET_RSEQ_CONFIGURATION` (Linux 5.13).
    pub rseq_configuration: bool,
    /// `pidfd_open` and `pidfd_getfd` (Linux 5.6).
    pub pidfd_getfd: bool,
    /// `clone3` with a chosen pid (Linux 5.5).
    pub clone3_set_tid: bool,
    /// `kcmp` of two descriptors of two processes.
    pub kcmp: bool,
    /// `kcmp` of a descriptor with the target of an epoll instance (Linux 4.13).
    pub kcmp_epoll: bool,
    /// Reading the memory of another process through `/proc/PID/mem`.
    pub proc_mem: bool,
    /// `process_vm_readv` and `process_vm_writev`.
    pub process_vm_readv: bool,
    /// Opening mapped files through `/proc/PID/map_files`.
    pub map_files: bool,
    /// `/proc/PID/task/TID/children`.
    pub proc_children: bool,
    /// `mnt_id` in `/proc/PID/fdinfo`.
    pub fdinfo_mnt_id: bool,
    /// `memfd_create` with seals.
    pub memfd: bool,
    /// `prctl(PR_SET_MM, PR_SET_MM_MAP)`.
    pub mm_map: bool,
    /// `sock_diag(7)` for unix sockets.
    pub sock_diag_unix: bool,
    /// `sock_diag(7)` for TCP and UDP.
    pub sock_diag_inet: bool,
    /// `prctl(PR_TIMER_CREATE_RESTORE_IDS)` (Linux 6.15).
    pub timer_restore_ids: bool,
    /// The `PAGEMAP_SCAN` ioctl (Linux 6.7).
    pub pagemap_scan: bool,
    /// Creating a userfaultfd in any way.
    pub userfaultfd: bool,
    /// userfaultfd's asynchronous write protection reports writes to private memory (Linux 6.7).
    pub write_protect_private: bool,
    /// The same for shared anonymous memory.
    pub write_protect_shared: bool,
    /// Soft-dirty bits.
    pub soft_dirty: bool,
    /// Counting events of threads and of the whole machine by tracepoints.
    pub tracepoints: bool,
    /// Watching which processes open shared memory, by `fanotify(7)` (Linux 5.19).
    pub openings: bool,
    /// This process sees every process of the machine, and may examine it.
    pub all_processes: bool,
    /// Suspending seccomp filters of a traced thread (Linux 4.3), and reading them.
    pub seccomp_suspend: bool,
    /// Reading memory of the kernel by a BPF program (Linux 5.14).
    pub kernel_memory: bool,
    /// `openat2` (Linux 5.6).
    pub openat2: bool,
    /// Time namespaces (Linux 5.6).
    pub time_namespaces: bool,
    /// User namespaces.
    pub user_namespaces: bool,
    /// Cgroup namespaces.
    pub cgroup_namespaces: bool,
    /// Opening `/dev/fuse`.
    pub fuse: bool,
    /// Passing through files of a FUSE file system (Linux 6.9).
    pub fuse_passthrough: bool,
    /// `CAP_SYS_PTRACE`.
    pub cap_sys_ptrace: bool,
    /// `CAP_SYS_ADMIN`.
    pub cap_sys_admin: bool,
    /// `CAP_CHECKPOINT_RESTORE` (Linux 5.9) or `CAP_SYS_ADMIN`.
    pub cap_checkpoint_restore: bool,
    /// `CAP_SYS_RESOURCE`.
    pub cap_sys_resource: bool,
}

impl Features {
    /// Probes all features. Creates a child, which does nothing, and kills it.
    pub fn probe() -> Self {
        let capabilities = effective_capabilities();
        let has = |bit: u32| capabilities & (1 << bit) != 0;
        let mut features = Self {
            map_files: map_files(),
            proc_children: Path::new("/proc/thread-self/children").exists(),
            fdinfo_mnt_id: fs::read_to_string("/proc/self/fdinfo/0")
                .is_ok_and(|text| text.contains("mnt_id:")),
            memfd: memfd(),
            mm_map: mm_map(),
            kcmp_epoll: kcmp_epoll(),
            sock_diag_unix: sock_diag_unix(),
            sock_diag_inet: sock_diag_inet(IPPROTO_TCP) && sock_diag_inet(IPPROTO_UDP),
            timer_restore_ids: timer_restore_ids(),
            pagemap_scan: Page::map(libc::MAP_PRIVATE).is_some_and(|page| page.scan(0).is_some()),
            userfaultfd: memory::userfaultfd().is_some(),
            write_protect_private: memory::write_protect(libc::MAP_PRIVATE),
            write_protect_shared: memory::write_protect(libc::MAP_SHARED),
            soft_dirty: memory::soft_dirty(),
            tracepoints: tracepoint::probe().is_ok() && !tracepoint::has_unseen_calls(),
            openings: fanotify::probe(),
            all_processes: has(CAP_SYS_PTRACE)
                && fs::metadata("/proc/self/ns/pid")
                    .is_ok_and(|namespace| namespace.ino() == process::FIRST_PID_NAMESPACE),
            kernel_memory: Path::new(kernel_memory::TYPES).exists() && KernelMemory::open().is_ok(),
            openat2: openat2(),
            time_namespaces: Path::new("/proc/self/ns/time").exists(),
            user_namespaces: Path::new("/proc/self/ns/user").exists(),
            cgroup_namespaces: Path::new("/proc/self/ns/cgroup").exists(),
            cap_sys_ptrace: has(CAP_SYS_PTRACE),
            cap_sys_admin: has(CAP_SYS_ADMIN),
            cap_checkpoint_restore: has(CAP_CHECKPOINT_RESTORE) || has(CAP_SYS_ADMIN),
            cap_sys_resource: has(CAP_SYS_RESOURCE),
            ..Self::default()
        };
        features.probe_fuse();
        let child = Child::with_free_pid();
        features.clone3_set_tid = child.is_some();
        if let Some(child) = child.or_else(Child::with_any_pid) {
            features.probe_child(&child);
        }
        features
    }

    /// Probes the features for tracking changes of memory, once.
    pub fn probe_tracking() -> Self {
        static PROBED: OnceLock<Features> = OnceLock::new();
        *PROBED.get_or_init(|| Self {
            pagemap_scan: Page::map(libc::MAP_PRIVATE).is_some_and(|page| page.scan(0).is_some()),
            write_protect_private: memory::write_protect(libc::MAP_PRIVATE),
            soft_dirty: memory::soft_dirty(),
            ..Self::default()
        })
    }

    /// Whether a process can choose the ids of its timers (Linux 6.15).
    pub fn has_timer_ids() -> bool {
        static PROBED: OnceLock<bool> = OnceLock::new();
        *PROBED.get_or_init(timer_restore_ids)
    }

    /// Whether `/proc/PID/smaps` shows memory that is locked on fault by the code for unknown flags
    /// (observed on Linux 6.1, not on 6.12).
    pub fn hides_lock_on_fault() -> bool {
        static PROBED: OnceLock<bool> = OnceLock::new();
        *PROBED.get_or_init(memory::hides_lock_on_fault)
    }

    fn probe_fuse(&mut self) {
        let Ok(fuse) = File::options().read(true).write(true).open("/dev/fuse") else { return };
        self.fuse = true;
        let mut map = FuseBackingMap::default();
        // SAFETY: `map` is what the ioctl reads, and outlives the call.
        let result =
            unsafe { libc::ioctl(fuse.as_raw_fd(), FUSE_DEV_IOC_BACKING_OPEN, &raw mut map) };
        // The file is not mounted: a kernel with the feature reports EPERM.
        self.fuse_passthrough = Errno::result(result) == Err(Errno::EPERM);
    }

    fn probe_child(&mut self, child: &Child) {
        self.pidfd_getfd = child.pidfd_getfd();
        self.kcmp = child.kcmp();
        self.proc_mem = child.proc_mem();
        self.process_vm_readv = child.process_vm_readv();
        self.ptrace_seize = child.seize();
        if self.ptrace_seize {
            self.ptrace_signals = child.signals();
            self.rseq_configuration = child.rseq_configuration();
            self.seccomp_suspend = child.seccomp_suspend();
        }
    }
}

// linux/capability.h
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;
const CAP_CHECKPOINT_RESTORE: u32 = 40;

/// Returns the effective capabilities of this process as bits.
fn effective_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}

/// Tries to open the first mapped file of this process, its program, by address.
fn map_files() -> bool {
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else { return false };
    let range =
        maps.lines().find(|line| line.contains('/')).and_then(|line| line.split(' ').next());
    range.is_some_and(|range| File::open(format!("/proc/self/map_files/{range}")).is_ok())
}

/// Takes ownership of a descriptor that a system call has just returned.
fn descriptor(result: libc::c_long) -> Option<OwnedFd> {
    let number = RawFd::try_from(result).ok().filter(|number| *number >= 0)?;
    // SAFETY: the callers pass the result of a system call that creates a descriptor, and no other
    // code has its number.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

fn memfd() -> bool {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string that ends in a zero byte.
    let result = unsafe { libc::memfd_create(c"rcriu-probe".as_ptr(), flags) };
    // SAFETY: plain integers; a wrong number is an error.
    descriptor(result.into())
        .is_some_and(|fd| unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) } >= 0)
}

fn mm_map() -> bool {
    /// `PR_SET_MM_MAP_SIZE`, `linux/prctl.h` (Linux 3.18)
    const PR_SET_MM_MAP_SIZE: libc::c_int = 15;
    /// `sizeof(struct prctl_mm_map)`, `linux/prctl.h`
    const MAP_BYTES: u32 = 104;
    let mut size = 0_u32;
    // SAFETY: the kernel writes four bytes to `size`, which outlives the call.
    let result = unsafe {
        libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP_SIZE, &raw mut size, 0_usize, 0_usize)
    };
    result == 0 && size == MAP_BYTES
}

fn timer_restore_ids() -> bool {
    /// `linux/prctl.h` (Linux 6.15)
    const PR_TIMER_CREATE_RESTORE_IDS: libc::c_int = 77;
    const GET: usize = 2;
    // SAFETY: plain integers; this only asks.
    let result =
        unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, 0_usize, 0_usize, 0_usize) };
    result >= 0 && !fault::is_without(Novelty::TimerIds)
}

fn openat2() -> bool {
    // `struct open_how`, `linux/openat2.h`: flags, mode, resolve.
    let how = [libc::O_PATH as u64 | libc::O_CLOEXEC as u64, 0, 0];
    // SAFETY: the path ends in a zero byte, `how` has the size that is told; both
    // outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            how.as_ptr(),
            size_of_val(&how),
        )
    };
    descriptor(result).is_some()
}

/// `enum kcmp_type`, `linux/kcmp.h`
const KCMP_FILE: libc::c_int = 0;
const KCMP_EPOLL_TFD: libc::c_int = 7;

fn kcmp_epoll() -> bool {
    // SAFETY: plain integers.
    let pid = unsafe { libc::getpid() };
    // SAFETY: as above.
    let made = [unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }, unsafe {
        libc::eventfd(0, libc::EFD_CLOEXEC)
    }];
    let [Some(epoll), Some(event)] = made.map(|fd| descriptor(fd.into())) else { return false };
    let mut interest = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: `interest` outlives the call.
    let added = unsafe {
        libc::epoll_ctl(
            epoll.as_raw_fd(),
            libc::EPOLL_CTL_ADD,
            event.as_raw_fd(),
            &raw mut interest,
        )
    };
    let [epoll, event] = [epoll.as_raw_fd(), event.as_raw_fd()];
    /// `struct kcmp_epoll_slot`, `linux/kcmp.h`
    #[repr(C)]
    struct Slot {
        epoll: u32,
        target: u32,
        offset: u32,
    }
    let slot = Slot { epoll: epoll.cast_unsigned(), target: event.cast_unsigned(), offset: 0 };
    // SAFETY: the kernel reads `slot`, which outlives the call.
    let same =
        unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_EPOLL_TFD, event, &raw const slot) };
    added == 0 && same == 0
}

// linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h, linux/inet_diag.h

/// `sdiag_family` has one byte; the C library's constant is an int.
const AF_UNIX: u8 = 1;
const AF_INET: u8 = 2;
/// `sdiag_protocol` as well (`linux/in.h`).
const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
/// `SOCK_DIAG_BY_FAMILY`
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST | NLM_F_ROOT | NLM_F_MATCH`
const NLM_F_DUMP_REQUEST: u16 = 0x301;
/// `NLMSG_ERROR`
const NLMSG_ERROR: u16 = 2;
/// Bytes of `struct nlmsghdr`.
const NLMSG_HEADER_BYTES: usize = 16;

fn sock_diag_unix() -> bool {
    /// `UDIAG_SHOW_NAME`
    const SHOW_NAME: u32 = 1;
    // family, protocol, pad; states, ino, show, cookie
    let mut request = vec![AF_UNIX, 0, 0, 0];
    for word in [u32::MAX, 0, SHOW_NAME, u32::MAX, u32::MAX] {
        request.extend(word.to_ne_bytes());
    }
    sock_diag(&request)
}

fn sock_diag_inet(protocol: u8) -> bool {
    /// Bytes of `struct inet_diag_sockid`.
    const SOCKET_ID_BYTES: usize = 48;
    // family, protocol, ext, pad; states; id
    let mut request = vec![AF_INET, protocol, 0, 0];
    request.extend(u32::MAX.to_ne_bytes());
    request.extend([0; SOCKET_ID_BYTES]);
    sock_diag(&request)
}

/// Whether the kernel lists the sockets of a kind.
fn sock_diag(request: &[u8]) -> bool {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    // SAFETY: plain integers.
    let socket = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_SOCK_DIAG) };
    let Some(socket) = descriptor(socket.into()) else { return false };
    let len = u32::try_from(NLMSG_HEADER_BYTES + request.len()).expect("a few dozen bytes");
    let mut message = len.to_ne_bytes().to_vec();
    message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    message.extend(NLM_F_DUMP_REQUEST.to_ne_bytes());
    message.extend([0; 8]); // sequence number, port
    message.extend(request);
    // The answer begins with its length and its type.
    let mut answer = [0_u8; NLMSG_HEADER_BYTES];
    let fd = socket.as_raw_fd();
    // SAFETY: both buffers have the lengths that are told, and outlive the calls.
    let (sent, got) = unsafe {
        let sent = libc::send(fd, message.as_ptr().cast(), message.len(), 0);
        (
            sent,
            if sent < 0 {
                sent
            } else {
                libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), 0)
            },
        )
    };
    let answered = got == answer.len().cast_signed();
    sent > 0 && answered && u16::from_ne_bytes([answer[4], answer[5]]) != NLMSG_ERROR
}

/// `struct fuse_backing_map`, `linux/fuse.h` (Linux 6.9)
#[repr(C)]
#[derive(Default)]
struct FuseBackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// `_IOW(229, 1, struct fuse_backing_map)`
const FUSE_DEV_IOC_BACKING_OPEN: libc::c_ulong = 0x4010_e501;
const _: () = assert!(size_of::<FuseBackingMap>() == 0x10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_supported_kernel_has_is_found() {
        let features = Features::probe();
        assert!(features.memfd && features.openat2, "{features:?}");
        assert!(features.proc_mem && features.process_vm_readv, "{features:?}");
        assert!(features.fdinfo_mnt_id && features.sock_diag_unix, "{features:?}");
        // Useless without pagemap_scan.
        assert!(features.userfaultfd || !features.write_protect_private);
        assert!(features.pagemap_scan || !features.write_protect_private);
    }

    #[test]
    fn probing_leaves_no_child() {
        let child = Child::with_any_pid().unwrap();
        let stat = format!("/proc/{}/stat", child.pid);
        assert!(Path::new(&stat).exists());
        drop(child);
        assert!(!Path::new(&stat).exists());
    }
}
