//! Bytes queued in pseudoterminals: `tty-data.img`.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
    poll::PollFlags,
};

use super::{
    deliver,
    line::{Lines, PIECE_BYTES, READ_BUFFER, STOP, next_piece},
    peer,
};
use crate::{
    image::{Kind, proto},
    res::file::{FileError, Opened, Result, descriptor},
    sys::tty::{self, Switch, Termios},
};

/// More than this may only fit in a pair with buffers that were used before.
const MANY_BYTES: usize = 8 << 10;

/// Queues the recorded bytes at both ends of the pairs, and closes the slaves that no process has
/// open. `masters` has a description of each master.
pub(super) fn restore(
    masters: &BTreeMap<u32, u32>,
    infos: &BTreeMap<u32, proto::TtyInfoEntry>,
    opened: &Opened,
) -> Result<()> {
    let queued: Vec<proto::TtyDataEntry> =
        opened.images.messages_if_any(Kind::TtyData, 0)?.unwrap_or_default();
    for (info_id, id) in masters {
        let of = |id: u32| queued.iter().find(|data| data.tty_id == id);
        let (to_master, to_slave) = (of(*info_id), of(peer(*info_id)));
        let info = infos.get(info_id);
        let stopped =
            info.and_then(|info| info.rcriu_stopped.is_some().then(|| info.rcriu_stopped()));
        let hung_up = info.is_some_and(proto::TtyInfoEntry::rcriu_hung_up);
        let is_queued = to_master.is_some() || to_slave.is_some();
        if !is_queued && !hung_up && stopped.is_none() {
            continue;
        }
        let failed = |step| FileError::restore(*id, step, "a pseudoterminal");
        let master = opened.get(*id)?;
        let packets = info.is_some_and(|info| info.packet_mode);
        let packet_mode = |on: bool| {
            let switched = if packets { tty::switch(master, Switch::Packet, on) } else { Ok(()) };
            switched.map_err(failed("switch the packet mode of"))
        };
        // Without packet mode, the master is not notified of the changes here.
        packet_mode(false)?;
        let read_write = (libc::O_RDWR | libc::O_NONBLOCK).cast_unsigned();
        let slave = tty::open_slave(master, read_write).map_err(failed("open the other end of"))?;
        let slave = slave.as_fd();
        let modes = tty::termios(slave, false).map_err(failed("read the modes of"))?;
        if is_queued {
            fill((master, slave), &modes, to_master, to_slave).map_err(failed("queue bytes in"))?;
        }
        if let Some(stop) = stopped {
            stop_output((master, slave), &modes, stop).map_err(failed("stop the output of"))?;
        }
        packet_mode(true)?;
    }
    Ok(())
}

fn fill(
    (master, slave): (BorrowedFd, BorrowedFd),
    modes: &Termios,
    to_master: Option<&proto::TtyDataEntry>,
    to_slave: Option<&proto::TtyDataEntry>,
) -> nix::Result<()> {
    let lines = Lines::of(modes);
    tty::set_termios(slave, false, &lines.undelimited())?;
    for (end, reader, data) in [(slave, master, to_master), (master, slave, to_slave)] {
        if data.is_some_and(|data| data.data.len() > MANY_BYTES) {
            make_buffers(end, reader)?;
        }
    }
    tty::set_termios(slave, false, &lines.plain())?;
    if let Some(data) = to_master {
        write_all((slave, master), &data.data, 0)?;
    }
    let (now, later) = match to_slave {
        // CRIU does not tell where lines end.
        Some(data) if lines.are_delimited() && data.rcriu_line_ends.is_empty() => {
            let ends = data.data.iter().zip(1..).filter(|(byte, _)| **byte == b'\n');
            let ends: Vec<u32> = ends.map(|(_, end)| end).collect();
            (lines.encode_all(&data.data, &ends), Vec::new())
        }
        Some(data) if lines.are_delimited() => {
            (lines.encode_all(&data.data, &data.rcriu_line_ends), Vec::new())
        }
        Some(data) => {
            let seen = data.data.len().min(READ_BUFFER);
            (data.data[..seen].to_owned(), data.data[seen..].to_owned())
        }
        None => (Vec::new(), Vec::new()),
    };
    write_all((master, slave), &now, 0)?;
    deliver::input((master, slave), &lines, now.len(), None)?;
    tty::set_termios(slave, false, modes)?;
    // The line discipline had not processed what was beyond its buffer.
    write_all((master, slave), &later, now.len())
}

/// Makes the kernel allocate as many buffers as it allows, and keep them: see [`PIECE_BYTES`].
fn make_buffers(end: BorrowedFd, reader: BorrowedFd) -> nix::Result<()> {
    let piece = [0; PIECE_BYTES];
    let filled = nonblocking(end, || {
        loop {
            match nix::unistd::write(end, &piece) {
                Ok(_) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
    });
    let mut bytes = [0; 4096];
    while descriptor::events(reader)?.contains(PollFlags::POLLIN) {
        nix::unistd::read(reader, &mut bytes)?;
    }
    filled
}

/// Runs `work` while calls on a descriptor do not block.
fn nonblocking(fd: BorrowedFd, work: impl FnOnce() -> nix::Result<()>) -> nix::Result<()> {
    let flags = fcntl(fd, FcntlArg::F_GETFL)?.cast_unsigned();
    descriptor::set_status(fd, flags | libc::O_NONBLOCK.cast_unsigned())?;
    let done = work();
    descriptor::set_status(fd, flags)?;
    done
}

/// Stops the output of a slave.
fn stop_output(
    (master, slave): (BorrowedFd, BorrowedFd),
    modes: &Termios,
    stop: proto::TtyStop,
) -> nix::Result<()> {
    match stop {
        proto::TtyStop::ByProgram => tty::flow(slave, tty::Flow::Stop),
        proto::TtyStop::ByCharacter => {
            let lines = Lines::of(modes);
            tty::set_termios(slave, false, &lines.stopping())?;
            tty::switch(master, Switch::Packet, true)?;
            write_all((master, slave), &[STOP], 0)?;
            deliver::status(master)?;
            tty::switch(master, Switch::Packet, false)?;
            tty::set_termios(slave, false, modes)
        }
    }
}

/// Writes to a terminal without blocking, after `done` other bytes. They are read at `reader`.
fn write_all((fd, reader): (BorrowedFd, BorrowedFd), bytes: &[u8], done: usize) -> nix::Result<()> {
    let mut written = 0;
    nonblocking(fd, || {
        deliver::patiently(|| {
            // poll(2) makes the kernel deliver what was written before.
            descriptor::events(reader)?;
            while let Some(left) = bytes.get(written..).filter(|left| !left.is_empty()) {
                let piece = next_piece(done + written).min(left.len());
                match nix::unistd::write(fd, &left[..piece]) {
                    Ok(count) => written += count,
                    Err(Errno::EAGAIN | Errno::EINTR) => return Ok(false),
                    Err(errno) => return Err(errno),
                }
            }
            Ok(true)
        })
    })
}
