//! What sockets keep of a peer that is gone, and what can be set of them only.

use std::io::Error;

use crate::{
    Row,
    kit::{Checkpoint, Verdict, bytes, same, wait_until, write_all},
    sockets::{
        Address, accept, connected, listening, option, own_port, pair, path_name, receive,
        set_option, socket,
    },
};

pub const ROWS: &[Row] = &[
    ("unix_pending_errors", unix_pending_errors),
    ("unix_reset_before_accept", unix_reset_before_accept),
    ("unix_packets_behind_an_error", unix_packets_behind_an_error),
    ("unix_peek_offset", unix_peek_offset),
    ("socket_options", socket_options),
    ("tcp_connections", tcp_connections),
    ("tcp_ended", tcp_ended),
    ("tcp_pending_errors", tcp_pending_errors),
    ("udp_pending_error", udp_pending_error),
    ("udp_queued", udp_queued),
];

/// The events that a socket shows.
fn events(fd: i32) -> Result<i16, String> {
    let mut polled = libc::pollfd { fd, events: libc::POLLIN | libc::POLLRDHUP, revents: 0 };
    sys!(poll(&raw mut polled, 1, 0))?;
    Ok(polled.revents)
}

fn has_error(fd: i32) -> bool {
    events(fd).is_ok_and(|events| events & libc::POLLERR != 0)
}

/// The error with which receiving fails.
fn failure(fd: i32) -> Result<Option<i32>, String> {
    match receive(fd) {
        Ok(Some(data)) => Err(format!("{} bytes instead of an error", data.len())),
        Ok(None) => Err("nothing instead of an error".into()),
        Err(_) => Ok(Error::last_os_error().raw_os_error()),
    }
}

/// Lets a datagram socket go elsewhere that has something unread.
fn disconnect(fd: i32) -> Verdict {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    sys!(connect(fd, &raw const nowhere, size_of::<libc::sockaddr>() as u32)).map(drop)
}

fn unix_pending_errors(checkpoint: &Checkpoint) -> Verdict {
    let kinds = [libc::SOCK_STREAM, libc::SOCK_SEQPACKET, libc::SOCK_DGRAM];
    let mut ends = Vec::new();
    for kind in kinds {
        let [left, gone] = pair(kind)?;
        write_all(left, b"never read")?;
        if kind == libc::SOCK_STREAM {
            write_all(gone, b"read first")?;
        }
        if kind == libc::SOCK_DGRAM {
            disconnect(gone)?;
        }
        sys!(close(gone))?;
        ends.push(left);
    }
    let seen = || ends.iter().map(|fd| events(*fd)).collect::<Result<Vec<_>, _>>();
    let before = seen()?;
    ensure!(before.iter().all(|events| events & libc::POLLERR != 0), "no errors: {before:?}");
    checkpoint.wait();
    same("events", before, seen()?)?;
    same("bytes before the error", Some(b"read first".to_vec()), receive(ends[0])?)?;
    for (fd, kind) in ends.into_iter().zip(kinds) {
        same("error", Some(libc::ECONNRESET), failure(fd)?)?;
        if kind != libc::SOCK_DGRAM {
            same("bytes after it", Some(Vec::new()), receive(fd)?)?;
        }
        let sent = sys!(send(fd, b"x".as_ptr().cast(), 1, libc::MSG_NOSIGNAL));
        ensure!(sent.is_err(), "something takes what is sent");
    }
    Ok(())
}

fn unix_reset_before_accept(checkpoint: &Checkpoint) -> Verdict {
    let name = path_name(checkpoint, "socket");
    let server = listening(&name, libc::SOCK_STREAM)?;
    let client = connected(&name, libc::SOCK_STREAM)?;
    sys!(close(server))?;
    ensure!(has_error(client), "no error");
    checkpoint.wait();
    same("error", Some(libc::ECONNRESET), failure(client)?)?;
    same("bytes after it", Some(Vec::new()), receive(client)?)
}

fn unix_packets_behind_an_error(checkpoint: &Checkpoint) -> Verdict {
    let [left, gone] = pair(libc::SOCK_SEQPACKET)?;
    write_all(left, b"never read")?;
    write_all(gone, b"a packet")?;
    sys!(close(gone))?;
    checkpoint.wait();
    same("error", Some(libc::ECONNRESET), failure(left)?)?;
    same("packet", Some(b"a packet".to_vec()), receive(left)?)
}

fn unix_peek_offset(checkpoint: &Checkpoint) -> Verdict {
    let mut ends = Vec::new();
    for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
        let [a, b] = pair(kind)?;
        write_all(a, b"abcdef")?;
        set_option(b, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 2)?;
        write_all(b, b"back")?;
        ends.push((a, b));
    }
    checkpoint.wait();
    for (a, b) in ends {
        same("offset", 2, option(b, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?)?;
        same("no offset", -1, option(a, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?)?;
        let mut byte = [0_u8; 3];
        sys!(recv(b, byte.as_mut_ptr().cast(), 2, libc::MSG_PEEK))?;
        same("bytes there", &b"cd"[..], &byte[..2])?;
        same("offset afterwards", 4, option(b, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?)?;
        same("all bytes", Some(b"abcdef".to_vec()), receive(b)?)?;
    }
    Ok(())
}

/// Options that the format has no place for.
fn socket_options(checkpoint: &Checkpoint) -> Verdict {
    let unix = pair(libc::SOCK_DGRAM)?[0];
    let tcp = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    let listening = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    Address::ip4(own_port(3)).bind(listening)?;
    sys!(listen(listening, 3))?;
    let udp = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    let udp6 = socket(libc::AF_INET6, libc::SOCK_DGRAM)?;
    let netlink = socket(libc::AF_NETLINK, libc::SOCK_RAW)?;
    let wanted = [
        (unix, libc::SOL_SOCKET, libc::SO_TIMESTAMP, 1),
        (unix, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1),
        (tcp, libc::SOL_TCP, libc::TCP_USER_TIMEOUT, 12_345),
        (tcp, libc::SOL_TCP, libc::TCP_MAXSEG, 1000),
        (tcp, libc::SOL_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT),
        (listening, libc::SOL_TCP, libc::TCP_DEFER_ACCEPT, 7),
        (listening, libc::SOL_TCP, libc::TCP_FASTOPEN, 5),
        (udp, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1),
        (udp, libc::SOL_IP, libc::IP_RECVERR, 1),
        (udp, libc::SOL_IP, libc::IP_RECVTTL, 1),
        (udp, libc::SOL_IP, libc::IP_MULTICAST_TTL, 7),
        (udp, libc::SOL_IP, libc::IP_MULTICAST_LOOP, 0),
        (udp6, libc::SOL_IPV6, libc::IPV6_RECVERR, 1),
        (udp6, libc::SOL_IPV6, libc::IPV6_UNICAST_HOPS, 9),
        (udp6, libc::SOL_IPV6, libc::IPV6_MULTICAST_LOOP, 0),
        (netlink, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1),
    ];
    for (fd, level, name, value) in wanted {
        set_option(fd, level, name, value)?;
    }
    let found = || {
        let found = wanted.iter().map(|(fd, level, name, _)| option(*fd, *level, *name));
        found.collect::<Result<Vec<_>, _>>()
    };
    let before = found()?;
    checkpoint.wait();
    same("options", before, found()?)
}

/// A connection within this process: the end that connected, and the end that accepted.
fn connection(port: u32) -> Result<[i32; 2], String> {
    let server = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    set_option(server, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    let name = Address::ip4(own_port(port));
    name.bind(server)?;
    sys!(listen(server, 3))?;
    let client = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    name.connect(client)?;
    let accepted = accept(server)?;
    sys!(close(server))?;
    Ok([client, accepted])
}

fn tcp_ended(checkpoint: &Checkpoint) -> Verdict {
    let mut left = Vec::new();
    for (port, data) in [(0, &b"never read"[..]), (1, b"")] {
        // The one that was called has the port of the server, which is not its own.
        let [client, accepted] = connection(port)?;
        write_all(client, data)?;
        sys!(close(client))?;
        let seen = || events(accepted).is_ok_and(|events| events & libc::POLLRDHUP != 0);
        wait_until("the end of a connection", seen)?;
        sys!(shutdown(accepted, libc::SHUT_WR))?;
        let is_closed = || Address::own(accepted).is_ok() && tcp_state(accepted) == Ok(7);
        wait_until("the end of both directions", is_closed)?;
        left.push((port, accepted, data));
    }
    let seen = || left.iter().map(|(_, fd, _)| events(*fd)).collect::<Result<Vec<_>, _>>();
    let before = seen()?;
    checkpoint.wait();
    same("events", before, seen()?)?;
    for (port, fd, data) in left {
        let mut found = Vec::new();
        while let Some(more) = receive(fd)?.filter(|more| !more.is_empty()) {
            found.extend(more);
        }
        same("bytes received", data, &found[..])?;
        let sent = sys!(send(fd, b"x".as_ptr().cast(), 1, libc::MSG_NOSIGNAL));
        ensure!(sent.is_err(), "something takes what is sent");
        same("error", Some(libc::EPIPE), Error::last_os_error().raw_os_error())?;
        // No socket holds the port.
        let server = socket(libc::AF_INET, libc::SOCK_STREAM)?;
        set_option(server, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        Address::ip4(own_port(port)).bind(server)?;
        sys!(listen(server, 3))?;
    }
    Ok(())
}

/// Connections within the tree: with data on its way in both directions, half closed, and of
/// another process, whose server listens still.
fn tcp_connections(checkpoint: &Checkpoint) -> Verdict {
    let server = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    set_option(server, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    Address::ip4(own_port(0)).bind(server)?;
    sys!(listen(server, 5))?;
    let connect = || -> Result<[i32; 2], String> {
        let client = socket(libc::AF_INET, libc::SOCK_STREAM)?;
        Address::ip4(own_port(0)).connect(client)?;
        Ok([client, accept(server)?])
    };
    let [both, half, other] = [connect()?, connect()?, connect()?];
    let options = [
        (libc::SOL_TCP, libc::TCP_NODELAY, 1),
        (libc::SOL_TCP, libc::TCP_KEEPIDLE, 77),
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    ];
    for (level, name, value) in &options {
        set_option(both[0], *level, *name, *value)?;
    }
    write_all(both[0], b"one way")?;
    write_all(both[1], b"the other way")?;
    write_all(half[0], b"the last words")?;
    sys!(shutdown(half[0], libc::SHUT_WR))?;
    wait_until("the end of one direction", || {
        tcp_state(half[0]) == Ok(FIN_WAIT2) && tcp_state(half[1]) == Ok(CLOSE_WAIT)
    })?;
    let child = checkpoint.fork(|child| {
        sys!(close(other[0]))?;
        child.wait();
        arrives(other[1], b"for the child")?;
        write_all(other[1], b"for the parent")?;
        child.mark("answered");
        Ok(())
    })?;
    sys!(close(other[1]))?;
    let names = || both.iter().map(|fd| Address::own(*fd)).collect::<Result<Vec<_>, _>>();
    let before = names()?;
    checkpoint.wait();
    ensure!(before == names()?, "the names are others");
    for (level, name, value) in &options {
        same("option", *value, option(both[0], *level, *name)?)?;
    }
    same("reuse of the address", 1, option(both[1], libc::SOL_SOCKET, libc::SO_REUSEADDR)?)?;
    same("bytes", Some(b"one way".to_vec()), receive(both[1])?)?;
    same("bytes of the other way", Some(b"the other way".to_vec()), receive(both[0])?)?;
    let states = [half[0], half[1]].map(tcp_state);
    same("states", [Ok(FIN_WAIT2), Ok(CLOSE_WAIT)], states)?;
    same("last bytes", Some(b"the last words".to_vec()), receive(half[1])?)?;
    same("the end", Some(Vec::new()), receive(half[1])?)?;
    write_all(half[1], b"still open")?;
    arrives(half[0], b"still open")?;
    sys!(shutdown(half[1], libc::SHUT_WR))?;
    wait_until("the end of both ways", || receive(half[0]).is_ok_and(|got| got == Some(vec![])))?;
    write_all(other[0], b"for the child")?;
    checkpoint.wait_mark("answered")?;
    arrives(other[0], b"for the parent")?;
    let [client, accepted] = connect()?;
    write_all(client, b"a new one")?;
    arrives(accepted, b"a new one")?;
    child.join()
}

/// Waits for bytes that are on their way.
pub fn arrives(fd: i32, expected: &[u8]) -> Verdict {
    wait_until(&String::from_utf8_lossy(expected), || {
        receive(fd).is_ok_and(|found| found.as_deref() == Some(expected))
    })
}

/// States of connections (`net/tcp_states.h`).
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;

pub fn tcp_state(fd: i32) -> Result<u8, String> {
    let (mut info, mut length) = ([0_u8; 104], 104);
    let at = info.as_mut_ptr().cast();
    sys!(getsockopt(fd, libc::SOL_TCP, libc::TCP_INFO, at, &raw mut length))?;
    Ok(info[0])
}

/// Closes a socket by force.
fn reset(fd: i32) -> Verdict {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let size = size_of::<libc::linger>() as u32;
    let at = (&raw const linger).cast();
    sys!(setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, at, size))?;
    sys!(close(fd)).map(drop)
}

/// Errors that programs have still to read, with data that comes before them.
fn tcp_pending_errors(checkpoint: &Checkpoint) -> Verdict {
    let mut sockets = Vec::new();
    for data in [&b""[..], b"read first"] {
        let [client, accepted] = connection(0)?;
        write_all(client, data)?;
        reset(client)?;
        sockets.push((libc::ECONNRESET, data, accepted));
        let [client, accepted] = connection(0)?;
        write_all(client, data)?;
        sys!(shutdown(client, libc::SHUT_WR))?;
        wait_until("the end", || tcp_state(accepted) == Ok(CLOSE_WAIT))?;
        reset(client)?;
        sockets.push((libc::EPIPE, data, accepted));
        // The peer never reads, so that this end gives up.
        let [client, accepted] = connection(0)?;
        write_all(client, data)?;
        set_option(accepted, libc::SOL_TCP, libc::TCP_USER_TIMEOUT, 1)?;
        let bytes = [0_u8; 1 << 16];
        let (at, flags) = (bytes.as_ptr().cast(), libc::MSG_DONTWAIT);
        while sys!(send(accepted, at, bytes.len(), flags)).is_ok() {}
        wait_until("a timeout", || has_error(accepted))?;
        sys!(close(client))?;
        sockets.push((libc::ETIMEDOUT, data, accepted));
    }
    // This address is taken, but does not listen.
    let taken = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    Address::ip4(own_port(1)).bind(taken)?;
    let refused = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    let flags = sys!(fcntl(refused, libc::F_GETFL))? | libc::O_NONBLOCK;
    sys!(fcntl(refused, libc::F_SETFL, flags))?;
    ensure!(Address::ip4(own_port(1)).connect(refused).is_err(), "connected");
    same("error of connect(2)", Some(libc::EINPROGRESS), Error::last_os_error().raw_os_error())?;
    sockets.push((libc::ECONNREFUSED, b"", refused));
    for (.., fd) in &sockets {
        wait_until("an error", || has_error(*fd))?;
    }
    let seen = || sockets.iter().map(|(.., fd)| events(*fd)).collect::<Result<Vec<_>, _>>();
    let before = seen()?;
    checkpoint.wait();
    same("events", &before, &seen()?)?;
    for (error, data, fd) in sockets {
        if !data.is_empty() {
            same("data", Some(data.to_vec()), receive(fd)?)?;
        }
        // After a FIN, recv(2) returns the end.
        if data.is_empty() && [libc::ECONNRESET, libc::ETIMEDOUT].contains(&error) {
            same("error", Some(error), failure(fd)?)?;
        } else {
            same("SO_ERROR", error, option(fd, libc::SOL_SOCKET, libc::SO_ERROR)?)?;
        }
        same("the end", Some(Vec::new()), receive(fd)?)?;
        let sent = sys!(send(fd, data.as_ptr().cast(), 0, libc::MSG_NOSIGNAL));
        ensure!(sent.is_err(), "sent");
        same("error of send(2)", Some(libc::EPIPE), Error::last_os_error().raw_os_error())?;
    }
    // The address is free again for the program.
    let flags = sys!(fcntl(refused, libc::F_GETFL))? & libc::O_NONBLOCK;
    same("flags", libc::O_NONBLOCK, flags)
}

fn udp_pending_error(checkpoint: &Checkpoint) -> Verdict {
    let fd = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    Address::ip4(own_port(3)).connect(fd)?;
    write_all(fd, b"nobody is there")?;
    wait_until("an error", || has_error(fd))?;
    checkpoint.wait();
    same("error", libc::ECONNREFUSED, option(fd, libc::SOL_SOCKET, libc::SO_ERROR)?)
}

/// Receives a datagram, after the address of its sender.
fn receive_from(fd: i32) -> Result<(Vec<u8>, Vec<u8>), String> {
    let mut data = vec![0_u8; 1 << 16];
    let (at, len) = (data.as_mut_ptr().cast(), data.len());
    let mut count = 0;
    let from = Address::read(|name, length| {
        count = sys!(recvfrom(fd, at, len, libc::MSG_DONTWAIT, name, length))? as usize;
        Ok(0)
    })?;
    data.truncate(count);
    Ok((from, data))
}

fn udp_queued(checkpoint: &Checkpoint) -> Verdict {
    let sender = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    Address::ip4(own_port(0)).bind(sender)?;
    let other = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    Address::ip4(own_port(1)).bind(other)?;
    let sender6 = socket(libc::AF_INET6, libc::SOCK_DGRAM)?;
    Address::ip6(own_port(0)).bind(sender6)?;
    let first = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    Address::ip4(own_port(3)).bind(first)?;
    // Of both families, on all addresses.
    let both = socket(libc::AF_INET6, libc::SOCK_DGRAM)?;
    Address::any6(own_port(2)).bind(both)?;
    let large = bytes(3, 60_000);
    Address::ip4(own_port(3)).send(sender, b"one")?;
    Address::ip4(own_port(3)).send(sender, b"")?;
    Address::ip4(own_port(3)).send(other, &large)?;
    Address::ip4(own_port(2)).send(sender, b"by the old")?;
    Address::ip6(own_port(2)).send(sender6, b"by the new")?;
    // From now on it takes nothing of others.
    Address::ip4(own_port(0)).connect(first)?;
    let names = [Address::own(sender)?, Address::own(other)?, Address::own(sender6)?];
    checkpoint.wait();
    same("first", (names[0].clone(), b"one".to_vec()), receive_from(first)?)?;
    same("empty", (names[0].clone(), Vec::new()), receive_from(first)?)?;
    ensure!((names[1].clone(), large) == receive_from(first)?, "the large one has changed");
    same("one too many", None, receive(first)?)?;
    let (from, data) = receive_from(both)?;
    same("by IPv4", (&b"by the old"[..], &names[0][2..4]), (&data[..], &from[2..4]))?;
    same("by IPv6", (names[2].clone(), b"by the new".to_vec()), receive_from(both)?)?;
    write_all(first, b"still connected")?;
    same("afterwards", Some(b"still connected".to_vec()), receive(sender)?)
}
