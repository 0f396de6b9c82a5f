//! Restores UNIX sockets.
//!
//! All of them at once, in this order. Anything may be in their queues, so that all
//! other files are opened between 2 and 3.
//!
//! 1. sockets that nothing else is needed for are made and bound, and listen;
//! 2. connected pairs are made: by `socketpair(2)`, or, if an end has a name, by
//!    connecting to a listening socket of that name, so that both ends show it;
//! 3. datagram sockets are connected, each only after those that are connected to it:
//!    a datagram socket that is connected accepts none but its peer;
//! 4. queues are filled, by the socket that could have sent what is in them;
//! 5. connections are made that wait to be accepted;
//! 6. options are set, directions are shut down, and flags set.
//!
//! Sockets whose peers have gone get a peer that goes; but a datagram socket with a name
//! has none afterwards, because images do not tell that from never having had one.

use std::{
    collections::{HashMap, VecDeque},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    rc::Rc,
};

use nix::{
    libc,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, listen, shutdown, socket, socketpair,
    },
};

use super::{
    FileError, Opened, Opener, Policy, Result,
    sock_opts::{self, Restored},
    sock_queue::{self, Packet},
    unix::{EXTERNAL, kind_name, state},
    unix_name::{self, Keep},
};
use crate::{image::proto, inject::Script, units::TargetFd};

/// Restores UNIX sockets.
#[derive(Debug, Default)]
pub(super) struct UnixOpener {
    sockets: Sockets,
}

impl Opener for UnixOpener {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        self.sockets = Sockets::new(entries, opened)?;
        self.sockets.make_lone(&opened.policy)?;
        self.sockets.make_pairs()?;
        for socket in &self.sockets.all {
            if let (false, Some(fd)) = (socket.is_external(), &socket.fd) {
                let copy = fd.try_clone();
                let copy = copy.map_err(|error| socket.restored.failed("duplicate")(io(&error)))?;
                opened.insert(socket.entry.id, copy);
            }
        }
        Ok(())
    }

    fn fill(&mut self, opened: &Opened) -> Result<()> {
        let mut sockets = std::mem::take(&mut self.sockets);
        sockets.connect_datagrams(opened)?;
        sockets.fill_streams(opened)?;
        sockets.connect_waiting()?;
        sockets.set_up()
    }

    /// `SO_PEERCRED` shows clients who called `listen(2)` last.
    fn install(
        &mut self,
        entry: &proto::FileEntry,
        fd: TargetFd,
        script: &mut Script,
    ) -> Result<()> {
        let listening = entry.usk.as_ref().filter(|entry| entry.state == state::LISTEN);
        if let Some(entry) = listening.filter(|entry| entry.uflags & EXTERNAL == 0) {
            let arguments = [fd.0.into(), entry.backlog.into()];
            script.call("listen on a UNIX socket", libc::SYS_listen, &arguments);
        }
        Ok(())
    }
}

/// How a socket is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
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
struct Socket {
    entry: Rc<proto::UnixSkEntry>,
    restored: Restored,
    link: Link,
    /// `None` until it is made, and for external ones.
    fd: Option<OwnedFd>,
    /// The file it is bound to.
    file: Option<OwnedFd>,
    /// The other end, where that is to go.
    partner: Option<OwnedFd>,
    queue: VecDeque<Packet>,
}

impl Socket {
    fn is_external(&self) -> bool {
        self.entry.uflags & EXTERNAL != 0
    }

    fn is_datagram(&self) -> bool {
        self.entry.r#type.cast_signed() == libc::SOCK_DGRAM
    }

    fn is_named(&self) -> bool {
        !self.entry.name.is_empty()
    }

    fn kind(&self) -> Result<SockType> {
        match self.entry.r#type.cast_signed() {
            libc::SOCK_STREAM => Ok(SockType::Stream),
            libc::SOCK_DGRAM => Ok(SockType::Datagram),
            libc::SOCK_SEQPACKET => Ok(SockType::SeqPacket),
            other => Err(self.restored.wrong(format!("its type is {other}"))),
        }
    }

    fn fd(&self) -> Result<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd).ok_or_else(|| self.restored.wrong("it was not made"))
    }

    fn make(&self) -> Result<OwnedFd> {
        socket(AddressFamily::Unix, self.kind()?, SockFlag::SOCK_CLOEXEC, None)
            .map_err(self.restored.failed("create"))
    }

    fn make_pair(&self) -> Result<(OwnedFd, OwnedFd)> {
        socketpair(AddressFamily::Unix, self.kind()?, None, SockFlag::SOCK_CLOEXEC)
            .map_err(self.restored.failed("create"))
    }

    /// Gives `fd` the name of this socket.
    fn bind(&mut self, fd: &OwnedFd, keep: Keep) -> Result<()> {
        let keep = if self.entry.deleted() { Keep::Not } else { keep };
        self.file = unix_name::bind(fd.as_fd(), &self.entry, keep, &self.restored)?;
        Ok(())
    }

    /// Connects `fd` to this socket.
    fn accept_from(&self, fd: BorrowedFd, by: &Restored) -> Result<()> {
        let file = self.file.as_ref().map(AsFd::as_fd);
        unix_name::connect(fd, &self.entry.name, file).map_err(by.failed("connect"))
    }
}

/// All sockets of the images.
#[derive(Debug, Default)]
struct Sockets {
    all: Vec<Socket>,
}

impl Sockets {
    fn new(entries: &[proto::FileEntry], opened: &Opened) -> Result<Self> {
        let mut queues = sock_queue::read(&opened.images)?;
        let mut all = Vec::new();
        for entry in entries {
            let missing = || FileError::Image {
                id: entry.id,
                problem: "it is a UNIX socket without unix_sk_entry".into(),
            };
            let entry = entry.usk.as_ref().ok_or_else(missing)?;
            // Whoever restores may have put another socket in its place.
            if opened.contains(entry.id) {
                continue;
            }
            let object = format!(
                "the UNIX {} socket [{}] ({})",
                kind_name(entry.r#type),
                entry.ino,
                unix_name::display(&entry.name)
            );
            all.push(Socket {
                entry: Rc::new(entry.clone()),
                restored: Restored { id: entry.id, object },
                link: Link::None,
                fd: None,
                file: None,
                partner: None,
                queue: queues.remove(&entry.id).unwrap_or_default(),
            });
        }
        let by_inode: HashMap<u32, usize> =
            all.iter().enumerate().map(|(at, socket)| (socket.entry.ino, at)).collect();
        for at in 0..all.len() {
            all[at].link = link(&all, at, &by_inode)?;
        }
        Ok(Self { all })
    }

    /// Makes the sockets that are not one end of a connected pair.
    fn make_lone(&mut self, policy: &Policy) -> Result<()> {
        // What has lost its name first, so that it is out of the way of what has it now.
        let mut order: Vec<usize> = (0..self.all.len()).collect();
        order.sort_by_key(|at| !self.all[*at].entry.deleted());
        for at in order {
            let socket = &self.all[at];
            if socket.is_external() {
                if !policy.ext_unix_sk {
                    let problem = "it is of a program that was not dumped; use --ext-unix-sk";
                    return Err(socket.restored.wrong(problem));
                }
                continue;
            }
            let (fd, partner) = match socket.link {
                Link::None | Link::Single(_) | Link::Waiting(_) => (socket.make()?, None),
                Link::Dead if socket.is_datagram() => {
                    let (fd, partner) = socket.make_pair()?;
                    (fd, Some(partner))
                }
                // Each is connected by its peer's name.
                Link::Mutual(peer)
                    if socket.is_datagram()
                        && (peer == at || socket.is_named() && self.all[peer].is_named()) =>
                {
                    (socket.make()?, None)
                }
                Link::Mutual(_) | Link::Dead => continue,
            };
            let socket = &mut self.all[at];
            socket.bind(&fd, Keep::Replacing)?;
            if socket.entry.state == state::LISTEN {
                let backlog = socket.entry.backlog.cast_signed().clamp(0, i32::from(i16::MAX));
                let backlog = Backlog::new(backlog).unwrap_or(Backlog::MAXCONN);
                listen(&fd, backlog).map_err(socket.restored.failed("listen on"))?;
            }
            (socket.fd, socket.partner) = (Some(fd), partner);
        }
        Ok(())
    }

    /// Makes pairs that are connected to each other, and ends whose other one is gone.
    fn make_pairs(&mut self) -> Result<()> {
        for at in 0..self.all.len() {
            if self.all[at].fd.is_some() || self.all[at].is_external() {
                continue;
            }
            let peer = match self.all[at].link {
                Link::Mutual(peer) => Some(peer),
                _ => None,
            };
            if self.all[at].is_datagram() {
                let (mine, other) = self.all[at].make_pair()?;
                self.all[at].bind(&mine, Keep::Replacing)?;
                self.all[at].fd = Some(mine);
                if let Some(peer) = peer {
                    self.all[peer].bind(&other, Keep::Replacing)?;
                    self.all[peer].fd = Some(other);
                }
                continue;
            }
            // The end that was accepted has the name of the socket that did it.
            let accepted = self.accepted(at, peer);
            let (mine, other) = match accepted {
                None => self.all[at].make_pair()?,
                Some(end) if end == at => self.connect_and_accept(at, peer)?,
                Some(end) => {
                    let (mine, other) = self.connect_and_accept(end, Some(at))?;
                    (other, mine)
                }
            };
            self.all[at].fd = Some(mine);
            match peer {
                Some(peer) => self.all[peer].fd = Some(other),
                None => self.all[at].partner = Some(other),
            }
        }
        Ok(())
    }

    /// Returns which of both ends is taken for the one that was accepted; `None` if
    /// none has a name.
    fn accepted(&self, at: usize, peer: Option<usize>) -> Option<usize> {
        let named =
            || [Some(at), peer].into_iter().flatten().filter(|end| self.all[*end].is_named());
        named().find(|end| self.listener_of(*end).is_some()).or_else(|| named().next())
    }

    /// Returns the listening socket that has the name of this end of a connection.
    fn listener_of(&self, end: usize) -> Option<usize> {
        let wanted = &self.all[end].entry;
        self.all.iter().position(|socket| {
            let entry = &socket.entry;
            entry.state == state::LISTEN
                && socket.fd.is_some()
                && (entry.r#type, &entry.name, &entry.name_dir)
                    == (wanted.r#type, &wanted.name, &wanted.name_dir)
        })
    }

    /// Makes a pair one end of which was accepted; returns that one first.
    fn connect_and_accept(
        &mut self,
        accepted: usize,
        peer: Option<usize>,
    ) -> Result<(OwnedFd, OwnedFd)> {
        let caller = self.all[accepted].make()?;
        if let Some(peer) = peer {
            self.all[peer].bind(&caller, Keep::Replacing)?;
        }
        let by = self.all[accepted].restored.clone();
        let listener = match self.listener_of(accepted) {
            Some(listener) => {
                self.all[listener].accept_from(caller.as_fd(), &by)?;
                let fd = self.all[listener].fd()?;
                fd.try_clone_to_owned()
                    .map_err(|error| by.failed("duplicate a socket for")(io(&error)))?
            }
            None => {
                let socket = &mut self.all[accepted];
                let listener = socket.make()?;
                socket.bind(&listener, Keep::Yielding)?;
                listen(&listener, Backlog::new(1).unwrap_or(Backlog::MAXCONN))
                    .map_err(by.failed("listen for"))?;
                socket.accept_from(caller.as_fd(), &by)?;
                listener
            }
        };
        let (end, _) = UnixListener::from(listener)
            .accept()
            .map_err(|error| by.failed("accept")(io(&error)))?;
        Ok((end.into(), caller))
    }

    /// Connects datagram sockets and fills their queues.
    fn connect_datagrams(&mut self, opened: &Opened) -> Result<()> {
        let datagrams = |socket: &Socket| socket.is_datagram() && !socket.is_external();
        let is_made_by_pair = |sockets: &Self, at: usize, peer: usize| {
            peer != at && !(sockets.all[at].is_named() && sockets.all[peer].is_named())
        };
        // Which socket connects to which.
        let mut edges: Vec<(usize, usize)> = Vec::new();
        for (at, socket) in self.all.iter().enumerate().filter(|(_, socket)| datagrams(socket)) {
            match socket.link {
                Link::Single(peer) => edges.push((at, peer)),
                Link::Mutual(peer) if !is_made_by_pair(self, at, peer) => edges.push((at, peer)),
                _ => {}
            }
        }
        while !edges.is_empty() {
            let is_free = |(at, peer): &(usize, usize)| {
                edges.iter().all(|(from, to)| to != at || from == at || peer == from)
            };
            let position = edges.iter().position(is_free).ok_or_else(|| {
                self.all[edges[0].0].restored.wrong("it is in a circle of connections")
            })?;
            let (at, peer) = edges.remove(position);
            if !matches!(self.all[at].link, Link::Mutual(_)) {
                self.fill_datagram(at, opened)?;
            }
            let socket = &self.all[at];
            self.all[peer].accept_from(socket.fd()?, &socket.restored)?;
        }
        for at in 0..self.all.len() {
            if datagrams(&self.all[at]) {
                self.fill_datagram(at, opened)?;
                self.all[at].partner = None;
            }
        }
        Ok(())
    }

    /// Sends a datagram socket what was queued in it, if that has not been done.
    fn fill_datagram(&mut self, at: usize, opened: &Opened) -> Result<()> {
        let queue = std::mem::take(&mut self.all[at].queue);
        if queue.is_empty() {
            return Ok(());
        }
        let socket = &self.all[at];
        let caller = || self.all.iter().find(|other| other.link == Link::Single(at));
        let sender = match (socket.link, &socket.partner) {
            (_, Some(partner)) => Some(partner.as_fd()),
            (Link::Mutual(peer), None) => Some(self.all[peer].fd()?),
            _ => caller().map(Socket::fd).transpose()?,
        };
        if let Some(sender) = sender {
            return self.send(sender, queue, at, opened);
        }
        if !socket.is_named() {
            return Err(socket.restored.wrong("its queue is not empty, but nobody can reach it"));
        }
        let sender = socket.make()?;
        socket.accept_from(sender.as_fd(), &socket.restored)?;
        self.send(sender.as_fd(), queue, at, opened)
    }

    fn send(
        &self,
        sender: BorrowedFd,
        queue: VecDeque<Packet>,
        to: usize,
        opened: &Opened,
    ) -> Result<()> {
        let lookup = |id: u32| opened.get(id).map(|fd| fd.as_raw_fd());
        sock_queue::send(sender, queue, &self.all[to].restored, &lookup)
    }

    /// Fills the queues of connected sockets that are no datagram sockets.
    fn fill_streams(&mut self, opened: &Opened) -> Result<()> {
        for at in 0..self.all.len() {
            let partner = self.all[at].partner.take();
            let queue = std::mem::take(&mut self.all[at].queue);
            if queue.is_empty() {
                continue;
            }
            let socket = &self.all[at];
            let sender = match (&partner, socket.link) {
                (Some(partner), _) => partner.as_fd(),
                (None, Link::Mutual(peer)) => self.all[peer].fd()?,
                _ => {
                    let problem = "its queue is not empty, but it is not connected";
                    return Err(socket.restored.wrong(problem));
                }
            };
            self.send(sender, queue, at, opened)?;
        }
        Ok(())
    }

    fn connect_waiting(&self) -> Result<()> {
        for socket in &self.all {
            if let Link::Waiting(listener) = socket.link {
                self.all[listener].accept_from(socket.fd()?, &socket.restored)?;
            }
        }
        Ok(())
    }

    fn set_up(&self) -> Result<()> {
        for socket in &self.all {
            let Some(fd) = socket.fd.as_ref().map(AsFd::as_fd) else { continue };
            let (entry, restored) = (&socket.entry, &socket.restored);
            sock_opts::restore(fd, &entry.opts, restored)?;
            let reuse = (entry.opts.reuseaddr, entry.opts.so_reuseport);
            // Newer kernels do not let UNIX sockets have the second.
            sock_opts::restore_reuse(fd, (reuse.0, reuse.1.filter(|on| *on)), restored)?;
            if let Some(how) = sock_opts::how(entry.shutdown) {
                shutdown(fd.as_raw_fd(), how).map_err(restored.failed("shut down"))?;
            }
            sock_opts::restore_flags(fd, entry.flags, restored)?;
        }
        Ok(())
    }
}

fn io(error: &std::io::Error) -> nix::errno::Errno {
    error.raw_os_error().map_or(nix::errno::Errno::EIO, nix::errno::Errno::from_raw)
}

/// Returns how a socket is connected, by what its entry and that of its peer say.
fn link(all: &[Socket], at: usize, by_inode: &HashMap<u32, usize>) -> Result<Link> {
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
