//! Moves the program to the background.
#![expect(unsafe_code, reason = "fork and close_range")]

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    libc,
    sys::wait::{WaitStatus, waitpid},
    unistd::{ForkResult, Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, pipe2, setsid},
};

use super::process::fork_alone;

/// The byte that the child writes when it is ready.
const READY: u8 = b'r';

/// The two processes after [`detach`].
#[derive(Debug)]
pub enum Detached {
    /// The caller's process, which waits for the child.
    Foreground(Foreground),
    /// The child, which continues alone.
    Background(Background),
}

/// The caller's process.
#[derive(Debug)]
pub struct Foreground {
    child: Pid,
    pipe: File,
}

/// How the child has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It is ready.
    Ready,
    /// It exited before it was ready.
    Exited(i32),
    /// A signal killed it before it was ready.
    Killed(nix::sys::signal::Signal),
}

/// The process in the background. It keeps the caller's standard streams, to print errors, until
/// [`Background::ready`].
#[derive(Debug)]
pub struct Background {
    pipe: File,
}

/// Forks into the caller's process, which waits, and a child in a session of its own, in the root
/// directory, with only the standard streams open.
///
/// Call it before the program opens any file or starts a thread.
///
/// # Errors
/// `EBUSY` if there is another thread.
pub fn detach() -> io::Result<Detached> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    match fork_alone()? {
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

/// Closes all descriptors above the standard streams except `kept`. An inherited pipe, for example,
/// would keep its reader from seeing the end.
fn close_others(kept: &OwnedFd) -> io::Result<()> {
    let kept = libc::c_uint::try_from(kept.as_raw_fd()).expect("descriptors are not negative");
    close_ranges([(FIRST_OTHER, kept.saturating_sub(1)), (kept + 1, libc::c_uint::MAX)])
}

/// Closes all descriptors above the standard streams. For a program that has just started and has
/// opened nothing yet.
pub fn close_inherited() -> io::Result<()> {
    close_ranges([(FIRST_OTHER, libc::c_uint::MAX)])
}

/// Replaces the standard input by `/dev/null`.
pub fn forget_stdin() -> io::Result<()> {
    let null = File::open("/dev/null")?;
    Ok(dup2_stdin(&null)?)
}

/// The first descriptor after the standard streams.
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

/// Gives this process a session of its own, and `/dev/null` as its standard streams.
///
/// # Errors
/// `EPERM` for the leader of a process group.
pub fn leave_caller() -> io::Result<()> {
    setsid()?;
    drop_streams()
}

fn drop_streams() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}

impl Foreground {
    /// Waits until the child is ready or has exited.
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
    /// Replaces the caller's standard streams by `/dev/null`, and lets the caller return.
    pub fn ready(mut self) -> io::Result<()> {
        drop_streams()?;
        // If the parent was killed, no process waits for this byte.
        let _ = self.pipe.write_all(&[READY]);
        Ok(())
    }
}
