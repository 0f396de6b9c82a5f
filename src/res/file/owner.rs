//! Who owns pipes and sockets: each has an inode of its own, with an owner and a mode, but
//! no name by which either could be changed later.
//!
//! The owner is more than what `fstat(2)` shows: `/proc/self/fd/N` of a pipe can be opened by
//! its owner, a second socket be bound with `SO_REUSEPORT` by the owner of the first, and
//! firewalls match it. All of it follows `fchown(2)`, but for the last: firewalls look at who made
//! the socket. So internet sockets are made in the owner's name (`as_owner`).
//!
//! CRIU's images do not say whose these are. They belong to the user then as whom the
//! first process works that has them.

use std::{os::fd::AsFd, rc::Rc, thread};

use nix::{
    libc,
    sys::{
        prctl::{get_dumpable, set_dumpable},
        stat::{Mode, fchmod, fstat},
    },
    unistd::{Gid, Uid, fchown, getegid, geteuid, setfsgid, setfsuid},
};

use super::{Description, FileError, Opened, Result};
use crate::{image::proto, units::NsPid};

/// Permission bits of a file's mode.
const PERMISSIONS: u32 = 0o7777;

/// A process of the tree that has a description, as far as it matters for what it made.
#[derive(Clone, Debug, PartialEq)]
pub struct Holder {
    /// The process.
    pub pid: NsPid,
    /// The credentials of its leader.
    pub creds: Rc<proto::CredsEntry>,
}

/// Returns who owns the inode of a pipe or socket.
pub fn read(file: &Description) -> Option<proto::InodeOwnerEntry> {
    let nameless = file.is_type(libc::S_IFSOCK) || file.link.starts_with(b"pipe:[");
    nameless.then_some(proto::InodeOwnerEntry {
        uid: file.stat.st_uid,
        gid: file.stat.st_gid,
        mode: file.stat.st_mode & PERMISSIONS,
    })
}

/// Returns the owner that a description is to have, if anything tells.
fn of(id: u32, opened: &Opened) -> Option<(u32, u32)> {
    let recorded = opened.entries.get(&id).and_then(|entry| entry.owner.as_ref());
    recorded.map(|owner| (owner.uid, owner.gid)).or_else(|| {
        let creds = &opened.holder(id)?.creds;
        Some((creds.fsuid, creds.fsgid))
    })
}

/// Gives what this program has made for a description its owner and its mode.
///
/// # Errors
/// [`FileError::Restore`].
pub(super) fn restore(id: u32, fd: impl AsFd, opened: &Opened) -> Result<()> {
    let failed = |step| FileError::restore(id, step, "a pipe or socket");
    let stat = fstat(&fd).map_err(failed("look at"))?;
    if let Some((uid, gid)) = of(id, opened)
        && (stat.st_uid, stat.st_gid) != (uid, gid)
    {
        fchown(&fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(failed("set the owner of"))?;
    }
    let recorded = opened.entries.get(&id).and_then(|entry| entry.owner.as_ref());
    if let Some(owner) = recorded.filter(|owner| owner.mode != stat.st_mode & PERMISSIONS) {
        fchmod(&fd, Mode::from_bits_truncate(owner.mode)).map_err(failed("set the mode of"))?;
    }
    Ok(())
}

/// Makes something in the name of the owner of a description, as far as this program may.
///
/// A thread of its own takes the owner's ids, so that this one loses nothing by it.
pub(super) fn as_owner<T: Send>(id: u32, opened: &Opened, make: impl FnOnce() -> T + Send) -> T {
    let owner = of(id, opened).map(|(uid, gid)| (Uid::from_raw(uid), Gid::from_raw(gid)));
    let Some((uid, gid)) = owner.filter(|owner| *owner != (geteuid(), getegid())) else {
        return make();
    };
    let dumpable = get_dumpable();
    let made = thread::scope(|scope| {
        let made = scope.spawn(|| {
            // The user last: it takes the privilege to change the group.
            setfsgid(gid);
            setfsuid(uid);
            make()
        });
        made.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    // Which the kernel takes from all threads of who changes ids.
    if let Err(errno) = dumpable.and_then(set_dumpable) {
        log::debug!("cannot become dumpable again: {errno}");
    }
    made
}
