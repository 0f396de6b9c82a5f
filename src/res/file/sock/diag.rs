//! Lists the sockets of a network namespace (`sock_diag(7)`).
//!
//! This file encodes the few requests and decodes the few attributes that are needed: the crate
//! for the protocol knows neither netlink sockets nor the files of UNIX sockets.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        socket,
    },
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::state;
use crate::res::netlink::{Attributes, word};

/// The size of the receive buffer: no message of the kernel is larger.
const RECEIVE_BYTES: usize = 64 << 10;

/// `SOCK_DIAG_BY_FAMILY`, `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;

/// The flags of a request for a list: `NLM_F_REQUEST` and `NLM_F_DUMP`, `linux/netlink.h`.
const LIST: u16 = 0x301;

/// A mask of all socket states.
const ALL_STATES: u32 = u32::MAX;

/// Bits of `unix_diag_req.udiag_show`, `linux/unix_diag.h`: names, files, peers,
/// pending connections and lengths of queues.
const UNIX_SHOW: u32 = 0x1f;

/// Attributes of `linux/unix_diag.h`.
mod unix_attribute {
    pub(super) const NAME: u16 = 0;
    pub(super) const VFS: u16 = 1;
    pub(super) const PEER: u16 = 2;
    pub(super) const ICONS: u16 = 3;
    pub(super) const RQLEN: u16 = 4;
    pub(super) const SHUTDOWN: u16 = 6;
}

/// `INET_DIAG_SHUTDOWN` and `INET_DIAG_MD5SIG`, `linux/inet_diag.h`.
const INET_SHUTDOWN: u16 = 8;
const INET_MD5_KEYS: u16 = 18;

/// The bit for `INET_DIAG_INFO`. Only with it the kernel returns the keys.
const INET_SHOW_INFO: u8 = 2;

/// `NETLINK_DIAG_GROUPS`, and the bit that asks for it (`linux/netlink_diag.h`).
const NETLINK_GROUPS: u16 = 1;
const NETLINK_SHOW_GROUPS: u32 = 2;

/// `NDIAG_PROTO_ALL`: all protocols.
const NETLINK_ALL: u8 = u8::MAX;

/// `struct nlmsghdr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    len: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// `struct unix_diag_req`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct UnixRequest {
    family: u8,
    protocol: u8,
    pad: u16,
    states: u32,
    inode: u32,
    show: u32,
    cookie: [u32; 2],
}

/// `struct unix_diag_msg`.
#[derive(FromBytes)]
#[repr(C)]
struct UnixAnswer {
    _family: u8,
    kind: u8,
    state: u8,
    _pad: u8,
    inode: u32,
    _cookie: [u32; 2],
}

/// `struct inet_diag_sockid`.
#[derive(FromBytes, IntoBytes, Immutable, Default)]
#[repr(C)]
struct InetId {
    source_port: [u8; 2],
    peer_port: [u8; 2],
    source: [u32; 4],
    peer: [u32; 4],
    interface: u32,
    cookie: [u32; 2],
}

/// `struct inet_diag_req_v2`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct InetRequest {
    family: u8,
    protocol: u8,
    extensions: u8,
    pad: u8,
    states: u32,
    id: InetId,
}

/// `struct inet_diag_msg`.
#[derive(FromBytes)]
#[repr(C)]
struct InetAnswer {
    family: u8,
    state: u8,
    _timer: u8,
    _retransmits: u8,
    id: InetId,
    _expires: u32,
    receive_queue: u32,
    send_queue: u32,
    _user: u32,
    inode: u32,
}

/// Bits of `packet_diag_req.pdiag_show`, and attributes (`linux/packet_diag.h`): what a socket does,
/// its memberships, its rings.
const PACKET_SHOW: u32 = 7;
const PACKET_INFO: u16 = 0;
const PACKET_MEMBERSHIPS: u16 = 1;
const PACKET_RX_RING: u16 = 2;
const PACKET_TX_RING: u16 = 3;

/// `struct packet_diag_msg`.
#[derive(FromBytes)]
#[repr(C)]
struct PacketAnswer {
    _family: u8,
    _kind: u8,
    protocol: u16,
    inode: u32,
    _cookie: [u32; 2],
}

/// `struct packet_diag_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes)]
#[repr(C)]
pub(super) struct PacketInfo {
    pub(super) index: u32,
    pub(super) version: u32,
    pub(super) reserve: u32,
    pub(super) copy_thresh: u32,
    pub(super) timestamp: u32,
    /// `PDI_*`.
    pub(super) flags: u32,
}

/// `struct packet_diag_mclist`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes)]
#[repr(C)]
pub(super) struct PacketMembership {
    pub(super) index: u32,
    pub(super) count: u32,
    pub(super) kind: u16,
    pub(super) address_len: u16,
    pub(super) address: [u8; 32],
}

/// `struct packet_diag_ring`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes)]
#[repr(C)]
pub(super) struct PacketRing {
    pub(super) block_size: u32,
    pub(super) block_nr: u32,
    pub(super) frame_size: u32,
    pub(super) frame_nr: u32,
    pub(super) retire_tmo: u32,
    pub(super) sizeof_priv: u32,
    pub(super) features: u32,
}

/// `struct netlink_diag_req` and `struct packet_diag_req`, which have one layout.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct PlainRequest {
    family: u8,
    protocol: u8,
    pad: u16,
    inode: u32,
    show: u32,
    cookie: [u32; 2],
}

/// `struct netlink_diag_msg`.
#[derive(FromBytes)]
#[repr(C)]
struct NetlinkAnswer {
    _family: u8,
    _kind: u8,
    _protocol: u8,
    state: u8,
    port: u32,
    peer_port: u32,
    peer_group: u32,
    inode: u32,
    _cookie: [u32; 2],
}

/// A UNIX socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct UnixSocket {
    /// `SOCK_STREAM`, ...
    pub(super) kind: u8,
    /// `TCP_ESTABLISHED`, `TCP_LISTEN` or `TCP_CLOSE`.
    pub(super) state: u8,
    pub(super) inode: u32,
    /// The inode of the socket that it is connected to; 0 if there is none, or it has no inode.
    pub(super) peer: u32,
    /// Its name, including all NUL bytes that belong to it.
    pub(super) name: Vec<u8>,
    /// The inode and the kernel's device number of its file.
    pub(super) file: Option<(u32, u32)>,
    /// The inodes of sockets whose connections wait to be accepted; 0 for one that has been
    /// closed.
    pub(super) pending: Vec<u32>,
    /// The bytes, or the pending connections, in its queue.
    pub(super) receive_queue: u32,
    /// The memory of sent data that its peer has not read; the backlog of a listening socket.
    pub(super) send_queue: u32,
    /// Which directions are shut down: bit 0 for reading, bit 1 for writing.
    pub(super) shutdown: u8,
}

/// An internet socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct InetSocket {
    pub(super) receive_queue: u32,
    pub(super) send_queue: u32,
    pub(super) shutdown: u8,
    /// The keys of TCP-MD5 signatures, as an array of `struct tcp_diag_md5sig`. The kernel returns
    /// them to processes with `CAP_NET_ADMIN`.
    pub(super) md5_keys: Vec<u8>,
}

impl InetSocket {
    /// Returns how many bytes a TCP connection has received that its program has not read. The kernel
    /// lists a FIN, which ends reading (bit 0), as one more.
    pub(super) fn unread_bytes(&self) -> u32 {
        self.receive_queue.saturating_sub(u32::from(self.shutdown & 1))
    }
}

/// The internet sockets of one family and protocol.
#[derive(Clone, Debug, Default)]
pub(super) struct InetSockets {
    /// Those that have an inode, by it.
    pub(super) by_inode: HashMap<u32, InetSocket>,
    /// The local and the remote address of connections that no process has accepted yet.
    pub(super) unaccepted: Vec<(SocketAddr, SocketAddr)>,
}

/// A netlink socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NetlinkSocket {
    pub(super) state: u8,
    pub(super) port: u32,
    pub(super) peer_port: u32,
    pub(super) peer_group: u32,
    /// The groups that it has joined, 32 in a word.
    pub(super) groups: Vec<u32>,
}

/// A packet socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PacketSocket {
    /// The protocol that it receives (`ETH_P_*`), in the byte order of this machine.
    pub(super) protocol: u16,
    pub(super) info: PacketInfo,
    pub(super) memberships: Vec<PacketMembership>,
    pub(super) receive_ring: Option<PacketRing>,
    pub(super) send_ring: Option<PacketRing>,
}

/// Returns a family in the form of the requests.
fn family(number: libc::c_int) -> u8 {
    u8::try_from(number).expect("there are fewer than 256 families")
}

impl PlainRequest {
    /// Asks for all sockets of a family, with what the bits `show` name.
    fn all(number: libc::c_int, protocol: u8, show: u32) -> Self {
        Self { family: family(number), protocol, pad: 0, inode: 0, show, cookie: [0; 2] }
    }
}

/// Returns all UNIX sockets by inode.
pub(super) fn unix_sockets() -> nix::Result<HashMap<u32, UnixSocket>> {
    let request = UnixRequest {
        family: family(libc::AF_UNIX),
        protocol: 0,
        pad: 0,
        states: ALL_STATES,
        inode: 0,
        show: UNIX_SHOW,
        cookie: [0; 2],
    };
    let mut sockets = HashMap::new();
    ask(request.as_bytes(), |answer| {
        let (head, attributes) = UnixAnswer::read_from_prefix(answer).map_err(|_| Errno::EPROTO)?;
        let mut found = UnixSocket {
            kind: head.kind,
            state: head.state,
            inode: head.inode,
            ..UnixSocket::default()
        };
        for (kind, value) in Attributes(attributes) {
            let word = |position: usize| word(value, position);
            match kind {
                unix_attribute::NAME => found.name = value.to_owned(),
                unix_attribute::VFS => found.file = Some((word(0), word(1))),
                unix_attribute::PEER => found.peer = word(0),
                unix_attribute::ICONS => found.pending = words(value),
                unix_attribute::RQLEN => {
                    (found.receive_queue, found.send_queue) = (word(0), word(1));
                }
                unix_attribute::SHUTDOWN => found.shutdown = value.first().copied().unwrap_or(0),
                _ => {}
            }
        }
        sockets.insert(found.inode, found);
        Ok(())
    })?;
    Ok(sockets)
}

/// Returns the internet sockets of one family and protocol, except those without a port.
///
/// # Errors
/// `ENOENT` if the kernel does not list sockets of this protocol.
pub(super) fn inet_sockets(family: u8, protocol: u8) -> nix::Result<InetSockets> {
    let request = InetRequest {
        family,
        protocol,
        extensions: INET_SHOW_INFO,
        pad: 0,
        states: ALL_STATES,
        id: InetId::default(),
    };
    let mut sockets = InetSockets::default();
    ask(request.as_bytes(), |answer| {
        let (head, attributes) = InetAnswer::read_from_prefix(answer).map_err(|_| Errno::EPROTO)?;
        let state = u32::from(head.state);
        // A connection that its program has closed has no inode either, but is in another state.
        if head.inode == 0 && matches!(state, state::ESTABLISHED | state::CLOSE_WAIT) {
            sockets.unaccepted.push(head.addresses());
        }
        let (receive_queue, send_queue) = (head.receive_queue, head.send_queue);
        let mut found = InetSocket { receive_queue, send_queue, ..InetSocket::default() };
        for (kind, value) in Attributes(attributes) {
            match kind {
                INET_SHUTDOWN => found.shutdown = value.first().copied().unwrap_or(0),
                INET_MD5_KEYS => found.md5_keys = value.to_owned(),
                _ => {}
            }
        }
        sockets.by_inode.insert(head.inode, found);
        Ok(())
    })?;
    Ok(sockets)
}

impl InetAnswer {
    fn addresses(&self) -> (SocketAddr, SocketAddr) {
        let address = |words: [u32; 4], port: [u8; 2]| {
            let port = u16::from_be_bytes(port);
            if i32::from(self.family) == libc::AF_INET {
                (Ipv4Addr::from(words[0].to_ne_bytes()), port).into()
            } else {
                let mut bytes = [0; 16];
                bytes.copy_from_slice(words.as_bytes());
                (Ipv6Addr::from(bytes), port).into()
            }
        };
        let id = &self.id;
        (address(id.source, id.source_port), address(id.peer, id.peer_port))
    }
}

/// Returns all netlink sockets by inode.
///
/// # Errors
/// `ENOENT` if the kernel does not list netlink sockets.
pub(super) fn netlink_sockets() -> nix::Result<HashMap<u32, NetlinkSocket>> {
    let request = PlainRequest::all(libc::AF_NETLINK, NETLINK_ALL, NETLINK_SHOW_GROUPS);
    let mut sockets = HashMap::new();
    ask(request.as_bytes(), |answer| {
        let (head, attributes) =
            NetlinkAnswer::read_from_prefix(answer).map_err(|_| Errno::EPROTO)?;
        let groups = Attributes(attributes)
            .find(|(kind, _)| *kind == NETLINK_GROUPS)
            .map(|(_, value)| words(value))
            .unwrap_or_default();
        let found = NetlinkSocket {
            state: head.state,
            port: head.port,
            peer_port: head.peer_port,
            peer_group: head.peer_group,
            groups,
        };
        sockets.insert(head.inode, found);
        Ok(())
    })?;
    Ok(sockets)
}

/// Returns all packet sockets by inode.
///
/// # Errors
/// `ENOENT` if the kernel does not list packet sockets.
pub(super) fn packet_sockets() -> nix::Result<HashMap<u32, PacketSocket>> {
    let request = PlainRequest::all(libc::AF_PACKET, 0, PACKET_SHOW);
    let mut sockets = HashMap::new();
    ask(request.as_bytes(), |answer| {
        let (head, attributes) =
            PacketAnswer::read_from_prefix(answer).map_err(|_| Errno::EPROTO)?;
        let mut found = PacketSocket { protocol: head.protocol, ..PacketSocket::default() };
        for (kind, value) in Attributes(attributes) {
            let ring = || PacketRing::read_from_prefix(value).map(|(ring, _)| ring).ok();
            match kind {
                PACKET_INFO => {
                    let info = PacketInfo::read_from_prefix(value);
                    found.info = info.map_err(|_| Errno::EPROTO)?.0;
                }
                PACKET_MEMBERSHIPS => {
                    let mut rest = value;
                    while let Ok((membership, after)) = PacketMembership::read_from_prefix(rest) {
                        found.memberships.push(membership);
                        rest = after;
                    }
                }
                PACKET_RX_RING => found.receive_ring = ring(),
                PACKET_TX_RING => found.send_ring = ring(),
                _ => {}
            }
        }
        sockets.insert(head.inode, found);
        Ok(())
    })?;
    Ok(sockets)
}

/// Sends a request for a list, and passes each answer to `each`, without its header.
fn ask(request: &[u8], mut each: impl FnMut(&[u8]) -> nix::Result<()>) -> nix::Result<()> {
    let diag = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    let len = size_of::<Header>() + request.len();
    let header = Header {
        len: u32::try_from(len).map_err(|_| Errno::EMSGSIZE)?,
        kind: BY_FAMILY,
        flags: LIST,
        sequence: 1,
        port: 0,
    };
    let mut message = header.as_bytes().to_vec();
    message.extend_from_slice(request);
    sendto(diag.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut buffer = vec![0; RECEIVE_BYTES];
    loop {
        let received = match recv(diag.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) => return Err(Errno::EPROTO),
            Ok(received) => received,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno),
        };
        let mut rest = &buffer[..received];
        while let Ok((header, _)) = Header::read_from_prefix(rest) {
            let len = header.len as usize;
            let body = rest.get(size_of::<Header>()..len).ok_or(Errno::EPROTO)?;
            match i32::from(header.kind) {
                libc::NLMSG_DONE => return status(body),
                libc::NLMSG_ERROR => {
                    status(body)?;
                    return Err(Errno::EPROTO);
                }
                _ if header.kind == BY_FAMILY => each(body)?,
                _ => {}
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        }
    }
}

/// Decodes the negated error number at the start of a message.
fn status(body: &[u8]) -> nix::Result<()> {
    match word(body, 0).cast_signed() {
        0 => Ok(()),
        error => Err(Errno::from_raw(-error)),
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    (0..bytes.len() / size_of::<u32>()).map(|position| word(bytes, position)).collect()
}
