//! How a dump finds the pagers of a tree: by abstract socket names, one for each process.
//!
//! A pager binds a name for each process that it works for. No connection is ever accepted; a dump
//! connects and waits until the kernel closes the connection, which is when the pager ends.

use std::{
    io::{self, Read},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
};

use super::{LazyError, NAME, Result};
use crate::{proc, units::HostPid};

/// Returns the name for a process; `None` if it has ended.
fn address(pid: HostPid) -> Option<SocketAddr> {
    let namespace = proc::namespace(HostPid::own(), "pid").ok()?;
    let start = proc::stat(pid).ok()?.start_time;
    SocketAddr::from_abstract_name(format!("{NAME}/{namespace}/{pid}/{start}")).ok()
}

/// Lets dumps of a process find this pager; `None` if the process has ended.
///
/// # Errors
/// `EADDRINUSE` if it has a pager already.
pub(super) fn offer(pid: HostPid) -> io::Result<Option<UnixListener>> {
    address(pid).map(|address| UnixListener::bind_addr(&address)).transpose()
}

/// Waits until all pages of the tree below `root` are there: until the pagers of its processes have
/// ended. Calls `tell` with each process that it waits for.
///
/// # Errors
/// [`LazyError::Pager`].
pub fn await_pagers(root: HostPid, tell: &mut dyn FnMut(HostPid)) -> Result<()> {
    // A process that was forked meanwhile has the pager of its parent, and is found when that has ended.
    while let Some((pid, stream)) = first_pager(root) {
        tell(pid);
        wait(stream).map_err(LazyError::pager("wait until all memory is there"))?;
    }
    Ok(())
}

/// Returns a process of the tree that has a pager, and the connection with it.
fn first_pager(root: HostPid) -> Option<(HostPid, UnixStream)> {
    let mut left = vec![root];
    while let Some(pid) = left.pop() {
        let connected = address(pid).map(|address| UnixStream::connect_addr(&address));
        if let Some(Ok(stream)) = connected {
            return Some((pid, stream));
        }
        left.extend(proc::children(pid).unwrap_or_default());
    }
    None
}

fn wait(mut stream: UnixStream) -> io::Result<()> {
    match stream.read(&mut [0]) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        result => result.map(drop),
    }
}
