//! Lists the sockets of a network namespace (`sock_diag(7)`).
//!
//! This file encodes the few requests and decodes the few attributes that are needed: the crate
//! for the protocol knows neither netlink sockets nor the files of UNIX sockets.

use std::{collections::HashMap, os::fd::AsRawFd};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        socket,
    },
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The size of the receive buffer: no message of the kernel is larger.
const RECEIVE_BYTES: usize = 64 << 10;

/// `SOCK_DIAG_BY_FAMILY`, `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;

/// The flags of a request for a list: `NLM_F_REQUEST` and `NLM_F_DUMP`, `linux/netlink.h`.
const LIST: u16 = 0x301;

/// `NLA_TYPE_MASK`, `linux/netlink.h`: the other two bits of an attribute's type are flags.
const ATTRIBUTE_KIND: u16 = 0x3fff;

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

/// `INET_DIAG_SHUTDOWN`, `linux/inet_diag.h`.
const INET_SHUTDOWN: u16 = 8;

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
    _family: u8,
    _state: u8,
    _timer: u8,
    _retransmits: u8,
    _id: InetId,
    _expires: u32,
    receive_queue: u32,
    send_queue: u32,
    _user: u32,
    inode: u32,
}

/// `struct netlink_diag_req`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct NetlinkRequest {
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct InetSocket {
    pub(super) receive_queue: u32,
    pub(super) send_queue: u32,
    pub(super) shutdown: u8,
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

/// Returns a family in the form of the requests.
fn family(number: libc::c_int) -> u8 {
    u8::try_from(number).expect("there are fewer than 256 families")
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

/// Returns the internet sockets of one family and protocol by inode, except those without a
/// port.
///
/// # Errors
/// `ENOENT` if the kernel does not list sockets of this protocol.
pub(super) fn inet_sockets(family: u8, protocol: u8) -> nix::Result<HashMap<u32, InetSocket>> {
    let request = InetRequest {
        family,
        protocol,
        extensions: 0,
        pad: 0,
        states: ALL_STATES,
        id: InetId::default(),
    };
    let mut sockets = HashMap::new();
    ask(request.as_bytes(), |answer| {
        let (head, attributes) = InetAnswer::read_from_prefix(answer).map_err(|_| Errno::EPROTO)?;
        let shutdown = Attributes(attributes)
            .find(|(kind, _)| *kind == INET_SHUTDOWN)
            .and_then(|(_, value)| value.first().copied())
            .unwrap_or(0);
        let (receive_queue, send_queue) = (head.receive_queue, head.send_queue);
        sockets.insert(head.inode, InetSocket { receive_queue, send_queue, shutdown });
        Ok(())
    })?;
    Ok(sockets)
}

/// Returns all netlink sockets by inode.
///
/// # Errors
/// `ENOENT` if the kernel does not list netlink sockets.
pub(super) fn netlink_sockets() -> nix::Result<HashMap<u32, NetlinkSocket>> {
    let request = NetlinkRequest {
        family: family(libc::AF_NETLINK),
        protocol: NETLINK_ALL,
        pad: 0,
        inode: 0,
        show: NETLINK_SHOW_GROUPS,
        cookie: [0; 2],
    };
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

fn word(bytes: &[u8], position: usize) -> u32 {
    let at = position * size_of::<u32>();
    bytes.get(at..).and_then(|rest| u32::read_from_prefix(rest).ok()).map_or(0, |found| found.0)
}

fn words(bytes: &[u8]) -> Vec<u32> {
    (0..bytes.len() / size_of::<u32>()).map(|position| word(bytes, position)).collect()
}

/// Iterates over netlink attributes: length, type and bytes, padded to a multiple of four.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (head, _) = <[u16; 2]>::read_from_prefix(self.0).ok()?;
        let len = usize::from(head[0]);
        let value = self.0.get(size_of_val(&head)..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((head[1] & ATTRIBUTE_KIND, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_end_where_they_are_cut_short() {
        let bytes = [5, 0, 6, 0, 3, 0, 0, 0, 8, 0, 2, 0, 1, 2, 3, 4, 9, 0, 1, 0, 1];
        let found: Vec<_> = Attributes(&bytes).collect();
        assert_eq!(found, [(6, &[3][..]), (2, &[1, 2, 3, 4][..])]);
        assert_eq!(word(&[1, 0, 0, 0, 2, 0, 0, 0], 1), 2);
        assert_eq!(word(&[1, 0], 0), 0);
    }
}
