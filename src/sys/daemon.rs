//! Going to the background.
#![expect(unsafe_code, reason = "fork and close_range")]

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    libc,
    sys::wait::{WaitStatus, waitpid},
    unistd::{ForkResult, Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe2, setsid},
};

/// What the child writes when it is ready.
const READY: u8 = b'r';

/// The two processes after [`detach`].
#[derive(Debug)]
pub enum Detached {
    /// The one that was called, which waits for the other.
    Foreground(Foreground),
    /// The one that goes on alone.
    Background(Background),
}

/// The caller's process.
#[derive(Debug)]
pub struct Foreground {
    child: Pid,
    pipe: File,
}

/// How the process in the background has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It is ready.
    Ready,
    /// It has exited before it was ready.
    Exited(i32),
    /// It was killed before it was ready.
    Killed(nix::sys::signal::Signal),
}

/// The process in the background. Until [`Background::ready`] it has the standard streams
/// of the caller, so that it can print errors.
#[derive(Debug)]
pub struct Background {
    pipe: File,
}

/// Splits the process in two: one that the caller waits for, and a child in a
/// session of its own, in the root directory, with nothing open but its standard
/// streams.
///
/// To be called before the program opens anything or starts a thread.
///
/// # Errors
/// `EBUSY` if there is another thread; what `pipe2(2)` and `fork(2)` return.
pub fn detach() -> io::Result<Detached> {
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(Errno::EBUSY.into());
    }
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    // SAFETY: there is one thread, as was checked above, so that the child
    // inherits no lock that a thread it does not have would have to release.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            drop(write);
            Ok(Detached::Foreground(Foreground { child, pipe: read.into() }))
        }
        ForkResult::Child => {
            drop(read);
            close_others(&write)?;
            setsid()?;
            chdir("/")?;
            Ok(Detached::Background(Background { pipe: write.into() }))
        }
    }
}

/// Closes all descriptors above the standard streams but `kept`: a pipe among
/// those that were inherited would keep its reader waiting for its end.
fn close_others(kept: &OwnedFd) -> io::Result<()> {
    let kept = libc::c_uint::try_from(kept.as_raw_fd()).expect("descriptors are not negative");
    close_ranges([(FIRST_OTHER, kept.saturating_sub(1)), (kept + 1, libc::c_uint::MAX)])
}

/// Closes all descriptors above the standard streams, for a program that was just
/// started and has opened nothing yet.
///
/// # Errors
/// What `close_range(2)` returns.
pub fn close_inherited() -> io::Result<()> {
    close_ranges([(FIRST_OTHER, libc::c_uint::MAX)])
}

/// The first descriptor that is no standard stream.
const FIRST_OTHER: libc::c_uint = libc::STDERR_FILENO.cast_unsigned() + 1;

fn close_ranges(ranges: impl IntoIterator<Item = (libc::c_uint, libc::c_uint)>) -> io::Result<()> {
    for (from, to) in ranges {
        if from > to {
            continue;
        }
        // SAFETY: nothing in this process owns these descriptors: the program
        // has opened nothing yet (the callers' obligation) but what they leave out.
        let result = unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        Errno::result(result)?;
    }
    Ok(())
}

impl Foreground {
    /// Waits until the child is ready or has ended.
    ///
    /// # Errors
    /// What `waitpid(2)` returns.
    pub fn wait(mut self) -> io::Result<Start> {
        let mut byte = [0];
        if matches!(self.pipe.read(&mut byte), Ok(1)) && byte == [READY] {
            return Ok(Start::Ready);
        }
        loop {
            match waitpid(self.child, None) {
                Ok(WaitStatus::Exited(_, code)) => return Ok(Start::Exited(code)),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Start::Killed(signal)),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Background {
    /// Releases the caller's streams, and lets the caller return.
    ///
    /// # Errors
    /// What opening `/dev/null` returns.
    pub fn ready(mut self) -> io::Result<()> {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        // The process that started us may have been killed; then nothing waits for this.
        let _ = self.pipe.write_all(&[READY]);
        Ok(())
    }
}
