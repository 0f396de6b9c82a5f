//! Controlling terminals of sessions, and their foreground process groups.

use std::{
    collections::BTreeMap,
    os::fd::{BorrowedFd, OwnedFd},
};

use nix::{errno::Errno, libc};

use super::{index, is_master, path_of, peer, read_infos};
use crate::{
    image::proto::{self, TtyType},
    inject::Script,
    res::file::{FileError, Opened, Result, descriptor},
    sys::tty,
    units::{LocalPid, NsPid, TargetFd},
};

/// A terminal that becomes the controlling terminal of a session.
#[derive(Debug)]
pub(super) struct Controlling {
    pub(super) session: NsPid,
    /// The foreground process group, if there is one.
    pub(super) foreground: Option<NsPid>,
    /// A descriptor of it: the session leader needs one.
    pub(super) fd: OwnedFd,
}

/// Returns the controlling terminals of sessions, after all descriptions were opened. `only_pairs`
/// omits slaves without a master, which stand for the terminal of rcriu (`--shell-job`).
///
/// # Errors
/// [`FileError::Image`]; a slave that no process has open cannot be opened.
pub(super) fn controlling(opened: &Opened, only_pairs: bool) -> Result<Vec<Controlling>> {
    let infos = read_infos(opened)?;
    let mut found: BTreeMap<u32, Controlling> = BTreeMap::new();
    let files: Vec<&proto::TtyFileEntry> =
        opened.entries.values().filter_map(|entry| entry.tty.as_ref()).collect();
    // By number, slaves come before their masters.
    for info in infos.values().filter(|info| info.sid != 0 && info.r#type() != TtyType::Ctty) {
        let is_pair = info.pty.is_some();
        let is_alone = is_pair && !is_master(info.id) && !infos.contains_key(&peer(info.id));
        if is_alone && only_pairs {
            continue;
        }
        if found.contains_key(&info.sid) {
            continue;
        }
        let mine = |info_id| files.iter().find(move |file| file.tty_info_id == info_id);
        let slave = if is_pair { mine(info.id & !1) } else { mine(info.id) };
        let fd = match slave.filter(|file| opened.contains(file.id)) {
            Some(file) => opened.get(file.id)?.try_clone_to_owned().map_err(|_| {
                FileError::restore(file.id, "duplicate", "a terminal")(Errno::EMFILE)
            })?,
            None => match mine(info.id) {
                Some(master) => open_slave(master, info, opened)?,
                None => continue,
            },
        };
        let session = NsPid::of_image(info.sid);
        let foreground = Some(NsPid::of_image(info.pgrp)).filter(|group| *group != NsPid::NONE);
        found.insert(info.sid, Controlling { session, foreground, fd });
    }
    Ok(found.into_values().collect())
}

/// Opens the slave of an open master.
fn open_slave(
    master: &proto::TtyFileEntry,
    info: &proto::TtyInfoEntry,
    opened: &Opened,
) -> Result<OwnedFd> {
    let missing = || FileError::image(master.id, "it is a terminal, but its path is missing");
    let path = path_of(master, opened).ok_or_else(missing)?;
    let dir = path.name.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    let between: &[u8] = if path.name[..dir].ends_with(b"/pts/") { b"" } else { b"pts/" };
    let number = index(info, master.id)?.to_string();
    let slave = [&path.name[..dir], between, number.as_bytes()].concat();
    descriptor::open(opened.root_of(&path), &slave, libc::O_RDWR.cast_unsigned())
        .map_err(FileError::restore(master.id, "open the terminal", &slave))
}

/// Returns the terminal of rcriu, if the tree uses it. The group of the root process becomes its
/// foreground group if the root process leads it.
pub(super) fn inherited(opened: &Opened) -> Result<Option<BorrowedFd<'_>>> {
    let infos = read_infos(opened)?;
    let alone = |info_id: u32| {
        let info = infos.get(&info_id);
        let is_slave = info.is_some_and(|info| info.pty.is_some() && info.termios.is_some());
        is_slave && !is_master(info_id) && !infos.contains_key(&peer(info_id))
    };
    let files = opened.entries.values().filter_map(|entry| entry.tty.as_ref());
    let file = files.filter(|file| opened.contains(file.id)).find(|file| alone(file.tty_info_id));
    file.map(|file| opened.get(file.id)).transpose()
}

/// Adds the call that makes the terminal at `fd` the controlling terminal. The process leads a
/// session that has none.
pub(super) fn take_control(fd: TargetFd, script: &mut Script) {
    let arguments = [fd.0.into(), tty::TIOCSCTTY.into(), 1.into()];
    script.call("take the controlling terminal", libc::SYS_ioctl, &arguments);
}

/// Adds the call that makes `group` the foreground group of the controlling terminal at `fd`. The
/// group must exist, and `SIGTTOU` must be blocked.
pub(super) fn set_foreground(fd: TargetFd, group: LocalPid, script: &mut Script) {
    let group = script.bytes(&group.raw().to_ne_bytes());
    let arguments = [fd.0.into(), tty::TIOCSPGRP.into(), group.into()];
    script.call("set the foreground process group", libc::SYS_ioctl, &arguments);
}
