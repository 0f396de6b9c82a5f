//! Dumps internet sockets.

mod options;
mod raw_ip;
mod tcp;
mod udp;

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc::{self, c_int},
    sys::socket::{getpeername, getsockname},
};

#[cfg(test)]
pub(super) use self::options::words;
use super::{
    DumpOptions, address,
    connection::{self, Connection},
    lock::{self, Ends, Lock, Method, Rules},
    multicast, protocol_name, raw, repair,
};
use crate::{
    causes::{tell, with_sources},
    fault::{self, Point},
    image::{SnapshotWriter, proto},
    proc,
    res::file::{
        Collector, Description, FileError, Intake, Result,
        error::errno,
        sock::{
            attributes, diag,
            listed::inode,
            opts::{self, NET_NS_ID},
            state,
        },
    },
    sys::supervise,
    units::{HostPid, TargetFd},
};

const HELP_KIND: &str = "have the program close it, then try again";
const HELP_MPTCP: &str = "have the program use TCP (for Go: GODEBUG=multipathtcp=0), or close it";
/// The step of the dump that a [`Lock`] is for.
const HOLD_BACK: &str =
    "hold back the packets (nftables; --network-lock iptables or skip does without) of";

#[derive(Debug)]
pub(super) struct InetCollector {
    options: DumpOptions,
    /// Drops the packets of the connections.
    hold: Option<Hold>,
    connections: Vec<Found>,
    /// The sockets of the network namespace, by family and protocol.
    listed: HashMap<(c_int, c_int), diag::InetSockets>,
    states: attributes::AttributeReader,
    /// The multicast groups that interfaces receive.
    groups: Option<Vec<proc::MulticastGroup>>,
    /// The raw and ICMP sockets of the network namespace, by family.
    raw: HashMap<c_int, Vec<proc::RawSocket>>,
}

/// The mechanism that drops packets during the dump.
#[derive(Debug)]
enum Hold {
    Table(Lock),
    Rules(Rules),
}

impl Hold {
    /// Drops nothing yet.
    fn begin(method: Method) -> io::Result<Option<Self>> {
        Ok(match method {
            Method::Nftables => Some(Self::Table(Lock::begin()?)),
            Method::Iptables => {
                supervise::note_rules(true);
                Some(Self::Rules(Rules::default()))
            }
            Method::Skip => None,
        })
    }

    fn add(&mut self, ends: &[Ends]) -> io::Result<()> {
        match self {
            Self::Table(lock) => lock.hold(ends),
            Self::Rules(rules) => rules.hold(ends),
        }
    }
}

/// A connection of the tree.
#[derive(Debug)]
struct Found {
    /// Its number in the images.
    id: u32,
    fd: OwnedFd,
    family: c_int,
    pid: HostPid,
    number: TargetFd,
    inode: u32,
    ends: Ends,
    /// `SO_REUSEADDR`.
    reuse: c_int,
    /// Its state, read after all packets were held back.
    connection: Option<Connection>,
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
    /// Keys of TCP-MD5 signatures.
    md5_keys: Vec<proto::SkMd5KeyEntry>,
    /// The address that a socket is connected to, or connects to, if `getpeername(2)` does not
    /// show it.
    peer: Option<SocketAddr>,
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
            hold: None,
            connections: Vec::new(),
            listed: HashMap::new(),
            states: attributes::AttributeReader::default(),
            groups: None,
            raw: HashMap::new(),
        }
    }

    /// Returns what `sock_diag(7)` reports of a socket, if it lists the socket.
    fn listed(
        &mut self,
        file: &Description,
        family: c_int,
        protocol: c_int,
    ) -> Result<Option<&diag::InetSocket>> {
        Ok(self.all(file, family, protocol)?.by_inode.get(&inode(file)))
    }

    /// Returns the multicast groups that a socket is in.
    fn joined(&mut self, file: &Description, family: c_int) -> Result<Vec<proto::SkGroupEntry>> {
        let groups = match &mut self.groups {
            Some(known) => known,
            none => none.insert(proc::multicast_groups(file.pid)?),
        };
        multicast::joined(file.fd.as_fd(), family, groups)
            .map_err(file.failed("find the multicast groups of"))
    }

    /// Returns all sockets of a family and protocol.
    fn all(
        &mut self,
        file: &Description,
        family: c_int,
        protocol: c_int,
    ) -> Result<&diag::InetSockets> {
        Ok(match self.listed.entry((family, protocol)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let byte = |number: c_int| u8::try_from(number).expect("families are small");
                place.insert(match diag::inet_sockets(byte(family), byte(protocol)) {
                    // This kernel is built without sock_diag for the protocol.
                    Err(Errno::ENOENT) => diag::InetSockets::default(),
                    listed => listed.map_err(file.failed("list the sockets of the network for"))?,
                })
            }
        })
    }
}

impl InetCollector {
    /// Drops the packets of all connections from now on, if the dump will kill the tree.
    fn hold_packets(&mut self) -> Result<()> {
        let (Some(method), Some(first)) = (self.options.hold_packets, self.connections.first())
        else {
            return Ok(());
        };
        let ends: Vec<_> = self.connections.iter().map(|found| found.ends).collect();
        let held = Hold::begin(method).and_then(|hold| {
            self.hold = hold;
            self.hold.as_mut().map_or(Ok(()), |hold| hold.add(&ends))
        });
        held.map_err(|error| {
            // The message of iptables says more than an errno.
            log::error!("{HOLD_BACK} TCP connections ({}): {error}", ends.len());
            first.failed(HOLD_BACK)(errno(&error))
        })
    }

    /// Reads all connections, and updates their entries: packets have come since these were made.
    fn read_connections(&mut self, intake: &mut dyn Intake) -> Result<()> {
        let mut shutdowns = HashMap::new();
        for found in &mut self.connections {
            if let Entry::Vacant(place) = shutdowns.entry(found.family) {
                let protocol = u8::try_from(libc::IPPROTO_TCP).expect("it is 6");
                let family = u8::try_from(found.family).expect("families are small");
                let listed = diag::inet_sockets(family, protocol);
                place.insert(listed.map_err(found.failed("list the sockets of the network for"))?);
            }
            let connection = Connection::read(found.fd.as_fd())
                .map_err(found.failed("look into the connection of (TCP_REPAIR)"))?;
            if !connection::is_connection(connection.state) {
                return Err(found.failed("keep an end that has just been reset of")(
                    Errno::ECONNRESET,
                ));
            }
            let listed =
                shutdowns.get(&found.family).and_then(|all| all.by_inode.get(&found.inode));
            if let Some(entry) = intake.entry(found.id).and_then(|entry| entry.isk.as_mut()) {
                entry.state = connection.state;
                entry.shutdown = opts::shutdown(listed.map_or(0, |listed| listed.shutdown));
            }
            found.connection = Some(connection);
        }
        Ok(())
    }

    fn try_to_part(&mut self, dump: &str) -> Result<()> {
        let Some(first) = self.connections.first() else { return Ok(()) };
        supervise::note_repair(None);
        if let Some(Hold::Table(_)) = &self.hold {
            let ends: Vec<_> = self.connections.iter().map(|found| found.ends).collect();
            supervise::note_packets(dump);
            lock::keep(dump, &ends).map_err(|error| first.failed(HOLD_BACK)(errno(&error)))?;
        }
        for found in &self.connections {
            // Closing the socket must not send the peer a packet.
            repair::begin(found.fd.as_fd())
                .map_err(found.failed("end without a packet (TCP_REPAIR)"))?;
        }
        fault::hit(Point::TcpParted).map_err(|_| first.failed("go on with")(Errno::EIO))?;
        if let Some(Hold::Rules(rules)) = &mut self.hold {
            rules.keep();
        }
        Ok(())
    }

    /// Runs if the tree continues after all.
    fn reconnect(&mut self, dump: &str) {
        for found in &self.connections {
            if let Err(errno) = repair::end_with(found.fd.as_fd(), found.reuse) {
                let failed = found.failed("let packets come to")(errno);
                tell(log::Level::Error, &with_sources(&failed));
            }
        }
        if let Some(Hold::Table(_)) = self.hold.take()
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
        let inode = inode(file);
        let mut own = address(getsockname(fd.as_raw_fd()));
        let name = own.map_or_else(|| "unbound".to_owned(), |own| own.to_string());
        let what = format!("the {} socket [{inode}] ({name})", protocol_name(kind, protocol));
        let peer = address(getpeername(fd.as_raw_fd())).filter(|peer| peer.port() != 0);
        let facts = match (kind, protocol) {
            (libc::SOCK_STREAM, libc::IPPROTO_TCP) => self.tcp(file, family, &what)?,
            (libc::SOCK_DGRAM, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE) => {
                self.udp(file, (family, protocol), peer.is_some(), &what)?
            }
            of if raw::is_raw(of) => self.raw(file, family, &what)?,
            (_, libc::IPPROTO_MPTCP) => return Err(file.unsupported(what, HELP_MPTCP)),
            _ => return Err(file.unsupported(what, HELP_KIND)),
        };
        let peer = peer.filter(|_| facts.ended.is_none()).or(facts.peer);
        let mut state = self.states.read(file, &what)?;
        state.datagrams = facts.datagrams;
        state.md5_keys = facts.md5_keys;
        if kind != libc::SOCK_STREAM {
            state.groups = self.joined(file, family)?;
        }
        if let Some(ended) = facts.ended {
            state.ended = Some(true);
            state.received = (!ended.received.is_empty()).then_some(ended.received);
            // The other options no longer matter, and the connection may have changed them.
            state.options.retain(|option| option.level == libc::SOL_SOCKET);
            own = own.filter(|_| ended.bound);
        }
        if connection::is_connection(facts.state) && kind == libc::SOCK_STREAM {
            // For a connection, the kernel returns the negotiated size.
            state.options.retain(|option| !is_segment_size(option));
        }
        let source_port = own.map_or(0, |own| own.port());
        // Like CRIU, number the namespace only of sockets that the kernel lists.
        let listed =
            if kind == libc::SOCK_STREAM { facts.state != state::CLOSE } else { source_port != 0 };
        let failed = file.failed("read the options of");
        let entry = proto::InetSkEntry {
            id: file.id,
            ino: inode,
            family: family.cast_unsigned(),
            r#type: kind.cast_unsigned(),
            proto: protocol.cast_unsigned(),
            state: facts.state,
            src_port: source_port.into(),
            dst_port: peer.map_or(0, |peer| peer.port().into()),
            flags: file.flags,
            backlog: facts.backlog,
            src_addr: options::words(own, family),
            dst_addr: options::words(peer, family),
            fown: file.fown,
            opts: opts::read(fd, family).map_err(&failed)?,
            v6only: options::v6only(fd, family).map_err(&failed)?,
            ip_opts: Some(options::ip_options(fd, family, (kind, protocol)).map_err(&failed)?),
            ifname: options::scope(fd, own).map_err(&failed)?,
            ns_id: listed.then_some(NET_NS_ID),
            shutdown: opts::shutdown(facts.shutdown),
            tcp_opts: Some(options::tcp_options(fd, (kind, protocol)).map_err(&failed)?),
        };
        Ok(proto::FileEntry {
            r#type: proto::FdTypes::Inetsk.into(),
            id: file.id,
            isk: Some(entry),
            sock: Some(state),
            ..proto::FileEntry::default()
        })
    }

    fn after_collect(&mut self, intake: &mut dyn Intake) -> Result<()> {
        self.hold_packets()?;
        self.read_connections(intake)
    }

    fn finish(&mut self, images: &SnapshotWriter) -> Result<()> {
        for found in &self.connections {
            if let Some(connection) = &found.connection {
                connection.write(images, found.inode)?;
            }
        }
        Ok(())
    }

    fn note(&self, inventory: &mut proto::InventoryEntry) {
        if !self.connections.is_empty() {
            let method = match self.hold {
                Some(Hold::Table(_)) => Method::Nftables,
                Some(Hold::Rules(_)) => Method::Iptables,
                None => Method::Skip,
            };
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
