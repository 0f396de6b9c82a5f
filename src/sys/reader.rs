//! Opens files with the rights of another user, in one thread.

use std::io;

use nix::{
    errno::Errno,
    unistd::{Gid, Uid, getegid, geteuid, setfsgid, setfsuid, setgroups},
};

/// The group id shown for files of unmapped groups (`fs.overflowgid`); no user is a member.
const NO_GROUP: u32 = 65534;

/// A user whose rights are used to open files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reader(pub u32);

impl Reader {
    /// From now on, this thread and those that it starts open files with the rights of this user,
    /// and of no group. Only root can do this, in a process with one thread, which loses its
    /// supplementary groups for good.
    ///
    /// The thread loses only the privileges that concern files (`credentials(7)`,
    /// `capabilities(7)`).
    pub fn assume(self) -> io::Result<()> {
        setgroups(&[])?;
        take(Uid::from_raw(self.0), Gid::from_raw(NO_GROUP))
    }

    /// Gives this thread the process's own rights again.
    pub fn put_off() -> io::Result<()> {
        take(geteuid(), getegid())
    }
}

fn take(uid: Uid, gid: Gid) -> io::Result<()> {
    // Set the group first: it needs privileges that the user change drops. These calls report no
    // errors, but the previous id; -1 changes nothing.
    let unchanged = u32::MAX;
    let current_uid = || setfsuid(Uid::from_raw(unchanged));
    if current_uid() != geteuid() {
        setfsuid(geteuid());
    }
    setfsgid(gid);
    setfsuid(uid);
    let done = current_uid() == uid && setfsgid(Gid::from_raw(unchanged)) == gid;
    if done { Ok(()) } else { Err(Errno::EPERM.into()) }
}
