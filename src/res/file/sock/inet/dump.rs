//! Dumps internet sockets.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc::{self, c_int},
    poll::PollFlags,
    sys::socket::{getpeername, getsockname},
};

use super::{
    Connections, DumpOptions, IPV6_FREEBIND, IPV6_RECVPKTINFO, address,
    connection::{self, Connection},
    lock::{self, Ends, Lock, Method},
    protocol_name, repair, udp_queue,
};
use crate::{
    causes::{tell, with_sources},
    fault::{self, Point},
    image::{SnapshotWriter, proto},
    res::file::{
        Collector, Description, FileError, Intake, Result,
        error::errno,
        sock::{
            SHUT_BOTH,
            attributes::{self, RECEIVED_MAX_BYTES},
            diag,
            opts::{self, NET_NS_ID},
            queue, state,
        },
    },
    sys::{fds, socket, supervise},
    units::{HostPid, TargetFd},
};

/// `UDP_CORK` and `UDP_ENCAP`, `linux/udp.h`.
const UDP_CORK: c_int = 1;
const UDP_ENCAP: c_int = 100;

/// Offsets in `struct tcp_info` (`linux/tcp.h`). Listening sockets use the fields PENDING and BACKLOG
/// for these values, connections for others.
const TCP_INFO_STATE: usize = 0;
const TCP_INFO_PENDING: usize = 24;
const TCP_INFO_BACKLOG: usize = 28;
/// Packets sent and received (`tcpi_segs_out`, `tcpi_segs_in`, since Linux 4.2), including those of
/// a connection that has ended.
const TCP_INFO_PACKETS: [usize; 2] = [136, 140];
const TCP_INFO_BYTES: usize = 144;

const HELP_KIND: &str = "only TCP, UDP and UDP-Lite sockets are supported";
const HELP_ESTABLISHED: &str =
    "use --tcp-established to keep it or --tcp-close to end it, or have the program close it";
const HELP_CONNECTING: &str =
    "wait until it is established or has failed, then try again; or use --tcp-close to end it";
const HELP_URGENT: &str = "have the program read it (MSG_OOB), then try again";
/// The step of the dump that a [`Lock`] is for.
const HOLD_BACK: &str = "hold back the packets (nftables; --network-lock skip does without) of";
const HELP_ERROR: &str = "have the program read it (SO_ERROR, recv) or close the socket; reading it is the \
    only way to learn the error, and clears it";
const HELP_UNREAD: &str = "have the program read it or close the socket, then try again";
const HELP_ACCEPT: &str = "have the program accept its connections, then try again";

#[derive(Debug)]
pub(super) struct InetCollector {
    options: DumpOptions,
    /// Drops the packets of the connections.
    lock: Option<Lock>,
    connections: Vec<Found>,
    /// The sockets of the network namespace, by family and protocol.
    listed: HashMap<(c_int, c_int), HashMap<u32, diag::InetSocket>>,
    states: attributes::AttributeReader,
}

/// A connection of the tree.
#[derive(Debug)]
struct Found {
    fd: OwnedFd,
    pid: HostPid,
    number: TargetFd,
    inode: u32,
    ends: Ends,
    /// `SO_REUSEADDR`.
    reuse: c_int,
    connection: Connection,
}

/// The protocol-specific state of a socket.
#[derive(Clone, Debug, Default)]
struct Facts {
    state: u32,
    backlog: u32,
    shutdown: u8,
    ended: Option<EndedConnection>,
    /// Datagrams queued in a UDP socket that the restore can send again.
    datagrams: Vec<proto::SkDatagramEntry>,
}

/// A TCP socket whose connection has been closed from both ends.
#[derive(Clone, Debug, Default)]
struct EndedConnection {
    /// Whether it still holds its port.
    bound: bool,
    /// Received data that the program has not read.
    received: Vec<u8>,
}

impl InetCollector {
    /// Returns a collector without sockets.
    pub(super) fn new(options: DumpOptions) -> Self {
        Self {
            options,
            lock: None,
            connections: Vec::new(),
            listed: HashMap::new(),
            states: attributes::AttributeReader::default(),
        }
    }

    fn tcp(&mut self, file: &Description, family: c_int, what: &str) -> Result<Facts> {
        let fd = file.fd.as_fd();
        let mut info = [0; TCP_INFO_BYTES];
        socket::option_bytes(fd, libc::SOL_TCP, libc::TCP_INFO, &mut info)
            .map_err(file.failed("ask for the state of"))?;
        let word = |at: usize| u32::from_ne_bytes(info[at..at + 4].try_into().expect("4 bytes"));
        let state = u32::from(info[TCP_INFO_STATE]);
        match state {
            state::LISTEN if word(TCP_INFO_PENDING) > 0 => {
                let what = format!(
                    "{what}, listening, with {} connections not accepted yet",
                    word(TCP_INFO_PENDING)
                );
                Err(file.unsupported(what, HELP_ACCEPT))
            }
            state::LISTEN => {
                Ok(Facts { state, backlog: word(TCP_INFO_BACKLOG), ..Facts::default() })
            }
            state::CLOSE => {
                let seen =
                    attributes::polled(fd, PollFlags::POLLIN).map_err(file.failed("poll"))?;
                if seen.contains(PollFlags::POLLERR) {
                    let what = format!("{what}, with an unread error");
                    return Err(file.unsupported(what, HELP_ERROR));
                }
                if TCP_INFO_PACKETS.iter().any(|at| word(*at) > 0) {
                    let ended = self.ended(file, family, what)?;
                    let shutdown = SHUT_BOTH;
                    return Ok(Facts { state, shutdown, ended: Some(ended), ..Facts::default() });
                }
                // For a socket that was never connected, the kernel shows only one of the two
                // directions.
                let shutdown = u8::from(seen.contains(PollFlags::POLLIN));
                Ok(Facts { state, shutdown, ..Facts::default() })
            }
            _ => {
                let local = address(getsockname(fd.as_raw_fd()));
                let peer = address(getpeername(fd.as_raw_fd()));
                let ends = local.zip(peer).filter(|_| connection::is_connection(state));
                match (self.options.connections, ends) {
                    (Connections::Keep, Some(ends)) => {
                        return self.connection(file, family, ends, what);
                    }
                    (Connections::Close, _) => {
                        let ended = Self::to_be_ended(file, what)?;
                        let (state, shutdown) = (state::CLOSE, SHUT_BOTH);
                        return Ok(Facts {
                            state,
                            shutdown,
                            ended: Some(ended),
                            ..Facts::default()
                        });
                    }
                    _ => {}
                }
                let show = |address: Option<SocketAddr>| {
                    address.map_or_else(|| "?".to_owned(), |address| address.to_string())
                };
                let what = format!(
                    "the TCP connection {} -> {} in state {}",
                    show(local),
                    show(peer),
                    state_name(state)
                );
                let help = if ends.is_some() { HELP_ESTABLISHED } else { HELP_CONNECTING };
                Err(file.unsupported(what, help))
            }
        }
    }

    /// Reads a connection. If the dump will kill the tree, drops the packets of the connection from
    /// now on.
    fn connection(
        &mut self,
        file: &Description,
        family: c_int,
        ends: Ends,
        what: &str,
    ) -> Result<Facts> {
        let fd = file.fd.as_fd();
        let urgent = attributes::polled(fd, PollFlags::POLLPRI).map_err(file.failed("poll"))?;
        if urgent.contains(PollFlags::POLLPRI) {
            let what = format!("{what}, with urgent data that its program has not read");
            return Err(file.unsupported(what, HELP_URGENT));
        }
        if self.options.hold_packets {
            let held = match &mut self.lock {
                Some(lock) => lock.hold(ends),
                none => Lock::begin().and_then(|lock| none.insert(lock).hold(ends)),
            };
            held.map_err(|error| file.failed(HOLD_BACK)(errno(&error)))?;
        }
        let shutdown =
            self.listed(file, family, libc::IPPROTO_TCP)?.map_or(0, |found| found.shutdown);
        let look = file.failed("look into the connection of (TCP_REPAIR)");
        let reuse = repair::reuse(fd).map_err(&look)?;
        let connection = Connection::read(fd).map_err(&look)?;
        let state = connection.state;
        self.connections.push(Found {
            fd: file.fd.try_clone().map_err(|error| file.failed("duplicate")(errno(&error)))?,
            pid: file.pid,
            number: file.number,
            inode: u32::try_from(file.stat.st_ino).expect("inodes of sockets have 32 bits"),
            ends,
            reuse,
            connection,
        });
        Ok(Facts { state, shutdown, ..Facts::default() })
    }

    /// Reads the state of a TCP socket whose connection has ended.
    fn ended(&mut self, file: &Description, family: c_int, what: &str) -> Result<EndedConnection> {
        let ended = Self::to_be_ended(file, what)?;
        // The kernel lists no socket without a port; before Linux 6.8, none that is closed.
        let bound = self.listed(file, family, libc::IPPROTO_TCP)?.is_some();
        if !bound {
            log::warn!(
                "{what}: its connection has ended; after a restore, getsockname(2) shows another \
                 name"
            );
        }
        Ok(EndedConnection { bound, ..ended })
    }

    /// Reads what a TCP socket has received whose connection has ended, or is to end.
    fn to_be_ended(file: &Description, what: &str) -> Result<EndedConnection> {
        let fd = file.fd.as_fd();
        let failed = file.failed("peek at the queue of");
        let bytes = fds::readable_bytes(fd).map_err(&failed)?;
        if bytes > RECEIVED_MAX_BYTES {
            let what = format!(
                "{what}, whose connection has ended with {bytes} unread bytes, more than the limit \
                 of {RECEIVED_MAX_BYTES}"
            );
            return Err(file.unsupported(what, HELP_UNREAD));
        }
        let received = if bytes == 0 {
            Vec::new()
        } else {
            queue::peek_received(fd, bytes).map_err(&failed)?
        };
        Ok(EndedConnection { bound: false, received })
    }

    /// Returns what `sock_diag(7)` reports of a socket, if it lists the socket.
    fn listed(
        &mut self,
        file: &Description,
        family: c_int,
        protocol: c_int,
    ) -> Result<Option<diag::InetSocket>> {
        let inode = u32::try_from(file.stat.st_ino).expect("inodes of sockets have 32 bits");
        let listed = match self.listed.entry((family, protocol)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let byte = |number: c_int| u8::try_from(number).expect("families are small");
                place.insert(match diag::inet_sockets(byte(family), byte(protocol)) {
                    // This kernel is built without sock_diag for the protocol.
                    Err(Errno::ENOENT) => HashMap::new(),
                    found => found.map_err(file.failed("list the sockets of the network for"))?,
                })
            }
        };
        Ok(listed.get(&inode).copied())
    }

    fn udp(
        &mut self,
        file: &Description,
        (family, protocol): (c_int, c_int),
        connected: bool,
        what: &str,
    ) -> Result<Facts> {
        let fd = file.fd.as_fd();
        let uses = |option| socket::option::<c_int>(fd, libc::SOL_UDP, option) != Ok(0);
        if uses(UDP_CORK) {
            let what = format!("{what}, corked (UDP_CORK)");
            return Err(file.unsupported(
                what,
                "have the program uncork it, which sends the pending datagram",
            ));
        }
        if uses(UDP_ENCAP) {
            let what = format!("{what}, which encapsulates another protocol (UDP_ENCAP)");
            return Err(file.unsupported(what, HELP_KIND));
        }
        let found = self.listed(file, family, protocol)?;
        let seen = attributes::polled(fd, PollFlags::empty()).map_err(file.failed("poll"))?;
        if seen.contains(PollFlags::POLLERR) {
            log::warn!("{what} has an unread error (ICMP): it will be lost");
        }
        let mut datagrams = Vec::new();
        if found.is_some_and(|found| found.receive_queue > 0) {
            // Peeking at datagrams would consume the error.
            let kept = if seen.contains(PollFlags::POLLERR) || !can_be_sent_again(fd, protocol) {
                None
            } else {
                udp_queue::peek(fd).map_err(file.failed("peek at the queue of"))?
            };
            datagrams = kept.unwrap_or_else(|| {
                log::warn!("{what} has queued datagrams: they will be lost");
                Vec::new()
            });
        }
        let state = if connected { state::ESTABLISHED } else { state::CLOSE };
        let backlog = found.map_or(0, |found| found.send_queue);
        let shutdown = found.map_or(0, |found| found.shutdown);
        Ok(Facts { state, backlog, shutdown, datagrams, ended: None })
    }
}

impl InetCollector {
    fn try_to_part(&self, dump: &str) -> Result<()> {
        let Some(first) = self.connections.first() else { return Ok(()) };
        supervise::note_repair();
        if self.lock.is_some() {
            let ends: Vec<_> = self.connections.iter().map(|found| found.ends).collect();
            supervise::note_packets(dump);
            lock::keep(dump, &ends).map_err(|error| first.failed(HOLD_BACK)(errno(&error)))?;
        }
        for found in &self.connections {
            // Closing the socket must not send the peer a packet.
            repair::begin(found.fd.as_fd())
                .map_err(found.failed("end without a packet (TCP_REPAIR)"))?;
        }
        fault::hit(Point::TcpParted).map_err(|_| first.failed("go on with")(Errno::EIO))
    }

    /// Runs if the tree continues after all.
    fn reconnect(&mut self, dump: &str) {
        for found in &self.connections {
            if let Err(errno) = repair::end_with(found.fd.as_fd(), found.reuse) {
                let failed = found.failed("let packets come to")(errno);
                tell(log::Level::Error, &with_sources(&failed));
            }
        }
        if self.lock.take().is_some()
            && let Err(error) = lock::lift(dump)
        {
            let what = format!("packets of the tree's connections are held back: {error}");
            tell(log::Level::Error, &what);
        }
        supervise::clear_repair();
    }
}

impl Collector for InetCollector {
    fn claims(&self, file: &Description) -> bool {
        let inet = |family| matches!(family, libc::AF_INET | libc::AF_INET6);
        file.is_type(libc::S_IFSOCK) && opts::family(file.fd.as_fd()).is_ok_and(inet)
    }

    fn collect(&mut self, file: &Description, _: &mut dyn Intake) -> Result<proto::FileEntry> {
        let fd = file.fd.as_fd();
        let ask = file.failed("ask for the type of");
        let family = opts::family(fd).map_err(&ask)?;
        let kind = opts::kind(fd).map_err(&ask)?;
        let protocol = opts::protocol(fd).map_err(&ask)?;
        let inode = file.stat.st_ino;
        let mut own = address(getsockname(fd.as_raw_fd()));
        let name = own.map_or_else(|| "unbound".to_owned(), |own| own.to_string());
        let what = format!("the {} socket [{inode}] ({name})", protocol_name(kind, protocol));
        let peer = address(getpeername(fd.as_raw_fd())).filter(|peer| peer.port() != 0);
        let facts = match (kind, protocol) {
            (libc::SOCK_STREAM, libc::IPPROTO_TCP) => self.tcp(file, family, &what)?,
            (libc::SOCK_DGRAM, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE) => {
                self.udp(file, (family, protocol), peer.is_some(), &what)?
            }
            _ => return Err(file.unsupported(what, HELP_KIND)),
        };
        let peer = peer.filter(|_| facts.ended.is_none());
        let mut state = self.states.read(file, &what)?;
        state.datagrams = facts.datagrams;
        if let Some(ended) = facts.ended {
            state.ended = Some(true);
            state.received = (!ended.received.is_empty()).then_some(ended.received);
            // The other options no longer matter, and the connection may have changed them.
            state.options.retain(|option| option.level == libc::SOL_SOCKET);
            own = own.filter(|_| ended.bound);
        }
        if connection::is_connection(facts.state) && protocol == libc::IPPROTO_TCP {
            // For a connection, the kernel returns the negotiated size.
            state.options.retain(|option| !is_segment_size(option));
        }
        let source_port = own.map_or(0, |own| own.port());
        // Like CRIU, number the namespace only of sockets that the kernel lists.
        let listed = if protocol == libc::IPPROTO_TCP {
            facts.state != state::CLOSE
        } else {
            source_port != 0
        };
        let options = file.failed("read the options of");
        let entry = proto::InetSkEntry {
            id: file.id,
            ino: u32::try_from(inode).expect("inodes of sockets have 32 bits"),
            family: family.cast_unsigned(),
            r#type: kind.cast_unsigned(),
            proto: protocol.cast_unsigned(),
            state: facts.state,
            src_port: source_port.into(),
            dst_port: peer.map_or(0, |peer| peer.port().into()),
            flags: file.flags,
            backlog: facts.backlog,
            src_addr: words(own, family),
            dst_addr: words(peer, family),
            fown: file.fown,
            opts: opts::read(fd, family).map_err(&options)?,
            v6only: v6only(fd, family).map_err(&options)?,
            ip_opts: Some(ip_options(fd, family).map_err(&options)?),
            ifname: scope(fd, own).map_err(&options)?,
            ns_id: listed.then_some(NET_NS_ID),
            shutdown: opts::shutdown(facts.shutdown),
            tcp_opts: Some(tcp_options(fd, protocol).map_err(&options)?),
        };
        Ok(proto::FileEntry {
            r#type: proto::FdTypes::Inetsk.into(),
            id: file.id,
            isk: Some(entry),
            sock: Some(state),
            ..proto::FileEntry::default()
        })
    }

    fn finish(&mut self, images: &SnapshotWriter) -> Result<()> {
        self.connections.iter().try_for_each(|found| found.connection.write(images, found.inode))
    }

    fn note(&self, inventory: &mut proto::InventoryEntry) {
        if !self.connections.is_empty() {
            let holds = self.lock.is_some();
            let method = if holds { Method::Nftables } else { Method::Skip };
            inventory.network_lock_method = Some(method as u32);
        }
    }

    fn prepare_kill(&mut self, dump: &str) -> Result<()> {
        let parted = self.try_to_part(dump);
        if parted.is_err() {
            self.reconnect(dump);
        }
        parted
    }
}

impl Found {
    fn failed(&self, step: &'static str) -> impl Fn(Errno) -> FileError + '_ {
        let (own, peer) = self.ends;
        let link = format!("the TCP connection {own} -> {peer}");
        move |source| FileError::Dump {
            pid: self.pid,
            fd: self.number,
            link: link.clone(),
            step,
            source,
        }
    }
}

/// Whether an option is the size of segments (`TCP_MAXSEG`).
fn is_segment_size(option: &proto::SkOptionEntry) -> bool {
    let name = (option.level, option.name);
    name == (libc::SOL_TCP, libc::TCP_MAXSEG)
}

/// Whether datagrams that [`udp_queue`] sends again would reach this UDP socket and no other.
fn can_be_sent_again(fd: BorrowedFd, protocol: c_int) -> bool {
    let uses = |level, option| socket::option::<c_int>(fd, level, option).is_ok_and(|v| v != 0);
    protocol == libc::IPPROTO_UDP
        && !uses(libc::SOL_SOCKET, libc::SO_REUSEADDR)
        && !uses(libc::SOL_SOCKET, libc::SO_REUSEPORT)
        && !uses(libc::SOL_UDP, libc::UDP_GRO)
        && opts::bound_interface(fd).is_ok_and(|interface| interface.is_none())
}

fn state_name(state: u32) -> String {
    // `net/tcp_states.h`, starting at 1.
    const NAMES: [&str; 12] = [
        "ESTABLISHED",
        "SYN_SENT",
        "SYN_RECV",
        "FIN_WAIT1",
        "FIN_WAIT2",
        "TIME_WAIT",
        "CLOSE",
        "CLOSE_WAIT",
        "LAST_ACK",
        "LISTEN",
        "CLOSING",
        "NEW_SYN_RECV",
    ];
    let name = state.checked_sub(1).and_then(|at| NAMES.get(at as usize));
    name.map_or_else(|| format!("{state} (unknown)"), |name| (*name).to_owned())
}

/// Returns an address in the form of the images: its bytes in network order, read as native words.
pub(super) fn words(address: Option<SocketAddr>, family: c_int) -> Vec<u32> {
    let bytes = match address.map(|address| address.ip()) {
        Some(IpAddr::V4(v4)) => v4.octets().to_vec(),
        Some(IpAddr::V6(v6)) => v6.octets().to_vec(),
        None if family == libc::AF_INET => Ipv4Addr::UNSPECIFIED.octets().to_vec(),
        None => Ipv6Addr::UNSPECIFIED.octets().to_vec(),
    };
    bytes
        .chunks_exact(4)
        .map(|word| u32::from_ne_bytes(word.try_into().expect("chunks of 4")))
        .collect()
}

/// Returns the interface of a link-local address.
fn scope(fd: BorrowedFd, own: Option<SocketAddr>) -> nix::Result<Option<Vec<u8>>> {
    match own {
        Some(SocketAddr::V6(v6)) if v6.port() != 0 && v6.scope_id() != 0 => {
            opts::bound_interface(fd)
        }
        _ => Ok(None),
    }
}

fn v6only(fd: BorrowedFd, family: c_int) -> nix::Result<Option<bool>> {
    let ask = || socket::option::<c_int>(fd, libc::SOL_IPV6, libc::IPV6_V6ONLY);
    (family == libc::AF_INET6).then(ask).transpose().map(|found| found.map(|found| found != 0))
}

fn ip_options(fd: BorrowedFd, family: c_int) -> nix::Result<proto::IpOptsEntry> {
    let number = |level, name| -> nix::Result<Option<u32>> {
        Ok(Some(socket::option::<u32>(fd, level, name)?).filter(|value| *value != 0))
    };
    let set = |level, name| Ok(number(level, name)?.map(|_| true));
    if family == libc::AF_INET6 {
        return Ok(proto::IpOptsEntry {
            freebind: set(libc::SOL_IPV6, IPV6_FREEBIND)?,
            pktinfo: set(libc::SOL_IPV6, IPV6_RECVPKTINFO)?,
            ..proto::IpOptsEntry::default()
        });
    }
    Ok(proto::IpOptsEntry {
        freebind: set(libc::SOL_IP, libc::IP_FREEBIND)?,
        pktinfo: set(libc::SOL_IP, libc::IP_PKTINFO)?,
        tos: number(libc::SOL_IP, libc::IP_TOS)?,
        ttl: number(libc::SOL_IP, libc::IP_TTL)?,
        raw: None,
    })
}

fn tcp_options(fd: BorrowedFd, protocol: c_int) -> nix::Result<proto::TcpOptsEntry> {
    if protocol != libc::IPPROTO_TCP {
        return Ok(proto::TcpOptsEntry::default());
    }
    let number = |name| -> nix::Result<Option<u32>> {
        Ok(Some(socket::option::<u32>(fd, libc::SOL_TCP, name)?).filter(|value| *value != 0))
    };
    Ok(proto::TcpOptsEntry {
        cork: number(libc::TCP_CORK)?.map(|_| true),
        nodelay: number(libc::TCP_NODELAY)?.map(|_| true),
        keepcnt: number(libc::TCP_KEEPCNT)?,
        keepidle: number(libc::TCP_KEEPIDLE)?,
        keepintvl: number(libc::TCP_KEEPINTVL)?,
    })
}
