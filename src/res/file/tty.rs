//! Terminals.
//!
//! What a description leads to has a number of its own, so that several
//! descriptions of one terminal find it: twice its index, and one more for the
//! master of a pair.
//!
//! Bytes that are queued between the two ends of a pair cannot be looked at without taking
//! them out, and what kills this program then would lose them: a dump that finds some is
//! refused, unless the terminal stays outside of the tree. What CRIU has put into images is
//! queued again. A line that was typed in part, at a terminal that gives out lines, is
//! counted nowhere: nobody can see it, and it is lost.

mod restore;

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    libc,
    poll::PollFlags,
    sys::stat::{major, minor},
};

use super::{
    Collector, Description, FileError, FileKind, Intake, Policy, Result, Usage, descriptor, path,
};
use crate::{
    image::{
        Kind, SnapshotWriter,
        proto::{self, FdTypes, TtyType},
    },
    proc,
    sys::{
        fds,
        tty::{self, CONTROL_CHARACTERS, Question, Termios},
    },
    units::{HostPid, TargetFd},
};

/// The kind's row.
pub(super) const KIND: FileKind = FileKind {
    name: "terminal",
    types: &[FdTypes::Tty],
    usage: Usage::Descriptor,
    collector: |policy: &Policy| {
        Box::new(Terminals { policy: policy.clone(), ..Terminals::default() })
    },
    opener: |_: &Policy| Box::new(restore::Opening::default()),
};

// `include/uapi/linux/major.h`
const TTY_MAJOR: u64 = 4;
const TTYAUX_MAJOR: u64 = 5;
const UNIX98_PTY_MASTER_MAJOR: u64 = 128;
const UNIX98_PTY_SLAVE_MAJOR: u64 = 136;
const UNIX98_PTY_MAJOR_COUNT: u64 = 8;
const USB_SERIAL_MAJOR: u64 = 188;
const LOW_DENSE_SERIAL_MAJOR: u64 = 204;
/// Virtual terminals have the numbers from 1 to this (`include/uapi/linux/vt.h`).
const MAX_NR_CONSOLES: u64 = 63;

// Numbers of CRIU for terminals that have none of their own; pairs have less.
const MAX_PTY_INDEX: u32 = 1000;
const CONSOLE_INDEX: u32 = 1002;
const VT_INDEX: u32 = 1004;
const CTTY_INDEX: u32 = 1006;
const SERIAL_INDEX: u32 = 1010;
const EXTERNAL_INDEX: u32 = 1013;
const EXTERNAL_INDEX_MAX: u32 = 1076;

/// Permissions and the like.
const PERMISSIONS: u32 = 0o7777;

/// What helps if a terminal is outside of the tree.
const SHELL_JOB: &str = "dump with --shell-job, to restore on the terminal of who restores";

/// What a terminal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Master,
    Slave(u32),
    Console,
    Virtual,
    Controlling,
    Serial,
}

impl Role {
    fn of(device: u64) -> Option<Self> {
        let small = |number: u64| u32::try_from(number).ok();
        let (major, minor) = (major(device), minor(device));
        match major {
            TTYAUX_MAJOR => match minor {
                0 => Some(Self::Controlling),
                1 => Some(Self::Console),
                2 => Some(Self::Master),
                _ => None,
            },
            TTY_MAJOR if (1..=MAX_NR_CONSOLES).contains(&minor) => Some(Self::Virtual),
            USB_SERIAL_MAJOR | LOW_DENSE_SERIAL_MAJOR => Some(Self::Serial),
            _ => {
                let in_range = |first| (first..first + UNIX98_PTY_MAJOR_COUNT).contains(&major);
                if in_range(UNIX98_PTY_MASTER_MAJOR) {
                    return Some(Self::Master);
                }
                let index = small((major.wrapping_sub(UNIX98_PTY_SLAVE_MAJOR) << 8) | minor)?;
                in_range(UNIX98_PTY_SLAVE_MAJOR).then_some(Self::Slave(index))
            }
        }
    }

    fn tty_type(self) -> TtyType {
        match self {
            Self::Master | Self::Slave(_) => TtyType::Pty,
            Self::Console => TtyType::Console,
            Self::Virtual => TtyType::Vt,
            Self::Controlling => TtyType::Ctty,
            Self::Serial => TtyType::Serial,
        }
    }
}

/// Whether the number of a terminal is that of a master.
fn is_master(info_id: u32) -> bool {
    info_id & 1 != 0
}

/// Returns the number of the other end of a pair.
fn peer(info_id: u32) -> u32 {
    info_id ^ 1
}

/// Who has a terminal open, for messages.
struct Holder {
    pid: HostPid,
    fd: TargetFd,
    name: String,
    /// How many bytes are queued that can be read from it.
    queued: u32,
}

impl Holder {
    fn unsupported(&self, what: &str, help: &'static str) -> FileError {
        let what = format!("the terminal {}, {what}", self.name);
        FileError::Unsupported { pid: self.pid, fd: self.fd, what, help }
    }
}

/// Dumps terminals.
#[derive(Default)]
struct Terminals {
    policy: Policy,
    infos: BTreeMap<u32, (proto::TtyInfoEntry, Holder)>,
    externals: u32,
}

impl Collector for Terminals {
    fn claims(&self, file: &Description) -> bool {
        !descriptor::is_path(file.flags) && is_terminal(file, &self.policy)
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
        let (session, foreground) = session(file)?;
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
                let holder = Holder { pid: file.pid, fd: file.number, name, queued };
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
    /// Returns the number, the type and the index of a terminal.
    fn number(&mut self, file: &Description) -> Result<(u32, TtyType, u32)> {
        if is_external(file, &self.policy) {
            let index = EXTERNAL_INDEX + self.externals;
            if index > EXTERNAL_INDEX_MAX {
                return Err(file.unsupported("one external terminal too many", "close some"));
            }
            self.externals += 1;
            return Ok((index << 1, TtyType::ExtTty, index));
        }
        let role = Role::of(file.stat.st_rdev).expect("it was claimed");
        let index = match role {
            Role::Master => tty::ask(fd(file), Question::Index)
                .map_err(file.failed("read the number of"))?
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

    /// Refuses terminals whose other end is outside of the tree, if that was not
    /// allowed.
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
            if !self.policy.shell_job {
                let what = "whose other end is outside of the tree";
                return Err(holder.unsupported(what, SHELL_JOB));
            }
            if let Some((_, holder)) = alone.next() {
                let what = "the second whose other end is outside of the tree";
                return Err(holder.unsupported(what, "one is possible: close the other"));
            }
        }
        // The others are made anew.
        for (info, holder) in self.infos.values() {
            let is_ours = is_pair(info) && !is_alone(info);
            if is_ours && holder.queued > 0 {
                let what = format!("in which {} bytes wait to be read", holder.queued);
                let help = "let the program read them, or read the master, and try again";
                return Err(holder.unsupported(&what, help));
            }
        }
        let Some((info, holder)) = self.infos.get(&(CTTY_INDEX << 1)) else { return Ok(()) };
        let is_ours = self.infos.values().any(|(other, _)| {
            other.id != info.id && other.sid == info.sid && info.sid != 0 && !is_alone(other)
        });
        if !is_ours && !self.policy.shell_job {
            let what = "which stands for one that nobody in the tree has open";
            return Err(holder.unsupported(what, SHELL_JOB));
        }
        Ok(())
    }
}

/// Returns the path of the slave of a master that was opened by `path`.
fn slave_path(path: &[u8], index: u32) -> PathBuf {
    let path = Path::new(OsStr::from_bytes(path));
    let dir = path.parent().unwrap_or(Path::new("/"));
    // A file system of terminals has a `ptmx` of its own; the other is beside it.
    let inside = dir.file_name() == Some(OsStr::new("pts"));
    let dir = if inside { dir.to_owned() } else { dir.join("pts") };
    dir.join(index.to_string())
}

/// Returns who owns the slave of a master, which perhaps nobody has open.
fn slave_owner(file: &Description, index: u32) -> Option<proto::InodeOwnerEntry> {
    let stat = std::fs::metadata(slave_path(&file.link, index)).ok()?;
    let is_it = Role::of(stat.rdev()) == Some(Role::Slave(index));
    is_it.then(|| proto::InodeOwnerEntry {
        uid: stat.uid(),
        gid: stat.gid(),
        mode: stat.mode() & PERMISSIONS,
    })
}

/// Whether a device is one that is dumped as a terminal.
fn is_terminal(file: &Description, policy: &Policy) -> bool {
    let is_known = || Role::of(file.stat.st_rdev).is_some();
    file.is_type(libc::S_IFCHR) && (is_known() || is_external(file, policy))
}

fn is_external(file: &Description, policy: &Policy) -> bool {
    policy.is_external(&external_name(file.stat.st_rdev, file.stat.st_dev))
}

fn fd(file: &Description) -> std::os::fd::BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(&file.fd)
}

/// Returns what `--external` and `--inherit-fd` call a terminal.
fn external_name(device: u64, file_system: u64) -> String {
    format!("tty[{device:x}:{file_system:x}]")
}

/// Returns the session that a terminal controls, and the group in the foreground;
/// 0 for none.
fn session(file: &Description) -> Result<(u32, u32)> {
    let ask = |question| match tty::ask(fd(file), question) {
        Ok(answer) => Ok(answer.max(0).cast_unsigned()),
        Err(Errno::ENOTTY | Errno::EIO) => Ok(0),
        Err(errno) => Err(file.failed("read the session of")(errno)),
    };
    let asked = ask(Question::Session)?;
    if asked != 0 && Role::of(file.stat.st_rdev) == Some(Role::Master) {
        return Ok((asked, ask(Question::Foreground)?));
    }
    // The others tell only who has them as controlling terminal.
    let stat = proc::stat(file.pid)?;
    let is_it = u64::from(stat.tty_nr) == file.stat.st_rdev
        || stat.tty_nr != 0 && Role::of(file.stat.st_rdev) == Some(Role::Controlling);
    if !is_it {
        return Ok((0, 0));
    }
    Ok((stat.session.max(0).cast_unsigned(), stat.tpgid.max(0).cast_unsigned()))
}

/// Returns how many bytes can be read from a terminal.
fn queued(file: &Description, info: &proto::TtyInfoEntry) -> Result<u32> {
    if info.termios.is_none() || info.pty.is_none() {
        return Ok(0);
    }
    // Asking for events brings in what is on its way.
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
        // Hung up: there is nothing more to be known.
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

/// Bytes of control characters in one number of images: the bytes stand there as
/// they are in memory, not one a number, of which there are as many nevertheless.
const CHARACTERS_PER_NUMBER: usize = size_of::<u32>();

fn pack(characters: &[u8; CONTROL_CHARACTERS]) -> Vec<u32> {
    let mut numbers = vec![0; CONTROL_CHARACTERS];
    for (number, bytes) in numbers.iter_mut().zip(characters.chunks(CHARACTERS_PER_NUMBER)) {
        let mut word = [0; CHARACTERS_PER_NUMBER];
        word[..bytes.len()].copy_from_slice(bytes);
        *number = u32::from_le_bytes(word);
    }
    numbers
}

/// Takes characters out of numbers again; `None` if there are too few.
fn unpack(numbers: &[u32]) -> Option<[u8; CONTROL_CHARACTERS]> {
    if numbers.len() < CONTROL_CHARACTERS {
        return None;
    }
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    bytes[..CONTROL_CHARACTERS].try_into().ok()
}

fn termios_entry(modes: &Termios) -> proto::TermiosEntry {
    proto::TermiosEntry {
        c_iflag: modes.input,
        c_oflag: modes.output,
        c_cflag: modes.control,
        c_lflag: modes.local,
        c_line: modes.line.into(),
        // The speeds are in the control modes, too.
        c_ispeed: 0,
        c_ospeed: 0,
        c_cc: pack(&modes.characters),
    }
}

#[cfg(test)]
mod tests;
