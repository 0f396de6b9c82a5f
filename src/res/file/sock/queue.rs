//! Data queued in UNIX sockets: `sk-queues.img`.
//!
//! The dump reads queues with `MSG_PEEK`, which consumes nothing. To read beyond the first
//! message it sets `SO_PEEK_OFF`, and resets it afterwards.
//!
//! A read with nothing left in the queue does consume a pending error; and for sockets other than
//! streams, any read reports the error before the first packet. So the dump reads no more of a
//! stream than `SIOCINQ` reports, and does not read other sockets with an error (`POLLERR`).
//!
//! For a socket that keeps packets apart, each packet is one entry. A stream is cut into as few
//! entries as possible, but before and after each message with descriptors. Otherwise a reader
//! that stops where its writer did would receive the descriptors too early, or lose them.
//!
//! The format has no fields for the names and credentials of senders. Restored data shows the
//! name of the socket that sends it again. The credentials of data in a socket that asks for them
//! (`SO_PASSCRED`) are in a field of rcriu; the restore sends the data with them, which only a
//! privileged process may do (`SCM_CREDENTIALS`).

use std::{
    collections::{HashMap, VecDeque},
    io::IoSlice,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use nix::{
    errno::Errno,
    libc::{self, c_int},
    poll::PollFlags,
    sys::socket::{ControlMessage, MsgFlags, UnixCredentials, recv, sendmsg},
};

use super::opts::{self, Subject};
use crate::{
    image::{ImageStore, Kind, SnapshotWriter, proto},
    inject::Helper,
    res::file::{Description, FileError, Intake, Opened, Result, descriptor},
    sys::{
        fds,
        socket::{self, Received},
    },
    units::{HostPid, NsPid},
};

/// The size of the peek buffer. The kernel puts at most about 64 KiB into one message of a stream,
/// so one peek from the start of a message with descriptors sees all of it.
const PEEK_BYTES: usize = 256 << 10;

const HELP_READ: &str = "have the process read its queue, then try again";

/// A packet in a queue, or a piece of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Packet {
    /// Its bytes.
    pub(super) data: Vec<u8>,
    /// The numbers in the images of the descriptions sent with it.
    pub(super) rights: Vec<u32>,
    /// The process and ids that it shows, if its sender is known.
    pub(super) sender: Option<proto::SkPeerEntry>,
    /// Whether it is an out-of-band byte (`MSG_OOB`).
    pub(super) urgent: bool,
}

/// The peek offset of a socket: changed only when needed, and reset on drop.
pub(super) struct PeekOffset<'a> {
    fd: BorrowedFd<'a>,
    before: c_int,
    now: c_int,
}

impl<'a> PeekOffset<'a> {
    /// Reads the current offset of a socket.
    pub(super) fn new(fd: BorrowedFd<'a>) -> nix::Result<Self> {
        let before = socket::option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
        Ok(Self { fd, before, now: before })
    }

    /// Makes the next peek start at `offset`; the kernel then advances the offset.
    fn at(&mut self, offset: c_int) -> nix::Result<()> {
        // Without an offset, every peek starts at 0 and leaves the offset unset.
        if self.now >= 0 || offset != 0 {
            self.set(offset)?;
        }
        Ok(())
    }

    /// Sets the offset.
    pub(super) fn set(&mut self, offset: c_int) -> nix::Result<()> {
        self.now = offset;
        socket::set_option(self.fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &offset)
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        if self.now < 0 {
            return;
        }
        if let Err(errno) = self.set(self.before) {
            log::error!("cannot reset the peek offset of a socket to {}: {errno}", self.before);
        }
    }
}

/// The error that is pending in a UNIX socket with `POLLERR`. It can only be `ECONNRESET`: the other
/// end was closed with unread data, or a listening socket was closed with the connection still
/// pending. Reading it (`SO_ERROR`) would consume it.
pub(super) const UNIX_ERROR: Errno = Errno::ECONNRESET;

/// Whether a stream has an unread out-of-band byte.
fn is_urgent(fd: BorrowedFd) -> nix::Result<bool> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT;
    let polled = descriptor::events_among(fd, PollFlags::POLLPRI)?;
    Ok(polled.contains(PollFlags::POLLPRI) || recv(fd.as_raw_fd(), &mut [0], flags).is_ok())
}

/// Returns the queue of a socket that does not listen, and its pending error. `urgent` reads the
/// queue of a stream with an out-of-band byte, or says why it cannot.
///
/// # Errors
/// [`FileError::Unsupported`] for credentials, out-of-band data, and packets behind an error.
pub(super) fn peek(
    file: &Description,
    kind: c_int,
    what: &str,
    intake: &mut dyn Intake,
    urgent: &mut dyn FnMut(BorrowedFd) -> Result<Vec<Packet>, String>,
) -> Result<(Vec<Packet>, Option<Errno>)> {
    let fd = file.fd.as_fd();
    let failed = file.failed("peek at the queue of");
    let seen =
        descriptor::events_among(fd, PollFlags::POLLIN | PollFlags::POLLPRI).map_err(&failed)?;
    let error = seen.contains(PollFlags::POLLERR).then_some(UNIX_ERROR);
    if kind == libc::SOCK_STREAM && is_urgent(fd).map_err(&failed)? {
        return match urgent(fd) {
            Ok(packets) => Ok((packets, error)),
            Err(why) => {
                let what = format!("{what}, with an unread urgent byte; {why}");
                Err(file.unsupported(what, HELP_READ))
            }
        };
    }
    // For datagram sockets, this counts only the first datagram.
    let bytes = fds::readable_bytes(fd).map_err(&failed)?;
    let is_empty = match kind {
        // A reader takes an empty packet for the end of the sequence.
        libc::SOCK_SEQPACKET => {
            bytes == 0 && (error.is_some() || !seen.contains(PollFlags::POLLIN))
        }
        libc::SOCK_DGRAM => bytes == 0 && !seen.contains(PollFlags::POLLIN),
        _ => bytes == 0,
    };
    if is_empty {
        return Ok((Vec::new(), error));
    }
    if error.is_some() && kind != libc::SOCK_STREAM {
        let what = format!("{what}, with packets behind an unread error");
        return Err(file.unsupported(what, HELP_READ));
    }
    let asks = |option| {
        socket::option::<c_int>(fd, libc::SOL_SOCKET, option).is_ok_and(|value| value != 0)
    };
    if asks(opts::SO_PASSPIDFD) {
        let what = format!(
            "{what}, which asks for the pidfds of senders (SO_PASSPIDFD) and has data in its queue"
        );
        return Err(file.unsupported(what, HELP_READ));
    }
    let mut offset = PeekOffset::new(fd).map_err(&failed)?;
    let found = if kind == libc::SOCK_STREAM {
        peek_stream(fd, bytes, &mut offset)
    } else {
        peek_packets(fd, kind, bytes, &mut offset)
    };
    drop(offset);
    let found = found.map_err(&failed)?;
    if !found.is_empty() && (asks(libc::SO_TIMESTAMP) || asks(libc::SO_TIMESTAMPNS)) {
        log::warn!(
            "{what}: after a restore, the timestamps of its queued data are those of the restore"
        );
    }
    let mut packets = Vec::new();
    for (data, received) in found {
        if received.other_control {
            let what = format!("{what}, with control messages in its queue");
            return Err(file.unsupported(what, HELP_READ));
        }
        let rights = received.fds.into_iter().map(|fd| intake.enter(fd, file));
        let rights = rights.collect::<Result<_>>()?;
        let sender = received.sender.filter(|sender| sender.pid != 0).map(|sender| {
            let pid = intake.pids().ns(HostPid(sender.pid)).raw();
            let (uid, gid) = intake.pids().ids().ns_owner((sender.uid, sender.gid));
            proto::SkPeerEntry { pid, uid, gid, groups: Vec::new() }
        });
        packets.push(Packet { data, rights, sender, urgent: false });
    }
    Ok((packets, error))
}

/// Returns the data that a TCP socket has received, which is `bytes` long.
pub(super) fn peek_received(fd: BorrowedFd, bytes: u32) -> nix::Result<Vec<u8>> {
    let mut buffer = vec![0; bytes as usize];
    // Before Linux 6.9, TCP sockets have no peek offset.
    let mut offset = PeekOffset::new(fd).ok();
    offset.as_mut().map_or(Ok(()), |offset| offset.at(0))?;
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let seen = recv(fd.as_raw_fd(), &mut buffer, flags)?;
    if seen != buffer.len() {
        return Err(Errno::EPROTO);
    }
    Ok(buffer)
}

/// Receives at the peek offset; returns `None` if there is nothing.
fn peek_next(fd: BorrowedFd, buffer: &mut [u8], more: MsgFlags) -> nix::Result<Option<Received>> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | more;
    loop {
        match socket::receive(fd, buffer, flags) {
            Ok(received) => return Ok(Some(received)),
            Err(Errno::EAGAIN) => return Ok(None),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

fn peek_packets(
    fd: BorrowedFd,
    kind: c_int,
    bytes: u32,
    offset: &mut PeekOffset,
) -> nix::Result<Vec<(Vec<u8>, Received)>> {
    let mut buffer = vec![0; PEEK_BYTES];
    let mut packets = Vec::new();
    offset.at(0)?;
    if kind == libc::SOCK_SEQPACKET && offset.now < 0 {
        // A single packet can be read without an offset.
        let flags = MsgFlags::MSG_TRUNC;
        if let Some(first) = peek_next(fd, &mut buffer, flags)?
            && first.len == bytes as usize
            && first.len <= PEEK_BYTES
        {
            let data = buffer[..first.len].to_vec();
            return Ok(if first.len == 0 { Vec::new() } else { vec![(data, first)] });
        }
    }
    offset.set(0)?;
    while let Some(first) = peek_next(fd, &mut buffer, MsgFlags::MSG_TRUNC)? {
        // The end of a sequence of packets reads as an empty packet.
        if first.len == 0 && kind == libc::SOCK_SEQPACKET && first.fds.is_empty() {
            break;
        }
        let mut data = Vec::with_capacity(first.len);
        data.extend_from_slice(&buffer[..first.len.min(PEEK_BYTES)]);
        while data.len() < first.len {
            // The offset is now inside the packet. Its descriptors are received again.
            let next = peek_next(fd, &mut buffer, MsgFlags::MSG_TRUNC)?.ok_or(Errno::EPROTO)?;
            data.extend_from_slice(&buffer[..next.len.min(PEEK_BYTES)]);
        }
        packets.push((data, first));
    }
    Ok(packets)
}

/// Reads the `bytes` in the queue of a stream, piece by piece.
///
/// A peek ends after a message with descriptors. If the buffer is full before that message
/// ends, the peek returns its descriptors with bytes that belong to earlier messages. So a second
/// peek finds where the last whole message before it ends.
fn peek_stream(
    fd: BorrowedFd,
    bytes: u32,
    offset: &mut PeekOffset,
) -> nix::Result<Vec<(Vec<u8>, Received)>> {
    let bytes = c_int::try_from(bytes).map_err(|_| Errno::EOVERFLOW)?;
    let mut buffer = vec![0; PEEK_BYTES];
    let mut pieces: Vec<(Vec<u8>, Received)> = Vec::new();
    let mut at = 0;
    while at < bytes {
        let len = usize::try_from(bytes - at).expect("it is behind").min(PEEK_BYTES);
        offset.at(at)?;
        let Some(mut received) = peek_next(fd, &mut buffer[..len], MsgFlags::empty())? else {
            return Err(Errno::EPROTO);
        };
        if received.len == 0 {
            return Err(Errno::EPROTO);
        }
        if !received.fds.is_empty() {
            offset.at(at)?;
            // Peek at all messages that the buffer can hold, or at all but the last, which has
            // the descriptors.
            let is_full = received.len == PEEK_BYTES;
            let room = if is_full { PEEK_BYTES } else { received.len - 1 };
            let before = socket::peek_whole(fd, &mut buffer[..room])?;
            if is_full && before == 0 {
                return Err(Errno::EMSGSIZE);
            }
            if before > 0 {
                received = Received { len: before, fds: Vec::new(), ..received };
            }
        }
        at += c_int::try_from(received.len).map_err(|_| Errno::EOVERFLOW)?;
        let data = &buffer[..received.len];
        match pieces.last_mut() {
            Some((last, before))
                if before.fds.is_empty()
                    && received.fds.is_empty()
                    && before.sender == received.sender =>
            {
                last.extend_from_slice(data);
            }
            _ => pieces.push((data.to_owned(), received)),
        }
    }
    Ok(pieces)
}

/// Writes the image of the queues, unless all are empty.
pub(super) fn write(images: &SnapshotWriter, queues: &[(u32, Vec<Packet>)]) -> Result<()> {
    if queues.iter().all(|(_, packets)| packets.is_empty()) {
        return Ok(());
    }
    let mut image = images.create(Kind::SkQueues, 0)?;
    for (id, packet) in queues.iter().flat_map(|(id, packets)| packets.iter().map(move |p| (id, p)))
    {
        let rights = &packet.rights;
        let scm = (!rights.is_empty()).then(|| proto::ScmEntry {
            r#type: libc::SCM_RIGHTS.cast_unsigned(),
            rights: rights.clone(),
        });
        image.message(&proto::SkPacketEntry {
            id_for: *id,
            length: u32::try_from(packet.data.len()).expect("the kernel sends less at a time"),
            scm: scm.into_iter().collect(),
            rcriu_sender: packet.sender.clone(),
            rcriu_urgent: packet.urgent.then_some(true),
        })?;
        image.raw(&packet.data)?;
    }
    image.finish()?;
    Ok(())
}

/// Reads the image of the queues: the packets of each socket, by its number in the images.
///
/// # Errors
/// [`FileError::Image`] for control messages other than descriptors.
pub(super) fn read(images: &dyn ImageStore) -> Result<HashMap<u32, VecDeque<Packet>>> {
    let mut image = match images.image(Kind::SkQueues, 0) {
        Err(error) if error.is_missing() => return Ok(HashMap::new()),
        image => image?,
    };
    let mut queues: HashMap<u32, VecDeque<Packet>> = HashMap::new();
    while let Some(entry) = image.next_message::<proto::SkPacketEntry>()? {
        let urgent = entry.rcriu_urgent();
        let mut packet = Packet { sender: entry.rcriu_sender, urgent, ..Packet::default() };
        image.append(entry.length.into(), "a packet", &mut packet.data)?;
        for control in entry.scm {
            if control.r#type != libc::SCM_RIGHTS.cast_unsigned() {
                return Err(FileError::Image {
                    id: entry.id_for,
                    problem: format!(
                        "its queue holds control messages of type {}, expected descriptors ({})",
                        control.r#type,
                        libc::SCM_RIGHTS
                    ),
                });
            }
            packet.rights.extend(control.rights);
        }
        queues.entry(entry.id_for).or_default().push_back(packet);
    }
    Ok(queues)
}

/// Sends the packets of a queue again, with the descriptors and credentials that came with them.
pub(super) fn send(
    sender: BorrowedFd,
    packets: impl IntoIterator<Item = Packet>,
    receiver: &Subject,
    opened: &Opened,
) -> Result<()> {
    opts::widen(sender);
    for packet in packets {
        let lookup = |id: &u32| opened.get(*id).map(|fd| fd.as_raw_fd());
        let fds = packet.rights.iter().map(lookup).collect::<Result<Vec<_>>>()?;
        let Some(shown) = &packet.sender else {
            send_one(sender, &packet, &fds, None).map_err(receiver.failed(REFILL))?;
            continue;
        };
        let pid = NsPid::of_image(shown.pid);
        let host = if shown.pid == 0 { HostPid(0) } else { opened.pids.host(pid) };
        let (user, group) = opened.pids.ids().host_owner((shown.uid, shown.gid));
        let credentials = Some(socket::credentials(host.0, user, group));
        let mut sent = send_one(sender, &packet, &fds, credentials);
        if sent == Err(Errno::ESRCH) {
            // The process has ended. Its number is enough for the kernel, while something has it.
            let _helper = Helper::spawn(host);
            sent = send_one(sender, &packet, &fds, credentials);
        }
        if let Err(errno @ (Errno::ESRCH | Errno::EPERM)) = sent {
            log::warn!(
                "{}: queued data shows rcriu as its sender instead of process {pid} of user {}: \
                 {errno}",
                receiver.object,
                shown.uid
            );
            sent = send_one(sender, &packet, &fds, None);
        }
        sent.map_err(receiver.failed(REFILL))?;
    }
    Ok(())
}

const REFILL: &str = "refill the queue of";

fn send_one(
    sender: BorrowedFd,
    packet: &Packet,
    fds: &[RawFd],
    credentials: Option<UnixCredentials>,
) -> nix::Result<()> {
    let mut control = Vec::new();
    if !fds.is_empty() {
        control.push(ControlMessage::ScmRights(fds));
    }
    if let Some(credentials) = &credentials {
        control.push(ControlMessage::ScmCredentials(credentials));
    }
    let mut flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    flags.set(MsgFlags::MSG_OOB, packet.urgent);
    let data = &packet.data;
    let bytes = [IoSlice::new(data)];
    let sent = sendmsg::<()>(sender.as_raw_fd(), &bytes, &control, flags, None)?;
    if sent == data.len() { Ok(()) } else { Err(Errno::ENOBUFS) }
}
