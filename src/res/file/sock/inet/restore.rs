//! Restores TCP and UDP sockets.
//!
//! The restore binds all sockets, then starts listening, then connects UDP sockets. It binds each
//! socket with its own values of `SO_REUSEADDR` and `SO_REUSEPORT`. If the address is in use
//! then, the program may have cleared these options after it bound several sockets to one
//! address. So the restore sets both for all sockets of that port until all are bound. It sets
//! the owner before binding, since only sockets of the same user share a port.
//!
//! A TCP socket whose connection has ended gets another one ([`ended`]).

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{Backlog, Shutdown, SockaddrStorage, bind, connect, listen, shutdown},
};

use super::{
    Connections, IPV6_FREEBIND, IPV6_RECVPKTINFO, RestoreOptions,
    connection::{self, Connection},
    ended,
    lock::{self, Ends, Lock, Method},
    md5, multicast, protocol_name, raw, repair, udp_queue, urgent,
};
use crate::{
    image::{Kind, proto},
    res::file::{
        FileError, Opened, Opener, Result,
        network::Number,
        owner,
        sock::{
            attributes, held,
            opts::{self, Subject},
            state,
        },
    },
    sys::socket,
};

/// The receive buffer, at least, of a UDP socket whose queue is refilled.
const ROOM_BYTES: i32 = 1 << 20;

/// More than any queue has (`net.ipv4.tcp_rmem`).
const LARGEST_QUEUE_BYTES: i32 = 1 << 29;

#[derive(Debug)]
pub(super) struct InetOpener {
    options: RestoreOptions,
    /// Connections that are still in repair mode.
    connections: Vec<Repairing>,
    /// The addresses of connections that the restore closes.
    closed: Vec<(Number, Ends)>,
    /// The unique name of the dump, and the method by which packets are dropped since.
    hold: Option<(String, Method)>,
}

/// A connection in repair mode.
#[derive(Debug)]
struct Repairing {
    restored: Subject,
    network: Number,
    ends: Ends,
    reuse: Option<bool>,
    /// Whether the program has shut down receiving.
    has_shut_down: bool,
    /// The address that the socket was connecting to.
    connects: Option<SocketAddr>,
}

impl InetOpener {
    /// Returns an opener without sockets.
    pub(super) fn new(options: RestoreOptions) -> Self {
        Self { options, connections: Vec::new(), closed: Vec::new(), hold: None }
    }

    /// Recreates the connections, after the sockets that listen on the same ports.
    fn connect(&mut self, sockets: &[Socket], opened: &Opened) -> Result<()> {
        let closed = sockets.iter().filter(|socket| socket.closes);
        self.closed.extend(closed.map(|socket| (socket.entry.ns_id, socket.ends())));
        let ends: Vec<Ends> = sockets
            .iter()
            .filter_map(|socket| socket.connection().map(|_| socket.ends()))
            .collect();
        let Some(first) = sockets.iter().find(|socket| socket.connection().is_some()) else {
            return Ok(());
        };
        let (own, _) = self.hold(opened)?;
        if let Ok(Some(table)) = lock::other_holder(&own, &ends) {
            return Err(first.restored.wrong(format!(
                "packets of its connection are held back by the nftables table {table}, which \
                 another dump has left\nhelp: nft delete table inet {table} lets them pass"
            )));
        }
        for socket in sockets {
            let (entry, restored) = (socket.entry, &socket.restored);
            let Some(state) = socket.connection() else { continue };
            let mut connection = Connection::load(&opened.images, entry.ino, state)?
                .map_err(|problem| restored.wrong(problem))?;
            connection.urgent = socket.state.and_then(|state| state.urgent);
            connection.urgent_sent = socket.state.and_then(|state| state.urgent_sent);
            if let Some(urgent) = &connection.urgent
                && !urgent::is_within(urgent, &connection.received)
            {
                let (at, bytes) = (urgent.offset, connection.received.len());
                let problem = format!("its urgent byte is at {at}, behind {bytes} received bytes");
                return Err(restored.wrong(problem));
            }
            // The buffer sizes of the images are set later.
            opts::widen(socket.fd.as_fd());
            opts::widen_to_receive(socket.fd.as_fd(), LARGEST_QUEUE_BYTES);
            let find = restored.failed("find the interface of");
            let own = socket.scoped(socket.own).map_err(&find)?;
            let peer = socket.scoped(socket.peer).map_err(&find)?;
            connection
                .make(socket.fd.as_fd(), (own, peer))
                .map_err(|(step, errno)| restored.failed(step)(errno))?;
            let has_shut_down = opts::how(entry.shutdown)
                .is_some_and(|how| how != Shutdown::Write && state == state::ESTABLISHED);
            let reuse = entry.opts.reuseaddr;
            let connects = (state == state::SYN_SENT).then_some(peer);
            self.connections.push(Repairing {
                restored: restored.clone(),
                network: entry.ns_id,
                ends: socket.ends(),
                reuse,
                has_shut_down,
                connects,
            });
        }
        Ok(())
    }

    /// Returns the unique name of the dump that is restored, and the method by which packets are
    /// dropped since.
    fn hold(&mut self, opened: &Opened) -> Result<(String, Method)> {
        if let Some(hold) = &self.hold {
            return Ok(hold.clone());
        }
        let inventory: proto::InventoryEntry = opened.images.message(Kind::Inventory, 0)?;
        let name = inventory.dump_criu_run_id.unwrap_or_default();
        let method = Method::of(inventory.network_lock_method);
        Ok(self.hold.insert((String::from_utf8_lossy(&name).into_owned(), method)).clone())
    }

    /// Connects the sockets that were connecting. Their packets are dropped, so that no answer, not
    /// even one from this machine, reaches the restore instead of the program. The kernel sends them
    /// again, and after a second they pass.
    fn connect_again(&self, network: Number, opened: &Opened) -> Result<()> {
        let is_wanted = |one: &&Repairing| {
            one.connects.is_some() && opened.networks.are_same(one.network, network)
        };
        let connecting = || self.connections.iter().filter(is_wanted);
        if connecting().next().is_none() {
            return Ok(());
        }
        let held = Lock::begin().and_then(|mut lock| {
            lock.hold(&connecting().map(|one| one.ends).collect::<Vec<_>>())?;
            Ok(lock)
        });
        if let Err(error) = &held {
            log::warn!("the packets of connecting sockets cannot be held back: {error}");
        }
        for Repairing { restored, connects, .. } in connecting() {
            let Some(peer) = connects else { continue };
            if let Err(errno) = connection::connect_again(opened.get(restored.id)?, *peer) {
                log::warn!(
                    "{}: it cannot be connected again, and its program will not learn of it: {errno}",
                    restored.object
                );
            }
        }
        Ok(())
    }
}

struct Socket<'a> {
    entry: &'a proto::InetSkEntry,
    state: Option<&'a proto::SkStateEntry>,
    restored: Subject,
    own: SocketAddr,
    peer: SocketAddr,
    /// Whether this is a connection that is to be closed.
    closes: bool,
    /// The received data of a socket whose connection has ended.
    ended: Option<Vec<u8>>,
    fd: OwnedFd,
}

impl InetOpener {
    /// Opens sockets of the network namespace that the calling thread is in.
    fn open_here(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        let mut sockets = Vec::new();
        for file in entries {
            let problem = "it is an internet socket, but its inet_sk_entry is missing".to_owned();
            let entry = file.isk.as_ref().ok_or(FileError::Image { id: file.id, problem })?;
            if !opened.contains(entry.id) {
                sockets.push(Socket::new(entry, file.sock.as_deref(), opened, self.options)?);
            }
        }
        for at in 0..sockets.len() {
            if sockets[at].connection().is_some() {
                continue;
            }
            match sockets[at].bind() {
                Err(Errno::EADDRINUSE) => {
                    let port = sockets[at].entry.src_port;
                    for socket in sockets.iter().filter(|socket| socket.entry.src_port == port) {
                        let (fd, both) = (socket.fd.as_fd(), (Some(true), Some(true)));
                        opts::restore_reuse(fd, both, &socket.restored)?;
                    }
                    held::retry(|| sockets[at].bind())
                }
                result => result,
            }
            .map_err(sockets[at].restored.failed("bind"))?;
        }
        for socket in &sockets {
            socket.listen()?;
            socket.fill();
        }
        self.connect(&sockets, opened)?;
        for socket in &sockets {
            socket.set_up()?;
        }
        for socket in sockets {
            opened.insert(socket.entry.id, socket.fd);
        }
        Ok(())
    }
}

impl Opener for InetOpener {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        let number = |entry: &proto::FileEntry| entry.isk.as_ref().and_then(|entry| entry.ns_id);
        for (network, entries) in opened.networks.sort(entries, number) {
            let _visit = opened.networks.visit(network)?;
            self.open_here(&entries, opened)?;
        }
        Ok(())
    }

    fn reconnect(&mut self, opened: &Opened) -> Result<()> {
        let ends = self.connections.iter().map(|one| (one.network, one.ends));
        let mut ends: Vec<_> = ends.chain(self.closed.iter().copied()).collect();
        let (dump, method) = match ends.is_empty() {
            true => return Ok(()),
            false => self.hold(opened)?,
        };
        while let Some((network, _)) = ends.first().copied() {
            let _visit = opened.networks.visit(network)?;
            let is_here =
                |(number, _): &mut (Number, Ends)| opened.networks.are_same(*number, network);
            let here: Vec<Ends> = ends.extract_if(.., is_here).map(|(_, ends)| ends).collect();
            self.connect_again(network, opened)?;
            let lifted = match method {
                Method::Iptables if opened.networks.is_restorers(network) => {
                    lock::lift_rules(&here)
                }
                Method::Iptables | Method::Skip => Ok(()),
                Method::Nftables => lock::lift(&dump),
            };
            lifted.map_err(|source| FileError::Packets { source })?;
        }
        for Repairing { restored, reuse, has_shut_down, connects, .. } in &self.connections {
            let fd = opened.get(restored.id)?;
            if connects.is_some() {
                opts::restore_reuse(fd, (*reuse, None), restored)?;
                continue;
            }
            repair::end_with_probe(fd).map_err(restored.failed("go on with (TCP_REPAIR)"))?;
            opts::restore_reuse(fd, (*reuse, None), restored)?;
            if *has_shut_down {
                shutdown(fd.as_raw_fd(), Shutdown::Read).map_err(restored.failed("shut down"))?;
            }
        }
        Ok(())
    }
}

/// Returns what a connection of the images has received, which is to end: nothing, if the dump
/// was to close it (CRIU's `--tcp-close`).
fn received(entry: &proto::InetSkEntry, restored: &Subject, opened: &Opened) -> Result<Vec<u8>> {
    match Connection::load(&opened.images, entry.ino, entry.state) {
        Ok(loaded) => Ok(loaded.map_err(|problem| restored.wrong(problem))?.received),
        Err(FileError::Images(error)) if error.is_missing() => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

impl<'a> Socket<'a> {
    fn new(
        entry: &'a proto::InetSkEntry,
        state: Option<&'a proto::SkStateEntry>,
        opened: &Opened,
        options: RestoreOptions,
    ) -> Result<Self> {
        let name = protocol_name(entry.r#type.cast_signed(), entry.proto.cast_signed());
        let mut restored =
            Subject { id: entry.id, object: format!("the {name} socket [{}]", entry.ino) };
        let kind = (entry.r#type.cast_signed(), entry.proto.cast_signed());
        let is_tcp = kind == (libc::SOCK_STREAM, libc::IPPROTO_TCP);
        let is_udp = kind.0 == libc::SOCK_DGRAM
            && matches!(kind.1, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE);
        if !is_tcp && !is_udp && !raw::is_raw(kind) {
            return Err(restored.wrong("rcriu does not restore sockets of this type"));
        }
        let address = |words: &[u32], port: u32| {
            let bad = || restored.wrong(format!("its address {words:x?}, port {port}, is invalid"));
            let port = u16::try_from(port).map_err(|_| bad())?;
            address(entry.family.cast_signed(), words, port).ok_or_else(bad)
        };
        let own = address(&entry.src_addr, entry.src_port)?;
        let peer = address(&entry.dst_addr, entry.dst_port)?;
        restored.object = format!("the {name} socket [{}] ({own})", entry.ino);
        let lone = matches!(entry.state, state::LISTEN | state::CLOSE) && entry.dst_port == 0;
        if is_tcp && !lone {
            restored.object = format!("the TCP connection [{}] {own} -> {peer}", entry.ino);
            if !connection::can_be_made(entry.state) {
                let problem = format!("rcriu restores no connection in state {}", entry.state);
                return Err(restored.wrong(problem));
            }
            if options.connections == Connections::Refuse {
                let problem = "rcriu restores connections only on request\nhelp: restore with \
                               --tcp-established to keep it, or with --tcp-close to end it";
                return Err(restored.wrong(problem));
            }
        }
        let closes = is_tcp && !lone && options.connections == Connections::Close;
        let ended = if closes {
            Some(received(entry, &restored, opened)?)
        } else {
            let ended = state.filter(|state| state.ended == Some(true));
            ended.map(|state| state.received.clone().unwrap_or_default())
        };
        let make = || socket::create(entry.family.cast_signed(), kind.0, kind.1);
        let fd = owner::as_owner(entry.id, opened, make).map_err(restored.failed("create"))?;
        owner::restore(entry.id, &fd, opened)?;
        let socket = Self { entry, state, restored, own, peer, closes, ended, fd };
        socket.prepare()?;
        if socket.connection().is_none() {
            socket.set_md5_keys()?;
        }
        Ok(socket)
    }

    /// Its type and protocol.
    fn kind(&self) -> (i32, i32) {
        (self.entry.r#type.cast_signed(), self.entry.proto.cast_signed())
    }

    fn is_tcp(&self) -> bool {
        self.kind() == (libc::SOCK_STREAM, libc::IPPROTO_TCP)
    }

    /// Whether a socket without connections has a peer, which may have no port.
    fn has_peer(&self) -> bool {
        let is_connected =
            self.entry.state == state::ESTABLISHED && !self.peer.ip().is_unspecified();
        self.entry.dst_port != 0 || raw::is_raw(self.kind()) && is_connected
    }

    /// The state of a TCP connection; `None` for other sockets.
    fn connection(&self) -> Option<u32> {
        (self.is_tcp() && self.entry.dst_port != 0 && !self.closes).then_some(self.entry.state)
    }

    fn ends(&self) -> Ends {
        (self.own, self.peer)
    }

    /// Sets the options that must be set before binding.
    fn prepare(&self) -> Result<()> {
        let (fd, options) = (self.fd.as_fd(), &self.entry.opts);
        if let Some(v6only) = self.entry.v6only {
            self.set(libc::SOL_IPV6, libc::IPV6_V6ONLY, v6only.into(), "set IPV6_V6ONLY of")?;
        }
        let reuse = (options.reuseaddr, options.so_reuseport);
        opts::restore_reuse(fd, reuse, &self.restored)?;
        // Some of them decide which address the socket may be bound to.
        attributes::restore_options(fd, self.state, &self.restored)?;
        opts::restore_interface(fd, options, &self.restored)
    }

    /// Sets the keys that sign packets. Forged packets have no signature, so a connection gets its
    /// keys after it was made.
    fn set_md5_keys(&self) -> Result<()> {
        let Some(state) = self.state.filter(|_| !self.closes) else { return Ok(()) };
        md5::restore(self.fd.as_fd(), &state.md5_keys)
            .map_err(self.restored.failed("set keys (TCP_MD5SIG) of"))
    }

    fn set(&self, level: i32, name: i32, value: u32, step: &'static str) -> Result<()> {
        opts::ensure(self.fd.as_fd(), level, name, value).map_err(self.restored.failed(step))
    }

    fn bind(&self) -> nix::Result<()> {
        if self.entry.src_port == 0 || self.closes {
            return Ok(());
        }
        let own = self.scoped(self.own)?;
        // A new IPv6 address cannot be bound until duplicate address detection has finished; with
        // freebind it can.
        let early = self.own.is_ipv6();
        let freebind = |on: u32| opts::ensure(self.fd.as_fd(), libc::SOL_IPV6, IPV6_FREEBIND, on);
        if early {
            freebind(1)?;
        }
        let bound = bind(self.fd.as_raw_fd(), &SockaddrStorage::from(own));
        if early {
            freebind(0)?;
        }
        bound
    }

    /// Returns an address with the interface that a link-local one belongs to.
    fn scoped(&self, mut address: SocketAddr) -> nix::Result<SocketAddr> {
        if let (SocketAddr::V6(v6), Some(name)) = (&mut address, self.entry.ifname.as_deref()) {
            let name = std::ffi::CString::new(name).map_err(|_| Errno::ENODEV)?;
            v6.set_scope_id(nix::net::if_::if_nametoindex(name.as_c_str())?);
        }
        Ok(address)
    }

    fn listen(&self) -> Result<()> {
        if self.entry.state != state::LISTEN {
            return Ok(());
        }
        let backlog = i32::try_from(self.entry.backlog).ok().and_then(|n| Backlog::new(n).ok());
        listen(&self.fd, backlog.unwrap_or(Backlog::MAXALLOWABLE))
            .map_err(self.restored.failed("listen on"))
    }

    /// Refills the queue of a UDP socket, which is not connected yet and accepts any sender.
    fn fill(&self) {
        let Some(state) = self.state.filter(|state| !state.datagrams.is_empty()) else { return };
        let bytes: usize = state.datagrams.iter().map(|datagram| datagram.data.len()).sum();
        // The kernel also counts its own overhead.
        let room = i32::try_from(bytes).unwrap_or(i32::MAX).saturating_mul(2);
        opts::widen_to_receive(self.fd.as_fd(), room.max(ROOM_BYTES));
        udp_queue::restore(self.fd.as_fd(), self.own, &state.datagrams, &self.restored);
    }

    /// Connects the socket and restores the rest.
    fn set_up(&self) -> Result<()> {
        let (fd, entry, restored) = (self.fd.as_fd(), self.entry, &self.restored);
        if let Some(received) = &self.ended {
            let error = self.state.and_then(|state| state.error).filter(|_| !self.closes);
            ended::restore(fd, entry.family.cast_signed(), received, error)
                .map_err(restored.failed("end the connection again of"))?;
        }
        if self.has_peer() && !self.closes && self.connection().is_none() {
            connect(fd.as_raw_fd(), &SockaddrStorage::from(self.peer))
                .map_err(restored.failed("connect"))?;
        }
        if self.connection().is_some() {
            self.set_md5_keys()?;
        }
        self.set_ip_options(entry.ip_opts.as_ref())?;
        if let Some(state) = self.state {
            multicast::restore(fd, &state.groups)
                .map_err(restored.failed("join the multicast groups of"))?;
        }
        opts::restore(fd, &entry.opts, restored)?;
        attributes::restore_options(fd, self.state, restored)?;
        attributes::lock_filter(fd, self.state, restored)?;
        attributes::restore_peek_offset(fd, self.state, restored)?;
        self.set_tcp_options()?;
        let reuse = (entry.opts.reuseaddr, entry.opts.so_reuseport);
        opts::restore_reuse(fd, reuse, restored)?;
        if self.connection().is_none() && !self.closes {
            self.shut_down(fd)?;
        }
        opts::restore_flags(fd, entry.flags, restored)
    }

    fn shut_down(&self, fd: BorrowedFd) -> Result<()> {
        let Some(how) = opts::how(self.entry.shutdown) else { return Ok(()) };
        match shutdown(fd.as_raw_fd(), how) {
            // The kernel reports an error, but shuts the socket down.
            Err(Errno::ENOTCONN) => Ok(()),
            result => result.map_err(self.restored.failed("shut down")),
        }
    }

    fn set_ip_options(&self, options: Option<&proto::IpOptsEntry>) -> Result<()> {
        let Some(options) = options else { return Ok(()) };
        let on = |value: Option<bool>| value.map(u32::from);
        let numbers = if self.own.is_ipv6() {
            [
                (libc::SOL_IPV6, IPV6_FREEBIND, on(options.freebind), "set IPV6_FREEBIND of"),
                (libc::SOL_IPV6, IPV6_RECVPKTINFO, on(options.pktinfo), "set IPV6_RECVPKTINFO of"),
                (libc::SOL_IPV6, 0, None, ""),
                (libc::SOL_IPV6, 0, None, ""),
            ]
        } else {
            [
                (libc::SOL_IP, libc::IP_FREEBIND, on(options.freebind), "set IP_FREEBIND of"),
                (libc::SOL_IP, libc::IP_PKTINFO, on(options.pktinfo), "set IP_PKTINFO of"),
                (libc::SOL_IP, libc::IP_TOS, options.tos, "set IP_TOS of"),
                (libc::SOL_IP, libc::IP_TTL, options.ttl, "set IP_TTL of"),
            ]
        };
        for (level, name, value, step) in numbers {
            if let Some(value) = value {
                self.set(level, name, value, step)?;
            }
        }
        let Some(raw) = options.raw.as_ref().filter(|_| self.kind().0 == libc::SOCK_RAW) else {
            return Ok(());
        };
        raw::restore_options(self.fd.as_fd(), (self.entry.family.cast_signed(), self.kind().1), raw)
            .map_err(self.restored.failed("set the options of"))
    }

    /// Sets the TCP options. Older images store some of them with the general socket options.
    fn set_tcp_options(&self) -> Result<()> {
        if !self.is_tcp() {
            return Ok(());
        }
        let options = self.entry.tcp_opts.unwrap_or_default();
        let old = &self.entry.opts;
        let on = |value: Option<bool>| value.map(u32::from);
        let numbers = [
            (libc::TCP_NODELAY, on(options.nodelay), "set TCP_NODELAY of"),
            (libc::TCP_CORK, on(options.cork), "set TCP_CORK of"),
            (libc::TCP_KEEPCNT, options.keepcnt.or(old.tcp_keepcnt), "set TCP_KEEPCNT of"),
            (libc::TCP_KEEPIDLE, options.keepidle.or(old.tcp_keepidle), "set TCP_KEEPIDLE of"),
            (libc::TCP_KEEPINTVL, options.keepintvl.or(old.tcp_keepintvl), "set TCP_KEEPINTVL of"),
        ];
        for (name, value, step) in numbers {
            if let Some(value) = value {
                self.set(libc::SOL_TCP, name, value, step)?;
            }
        }
        Ok(())
    }
}

/// Converts an address from the words of the images.
fn address(family: i32, words: &[u32], port: u16) -> Option<SocketAddr> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    match family {
        // The oldest images have four words for both families.
        libc::AF_INET => {
            let octets: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
            Some(SocketAddrV4::new(Ipv4Addr::from(octets), port).into())
        }
        libc::AF_INET6 => {
            let octets: [u8; 16] = bytes.try_into().ok()?;
            let IpAddr::V6(v6) = IpAddr::from(octets) else { return None };
            Some(SocketAddrV6::new(Ipv6Addr::from(v6.octets()), port, 0, 0).into())
        }
        _ => None,
    }
}
