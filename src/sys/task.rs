//! Attributes of threads: CPU affinity, I/O priority, core scheduling.
#![expect(unsafe_code, reason = "system calls that nix does not have")]

use nix::{errno::Errno, libc};

use crate::units::HostPid;

/// The words of a CPU set: `CONFIG_NR_CPUS` is at most 8192.
const PROCESSOR_WORDS: usize = 8192 / 64;

/// The thread that calls the kernel (`sched_setaffinity(2)`).
pub const THIS_THREAD: HostPid = HostPid(0);

/// Returns the CPUs that a thread may run on, one bit for each.
///
/// # Errors
/// `ESRCH`.
pub fn affinity(tid: HostPid) -> Result<Vec<u64>, Errno> {
    let mut words = vec![0_u64; PROCESSOR_WORDS];
    let bytes = size_of_val(words.as_slice());
    // SAFETY: the buffer outlives the call and has the size that is given.
    let result =
        unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid.0, bytes, words.as_mut_ptr()) };
    Errno::result(result)?;
    while words.len() > 1 && words.last() == Some(&0) {
        words.pop();
    }
    Ok(words)
}

/// Sets the CPUs that a thread may run on. The kernel ignores those that the machine or the cgroup
/// lacks.
///
/// # Errors
/// `EINVAL` if none is left, `EPERM`, `ESRCH`.
pub fn set_affinity(tid: HostPid, words: &[u64]) -> Result<(), Errno> {
    // SAFETY: the buffer outlives the call and has the size that is given.
    let result = unsafe {
        libc::syscall(libc::SYS_sched_setaffinity, tid.0, size_of_val(words), words.as_ptr())
    };
    Errno::result(result).map(drop)
}

/// Returns the CPUs of a set, as [`affinity`] returns it.
pub fn cpus(words: &[u64]) -> impl Iterator<Item = u32> + '_ {
    (0..).zip(words).flat_map(|(number, word)| {
        (0..u64::BITS)
            .filter(move |bit| word >> bit & 1 != 0)
            .map(move |bit| number * u64::BITS + bit)
    })
}

/// Returns the set of one CPU, as [`set_affinity`] takes it; `None` if it needs more words.
pub fn only(cpu: u32, words: usize) -> Option<Vec<u64>> {
    let mut set = vec![0; words];
    *set.get_mut((cpu / u64::BITS) as usize)? = 1 << (cpu % u64::BITS);
    Some(set)
}

/// Keeps the calling thread on one CPU, until dropped. A thread that cannot be kept moves as before.
#[derive(Debug)]
pub struct OnOneCpu {
    before: Option<Vec<u64>>,
}

impl OnOneCpu {
    /// Keeps it where it runs.
    pub fn here() -> Self {
        // SAFETY: the call takes no arguments.
        let cpu = u32::try_from(unsafe { libc::sched_getcpu() });
        cpu.map_or(Self { before: None }, Self::on)
    }

    /// Moves it to a CPU that it may run on.
    pub fn on(cpu: u32) -> Self {
        let bind = || {
            let before = affinity(THIS_THREAD).ok()?;
            set_affinity(THIS_THREAD, &only(cpu, before.len())?).ok()?;
            Some(before)
        };
        Self { before: bind() }
    }
}

impl Drop for OnOneCpu {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = set_affinity(THIS_THREAD, before);
        }
    }
}

/// `IOPRIO_WHO_PROCESS` (`linux/ioprio.h`): one thread.
const IOPRIO_THREAD: i32 = 1;

/// Returns class and level of a thread's I/O priority.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn io_priority(tid: HostPid) -> Result<u32, Errno> {
    // SAFETY: the call takes numbers.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_THREAD, tid.0) };
    u32::try_from(Errno::result(result)?).map_err(|_| Errno::ERANGE)
}

/// Sets class and level of a thread's I/O priority.
///
/// # Errors
/// `EPERM` for the real-time class, `EINVAL`, `ESRCH`.
pub fn set_io_priority(tid: HostPid, priority: u32) -> Result<(), Errno> {
    // SAFETY: the call takes numbers.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_THREAD, tid.0, priority) };
    Errno::result(result).map(drop)
}

/// Returns the core scheduling cookie of a thread; 0 if it has none. Threads with different cookies
/// never share a core.
///
/// # Errors
/// `EINVAL` or `ENODEV` if the kernel or the machine does not support core scheduling.
pub fn core_cookie(tid: HostPid) -> Result<u64, Errno> {
    /// `PR_SCHED_CORE`, `PR_SCHED_CORE_GET`, `PR_SCHED_CORE_SCOPE_THREAD` (`linux/prctl.h`).
    const SCHED_CORE: i32 = 62;
    const GET: i32 = 0;
    const THREAD: i32 = 0;
    let mut cookie = 0_u64;
    // SAFETY: the number outlives the call.
    let result = unsafe { libc::prctl(SCHED_CORE, GET, tid.0, THREAD, &raw mut cookie) };
    Errno::result(result)?;
    Ok(cookie)
}

/// Returns the semaphore sets in which one of these processes has made the last operation on a
/// semaphore.
pub fn semaphores_used_by(pids: &dyn Fn(HostPid) -> bool) -> Vec<i32> {
    let text = std::fs::read_to_string("/proc/sysvipc/sem").unwrap_or_default();
    let mut found = Vec::new();
    for line in text.lines().skip(1) {
        let mut words = line.split_whitespace();
        let id = words.nth(1).and_then(|word| word.parse().ok());
        let count = words.nth(1).and_then(|word| word.parse::<i32>().ok());
        let (Some(id), Some(count)) = (id, count) else { continue };
        let used = (0..count).any(|number| {
            // SAFETY: the call takes numbers.
            let last = unsafe { libc::semctl(id, number, libc::GETPID) };
            last > 0 && pids(HostPid(last))
        });
        if used {
            found.push(id);
        }
    }
    found
}
