//! Bytes queued in pseudoterminals: `tty-data.img`.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};

use super::peer;
use crate::{
    image::{Kind, proto},
    res::file::{FileError, Opened, Result, descriptor},
    sys::tty::{self, Switch, Termios},
};

/// `ICANON` (`include/uapi/asm-generic/termbits.h`): canonical mode, which delivers lines.
const CANONICAL: u32 = 2;

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
        let hung_up = infos.get(info_id).is_some_and(proto::TtyInfoEntry::rcriu_hung_up);
        if to_master.is_none() && to_slave.is_none() && !hung_up {
            continue;
        }
        let failed = |step| FileError::restore(*id, step, "a pseudoterminal");
        let master = opened.get(*id)?;
        let packets = infos.get(info_id).is_some_and(|info| info.packet_mode);
        let packet_mode = |on: bool| {
            let switched = if packets { tty::switch(master, Switch::Packet, on) } else { Ok(()) };
            switched.map_err(failed("switch the packet mode of"))
        };
        // Without packet mode, the master is not notified of the changes here.
        packet_mode(false)?;
        let read_write = (libc::O_RDWR | libc::O_NONBLOCK).cast_unsigned();
        let slave = tty::open_slave(master, read_write).map_err(failed("open the other end of"))?;
        let modes = tty::termios(slave.as_fd(), false).map_err(failed("read the modes of"))?;
        // Pass the bytes through unchanged, except that canonical mode still delimits lines.
        let plain = Termios {
            input: 0,
            output: 0,
            local: modes.local & CANONICAL,
            characters: [0; tty::CONTROL_CHARACTERS],
            ..modes
        };
        if to_master.is_some() || to_slave.is_some() {
            tty::set_termios(slave.as_fd(), false, &plain).map_err(failed("set the modes of"))?;
        }
        if let Some(data) = to_master {
            write_all(slave.as_fd(), &data.data).map_err(failed("queue bytes in"))?;
        }
        if let Some(data) = to_slave {
            write_all(master, &data.data).map_err(failed("queue bytes in"))?;
        }
        if to_master.is_some() || to_slave.is_some() {
            // poll(2) delivers the bytes while the plain modes are set.
            descriptor::events(slave.as_fd()).map_err(failed("poll"))?;
            tty::set_termios(slave.as_fd(), false, &modes).map_err(failed("set the modes of"))?;
        }
        packet_mode(true)?;
    }
    Ok(())
}

/// Writes to a terminal without blocking.
fn write_all(fd: BorrowedFd, bytes: &[u8]) -> nix::Result<()> {
    let flags = fcntl(fd, FcntlArg::F_GETFL)?.cast_unsigned();
    descriptor::set_status(fd, flags | libc::O_NONBLOCK.cast_unsigned())?;
    let file = fd.try_clone_to_owned().map(File::from);
    let written = file.and_then(|mut file| file.write_all(bytes));
    descriptor::set_status(fd, flags)?;
    written.map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}
