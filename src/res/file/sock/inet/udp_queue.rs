//! Datagrams queued in UDP sockets: `sk_state_entry.datagrams`, an extension.
//!
//! A datagram needs the address of its sender. So the restore sends it again from that address,
//! through a raw socket, which may use any address, and through the loopback device, so that
//! nothing leaves the machine. Then it compares the queue with what it has sent. The time of
//! arrival, the device, and which of several local addresses a datagram came to are lost.
//!
//! The restore needs `CAP_NET_RAW`. The port must not be shared: the other socket could receive the
//! datagram. In all other cases the queue is lost, and the log says so.

use std::{
    io::IoSliceMut,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{MsgFlags, SockaddrStorage, recvmsg, sendto},
};

use super::address;
use crate::{
    image::proto::SkDatagramEntry,
    res::file::sock::{opts::Subject, queue::PeekOffset},
    sys::socket,
};

/// The size of the receive buffer: more than any datagram.
const DATAGRAM_BYTES: usize = 64 << 10;

/// Header sizes (`struct udphdr`, `iphdr`, `ipv6hdr`) and field values.
const UDP_HEADER_BYTES: usize = 8;
const IPV4_HEADER_BYTES: usize = 20;
const IPV4_VERSION_AND_LENGTH: u8 = 0x45;
const IPV6_VERSION: u8 = 0x60;
const HOPS: u8 = 64;
const UDP: u8 = 17;

/// The device through which packets are sent and come back.
const LOOPBACK: &[u8] = b"lo";

/// Returns the queue of a UDP socket without a pending error; `None` if the address of a sender is
/// not enough to send its datagram again.
pub(super) fn peek(fd: BorrowedFd) -> nix::Result<Option<Vec<SkDatagramEntry>>> {
    let mut offset = PeekOffset::new(fd)?;
    offset.set(0)?;
    let mut found = Vec::new();
    let mut buffer = vec![0; DATAGRAM_BYTES];
    loop {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let mut data = [IoSliceMut::new(&mut buffer)];
        let message = match recvmsg::<SockaddrStorage>(fd.as_raw_fd(), &mut data, None, flags) {
            Err(Errno::EAGAIN) => return Ok(Some(found)),
            Err(Errno::EINTR) => continue,
            message => message?,
        };
        let (bytes, from) = (message.bytes, message.address);
        let Some(from) = address(from.ok_or(Errno::EDESTADDRREQ)) else { return Ok(None) };
        let from_address = match from.ip() {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) if v6.is_unicast_link_local() => return Ok(None),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let data = buffer[..bytes].to_vec();
        found.push(SkDatagramEntry { data, from_address, from_port: from.port().into() });
    }
}

/// Sends datagrams again to a socket with the address `own`, which must not be connected yet.
pub(super) fn restore(
    fd: BorrowedFd,
    own: SocketAddr,
    datagrams: &[SkDatagramEntry],
    restored: &Subject,
) {
    let sent = datagrams.iter().try_for_each(|datagram| send(own, datagram));
    let arrived = sent.and_then(|()| peek(fd));
    match arrived {
        Ok(Some(arrived)) if arrived == datagrams => {}
        Ok(arrived) => log::warn!(
            "{}: only {} of its {} queued datagrams were restored\nhelp: see \
             whether a firewall drops the others",
            restored.object,
            arrived.map_or(0, |arrived| arrived.len()),
            datagrams.len()
        ),
        Err(errno) => log::warn!(
            "{}: its {} queued datagrams are lost: {errno}\nhelp: run rcriu \
             with CAP_NET_RAW, to send them again",
            restored.object,
            datagrams.len()
        ),
    }
}

fn send(own: SocketAddr, datagram: &SkDatagramEntry) -> nix::Result<()> {
    let wrong = |_| Errno::EINVAL;
    let from = match datagram.from_address.len() {
        4 => <[u8; 4]>::try_from(datagram.from_address.as_slice()).map(IpAddr::from),
        _ => <[u8; 16]>::try_from(datagram.from_address.as_slice()).map(IpAddr::from),
    };
    // An IPv6 socket sees IPv4 senders as mapped addresses; send such datagrams as IPv4.
    let from = from.map_err(wrong)?.to_canonical();
    let to = match (own.ip().to_canonical(), from) {
        (own, IpAddr::V4(_)) if own.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        (own, IpAddr::V6(_)) if own.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        (own, _) => own,
    };
    let ports = (u16::try_from(datagram.from_port).map_err(|_| Errno::EINVAL)?, own.port());
    let packet = packet(from, to, ports, &datagram.data).ok_or(Errno::EINVAL)?;
    let raw = raw_socket(if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 })?;
    let address = SockaddrStorage::from(SocketAddr::new(to, 0));
    sendto(raw.as_raw_fd(), &packet, &address, MsgFlags::empty()).map(drop)
}

/// Creates a socket that sends packets with the headers that they have.
fn raw_socket(family: libc::c_int) -> nix::Result<OwnedFd> {
    let raw = socket::create(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    socket::set_option(raw.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, LOOPBACK)?;
    Ok(raw)
}

/// Returns a packet with all headers; `None` if it would be too long, or if the families of the
/// addresses differ.
fn packet(
    from: IpAddr,
    to: IpAddr,
    (from_port, to_port): (u16, u16),
    data: &[u8],
) -> Option<Vec<u8>> {
    let len = u16::try_from(UDP_HEADER_BYTES + data.len()).ok()?;
    let mut udp =
        [from_port.to_be_bytes(), to_port.to_be_bytes(), len.to_be_bytes(), [0; 2]].concat();
    udp.extend_from_slice(data);
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            // The kernel fills in length, id and header checksum; UDP over IPv4 needs no checksum.
            let mut packet = vec![0; IPV4_HEADER_BYTES];
            packet[0] = IPV4_VERSION_AND_LENGTH;
            (packet[8], packet[9]) = (HOPS, UDP);
            packet[12..16].copy_from_slice(&from.octets());
            packet[16..20].copy_from_slice(&to.octets());
            packet.extend(udp);
            Some(packet)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let addresses = [from.octets(), to.octets()].concat();
            let pseudo = [&addresses[..], &u32::from(len).to_be_bytes(), &[0, 0, 0, UDP]].concat();
            let sum = checksum(&[&pseudo[..], &udp].concat());
            udp[6..8].copy_from_slice(&sum.to_be_bytes());
            let mut packet = vec![IPV6_VERSION, 0, 0, 0];
            packet.extend(len.to_be_bytes());
            packet.extend([UDP, HOPS]);
            packet.extend(addresses);
            packet.extend(udp);
            Some(packet)
        }
        _ => None,
    }
}

/// Returns the checksum of RFC 1071 in the form of UDP: never 0, which would mean no checksum.
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
    let mut sum: u64 = bytes.chunks(2).map(word).sum();
    while sum > u64::from(u16::MAX) {
        sum = (sum & u64::from(u16::MAX)) + (sum >> 16);
    }
    let sum = !u16::try_from(sum).expect("it was folded");
    if sum == 0 { u16::MAX } else { sum }
}
