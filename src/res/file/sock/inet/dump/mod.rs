//! Dumps internet sockets.

mod options;
mod raw_ip;
mod tcp;
mod udp;

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::CStr,
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    rc::Rc,
};

use nix::{
    errno::Errno,
    libc::{self, c_int},
    net::if_::if_nameindex,
    sys::socket::{getpeername, getsockname},
};

#[cfg(test)]
pub(super) use self::options::words;
use super::{
    DumpOptions, address,
    connection::{self, Connection},
    lock::{self, Ends, Lock, Method, Rules},
    multicast, protocol_name, raw, repair, urgent,
};
use crate::{
    causes::{tell, with_sources},
    fault::{self, Point},
    image::{SnapshotWriter, proto},
    proc,
    res::{
        file::{
            Collector, Description, FileError, Intake, Network, Result,
            error::errno,
            sock::{attributes, diag, listed::inode, opts},
        },
        kernel::{Kernel, KernelResult},
    },
    sys::{fds, supervise},
    units::{HostPid, TargetFd},
};

const HELP_KIND: &str = "have the program close it, then try again";
const HELP_MPTCP: &str = "have the program use TCP (for Go: GODEBUG=multipathtcp=0), or close it";
/// The step of the dump that enters the namespace of a socket.
const ENTER: &str = "enter the network namespace of";
const HELP_MARKED: &str = "have the program read the bytes before and behind the urgent data, then \
                           try again";
/// The name of the loopback device.
const LOOPBACK: &CStr = c"lo";
/// The step of the dump that a [`Lock`] is for.
const HOLD_BACK: &str =
    "hold back the packets (nftables; --network-lock iptables or skip does without) of";

#[derive(Debug)]
pub(super) struct InetCollector {
    options: DumpOptions,
    /// Drops the packets of the connections, by the number of the network namespace.
    hold: HashMap<u32, Hold>,
    connections: Vec<Found>,
    /// The sockets of each network namespace, by family and protocol.
    listed: HashMap<(u32, c_int, c_int), diag::InetSockets>,
    states: attributes::AttributeReader,
    /// The multicast groups that the interfaces of each network namespace receive.
    groups: HashMap<u32, Vec<proc::MulticastGroup>>,
    /// The raw and ICMP sockets of each network namespace, by family.
    raw: HashMap<(u32, c_int), Vec<proc::RawSocket>>,
    /// The memory of the kernel, once a socket has a pending error or urgent data.
    kernel: Memory,
}

/// The memory of the kernel, or why it cannot be read, once it is needed.
#[derive(Debug, Default)]
struct Memory(Option<Result<Kernel, String>>);

impl Memory {
    /// Reads from it.
    ///
    /// # Errors
    /// Why it cannot be read, with all causes.
    fn read<T>(&mut self, read: impl FnOnce(&mut Kernel) -> KernelResult<T>) -> Result<T, String> {
        let open = || Kernel::open().map_err(|error| with_sources(&error));
        let kernel = self.0.get_or_insert_with(open).as_mut().map_err(|why| why.clone())?;
        read(kernel).map_err(|error| with_sources(&error))
    }
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
    network: Rc<Network>,
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
    /// An error that the program has not read, as its number.
    error: Option<u32>,
}

impl InetCollector {
    /// Returns a collector without sockets.
    pub(super) fn new(options: DumpOptions) -> Self {
        Self {
            options,
            hold: HashMap::new(),
            connections: Vec::new(),
            listed: HashMap::new(),
            states: attributes::AttributeReader::default(),
            groups: HashMap::new(),
            raw: HashMap::new(),
            kernel: Memory::default(),
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
        let groups = match self.groups.entry(file.network_number()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(proc::multicast_groups(process_in(file))?),
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
        Ok(match self.listed.entry((file.network_number(), family, protocol)) {
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

/// Returns a process in the network namespace of a socket.
fn process_in(file: &Description) -> HostPid {
    file.network.as_ref().map_or(file.pid, |network| network.pid)
}

impl InetCollector {
    /// Returns the connections of each network namespace: the position of the first, and the
    /// addresses of all.
    fn by_network(&self) -> Vec<(usize, Rc<Network>, Vec<Ends>)> {
        let mut all: Vec<(usize, Rc<Network>, Vec<Ends>)> = Vec::new();
        for (at, found) in self.connections.iter().enumerate() {
            match all.iter_mut().find(|(_, network, _)| Rc::ptr_eq(network, &found.network)) {
                Some((.., ends)) => ends.push(found.ends),
                None => all.push((at, Rc::clone(&found.network), vec![found.ends])),
            }
        }
        all
    }

    /// Drops the packets of all connections from now on, if the dump will kill the tree.
    fn hold_packets(&mut self) -> Result<()> {
        let Some(method) = self.options.hold_packets else { return Ok(()) };
        for (first, network, ends) in self.by_network() {
            let first = &self.connections[first];
            let _visit = network.visit().map_err(first.failed(ENTER))?;
            if !network.is_dumpers() && has_only_loopback() {
                continue; // Both ends of each connection belong to the stopped tree.
            }
            // Nothing outlives the tree in its own namespace, so there is nothing to remove.
            let method = match method {
                Method::Iptables if !network.is_dumpers() => Method::Nftables,
                method => method,
            };
            let held = Hold::begin(method).and_then(|mut hold| {
                hold.as_mut().map_or(Ok(()), |hold| hold.add(&ends))?;
                self.hold.extend(hold.map(|hold| (network.number, hold)));
                Ok(())
            });
            held.map_err(|error| {
                // The message of iptables says more than an errno.
                log::error!("{HOLD_BACK} TCP connections ({}): {error}", ends.len());
                first.failed(HOLD_BACK)(errno(&error))
            })?;
        }
        Ok(())
    }

    /// Reads all connections, and updates their entries: packets have come since these were made.
    fn read_connections(&mut self, intake: &mut dyn Intake) -> Result<()> {
        let mut shutdowns = HashMap::new();
        for found in &mut self.connections {
            let _visit = found.network.visit().map_err(found.failed(ENTER))?;
            let shutdowns = match shutdowns.entry((found.network.number, found.family)) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => &*place.insert(found.list()?),
            };
            let listed = shutdowns.by_inode.get(&found.inode);
            let mut connection = found.read(listed, &mut self.kernel)?;
            connection.urgent_sent = found.urgent_sent(&connection, &mut self.kernel);
            if !connection::is_connection(connection.state) {
                return Err(found.failed("keep an end that has just been reset of")(
                    Errno::ECONNRESET,
                ));
            }
            if let Some(entry) = intake.entry(found.id) {
                if let Some(entry) = entry.isk.as_mut() {
                    entry.state = connection.state;
                    entry.shutdown = opts::shutdown(listed.map_or(0, |listed| listed.shutdown));
                }
                if let Some(state) = entry.sock.as_mut() {
                    state.urgent = connection.urgent;
                    state.urgent_sent = connection.urgent_sent;
                }
            }
            found.connection = Some(connection);
        }
        Ok(())
    }

    fn try_to_part(&mut self, dump: &str) -> Result<()> {
        let Some(first) = self.connections.first() else { return Ok(()) };
        supervise::note_repair(None);
        for (first, network, ends) in self.by_network() {
            if let Some(Hold::Table(_)) = self.hold.get(&network.number) {
                let first = &self.connections[first];
                if network.is_dumpers() {
                    supervise::note_packets(dump);
                }
                let _visit = network.visit().map_err(first.failed(ENTER))?;
                lock::keep(dump, &ends).map_err(|error| first.failed(HOLD_BACK)(errno(&error)))?;
            }
        }
        for found in &self.connections {
            // Closing the socket must not send the peer a packet.
            repair::begin(found.fd.as_fd())
                .map_err(found.failed("end without a packet (TCP_REPAIR)"))?;
        }
        fault::hit(Point::TcpParted).map_err(|_| first.failed("go on with")(Errno::EIO))?;
        for hold in self.hold.values_mut() {
            if let Hold::Rules(rules) = hold {
                rules.keep();
            }
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
        for (_, network, _) in self.by_network() {
            if let Some(Hold::Table(_)) = self.hold.remove(&network.number)
                && let Err(error) =
                    network.visit().map_err(io::Error::from).and_then(|_visit| lock::lift(dump))
            {
                let what = format!("packets of the tree's connections are held back: {error}");
                tell(log::Level::Error, &what);
            }
        }
        supervise::clear_repair();
    }
}

/// Whether the network namespace of the calling thread has no device but the loopback device, so that
/// all packets in it come from itself.
fn has_only_loopback() -> bool {
    if_nameindex().is_ok_and(|all| all.iter().all(|one| one.name() == LOOPBACK))
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
            state.error = ended.error;
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
            ns_id: Some(file.network_number()),
            shutdown: opts::shutdown(facts.shutdown),
            tcp_opts: Some(options::tcp_options(fd, (kind, protocol)).map_err(&failed)?),
        };
        Ok(proto::FileEntry {
            r#type: proto::FdTypes::Inetsk.into(),
            id: file.id,
            isk: Some(entry.into()),
            sock: Some(state.into()),
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
            // Outside of the tree's own namespaces there is at most one.
            let of_dumper = self.connections.iter().find(|found| found.network.is_dumpers());
            let hold = of_dumper.and_then(|found| self.hold.get(&found.network.number));
            let method = match hold.or(self.hold.values().next()) {
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
    /// Lists the TCP sockets of its network, which the caller visits.
    fn list(&self) -> Result<diag::InetSockets> {
        let protocol = u8::try_from(libc::IPPROTO_TCP).expect("it is 6");
        let family = u8::try_from(self.family).expect("families are small");
        let listed = diag::inet_sockets(family, protocol);
        listed.map_err(self.failed("list the sockets of the network for"))
    }

    /// Reads its state; `listed` is what `sock_diag(7)` has shown of it.
    fn read(&self, listed: Option<&diag::InetSocket>, memory: &mut Memory) -> Result<Connection> {
        let failed = || self.failed("look into the connection of (TCP_REPAIR)");
        let fd = self.fd.as_fd();
        let mut plain = Connection::read(fd);
        let has_more = match &plain {
            Ok(found) => {
                let bytes = found.entry.inq_len;
                listed.is_some_and(|listed| listed.unread_bytes() > bytes) && self.has_mark()?
            }
            // A peek ends at the mark.
            Err(errno) => *errno == Errno::EAGAIN,
        };
        if !has_more && !urgent::waits(fd).map_err(self.failed("poll"))? {
            return plain.map_err(failed());
        }
        let marked = memory.read(|kernel| Connection::read_marked(kernel, fd)).map_err(|why| {
            let (own, peer) = self.ends;
            FileError::Unsupported {
                pid: self.pid,
                fd: self.number,
                what: format!("the TCP connection {own} -> {peer}, with urgent data ({why})"),
                help: HELP_MARKED,
            }
        })?;
        if let Some(marked) = marked.map_err(failed())? {
            plain = Ok(marked);
        }
        plain.map_err(failed())
    }

    /// Returns how many of the bytes that it has sent, or is to send, end with an urgent byte.
    fn urgent_sent(&self, connection: &Connection, memory: &mut Memory) -> Option<u32> {
        if connection.sent.is_empty() {
            return None;
        }
        match memory.read(|kernel| urgent::sent(kernel, self.fd.as_fd())) {
            // The peer may have acknowledged bytes since.
            Ok(bytes) => bytes.filter(|bytes| *bytes <= connection.entry.outq_len),
            Err(why) => {
                let (own, peer) = self.ends;
                log::debug!("urgent data sent from {own} to {peer} would not stay urgent: {why}");
                None
            }
        }
    }

    /// Whether a mark of urgent data is in the received bytes. The kernel then returns only the bytes
    /// before the mark, but lists the number of all of them.
    fn has_mark(&self) -> Result<bool> {
        const LOOKS: usize = 10;
        let failed = || self.failed("look for urgent data in");
        for _ in 0..LOOKS {
            let before = fds::readable_bytes(self.fd.as_fd()).map_err(failed())?;
            let all = self.list()?;
            if before == fds::readable_bytes(self.fd.as_fd()).map_err(failed())? {
                let listed = all.by_inode.get(&self.inode);
                return Ok(listed.is_some_and(|listed| listed.unread_bytes() > before));
            }
        }
        Ok(false)
    }

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
