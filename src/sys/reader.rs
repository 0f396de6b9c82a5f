//! Reading files with the rights of another user, in one thread.

use std::io;

use nix::{
    errno::Errno,
    unistd::{Gid, Uid, getegid, geteuid, setfsgid, setfsuid, setgroups},
};

/// The group of files that have none here (`fs.overflowgid`); no user is in it.
const NO_GROUP: u32 = 65534;

/// A user with whose rights files are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reader(pub u32);

impl Reader {
    /// Opens files from here on with the rights of this user, and of no group: in this
    /// thread and those that it starts. Only root can, in a process of one thread, whose
    /// other groups are given up for good.
    ///
    /// Of all privileges, only those that have to do with files are put aside
    /// (`credentials(7)`, `capabilities(7)`).
    ///
    /// # Errors
    /// What the system calls return.
    pub fn assume(self) -> io::Result<()> {
        setgroups(&[])?;
        take(Uid::from_raw(self.0), Gid::from_raw(NO_GROUP))
    }

    /// Opens files with the process's own rights again, in this thread.
    ///
    /// # Errors
    /// What the system calls return.
    pub fn put_off() -> io::Result<()> {
        take(geteuid(), getegid())
    }
}

fn take(uid: Uid, gid: Gid) -> io::Result<()> {
    // In this order: without its privileges a thread cannot take another group. These
    // calls report no errors, but what was before; -1 changes nothing.
    let nobody = u32::MAX;
    let current_uid = || setfsuid(Uid::from_raw(nobody));
    if current_uid() != geteuid() {
        setfsuid(geteuid());
    }
    setfsgid(gid);
    setfsuid(uid);
    let done = current_uid() == uid && setfsgid(Gid::from_raw(nobody)) == gid;
    if done { Ok(()) } else { Err(Errno::EPERM.into()) }
}
