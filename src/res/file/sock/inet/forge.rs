//! Forged packets that appear to come from a connection's peer: its FIN, the acknowledgement of
//! the local FIN, and urgent data. Only such packets lead to the closing states, and to urgent data.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
};

use etherparse::PacketBuilder;
use nix::{
    errno::Errno,
    libc,
    sys::socket::{MsgFlags, SockaddrStorage, sendto},
};

use super::lock::MARK;
use crate::sys::socket;

/// The time to live. The packets pass no router.
const HOPS: u8 = 64;

/// The fields of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    /// The sequence number of the FIN, of the urgent byte, or of the next byte.
    pub(super) sequence: u32,
    /// The sequence number that is expected next from the other end.
    pub(super) acknowledged: u32,
    pub(super) window: u16,
    /// Whether the packet has a FIN.
    pub(super) ends: bool,
    /// The urgent byte that it has.
    pub(super) urgent: Option<u8>,
}

/// Sends a packet to `own` that appears to come from `peer`, with the mark that locks let pass.
///
/// # Errors
/// `EPERM` without `CAP_NET_RAW`; what `sendto(2)` returns.
pub(super) fn send(own: SocketAddr, peer: SocketAddr, packet: Packet) -> nix::Result<()> {
    let (bytes, family, target) = match (peer.ip().to_canonical(), own.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let start = PacketBuilder::ipv4(from.octets(), to.octets(), HOPS);
            let start = start.tcp(peer.port(), own.port(), packet.sequence, packet.window);
            (written(start, packet), libc::AF_INET, SocketAddr::from((to, 0)))
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let start = PacketBuilder::ipv6(from.octets(), to.octets(), HOPS);
            let start = start.tcp(peer.port(), own.port(), packet.sequence, packet.window);
            let mut target = own;
            target.set_port(0);
            (written(start, packet), libc::AF_INET6, target)
        }
        _ => return Err(Errno::EINVAL),
    };
    let bytes = bytes.map_err(|_| Errno::EINVAL)?;
    let fd = socket::create(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    socket::set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, &MARK)?;
    sendto(fd.as_raw_fd(), &bytes, &SockaddrStorage::from(target), MsgFlags::empty()).map(drop)
}

fn written(
    start: etherparse::PacketBuilderStep<etherparse::TcpHeader>,
    packet: Packet,
) -> io::Result<Vec<u8>> {
    let mut step = start.ack(packet.acknowledged);
    if packet.ends {
        step = step.fin();
    }
    if packet.urgent.is_some() {
        // In either meaning that Linux knows (`net.ipv4.tcp_stdurg`), 0 is the first byte.
        step = step.urg(0);
    }
    let mut bytes = Vec::new();
    step.write(&mut bytes, packet.urgent.as_slice()).map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok(bytes)
}
