//! Sockets outside the tree, to which sockets of the tree are connected.
//!
//! The dump writes an entry for such a socket (`USK_EXTERN` of CRIU). A restore connects to its
//! name again; or the caller provides a new socket for the tree's end (`--inherit-fd`), which takes
//! the place of the connection. A stream that is connected again is a new connection: the
//! program outside accepts it as such.

use std::{
    ffi::OsStr,
    fs,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
};

use super::{
    EXTERNAL, kind_name, name,
    peer::Callers,
    socket::{Link, Socket, key},
};
use crate::{
    image::proto,
    proc,
    res::file::{
        FileError, Opened, Result,
        sock::{
            diag,
            opts::{self, Subject},
            state,
        },
    },
    units::HostPid,
};

/// Returns the entry of a socket outside the tree. `client` is a process of the tree that has the
/// other end.
pub(super) fn entry(socket: &diag::UnixSocket, client: HostPid) -> proto::UnixSkEntry {
    proto::UnixSkEntry {
        ino: socket.inode,
        r#type: socket.kind.into(),
        state: state::LISTEN,
        name: socket.name.clone(),
        name_dir: directory(socket, client),
        uflags: EXTERNAL,
        ..proto::UnixSkEntry::default()
    }
}

/// Returns the directory to which the name of a socket is relative: the working directory of its
/// client, if the name leads to the socket from there.
fn directory(socket: &diag::UnixSocket, client: HostPid) -> Option<Vec<u8>> {
    let path = socket.name.strip_suffix(b"\0").unwrap_or(&socket.name);
    if path.first().is_none_or(|first| matches!(first, 0 | b'/')) {
        return None;
    }
    let cwd = PathBuf::from(format!("/proc/{client}/cwd"));
    let found = fs::metadata(cwd.join(Path::new(OsStr::from_bytes(path)))).ok()?;
    let same = socket.file.is_some_and(|(inode, _)| u64::from(inode) == found.ino());
    same.then(|| fs::read_link(cwd).ok().map(|dir| dir.into_os_string().into_encoded_bytes()))?
}

/// Returns in words which process has a socket that is not open in the tree.
pub(super) fn place(inode: u32) -> String {
    let link = format!("socket:[{inode}]").into_bytes();
    let has_it = |pid: &HostPid| {
        let fds = proc::fds(*pid).unwrap_or_default();
        fds.into_iter().any(|fd| proc::fd_link(*pid, fd).is_ok_and(|found| found == link))
    };
    let found = proc::pids().unwrap_or_default().into_iter().find(has_it);
    let Some(pid) = found else {
        return format!("the socket [{inode}] is not open in the tree, nor in another process");
    };
    let name = proc::comm(pid, pid).unwrap_or_default();
    let name = String::from_utf8_lossy(&name);
    format!("the socket [{inode}] is not open in the tree, but in process {pid} ({name})")
}

/// Returns the descriptor that the caller provides for a socket, if any.
///
/// # Errors
/// [`FileError::Image`] if it is not a UNIX socket of the same
/// type.
pub(super) fn inherited(
    entry: &proto::UnixSkEntry,
    opened: &Opened,
    restored: &Subject,
) -> Result<Option<OwnedFd>> {
    let given = opened.inherited.duplicate(key(entry).as_bytes());
    let Some(given) = given.map_err(restored.failed("inherit"))? else { return Ok(None) };
    let found = opts::family(given.as_fd()).and_then(|family| {
        let kind = opts::kind(given.as_fd())?;
        Ok((family, kind))
    });
    if found == Ok((libc::AF_UNIX, entry.r#type.cast_signed())) {
        return Ok(Some(given));
    }
    let kind = kind_name(entry.r#type);
    Err(restored.wrong(format!("the descriptor of --inherit-fd is not a UNIX {kind} socket")))
}

/// Warns about data that a socket with a new peer cannot receive again.
pub(super) fn warn_of_queue(socket: &Socket) {
    let bytes: usize = socket.queue.iter().map(|packet| packet.data.len()).sum();
    if !socket.queue.is_empty() {
        log::warn!(
            "{}: {bytes} bytes that its process has not read are lost: its peer is outside the \
             tree",
            socket.restored.object
        );
    }
}

/// Connects streams to listening sockets outside the tree. Does not wait for room in their
/// backlogs.
pub(super) fn connect(all: &[Socket], callers: &mut Callers) -> Result<()> {
    for socket in all {
        let Link::External(peer) = socket.link else { continue };
        let peer = &all[peer];
        let fd = socket.fd()?;
        fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(socket.restored.failed("set the flags of"))?;
        let shown = name::display(&peer.entry.name);
        let outside = || Subject {
            id: socket.restored.id,
            object: format!("{} to {shown}, outside the tree", socket.restored.object),
        };
        let dir = peer.entry.name_dir.as_deref();
        let file = dir.map(|dir| name::open_in(&peer.root, dir, &peer.entry.name)).transpose();
        let file = file.map_err(outside().failed("find the peer of"))?;
        let address = (peer.entry.name.as_slice(), file.as_ref().map(AsFd::as_fd));
        callers
            .connect(socket.caller().as_ref(), fd, address, &outside())
            .map_err(|error| no_peer(error, socket, peer))?;
        log::warn!(
            "{}: connected to {shown} again: the program there sees a new connection",
            socket.restored.object
        );
    }
    Ok(())
}

/// Returns the error for a socket that cannot be connected to its peer, if that is outside the tree.
pub(super) fn no_peer(error: FileError, of: &Socket, peer: &Socket) -> FileError {
    match error {
        FileError::Restore { source: Errno::ENOENT | Errno::ECONNREFUSED, .. }
            if peer.is_external() =>
        {
            of.restored.wrong(format!(
                "no program has a socket at {}, to which it was connected\nhelp: start the program, \
                 or provide a connected socket with --inherit-fd 'fd[N]:{}'",
                name::display(&peer.entry.name),
                key(&of.entry)
            ))
        }
        other => other,
    }
}
