//! TCP sockets at moments that do not last: connecting, not accepted, signed, with options set.

use std::{
    io::Error,
    ptr,
    sync::atomic::{AtomicI32, Ordering},
};

use crate::{
    Row,
    kit::{
        Checkpoint, Verdict, gettid, lacks, read_some, same, wait_blocked, wait_until, write_all,
    },
    socket_ends::{arrives, tcp_state},
    sockets::{Address, option, own_port, receive, set_option, socket},
};

pub const ROWS: &[Row] = &[
    ("tcp_unaccepted", tcp_unaccepted),
    ("tcp_connecting", tcp_connecting),
    ("tcp_signed", tcp_signed),
    ("tcp_urgent", tcp_urgent),
    ("tcp_urgent_read", tcp_urgent_read),
    ("tcp_urgent_inline", tcp_urgent_inline),
    ("tcp_urgent_alone", tcp_urgent_alone),
    ("tcp_urgent_unsent", tcp_urgent_unsent),
    ("tcp_options", tcp_options),
    ("tcp_tls", tcp_tls),
    ("tcp_authenticated", tcp_authenticated),
    ("tcp_multipath", tcp_multipath),
];

/// `asm-generic/sockios.h`.
const SIOCATMARK: libc::c_ulong = 0x8905;

/// Options of `linux/tcp.h`.
const TCP_AO_ADD_KEY: i32 = 38;

/// `struct tcp_ao_add`, `linux/tcp.h`, since Linux 6.7: the places of what is not 0, and its size.
const AO_ALGORITHM: usize = 128;
const AO_PREFIX: usize = 202;
const AO_KEY_BYTES: usize = 207;
const AO_KEY: usize = 208;
const AO_BYTES: usize = 288;

/// States of connections (`net/tcp_states.h`).
const ESTABLISHED: u8 = 1;
const SYN_SENT: u8 = 2;

fn listener(port: u32, backlog: i32) -> Result<i32, String> {
    let server = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    set_option(server, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    Address::ip4(own_port(port)).bind(server)?;
    sys!(listen(server, backlog))?;
    Ok(server)
}

fn accept(server: i32) -> Result<i32, String> {
    sys!(accept(server, ptr::null_mut(), ptr::null_mut()))
}

/// A connection that waits to be accepted goes to the program, or is left out.
fn tcp_unaccepted(checkpoint: &Checkpoint) -> Verdict {
    let server = listener(0, 5)?;
    set_nonblocking(server)?;
    let early = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    Address::ip4(own_port(0)).connect(early)?;
    write_all(early, b"early")?;
    checkpoint.wait();
    if let Ok(accepted) = accept(server) {
        arrives(accepted, b"early")?;
    } else {
        same("error", Some(libc::EAGAIN), Error::last_os_error().raw_os_error())?;
        checkpoint.mark("left_out");
    }
    let late = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    Address::ip4(own_port(0)).connect(late)?;
    write_all(late, b"late")?;
    arrives(accept(server)?, b"late")
}

fn set_nonblocking(fd: i32) -> Verdict {
    let flags = sys!(fcntl(fd, libc::F_GETFL))? | libc::O_NONBLOCK;
    sys!(fcntl(fd, libc::F_SETFL, flags)).map(drop)
}

/// Sockets whose peer has not answered yet, because its queue is full: one of a program that polls,
/// and one of a program that waits in `connect(2)`.
fn tcp_connecting(checkpoint: &Checkpoint) -> Verdict {
    // With one connection that waits there is no room for another. Each client has a server of its
    // own, since a server may lose one of two that come at the same time.
    let full = |port| -> Result<i32, String> {
        let server = listener(port, 0)?;
        Address::ip4(own_port(port)).connect(socket(libc::AF_INET, libc::SOCK_STREAM)?)?;
        Ok(server)
    };
    let servers = [full(0)?, full(1)?];
    let polls = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    set_nonblocking(polls)?;
    let begun = Address::ip4(own_port(0)).connect(polls);
    ensure!(begun.is_err(), "connected at once");
    same("error", Some(libc::EINPROGRESS), Error::last_os_error().raw_os_error())?;
    let waits = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    static TID: AtomicI32 = AtomicI32::new(0);
    let thread = checkpoint.thread(move |thread| {
        TID.store(gettid(), Ordering::Relaxed);
        thread.announce();
        Address::ip4(own_port(1)).connect(waits)
    })?;
    wait_blocked(TID.load(Ordering::Relaxed), libc::SYS_connect)?;
    wait_until("two sockets that connect", || {
        [polls, waits].iter().all(|fd| tcp_state(*fd) == Ok(SYN_SENT))
    })?;
    let names = || -> Result<_, String> { Ok([Address::own(polls)?, Address::own(waits)?]) };
    let before = names()?;
    checkpoint.wait();
    same("names", &before, &names()?)?;
    let is_nonblocking = |fd| Ok::<_, String>(sys!(fcntl(fd, libc::F_GETFL))? & libc::O_NONBLOCK);
    same("flags", [libc::O_NONBLOCK, 0], [is_nonblocking(polls)?, is_nonblocking(waits)?])?;
    let mut accepted = Vec::new();
    for (server, name) in servers.into_iter().zip(&before) {
        // The first one may have been left out.
        accepted.push(loop {
            let accepted = accept(server)?;
            if Address::peer(accepted)? == *name {
                break accepted;
            }
        });
    }
    thread.join()?;
    wait_until("a connection", || tcp_state(polls) == Ok(ESTABLISHED))?;
    same("error of the connection", 0, option(polls, libc::SOL_SOCKET, libc::SO_ERROR)?)?;
    for (fd, accepted) in [polls, waits].into_iter().zip(accepted) {
        write_all(fd, b"to the server")?;
        arrives(accepted, b"to the server")?;
        write_all(accepted, b"to the client")?;
        arrives(fd, b"to the client")?;
    }
    Ok(())
}

/// `struct tcp_md5sig` (`linux/tcp.h`).
#[repr(C)]
struct Key {
    address: [u8; 128],
    flags: u8,
    prefix: u8,
    len: u16,
    interface: u32,
    key: [u8; 80],
}

/// Signs packets to an address of this machine, and rejects packets from there without a signature.
fn sign(fd: i32, key: &[u8]) -> Verdict {
    let mut value = Key {
        address: [0; 128],
        flags: 1, // TCP_MD5SIG_FLAG_PREFIX
        prefix: 8,
        len: key.len() as u16,
        interface: 0,
        key: [0; 80],
    };
    value.address[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    value.address[4] = 127;
    value.key[..key.len()].copy_from_slice(key);
    const TCP_MD5SIG_EXT: i32 = 32;
    let (at, bytes) = ((&raw const value).cast(), size_of::<Key>() as u32);
    sys!(setsockopt(fd, libc::SOL_TCP, TCP_MD5SIG_EXT, at, bytes)).map(drop)
}

fn tcp_signed(checkpoint: &Checkpoint) -> Verdict {
    let server = listener(0, 5)?;
    sign(server, b"secret")?;
    let connect = || -> Result<[i32; 2], String> {
        let client = socket(libc::AF_INET, libc::SOCK_STREAM)?;
        sign(client, b"secret")?;
        Address::ip4(own_port(0)).connect(client)?;
        Ok([client, accept(server)?])
    };
    let [client, accepted] = connect()?;
    write_all(client, b"queued")?;
    checkpoint.wait();
    arrives(accepted, b"queued")?;
    write_all(accepted, b"signed")?;
    arrives(client, b"signed")?;
    write_all(client, b"signed, too")?;
    arrives(accepted, b"signed, too")?;
    let stranger = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    set_nonblocking(stranger)?;
    let begun = Address::ip4(own_port(0)).connect(stranger);
    ensure!(begun.is_err(), "connected without a key");
    // By now, this machine has handled the packets to the other socket.
    let [client, accepted] = connect()?;
    same("state of a socket without a key", Ok(SYN_SENT), tcp_state(stranger))?;
    write_all(client, b"a new one")?;
    arrives(accepted, b"a new one")
}

/// Returns a connection; the end that was accepted is first.
fn pair() -> Result<[i32; 2], String> {
    let server = listener(0, 5)?;
    let client = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    Address::ip4(own_port(0)).connect(client)?;
    Ok([accept(server)?, client])
}

/// Returns the receiving end of a connection with an urgent byte in the middle of others, and the
/// other end.
fn urgent() -> Result<[i32; 2], String> {
    let [accepted, client] = pair()?;
    write_all(client, b"before")?;
    send_urgent(client, b'!')?;
    write_all(client, b"after")?;
    Ok([accepted, client])
}

/// Reads many bytes, which are all the same.
fn repeats(fd: i32, byte: u8, count: usize) -> Verdict {
    let mut found = 0;
    while found < count {
        let bytes = read_some(fd, count - found)?;
        ensure!(!bytes.is_empty(), "the end after {found} bytes");
        same("bytes", true, bytes.iter().all(|it| *it == byte))?;
        found += bytes.len();
    }
    Ok(())
}

fn send_urgent(fd: i32, byte: u8) -> Verdict {
    sys!(send(fd, (&raw const byte).cast(), 1, libc::MSG_OOB)).map(drop)
}

/// Waits for an urgent byte, and until the other end knows that all bytes have arrived.
fn await_urgent(fd: i32, client: i32) -> Verdict {
    wait_until("the urgent byte", || has_urgent(fd))?;
    wait_until("acknowledgements", || {
        let mut bytes = 1_i32;
        sys!(ioctl(client, libc::TIOCOUTQ, &raw mut bytes)).is_ok() && bytes == 0
    })
}

/// Whether the next byte is at the mark.
fn is_at_mark(fd: i32) -> Result<bool, String> {
    let mut is_there = 0_i32;
    sys!(ioctl(fd, SIOCATMARK, &raw mut is_there))?;
    Ok(is_there == 1)
}

/// Receives the urgent byte.
fn receive_urgent(fd: i32) -> Verdict {
    let mut byte = 0_u8;
    sys!(recv(fd, (&raw mut byte).cast(), 1, libc::MSG_OOB))?;
    same("urgent byte", b'!', byte)
}

fn tcp_urgent(checkpoint: &Checkpoint) -> Verdict {
    let [fd, client] = urgent()?;
    await_urgent(fd, client)?;
    checkpoint.wait();
    receive_urgent(fd)?;
    arrives(fd, b"before")?;
    arrives(fd, b"after")?;
    write_all(client, b"more")?;
    arrives(fd, b"more")
}

/// The mark stays where the urgent byte was, among bytes that the kernel keeps in pages.
fn tcp_urgent_read(checkpoint: &Checkpoint) -> Verdict {
    const BYTES: usize = 20_000;
    let [fd, client] = pair()?;
    write_all(client, &[1; BYTES])?;
    repeats(fd, 1, 1000)?;
    send_urgent(client, b'!')?;
    write_all(client, &[2; BYTES])?;
    await_urgent(fd, client)?;
    receive_urgent(fd)?;
    checkpoint.wait();
    repeats(fd, 1, BYTES - 1000)?;
    repeats(fd, 2, BYTES)?;
    write_all(client, b"more")?;
    arrives(fd, b"more")
}

/// The urgent byte is one of the others, and a read ends before it.
fn tcp_urgent_inline(checkpoint: &Checkpoint) -> Verdict {
    let [fd, client] = urgent()?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1)?;
    await_urgent(fd, client)?;
    checkpoint.wait();
    same("SO_OOBINLINE", 1, option(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE)?)?;
    let mut bytes = [0; 64];
    let len = sys!(recv(fd, bytes.as_mut_ptr().cast(), bytes.len(), 0))?;
    same("bytes before the mark", b"before".as_slice(), &bytes[..len.unsigned_abs()])?;
    same("at the mark", true, is_at_mark(fd)?)?;
    arrives(fd, b"!after")?;
    write_all(client, b"more")?;
    arrives(fd, b"more")
}

/// The program is at the mark, the urgent byte is all that has arrived, and another one follows
/// later.
fn tcp_urgent_alone(checkpoint: &Checkpoint) -> Verdict {
    let [fd, client] = pair()?;
    write_all(client, b"before")?;
    send_urgent(client, b'!')?;
    await_urgent(fd, client)?;
    arrives(fd, b"before")?;
    checkpoint.wait();
    same("urgent data", true, has_urgent(fd))?;
    same("at the mark", true, is_at_mark(fd)?)?;
    receive_urgent(fd)?;
    write_all(client, b"between")?;
    arrives(fd, b"between")?;
    send_urgent(client, b'!')?;
    wait_until("the next urgent byte", || has_urgent(fd))?;
    receive_urgent(fd)
}

/// The receiver has no room for the urgent byte, which is sent after the checkpoint.
fn tcp_urgent_unsent(checkpoint: &Checkpoint) -> Verdict {
    const BYTES: usize = 256 << 10;
    let [fd, client] = pair()?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 4096)?;
    set_option(client, libc::SOL_SOCKET, libc::SO_SNDBUF, 1 << 20)?;
    write_all(client, &vec![7; BYTES])?;
    send_urgent(client, b'!')?;
    write_all(client, b"after")?;
    checkpoint.wait();
    same("urgent data", false, has_urgent(fd))?;
    repeats(fd, 7, BYTES)?;
    wait_until("the urgent byte", || has_urgent(fd))?;
    receive_urgent(fd)?;
    arrives(fd, b"after")
}

fn has_urgent(fd: i32) -> bool {
    let mut polled = libc::pollfd { fd, events: libc::POLLPRI, revents: 0 };
    sys!(poll(&raw mut polled, 1, 0)).is_ok_and(|count| count == 1)
}

/// Options of a connection, and data that waits to be sent with more.
fn tcp_options(checkpoint: &Checkpoint) -> Verdict {
    let server = listener(0, 5)?;
    let client = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    Address::ip4(own_port(0)).connect(client)?;
    let accepted = accept(server)?;
    let listens = [
        (libc::SOL_TCP, libc::TCP_DEFER_ACCEPT, 7),
        (libc::SOL_TCP, libc::TCP_FASTOPEN, 5),
        (libc::SOL_TCP, libc::TCP_MAXSEG, 1000),
        (libc::SOL_SOCKET, libc::SO_REUSEPORT, 1),
    ];
    let connected = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::SOL_SOCKET, libc::SO_OOBINLINE, 1),
        (libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
        (libc::SOL_SOCKET, libc::SO_REUSEPORT, 1),
        (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 3),
        (libc::SOL_TCP, libc::TCP_KEEPIDLE, 77),
        (libc::SOL_TCP, libc::TCP_KEEPINTVL, 78),
        (libc::SOL_TCP, libc::TCP_KEEPCNT, 9),
        (libc::SOL_TCP, libc::TCP_USER_TIMEOUT, 123_456),
        (libc::SOL_TCP, libc::TCP_LINGER2, 33),
        (libc::SOL_TCP, libc::TCP_SYNCNT, 4),
        (libc::SOL_TCP, libc::TCP_NOTSENT_LOWAT, 4567),
        (libc::SOL_TCP, libc::TCP_CORK, 1),
        (libc::SOL_IP, libc::IP_TOS, 16),
        (libc::SOL_IP, libc::IP_TTL, 55),
        (libc::SOL_IP, libc::IP_RECVERR, 1),
        (libc::SOL_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT),
    ];
    let all = || {
        let of = |fd: i32| move |&(level, name, value)| (fd, level, name, value);
        listens.iter().map(of(server)).chain(connected.iter().map(of(client)))
    };
    for (fd, level, name, value) in all() {
        set_option(fd, level, name, value)?;
    }
    let reno = b"reno";
    sys!(setsockopt(client, libc::SOL_TCP, libc::TCP_CONGESTION, reno.as_ptr().cast(), 4))?;
    let found = || {
        let found = all().map(|(fd, level, name, _)| Ok(((level, name), option(fd, level, name)?)));
        found.collect::<Result<Vec<_>, String>>()
    };
    let congestion = || -> Result<Vec<u8>, String> {
        let (mut name, mut len) = ([0_u8; 16], 16);
        let at = name.as_mut_ptr().cast();
        sys!(getsockopt(client, libc::SOL_TCP, libc::TCP_CONGESTION, at, &raw mut len))?;
        Ok(name.to_vec())
    };
    let before = (found()?, congestion()?);
    write_all(client, b"corked")?;
    checkpoint.wait();
    same("options", &before.0, &found()?)?;
    same("congestion control", &before.1, &congestion()?)?;
    write_all(client, b" and more")?;
    set_option(client, libc::SOL_TCP, libc::TCP_CORK, 0)?;
    let mut got = Vec::new();
    wait_until("what was corked", || {
        got.extend(receive(accepted).ok().flatten().unwrap_or_default());
        got == b"corked and more"
    })
}

/// A protocol in the kernel lies between the program and its connection.
fn tcp_tls(checkpoint: &Checkpoint) -> Verdict {
    let [accepted, client] = pair()?;
    let set = sys!(setsockopt(client, libc::SOL_TCP, libc::TCP_ULP, c"tls".as_ptr().cast(), 3));
    if set.is_err() {
        return lacks("TLS in the kernel (CONFIG_TLS, the module tls)");
    }
    checkpoint.wait();
    write_all(client, b"without keys")?;
    arrives(accepted, b"without keys")
}

/// Packets are signed with TCP-AO.
fn tcp_authenticated(checkpoint: &Checkpoint) -> Verdict {
    let mut key = [0_u8; AO_BYTES];
    key[..2].copy_from_slice(&2_u16.to_ne_bytes()); // AF_INET
    key[4..8].copy_from_slice(&[127, 0, 0, 1]);
    key[AO_ALGORITHM..][..10].copy_from_slice(b"hmac(sha1)");
    (key[AO_PREFIX], key[AO_KEY_BYTES]) = (32, 6);
    key[AO_KEY..][..6].copy_from_slice(b"secret");
    let sign = |fd: i32| {
        let len = AO_BYTES as libc::socklen_t;
        sys!(setsockopt(fd, libc::SOL_TCP, TCP_AO_ADD_KEY, key.as_ptr().cast(), len))
    };
    let server = listener(0, 5)?;
    if sign(server).is_err() {
        return lacks("signatures of packets (CONFIG_TCP_AO, since Linux 6.7)");
    }
    let client = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    sign(client)?;
    Address::ip4(own_port(0)).connect(client)?;
    let accepted = accept(server)?;
    checkpoint.wait();
    write_all(client, b"signed")?;
    arrives(accepted, b"signed")
}

fn tcp_multipath(checkpoint: &Checkpoint) -> Verdict {
    let Ok(fd) = sys!(socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP)) else {
        return lacks("multipath TCP (CONFIG_MPTCP)");
    };
    Address::ip4(own_port(0)).bind(fd)?;
    checkpoint.wait();
    sys!(listen(fd, 1)).map(drop)
}
