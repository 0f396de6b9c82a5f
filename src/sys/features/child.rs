//! A child process to try system calls on.
#![expect(unsafe_code, reason = "clone3, ptrace and other system calls on a process")]

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    ptr,
};

use nix::{errno::Errno, libc};

use super::{KCMP_FILE, descriptor};
use crate::{
    sys::{process::read_memory, ptrace},
    units::{HostPid, RemoteAddr},
};

/// A byte in this process's memory, and therefore in the child's.
static THERE: u8 = 42;

/// A child that waits to be killed. Dropping it kills and reaps it.
pub(super) struct Child {
    pub(super) pid: libc::pid_t,
}

impl Child {
    /// Creates a child with a chosen free pid.
    pub(super) fn with_free_pid() -> Option<Self> {
        /// How many pids to try: other processes may take one meanwhile.
        const TRIES: libc::pid_t = 64;
        let max = fs::read_to_string("/proc/sys/kernel/pid_max").ok()?;
        let last = max.trim().parse::<libc::pid_t>().ok()? - 1;
        for pid in (last.saturating_sub(TRIES)..=last).rev() {
            match Self::clone(Some(pid)) {
                Ok(child) if child.pid == pid => return Some(child),
                Err(Errno::EEXIST) => {}
                Ok(_) | Err(_) => return None,
            }
        }
        None
    }

    pub(super) fn with_any_pid() -> Option<Self> {
        Self::clone(None).ok()
    }

    fn clone(pid: Option<libc::pid_t>) -> nix::Result<Self> {
        // SAFETY: all bytes zero are a clone_args.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.exit_signal = libc::SIGCHLD.cast_unsigned().into();
        if let Some(pid) = &pid {
            args.set_tid = ptr::from_ref(pid).expose_provenance() as u64;
            args.set_tid_size = 1;
        }
        // SAFETY: `args` has the size that is told, and `pid` outlives the call. The
        // child has a copy of this process, as after fork(2), in which it makes only
        // system calls and touches no lock.
        let result =
            unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
        if result == 0 {
            wait_to_be_killed();
        }
        let pid = Errno::result(result)?;
        Ok(Self { pid: libc::pid_t::try_from(pid).expect("pids have 32 bits") })
    }

    /// Duplicates a descriptor of the child.
    pub(super) fn pidfd_getfd(&self) -> bool {
        let Ok(mut entries) = fs::read_dir(format!("/proc/{}/fd", self.pid)) else { return false };
        let number = entries
            .find_map(|entry| entry.ok()?.file_name().to_str()?.parse::<libc::c_int>().ok())
            .unwrap_or(0);
        // SAFETY: plain integers; makes a descriptor.
        let Some(pidfd) = descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) })
        else {
            return false;
        };
        // SAFETY: as above.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
        match Errno::result(result) {
            Ok(copy) => descriptor(copy).is_some(),
            // The child has nothing open, but the call itself is permitted.
            Err(errno) => errno == Errno::EBADF,
        }
    }

    pub(super) fn kcmp(&self) -> bool {
        let Ok(file) = File::open("/") else { return false };
        let fd = file.as_raw_fd();
        // SAFETY: plain integers.
        let result =
            unsafe { libc::syscall(libc::SYS_kcmp, self.pid, self.pid, KCMP_FILE, fd, fd) };
        // The child was created before the file was opened, so it may not have the descriptor.
        matches!(Errno::result(result), Ok(0) | Err(Errno::EBADF))
    }

    /// Reads a byte through `/proc/PID/mem`.
    pub(super) fn proc_mem(&self) -> bool {
        let mut here = [0];
        let address = RemoteAddr((&raw const THERE).addr() as u64);
        read_memory(HostPid(self.pid), address, &mut here).is_ok() && here == [THERE]
    }

    /// Reads a byte of the child by `process_vm_readv(2)`.
    pub(super) fn process_vm_readv(&self) -> bool {
        let mut here = 0_u8;
        let local = libc::iovec { iov_base: (&raw mut here).cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: (&raw const THERE).cast_mut().cast(), iov_len: 1 };
        // SAFETY: the kernel writes one byte to `here`, and reads from the child only.
        let read = unsafe {
            libc::process_vm_readv(self.pid, &raw const local, 1, &raw const remote, 1, 0)
        };
        read == 1 && here == THERE
    }

    /// Seizes and stops the child.
    pub(super) fn seize(&self) -> bool {
        let none = ptr::null_mut::<libc::c_void>();
        // SAFETY: these requests read and write no memory of ours; the child is ours
        // and does nothing.
        unsafe {
            if libc::ptrace(libc::PTRACE_SEIZE, self.pid, none, none) != 0
                || libc::ptrace(libc::PTRACE_INTERRUPT, self.pid, none, none) != 0
            {
                return false;
            }
        }
        let mut status = 0;
        loop {
            // SAFETY: `status` outlives the call.
            let waited = unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL) };
            match Errno::result(waited) {
                Err(Errno::EINTR) => {}
                Ok(_) => return libc::WIFSTOPPED(status),
                Err(_) => return false,
            }
        }
    }

    /// The child must be stopped.
    pub(super) fn signals(&self) -> bool {
        let mut mask = 0_u64;
        let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::uninit();
        let peek = libc::ptrace_peeksiginfo_args { off: 0, flags: 0, nr: 1 };
        // SAFETY: the kernel writes a mask of the size that is told to `mask`, and at
        // most one siginfo to `info`; all outlive the calls.
        unsafe {
            libc::ptrace(libc::PTRACE_GETSIGMASK, self.pid, size_of_val(&mask), &raw mut mask) == 0
                && libc::ptrace(
                    libc::PTRACE_PEEKSIGINFO,
                    self.pid,
                    &raw const peek,
                    info.as_mut_ptr(),
                ) == 0
        }
    }

    /// The child must be stopped.
    pub(super) fn rseq_configuration(&self) -> bool {
        ptrace::rseq_configuration(HostPid(self.pid)).is_ok()
    }

    /// The child must be stopped.
    pub(super) fn seccomp_suspend(&self) -> bool {
        ptrace::set_options(HostPid(self.pid), ptrace::options::SUSPEND_SECCOMP).is_ok()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: the pid is that of a child that has not been reaped, so no other process has it.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            while libc::waitpid(self.pid, ptr::null_mut(), libc::__WALL) < 0
                && Errno::last() == Errno::EINTR
            {}
        }
    }
}

fn wait_to_be_killed() -> ! {
    // SAFETY: only system calls, with integers; the child must not outlive us.
    unsafe {
        libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        loop {
            libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
        }
    }
}
