//! Repairs TCP connections after a dump was killed while it read them.

use std::os::fd::AsFd;

use super::{lock, repair};
use crate::{
    causes::tell,
    proc,
    sys::process::{pidfd_getfd, pidfd_open},
    units::HostPid,
};

/// Ends the repair mode of all TCP sockets that are open in the processes of a tree, and stops
/// dropping packets for `dump`. Reports failures to the user.
pub fn end_repairs(root: HostPid, dump: Option<&str>) {
    let mut left = vec![root];
    while let Some(pid) = left.pop() {
        end_repairs_of(pid);
        left.extend(proc::children(pid).unwrap_or_default());
    }
    let is_alive = proc::stat(root).is_ok_and(|stat| !stat.has_ended());
    // If the tree was killed, a restore removes the table.
    if let Some(Err(error)) = dump.filter(|_| is_alive).map(lock::lift) {
        let what = format!("packets of the tree's connections are held back: {error}");
        tell(log::Level::Error, &what);
    }
}

fn end_repairs_of(pid: HostPid) {
    let Ok(process) = pidfd_open(pid) else { return };
    for number in proc::fds(pid).unwrap_or_default() {
        let Ok(fd) = pidfd_getfd(&process, number) else { continue };
        if repair::is_on(fd.as_fd()) != Ok(true) {
            continue;
        }
        match repair::end(fd.as_fd()) {
            Ok(()) => log::debug!("process {pid}, descriptor {number}: repair was ended"),
            Err(errno) => {
                let what = format!("descriptor {number} of process {pid} sends nothing: {errno}");
                tell(log::Level::Error, &what);
            }
        }
    }
}
