//! What a restore and its pager tell each other, over a pair of sockets (`SOCK_SEQPACKET`).
//!
//! The restore names each process, with descriptors, and the ranges of its pages; then it says
//! [`Order::Begin`], and the pager answers [`READY`] or why it cannot. When the tree runs, the restore
//! says [`Order::Released`]. Only then the pager reads pages that no thread waits for.

use std::{
    io::{self, IoSlice},
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian::U64};

use crate::{sys::socket, units::HostPid};

/// The answer of a pager that is ready.
pub(super) const READY: &str = "ready";

/// The longest message, in bytes.
const MESSAGE_BYTES: usize = 16 << 10;

/// How many ranges a message holds.
const RANGES: usize = 1000;

/// What the restore says.
#[derive(Debug)]
pub(super) enum Order {
    /// A process: its number in the images, its pid here, and its userfaultfd.
    Process(u64, HostPid, OwnedFd),
    /// Ranges of pages of the process before.
    Ranges(Vec<Range<u64>>),
    Begin,
    Released,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ProcessWords {
    id: U64,
    pid: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RangeWords {
    start: U64,
    end: U64,
}

const PROCESS: u8 = b'p';
const SOME_RANGES: u8 = b'r';
const BEGIN: u8 = b'b';
const RELEASED: u8 = b'l';

fn send(socket: BorrowedFd, kind: u8, data: &[u8], fd: Option<BorrowedFd>) -> io::Result<()> {
    let numbers: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let rights: &[ControlMessage] = if fd.is_none() { &[] } else { &rights };
    let bytes = [IoSlice::new(std::slice::from_ref(&kind)), IoSlice::new(data)];
    sendmsg::<()>(socket.as_raw_fd(), &bytes, rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Names a process and the pages that it waits for.
pub(super) fn send_process(
    socket: BorrowedFd,
    (id, pid): (u64, HostPid),
    fd: BorrowedFd,
    ranges: &[Range<u64>],
) -> io::Result<()> {
    let words = ProcessWords { id: id.into(), pid: u64::from(pid.0.cast_unsigned()).into() };
    send(socket, PROCESS, words.as_bytes(), Some(fd))?;
    for some in ranges.chunks(RANGES) {
        let words = some
            .iter()
            .map(|range| RangeWords { start: range.start.into(), end: range.end.into() });
        let words: Vec<RangeWords> = words.collect();
        send(socket, SOME_RANGES, words.as_bytes(), None)?;
    }
    Ok(())
}

pub(super) fn send_begin(socket: BorrowedFd) -> io::Result<()> {
    send(socket, BEGIN, &[], None)
}

pub(super) fn send_released(socket: BorrowedFd) -> io::Result<()> {
    send(socket, RELEASED, &[], None)
}

/// Sends the answer of the pager.
pub(super) fn send_answer(socket: BorrowedFd, text: &str) -> io::Result<()> {
    let end = text.len().min(MESSAGE_BYTES);
    let (kind, rest) = text.as_bytes()[..end].split_first().ok_or(io::ErrorKind::InvalidInput)?;
    send(socket, *kind, rest, None)
}

/// Receives the answer of the pager; empty if it has ended.
pub(super) fn receive_answer(socket: BorrowedFd) -> io::Result<String> {
    let mut bytes = vec![0; MESSAGE_BYTES];
    let received = socket::receive(socket, &mut bytes, MsgFlags::empty())?;
    Ok(String::from_utf8_lossy(&bytes[..received.len]).into_owned())
}

/// Receives a message; `None` at the end of the connection.
pub(super) fn receive(socket: impl AsFd) -> io::Result<Option<Order>> {
    let mut bytes = vec![0; 1 + RANGES * size_of::<RangeWords>()];
    let received = socket::receive(socket.as_fd(), &mut bytes, MsgFlags::empty())?;
    let Some((kind, data)) = bytes[..received.len].split_first() else { return Ok(None) };
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    Ok(Some(match *kind {
        PROCESS => {
            let words = ProcessWords::read_from_bytes(data).map_err(|_| invalid())?;
            let pid = HostPid(i32::try_from(words.pid.get()).map_err(|_| invalid())?);
            let fd = received.fds.into_iter().next().ok_or_else(invalid)?;
            Order::Process(words.id.get(), pid, fd)
        }
        SOME_RANGES => {
            let words = <[RangeWords]>::ref_from_bytes(data).map_err(|_| invalid())?;
            let ranges = words.iter().map(|range| range.start.get()..range.end.get());
            Order::Ranges(ranges.collect())
        }
        BEGIN => Order::Begin,
        RELEASED => Order::Released,
        _ => return Err(invalid()),
    }))
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let ranges: Vec<_> = (0..2500).map(|n| n * 0x3000..n * 0x3000 + 0x1000).collect();
        let null = std::fs::File::open("/dev/null").unwrap();
        send_process(ours.as_fd(), (7, HostPid(4711)), null.as_fd(), &ranges).unwrap();
        send_begin(ours.as_fd()).unwrap();
        send_released(ours.as_fd()).unwrap();
        let Some(Order::Process(7, HostPid(4711), _)) = receive(&theirs).unwrap() else {
            panic!("no process");
        };
        let mut received = Vec::new();
        while let Some(Order::Ranges(some)) = receive(&theirs).unwrap() {
            received.extend(some);
            if received.len() == ranges.len() {
                break;
            }
        }
        assert_eq!(received, ranges);
        assert!(matches!(receive(&theirs).unwrap(), Some(Order::Begin)));
        assert!(matches!(receive(&theirs).unwrap(), Some(Order::Released)));
        send_answer(theirs.as_fd(), READY).unwrap();
        assert_eq!(receive_answer(ours.as_fd()).unwrap(), READY);
        drop(ours);
        assert!(receive(&theirs).unwrap().is_none());
    }
}
