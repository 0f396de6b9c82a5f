//! A UNIX socket during a restore, and how it is connected.

use std::{
    collections::{HashMap, VecDeque},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use nix::{
    libc,
    sys::socket::{AddressFamily, SockFlag, SockType, socket as new_socket},
    unistd::write,
};

use super::{
    EXTERNAL, SERVICE,
    name::{self, Keep},
    peer::{self, Caller, Callers},
};
use crate::{
    image::proto,
    res::file::{
        Made, Result,
        owner::Holder,
        sock::{opts::Subject, queue::Packet, state},
    },
    sys::root::Root,
};

/// How a socket is connected. Numbers are indices in the list of sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    /// It is not connected.
    None,
    /// To a socket that is connected to it.
    Mutual(usize),
    /// To a socket that is not connected to it.
    Single(usize),
    /// To a listening socket that has not accepted the connection.
    Waiting(usize),
    /// To a socket that is closed.
    Dead,
    /// A stream, to a socket outside the tree.
    External(usize),
    /// A stream that the caller of the restore has connected.
    Inherited,
}

/// A UNIX socket during a restore.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) entry: Rc<proto::UnixSkEntry>,
    pub(super) restored: Subject,
    pub(super) link: Link,
    /// `None` until the socket is created, and for sockets outside the tree.
    pub(super) fd: Option<Rc<OwnedFd>>,
    /// Whether the caller of the restore has provided `fd`.
    pub(super) is_inherited: bool,
    /// The file it is bound to.
    pub(super) file: Option<OwnedFd>,
    /// The other end, if it will be closed.
    pub(super) partner: Option<OwnedFd>,
    pub(super) queue: VecDeque<Packet>,
    pub(super) state: proto::SkStateEntry,
    pub(super) networks: Rc<Made>,
    /// A process that has it open.
    pub(super) holder: Option<Holder>,
    /// Where its name is looked up, if that is a path.
    pub(super) root: Root,
}

impl Socket {
    pub(super) fn is_external(&self) -> bool {
        self.entry.uflags & EXTERNAL != 0
    }

    /// Whether it leads to the program that has dumped its process.
    pub(super) fn is_service(&self) -> bool {
        self.entry.uflags & SERVICE != 0
    }

    pub(super) fn is_datagram(&self) -> bool {
        self.entry.r#type.cast_signed() == libc::SOCK_DGRAM
    }

    pub(super) fn is_named(&self) -> bool {
        !self.entry.name.is_empty()
    }

    pub(super) fn kind(&self) -> Result<SockType> {
        match self.entry.r#type.cast_signed() {
            libc::SOCK_STREAM => Ok(SockType::Stream),
            libc::SOCK_DGRAM => Ok(SockType::Datagram),
            libc::SOCK_SEQPACKET => Ok(SockType::SeqPacket),
            other => Err(self.restored.wrong(format!("its type is {other}"))),
        }
    }

    pub(super) fn fd(&self) -> Result<BorrowedFd<'_>> {
        self.fd
            .as_ref()
            .map(|fd| fd.as_fd())
            .ok_or_else(|| self.restored.wrong("it was not created"))
    }

    pub(super) fn make(&self) -> Result<OwnedFd> {
        let _visit = self.networks.visit(self.entry.ns_id)?;
        new_socket(AddressFamily::Unix, self.kind()?, SockFlag::SOCK_CLOEXEC, None)
            .map_err(self.restored.failed("create"))
    }

    pub(super) fn make_pair(
        &self,
        by: Option<&Caller>,
        callers: &mut Callers,
    ) -> Result<(OwnedFd, OwnedFd)> {
        let _visit = self.networks.visit(self.entry.ns_id)?;
        callers.pair(by, self.kind()?, &self.restored)
    }

    /// Returns the credentials of a process that has this socket open.
    pub(super) fn caller(&self) -> Option<Caller> {
        let holder = self.holder.as_ref()?;
        Some(Caller { peer: peer::of_holder(holder), instead: None })
    }

    /// Returns the credentials that `socket` shows; if they are unknown, like [`Self::caller`].
    pub(super) fn caller_shown_by(&self, socket: &Socket) -> Option<Caller> {
        let recorded = socket.state.peer.clone().map(|peer| {
            let instead = self.holder.as_ref().map(|holder| holder.pid);
            Caller { peer, instead }
        });
        recorded.or_else(|| self.caller())
    }

    /// Whether the socket has a pending error.
    pub(super) fn has_error(&self) -> bool {
        self.state.error.is_some()
    }

    /// Binds `fd` to the name of this socket.
    pub(super) fn bind(&mut self, fd: &OwnedFd, keep: Keep) -> Result<()> {
        let keep = if self.entry.deleted() { Keep::Not } else { keep };
        self.file = name::bind(fd.as_fd(), &self.entry, keep, &self.restored, &self.root)?;
        Ok(())
    }

    /// Connects `fd` to this socket.
    pub(super) fn connect_from(&self, fd: BorrowedFd, by: &Subject) -> Result<()> {
        let is_elsewhere = !self.root.is_own() && name::is_path(&self.entry.name);
        let dir = self.entry.name_dir.as_deref().or(is_elsewhere.then_some(b"/"));
        let dir = dir.filter(|_| self.is_external());
        let outside = dir.map(|dir| name::open_in(&self.root, dir, &self.entry.name)).transpose();
        let outside = outside.map_err(by.failed("find the peer of"))?;
        let (name, file) = self.address();
        name::connect(fd, name, outside.as_ref().map(AsFd::as_fd).or(file))
            .map_err(by.failed("connect"))
    }

    /// Closes the other end, with unread data if this socket has a pending error.
    pub(super) fn close_peer(&self, partner: Option<OwnedFd>) -> Result<()> {
        if self.has_error() && !self.is_datagram() {
            if partner.is_none() {
                return Err(self
                    .restored
                    .wrong("it has a pending error, but its peer is not closed"));
            }
            write(self.fd()?, b"x").map_err(self.restored.failed("leave an error in"))?;
        }
        Ok(())
    }

    /// Returns its name and its file.
    pub(super) fn address(&self) -> (&[u8], Option<BorrowedFd<'_>>) {
        (&self.entry.name, self.file.as_ref().map(AsFd::as_fd))
    }
}

/// Returns the name of a socket in `--inherit-fd`, as CRIU has it.
pub(super) fn key(entry: &proto::UnixSkEntry) -> String {
    format!("socket:[{}]", entry.ino)
}

/// Returns in words that a restore needs a socket of the caller in place of this one.
fn needs_socket(entry: &proto::UnixSkEntry) -> String {
    format!(
        "its peer, socket [{}], was outside the tree\nhelp: provide a connected socket with \
         --inherit-fd 'fd[N]:{}'",
        entry.peer,
        key(entry)
    )
}

/// Returns how a socket is connected, according to its entry and that of its peer.
pub(super) fn link(all: &[Socket], at: usize, by_inode: &HashMap<u32, usize>) -> Result<Link> {
    let socket = &all[at];
    let entry = &socket.entry;
    if socket.is_inherited {
        return Ok(Link::Inherited);
    }
    if socket.is_service() {
        return Ok(Link::Dead);
    }
    if entry.peer == 0 || socket.is_external() {
        // A datagram socket also counts as connected if others are connected to it by name. So
        // one without a name has had a peer of its own.
        let dead = entry.state == state::ESTABLISHED
            && !socket.is_external()
            && !(socket.is_datagram() && socket.is_named());
        return Ok(if dead { Link::Dead } else { Link::None });
    }
    let needs_socket = || socket.restored.wrong(needs_socket(entry));
    let peer = *by_inode.get(&entry.peer).ok_or_else(needs_socket)?;
    if all[peer].is_inherited {
        return Err(needs_socket());
    }
    if all[peer].is_external() {
        return match (all[peer].is_named(), socket.is_datagram()) {
            (false, _) => Err(needs_socket()),
            (true, true) => Ok(Link::Single(peer)),
            (true, false) => Ok(Link::External(peer)),
        };
    }
    let other = &all[peer].entry;
    if other.r#type != entry.r#type {
        return Err(socket.restored.wrong(format!("its peer [{}] has another type", entry.peer)));
    }
    if other.peer == entry.ino {
        return Ok(Link::Mutual(peer));
    }
    if socket.is_datagram() {
        return Ok(Link::Single(peer));
    }
    if other.state == state::LISTEN {
        return Ok(Link::Waiting(peer));
    }
    Err(socket.restored.wrong(format!("its peer [{}] is not connected to it", entry.peer)))
}
