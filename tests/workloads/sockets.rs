//! Unix sockets whose ends are all in the tree, and internet sockets that
//! are not connected to another process.

use std::{mem, os::unix::ffi::OsStrExt, ptr};

use crate::{
    Row,
    kit::{Checkpoint, PAGE, Verdict, bytes, lacks, read_some, same, write_all},
};

pub const ROWS: &[Row] = &[
    ("unix_stream_pair", unix_stream_pair),
    ("unix_datagram_pair", unix_datagram_pair),
    ("unix_seqpacket_pair", unix_seqpacket_pair),
    ("unix_pair_across_tasks", unix_pair_across_tasks),
    ("unix_shut_pair", unix_shut_pair),
    ("unix_half_closed_pair", unix_half_closed_pair),
    ("unix_queued_descriptors", unix_queued_descriptors),
    ("unix_named", unix_named),
    ("unix_abstract", unix_abstract),
    ("unix_accepted_name", unix_accepted_name),
    ("unix_pending_connection", unix_pending_connection),
    ("unix_pending_data", unix_pending_data),
    ("unix_named_datagram", unix_named_datagram),
    ("unix_options", unix_options),
    ("tcp_listening", tcp_listening),
    ("tcp_unconnected", tcp_unconnected),
    ("tcp6_listening", tcp6_listening),
    ("udp", udp),
];

pub fn socket(family: i32, kind: i32) -> Result<i32, String> {
    sys!(socket(family, kind, 0))
}

pub fn pair(kind: i32) -> Result<[i32; 2], String> {
    let mut pair = [0; 2];
    sys!(socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr()))?;
    Ok(pair)
}

/// An address of any family.
#[derive(Clone, Copy)]
pub struct Address {
    storage: libc::sockaddr_storage,
    length: libc::socklen_t,
}

impl Address {
    fn of<T: Copy>(value: T, length: usize) -> Self {
        assert!(size_of::<T>() <= size_of::<libc::sockaddr_storage>());
        // SAFETY: all zeros is a valid value, and the copy fits.
        let storage = unsafe {
            let mut storage: libc::sockaddr_storage = mem::zeroed();
            (&raw mut storage).cast::<T>().write(value);
            storage
        };
        Self { storage, length: length as libc::socklen_t }
    }

    fn unix(name: &[u8]) -> Self {
        // SAFETY: all zeros is a valid value.
        let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
        address.sun_family = libc::AF_UNIX as u16;
        for (to, from) in address.sun_path.iter_mut().zip(name) {
            *to = from.cast_signed();
        }
        assert!(name.len() < address.sun_path.len());
        Self::of(address, 2 + name.len())
    }

    pub fn ip4(port: u16) -> Self {
        Self::of4([127, 0, 0, 1], port)
    }

    pub fn any4(port: u16) -> Self {
        Self::of4([0; 4], port)
    }

    pub fn netlink(port: u32) -> Self {
        // SAFETY: all zeros is a valid value.
        let mut address: libc::sockaddr_nl = unsafe { mem::zeroed() };
        (address.nl_family, address.nl_pid) = (libc::AF_NETLINK as u16, port);
        Self::of(address, size_of::<libc::sockaddr_nl>())
    }

    pub fn of4(bytes: [u8; 4], port: u16) -> Self {
        // SAFETY: all zeros is a valid value.
        let mut address: libc::sockaddr_in = unsafe { mem::zeroed() };
        address.sin_family = libc::AF_INET as u16;
        address.sin_port = port.to_be();
        address.sin_addr.s_addr = u32::from_ne_bytes(bytes);
        Self::of(address, size_of::<libc::sockaddr_in>())
    }

    pub fn ip6(port: u16) -> Self {
        // SAFETY: all zeros is a valid value.
        let mut address: libc::sockaddr_in6 = unsafe { mem::zeroed() };
        address.sin6_family = libc::AF_INET6 as u16;
        address.sin6_port = port.to_be();
        address.sin6_addr.s6_addr[15] = 1;
        Self::of(address, size_of::<libc::sockaddr_in6>())
    }

    pub fn any6(port: u16) -> Self {
        // SAFETY: all zeros is a valid value.
        let mut address: libc::sockaddr_in6 = unsafe { mem::zeroed() };
        address.sin6_family = libc::AF_INET6 as u16;
        address.sin6_port = port.to_be();
        Self::of(address, size_of::<libc::sockaddr_in6>())
    }

    pub fn bind(&self, fd: i32) -> Verdict {
        sys!(bind(fd, (&raw const self.storage).cast(), self.length)).map(drop)
    }

    pub fn connect(&self, fd: i32) -> Verdict {
        sys!(connect(fd, (&raw const self.storage).cast(), self.length)).map(drop)
    }

    pub fn send(&self, fd: i32, data: &[u8]) -> Verdict {
        let (at, to) = (data.as_ptr().cast(), (&raw const self.storage).cast());
        sys!(sendto(fd, at, data.len(), 0, to, self.length)).map(drop)
    }

    fn bytes(&self) -> &[u8] {
        let length = (self.length as usize).min(size_of::<libc::sockaddr_storage>());
        // SAFETY: the storage has that many bytes.
        unsafe { std::slice::from_raw_parts((&raw const self.storage).cast(), length) }
    }

    pub fn read(
        read: impl FnOnce(*mut libc::sockaddr, *mut libc::socklen_t) -> Result<i32, String>,
    ) -> Result<Vec<u8>, String> {
        // SAFETY: all zeros is a valid value.
        let storage = unsafe { mem::zeroed() };
        let length = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        let mut address = Self { storage, length };
        read((&raw mut address.storage).cast(), &raw mut address.length)?;
        Ok(address.bytes().to_vec())
    }

    /// The name of a socket.
    pub fn own(fd: i32) -> Result<Vec<u8>, String> {
        Self::read(|at, length| sys!(getsockname(fd, at, length)))
    }

    /// The name of a socket's peer.
    pub fn peer(fd: i32) -> Result<Vec<u8>, String> {
        Self::read(|at, length| sys!(getpeername(fd, at, length)))
    }
}

pub fn abstract_name(name: &str) -> Address {
    Address::unix(&[b"\0", name.as_bytes()].concat())
}

pub fn path_name(checkpoint: &Checkpoint, name: &str) -> Address {
    Address::unix(checkpoint.path(name).as_os_str().as_bytes())
}

/// A port that no other test uses: below the kernel's own choices, and as unique as the
/// process.
pub fn own_port(offset: u32) -> u16 {
    (10_000 + (std::process::id() * 4 + offset) % 20_000) as u16
}

pub fn option(fd: i32, level: i32, name: i32) -> Result<i32, String> {
    let (mut value, mut length) = (0_i32, 4);
    sys!(getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut length))?;
    Ok(value)
}

pub fn set_option(fd: i32, level: i32, name: i32, value: i32) -> Verdict {
    sys!(setsockopt(fd, level, name, (&raw const value).cast(), 4)).map(drop)
}

/// Reads without waiting; None if there is nothing.
pub fn receive(fd: i32) -> Result<Option<Vec<u8>>, String> {
    let mut data = vec![0_u8; 1 << 20];
    match sys!(recv(fd, data.as_mut_ptr().cast(), data.len(), libc::MSG_DONTWAIT)) {
        Ok(count) => {
            data.truncate(count as usize);
            Ok(Some(data))
        }
        Err(error) => {
            let code = std::io::Error::last_os_error().raw_os_error();
            if code == Some(libc::EAGAIN) { Ok(None) } else { Err(error) }
        }
    }
}

fn unix_stream_pair(checkpoint: &Checkpoint) -> Verdict {
    let [a, b] = pair(libc::SOCK_STREAM)?;
    let data = bytes(1, 50_000);
    write_all(a, &data)?;
    write_all(b, b"the other way")?;
    checkpoint.wait();
    let mut found = Vec::new();
    while let Some(more) = receive(b)? {
        found.extend(more);
    }
    ensure!(found == data, "{} queued bytes have become others ({})", data.len(), found.len());
    same("bytes of the other way", &b"the other way"[..], &read_some(a, 100)?[..])?;
    write_all(b, b"and again")?;
    same("bytes sent afterwards", &b"and again"[..], &read_some(a, 100)?[..])?;
    sys!(close(a))?;
    same("bytes at the end", 0, read_some(b, 100)?.len())
}

fn packets(checkpoint: &Checkpoint, kind: i32) -> Verdict {
    let [a, b] = pair(kind)?;
    let empty: &[u8] = if kind == libc::SOCK_DGRAM { b"" } else { b"e" };
    let data = [&b"first"[..], &bytes(2, 3 * PAGE), empty, b"last"];
    for data in data {
        write_all(a, data)?;
    }
    write_all(b, b"back")?;
    checkpoint.wait();
    for (number, data) in data.iter().enumerate() {
        let found = receive(b)?.ok_or(format!("packet {number} is gone"))?;
        same(&format!("packet {number}"), *data, &found[..])?;
    }
    same("one packet too many", None, receive(b)?)?;
    same("packet of the other way", Some(b"back".to_vec()), receive(a)?)?;
    write_all(a, b"and again")?;
    same("packet sent afterwards", Some(b"and again".to_vec()), receive(b)?)
}

fn unix_datagram_pair(checkpoint: &Checkpoint) -> Verdict {
    packets(checkpoint, libc::SOCK_DGRAM)
}

fn unix_seqpacket_pair(checkpoint: &Checkpoint) -> Verdict {
    packets(checkpoint, libc::SOCK_SEQPACKET)
}

fn unix_pair_across_tasks(checkpoint: &Checkpoint) -> Verdict {
    let [a, b] = pair(libc::SOCK_STREAM)?;
    let child = checkpoint.fork(|child| {
        sys!(close(a))?;
        write_all(b, b"from the child")?;
        child.wait();
        same("bytes from the parent", &b"from the parent"[..], &read_some(b, 100)?[..])?;
        write_all(b, b", and more")?;
        child.wait_mark("read")
    })?;
    sys!(close(b))?;
    write_all(a, b"from the parent")?;
    let nonblocking = sys!(fcntl(a, libc::F_GETFL))? | libc::O_NONBLOCK;
    sys!(fcntl(a, libc::F_SETFL, nonblocking))?;
    checkpoint.wait();
    same("flags", nonblocking, sys!(fcntl(a, libc::F_GETFL))?)?;
    let mut found = Vec::new();
    super::kit::wait_until("the child's bytes", || {
        found.extend(receive(a).ok().flatten().unwrap_or_default());
        found == b"from the child, and more"
    })?;
    checkpoint.mark("read");
    child.join()?;
    same("bytes after the child's end", Some(Vec::new()), receive(a)?)
}

fn unix_shut_pair(checkpoint: &Checkpoint) -> Verdict {
    let [a, b] = pair(libc::SOCK_STREAM)?;
    write_all(a, b"the last words")?;
    sys!(shutdown(a, libc::SHUT_WR))?;
    checkpoint.wait();
    same("bytes", &b"the last words"[..], &read_some(b, 100)?[..])?;
    same("bytes at the end", 0, read_some(b, 100)?.len())?;
    write_all(b, b"still open")?;
    same("bytes of the other way", &b"still open"[..], &read_some(a, 100)?[..])?;
    let sent = sys!(send(a, b"x".as_ptr().cast(), 1, libc::MSG_NOSIGNAL));
    ensure!(sent.is_err(), "a socket that was shut can be written to");
    Ok(())
}

fn unix_half_closed_pair(checkpoint: &Checkpoint) -> Verdict {
    let [a, b] = pair(libc::SOCK_STREAM)?;
    write_all(a, b"left behind")?;
    sys!(close(a))?;
    checkpoint.wait();
    same("bytes of a peer that is gone", &b"left behind"[..], &read_some(b, 100)?[..])?;
    same("bytes at the end", 0, read_some(b, 100)?.len())?;
    let sent = sys!(send(b, b"x".as_ptr().cast(), 1, libc::MSG_NOSIGNAL));
    ensure!(sent.is_err(), "a socket without peer can be written to");
    Ok(())
}

pub fn listening(name: &Address, kind: i32) -> Result<i32, String> {
    let server = socket(libc::AF_UNIX, kind)?;
    name.bind(server)?;
    sys!(listen(server, 9))?;
    Ok(server)
}

pub fn connected(name: &Address, kind: i32) -> Result<i32, String> {
    let client = socket(libc::AF_UNIX, kind)?;
    name.connect(client)?;
    Ok(client)
}

pub fn accept(server: i32) -> Result<i32, String> {
    sys!(accept(server, ptr::null_mut(), ptr::null_mut()))
}

/// Room for descriptors in a control message.
#[repr(C, align(8))]
struct Control([u8; 64]);

pub fn send_descriptors(fd: i32, data: &[u8], descriptors: &[i32]) -> Verdict {
    let mut part = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let mut control = Control([0; 64]);
    let bytes = size_of_val(descriptors);
    // SAFETY: all zeros is a valid message; the control buffer has room for
    // the header and the few descriptors.
    let message = unsafe {
        let mut message: libc::msghdr = mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(bytes as u32) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(bytes as u32) as usize;
        ptr::copy_nonoverlapping(descriptors.as_ptr().cast::<u8>(), libc::CMSG_DATA(header), bytes);
        message
    };
    sys!(sendmsg(fd, &raw const message, 0)).map(drop)
}

/// The type and the data of a control message.
pub type ControlData = (i32, Vec<u8>);

/// Receives up to `len` bytes, and the first control message with them.
pub fn receive_with_control(fd: i32, len: usize) -> Result<(Vec<u8>, Option<ControlData>), String> {
    let mut data = vec![0_u8; len];
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    let mut control = Control([0; 64]);
    // SAFETY: all zeros is a valid message.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    let count = sys!(recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT))?;
    data.truncate(count as usize);
    // SAFETY: the kernel has written the control messages, with their lengths, into the buffer.
    let found = unsafe {
        libc::CMSG_FIRSTHDR(&raw const message).as_ref().map(|header| {
            let bytes = header.cmsg_len - libc::CMSG_LEN(0) as usize;
            let data = std::slice::from_raw_parts(libc::CMSG_DATA(header), bytes);
            (header.cmsg_type, data.to_vec())
        })
    };
    Ok((data, found))
}

pub fn receive_descriptors(fd: i32) -> Result<(Vec<u8>, Vec<i32>), String> {
    let (data, control) = receive_with_control(fd, 100)?;
    let bytes = control.map(|(_, bytes)| bytes).unwrap_or_default();
    let descriptors = bytes.as_chunks().0.iter().map(|bytes| i32::from_ne_bytes(*bytes));
    Ok((data, descriptors.collect()))
}

fn unix_queued_descriptors(checkpoint: &Checkpoint) -> Verdict {
    let [a, b] = pair(libc::SOCK_DGRAM)?;
    std::fs::write(checkpoint.path("file"), "contents of the file").map_err(|e| e.to_string())?;
    let file = super::kit::open(&checkpoint.c_path("file"), libc::O_RDWR)?;
    same("bytes before", &b"contents"[..], &read_some(file, 8)?[..])?;
    let mut ends = [0; 2];
    sys!(pipe2(ends.as_mut_ptr(), 0))?;
    send_descriptors(a, b"file", &[file])?;
    send_descriptors(a, b"pipe", &[ends[1], file])?;
    sys!(close(ends[1]))?;
    checkpoint.wait();
    let (data, got) = receive_descriptors(b)?;
    same("message", (&b"file"[..], 1), (&data[..], got.len()))?;
    same("bytes through the queued descriptor", &b" of"[..], &read_some(got[0], 3)?[..])?;
    same("bytes through our own", &b" the"[..], &read_some(file, 4)?[..])?;
    let (data, got) = receive_descriptors(b)?;
    same("message", (&b"pipe"[..], 2), (&data[..], got.len()))?;
    write_all(got[0], b"through a queued pipe")?;
    same("bytes of the pipe", &b"through a queued pipe"[..], &read_some(ends[0], 100)?[..])?;
    same("bytes through the other", &b" file"[..], &read_some(got[1], 9)?[..])
}

/// A listening socket with a connected pair, and a connection afterwards.
fn served(checkpoint: &Checkpoint, name: Address, kind: i32) -> Verdict {
    let server = listening(&name, kind)?;
    let client = connected(&name, kind)?;
    let accepted = accept(server)?;
    write_all(client, b"queued")?;
    let before = Address::own(server)?;
    checkpoint.wait();
    same("name", before, Address::own(server)?)?;
    same("listening", 1, option(server, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)?)?;
    same("bytes queued", &b"queued"[..], &read_some(accepted, 100)?[..])?;
    write_all(accepted, b"answer")?;
    same("answer", &b"answer"[..], &read_some(client, 100)?[..])?;
    let late = connected(&name, kind)?;
    let accepted = accept(server)?;
    write_all(late, b"new connection")?;
    same("bytes of a new connection", &b"new connection"[..], &read_some(accepted, 100)?[..])
}

fn unix_named(checkpoint: &Checkpoint) -> Verdict {
    served(checkpoint, path_name(checkpoint, "socket"), libc::SOCK_STREAM)
}

fn unix_abstract(checkpoint: &Checkpoint) -> Verdict {
    let name = abstract_name(&format!("rcriu-{}", std::process::id()));
    served(checkpoint, name, libc::SOCK_SEQPACKET)
}

/// The ends of a connection know by which name it came about.
fn unix_accepted_name(checkpoint: &Checkpoint) -> Verdict {
    let name = path_name(checkpoint, "socket");
    let server = listening(&name, libc::SOCK_STREAM)?;
    let client = connected(&name, libc::SOCK_STREAM)?;
    let accepted = accept(server)?;
    let names = || -> Result<_, String> {
        Ok([Address::own(server)?, Address::own(accepted)?, Address::peer(client)?])
    };
    let before = names()?;
    checkpoint.wait();
    same("names", before, names()?)
}

fn unix_pending_connection(checkpoint: &Checkpoint) -> Verdict {
    pending(checkpoint, false)
}

fn unix_pending_data(checkpoint: &Checkpoint) -> Verdict {
    pending(checkpoint, true)
}

fn pending(checkpoint: &Checkpoint, data: bool) -> Verdict {
    let name = path_name(checkpoint, "socket");
    let server = listening(&name, libc::SOCK_STREAM)?;
    let clients = [0, 1].map(|_| socket(libc::AF_UNIX, libc::SOCK_STREAM));
    for client in &clients {
        name.connect(client.clone()?)?;
    }
    if data {
        write_all(clients[0].clone()?, b"before")?;
    }
    checkpoint.wait();
    if !data {
        write_all(clients[0].clone()?, b"before")?;
    }
    let accepted = accept(server)?;
    same("bytes of the pending connection", &b"before"[..], &read_some(accepted, 100)?[..])?;
    let second = accept(server)?;
    write_all(second, b"to the second")?;
    same("bytes", &b"to the second"[..], &read_some(clients[1].clone()?, 100)?[..])
}

fn unix_named_datagram(checkpoint: &Checkpoint) -> Verdict {
    let name = path_name(checkpoint, "socket");
    let server = socket(libc::AF_UNIX, libc::SOCK_DGRAM)?;
    name.bind(server)?;
    let connected = connected(&name, libc::SOCK_DGRAM)?;
    let free = socket(libc::AF_UNIX, libc::SOCK_DGRAM)?;
    write_all(connected, b"queued")?;
    checkpoint.wait();
    same("queued datagram", Some(b"queued".to_vec()), receive(server)?)?;
    write_all(connected, b"connected")?;
    same("datagram of the connected", Some(b"connected".to_vec()), receive(server)?)?;
    name.send(free, b"free")?;
    same("datagram of the other", Some(b"free".to_vec()), receive(server)?)
}

fn unix_options(checkpoint: &Checkpoint) -> Verdict {
    let [a, b] = pair(libc::SOCK_DGRAM)?;
    let socket_level = libc::SOL_SOCKET;
    set_option(a, socket_level, libc::SO_PASSCRED, 1)?;
    set_option(a, socket_level, libc::SO_SNDBUF, 40_000)?;
    set_option(b, socket_level, libc::SO_RCVBUF, 50_000)?;
    let timeout = libc::timeval { tv_sec: 5, tv_usec: 500_000 };
    let length = size_of::<libc::timeval>() as u32;
    sys!(setsockopt(a, socket_level, libc::SO_RCVTIMEO, (&raw const timeout).cast(), length))?;
    let options = || -> Result<Vec<i32>, String> {
        let mut found = Vec::new();
        for fd in [a, b] {
            for name in [
                libc::SO_PASSCRED,
                libc::SO_SNDBUF,
                libc::SO_RCVBUF,
                libc::SO_TYPE,
                libc::SO_PRIORITY,
            ] {
                found.push(option(fd, socket_level, name)?);
            }
        }
        let mut time = libc::timeval { tv_sec: 0, tv_usec: 0 };
        let mut length = size_of::<libc::timeval>() as u32;
        let at = (&raw mut time).cast();
        sys!(getsockopt(a, socket_level, libc::SO_RCVTIMEO, at, &raw mut length))?;
        found.push((time.tv_sec * 1000 + time.tv_usec / 1000) as i32);
        Ok(found)
    };
    let before = options()?;
    checkpoint.wait();
    same("options", before, options()?)
}

fn tcp_server(checkpoint: &Checkpoint, family: i32, name: Address) -> Verdict {
    let server = socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC)?;
    set_option(server, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    set_option(server, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set_option(server, libc::SOL_SOCKET, libc::SO_RCVBUF, 60_000)?;
    set_option(server, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    if family == libc::AF_INET6 {
        set_option(server, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
    }
    name.bind(server)?;
    sys!(listen(server, 5))?;
    let child = checkpoint.fork(|child| {
        child.wait();
        child.wait_mark("connected")?;
        let accepted = accept(server)?;
        same("bytes in the child", &b"hello"[..], &read_some(accepted, 10)?[..])
    })?;
    let options = || -> Result<Vec<i32>, String> {
        [
            (libc::SOL_SOCKET, libc::SO_REUSEADDR),
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
            (libc::SOL_SOCKET, libc::SO_RCVBUF),
            (libc::SOL_SOCKET, libc::SO_ACCEPTCONN),
            (libc::IPPROTO_TCP, libc::TCP_NODELAY),
        ]
        .into_iter()
        .map(|(level, name)| option(server, level, name))
        .collect()
    };
    let before = (options()?, Address::own(server)?, sys!(fcntl(server, libc::F_GETFD))?);
    checkpoint.wait();
    let after = (options()?, Address::own(server)?, sys!(fcntl(server, libc::F_GETFD))?);
    same("options, name, descriptor flags", before, after)?;
    let client = socket(family, libc::SOCK_STREAM)?;
    name.connect(client)?;
    write_all(client, b"hello")?;
    checkpoint.mark("connected");
    child.join()
}

fn tcp_listening(checkpoint: &Checkpoint) -> Verdict {
    tcp_server(checkpoint, libc::AF_INET, Address::ip4(own_port(0)))
}

fn tcp6_listening(checkpoint: &Checkpoint) -> Verdict {
    let name = Address::ip6(own_port(0));
    let probe = socket(libc::AF_INET6, libc::SOCK_STREAM)
        .and_then(|fd| Address::ip6(0).bind(fd).and(sys!(close(fd)).map(drop)));
    if probe.is_err() {
        return lacks("a kernel with IPv6");
    }
    tcp_server(checkpoint, libc::AF_INET6, name)
}

fn tcp_unconnected(checkpoint: &Checkpoint) -> Verdict {
    let fresh = socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK)?;
    set_option(fresh, libc::SOL_SOCKET, libc::SO_SNDBUF, 70_000)?;
    let bound = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    Address::ip4(own_port(1)).bind(bound)?;
    let flags = || -> Result<_, String> {
        let buffer = option(fresh, libc::SOL_SOCKET, libc::SO_SNDBUF)?;
        Ok((sys!(fcntl(fresh, libc::F_GETFL))?, buffer, Address::own(bound)?))
    };
    let before = flags()?;
    checkpoint.wait();
    same("flags, buffer, name", before, flags()?)?;
    sys!(listen(bound, 3))?;
    let client = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    Address::ip4(own_port(1)).connect(client)?;
    let free = Address::ip4(own_port(2));
    free.bind(fresh)?;
    sys!(listen(fresh, 3)).map(drop)
}

fn udp(checkpoint: &Checkpoint) -> Verdict {
    let bound = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    let name = Address::ip4(own_port(0));
    name.bind(bound)?;
    let connected = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    name.connect(connected)?;
    set_option(connected, libc::SOL_SOCKET, libc::SO_BROADCAST, 1)?;
    let free = socket(libc::AF_INET, libc::SOCK_DGRAM)?;
    let state = || -> Result<_, String> {
        let broadcast = option(connected, libc::SOL_SOCKET, libc::SO_BROADCAST)?;
        Ok((Address::own(bound)?, Address::own(connected)?, Address::peer(connected)?, broadcast))
    };
    let before = state()?;
    checkpoint.wait();
    same("names and option", before, state()?)?;
    ensure!(Address::peer(free).is_err(), "the free socket is connected");
    write_all(connected, b"connected")?;
    same("datagram of the connected", &b"connected"[..], &read_some(bound, 100)?[..])?;
    name.send(free, b"free")?;
    same("datagram of the free", &b"free"[..], &read_some(bound, 100)?[..])
}
