//! Other processes: their descriptors, memory and attributes.
#![expect(unsafe_code, reason = "system calls that nix does not have")]

use std::{
    cmp::Ordering,
    fs::File,
    io::{self, IoSlice},
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::FileExt,
    },
    panic::{AssertUnwindSafe, catch_unwind},
};

use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl::{get_dumpable, set_dumpable},
        signal::{SigSet, SigmaskHow, kill},
        uio::{RemoteIoVec, process_vm_writev},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};
use zerocopy::{FromZeros, IntoBytes};

use crate::{
    fault::{self, Novelty},
    units::{HostPid, HugeSize, PAGE_SIZE, RemoteAddr, TargetFd},
};

/// The inode of the initial pid namespace (`PROC_PID_INIT_INO`, `linux/proc_ns.h`), in which all
/// processes are visible.
pub const FIRST_PID_NAMESPACE: u64 = 0xefff_fffc;

/// Returns a descriptor for a process.
///
/// # Errors
/// `ESRCH`.
pub fn pidfd_open(pid: HostPid) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes numbers.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, 0) };
    owned(result)
}

/// Returns a pidfd for a thread, which reports on that thread alone (since Linux 6.9).
///
/// # Errors
/// `ESRCH` if the thread does not exist; `EINVAL` on older kernels.
pub fn pidfd_open_thread(tid: HostPid) -> Result<OwnedFd, Errno> {
    /// `PIDFD_THREAD` (`linux/pidfd.h`).
    const PIDFD_THREAD: i32 = libc::O_EXCL;
    if fault::is_without(Novelty::ThreadPidfd) {
        return Err(Errno::EINVAL);
    }
    // SAFETY: the call takes numbers.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, tid.0, PIDFD_THREAD) };
    owned(result)
}

/// Returns a duplicate of a descriptor of another process (since Linux 5.6).
///
/// # Errors
/// `EBADF` if the process has no such descriptor; `EPERM`.
pub fn pidfd_getfd(pidfd: impl AsFd, fd: TargetFd) -> Result<OwnedFd, Errno> {
    let pidfd = pidfd.as_fd().as_raw_fd();
    // SAFETY: the call takes numbers.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd, fd.0, 0) };
    owned(result)
}

fn owned(result: libc::c_long) -> Result<OwnedFd, Errno> {
    let fd = RawFd::try_from(Errno::result(result)?).expect("descriptors are small");
    // SAFETY: the kernel has just created this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How a process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It exited with this code.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
    /// The kernel does not report it.
    Unknown,
}

impl End {
    /// Returns the wait status, without the bit for a core file; `None` for an unknown end.
    pub fn status(self) -> Option<u32> {
        match self {
            Self::Exited(code) => Some((code << 8).cast_unsigned()),
            Self::Killed(signal) => Some(signal.cast_unsigned()),
            Self::Unknown => None,
        }
    }

    /// Decodes a wait status, as `waitpid(2)` returns it.
    pub fn of_status(status: i32) -> Self {
        match status & 0x7f {
            0 => Self::Exited(status >> 8 & 0xff),
            signal => Self::Killed(signal),
        }
    }
}

/// `struct pidfd_info` of its first version (`linux/pidfd.h`, since Linux 6.13).
#[derive(Clone, Copy, zerocopy::FromZeros)]
#[repr(C)]
struct PidfdInfo {
    mask: u64,
    cgroup_id: u64,
    /// The pids of process, group and parent, then the eight ids of the credentials.
    numbers: [u32; 11],
    exit_code: i32,
}

const _: () = assert!(size_of::<PidfdInfo>() == 64);

/// `PIDFD_INFO_EXIT` (Linux 6.15): request the exit code of a reaped process.
const PIDFD_INFO_EXIT: u64 = 1 << 3;

/// `PIDFD_GET_INFO`: `_IOWR(0xff, 11, struct pidfd_info)`.
const PIDFD_GET_INFO: libc::Ioctl =
    (3 << 30) | ((size_of::<PidfdInfo>() as libc::Ioctl) << 16) | (0xff << 8) | 11;

/// Whether the process of a pidfd has exited with all of its threads.
pub fn has_ended(pidfd: impl AsFd) -> bool {
    let mut asked = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut asked, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

/// Waits until the process of a pidfd has exited with all of its threads.
pub fn await_end(pidfd: impl AsFd) {
    let mut asked = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    while poll(&mut asked, PollTimeout::NONE) == Err(Errno::EINTR) {}
}

/// Returns how a reaped process has ended (since Linux 6.15).
pub fn end(pidfd: impl AsFd) -> End {
    let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::new_zeroed() };
    let fd = pidfd.as_fd().as_raw_fd();
    // SAFETY: the structure outlives the call, and has the size that its number says.
    let result = unsafe { libc::ioctl(fd, PIDFD_GET_INFO, &raw mut info) };
    if result == 0 && info.mask & PIDFD_INFO_EXIT != 0 {
        End::of_status(info.exit_code)
    } else {
        End::Unknown
    }
}

/// Kills the process of a pidfd (`SIGKILL`).
///
/// # Errors
/// `ESRCH` if it has been reaped.
pub fn kill_pidfd(pidfd: impl AsFd) -> Result<(), Errno> {
    let (fd, nothing) = (pidfd.as_fd().as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: without a `siginfo_t`, the call only takes numbers.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, nothing, 0) };
    Errno::result(result).map(drop)
}

/// What [`kcmp`] compares (`linux/kcmp.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shared {
    /// The open file descriptions behind two descriptors.
    File(i32, i32),
    /// Address spaces.
    Memory,
    /// Descriptor tables.
    Files,
    /// Root directory, working directory and umask.
    Fs,
    /// Signal handlers.
    Handlers,
    /// Lists of semaphore operations to undo; equal if neither process has one.
    Undo,
}

/// Compares two kernel objects. `Equal` means that they are the same object.
///
/// # Errors
/// `EPERM`, `ESRCH`, `EBADF`; `ENOSYS` without `CONFIG_KCMP`.
pub fn kcmp(a: HostPid, b: HostPid, what: Shared) -> Result<Ordering, Errno> {
    let (kind, first, second) = match what {
        Shared::File(first, second) => (0, first, second),
        Shared::Memory => (1, 0, 0),
        Shared::Files => (2, 0, 0),
        Shared::Fs => (3, 0, 0),
        Shared::Handlers => (4, 0, 0),
        Shared::Undo => (6, 0, 0),
    };
    // SAFETY: the call takes numbers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            a.0,
            b.0,
            kind,
            libc::c_long::from(first),
            libc::c_long::from(second),
        )
    };
    match Errno::result(result)? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        _ => Ok(Ordering::Greater),
    }
}

fn remote(address: RemoteAddr, len: usize) -> Result<RemoteIoVec, Errno> {
    let base = usize::try_from(address.0).map_err(|_| Errno::EFAULT)?;
    Ok(RemoteIoVec { base, len })
}

/// Reads memory of another process, with the rights of the kernel.
///
/// `process_vm_readv(2)` would pin the pages. The kernel copies a page that is shared copy-on-write
/// before it pins it, so the process would have more private memory than before.
///
/// # Errors
/// `EIO` if not all of it can be read; `ENOENT`, `EACCES`.
pub fn read_memory(pid: HostPid, address: RemoteAddr, buffer: &mut [u8]) -> Result<(), Errno> {
    let read = open_memory(pid).and_then(|file| file.read_exact_at(buffer, address.0));
    // A read at the end of the address space returns no error number.
    read.map_err(|error| super::errno(&error))
}

/// Opens the memory of another process for reading: `/proc/PID/mem`.
///
/// # Errors
/// `ENOENT` if the process does not exist; `EACCES`.
pub fn open_memory(pid: HostPid) -> io::Result<File> {
    File::open(format!("/proc/{pid}/mem"))
}

/// How many ranges one call takes (`UIO_MAXIOV`, `linux/uio.h`).
const MOST_RANGES: usize = 1024;

/// Moves pages of another process back to swap, if the kernel can: those of `ranges` that only this
/// process maps (since Linux 5.10).
///
/// # Errors
/// `EPERM` without `CAP_SYS_NICE`; `ESRCH`, `ENOSYS`.
pub fn page_out(pidfd: impl AsFd, ranges: &[Range<RemoteAddr>]) -> Result<(), Errno> {
    // `struct iovec` of a 64-bit program: address and length.
    let vector: Vec<[u64; 2]> =
        ranges.iter().map(|range| [range.start.0, range.end.0 - range.start.0]).collect();
    let pidfd = pidfd.as_fd().as_raw_fd();
    let advice = libc::MADV_PAGEOUT;
    for part in vector.chunks(MOST_RANGES) {
        // SAFETY: the vector outlives the call; its addresses are the other process's, and the
        // advice changes no byte there.
        let result = unsafe {
            libc::syscall(libc::SYS_process_madvise, pidfd, part.as_ptr(), part.len(), advice, 0)
        };
        Errno::result(result)?;
    }
    Ok(())
}

/// Writes memory of another process that this process can write itself.
///
/// # Errors
/// `EFAULT` if not all of it can be written; `ESRCH`, `EPERM`.
pub fn write_memory(pid: HostPid, address: RemoteAddr, bytes: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        let to = remote(address.plus(done as u64), rest.len())?;
        let count = process_vm_writev(pid_of(pid), &[IoSlice::new(rest)], &[to])?;
        if count == 0 {
            return Err(Errno::EFAULT);
        }
        done += count;
    }
    Ok(())
}

fn pid_of(pid: HostPid) -> Pid {
    Pid::from_raw(pid.0)
}

/// Sends any signal, including real-time ones, to a process.
///
/// # Errors
/// `ESRCH`, `EPERM`, `EINVAL`.
pub fn signal(pid: HostPid, number: i32) -> Result<(), Errno> {
    // SAFETY: the call takes numbers.
    Errno::result(unsafe { libc::kill(pid.0, number) }).map(drop)
}

/// Whether a process or thread with this pid exists, zombies included.
pub fn exists(pid: HostPid) -> bool {
    !matches!(kill(pid_of(pid), None), Err(Errno::ESRCH))
}

/// Returns head and length of a thread's list of robust futexes.
///
/// # Errors
/// `EPERM`, `ESRCH`.
pub fn robust_list(tid: HostPid) -> Result<(RemoteAddr, u64), Errno> {
    let (mut head, mut len) = (0_u64, 0_u64);
    // SAFETY: both outlive the call, which writes a pointer and a size.
    let result =
        unsafe { libc::syscall(libc::SYS_get_robust_list, tid.0, &raw mut head, &raw mut len) };
    Errno::result(result)?;
    Ok((RemoteAddr(head), len))
}

/// The scheduling of a thread (`struct sched_attr`, `linux/sched/types.h`).
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::Immutable,
    zerocopy::KnownLayout,
)]
#[repr(C)]
pub struct Scheduling {
    /// The size of this structure.
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Real-time priority.
    pub priority: u32,
    /// Nanoseconds, for `SCHED_DEADLINE`.
    pub runtime: u64,
    /// Nanoseconds, for `SCHED_DEADLINE`.
    pub deadline: u64,
    /// Nanoseconds, for `SCHED_DEADLINE`.
    pub period: u64,
    /// The lower and upper clamp of the thread's utilization, out of 1024 (since Linux 5.3); 0 if
    /// unknown.
    pub clamps: [u32; 2],
}

const _: () = assert!(size_of::<Scheduling>() == 56);

/// `SCHED_FLAG_UTIL_CLAMP_MIN` and `_MAX` (`linux/sched.h`): also set the clamps.
pub const SCHED_CLAMPS: u64 = 0x60;

/// Returns the scheduling of a thread.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn scheduling(tid: HostPid) -> Result<Scheduling, Errno> {
    let mut attributes = Scheduling::default();
    let size = size_of::<Scheduling>();
    // SAFETY: the structure outlives the call and has the size that is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_getattr,
            tid.0,
            attributes.as_mut_bytes().as_mut_ptr(),
            size,
            0,
        )
    };
    Errno::result(result)?;
    // sched_getattr(2) returns the nice value for some policies only.
    // SAFETY: it takes numbers.
    let niceness = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid.0) };
    let niceness = i32::try_from(Errno::result(niceness)?).map_err(|_| Errno::ERANGE)?;
    attributes.nice = NICE_OFFSET - niceness;
    Ok(attributes)
}

/// The system call `getpriority` returns this minus the nice value, to avoid negative results.
const NICE_OFFSET: i32 = 20;

/// Sets the scheduling of a thread.
///
/// # Errors
/// `ESRCH`, `EPERM`, `EINVAL`.
pub fn set_scheduling(tid: HostPid, attributes: &Scheduling) -> Result<(), Errno> {
    // sched_setattr(2) sets the nice value for some policies only.
    // SAFETY: it takes numbers.
    let result =
        unsafe { libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, tid.0, attributes.nice) };
    Errno::result(result)?;
    // SAFETY: the structure outlives the call and says its own size.
    let result =
        unsafe { libc::syscall(libc::SYS_sched_setattr, tid.0, attributes.as_bytes().as_ptr(), 0) };
    Errno::result(result).map(drop)
}

/// Calls `act` while the calling thread alone has these supplementary groups, which processes that it
/// creates inherit. Without `CAP_SETGID` the thread keeps its own.
///
/// # Errors
/// The thread cannot get its own groups back.
pub fn with_groups<T>(groups: &[u32], act: impl FnOnce() -> T) -> Result<T, Errno> {
    // The C library would change those of all threads.
    let set = |groups: &[u32]| {
        // SAFETY: the list outlives the call, and has the length that is given.
        let result = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
        Errno::result(result).map(drop)
    };
    let own = nix::unistd::getgroups()?.into_iter().map(nix::unistd::Gid::as_raw);
    let own: Vec<u32> = own.collect();
    if set(groups).is_err() {
        return Ok(act());
    }
    let made = act();
    set(&own)?;
    Ok(made)
}

/// The arguments of `clone3(2)` (`struct clone_args`, `linux/sched.h`, as of Linux 5.7).
#[derive(
    Clone, Copy, Debug, Default, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
)]
#[repr(C)]
#[expect(missing_docs, reason = "the kernel's names; clone3(2) says what they are")]
pub struct CloneArguments {
    pub flags: u64,
    pub pidfd: u64,
    pub child_tid: u64,
    pub parent_tid: u64,
    pub exit_signal: u64,
    pub stack: u64,
    pub stack_size: u64,
    pub tls: u64,
    pub set_tid: u64,
    pub set_tid_size: u64,
    pub cgroup: u64,
}

const _: () = assert!(size_of::<CloneArguments>() == 88);

/// Creates a child with this pid, or any, which sleeps forever, with default signal actions, until it is
/// traced. With `CLONE_NEWPID`, this is its pid in the new namespace. Returns its pid here.
///
/// The child has copies of this process's memory and descriptors, but executes only `pause(2)`: no
/// destructor, no lock, no allocation. A sibling (`CLONE_PARENT`) sends its parent the same exit
/// signal as this process.
///
/// # Errors
/// `EEXIST` if the pid is in use; `EPERM` without `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`.
pub fn spawn_sleeper(pid: Option<i32>, flags: u64) -> Result<HostPid, Errno> {
    let set_tid = [pid.unwrap_or(0)];
    let sibling = flags & u64::from(libc::CLONE_PARENT.cast_unsigned()) != 0;
    let arguments = CloneArguments {
        flags,
        exit_signal: if sibling { 0 } else { libc::SIGCHLD.cast_unsigned().into() },
        set_tid: pid.map_or(0, |_| set_tid.as_ptr().addr() as u64),
        set_tid_size: pid.is_some().into(),
        ..CloneArguments::default()
    };
    let size = size_of::<CloneArguments>();
    // SAFETY: arguments and pid outlive the call; the child does nothing but make
    // system calls with numbers, so nothing it has copies of is used.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size) };
    if result == 0 {
        // SAFETY: as above. The parent's death must not leave us behind.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
            loop {
                libc::pause();
            }
        }
    }
    Ok(HostPid(i32::try_from(Errno::result(result)?).expect("pids are small")))
}

/// Creates a child, calls `look` with its pid, and has the child end as `end` says. The child is
/// reaped afterwards, so that its pid is free again.
///
/// The child has copies of this process's memory and descriptors, but only makes system calls.
///
/// # Errors
/// Those of `clone3(2)` and `waitpid(2)`.
pub fn with_brief_child<T>(end: End, look: impl FnOnce(HostPid) -> T) -> Result<T, Errno> {
    /// `CLONE_CLEAR_SIGHAND` (`linux/sched.h`, since Linux 5.5).
    const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
    // Without an exit signal, this process is not notified of the end.
    let arguments = CloneArguments { flags: CLONE_CLEAR_SIGHAND, ..CloneArguments::default() };
    let size = size_of::<CloneArguments>();
    // SAFETY: the arguments outlive the call; the child only makes system calls with numbers, and
    // with a mask on its own stack.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size) };
    if result == 0 {
        // SAFETY: as above.
        unsafe { end_when_continued(end) }
    }
    let child = libc::pid_t::try_from(Errno::result(result)?).expect("pids are small");
    let wait = |flags: i32| loop {
        // SAFETY: the call takes numbers; the status is not asked for.
        let waited = unsafe { libc::waitpid(child, std::ptr::null_mut(), flags | libc::__WALL) };
        match Errno::result(waited) {
            Err(Errno::EINTR) => {}
            waited => return waited.map(drop),
        }
    };
    wait(libc::WUNTRACED)?;
    let seen = look(HostPid(child));
    // SAFETY: the child is not reaped yet, so no other process has its pid.
    unsafe { libc::kill(child, libc::SIGCONT) };
    wait(0)?;
    Ok(seen)
}

/// Stops this process, and ends it once it is continued.
///
/// # Safety
/// The process must be a new copy of another one.
unsafe fn end_when_continued(end: End) -> ! {
    // SAFETY: all of these are system calls with numbers, or with this mask.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        // A signal must not leave a core file.
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
        let none = 0_u64;
        let bytes = size_of_val(&none);
        let unused = 0_usize;
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const none, unused, bytes);
        let own = libc::syscall(libc::SYS_getpid);
        libc::syscall(libc::SYS_kill, own, libc::SIGSTOP);
        match end {
            End::Exited(code) => libc::_exit(code),
            End::Killed(signal) => {
                libc::signal(signal, libc::SIG_DFL);
                libc::syscall(libc::SYS_kill, own, signal);
            }
            End::Unknown => {}
        }
        libc::syscall(libc::SYS_kill, own, libc::SIGKILL);
        libc::_exit(1)
    }
}

/// Calls `act` in a thread that makes files as this user and group (`setfsuid(2)`), with the capabilities
/// of the caller. Without the power to change ids, the thread keeps those of the caller.
pub fn with_file_ids<T: Send>((user, group): (u32, u32), act: impl FnOnce() -> T + Send) -> T {
    let dumpable = get_dumpable();
    let made = std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            // Set the user last: without root's user id, the group id could not be set.
            nix::unistd::setfsgid(group.into());
            nix::unistd::setfsuid(user.into());
            if let Err(errno) = raise_capabilities() {
                log::debug!("cannot raise capabilities again: {errno}");
            }
            act()
        });
        made.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    // Changing ids has made the whole process undumpable.
    if let Err(errno) = dumpable.and_then(set_dumpable) {
        log::debug!("cannot become dumpable again: {errno}");
    }
    made
}

/// Makes all permitted capabilities of the calling thread effective: a change of the file system user takes
/// some (`capabilities(7)`).
fn raise_capabilities() -> nix::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3` (`linux/capability.h`), with two sets of each kind.
    const VERSION: u32 = 0x2008_0522;
    let header = [VERSION, 0];
    // Effective, permitted, inheritable.
    let mut sets = [[0_u32; 3]; 2];
    // SAFETY: header and sets have the sizes of this version, and outlive the calls.
    unsafe {
        Errno::result(libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()))?;
        sets.iter_mut().for_each(|set| set[0] = set[1]);
        Errno::result(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()))?;
    }
    Ok(())
}

/// Changes all ids of the calling thread alone, unlike `setresuid(3)`.
///
/// # Errors
/// `EINVAL` if the user namespace does not map them; `EPERM`.
pub fn set_ids(user: u32, group: u32) -> nix::Result<()> {
    for (call, id) in [(libc::SYS_setresgid, group), (libc::SYS_setresuid, user)] {
        // SAFETY: the calls take numbers.
        Errno::result(unsafe { libc::syscall(call, id, id, id) })?;
    }
    Ok(())
}

/// Calls `act` in a child that shares the memory and the descriptors of this program, and waits for it. The
/// child has namespaces, credentials and directories of its own: it is for calls that a thread must not
/// make, such as to enter a user namespace (`setns(2)`). `act` must not start threads.
///
/// # Errors
/// `EAGAIN` or `ENOMEM` from `clone(2)`; `EIO` if the child was killed.
pub fn beside<T: Send>(act: impl FnOnce() -> T + Send) -> io::Result<T> {
    /// As much as the main thread has.
    const STACK_BYTES: usize = 8 << 20;
    struct Work<F, T> {
        act: Option<F>,
        result: Option<std::thread::Result<T>>,
    }
    extern "C" fn run<T, F: FnOnce() -> T>(work: *mut libc::c_void) -> libc::c_int {
        // SAFETY: `beside` passes this, and waits until the child has ended.
        let work = unsafe { &mut *work.cast::<Work<F, T>>() };
        let act = work.act.take().expect("it runs once");
        work.result = Some(catch_unwind(AssertUnwindSafe(act)));
        0
    }
    fn runner<T, F: FnOnce() -> T>(_: &F) -> extern "C" fn(*mut libc::c_void) -> libc::c_int {
        run::<T, F>
    }
    let start = runner(&act);
    let mut work = Work { act: Some(act), result: None };
    let dumpable = get_dumpable()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK | libc::MAP_NORESERVE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at a place of the kernel's choice touches no other.
    let stack = unsafe { libc::mmap(std::ptr::null_mut(), STACK_BYTES, access, flags, -1, 0) };
    if stack == libc::MAP_FAILED {
        return Err(Errno::last().into());
    }
    // Handlers of this program must not run in the child, which looks like the calling thread to them.
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK);
    let made = mask.and_then(|mask| {
        let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_VFORK;
        let work: *mut Work<_, T> = &raw mut work;
        // SAFETY: the stack is as large as that, and nothing else has it. The calling thread, whose
        // thread-local memory the child uses, sleeps until the child has ended (CLONE_VFORK).
        let child = unsafe {
            libc::clone(start, stack.byte_add(STACK_BYTES), flags, work.cast::<libc::c_void>())
        };
        let child = Errno::result(child);
        if let Ok(child) = child {
            let wait = || waitpid(Pid::from_raw(child), Some(WaitPidFlag::__WALL));
            while wait() == Err(Errno::EINTR) {}
        }
        mask.thread_set_mask()?;
        child
    });
    // SAFETY: the child has ended.
    unsafe { libc::munmap(stack, STACK_BYTES) };
    made?;
    // A change of ids resets it for the memory.
    set_dumpable(dumpable)?;
    match work.result {
        Some(Ok(result)) => Ok(result),
        Some(Err(panic)) => std::panic::resume_unwind(panic),
        None => Err(Errno::EIO.into()),
    }
}

/// Forks, as `fork(2)`, in a program with one thread.
///
/// # Errors
/// `EBUSY` if there is another thread; `EAGAIN`.
pub fn fork_alone() -> io::Result<ForkResult> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(Errno::EBUSY.into());
    }
    // SAFETY: there is one thread, as was just checked, so that the child inherits no lock that a thread
    // it does not have would have to release.
    Ok(unsafe { fork() }?)
}

/// Raises the limit of open files: with `CAP_SYS_RESOURCE` to the kernel's maximum, otherwise to the
/// hard limit.
pub fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open").ok();
    let most: Option<u64> = most.and_then(|text| text.trim().parse().ok());
    let raise = |limit| setrlimit(Resource::RLIMIT_NOFILE, limit, limit);
    if most.is_some_and(|most| raise(most).is_ok()) {
        return;
    }
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(errno) = raise(hard)
    {
        log::debug!("cannot raise the limit of open files: {errno}");
    }
}

/// Creates anonymous shared memory, like `mmap(2)` with `MAP_SHARED | MAP_ANONYMOUS`, optionally with
/// huge pages, and returns a descriptor for it. If the kernel does not let this process open it,
/// creates a memfd instead, which differs only in its name.
pub fn shared_anonymous(bytes: u64, huge: Option<HugeSize>) -> std::io::Result<OwnedFd> {
    let page_bytes = huge.map_or(PAGE_SIZE, HugeSize::bytes);
    let len = bytes.max(1).checked_next_multiple_of(page_bytes).ok_or(Errno::ENOMEM)?;
    let len = usize::try_from(len).map_err(|_| Errno::ENOMEM)?;
    let read_write = libc::PROT_READ | libc::PROT_WRITE;
    let of_size = |flag: u32| huge.map_or(0, |size| size.flags() | flag);
    // Reserve huge pages at once, to find out whether there are enough. Do not reserve normal
    // pages: the object may be larger than the whole memory, but have few pages.
    let kind = match huge {
        Some(_) => of_size(libc::MAP_HUGETLB.cast_unsigned()).cast_signed(),
        None => libc::MAP_NORESERVE,
    };
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | kind;
    // SAFETY: a new mapping at a place of the kernel's choice touches no other.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, read_write, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(Errno::last().into());
    }
    let end = start.addr() + len;
    let path = format!("/proc/self/map_files/{:x}-{end:x}", start.addr());
    let file = std::fs::File::options().read(true).write(true).open(path);
    // SAFETY: this function created the mapping, and no other code has its address.
    unsafe { libc::munmap(start, len) };
    match file {
        Ok(file) => Ok(file.into()),
        Err(_) => {
            let name = if huge.is_some() { c"/anon_hugepage" } else { c"/dev/zero" };
            let fd = super::fds::memfd(name, of_size(libc::MFD_HUGETLB))?;
            nix::unistd::ftruncate(&fd, i64::try_from(bytes).map_err(|_| Errno::EFBIG)?)?;
            Ok(fd)
        }
    }
}
