//! Dumps terminals.

use std::{collections::BTreeMap, os::unix::fs::MetadataExt};

use nix::{errno::Errno, libc, poll::PollFlags};

use super::{Options, PERMISSIONS, Role, external_name, is_master, pack, peer, slave_path};
use crate::{
    image::{
        Kind, SnapshotWriter,
        proto::{self, FdTypes, TtyType},
    },
    proc,
    res::file::{Collector, Description, External, FileError, Intake, Result, descriptor, path},
    sys::{
        fds,
        tty::{self, Question, Termios},
    },
    units::{HostPid, TargetFd},
};

// CRIU's indices of terminals that are not part of a pair; those of pairs are lower.
const MAX_PTY_INDEX: u32 = 1000;
const CONSOLE_INDEX: u32 = 1002;
const VT_INDEX: u32 = 1004;
const CTTY_INDEX: u32 = 1006;
const SERIAL_INDEX: u32 = 1010;
const EXTERNAL_INDEX: u32 = 1013;
const EXTERNAL_INDEX_MAX: u32 = 1076;

/// The help for a terminal outside the tree.
const SHELL_JOB: &str = "dump with --shell-job, and restore it on the terminal that rcriu runs on";

/// A process that has a terminal open, for messages.
struct OpenTerminal {
    pid: HostPid,
    fd: TargetFd,
    name: String,
    /// The number of bytes queued for reading.
    queued: u32,
}

impl OpenTerminal {
    fn unsupported(&self, what: &str, help: &'static str) -> FileError {
        let what = format!("the terminal {}, {what}", self.name);
        FileError::Unsupported { pid: self.pid, fd: self.fd, what, help }
    }
}

/// Dumps terminals.
#[derive(Default)]
pub(super) struct Terminals {
    options: Options,
    external: External,
    infos: BTreeMap<u32, (proto::TtyInfoEntry, OpenTerminal)>,
    externals: u32,
}

impl Collector for Terminals {
    fn claims(&self, file: &Description) -> bool {
        !descriptor::is_path(file.flags) && is_terminal(file, &self.external)
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
        let (info_id, tty_type, index) = self.number(file)?;
        let mut entry = proto::TtyFileEntry {
            id: file.id,
            tty_info_id: info_id,
            flags: file.status(),
            fown: file.fown,
            regf_id: None,
        };
        if tty_type != TtyType::ExtTty {
            let path = intake.new_id();
            let path_entry = path::entry_with_id(file, path, intake)?;
            intake.push(path_entry);
            entry.regf_id = Some(path);
        }
        let [session, foreground] = session(file)?.map(|pid| intake.pids().ns(pid).image());
        match self.infos.get_mut(&info_id) {
            Some((info, _)) if info.sid == 0 => {
                (info.sid, info.pgrp) = (session, foreground);
            }
            Some(_) => {}
            None => {
                let mut info = info(file, info_id, tty_type, index)?;
                (info.sid, info.pgrp) = (session, foreground);
                let name = String::from_utf8_lossy(&file.link).into_owned();
                let queued = queued(file, &info)?;
                let holder = OpenTerminal { pid: file.pid, fd: file.number, name, queued };
                self.infos.insert(info_id, (info, holder));
            }
        }
        let is_master = tty_type == TtyType::Pty && is_master(info_id);
        Ok(proto::FileEntry {
            r#type: FdTypes::Tty.into(),
            id: file.id,
            tty: Some(entry),
            owner: is_master.then(|| slave_owner(file, index)).flatten(),
            ..Default::default()
        })
    }

    fn finish(&mut self, images: &SnapshotWriter) -> Result<()> {
        self.check()?;
        if !self.infos.is_empty() {
            let infos: Vec<_> = self.infos.values().map(|(info, _)| info.clone()).collect();
            images.write(Kind::TtyInfo, 0, &infos)?;
        }
        Ok(())
    }
}

impl Terminals {
    pub(super) fn new(options: Options, external: &External) -> Self {
        Self { options, external: external.clone(), ..Self::default() }
    }

    /// Returns the number, the type and the index of a terminal.
    fn number(&mut self, file: &Description) -> Result<(u32, TtyType, u32)> {
        if is_external(file, &self.external) {
            let index = EXTERNAL_INDEX + self.externals;
            if index > EXTERNAL_INDEX_MAX {
                return Err(file.unsupported(
                    "an external terminal beyond the number that images can hold",
                    "close some",
                ));
            }
            self.externals += 1;
            return Ok((index << 1, TtyType::ExtTty, index));
        }
        let role = Role::of(file.stat.st_rdev).expect("it was claimed");
        let index = match role {
            Role::Master => tty::ask(fd(file), Question::Index)
                .map_err(file.failed("read the index of"))?
                .cast_unsigned(),
            Role::Slave(index) => index,
            Role::Console => CONSOLE_INDEX,
            Role::Virtual => VT_INDEX,
            Role::Controlling => CTTY_INDEX,
            Role::Serial => SERIAL_INDEX,
        };
        if role.tty_type() == TtyType::Pty && index > MAX_PTY_INDEX {
            let what = format!("the pseudoterminal {index}; at most {MAX_PTY_INDEX} can be dumped");
            return Err(file.unsupported(what, "close others and start the program again"));
        }
        Ok((index << 1 | u32::from(role == Role::Master), role.tty_type(), index))
    }

    /// Rejects pairs whose other end is outside the tree, unless `--shell-job` allows one.
    fn check(&self) -> Result<()> {
        let is_pair = |info: &proto::TtyInfoEntry| info.pty.is_some();
        let is_alone = |info: &proto::TtyInfoEntry| {
            is_pair(info)
                && !is_master(info.id)
                && info.termios.is_some()
                && !self.infos.contains_key(&peer(info.id))
        };
        let mut alone = self.infos.values().filter(|(info, _)| is_alone(info));
        if let Some((_, holder)) = alone.next() {
            if !self.options.shell_job {
                let what = "whose other end is outside the tree";
                return Err(holder.unsupported(what, SHELL_JOB));
            }
            if let Some((_, holder)) = alone.next() {
                let what = "the second one whose other end is outside the tree";
                return Err(holder.unsupported(what, "at most one is supported: close the other"));
            }
        }
        // The restore creates the other pairs anew, so bytes queued in them would be lost.
        for (info, holder) in self.infos.values() {
            let is_ours = is_pair(info) && !is_alone(info);
            if is_ours && holder.queued > 0 {
                let what = format!("in which {} bytes are queued", holder.queued);
                let help = "have the program read them, or read the master, then try again";
                return Err(holder.unsupported(&what, help));
            }
        }
        let Some((info, holder)) = self.infos.get(&(CTTY_INDEX << 1)) else { return Ok(()) };
        let is_ours = self.infos.values().any(|(other, _)| {
            other.id != info.id && other.sid == info.sid && info.sid != 0 && !is_alone(other)
        });
        if !is_ours && !self.options.shell_job {
            let what = "which stands for a terminal that no process of the tree has open";
            return Err(holder.unsupported(what, SHELL_JOB));
        }
        Ok(())
    }
}

/// Returns the owner of the slave of a master, which no process may have open.
fn slave_owner(file: &Description, index: u32) -> Option<proto::InodeOwnerEntry> {
    let stat = std::fs::metadata(slave_path(&file.link, index)).ok()?;
    let is_it = Role::of(stat.rdev()) == Some(Role::Slave(index));
    is_it.then(|| proto::InodeOwnerEntry {
        uid: stat.uid(),
        gid: stat.gid(),
        mode: stat.mode() & PERMISSIONS,
    })
}

/// Whether a device is dumped as a terminal.
fn is_terminal(file: &Description, external: &External) -> bool {
    let is_known = || Role::of(file.stat.st_rdev).is_some();
    file.is_type(libc::S_IFCHR) && (is_known() || is_external(file, external))
}

fn is_external(file: &Description, external: &External) -> bool {
    external.contains(&external_name(file.stat.st_rdev, file.stat.st_dev))
}

fn fd(file: &Description) -> std::os::fd::BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(&file.fd)
}

/// Returns the session that a terminal controls, and its foreground process group; 0 for none.
fn session(file: &Description) -> Result<[HostPid; 2]> {
    const NONE: HostPid = HostPid(0);
    let ask = |question| match tty::ask(fd(file), question) {
        Ok(answer) => Ok(HostPid(answer)),
        Err(Errno::ENOTTY | Errno::EIO) => Ok(NONE),
        Err(errno) => Err(file.failed("read the session of")(errno)),
    };
    let asked = ask(Question::Session)?;
    if asked.0 > 0 && Role::of(file.stat.st_rdev) == Some(Role::Master) {
        return Ok([asked, ask(Question::Foreground)?]);
    }
    // Other terminals tell it only to a process of the session: use the controlling terminal in
    // /proc/PID/stat.
    let stat = proc::stat(file.pid)?;
    let is_it = u64::from(stat.tty_nr) == file.stat.st_rdev
        || stat.tty_nr != 0 && Role::of(file.stat.st_rdev) == Some(Role::Controlling);
    if !is_it {
        return Ok([NONE; 2]);
    }
    Ok([stat.session, stat.tpgid])
}

/// Returns the number of bytes that can be read from a terminal.
fn queued(file: &Description, info: &proto::TtyInfoEntry) -> Result<u32> {
    if info.termios.is_none() || info.pty.is_none() {
        return Ok(0);
    }
    // poll(2) makes the kernel deliver bytes that are on their way.
    descriptor::events(fd(file)).map_err(file.failed("poll"))?;
    fds::readable_bytes(fd(file)).map_err(file.failed("count what is queued in"))
}

fn info(file: &Description, id: u32, tty_type: TtyType, index: u32) -> Result<proto::TtyInfoEntry> {
    let low = |number: u64| u32::try_from(number & u64::from(u32::MAX)).expect("32 bits");
    let mut info = proto::TtyInfoEntry {
        id,
        r#type: tty_type.into(),
        rdev: low(file.stat.st_rdev),
        dev: Some(low(file.stat.st_dev)),
        uid: Some(file.stat.st_uid),
        gid: Some(file.stat.st_gid),
        pty: (tty_type == TtyType::Pty).then_some(proto::TtyPtyEntry { index }),
        ..Default::default()
    };
    match modes(file, &mut info) {
        // The terminal is hung up: the kernel reports nothing more.
        Err(Errno::EIO) => (info.termios, info.termios_locked, info.winsize) = (None, None, None),
        result => result.map_err(file.failed("read the modes of"))?,
    }
    if is_master(id) && tty_type == TtyType::Pty {
        let events = descriptor::events(fd(file)).map_err(file.failed("poll"))?;
        info.rcriu_hung_up = events.contains(PollFlags::POLLHUP).then_some(true);
    }
    Ok(info)
}

fn modes(file: &Description, info: &mut proto::TtyInfoEntry) -> nix::Result<()> {
    let fd = fd(file);
    let is_on = |question| match tty::ask(fd, question) {
        Err(Errno::ENOTTY) => Ok(false),
        result => result.map(|answer| answer != 0),
    };
    info.exclusive = is_on(Question::Exclusive)?;
    info.packet_mode = is_on(Question::Packet)?;
    info.locked = is_on(Question::Locked)?;
    info.termios = Some(termios_entry(&tty::termios(fd, false)?));
    info.termios_locked = Some(termios_entry(&tty::termios(fd, true)?));
    let size = tty::window_size(fd)?;
    info.winsize = Some(proto::WinsizeEntry {
        ws_row: size.rows.into(),
        ws_col: size.columns.into(),
        ws_xpixel: size.x_pixels.into(),
        ws_ypixel: size.y_pixels.into(),
    });
    Ok(())
}

fn termios_entry(modes: &Termios) -> proto::TermiosEntry {
    proto::TermiosEntry {
        c_iflag: modes.input,
        c_oflag: modes.output,
        c_cflag: modes.control,
        c_lflag: modes.local,
        c_line: modes.line.into(),
        // The control modes also hold the speeds.
        c_ispeed: 0,
        c_ospeed: 0,
        c_cc: pack(&modes.characters),
    }
}
