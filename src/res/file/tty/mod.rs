//! Terminals.
//!
//! Several descriptions may refer to one terminal, which has a number of its own: twice its index,
//! plus one for the master of a pair.
//!
//! The dump reads the bytes that are queued between the ends of a pair ([`loan`]), and the restore
//! queues them again ([`queue`]), delimited as they were ([`line`]). What waits in a terminal
//! whose other end is outside the tree stays there.

mod controlling;
mod deliver;
mod dump;
mod line;
mod loan;
mod orphan;
mod queue;
mod restore;

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::sys::stat::{major, minor};

pub use orphan::{Orphans, TakeMaster};

use super::{FileError, FileKind, Opened, Result, Usage};
use crate::{
    image::{
        Kind,
        proto::{self, FdTypes, TtyType},
    },
    sys::tty::CONTROL_CHARACTERS,
};

pub(super) const KIND: FileKind = FileKind {
    name: "terminal",
    types: &[FdTypes::Tty],
    usage: Usage::Descriptor,
    collector: |options| Box::new(dump::Terminals::new(options.terminals, &options.external)),
    opener: |options| {
        Box::new(restore::TerminalOpener::new(options.terminals, options.orphans.clone()))
    },
};

/// Returns the bytes that a killed dump had taken out of a terminal. Reports a failure to the user.
pub fn return_bytes() {
    loan::give_back();
}

/// The cause that stopped the output of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopped {
    /// A character (^S).
    ByCharacter,
    /// `tcflow(3)`.
    ByProgram,
}

/// The user's options for terminals.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    shell_job: bool,
    orphans: bool,
}

impl Options {
    /// `shell_job`: the tree may use the terminal that rcriu runs on (`--shell-job`).
    pub fn new(shell_job: bool) -> Self {
        Self { shell_job, orphans: false }
    }

    /// `orphans`: the dump leaves out masters outside of the tree; the restore makes new ones and hands
    /// them over ([`Orphans`]).
    #[must_use]
    pub fn orphans(self, orphans: bool) -> Self {
        Self { orphans, ..self }
    }
}

// `include/uapi/linux/major.h`
const TTY_MAJOR: u64 = 4;
const TTYAUX_MAJOR: u64 = 5;
const UNIX98_PTY_MASTER_MAJOR: u64 = 128;
const UNIX98_PTY_SLAVE_MAJOR: u64 = 136;
const UNIX98_PTY_MAJOR_COUNT: u64 = 8;
const USB_SERIAL_MAJOR: u64 = 188;
const LOW_DENSE_SERIAL_MAJOR: u64 = 204;
/// Virtual terminals have minor numbers from 1 to this (`include/uapi/linux/vt.h`).
const MAX_NR_CONSOLES: u64 = 63;

/// The mount point of the devpts instance in which a restore creates pairs.
const DEVPTS: &str = "/dev/pts";

/// The mode without the file type.
const PERMISSIONS: u32 = 0o7777;

/// The kind of a terminal device.
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

/// Whether a terminal's number is that of a master.
fn is_master(info_id: u32) -> bool {
    info_id & 1 != 0
}

/// Returns the number of the other end of a pair.
fn peer(info_id: u32) -> u32 {
    info_id ^ 1
}

/// Returns the terminals of the images, by their numbers.
fn read_infos(opened: &Opened) -> Result<BTreeMap<u32, proto::TtyInfoEntry>> {
    let infos = opened.images.messages_if_any::<proto::TtyInfoEntry>(Kind::TtyInfo, 0)?;
    Ok(infos.into_iter().flatten().map(|info| (info.id, info)).collect())
}

/// Returns the entry of the path by which a terminal was opened.
fn path_of(file: &proto::TtyFileEntry, opened: &Opened) -> Option<proto::RegFileEntry> {
    opened.entries.get(&file.regf_id.unwrap_or(file.id))?.reg.clone()
}

/// Returns the index of a pair.
fn index(info: &proto::TtyInfoEntry, id: u32) -> Result<u32> {
    let missing = || FileError::image(id, "the index of the pseudoterminal is missing");
    info.pty.as_ref().map(|pty| pty.index).ok_or_else(missing)
}

/// Returns the path of the slave of a master that was opened as `path`.
fn slave_path(path: &[u8], index: u32) -> PathBuf {
    let path = Path::new(OsStr::from_bytes(path));
    let dir = path.parent().unwrap_or(Path::new("/"));
    // A devpts file system has a `ptmx` of its own inside; /dev/ptmx is beside it.
    let inside = dir.file_name() == Some(OsStr::new("pts"));
    let dir = if inside { dir.to_owned() } else { dir.join("pts") };
    dir.join(index.to_string())
}

/// Returns the name of a terminal in `--external` and `--inherit-fd`.
fn external_name(device: u64, file_system: u64) -> String {
    format!("tty[{device:x}:{file_system:x}]")
}

/// How many control characters one number of the image holds. CRIU copies the bytes as they are in
/// memory, but still stores as many numbers as there are characters.
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

/// Extracts the control characters again; `None` if there are too few numbers.
fn unpack(numbers: &[u32]) -> Option<[u8; CONTROL_CHARACTERS]> {
    if numbers.len() < CONTROL_CHARACTERS {
        return None;
    }
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    bytes[..CONTROL_CHARACTERS].try_into().ok()
}

#[cfg(test)]
mod tests;
