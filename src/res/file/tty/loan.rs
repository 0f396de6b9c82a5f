//! Reads the bytes queued in a pair, and leaves them there.
//!
//! Reading takes them, so the dump takes them all, while every process of the tree is stopped, and
//! writes them into the other end again. In between, the modes of the pair are such that the
//! line discipline changes nothing. A [`Loan`] lets the supervisor finish this if the dump is
//! killed. No byte is lost then; but the tree runs by then, so a program that writes into the pair
//! at that moment may come before them. What can be lost is an end-of-file (^D) that is alone in
//! its line, within the few instructions after it was read, and everything if the supervisor is
//! killed at the same moment.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice},
    libc,
    poll::PollFlags,
    sys::{
        stat::{fstat, futimens},
        time::TimeSpec,
    },
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{
    Stopped, deliver,
    line::{Lines, PIECE_BYTES, READ_BUFFER, next_piece},
};
use crate::{
    causes::tell,
    fault::{self, Point},
    res::file::descriptor,
    sys::{
        fds,
        loan::{CAPACITY, Inherited, Loan},
        tty::{self, Flow, Switch, Termios},
    },
};

/// The most bytes taken at a time: what one buffer of a pipe holds.
const READ_BYTES: usize = 4096;

// Stages of the loan.
/// Nothing is taken.
const IDLE: u32 = 1;
/// Output is started, to find out whether it was stopped by `TCOOFF`.
const STARTED: u32 = 2;
/// Output is taken.
const OUTPUT: u32 = 3;
/// Output is returned.
const OUTPUT_BACK: u32 = 4;
/// Complete lines of input are taken.
const LINES: u32 = 5;
/// The rest of the input is taken.
const REST: u32 = 6;
/// Input is returned.
const INPUT_BACK: u32 = 7;

/// The state in which to leave a pair.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Terms {
    /// The times of the slave's last read and write, in seconds and nanoseconds. From these,
    /// programs such as `w(1)` compute how long its user has been idle.
    times: [i64; 4],
    modes: Termios,
    /// The status flags of the master's description.
    flags: u32,
    packet: u32,
    unused: u32,
}

fn times_of(slave: BorrowedFd) -> nix::Result<[i64; 4]> {
    let stat = fstat(slave)?;
    Ok([stat.st_atime, stat.st_atime_nsec, stat.st_mtime, stat.st_mtime_nsec])
}

/// The bytes queued in a pair.
#[derive(Debug, Default)]
pub(super) struct Queued {
    /// The bytes that the master can read.
    pub(super) output: Vec<u8>,
    /// The bytes that the slave can read, and in canonical mode the line that is being typed.
    pub(super) input: Vec<u8>,
    /// In canonical mode: where each line ends.
    pub(super) ends: Vec<u32>,
    /// Whether the output is stopped.
    pub(super) stopped: Option<Stopped>,
}

/// A pair whose bytes are on loan.
struct Borrowed<'a> {
    loan: Loan,
    master: BorrowedFd<'a>,
    slave: BorrowedFd<'a>,
    terms: Terms,
    /// Whether the output is stopped, if that is known.
    stopped: Option<Stopped>,
}

/// Reads what is queued in a pair. No process may use the pair meanwhile. The caller has checked
/// that bytes can be returned ([`look`]).
///
/// # Errors
/// The errors of the calls; the pair is as it was.
pub(super) fn read(master: BorrowedFd, slave: BorrowedFd) -> nix::Result<Queued> {
    let terms = Terms {
        times: times_of(slave)?,
        modes: tty::termios(slave, false)?,
        flags: fcntl(master, FcntlArg::F_GETFL)?.cast_unsigned(),
        packet: tty::ask(master, tty::Question::Packet)?.cast_unsigned(),
        unused: 0,
    };
    let loan = Loan::open([master, slave], terms.as_bytes(), IDLE)?;
    let mut pair = Borrowed { loan, master, slave, terms, stopped: None };
    let done = pair.read();
    let ended = pair.end();
    let queued = done?;
    ended.map(|()| queued)
}

/// Returns the bytes that a killed dump had taken. Reports a failure to the user.
pub(super) fn give_back() {
    let ended = Loan::inherit().and_then(|inherited| {
        let Some(Inherited { loan, ends: [master, slave], terms }) = inherited else {
            return Ok(());
        };
        let (terms, _) = Terms::read_from_prefix(&terms).map_err(|_| Errno::EINVAL)?;
        let (master, slave) = (master.as_fd(), slave.as_fd());
        Borrowed { loan, master, slave, terms, stopped: None }.end()
    });
    if let Err(errno) = ended {
        let what = format!("bytes queued in a pseudoterminal are lost: {errno}");
        tell(log::Level::Error, &what);
    }
}

/// The state of a pair that a process can read without taking any bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// The number of bytes that the master can read, at least.
    pub(super) output: u32,
    /// The number of bytes that the slave can read, at least.
    pub(super) input: u32,
    /// Whether a packet's status waits for the master.
    pub(super) status: bool,
    /// Whether the output is stopped; unknown for a pair whose buffers are full.
    pub(super) stopped: bool,
}

/// Looks at a pair.
pub(super) fn look(master: BorrowedFd, slave: BorrowedFd) -> nix::Result<Look> {
    // poll(2) also makes the kernel deliver bytes that are on their way.
    let status = events(master)?.contains(PollFlags::POLLPRI);
    let stopped = deliver::is_stopped(master, slave)?;
    Ok(Look {
        output: fds::readable_bytes(master)?,
        input: fds::readable_bytes(slave)?,
        status,
        stopped,
    })
}

fn events(fd: BorrowedFd) -> nix::Result<PollFlags> {
    descriptor::events_among(fd, PollFlags::POLLIN | PollFlags::POLLOUT | PollFlags::POLLPRI)
}

impl Borrowed<'_> {
    fn lines(&self) -> Lines {
        Lines::of(&self.terms.modes)
    }

    fn read(&mut self) -> nix::Result<Queued> {
        self.prepare()?;
        self.stopped = self.find_stopped()?;
        let mut queued = Queued { stopped: self.stopped, ..Queued::default() };
        self.loan.begin(OUTPUT);
        self.take_output(&mut |bytes| {
            queued.output.extend_from_slice(bytes);
            taken(bytes)
        })?;
        self.loan.set_stage(OUTPUT_BACK);
        self.return_to(self.slave, self.master, CAPACITY)?;
        self.loan.begin(LINES);
        self.take_lines(&mut |line| {
            queued.input.extend_from_slice(line);
            queued.ends.push(u32::try_from(queued.input.len()).map_err(|_| Errno::ENOBUFS)?);
            taken(line)
        })?;
        self.loan.set_stage(REST);
        self.take_rest(&mut |bytes| {
            queued.input.extend_from_slice(bytes);
            taken(bytes)
        })?;
        Ok(queued)
    }

    /// Makes the line discipline pass bytes through, and calls on the master return at once.
    fn prepare(&self) -> nix::Result<()> {
        let flags = self.terms.flags | libc::O_NONBLOCK.cast_unsigned();
        self.set_flags(flags)?;
        if self.terms.packet != 0 {
            tty::switch(self.master, Switch::Packet, false)?;
        }
        tty::set_termios(self.slave, false, &self.lines().plain())
    }

    fn set_flags(&self, flags: u32) -> nix::Result<()> {
        // With O_ASYNC, which `descriptor::set_status` would clear.
        let flags = OFlag::from_bits_retain(flags.cast_signed());
        fcntl(self.master, FcntlArg::F_SETFL(flags)).map(drop)
    }

    /// Whether output is stopped. If so, nothing is queued.
    fn find_stopped(&self) -> nix::Result<Option<Stopped>> {
        if descriptor::events(self.slave)?.contains(PollFlags::POLLOUT)
            || fds::readable_bytes(self.master)? > 0
        {
            return Ok(None);
        }
        self.loan.begin(STARTED);
        tty::flow(self.slave, Flow::Start)?;
        let by_program = descriptor::events(self.slave)?.contains(PollFlags::POLLOUT);
        self.stop_again()?;
        self.loan.begin(IDLE);
        Ok(Some(if by_program { Stopped::ByProgram } else { Stopped::ByCharacter }))
    }

    fn stop_again(&self) -> nix::Result<()> {
        if descriptor::events(self.slave)?.contains(PollFlags::POLLOUT) {
            tty::flow(self.slave, Flow::Stop)?;
        }
        Ok(())
    }

    /// Takes what the master can read. A pair whose output is stopped although the buffer of the
    /// master is full is started.
    fn take_output(&self, tell: &mut dyn FnMut(&[u8]) -> nix::Result<()>) -> nix::Result<()> {
        let mut checked = false;
        while self.take(self.master, false, tell)? {
            if !checked && !descriptor::events(self.slave)?.contains(PollFlags::POLLOUT) {
                log::warn!(
                    "the output of a pseudoterminal was stopped (^S); the dump had to start it again"
                );
                tty::flow(self.slave, Flow::Start)?;
                let plain = Termios { input: 0, ..self.lines().plain() };
                tty::set_termios(self.slave, false, &plain)?;
            }
            checked = true;
        }
        Ok(())
    }

    /// Takes the complete lines of the input, in canonical mode.
    fn take_lines(&self, tell: &mut dyn FnMut(&[u8]) -> nix::Result<()>) -> nix::Result<()> {
        let is_delimited = self.lines().are_delimited();
        while is_delimited && self.take(self.slave, true, tell)? {}
        Ok(())
    }

    /// Takes the rest of the input: all that is not lines.
    fn take_rest(&self, tell: &mut dyn FnMut(&[u8]) -> nix::Result<()>) -> nix::Result<()> {
        // Only without canonical mode can the line that is being typed be read.
        tty::set_termios(self.slave, false, &self.lines().undelimited())?;
        while self.take(self.slave, false, tell)? {}
        Ok(())
    }

    /// Takes what one read returns, if there is anything.
    fn take(
        &self,
        from: BorrowedFd,
        is_line: bool,
        tell: &mut dyn FnMut(&[u8]) -> nix::Result<()>,
    ) -> nix::Result<bool> {
        if !descriptor::events(from)?.contains(PollFlags::POLLIN) {
            return Ok(false);
        }
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
        match splice(from, None, self.loan.entrance(), None, READ_BYTES, flags) {
            Err(Errno::EAGAIN | Errno::EIO) => return Ok(false),
            result => result?,
        };
        let bytes = self.loan.taken()?;
        if bytes.is_empty() && !is_line {
            return Ok(false);
        }
        tell(&bytes)?;
        self.keep(&bytes, is_line)?;
        Ok(true)
    }

    /// Returns the first `limit` bytes of those on loan by writing them into `end`; they are read
    /// at `reader`.
    fn return_to(&self, end: BorrowedFd, reader: BorrowedFd, limit: usize) -> nix::Result<()> {
        while self.loan.send(next_piece(self.loan.returned_bytes()), limit)? > 0 {
            deliver::patiently(|| {
                // Lets the kernel deliver what was written before.
                descriptor::events(reader)?;
                let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
                match splice(self.loan.exit(), None, end, None, PIECE_BYTES, flags) {
                    Err(Errno::EAGAIN | Errno::EINTR) => {}
                    result => drop(result?),
                }
                Ok(fds::readable_bytes(self.loan.exit())? == 0)
            })?;
            self.loan.has_returned();
            // A failure could not be undone here.
            let _ = fault::hit(Point::TerminalReturned);
        }
        descriptor::events(reader).map(drop)
    }

    /// Returns everything, and leaves the pair as it was.
    fn end(self) -> nix::Result<()> {
        let returned = self.return_all();
        let restored = self.restore();
        let missing = self.loan.missing();
        self.loan.close();
        if missing > 0 {
            let what = format!("{missing} bytes queued in a pseudoterminal are lost");
            tell(log::Level::Error, &what);
        }
        returned.and(restored)
    }

    fn return_all(&self) -> nix::Result<()> {
        let loan = &self.loan;
        let lines = self.lines();
        let mut ignore = |_: &[u8]| Ok(());
        // Bytes that are still there come after those that were taken.
        match loan.stage() {
            STARTED => self.stop_again()?,
            OUTPUT => {
                self.keep_taken(false)?;
                self.take_output(&mut ignore)?;
                loan.set_stage(OUTPUT_BACK);
            }
            stage @ (LINES | REST) => {
                self.keep_taken(stage == LINES)?;
                if stage == LINES {
                    self.take_lines(&mut ignore)?;
                    loan.set_stage(REST);
                }
                self.take_rest(&mut ignore)?;
                loan.set_stage(INPUT_BACK);
            }
            OUTPUT_BACK | INPUT_BACK => loan.settle()?,
            _ => {}
        }
        match loan.stage() {
            OUTPUT_BACK => self.return_to(self.slave, self.master, CAPACITY),
            INPUT_BACK => {
                tty::set_termios(self.slave, false, &lines.plain())?;
                // The line discipline has not seen yet what is beyond its buffer.
                let seen = if lines.are_delimited() { CAPACITY } else { READ_BUFFER };
                self.return_to(self.master, self.slave, seen)?;
                let bytes = loan.kept_bytes().min(seen);
                deliver::input((self.master, self.slave), &lines, bytes, self.stopped)?;
                tty::set_termios(self.slave, false, &self.terms.modes)?;
                self.return_to(self.master, self.slave, CAPACITY)
            }
            _ => Ok(()),
        }
    }

    /// Keeps what was taken into the pipe before, if anything was.
    fn keep_taken(&self, is_line: bool) -> nix::Result<()> {
        let bytes = self.loan.taken()?;
        if bytes.is_empty() { Ok(()) } else { self.keep(&bytes, is_line) }
    }

    fn keep(&self, bytes: &[u8], is_line: bool) -> nix::Result<()> {
        // The master reads bytes, not lines.
        if self.loan.stage() == OUTPUT {
            return self.loan.keep(bytes);
        }
        self.loan.keep(&self.lines().encode(bytes, is_line))
    }

    fn set_times(&self) -> nix::Result<()> {
        if times_of(self.slave)? == self.terms.times {
            return Ok(());
        }
        let [read, read_ns, written, written_ns] = self.terms.times;
        futimens(self.slave, &TimeSpec::new(read, read_ns), &TimeSpec::new(written, written_ns))
    }

    fn restore(&self) -> nix::Result<()> {
        let modes = tty::set_termios(self.slave, false, &self.terms.modes);
        let packet = match self.terms.packet {
            0 => Ok(()),
            _ => tty::switch(self.master, Switch::Packet, true),
        };
        modes.and(packet).and(self.set_flags(self.terms.flags)).and_then(|()| self.set_times())
    }
}

/// A point of failure, when these bytes are in the pipe. An empty line is nowhere then.
fn taken(bytes: &[u8]) -> nix::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    fault::hit(Point::TerminalTaken).map_err(|_| Errno::EIO)
}

/// Opens the slave of a master, even a locked one, without blocking.
///
/// # Errors
/// `EBUSY` without `CAP_SYS_ADMIN` if the slave is in exclusive mode.
pub(super) fn open_slave(master: BorrowedFd) -> nix::Result<OwnedFd> {
    let flags = (libc::O_RDWR | libc::O_NONBLOCK).cast_unsigned();
    let locked = tty::ask(master, tty::Question::Locked)? != 0;
    if locked {
        tty::switch(master, Switch::Locked, false)?;
    }
    let slave = tty::open_slave(master, flags);
    if locked {
        tty::switch(master, Switch::Locked, true)?;
    }
    slave
}
