//! Internet, netlink and packet sockets without connections: raw, ICMP, multicast, corked.

use std::{io::Error, mem};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, lacks, same, wait_until, write_all},
    socket_ends::arrives,
    sockets::{Address, option, own_port, receive, set_option, socket},
};

pub const ROWS: &[Row] = &[
    ("raw_sockets", raw_sockets),
    ("ping_sockets", ping_sockets),
    ("multicast_groups", multicast_groups),
    ("udp_corked", udp_corked),
    ("udp_held_back", udp_held_back),
    ("netlink_groups", netlink_groups),
    ("packet_sockets", packet_sockets),
    ("locked_filter", locked_filter),
];

/// A request of ICMP or ICMPv6 (`ping`), without its checksum.
fn request(kind: u8, identifier: u16) -> Vec<u8> {
    let mut packet = vec![kind, 0, 0, 0];
    packet.extend(identifier.to_be_bytes());
    packet.extend([0, 1, b'r', b'c', b'r', b'i', b'u', b'.']);
    packet
}

fn with_checksum(mut packet: Vec<u8>) -> Vec<u8> {
    let words = packet.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

fn raw(family: i32, protocol: i32) -> Result<i32, String> {
    sys!(socket(family, libc::SOCK_RAW, protocol))
}

fn set_bytes(fd: i32, level: i32, name: i32, value: &[u8]) -> Verdict {
    let (at, bytes) = (value.as_ptr().cast(), value.len() as u32);
    sys!(setsockopt(fd, level, name, at, bytes)).map(drop)
}

fn get_bytes(fd: i32, level: i32, name: i32) -> Result<Vec<u8>, String> {
    let (mut value, mut len) = (vec![0_u8; 1024], 1024);
    sys!(getsockopt(fd, level, name, value.as_mut_ptr().cast(), &raw mut len))?;
    value.truncate(len as usize);
    Ok(value)
}

/// Waits until a packet ends with these bytes.
fn sees(fd: i32, end: &[u8]) -> Verdict {
    wait_until("a packet", || {
        receive(fd).is_ok_and(|got| got.is_some_and(|got| got.ends_with(end)))
    })
}

fn raw_sockets(checkpoint: &Checkpoint) -> Verdict {
    const SOL_RAW: i32 = 255;
    const ICMP_FILTER: i32 = 1;
    const SOL_ICMPV6: i32 = 58;
    const ICMPV6_FILTER: i32 = 1;
    const IPV6_CHECKSUM: i32 = 7;
    const IPV6_HDRINCL: i32 = 36;
    // No other program has packets of this protocol.
    const EXPERIMENT: i32 = 253;
    // All but replies are filtered out.
    let icmp = raw(libc::AF_INET, libc::IPPROTO_ICMP)?;
    set_bytes(icmp, SOL_RAW, ICMP_FILTER, &(!1_u32).to_ne_bytes())?;
    Address::ip4(0).bind(icmp)?;
    Address::ip4(0).connect(icmp)?;
    set_option(icmp, libc::SOL_IP, libc::IP_TTL, 77)?;
    let headers = raw(libc::AF_INET, libc::IPPROTO_RAW)?;
    set_option(headers, libc::SOL_IP, libc::IP_HDRINCL, 0)?;
    let whole = raw(libc::AF_INET, EXPERIMENT)?;
    set_option(whole, libc::SOL_IP, libc::IP_HDRINCL, 1)?;
    set_option(whole, libc::SOL_IP, libc::IP_NODEFRAG, 1)?;
    let icmp6 = raw(libc::AF_INET6, libc::IPPROTO_ICMPV6)?;
    // As above: replies have the type 129.
    let mut words = [u32::MAX; 8];
    words[4] = !2;
    let words: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    set_bytes(icmp6, SOL_ICMPV6, ICMPV6_FILTER, &words)?;
    let summed = raw(libc::AF_INET6, EXPERIMENT)?;
    set_option(summed, SOL_RAW, IPV6_CHECKSUM, 2)?;
    Address::ip6(0).bind(summed)?;
    Address::ip6(0).connect(summed)?;
    let all = [icmp, headers, whole, icmp6, summed];
    let found = || -> Result<_, String> {
        let names = all.iter().map(|fd| Address::own(*fd)).collect::<Result<Vec<_>, _>>()?;
        let options = [
            get_bytes(icmp, SOL_RAW, ICMP_FILTER)?,
            get_bytes(icmp, libc::SOL_IP, libc::IP_TTL)?,
            get_bytes(headers, libc::SOL_IP, libc::IP_HDRINCL)?,
            get_bytes(whole, libc::SOL_IP, libc::IP_HDRINCL)?,
            get_bytes(whole, libc::SOL_IP, libc::IP_NODEFRAG)?,
            get_bytes(icmp6, SOL_ICMPV6, ICMPV6_FILTER)?,
            get_bytes(icmp6, libc::SOL_IPV6, IPV6_HDRINCL)?,
            get_bytes(summed, SOL_RAW, IPV6_CHECKSUM)?,
        ];
        Ok((names, options))
    };
    let before = found()?;
    checkpoint.wait();
    same("sockets", before, found()?)?;
    // They are still connected, and receive the reply but not the request.
    let id = std::process::id() as u16;
    write_all(icmp, &with_checksum(request(8, id)))?;
    let mut got = None;
    wait_until("an answer", || {
        got = receive(icmp).ok().flatten();
        got.is_some()
    })?;
    let got = got.unwrap_or_default();
    same("type of what came first", Some(&0), got.get(20))?;
    Address::ip6(0).send(icmp6, &request(128, id))?;
    sees(icmp6, &request(129, id)[4..])?;
    // The kernel writes the sum of it.
    write_all(summed, b"12\0\0of a sum")?;
    sees(summed, b"of a sum")
}

fn ping_sockets(checkpoint: &Checkpoint) -> Verdict {
    let ping = |family, protocol| sys!(socket(family, libc::SOCK_DGRAM, protocol));
    let Ok(bound) = ping(libc::AF_INET, libc::IPPROTO_ICMP) else {
        return lacks("ping sockets for this group (sysctl net.ipv4.ping_group_range)");
    };
    let id = own_port(0);
    Address::ip4(id).bind(bound)?;
    let connected = ping(libc::AF_INET6, libc::IPPROTO_ICMPV6)?;
    Address::ip6(0).connect(connected)?;
    let names = || -> Result<_, String> { Ok([Address::own(bound)?, Address::own(connected)?]) };
    let before = names()?;
    checkpoint.wait();
    same("names", before, names()?)?;
    Address::ip4(0).send(bound, &request(8, 0))?;
    sees(bound, &[&id.to_be_bytes(), &request(0, 0)[6..]].concat())?;
    write_all(connected, &request(128, 0))?;
    sees(connected, &request(129, 0)[6..])
}

/// `struct ip_mreq`, and with a source.
fn member(group: [u8; 4], interface: [u8; 4], source: &[u8]) -> Vec<u8> {
    [&group, &interface, source].concat()
}

fn multicast_groups(checkpoint: &Checkpoint) -> Verdict {
    const LOCAL: [u8; 4] = [127, 0, 0, 1];
    const SOURCE: [u8; 4] = [127, 0, 0, 9];
    let group = |last| [239, 1, 2, last];
    let port = own_port(1);
    let fd = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    Address::any4(port).bind(fd)?;
    set_option(fd, libc::SOL_IP, libc::IP_MULTICAST_ALL, 0)?;
    let any = member(group(1), LOCAL, &[]);
    set_bytes(fd, libc::SOL_IP, libc::IP_ADD_MEMBERSHIP, &any)?;
    let some = member(group(2), LOCAL, &SOURCE);
    set_bytes(fd, libc::SOL_IP, libc::IP_ADD_SOURCE_MEMBERSHIP, &some)?;
    let six = socket(libc::AF_INET6, libc::SOCK_DGRAM)?;
    Address::any6(own_port(2)).bind(six)?;
    let mut join = vec![0xff, 2];
    join.extend([0; 12]);
    join.extend([0x99, 0x99]);
    join.extend(1_u32.to_ne_bytes()); // the loopback interface
    set_bytes(six, libc::SOL_IPV6, libc::IPV6_ADD_MEMBERSHIP, &join)?;
    let send = |from: [u8; 4], last: u8, text: &[u8]| -> Verdict {
        let sender = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
        set_bytes(sender, libc::SOL_IP, libc::IP_MULTICAST_IF, &LOCAL)?;
        Address::of4(from, 0).bind(sender)?;
        Address::of4(group(last), port).send(sender, text)?;
        sys!(close(sender)).map(drop)
    };
    let arrive = || -> Verdict {
        send(LOCAL, 3, b"of another group")?;
        send(LOCAL, 2, b"of another source")?;
        send(LOCAL, 1, b"of the group")?;
        send(SOURCE, 2, b"of the source")?;
        arrives(fd, b"of the group")?;
        arrives(fd, b"of the source")?;
        same("one too many", None, receive(fd)?)
    };
    arrive()?;
    checkpoint.wait();
    arrive()?;
    // A program leaves a group by the address or interface by which it joined.
    set_bytes(fd, libc::SOL_IP, libc::IP_DROP_MEMBERSHIP, &any)?;
    set_bytes(fd, libc::SOL_IP, libc::IP_DROP_SOURCE_MEMBERSHIP, &some)?;
    set_bytes(six, libc::SOL_IPV6, libc::IPV6_DROP_MEMBERSHIP, &join)
}

const UDP_CORK: i32 = 1;

/// A pair of sockets that are connected to each other.
fn datagrams() -> Result<[i32; 2], String> {
    let [a, b] =
        [socket(libc::AF_INET, libc::SOCK_DGRAM)?, socket(libc::AF_INET, libc::SOCK_DGRAM)?];
    Address::ip4(own_port(1)).bind(a)?;
    Address::ip4(own_port(2)).bind(b)?;
    Address::ip4(own_port(2)).connect(a)?;
    Ok([a, b])
}

fn udp_corked(checkpoint: &Checkpoint) -> Verdict {
    let [a, b] = datagrams()?;
    set_option(a, libc::SOL_UDP, UDP_CORK, 1)?;
    checkpoint.wait();
    write_all(a, b"one ")?;
    write_all(a, b"datagram")?;
    same("what has left", None, receive(b)?)?;
    set_option(a, libc::SOL_UDP, UDP_CORK, 0)?;
    arrives(b, b"one datagram")
}

/// A dump refuses this.
fn udp_held_back(checkpoint: &Checkpoint) -> Verdict {
    let [a, b] = datagrams()?;
    set_option(a, libc::SOL_UDP, UDP_CORK, 1)?;
    write_all(a, b"one ")?;
    checkpoint.wait();
    write_all(a, b"datagram")?;
    set_option(a, libc::SOL_UDP, UDP_CORK, 0)?;
    arrives(b, b"one datagram")
}

fn netlink_groups(checkpoint: &Checkpoint) -> Verdict {
    const LIST_MEMBERSHIPS: i32 = 9;
    // RTNLGRP_DECnet_IFADDR. The kernel sends nothing there any more, whatever other tests do to links.
    const DECNET: i32 = 13;
    const BRIDGE: i32 = 33; // RTNLGRP_BRVLAN
    let route = || sys!(socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE));
    let [bound, unbound] = [route()?, route()?];
    Address::netlink(0).bind(bound)?;
    for fd in [bound, unbound] {
        set_option(fd, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, DECNET)?;
        set_option(fd, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, BRIDGE)?;
    }
    let found = || -> Result<_, String> {
        let groups = |fd| get_bytes(fd, libc::SOL_NETLINK, LIST_MEMBERSHIPS);
        Ok([groups(bound)?, groups(unbound)?, Address::own(bound)?, Address::own(unbound)?])
    };
    let before = found()?;
    ensure!(before[0][4] & 1 == 1, "not in a group above 32: {:?}", before[0]);
    checkpoint.wait();
    same("groups and names", before, found()?)
}

fn packet_sockets(checkpoint: &Checkpoint) -> Verdict {
    const IP: u16 = 0x0800; // ETH_P_IP
    const LOOPBACK: i32 = 1;
    let packet =
        |kind, protocol: u16| sys!(socket(libc::AF_PACKET, kind, i32::from(protocol.to_be())));
    let [raw, cooked] = [packet(libc::SOCK_RAW, 0)?, packet(libc::SOCK_DGRAM, IP)?];
    let idle = packet(libc::SOCK_RAW, 0)?;
    // SAFETY: all zeros is a valid value.
    let mut name: libc::sockaddr_ll = unsafe { mem::zeroed() };
    (name.sll_family, name.sll_protocol) = (libc::AF_PACKET as u16, IP.to_be());
    name.sll_ifindex = LOOPBACK;
    let bind =
        |fd: i32| sys!(bind(fd, (&raw const name).cast(), size_of_val(&name) as u32)).map(drop);
    bind(raw)?;
    bind(cooked)?;
    // UDP to a port of ours alone, as tcpdump(8) would have it: the protocol at 9, the port at 22.
    // Nothing else gets into the queues, whatever other programs send.
    let port = own_port(3);
    for (fd, headers) in [(cooked, 0), (raw, 14)] {
        let filter = [
            (0x30, 0, 0, headers + 9),
            (0x15, 0, 3, 17),
            (0x28, 0, 0, headers + 22),
            (0x15, 0, 1, u32::from(port)),
            (6, 0, 0, u32::MAX),
            (6, 0, 0, 0),
        ];
        let mut steps =
            filter.map(|(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k }).to_vec();
        let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
        let (at, bytes) = ((&raw const program).cast(), size_of_val(&program) as u32);
        sys!(setsockopt(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, at, bytes))?;
    }
    while receive(raw)?.is_some() || receive(cooked)?.is_some() {}
    let options = [
        (raw, libc::PACKET_AUXDATA, 1),
        (raw, libc::PACKET_VERSION, 2),
        (raw, libc::PACKET_RESERVE, 16),
        (raw, libc::PACKET_LOSS, 1),
        (raw, 20, 1),                                             // PACKET_QDISC_BYPASS
        (cooked, 23, 0),                                          // PACKET_IGNORE_OUTGOING
        (cooked, libc::PACKET_FANOUT, i32::from(port) | 2 << 16), // by processor
    ];
    for (fd, option, value) in options {
        set_option(fd, libc::SOL_PACKET, option, value)?;
    }
    let promiscuous = libc::packet_mreq {
        mr_ifindex: LOOPBACK,
        mr_type: libc::PACKET_MR_PROMISC as u16,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    let at = (&raw const promiscuous).cast();
    let bytes = size_of_val(&promiscuous) as u32;
    for _ in 0..2 {
        sys!(setsockopt(raw, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, at, bytes))?;
    }
    let found = || -> Result<_, String> {
        let values = options.iter().map(|(fd, name, _)| option(*fd, libc::SOL_PACKET, *name));
        let names = [raw, cooked, idle].map(Address::own);
        Ok((values.collect::<Result<Vec<_>, _>>()?, names))
    };
    let before = found()?;
    same("values", options.map(|(_, _, value)| value).to_vec(), before.0.clone())?;
    checkpoint.wait();
    same("options and names", before, found()?)?;
    // Anything that comes now passes the filter.
    while receive(cooked)?.is_some() {}
    let sender = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    Address::ip4(own_port(2)).send(sender, b"to another port")?;
    Address::ip4(port).send(sender, b"to this port")?;
    let mut got = None;
    wait_until("a packet", || {
        got = receive(cooked).ok().flatten();
        got.is_some()
    })?;
    ensure!(got.is_some_and(|got| got.ends_with(b"to this port")), "another packet came first");
    sees(raw, b"to this port")?;
    // It has joined twice.
    sys!(setsockopt(raw, libc::SOL_PACKET, libc::PACKET_DROP_MEMBERSHIP, at, bytes))?;
    let flags = std::fs::read_to_string("/sys/class/net/lo/flags").map_err(|e| e.to_string())?;
    let flags = flags.trim().trim_start_matches("0x");
    let flags = u32::from_str_radix(flags, 16).map_err(|e| e.to_string())?;
    ensure!(flags & libc::IFF_PROMISC as u32 != 0, "the interface is promiscuous no more");
    ensure!(receive(idle)?.is_none(), "a socket without a protocol receives");
    Ok(())
}

/// A filter that the program itself cannot take off any more.
fn locked_filter(checkpoint: &Checkpoint) -> Verdict {
    let [a, b] = datagrams()?;
    let mut steps = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: 8 + 3 }];
    let program = libc::sock_fprog { len: 1, filter: steps.as_mut_ptr() };
    let (at, bytes) = ((&raw const program).cast(), size_of_val(&program) as u32);
    sys!(setsockopt(b, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, at, bytes))?;
    set_option(b, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1)?;
    checkpoint.wait();
    write_all(a, b"cut short")?;
    arrives(b, b"cut")?;
    let gone = set_option(b, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0);
    ensure!(gone.is_err(), "the filter is gone");
    same("error", Some(libc::EPERM), Error::last_os_error().raw_os_error())
}
