//! A dead man's handle: the kernel kills other processes when this one ends, in whatever way.
//!
//! This process holds the only writer of a pipe, and for each of the others a reader that reports to
//! it, by `SIGKILL`, that the pipe has something to tell (`F_SETOWN`, `F_SETSIG`, `O_ASYNC`; `fcntl(2)`).
//! Nothing is ever written, so the first thing to tell is that the writer is gone. The kernel closes the
//! descriptors of a process that ends from the highest number down. The writer has the highest
//! number, so the kernel sends the signals before it closes any other descriptor.
#![expect(unsafe_code, reason = "fcntl")]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    sys::{
        resource::{Resource, getrlimit},
        signal::Signal,
    },
    unistd::pipe2,
};

use super::process;
use crate::units::HostPid;

/// The highest number that the writer gets: a table of descriptors up to there takes 512 KiB.
const HIGHEST_FD: u64 = 1 << 16;

/// The handle, with the processes that end with this one.
#[derive(Debug)]
pub struct DeadMan {
    armed: Vec<Armed>,
    reader: OwnedFd,
    writer: OwnedFd,
}

#[derive(Debug)]
struct Armed {
    pid: HostPid,
    pidfd: OwnedFd,
    _reader: File,
}

impl DeadMan {
    /// Makes a handle without processes.
    ///
    /// # Errors
    /// Those of `pipe(2)` and `fcntl(2)`.
    pub fn new() -> io::Result<Self> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let highest = limit.min(HIGHEST_FD).saturating_sub(1);
        let highest = i32::try_from(highest).expect("below the bound");
        let high = fcntl(writer.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(highest))?;
        // SAFETY: the call has just made this descriptor, and no other code has its number.
        let writer = unsafe { OwnedFd::from_raw_fd(high) };
        Ok(Self { armed: Vec::new(), reader, writer })
    }

    /// Makes a process end with this one. The kernel does not kill the first process of a pid
    /// namespace in this way, but [`Self::kill`] does.
    ///
    /// # Errors
    /// `ESRCH` if the process has ended.
    pub fn arm(&mut self, pid: HostPid) -> io::Result<()> {
        let pidfd = process::pidfd_open(pid)?;
        // A file of its own: its owner is that of no other reader.
        let reader = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{}", self.reader.as_raw_fd()))?;
        let set = |command: libc::c_int, value: libc::c_int| {
            // SAFETY: these commands take numbers, and change only how the file reports.
            let result = unsafe { libc::fcntl(reader.as_raw_fd(), command, value) };
            Errno::result(result).map(drop)
        };
        /// `F_SETSIG` (`asm-generic/fcntl.h`).
        const F_SETSIG: libc::c_int = 10;
        set(libc::F_SETOWN, pid.0)?;
        set(F_SETSIG, Signal::SIGKILL as libc::c_int)?;
        set(libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK)?;
        self.armed.push(Armed { pid, pidfd, _reader: reader });
        Ok(())
    }

    /// Whether a process ends with this one.
    pub fn is_armed(&self, pid: HostPid) -> bool {
        self.armed.iter().any(|armed| armed.pid == pid)
    }

    /// Returns the processes.
    pub fn pids(&self) -> impl Iterator<Item = HostPid> + '_ {
        self.armed.iter().map(|armed| armed.pid)
    }

    /// Kills all processes now.
    pub fn kill(&self) {
        for armed in &self.armed {
            // It may have ended.
            let _ = process::kill_pidfd(&armed.pidfd);
        }
    }

    /// Lets the processes outlive this one.
    pub fn disarm(self) {
        let Self { armed, reader, writer } = self;
        // The readers go first: without them, the writer's end reaches no process.
        drop(armed);
        drop(reader);
        drop(writer);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::ExitStatusExt,
        process::{Child, Command},
        sync::{Mutex, MutexGuard, PoisonError},
    };

    use super::*;

    /// Lets one test at a time have the highest descriptor.
    fn alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sleeper() -> (Child, HostPid) {
        let child = Command::new("sleep").arg("100").spawn().unwrap();
        let pid = HostPid(child.id().cast_signed());
        (child, pid)
    }

    #[test]
    fn the_end_of_the_writer_kills() {
        let _alone = alone();
        let (mut child, pid) = sleeper();
        let mut handle = DeadMan::new().unwrap();
        handle.arm(pid).unwrap();
        assert!(handle.is_armed(pid));
        let DeadMan { armed, reader, writer } = handle;
        // As the kernel does for a process that ends.
        drop(writer);
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        drop((armed, reader));
    }

    #[test]
    fn processes_outlive_a_handle_that_is_disarmed() {
        let _alone = alone();
        let (mut child, pid) = sleeper();
        let mut handle = DeadMan::new().unwrap();
        handle.arm(pid).unwrap();
        handle.disarm();
        assert!(child.try_wait().unwrap().is_none());
        let mut handle = DeadMan::new().unwrap();
        handle.arm(pid).unwrap();
        handle.kill();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        handle.disarm();
    }
}
