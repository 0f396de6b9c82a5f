//! What is queued in UDP sockets: `sk_state_entry.datagrams`, which is this program's own.
//!
//! A datagram is worth nothing without the address that it came from. So it is sent again from
//! that address, by a raw socket, which may use any, and through the loopback device, so that
//! nothing leaves the machine. What arrived is compared with what was sent. When, through
//! which device and to which of several addresses a datagram came is lost.
//!
//! That takes a socket that nobody shares the port with, or it could be the other that
//! receives; and privileges (`CAP_NET_RAW`). Otherwise the queue is lost, and the log says so.

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

/// More than a datagram can have.
const DATAGRAM_BYTES: usize = 64 << 10;

/// Bytes of headers (`struct udphdr`, `iphdr`, `ipv6hdr`), and what is in them.
const UDP_HEADER_BYTES: usize = 8;
const IPV4_HEADER_BYTES: usize = 20;
const IPV4_VERSION_AND_LENGTH: u8 = 0x45;
const IPV6_VERSION: u8 = 0x60;
const HOPS: u8 = 64;
const UDP: u8 = 17;

/// The device that packets leave and come back by.
const LOOPBACK: &[u8] = b"lo";

/// Returns what is queued in a UDP socket without an error; `None` if its senders cannot be
/// told well enough to send it again.
///
/// # Errors
/// What `recvmsg(2)` returns.
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

/// Sends datagrams once more to a socket with the name `own`, which is not connected yet.
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
            "{}: {} of the {} datagrams that were in its queue are there again\nhelp: see \
             whether a firewall drops the others",
            restored.object,
            arrived.map_or(0, |arrived| arrived.len()),
            datagrams.len()
        ),
        Err(errno) => log::warn!(
            "{}: the {} datagrams that were in its queue are lost: {errno}\nhelp: run rcriu \
             with CAP_NET_RAW, which sending them again takes",
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
    // IPv4 is IPv4, also to a socket of the other family.
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

/// Makes a socket that is given packets with their headers.
fn raw_socket(family: libc::c_int) -> nix::Result<OwnedFd> {
    let raw = socket::create(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    socket::set_option(raw.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, LOOPBACK)?;
    Ok(raw)
}

/// Returns a packet with all headers; `None` if there can be none of this length, or from
/// one family to the other.
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
            // The kernel fills in the length, the number and the sum; UDP needs none.
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

/// Returns the sum of RFC 1071, as UDP has it: never 0, which means none.
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
    let mut sum: u64 = bytes.chunks(2).map(word).sum();
    while sum > u64::from(u16::MAX) {
        sum = (sum & u64::from(u16::MAX)) + (sum >> 16);
    }
    let sum = !u16::try_from(sum).expect("it was folded");
    if sum == 0 { u16::MAX } else { sum }
}
