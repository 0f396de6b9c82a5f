//! Signal-driven I/O: which process receives signals for a descriptor (`F_SETOWN`, `F_SETSIG`,
//! `O_ASYNC`).

use std::os::fd::BorrowedFd;

use nix::libc;

use super::descriptor;
use crate::{
    image::proto,
    inject::Script,
    sys::fds,
    units::{HostId, HostPid, LocalPid, NsPid, PidMap, TargetFd},
};

/// `F_SETSIG` and `F_SETOWN_EX` (`include/uapi/asm-generic/fcntl.h`).
const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;

/// Reads the signal owner of a descriptor, which has the status flags `flags`.
pub fn read(fd: BorrowedFd, flags: u32, pids: &PidMap) -> nix::Result<proto::FownEntry> {
    let mut entry = proto::FownEntry::default();
    if descriptor::is_path(flags) {
        return Ok(entry);
    }
    let (owner, signal) = fds::owner(fd)?;
    entry.signum = signal;
    if owner.pid != HostPid(0) {
        [entry.uid, entry.euid] =
            fds::owner_uids(fd)?.map(|user| pids.ids().ns_user(HostId(user)).0);
        entry.pid_type = owner.kind.cast_unsigned();
        entry.pid = pids.ns(owner.pid).image();
    }
    Ok(entry)
}

/// Returns the signal owner and the status flags in an entry of `files.img`, if its kind has them.
pub fn of(entry: &proto::FileEntry) -> Option<(&proto::FownEntry, u32)> {
    macro_rules! first {
        ($($field:ident),*) => {
            $(if let Some(inner) = &entry.$field {
                return Some((&inner.fown, inner.flags));
            })*
        };
    }
    first!(reg, isk, psk, nlsk, efd, epfd, sgfd, tfd, ify, ffy, usk, pipe, tty, memfd, bpf, pidfd);
    None
}

/// Adds the calls that set the signal owner of `fd`. `local` returns the number of a process for calls of
/// the calling process.
///
/// The owner must exist. The calling process must have its user ids: the kernel sends the
/// signals with them.
pub fn install(
    fown: &proto::FownEntry,
    flags: u32,
    (fd, local): (TargetFd, &dyn Fn(NsPid) -> Option<LocalPid>),
    script: &mut Script,
) {
    let fcntl = libc::SYS_fcntl;
    if fown.signum != 0 {
        let arguments = [fd.0.into(), F_SETSIG.into(), fown.signum.into()];
        script.call("set the signal of a descriptor", fcntl, &arguments);
    }
    let owner = if fown.pid == 0 { None } else { local(NsPid::of_image(fown.pid)) };
    if fown.pid != 0 && owner.is_none() {
        log::warn!(
            "descriptor {} may have lost its signal owner {}, which has no number in the pid namespace of the \
             process",
            fd.0,
            fown.pid
        );
    }
    if let Some(owner) = owner {
        // `struct f_owner_ex`, with a pid of the process's own namespace.
        let owner = [fown.pid_type.cast_signed(), owner.raw()];
        let bytes: Vec<u8> = owner.into_iter().flat_map(i32::to_ne_bytes).collect();
        let owner = script.bytes(&bytes);
        let arguments = [fd.0.into(), F_SETOWN_EX.into(), owner.into()];
        script.call("set the owner of a descriptor", fcntl, &arguments);
    }
    if flags.cast_signed() & libc::O_ASYNC != 0 {
        let settable =
            libc::O_ASYNC | libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME;
        let flags = flags.cast_signed() & settable;
        let arguments = [fd.0.into(), libc::F_SETFL.into(), flags.into()];
        script.call("set the flags of a descriptor", fcntl, &arguments);
    }
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsFd, unix::net::UnixStream};

    use super::*;

    #[test]
    fn the_owner_of_a_socket_is_read_and_restored() {
        let pids = PidMap::of_own_namespace();
        let (socket, _peer) = UnixStream::pair().unwrap();
        assert_eq!(read(socket.as_fd(), 0, &pids).unwrap(), proto::FownEntry::default());
        let path =
            descriptor::open(&crate::sys::root::Root::own(), b"/", libc::O_PATH.cast_unsigned())
                .unwrap();
        let flags = libc::O_PATH.cast_unsigned();
        assert_eq!(read(path.as_fd(), flags, &pids).unwrap(), proto::FownEntry::default());

        let fown = proto::FownEntry { pid: 1, pid_type: 1, signum: 10, ..Default::default() };
        let local = |pid| Some(LocalPid::in_tree(pid));
        let mut script = Script::new();
        install(&fown, libc::O_ASYNC.cast_unsigned(), (TargetFd(3), &local), &mut script);
        assert_eq!(script.len(), 3);
        let mut script = Script::new();
        install(&proto::FownEntry::default(), 0, (TargetFd(3), &local), &mut script);
        assert!(script.is_empty());
    }
}
