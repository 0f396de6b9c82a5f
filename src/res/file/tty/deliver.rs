//! Waits until the kernel has delivered what was written into a terminal.
//!
//! A kernel thread passes bytes on to the line discipline. poll(2) waits for it only while there is
//! nothing to read yet. The modes of the terminal must not change before it is done.

use std::{
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use nix::{errno::Errno, poll::PollFlags, unistd::write};

use super::{
    Stopped,
    line::{Lines, READ_BUFFER, START, STOP},
};
use crate::{
    res::file::descriptor,
    sys::{
        fds,
        tty::{self, Flow, Switch},
    },
};

/// How long the kernel may take, in milliseconds: on a busy machine its thread has to wait for a
/// processor.
const PATIENCE_MS: u16 = 10_000;

/// How long bytes may be on their way in a pair into which no process writes, in milliseconds.
const DELIVERY_MS: u16 = 1000;

/// How often to look before waiting.
const QUICK_LOOKS: usize = 100;

/// How long to wait before another look.
const NAP: Duration = Duration::from_millis(1);

/// Waits until the line discipline has got `bytes` bytes that were written into the master. The modes
/// are [`Lines::plain`], and the master is not in packet mode.
///
/// # Errors
/// `ETIMEDOUT` if it does not get them.
pub(super) fn input(
    (master, slave): (BorrowedFd, BorrowedFd),
    lines: &Lines,
    bytes: usize,
    stopped: Option<Stopped>,
) -> nix::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    if lines.are_delimited() {
        return input_lines(master, slave, stopped);
    }
    let wanted = bytes.min(READ_BUFFER);
    wait(PATIENCE_MS, || {
        let found = usize::try_from(fds::readable_bytes(slave)?);
        Ok(found.is_ok_and(|found| found >= wanted))
    })
}

/// Waits like [`input`] in canonical mode, in which the beginning of a line cannot be seen: types
/// characters that stop and start the output, which packet mode shows at the master.
fn input_lines(master: BorrowedFd, slave: BorrowedFd, stopped: Option<Stopped>) -> nix::Result<()> {
    if stopped == Some(Stopped::ByProgram) {
        tty::flow(slave, Flow::Start)?;
    }
    let keys = if stopped == Some(Stopped::ByCharacter) { [START, STOP] } else { [STOP, START] };
    let typed = keys.iter().try_for_each(|key| {
        tty::switch(master, Switch::Packet, true)?;
        write(master, &[*key])?;
        let found = status(master);
        tty::switch(master, Switch::Packet, false)?;
        found
    });
    if stopped == Some(Stopped::ByProgram) {
        tty::flow(slave, Flow::Stop)?;
    }
    typed
}

/// Waits until a master in packet mode has a status to be read.
///
/// # Errors
/// `ETIMEDOUT` if it gets none.
pub(super) fn status(master: BorrowedFd) -> nix::Result<()> {
    // The kernel does not wake up a process that waits for POLLPRI alone.
    wait(PATIENCE_MS, || {
        Ok(descriptor::events_among(master, PollFlags::POLLPRI)?.contains(PollFlags::POLLPRI))
    })
}

/// Whether the output of a slave is stopped whose master can read some bytes. Cannot find out if
/// the buffers are full.
pub(super) fn is_stopped(master: BorrowedFd, slave: BorrowedFd) -> nix::Result<bool> {
    let is_writable = || Ok(descriptor::events(slave)?.contains(PollFlags::POLLOUT));
    if is_writable()? {
        return Ok(false);
    }
    let is_full = || {
        let found = usize::try_from(fds::readable_bytes(master)?);
        Ok(found.is_ok_and(|found| found >= READ_BUFFER))
    };
    match wait(DELIVERY_MS, || Ok(is_full()? || is_writable()?)) {
        Err(Errno::ETIMEDOUT) => Ok(true),
        result => result.map(|()| false),
    }
}

/// Tries something again and again until it returns true: there is room once the kernel has
/// delivered what was written before.
///
/// # Errors
/// `ETIMEDOUT`, and the errors of `attempt`.
pub(super) fn patiently(attempt: impl FnMut() -> nix::Result<bool>) -> nix::Result<()> {
    wait(PATIENCE_MS, attempt)
}

/// Waits for a condition, for at most `patience` milliseconds.
fn wait(patience: u16, mut condition: impl FnMut() -> nix::Result<bool>) -> nix::Result<()> {
    let (begin, mut looks) = (Instant::now(), 0);
    while !condition()? {
        if begin.elapsed().as_millis() > patience.into() {
            return Err(Errno::ETIMEDOUT);
        }
        if looks < QUICK_LOOKS {
            std::thread::yield_now();
        } else {
            std::thread::sleep(NAP);
        }
        looks += 1;
    }
    Ok(())
}
