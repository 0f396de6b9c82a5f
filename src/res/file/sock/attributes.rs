//! State of sockets that CRIU's images have no field for: `file_entry.sock`, an extension.
//!
//! [`crate::docs::state`] lists what becomes of all other state of sockets.
//!
//! The dump compares options with those of a new socket of the same kind, so it needs no list of
//! a kernel's defaults.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    libc::{self, c_int},
};

use super::opts::{self, Subject};
use crate::{
    image::proto::{SkOptionEntry, SkPeerEntry, SkStateEntry},
    res::file::{Description, Result},
    sys::socket,
    units::{HostId, HostPid, PidMap},
};

/// The user id of no user.
const NO_ID: u32 = u32::MAX;

/// The most bytes received by an ended TCP connection that the images hold.
pub(super) const RECEIVED_MAX_BYTES: u32 = 4 << 20;

/// The size of the longest value of [`OPTIONS`]: a header of IPv6 options (`ipv6_optlen`,
/// `linux/ipv6.h`).
const VALUE_BYTES: usize = 2048;

/// `asm-generic/socket.h`; `libc` lacks them.
const SO_WIFI_STATUS: c_int = 41;
const SO_MAX_PACING_RATE: c_int = 47;
const SO_PREFER_BUSY_POLL: c_int = 69;
const SO_BUSY_POLL_BUDGET: c_int = 70;
const SO_RESERVE_MEM: c_int = 73;
const SO_TXREHASH: c_int = 74;
const SO_RCVMARK: c_int = 75;
const SO_RCVPRIORITY: c_int = 82;
const SO_PASSRIGHTS: c_int = 83;
const SO_TIMESTAMP_NEW: c_int = 63;
const SO_TIMESTAMPNS_NEW: c_int = 64;
const SO_TIMESTAMPING_NEW: c_int = 65;

/// `linux/in.h` and `linux/in6.h`.
const IP_RECVERR_RFC4884: c_int = 26;
const IP_LOCAL_PORT_RANGE: c_int = 51;
const IPV6_MULTICAST_ALL: c_int = 29;
const IPV6_FLOWINFO: c_int = 11;
const IPV6_FLOWINFO_SEND: c_int = 33;
const IPV6_ADDR_PREFERENCES: c_int = 72;
const IPV6_ROUTER_ALERT_ISOLATE: c_int = 30;
/// The older options for messages with what came with a packet (RFC 2292).
const IPV6_2292: [c_int; 5] = [2, 3, 4, 5, 8];
const IPV6_RECVERR_RFC4884: c_int = 31;
const IPV6_AUTOFLOWLABEL: c_int = 70;
const IPV6_MINHOPCOUNT: c_int = 73;
const IPV6_RECVORIGDSTADDR: c_int = 74;
const IPV6_UNICAST_IF: c_int = 76;
const IPV6_RECVFRAGSIZE: c_int = 77;

/// `linux/tcp.h` and `linux/udp.h`.
const TCP_NOTSENT_LOWAT: c_int = 25;
const TCP_SAVE_SYN: c_int = 27;
const TCP_FASTOPEN_NO_COOKIE: c_int = 34;
const TCP_TX_DELAY: c_int = 37;
/// Only without a datagram that is held back: one is refused.
const UDP_CORK: c_int = 1;
const UDP_NO_CHECK6_TX: c_int = 101;
const UDP_NO_CHECK6_RX: c_int = 102;

/// `linux/in6.h`: where a raw socket of IPv6 has its checksum.
const SOL_RAW: c_int = 255;
const IPV6_CHECKSUM: c_int = 7;

/// `linux/if_packet.h`.
const PACKET_TX_HAS_OFF: c_int = 19;
const PACKET_QDISC_BYPASS: c_int = 20;
const PACKET_IGNORE_OUTGOING: c_int = 23;
const PACKET_VNET_HDR_SZ: c_int = 24;

/// `linux/netlink.h`.
const NETLINK_PKTINFO: c_int = 3;
const NETLINK_BROADCAST_ERROR: c_int = 4;
const NETLINK_NO_ENOBUFS: c_int = 5;
const NETLINK_LISTEN_ALL_NSID: c_int = 8;
const NETLINK_CAP_ACK: c_int = 10;
const NETLINK_EXT_ACK: c_int = 11;
const NETLINK_GET_STRICT_CHK: c_int = 12;

/// Options that are set to the same value that getting them returns. A kind of socket may lack
/// some of them.
const OPTIONS: &[(c_int, &[c_int])] = &[
    (
        libc::SOL_SOCKET,
        &[
            libc::SO_TIMESTAMP,
            libc::SO_TIMESTAMPNS,
            libc::SO_TIMESTAMPING,
            libc::SO_RXQ_OVFL,
            libc::SO_SELECT_ERR_QUEUE,
            libc::SO_BUSY_POLL,
            libc::SO_ZEROCOPY,
            opts::SO_PASSPIDFD,
            SO_WIFI_STATUS,
            SO_MAX_PACING_RATE,
            SO_PREFER_BUSY_POLL,
            SO_BUSY_POLL_BUDGET,
            SO_TXREHASH,
            SO_RCVMARK,
            SO_RCVPRIORITY,
            SO_PASSRIGHTS,
            // With one of these, the older form of `SO_TIMESTAMPING` shows a value, too.
            SO_TIMESTAMP_NEW,
            SO_TIMESTAMPNS_NEW,
            SO_TIMESTAMPING_NEW,
            libc::SO_DEBUG,
            libc::SO_TXTIME,
            libc::SO_LOCK_FILTER,
        ],
    ),
    (
        libc::SOL_TCP,
        &[
            libc::TCP_MAXSEG,
            libc::TCP_SYNCNT,
            libc::TCP_LINGER2,
            libc::TCP_DEFER_ACCEPT,
            libc::TCP_CONGESTION,
            libc::TCP_THIN_LINEAR_TIMEOUTS,
            libc::TCP_USER_TIMEOUT,
            libc::TCP_FASTOPEN,
            libc::TCP_FASTOPEN_CONNECT,
            libc::TCP_INQ,
            TCP_NOTSENT_LOWAT,
            TCP_SAVE_SYN,
            TCP_FASTOPEN_NO_COOKIE,
            TCP_TX_DELAY,
        ],
    ),
    (
        libc::SOL_IP,
        &[
            libc::IP_OPTIONS,
            libc::IP_TRANSPARENT,
            libc::IP_RECVERR,
            libc::IP_RECVTTL,
            libc::IP_RECVTOS,
            libc::IP_RECVOPTS,
            libc::IP_RETOPTS,
            libc::IP_RECVORIGDSTADDR,
            libc::IP_PASSSEC,
            libc::IP_MTU_DISCOVER,
            libc::IP_MULTICAST_IF,
            libc::IP_MULTICAST_TTL,
            libc::IP_MULTICAST_LOOP,
            libc::IP_MULTICAST_ALL,
            libc::IP_UNICAST_IF,
            libc::IP_BIND_ADDRESS_NO_PORT,
            libc::IP_MINTTL,
            libc::IP_NODEFRAG,
            libc::IP_CHECKSUM,
            libc::IP_RECVFRAGSIZE,
            IP_RECVERR_RFC4884,
            IP_LOCAL_PORT_RANGE,
        ],
    ),
    (
        libc::SOL_IPV6,
        &[
            libc::IPV6_UNICAST_HOPS,
            libc::IPV6_MULTICAST_IF,
            libc::IPV6_MULTICAST_HOPS,
            libc::IPV6_MULTICAST_LOOP,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_RECVERR,
            libc::IPV6_RECVHOPLIMIT,
            libc::IPV6_RECVRTHDR,
            libc::IPV6_RECVHOPOPTS,
            libc::IPV6_RECVDSTOPTS,
            libc::IPV6_RECVTCLASS,
            libc::IPV6_RECVPATHMTU,
            libc::IPV6_TCLASS,
            libc::IPV6_DONTFRAG,
            libc::IPV6_TRANSPARENT,
            IPV6_MULTICAST_ALL,
            IPV6_FLOWINFO,
            IPV6_FLOWINFO_SEND,
            IPV6_ADDR_PREFERENCES,
            IPV6_ROUTER_ALERT_ISOLATE,
            IPV6_2292[0],
            IPV6_2292[1],
            IPV6_2292[2],
            IPV6_2292[3],
            IPV6_2292[4],
            libc::IPV6_HOPOPTS,
            libc::IPV6_RTHDRDSTOPTS,
            libc::IPV6_RTHDR,
            libc::IPV6_DSTOPTS,
            IPV6_RECVERR_RFC4884,
            IPV6_AUTOFLOWLABEL,
            IPV6_MINHOPCOUNT,
            IPV6_RECVORIGDSTADDR,
            IPV6_UNICAST_IF,
            IPV6_RECVFRAGSIZE,
        ],
    ),
    (
        libc::SOL_UDP,
        &[UDP_CORK, libc::UDP_GRO, libc::UDP_SEGMENT, UDP_NO_CHECK6_TX, UDP_NO_CHECK6_RX],
    ),
    (SOL_RAW, &[IPV6_CHECKSUM]),
    (
        libc::SOL_PACKET,
        &[PACKET_TX_HAS_OFF, PACKET_QDISC_BYPASS, PACKET_IGNORE_OUTGOING, PACKET_VNET_HDR_SZ],
    ),
    (
        libc::SOL_NETLINK,
        &[
            NETLINK_PKTINFO,
            NETLINK_BROADCAST_ERROR,
            NETLINK_NO_ENOBUFS,
            NETLINK_LISTEN_ALL_NSID,
            NETLINK_CAP_ACK,
            NETLINK_EXT_ACK,
            NETLINK_GET_STRICT_CHK,
        ],
    ),
];

/// Options in [`OPTIONS`] that stream sockets return but do not let a program set.
const OF_DATAGRAMS: &[(c_int, c_int)] = &[
    (libc::SOL_IP, libc::IP_MULTICAST_IF),
    (libc::SOL_IP, libc::IP_MULTICAST_TTL),
    (libc::SOL_IP, libc::IP_MULTICAST_LOOP),
    (libc::SOL_IPV6, libc::IPV6_MULTICAST_IF),
    (libc::SOL_IPV6, libc::IPV6_MULTICAST_HOPS),
    (libc::SOL_IPV6, libc::IPV6_MULTICAST_LOOP),
];

/// Options that the dump cannot record; it warns if they are in use.
const LOST: &[(c_int, c_int, &str)] = &[
    (libc::SOL_SOCKET, SO_RESERVE_MEM, "SO_RESERVE_MEM"),
    (libc::SOL_TCP, libc::TCP_REPAIR, "TCP_REPAIR"),
];

fn value(fd: BorrowedFd, level: c_int, name: c_int) -> Option<Vec<u8>> {
    let mut value = [0; VALUE_BYTES];
    let len = socket::option_bytes(fd, level, name, &mut value).ok()?;
    Some(value.get(..len)?.to_vec())
}

/// The value of each of [`OPTIONS`], in order; `None` if the socket lacks it.
type Values = Vec<Option<Vec<u8>>>;

/// Reads the state of sockets.
#[derive(Debug, Default)]
pub(super) struct AttributeReader {
    /// The values of new sockets, by family, type and protocol.
    defaults: HashMap<(c_int, c_int, c_int), Values>,
}

impl AttributeReader {
    /// Returns the state of a socket, and warns about what a restore loses. Changes nothing.
    pub(super) fn read(&mut self, file: &Description, what: &str) -> Result<SkStateEntry> {
        let fd = file.fd.as_fd();
        let ask = file.failed("ask for the type of");
        let family = opts::family(fd).map_err(&ask)?;
        let kind = opts::kind(fd).map_err(&ask)?;
        let protocol = opts::protocol(fd).map_err(&ask)?;
        // getsockopt(2) returns only classic filters.
        if socket::filter(fd) == Err(Errno::EACCES) {
            let what = format!("{what}, with an eBPF program as its filter (SO_ATTACH_BPF)");
            let help = "have the program detach it (SO_DETACH_FILTER), then try again";
            return Err(file.unsupported(what, help));
        }
        let names = || OPTIONS.iter().flat_map(|(level, names)| names.iter().map(|n| (*level, *n)));
        let defaults = self.defaults.entry((family, kind, protocol)).or_insert_with(|| {
            let new = socket::create(family, kind, protocol).ok();
            let of_new = |(level, name)| value(new.as_ref()?.as_fd(), level, name);
            names().map(of_new).collect()
        });
        let mut options = Vec::new();
        for ((level, name), default) in names().zip(defaults) {
            if kind == libc::SOCK_STREAM && OF_DATAGRAMS.contains(&(level, name)) {
                continue;
            }
            if let Some(value) = value(fd, level, name)
                && Some(&value) != default.as_ref()
            {
                options.push(SkOptionEntry { level, name, value });
            }
        }
        for (level, name, called) in LOST {
            let value = value(fd, *level, *name);
            if value.is_some_and(|value| value.iter().any(|byte| *byte != 0)) {
                log::warn!("{what} uses {called}, which images cannot hold: it will be lost");
            }
        }
        Ok(SkStateEntry { peek_off: peek_offset(fd), options, ..SkStateEntry::default() })
    }
}

/// Returns the peer credentials of a socket, if it has any.
pub(super) fn peer(fd: BorrowedFd, pids: &PidMap) -> nix::Result<Option<SkPeerEntry>> {
    let [pid, uid, gid]: [u32; 3] = socket::option(fd, libc::SOL_SOCKET, libc::SO_PEERCRED)?;
    if pid == 0 && uid == NO_ID {
        return Ok(None);
    }
    // Kernels before 4.13 do not have this option.
    let groups = socket::peer_groups(fd).unwrap_or_default();
    let groups = groups.into_iter().map(|group| pids.ids().ns_group(HostId(group)).0).collect();
    let pid = pids.ns(HostPid(pid.cast_signed())).raw();
    let (uid, gid) = pids.ids().ns_owner((uid, gid));
    Ok(Some(SkPeerEntry { pid, uid, gid, groups }))
}

/// Returns the offset of `SO_PEEK_OFF`, if it is set.
pub(super) fn peek_offset(fd: BorrowedFd) -> Option<c_int> {
    let offset = socket::option::<c_int>(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF);
    offset.ok().filter(|offset| *offset >= 0)
}

/// Sets the options in the images that differ from the socket's.
pub(super) fn restore_options(
    fd: BorrowedFd,
    state: Option<&SkStateEntry>,
    restored: &Subject,
) -> Result<()> {
    for SkOptionEntry { level, name, value: wanted } in state.iter().flat_map(|s| &s.options) {
        if !OPTIONS.iter().any(|(of, names)| of == level && names.contains(name)) {
            let problem = format!("option {name} of level {level} is not one that rcriu restores");
            return Err(restored.wrong(problem));
        }
        if is_filter_lock(*level, *name) || value(fd, *level, *name).as_ref() == Some(wanted) {
            continue;
        }
        if let Err(errno) = socket::set_option(fd, *level, *name, wanted.as_slice()) {
            let object = format!("option {name} of level {level} of {}", restored.object);
            return Err(Subject { id: restored.id, object }.failed("set")(errno));
        }
    }
    Ok(())
}

fn is_filter_lock(level: c_int, name: c_int) -> bool {
    (level, name) == (libc::SOL_SOCKET, libc::SO_LOCK_FILTER)
}

/// Locks the filter of a socket (`SO_LOCK_FILTER`), after it was attached.
pub(super) fn lock_filter(
    fd: BorrowedFd,
    state: Option<&SkStateEntry>,
    restored: &Subject,
) -> Result<()> {
    let is_lock = |option: &&SkOptionEntry| is_filter_lock(option.level, option.name);
    let Some(lock) = state.and_then(|state| state.options.iter().find(is_lock)) else {
        return Ok(());
    };
    socket::set_option(fd, lock.level, lock.name, lock.value.as_slice())
        .map_err(restored.failed("set SO_LOCK_FILTER of"))
}

/// Sets `SO_PEEK_OFF`, after the queue was filled.
pub(super) fn restore_peek_offset(
    fd: BorrowedFd,
    state: Option<&SkStateEntry>,
    restored: &Subject,
) -> Result<()> {
    let Some(offset) = state.and_then(|state| state.peek_off) else { return Ok(()) };
    socket::set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &offset)
        .map_err(restored.failed("set SO_PEEK_OFF of"))
}
