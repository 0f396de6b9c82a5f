//! Repair mode: reads a TCP connection, and creates one without sending packets (`TCP_REPAIR`,
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

/// Options (`linux/tcp.h`).
const TCP_REPAIR: c_int = 19;
const TCP_REPAIR_QUEUE: c_int = 20;
const TCP_QUEUE_SEQ: c_int = 21;
const TCP_REPAIR_OPTIONS: c_int = 22;
const TCP_TIMESTAMP: c_int = 24;
const TCP_REPAIR_WINDOW: c_int = 29;

/// Values of `TCP_REPAIR`. The last one, since Linux 4.19, sends no window probe.
const ON: c_int = 1;
const OFF: c_int = 0;
const OFF_SILENTLY: c_int = -1;

/// The most bytes written into a queue at a time: the kernel allocates contiguous memory for them.
const PIECE_BYTES: usize = 32 << 10;

/// The fewest bytes written at a time, when memory is fragmented.
const LEAST_PIECE_BYTES: usize = 1 << 10;

/// A queue of a connection (`TCP_RECV_QUEUE`, `TCP_SEND_QUEUE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queue {
    /// None: the socket reads and writes as usual.
    Neither = 0,
    /// Bytes received, but not read.
    Received = 1,
    /// Bytes sent, but not acknowledged, and bytes to be sent.
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

/// Enters repair mode: the queues can be read and set, and closing the socket sends nothing.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` in the user namespace of the network.
pub(super) fn begin(fd: BorrowedFd) -> nix::Result<()> {
    set(fd, TCP_REPAIR, ON.cast_unsigned())
}

/// Leaves repair mode without sending a packet. The kernel resets `SO_REUSEADDR`.
pub(super) fn end(fd: BorrowedFd) -> nix::Result<()> {
    set(fd, TCP_REPAIR, OFF_SILENTLY.cast_unsigned())
}

/// Returns `SO_REUSEADDR` of a socket, for [`end_with`].
pub(super) fn reuse(fd: BorrowedFd) -> nix::Result<c_int> {
    socket::option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR)
}

/// Leaves repair mode as [`end`] does, and sets `SO_REUSEADDR` again.
pub(super) fn end_with(fd: BorrowedFd, reuse: c_int) -> nix::Result<()> {
    end(fd)?;
    socket::set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &reuse)
}

/// Runs `work` while a socket is in repair mode. Calls of the program on the socket would fail
/// meanwhile, so the program must be stopped.
///
/// # Errors
/// The errors of `work`, and of entering and leaving repair mode.
pub(super) fn during<T>(fd: BorrowedFd, work: impl FnOnce() -> nix::Result<T>) -> nix::Result<T> {
    let reuse = reuse(fd)?;
    supervise::note_repair(Some(reuse.cast_unsigned()));
    begin(fd)?;
    let done = fault::hit(Point::TcpRepairing).map_err(|_| Errno::EIO).and_then(|()| work());
    end_with(fd, reuse)?;
    supervise::clear_repair();
    done
}

/// Leaves repair mode and sends the peer a window probe, which tells it that the connection is
/// alive.
pub(super) fn end_with_probe(fd: BorrowedFd) -> nix::Result<()> {
    set(fd, TCP_REPAIR, OFF.cast_unsigned())
}

/// Whether a socket is in repair mode.
pub(super) fn is_on(fd: BorrowedFd) -> nix::Result<bool> {
    socket::option::<c_int>(fd, libc::SOL_TCP, TCP_REPAIR).map(|value| value == ON)
}

/// Selects the queue for the next calls.
pub(super) fn choose(fd: BorrowedFd, queue: Queue) -> nix::Result<()> {
    set(fd, TCP_REPAIR_QUEUE, queue as u32)
}

/// Returns the sequence number after the last byte of a queue, or after its FIN.
pub(super) fn sequence(fd: BorrowedFd, queue: Queue) -> nix::Result<u32> {
    choose(fd, queue)?;
    socket::option(fd, libc::SOL_TCP, TCP_QUEUE_SEQ)
}

/// Sets the sequence number of the first byte of a queue, before the socket is connected.
pub(super) fn set_sequence(fd: BorrowedFd, queue: Queue, number: u32) -> nix::Result<()> {
    choose(fd, queue)?;
    set(fd, TCP_QUEUE_SEQ, number)
}

/// Returns the contents of the selected queue, or of the receive queue if none is selected. The
/// queue has `bytes` bytes.
///
/// # Errors
/// `EAGAIN` if the queue has another number of bytes.
pub(super) fn peek(fd: BorrowedFd, bytes: u32) -> nix::Result<Vec<u8>> {
    if bytes == 0 {
        return Ok(Vec::new());
    }
    // A longer queue would fill the buffer.
    let mut found = vec![0; bytes as usize + 1];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let len = recv(fd.as_raw_fd(), &mut found, flags)?;
    if len != bytes as usize {
        return Err(Errno::EAGAIN);
    }
    found.truncate(len);
    Ok(found)
}

/// Appends bytes to a queue.
pub(super) fn append(fd: BorrowedFd, queue: Queue, bytes: &[u8]) -> nix::Result<()> {
    if !bytes.is_empty() {
        choose(fd, queue)?;
    }
    write(fd, bytes)
}

/// Sends bytes, of which the one before `end` is urgent if it is one of them.
pub(super) fn write_urgent(fd: BorrowedFd, bytes: &[u8], end: usize) -> nix::Result<()> {
    let Some((urgent, before)) = bytes.get(..end).and_then(<[u8]>::split_last) else {
        return write(fd, bytes);
    };
    write(fd, before)?;
    let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    send(fd.as_raw_fd(), &[*urgent], flags)?;
    write(fd, &bytes[end..])
}

/// Sends bytes. The queue must have room for all of them.
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

/// Sets the options that the two ends have negotiated.
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
