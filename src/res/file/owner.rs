//! Owners of pipes and sockets. Each has an inode of its own, with an owner and a mode, but no
//! path by which to change them later.
//!
//! The kernel checks the owner: only the owner may open `/proc/self/fd/N` of a pipe, or bind a
//! second socket with `SO_REUSEPORT`. For both, `fchown(2)` suffices. Firewalls match the user that
//! created a socket instead, so the restore creates internet sockets with the owner's ids
//! ([`as_owner`]).
//!
//! CRIU's images do not record the owner. Then it is the user of the first process that has the
//! pipe or socket.

use std::{os::fd::AsFd, rc::Rc};

use nix::{
    errno::Errno,
    libc,
    sys::stat::{Mode, fchmod, fstat},
    unistd::{Gid, Uid, fchown, getegid, geteuid},
};

use super::{Description, FileError, Opened, Result};
use crate::{
    causes::tell,
    image::proto,
    sys::process::with_file_ids,
    units::{NO_ID, NsPid},
};

/// Permission bits of a file's mode.
const PERMISSIONS: u32 = 0o7777;

/// A process that has a description: the default owner of its inode.
#[derive(Clone, Debug, PartialEq)]
pub struct Holder {
    /// The process.
    pub pid: NsPid,
    /// The credentials of its thread group leader.
    pub creds: Rc<proto::CredsEntry>,
}

/// Returns the owner of the inode of a pipe or socket.
pub fn read(file: &Description) -> Option<proto::InodeOwnerEntry> {
    let nameless = file.is_type(libc::S_IFSOCK) || file.link.starts_with(b"pipe:[");
    nameless.then_some(proto::InodeOwnerEntry {
        uid: file.stat.st_uid,
        gid: file.stat.st_gid,
        mode: file.stat.st_mode & PERMISSIONS,
    })
}

/// Returns the owner here that a description is to have, if it is known and the tree maps it.
fn of(id: u32, opened: &Opened) -> Option<(u32, u32)> {
    let recorded = opened.entries.get(&id).and_then(|entry| entry.owner.as_ref());
    let owner = recorded.map(|owner| (owner.uid, owner.gid)).or_else(|| {
        let creds = &opened.holder(id)?.creds;
        Some((creds.fsuid, creds.fsgid))
    });
    let (uid, gid) = opened.pids.ids().host_owner(owner?);
    (uid != NO_ID && gid != NO_ID).then_some((uid, gid))
}

/// Sets the owner and the mode of a pipe or socket that the restore has created.
pub(super) fn restore(id: u32, fd: impl AsFd, opened: &Opened) -> Result<()> {
    let failed = |step| FileError::restore(id, step, "a pipe or socket");
    let stat = fstat(&fd).map_err(failed("examine"))?;
    if let Some((uid, gid)) = of(id, opened)
        && (stat.st_uid, stat.st_gid) != (uid, gid)
        && !set_owner(&fd, (uid, gid)).map_err(failed("set the owner of"))?
    {
        let of = opened
            .holder(id)
            .map_or_else(String::new, |holder| format!(" of process {}", holder.pid));
        let what = format!(
            "a pipe or socket{of} belongs to user {} and group {} instead of {uid} and {gid}: rcriu \
             may not set the owner\nhelp: run rcriu restore as root, or give it CAP_CHOWN",
            stat.st_uid, stat.st_gid
        );
        tell(log::Level::Warn, &what);
    }
    let recorded = opened.entries.get(&id).and_then(|entry| entry.owner.as_ref());
    if let Some(owner) = recorded.filter(|owner| owner.mode != stat.st_mode & PERMISSIONS) {
        fchmod(&fd, Mode::from_bits_truncate(owner.mode)).map_err(failed("set the mode of"))?;
    }
    Ok(())
}

/// Sets user and group of a pipe or socket. Returns whether the kernel allows that.
fn set_owner(fd: impl AsFd, (uid, gid): (u32, u32)) -> nix::Result<bool> {
    match fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))) {
        Err(Errno::EPERM) => Ok(false),
        result => result.map(|()| true),
    }
}

/// Calls `make` with the file system user and group ids of the owner of a description, as far
/// as rcriu may take them.
///
/// `make` runs in a thread of its own, so the calling thread keeps its ids.
pub(super) fn as_owner<T: Send>(id: u32, opened: &Opened, make: impl FnOnce() -> T + Send) -> T {
    let own = (geteuid().as_raw(), getegid().as_raw());
    match of(id, opened).filter(|owner| *owner != own) {
        Some(owner) => with_file_ids(owner, make),
        None => make(),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use nix::{
        sys::prctl::{get_dumpable, set_dumpable},
        unistd::{pipe, setfsuid},
    };

    use super::*;

    #[test]
    fn privileged_an_owner_that_may_not_be_set_is_no_error() {
        const NOBODY: u32 = 65534;
        if !geteuid().is_root() {
            crate::skip::skip("root");
        }
        assert_eq!(set_owner(pipe().unwrap().0, (NOBODY, NOBODY)), Ok(true));
        let dumpable = get_dumpable().unwrap();
        let denied = thread::spawn(|| {
            // The thread loses the capability to set owners with the file system user.
            setfsuid(Uid::from_raw(NOBODY));
            set_owner(pipe().unwrap().0, (0, 0))
        });
        assert_eq!(denied.join().unwrap(), Ok(false));
        set_dumpable(dumpable).unwrap();
    }
}
