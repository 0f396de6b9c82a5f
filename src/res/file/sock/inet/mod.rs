//! Internet sockets: TCP, UDP, raw IP and ICMP.
//!
//! These are TCP connections, if the user asks for them ([`connection`]); TCP sockets that listen,
//! or neither listen nor are connected, or whose connection both ends have closed; raw and ICMP
//! sockets ([`raw`]); and UDP and UDP-Lite sockets in any state. The dump keeps datagrams queued in UDP sockets as far as
//! [`udp_queue`] can; CRIU drops them. Programs that use UDP must cope with lost datagrams and lost
//! ICMP errors anyway, and clients must cope with a listening socket that loses half-open
//! connections.
//!
//! A TCP socket whose connection has ended still shows its old local address, but holds the port
//! only if the program has bound it. The dump keeps the data that the socket has received, and a
//! pending error, which it reads from the memory of the kernel ([`ended`]).

mod connection;
mod dump;
mod ended;
mod forge;
mod lock;
mod md5;
mod mend;
mod multicast;
mod raw;
mod repair;
mod restore;
mod udp_queue;
mod urgent;

use std::net::SocketAddr;

use nix::{
    libc::{self, c_int},
    sys::socket::SockaddrStorage,
};

use crate::{
    image::proto,
    res::file::{FileKind, Usage},
};

pub use lock::Method as PacketLock;
pub use mend::end_repairs;

/// The row of [`KINDS`](crate::res::file::KINDS).
pub(in crate::res::file) const KIND: FileKind = FileKind {
    name: "internet socket",
    types: &[proto::FdTypes::Inetsk],
    usage: Usage::Descriptor,
    collector: |options| Box::new(dump::InetCollector::new(options.connections)),
    opener: |options| Box::new(restore::InetOpener::new(options.connections)),
};

/// How to treat TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Connections {
    /// Refuse to dump or restore them.
    #[default]
    Refuse,
    /// Keep them (`--tcp-established`).
    Keep,
    /// Close them: the program reads the data received, and then end-of-file (`--tcp-close`).
    Close,
}

/// How a dump treats TCP connections.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct DumpOptions {
    connections: Connections,
    hold_packets: Option<PacketLock>,
    skip_in_flight: bool,
}

impl DumpOptions {
    /// `hold_packets`: how to drop the packets of kept connections until the restore, if the dump
    /// kills the tree (`--network-lock`). `skip_in_flight`: leave out connections that the program
    /// has not accepted yet (`--skip-in-flight`).
    pub fn new(
        connections: Connections,
        hold_packets: Option<PacketLock>,
        skip_in_flight: bool,
    ) -> Self {
        Self { connections, hold_packets, skip_in_flight }
    }
}

/// How a restore treats TCP connections.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct RestoreOptions {
    connections: Connections,
}

impl RestoreOptions {
    /// Does this with connections of the images.
    pub fn new(connections: Connections) -> Self {
        Self { connections }
    }
}

/// `IPV6_FREEBIND` and `IPV6_RECVPKTINFO`, `linux/in6.h`.
const IPV6_FREEBIND: c_int = 78;
const IPV6_RECVPKTINFO: c_int = 49;

/// Returns what sockets of a type and protocol are called.
fn protocol_name(kind: c_int, protocol: c_int) -> String {
    if kind == libc::SOCK_RAW {
        return format!("raw IP (protocol {protocol})");
    }
    let name = match protocol {
        libc::IPPROTO_TCP => "TCP",
        libc::IPPROTO_UDP => "UDP",
        libc::IPPROTO_UDPLITE => "UDP-Lite",
        libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6 => "ICMP",
        libc::IPPROTO_SCTP => "SCTP",
        libc::IPPROTO_MPTCP => "multipath TCP",
        libc::IPPROTO_DCCP => "DCCP",
        _ => return format!("IP protocol {protocol}"),
    };
    name.to_owned()
}

/// Converts an address of either family.
fn address(found: nix::Result<SockaddrStorage>) -> Option<SocketAddr> {
    let found = found.ok()?;
    let v4 = found.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| found.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))
}

#[cfg(test)]
mod tests;
