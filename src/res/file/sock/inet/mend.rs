//! Repairs TCP connections after a dump was killed while it read them.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::{
    libc,
    sys::socket::{getpeername, getsockname},
};

use super::{address, lock, repair};
use crate::{
    causes::tell,
    proc,
    sys::{
        process::{pidfd_getfd, pidfd_open},
        socket,
        supervise::LeftoverRepairs,
    },
    units::{HostPid, TargetFd},
};

/// Ends the repair mode of all TCP sockets that are open in the processes of a tree, and stops
/// dropping packets for the dump. Reports failures to the user.
pub fn end_repairs(root: HostPid, found: &LeftoverRepairs) {
    let mut held = Vec::new();
    let mut left = vec![root];
    while let Some(pid) = left.pop() {
        for (number, fd) in tcp_sockets(pid) {
            end_repair(pid, number, &fd, found.reuse);
            let own = address(getsockname(fd.as_raw_fd()));
            held.extend(own.zip(address(getpeername(fd.as_raw_fd()))));
        }
        left.extend(proc::children(pid).unwrap_or_default());
    }
    held.sort_unstable();
    held.dedup();
    let rules = if found.rules { lock::lift_rules(&held) } else { Ok(()) };
    let is_alive = proc::stat(root).is_ok_and(|stat| !stat.has_ended());
    // If the tree was killed, a restore removes the table.
    let table = found.dump.as_deref().filter(|_| is_alive).map_or(Ok(()), lock::lift);
    for error in [rules, table].into_iter().filter_map(Result::err) {
        let what = format!("packets of the tree's connections are held back: {error}");
        tell(log::Level::Error, &what);
    }
}

/// Returns duplicates of the TCP sockets of a process.
fn tcp_sockets(pid: HostPid) -> Vec<(TargetFd, OwnedFd)> {
    let Ok(process) = pidfd_open(pid) else { return Vec::new() };
    let numbers = proc::fds(pid).unwrap_or_default().into_iter();
    let sockets = numbers.filter_map(|number| Some((number, pidfd_getfd(&process, number).ok()?)));
    sockets.filter(|(_, fd)| repair::is_on(fd.as_fd()).is_ok()).collect()
}

fn end_repair(pid: HostPid, number: TargetFd, fd: &OwnedFd, reuse: Option<u32>) {
    if repair::is_on(fd.as_fd()) != Ok(true) {
        return;
    }
    let ended = repair::end(fd.as_fd()).and_then(|()| {
        let set =
            |reuse| socket::set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, &reuse);
        reuse.map_or(Ok(()), set)
    });
    match ended {
        Ok(()) => log::debug!("process {pid}, descriptor {number}: repair was ended"),
        Err(errno) => {
            let what = format!("descriptor {number} of process {pid} sends nothing: {errno}");
            tell(log::Level::Error, &what);
        }
    }
}
