//! Restores UNIX sockets.
//!
//! The restore handles all UNIX sockets together, in this order. Their queues may contain any
//! file, so it opens all other files between steps 2 and 3.
//!
//! 1. Create and bind the sockets that need no other; start listening.
//! 2. Create connected pairs: by `socketpair(2)` or, if an end has a name, by connecting to a
//!    listening socket with that name, so that both ends show it.
//! 3. Connect datagram sockets, each only after those that are connected to it: a connected
//!    datagram socket accepts data only from its peer.
//! 4. Fill the queues, each from a socket that could have sent the data.
//! 5. Make the connections that wait to be accepted.
//! 6. Set options, shut down directions, and set flags.
//!
//! [`super::peer`] makes the calls that give sockets the credentials of their peers. A socket whose
//! peer is closed gets a new peer, which is closed again, with unread data if the socket has a
//! pending error. Only a datagram socket with a name gets none, because images do not tell whether
//! it has ever had a peer.

use std::{
    collections::{HashMap, VecDeque},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixListener,
    },
    rc::Rc,
};

use nix::{libc, sys::socket::shutdown, unistd::write};
use prost::Message;

use super::{
    Options, kind_name,
    name::{self, Keep},
    outside,
    peer::{self, Callers},
    socket::{Link, Socket, link},
    waiting::{self, Unsent},
};
use crate::{
    image::proto::{
        self,
        rpc::{CriuDumpResp, CriuReqType, CriuResp},
    },
    inject::Script,
    res::file::{
        FileError, Opened, Opener, Result, owner,
        sock::{
            attributes,
            opts::{self, Subject},
            queue::{self, Packet},
            state,
        },
    },
    sys::{self, socket},
    units::{NsPid, TargetFd},
};

#[derive(Debug, Default)]
pub(super) struct UnixOpener {
    options: Options,
    sockets: Sockets,
    own: proto::SkPeerEntry,
    /// Sockets for which a process of the tree calls `listen(2)`.
    listening: Vec<Listening>,
}

impl UnixOpener {
    pub(super) fn new(options: Options) -> Self {
        Self { options, ..Self::default() }
    }
}

/// A listening socket that shows its clients a process of the tree.
#[derive(Debug)]
struct Listening {
    id: u32,
    backlog: u32,
    peer: proto::SkPeerEntry,
}

impl Opener for UnixOpener {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        let mut sockets = Sockets::new(entries, opened)?;
        let mut callers = Callers::new(opened)?;
        sockets.make_unpaired(self.options, &mut callers)?;
        sockets.make_pairs(&mut callers)?;
        sockets.unsent = waiting::connect(&mut sockets.all, &mut callers)?;
        outside::connect(&sockets.all, &mut callers)?;
        self.listening = sockets.listen(&mut callers)?;
        self.own = callers.into_own();
        for socket in &mut sockets.all {
            let Some(fd) = socket.fd.take() else { continue };
            if !socket.is_inherited {
                owner::restore(socket.entry.id, &fd, opened)?;
            }
            opened.insert_shared(socket.entry.id, fd);
        }
        self.sockets = sockets;
        Ok(())
    }

    fn inside(&self, opened: &Opened) -> Result<Vec<u32>> {
        let queues = queue::read(&*opened.images)?;
        let queued = queues.into_values().flatten().flat_map(|packet| packet.rights);
        let states = opened.entries.values().filter_map(|entry| entry.sock.as_ref());
        let waiting = states.flat_map(|state| &state.waiting).flat_map(|waiting| &waiting.packets);
        Ok(queued.chain(waiting.flat_map(|packet| packet.rights.iter().copied())).collect())
    }

    fn fill(&mut self, opened: &Opened) -> Result<()> {
        let mut sockets = std::mem::take(&mut self.sockets);
        for socket in sockets.all.iter_mut().filter(|socket| !socket.is_external()) {
            socket.fd = opened.shared(socket.entry.id);
        }
        sockets.connect_datagrams(opened)?;
        sockets.fill_streams(opened)?;
        for unsent in std::mem::take(&mut sockets.unsent) {
            unsent.send(opened)?;
        }
        sockets.set_up()
    }

    fn prepare_process(
        &mut self,
        pid: NsPid,
        at: &dyn Fn(u32) -> Result<TargetFd>,
        script: &mut Script,
    ) -> Result<()> {
        for Listening { id, backlog, peer } in &self.listening {
            if NsPid::of_image(peer.pid) != pid {
                continue;
            }
            peer::become_peer(&self.own, peer, script);
            let arguments = [at(*id)?.0.into(), (*backlog).into()];
            script.call("listen on a UNIX socket", libc::SYS_listen, &arguments);
            peer::become_own(&self.own, peer, script);
        }
        Ok(())
    }
}

/// All UNIX sockets of the images.
#[derive(Debug, Default)]
struct Sockets {
    all: Vec<Socket>,
    /// Data of connections that wait to be accepted.
    unsent: Vec<Unsent>,
}

impl Sockets {
    fn new(entries: &[proto::FileEntry], opened: &Opened) -> Result<Self> {
        let mut queues = queue::read(&*opened.images)?;
        let mut all = Vec::new();
        for file in entries {
            let missing = || FileError::Image {
                id: file.id,
                problem: "it is a UNIX socket, but its unix_sk_entry is missing".into(),
            };
            let entry = file.usk.as_ref().ok_or_else(missing)?;
            // Another socket may already stand in for it.
            if opened.contains(entry.id) {
                continue;
            }
            let object = format!(
                "the UNIX {} socket [{}] ({})",
                kind_name(entry.r#type),
                entry.ino,
                name::display(&entry.name)
            );
            let restored = Subject { id: entry.id, object };
            let given = outside::inherited(entry, opened, &restored)?;
            let mut entry = (**entry).clone();
            if let Some(perms) = &mut entry.file_perms {
                (perms.uid, perms.gid) = opened.pids.ids().host_owner((perms.uid, perms.gid));
            }
            all.push(Socket {
                holder: opened.holder(entry.id).cloned(),
                queue: queues.remove(&entry.id).unwrap_or_default(),
                entry: Rc::new(entry),
                restored,
                link: Link::None,
                is_inherited: given.is_some(),
                fd: given.map(Rc::new),
                file: None,
                partner: None,
                state: file.sock.as_deref().cloned().unwrap_or_default(),
                networks: Rc::clone(&opened.networks),
                root: opened.root_for(file.id).clone(),
            });
        }
        let by_inode: HashMap<u32, usize> =
            all.iter().enumerate().map(|(at, socket)| (socket.entry.ino, at)).collect();
        for at in 0..all.len() {
            if all[at].is_service() {
                all[at].queue = VecDeque::from([restored_answer()]);
            }
            all[at].link = link(&all, at, &by_inode)?;
        }
        Ok(Self { all, unsent: Vec::new() })
    }

    /// Creates the sockets that are not an end of a connected pair.
    fn make_unpaired(&mut self, options: Options, callers: &mut Callers) -> Result<()> {
        // Sockets with a deleted file come first, so their names are free for the current owners.
        let mut order: Vec<usize> = (0..self.all.len()).collect();
        order.sort_by_key(|at| !self.all[*at].entry.deleted());
        for at in order {
            let socket = &self.all[at];
            if socket.is_external() || socket.is_inherited {
                continue;
            }
            if let Link::External(peer) | Link::Single(peer) = socket.link
                && self.all[peer].is_external()
                && !options.allow_external
            {
                let peer = &self.all[peer].restored;
                let problem =
                    "it belongs to a program that was not dumped\nhelp: use --ext-unix-sk";
                return Err(peer.wrong(problem));
            }
            let (fd, partner) = match socket.link {
                Link::None | Link::Single(_) | Link::Dead
                    if socket.is_datagram() && socket.has_error() =>
                {
                    let (fd, partner) =
                        socket.make_pair(socket.caller_shown_by(socket).as_ref(), callers)?;
                    (with_pending_error(fd, partner, &socket.restored)?, None)
                }
                Link::None | Link::Single(_) | Link::Waiting(_) | Link::External(_) => {
                    (socket.make()?, None)
                }
                Link::Dead if socket.is_datagram() => {
                    let (fd, partner) =
                        socket.make_pair(socket.caller_shown_by(socket).as_ref(), callers)?;
                    (fd, Some(partner))
                }
                // Both ends connect by name, unless they were created as a pair before they were bound.
                Link::Mutual(peer)
                    if socket.is_datagram()
                        && (peer == at
                            || socket.is_named()
                                && self.all[peer].is_named()
                                && socket.state.peer.is_none()) =>
                {
                    (socket.make()?, None)
                }
                Link::Mutual(_) | Link::Dead | Link::Inherited => continue,
            };
            let socket = &mut self.all[at];
            socket.bind(&fd, Keep::Replacing)?;
            if socket.entry.state == state::LISTEN {
                callers.listen(None, fd.as_fd(), socket.entry.backlog, &socket.restored)?;
            }
            (socket.fd, socket.partner) = (Some(Rc::new(fd)), partner);
        }
        Ok(())
    }

    /// Creates connected pairs, and ends whose peer is closed.
    fn make_pairs(&mut self, callers: &mut Callers) -> Result<()> {
        for at in 0..self.all.len() {
            if self.all[at].fd.is_some() || self.all[at].is_external() {
                continue;
            }
            let peer = match self.all[at].link {
                Link::Mutual(peer) => Some(peer),
                _ => None,
            };
            let by = self.all[at].caller_shown_by(&self.all[at]);
            if self.all[at].is_datagram() {
                let (mine, other) = self.all[at].make_pair(by.as_ref(), callers)?;
                self.all[at].bind(&mine, Keep::Replacing)?;
                self.all[at].fd = Some(Rc::new(mine));
                if let Some(peer) = peer {
                    self.all[peer].bind(&other, Keep::Replacing)?;
                    self.all[peer].fd = Some(Rc::new(other));
                }
                continue;
            }
            // The accepted end has the name of the listening socket.
            let accepted = self.accepted(at, peer);
            let (mine, other) = match accepted {
                None => self.all[at].make_pair(by.as_ref(), callers)?,
                Some(end) if end == at => self.connect_and_accept(at, peer, callers)?,
                Some(end) => {
                    let (mine, other) = self.connect_and_accept(end, Some(at), callers)?;
                    (other, mine)
                }
            };
            self.all[at].fd = Some(Rc::new(mine));
            match peer {
                Some(peer) => self.all[peer].fd = Some(Rc::new(other)),
                None => self.all[at].partner = Some(other),
            }
        }
        Ok(())
    }

    /// Returns the end that counts as the accepted one; `None` if neither has a name.
    fn accepted(&self, at: usize, peer: Option<usize>) -> Option<usize> {
        let named =
            || [Some(at), peer].into_iter().flatten().filter(|end| self.all[*end].is_named());
        named().find(|end| self.listener_of(*end).is_some()).or_else(|| named().next())
    }

    /// Returns the listening socket with the name of this end of a connection.
    fn listener_of(&self, end: usize) -> Option<usize> {
        let wanted = &self.all[end].entry;
        self.all.iter().position(|socket| {
            let entry = &socket.entry;
            entry.state == state::LISTEN
                && socket.fd.is_some()
                && !socket.is_inherited
                && (entry.r#type, &entry.name, &entry.name_dir)
                    == (wanted.r#type, &wanted.name, &wanted.name_dir)
        })
    }

    /// Creates a pair by connecting and accepting. Returns the accepted end first.
    fn connect_and_accept(
        &mut self,
        accepted: usize,
        peer: Option<usize>,
        callers: &mut Callers,
    ) -> Result<(OwnedFd, OwnedFd)> {
        let caller = self.all[accepted].make()?;
        if let Some(peer) = peer {
            self.all[peer].bind(&caller, Keep::Replacing)?;
        }
        let by = self.all[accepted].restored.clone();
        // The connecting end shows the process that listens, the accepted end the one that connects.
        let calling = &self.all[peer.unwrap_or(accepted)];
        let listens = peer.and_then(|peer| self.all[accepted].caller_shown_by(&self.all[peer]));
        let calls = calling.caller_shown_by(&self.all[accepted]);
        let (listener, at) = match self.listener_of(accepted) {
            Some(at) => {
                let fd = self.all[at].fd()?.try_clone_to_owned();
                let fd =
                    fd.map_err(|error| by.failed("duplicate a socket for")(sys::errno(&error)))?;
                (fd, at)
            }
            None => {
                let socket = &mut self.all[accepted];
                let listener = socket.make()?;
                socket.bind(&listener, Keep::Yielding)?;
                callers.listen(None, listener.as_fd(), 1, &by)?;
                (listener, accepted)
            }
        };
        if listens.is_some() {
            let backlog = self.all[at].entry.backlog.max(1);
            callers.listen(listens.as_ref(), listener.as_fd(), backlog, &by)?;
        }
        callers.connect(calls.as_ref(), caller.as_fd(), self.all[at].address(), &by)?;
        let (end, _) = UnixListener::from(listener)
            .accept()
            .map_err(|error| by.failed("accept")(sys::errno(&error)))?;
        Ok((end.into(), caller))
    }

    /// Connects datagram sockets and fills their queues.
    fn connect_datagrams(&mut self, opened: &Opened) -> Result<()> {
        let datagrams =
            |socket: &Socket| socket.is_datagram() && !socket.is_external() && !socket.is_inherited;
        let is_made_by_pair = |sockets: &Self, at: usize, peer: usize| {
            peer != at && !(sockets.all[at].is_named() && sockets.all[peer].is_named())
        };
        // The connections to make: from, to.
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
                self.all[edges[0].0].restored.wrong("it is part of a cycle of connections")
            })?;
            let (at, peer) = edges.remove(position);
            if !matches!(self.all[at].link, Link::Mutual(_)) {
                self.fill_datagram(at, opened)?;
            }
            let socket = &self.all[at];
            let peer = &self.all[peer];
            peer.connect_from(socket.fd()?, &socket.restored)
                .map_err(|error| outside::no_peer(error, socket, peer))?;
        }
        for at in 0..self.all.len() {
            if datagrams(&self.all[at]) {
                self.fill_datagram(at, opened)?;
                self.all[at].partner = None;
            }
        }
        Ok(())
    }

    /// Fills the queue of a datagram socket, if that has not been done yet.
    fn fill_datagram(&mut self, at: usize, opened: &Opened) -> Result<()> {
        let queue = std::mem::take(&mut self.all[at].queue);
        if queue.is_empty() {
            return Ok(());
        }
        let socket = &self.all[at];
        // Sending would consume a pending error of the sender.
        let caller =
            || self.all.iter().find(|other| other.link == Link::Single(at) && !other.has_error());
        let sender = match (socket.link, &socket.partner) {
            (_, Some(partner)) => Some(partner.as_fd()),
            (Link::Mutual(peer), None) => Some(self.all[peer].fd()?),
            _ => caller().map(Socket::fd).transpose()?,
        };
        if let Some(sender) = sender {
            return self.send(sender, queue, at, opened);
        }
        if !socket.is_named() {
            return Err(socket
                .restored
                .wrong("its queue is not empty, but no process can reach it"));
        }
        let sender = socket.make()?;
        socket.connect_from(sender.as_fd(), &socket.restored)?;
        self.send(sender.as_fd(), queue, at, opened)
    }

    fn send(
        &self,
        sender: BorrowedFd,
        queue: VecDeque<Packet>,
        to: usize,
        opened: &Opened,
    ) -> Result<()> {
        queue::send(sender, queue, &self.all[to].restored, opened)
    }

    /// Fills the queues of connected stream and seqpacket sockets.
    fn fill_streams(&mut self, opened: &Opened) -> Result<()> {
        for at in 0..self.all.len() {
            if matches!(self.all[at].link, Link::External(_) | Link::Inherited) {
                outside::warn_of_queue(&self.all[at]);
                self.all[at].queue.clear();
            }
            let partner = self.all[at].partner.take();
            let queue = std::mem::take(&mut self.all[at].queue);
            let socket = &self.all[at];
            if queue.is_empty() {
                socket.close_peer(partner)?;
                continue;
            }
            let sender = match (&partner, socket.link) {
                (Some(partner), _) => partner.as_fd(),
                (None, Link::Mutual(peer)) => self.all[peer].fd()?,
                _ => {
                    let problem = "its queue is not empty, but it is not connected";
                    return Err(socket.restored.wrong(problem));
                }
            };
            self.send(sender, queue, at, opened)?;
            self.all[at].close_peer(partner)?;
        }
        Ok(())
    }

    /// Makes sockets listen with the recorded credentials. Returns those for which a process of the
    /// tree has to call `listen(2)` itself.
    fn listen(&self, callers: &mut Callers) -> Result<Vec<Listening>> {
        let mut left = Vec::new();
        for socket in &self.all {
            let entry = &socket.entry;
            if entry.state != state::LISTEN || socket.is_external() || socket.is_inherited {
                continue;
            }
            let Some(caller) = socket.caller_shown_by(socket) else { continue };
            let shown = NsPid::of_image(caller.peer.pid);
            let pids = [Some(shown), caller.instead];
            if let Some(pid) = pids.into_iter().flatten().find(|pid| callers.is_of_tree(*pid))
                && (pid == shown || !callers.can_be(shown))
            {
                let peer = proto::SkPeerEntry { pid: pid.raw(), ..caller.peer };
                left.push(Listening { id: entry.id, backlog: entry.backlog, peer });
            } else {
                callers.listen(Some(&caller), socket.fd()?, entry.backlog, &socket.restored)?;
            }
        }
        Ok(left)
    }

    fn set_up(&self) -> Result<()> {
        for socket in &self.all {
            let Some(fd) = socket.fd.as_ref().map(AsFd::as_fd) else { continue };
            let (entry, restored) = (&socket.entry, &socket.restored);
            opts::restore(fd, &entry.opts, restored)?;
            let reuse = (entry.opts.reuseaddr, entry.opts.so_reuseport);
            // Newer kernels do not support SO_REUSEPORT for UNIX sockets.
            opts::restore_reuse(fd, (reuse.0, reuse.1.filter(|on| *on)), restored)?;
            if let Some(how) = opts::how(entry.shutdown).filter(|_| !socket.is_inherited) {
                shutdown(fd.as_raw_fd(), how).map_err(restored.failed("shut down"))?;
            }
            attributes::restore_options(fd, Some(&socket.state), restored)?;
            attributes::lock_filter(fd, Some(&socket.state), restored)?;
            attributes::restore_peek_offset(fd, Some(&socket.state), restored)?;
            opts::restore_flags(fd, entry.flags, restored)?;
        }
        Ok(())
    }
}

/// Returns what a client that has dumped itself receives when it is restored.
fn restored_answer() -> Packet {
    let response = CriuResp {
        r#type: CriuReqType::Dump.into(),
        success: true,
        dump: Some(CriuDumpResp { restored: Some(true) }),
        ..CriuResp::default()
    };
    Packet { data: response.encode_to_vec(), rights: Vec::new(), sender: None, urgent: false }
}

/// Leaves an error in a datagram socket: its peer disconnects with unread data.
fn with_pending_error(fd: OwnedFd, peer: OwnedFd, restored: &Subject) -> Result<OwnedFd> {
    let failed = restored.failed("leave an error in");
    write(&fd, b"x").map_err(&failed)?;
    socket::disconnect(peer.as_fd()).map_err(&failed)?;
    Ok(fd)
}
