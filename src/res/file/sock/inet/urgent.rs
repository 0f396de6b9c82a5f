//! Urgent data of TCP connections (`MSG_OOB`): one byte, whose place among the received bytes is the
//! mark, whether or not the program has read the byte.
//!
//! No call shows the bytes behind the mark, so the dump reads them in the memory of the kernel. The
//! images have the urgent byte in its place among the others. The restore sends it to itself in a
//! packet that appears to come from the peer.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::PollFlags,
    sys::socket::{MsgFlags, recv},
};

use super::{
    forge::{self, Packet},
    lock::Ends,
    repair::{self, Queue, Window},
};
use crate::{
    image::proto,
    res::{
        file::{descriptor, sock::skb},
        kernel::{Kernel, KernelError, KernelResult},
    },
};

/// `urg_data` of `struct tcp_sock`: the byte has not arrived, or the program has read it
/// (`TCP_URG_NOTYET`, `TCP_URG_READ`, `net/tcp.h`).
const NOT_YET: u16 = 0x200;
const READ: u16 = 0x400;

/// The most messages in a queue, and the most bytes, far above what the kernel lets through.
const MESSAGES_MAX: u32 = 1 << 20;
const BYTES_MAX: u32 = 1 << 30;

/// The window for the urgent byte.
const WINDOW_BYTES: u32 = 1 << 12;

/// How long a restore waits for the urgent byte.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_micros(100);

/// What a connection with a mark has received.
#[derive(Debug)]
pub(super) struct Marked {
    /// The received bytes that were not read; the urgent byte is one of them.
    pub(super) received: Vec<u8>,
    pub(super) urgent: proto::SkUrgentEntry,
    /// The sequence number after the last byte, or after the FIN.
    pub(super) end: u32,
}

/// Whether an urgent byte has arrived that the program has not read.
pub(super) fn waits(fd: BorrowedFd) -> nix::Result<bool> {
    Ok(descriptor::events_among(fd, PollFlags::POLLPRI)?.contains(PollFlags::POLLPRI))
}

/// Reads what a connection has received, if the mark is among the bytes that were not read.
pub(super) fn read(kernel: &mut Kernel, fd: BorrowedFd) -> KernelResult<Option<Marked>> {
    let sock = skb::sock(kernel, fd)?;
    let state = kernel.member(sock, "tcp_sock", "urg_data")?;
    let state = kernel.bytes(state, 2, "urgent data")?;
    let state = u16::from_ne_bytes(state.try_into().expect("2 bytes"));
    let first = kernel.word(sock, "tcp_sock", "copied_seq")?;
    let end = kernel.word(sock, "tcp_sock", "rcv_nxt")?;
    let mark = kernel.word(sock, "tcp_sock", "urg_seq")?;
    let offset = mark.wrapping_sub(first);
    // Numbers wrap around: a mark that was passed is far ahead.
    if state == 0 || state & NOT_YET != 0 || offset >= end.wrapping_sub(first) {
        return Ok(None);
    }
    if end.wrapping_sub(first) > BYTES_MAX {
        return Err(KernelError::Unexpected("the length of a queue"));
    }
    let mut received = Vec::new();
    for at in skb::queue(kernel, sock, MESSAGES_MAX)? {
        let control = kernel.member(at, "sk_buff", "cb")?;
        let start = kernel.word(control, "tcp_skb_cb", "seq")?;
        let bytes = skb::data(kernel, at)?;
        // The program may have read a part of the first message, and messages may overlap.
        let known = first.wrapping_sub(start).wrapping_add(len(&received)?);
        if bytes.is_empty() {
            continue;
        }
        if known > len(&bytes)? {
            return Err(KernelError::Unexpected("the order of a queue"));
        }
        received.extend_from_slice(&bytes[known as usize..]);
    }
    if offset >= len(&received)? {
        return Err(KernelError::Unexpected("the place of urgent data"));
    }
    let urgent = proto::SkUrgentEntry { offset, read: (state & READ != 0).then_some(true) };
    Ok(Some(Marked { received, urgent, end }))
}

/// Returns how many of the bytes that the peer has not acknowledged end with the urgent byte, if it
/// is one of them.
pub(super) fn sent(kernel: &mut Kernel, fd: BorrowedFd) -> KernelResult<Option<u32>> {
    let sock = skb::sock(kernel, fd)?;
    let first = kernel.word(sock, "tcp_sock", "snd_una")?;
    let end = kernel.word(sock, "tcp_sock", "snd_up")?;
    Ok(Some(end.wrapping_sub(first)).filter(|bytes| *bytes != 0))
}

fn len(bytes: &[u8]) -> KernelResult<u32> {
    u32::try_from(bytes.len()).map_err(|_| KernelError::Unexpected("the length of a queue"))
}

/// Whether a mark of the images is among the received bytes.
pub(super) fn is_within(urgent: &proto::SkUrgentEntry, received: &[u8]) -> bool {
    usize::try_from(urgent.offset).is_ok_and(|offset| offset < received.len())
}

/// Fills the receive queue of a connection in repair mode, with its mark. `packet` has the numbers
/// of the peer; its sequence number is that of the first byte.
///
/// # Errors
/// `ETIMEDOUT` if the packet with the urgent byte does not arrive; the errors of the kernel.
pub(super) fn fill(
    fd: BorrowedFd,
    (own, peer): Ends,
    packet: Packet,
    (received, urgent): (&[u8], &proto::SkUrgentEntry),
) -> nix::Result<()> {
    let (before, marked) = received.split_at(urgent.offset as usize);
    let (byte, behind) = marked.split_at(1);
    repair::append(fd, Queue::Received, before)?;
    let sequence = packet.sequence.wrapping_add(urgent.offset);
    // The own window must have room for the byte; the windows of the images are set later.
    let (rcv_wnd, rcv_wup, snd_wl1) = (WINDOW_BYTES, sequence, sequence);
    let window = Window { rcv_wnd, rcv_wup, snd_wl1, ..repair::window(fd)? };
    repair::set_window(fd, &window)?;
    repair::choose(fd, Queue::Neither)?;
    forge::send(own, peer, Packet { sequence, urgent: Some(byte[0]), ..packet })?;
    let begin = Instant::now();
    while repair::sequence(fd, Queue::Received)? == sequence {
        if begin.elapsed() > PATIENCE {
            return Err(Errno::ETIMEDOUT);
        }
        thread::sleep(PAUSE);
    }
    if urgent.read == Some(true) {
        recv(fd.as_raw_fd(), &mut [0], MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT)?;
    }
    repair::append(fd, Queue::Received, behind)
}
