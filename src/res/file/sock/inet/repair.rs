//! Looking into a TCP connection, and making one without a packet (`TCP_REPAIR`,
//! `linux/tcp.h`, since Linux 3.5; needs `CAP_NET_ADMIN`).

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::{
    errno::Errno,
    libc::{self, c_int},
    sys::socket::{MsgFlags, recv, send},
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{
    fault::{self, Point},
    sys::{socket, supervise},
};

/// Of `linux/tcp.h`.
const TCP_REPAIR: c_int = 19;
const TCP_REPAIR_QUEUE: c_int = 20;
const TCP_QUEUE_SEQ: c_int = 21;
const TCP_REPAIR_OPTIONS: c_int = 22;
const TCP_TIMESTAMP: c_int = 24;
const TCP_REPAIR_WINDOW: c_int = 29;

/// Values of `TCP_REPAIR`; the last one, since Linux 4.19, sends no probe of the window.
const ON: c_int = 1;
const OFF: c_int = 0;
const OFF_SILENTLY: c_int = -1;

/// The most bytes written into a queue at a time: the kernel wants them in one piece of memory.
const PIECE_BYTES: usize = 32 << 10;

/// The least that is tried, when memory is in pieces.
const LEAST_PIECE_BYTES: usize = 1 << 10;

/// A queue of a connection (`TCP_RECV_QUEUE`, `TCP_SEND_QUEUE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queue {
    /// None: bytes go where they always go.
    Neither = 0,
    /// What has come and was not read.
    Received = 1,
    /// What was sent and not acknowledged, and what is to be sent.
    Sent = 2,
}

/// `struct tcp_repair_window`, `linux/tcp.h`, since Linux 4.8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Window {
    pub(super) snd_wl1: u32,
    pub(super) snd_wnd: u32,
    pub(super) max_window: u32,
    pub(super) rcv_wnd: u32,
    pub(super) rcv_wup: u32,
}

/// `struct tcp_repair_opt`, `linux/tcp.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Negotiated {
    /// The kind of option, as in packets (RFC 9293, 7323, 2018).
    pub(super) kind: u32,
    pub(super) value: u32,
}

fn set(fd: BorrowedFd, name: c_int, value: u32) -> nix::Result<()> {
    socket::set_option(fd, libc::SOL_TCP, name, &value)
}

/// Begins: the socket's queues can be looked at, and its end sends nothing.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` in the user namespace of the network.
pub(super) fn begin(fd: BorrowedFd) -> nix::Result<()> {
    set(fd, TCP_REPAIR, ON.cast_unsigned())
}

/// Ends it without a packet. The kernel forgets `SO_REUSEADDR` over it.
pub(super) fn end(fd: BorrowedFd) -> nix::Result<()> {
    set(fd, TCP_REPAIR, OFF_SILENTLY.cast_unsigned())
}

/// Returns `SO_REUSEADDR` of a socket, for [`end_with`].
pub(super) fn reuse(fd: BorrowedFd) -> nix::Result<c_int> {
    socket::option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR)
}

/// As [`end`], and sets `SO_REUSEADDR` again.
pub(super) fn end_with(fd: BorrowedFd, reuse: c_int) -> nix::Result<()> {
    end(fd)?;
    socket::set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &reuse)
}

/// Does something while a socket is being repaired. Its program must not use it meanwhile:
/// its calls would fail.
///
/// # Errors
/// Those of `work`, and of beginning and ending.
pub(super) fn during<T>(fd: BorrowedFd, work: impl FnOnce() -> nix::Result<T>) -> nix::Result<T> {
    let reuse = reuse(fd)?;
    supervise::note_repair();
    begin(fd)?;
    let done = fault::hit(Point::TcpRepairing).map_err(|_| Errno::EIO).and_then(|()| work());
    end_with(fd, reuse)?;
    supervise::clear_repair();
    done
}

/// Ends it, and lets the peer know that the connection is there: it is sent a probe of the
/// window.
pub(super) fn end_with_probe(fd: BorrowedFd) -> nix::Result<()> {
    set(fd, TCP_REPAIR, OFF.cast_unsigned())
}

/// Whether it was begun, by whomever.
pub(super) fn is_on(fd: BorrowedFd) -> nix::Result<bool> {
    socket::option::<c_int>(fd, libc::SOL_TCP, TCP_REPAIR).map(|value| value == ON)
}

/// Chooses the queue that the next calls are about.
pub(super) fn choose(fd: BorrowedFd, queue: Queue) -> nix::Result<()> {
    set(fd, TCP_REPAIR_QUEUE, queue as u32)
}

/// Returns the number that comes after the last byte of a queue, or of the end of its data.
pub(super) fn sequence(fd: BorrowedFd, queue: Queue) -> nix::Result<u32> {
    choose(fd, queue)?;
    socket::option(fd, libc::SOL_TCP, TCP_QUEUE_SEQ)
}

/// Sets the number of the first byte of a queue, before there is a connection.
pub(super) fn set_sequence(fd: BorrowedFd, queue: Queue, number: u32) -> nix::Result<()> {
    choose(fd, queue)?;
    set(fd, TCP_QUEUE_SEQ, number)
}

/// Returns what is in the queue that was chosen, or what has come without one; it has `bytes`
/// bytes.
///
/// # Errors
/// `EAGAIN` if it has another number of bytes.
pub(super) fn peek(fd: BorrowedFd, bytes: u32) -> nix::Result<Vec<u8>> {
    if bytes == 0 {
        return Ok(Vec::new());
    }
    // One more would be seen.
    let mut found = vec![0; bytes as usize + 1];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let len = recv(fd.as_raw_fd(), &mut found, flags)?;
    if len != bytes as usize {
        return Err(Errno::EAGAIN);
    }
    found.truncate(len);
    Ok(found)
}

/// Puts bytes at the end of a queue.
pub(super) fn append(fd: BorrowedFd, queue: Queue, bytes: &[u8]) -> nix::Result<()> {
    if !bytes.is_empty() {
        choose(fd, queue)?;
    }
    write(fd, bytes)
}

/// Sends bytes, which have to find room in the queue.
pub(super) fn write(fd: BorrowedFd, mut bytes: &[u8]) -> nix::Result<()> {
    let mut piece = PIECE_BYTES;
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    while !bytes.is_empty() {
        match send(fd.as_raw_fd(), &bytes[..piece.min(bytes.len())], flags) {
            Ok(done) => bytes = &bytes[done..],
            Err(Errno::ENOMEM | Errno::ENOBUFS) if piece > LEAST_PIECE_BYTES => piece /= 2,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Returns the windows.
pub(super) fn window(fd: BorrowedFd) -> nix::Result<Window> {
    socket::option(fd, libc::SOL_TCP, TCP_REPAIR_WINDOW)
}

/// Sets the windows.
pub(super) fn set_window(fd: BorrowedFd, window: &Window) -> nix::Result<()> {
    socket::set_option(fd, libc::SOL_TCP, TCP_REPAIR_WINDOW, window)
}

/// Sets what the ends have agreed on.
pub(super) fn set_negotiated(fd: BorrowedFd, options: &[Negotiated]) -> nix::Result<()> {
    socket::set_option(fd, libc::SOL_TCP, TCP_REPAIR_OPTIONS, options)
}

/// Returns the clock of the connection's timestamps.
pub(super) fn clock(fd: BorrowedFd) -> nix::Result<u32> {
    socket::option(fd, libc::SOL_TCP, TCP_TIMESTAMP)
}

/// Sets the clock of the connection's timestamps.
pub(super) fn set_clock(fd: BorrowedFd, value: u32) -> nix::Result<()> {
    set(fd, TCP_TIMESTAMP, value)
}
