//! A UNIX socket while it is restored, and how it is connected.

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
    EXTERNAL,
    name::{self, Keep},
    peer::{self, Caller, Callers},
};
use crate::{
    image::proto,
    res::file::{
        Result,
        owner::Holder,
        sock::{opts::Subject, queue::Packet, state},
    },
};

/// How a socket is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    /// Not at all.
    None,
    /// To a socket that is connected to it.
    Mutual(usize),
    /// To a socket that is not.
    Single(usize),
    /// To the listening socket, which has not accepted it.
    Waiting(usize),
    /// To one that is gone.
    Dead,
}

/// A socket while it is restored.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) entry: Rc<proto::UnixSkEntry>,
    pub(super) restored: Subject,
    pub(super) link: Link,
    /// `None` until it is made, and for external ones.
    pub(super) fd: Option<OwnedFd>,
    /// The file it is bound to.
    pub(super) file: Option<OwnedFd>,
    /// The other end, where that is to go.
    pub(super) partner: Option<OwnedFd>,
    pub(super) queue: VecDeque<Packet>,
    pub(super) state: proto::SkStateEntry,
    /// The process that has it.
    pub(super) holder: Option<Holder>,
}

impl Socket {
    pub(super) fn is_external(&self) -> bool {
        self.entry.uflags & EXTERNAL != 0
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
        self.fd.as_ref().map(AsFd::as_fd).ok_or_else(|| self.restored.wrong("it was not made"))
    }

    pub(super) fn make(&self) -> Result<OwnedFd> {
        new_socket(AddressFamily::Unix, self.kind()?, SockFlag::SOCK_CLOEXEC, None)
            .map_err(self.restored.failed("create"))
    }

    pub(super) fn make_pair(
        &self,
        by: Option<&Caller>,
        callers: &mut Callers,
    ) -> Result<(OwnedFd, OwnedFd)> {
        callers.pair(by, self.kind()?, &self.restored)
    }

    /// Returns who makes the calls that a process that has this socket would make.
    pub(super) fn caller(&self) -> Option<Caller> {
        let holder = self.holder.as_ref()?;
        Some(Caller { peer: peer::of_holder(holder), instead: None })
    }

    /// As [`Self::caller`], but with the credentials that a socket shows if they are known.
    pub(super) fn caller_shown_by(&self, socket: &Socket) -> Option<Caller> {
        let recorded = socket.state.peer.clone().map(|peer| {
            let instead = self.holder.as_ref().map(|holder| holder.pid);
            Caller { peer, instead }
        });
        recorded.or_else(|| self.caller())
    }

    /// Whether its program has an error to read.
    pub(super) fn has_error(&self) -> bool {
        self.state.error.is_some()
    }

    /// Gives `fd` the name of this socket.
    pub(super) fn bind(&mut self, fd: &OwnedFd, keep: Keep) -> Result<()> {
        let keep = if self.entry.deleted() { Keep::Not } else { keep };
        self.file = name::bind(fd.as_fd(), &self.entry, keep, &self.restored)?;
        Ok(())
    }

    /// Connects `fd` to this socket.
    pub(super) fn accept_from(&self, fd: BorrowedFd, by: &Subject) -> Result<()> {
        let (name, file) = self.address();
        name::connect(fd, name, file).map_err(by.failed("connect"))
    }

    /// Lets the other end go, with something that it has not read if there is an error to
    /// be left by that.
    pub(super) fn leave(&self, partner: Option<OwnedFd>) -> Result<()> {
        if self.has_error() && !self.is_datagram() {
            if partner.is_none() {
                return Err(self.restored.wrong("it has an error, but its peer is not gone"));
            }
            write(self.fd()?, b"x").map_err(self.restored.failed("leave an error in"))?;
        }
        Ok(())
    }

    /// Returns its name and the file that it is bound to.
    pub(super) fn address(&self) -> (&[u8], Option<BorrowedFd<'_>>) {
        (&self.entry.name, self.file.as_ref().map(AsFd::as_fd))
    }
}

/// Returns how a socket is connected, by what its entry and that of its peer say.
pub(super) fn link(all: &[Socket], at: usize, by_inode: &HashMap<u32, usize>) -> Result<Link> {
    let socket = &all[at];
    let entry = &socket.entry;
    if entry.peer == 0 || socket.is_external() {
        // A datagram socket counts as connected, too, if others are connected to it. Those
        // need its name, so that one without had a peer of its own.
        let dead = entry.state == state::ESTABLISHED
            && !socket.is_external()
            && !(socket.is_datagram() && socket.is_named());
        return Ok(if dead { Link::Dead } else { Link::None });
    }
    let peer = *by_inode.get(&entry.peer).ok_or_else(|| {
        let problem = format!("the images have no socket [{}], its peer", entry.peer);
        socket.restored.wrong(problem)
    })?;
    let other = &all[peer].entry;
    if other.r#type != entry.r#type {
        return Err(socket.restored.wrong(format!("its peer [{}] is of another type", entry.peer)));
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
