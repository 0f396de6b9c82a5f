//! The TCP connections of the images (`tcp-stream-INO.img`), and how the kernel reads and sets one.
//!
//! `outq_seq` is the sequence number after the last byte that the program has written, `inq_seq`
//! the one after the last byte received. A FIN takes one sequence number, but is not part of the
//! lengths of the queues. The last `unsq_len` of the `outq_len` bytes have never been sent.

use std::{
    net::SocketAddr,
    os::fd::{AsRawFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    sys::socket::{Shutdown, SockaddrStorage, bind, connect, shutdown},
};

use super::{
    forge::{self, Packet},
    lock::Ends,
    repair::{self, Negotiated, Queue, Window},
    urgent::{self, Marked},
};
use crate::{
    image::{Kind, SnapshotWriter, Store, proto},
    res::{
        file::{Result, sock::state},
        kernel::{Kernel, KernelResult},
    },
    sys::{fds, socket},
};

/// How often the dump reads a connection that changes meanwhile.
const LOOKS: usize = 1000;

/// The restore refuses images with longer queues. The limit of the kernel is lower
/// (`net.ipv4.tcp_wmem` is an `int`).
const QUEUE_MAX_BYTES: u32 = 1 << 30;

/// Options of a connection in `tcpi_options` (`TCPI_OPT_*`, `linux/tcp.h`).
const TIMESTAMPS: u32 = 1;
const SACK: u32 = 2;
const SCALING: u32 = 4;

/// Kinds of options in packets (`net/tcp.h`).
const KIND_MSS: u32 = 2;
const KIND_WINDOW: u32 = 3;
const KIND_SACK_PERMITTED: u32 = 4;
const KIND_TIMESTAMP: u32 = 8;

/// Offsets in `struct tcp_info` (`linux/tcp.h`).
const INFO_STATE: usize = 0;
const INFO_OPTIONS: usize = 5;
const INFO_SCALING: usize = 6;
const INFO_BYTES: usize = 8;

/// A connection, apart from the options of its socket.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Connection {
    /// Its state (`net/tcp_states.h`).
    pub(super) state: u32,
    pub(super) entry: proto::TcpStreamEntry,
    /// Bytes received, but not read.
    pub(super) received: Vec<u8>,
    /// Bytes written, but not acknowledged.
    pub(super) sent: Vec<u8>,
    /// The mark among the received bytes; it is in the image of the socket.
    pub(super) urgent: Option<proto::SkUrgentEntry>,
    /// How many of the written bytes end with an urgent byte; this, too.
    pub(super) urgent_sent: Option<u32>,
}

/// Whether a socket in this state has a connection that the restore can recreate.
pub(super) fn is_connection(of: u32) -> bool {
    can_be_made(of) && of != state::CLOSE
}

/// Whether the restore can recreate a connection that has this state in the images. Images of CRIU
/// also contain connections that both ends have closed.
pub(super) fn can_be_made(of: u32) -> bool {
    own_end(of).is_some()
}

/// The state of this end's FIN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OwnEnd {
    Open,
    Sent,
    Acknowledged,
}

fn own_end(of: u32) -> Option<OwnEnd> {
    Some(match of {
        state::ESTABLISHED | state::CLOSE_WAIT | state::SYN_SENT => OwnEnd::Open,
        state::FIN_WAIT1 | state::CLOSING | state::LAST_ACK => OwnEnd::Sent,
        state::FIN_WAIT2 | state::CLOSE => OwnEnd::Acknowledged,
        _ => return None,
    })
}

/// Whether the peer's FIN was received.
fn peer_has_ended(of: u32) -> bool {
    matches!(of, state::CLOSE_WAIT | state::CLOSING | state::LAST_ACK | state::CLOSE)
}

/// Whether this end sent its FIN before it received the peer's.
fn own_end_is_first(of: u32) -> bool {
    matches!(of, state::FIN_WAIT1 | state::FIN_WAIT2 | state::CLOSING)
}

impl Connection {
    /// Reads a connection, again if it changes meanwhile. Each time, the connection is in repair
    /// mode ([`repair`]) for a few microseconds.
    ///
    /// # Errors
    /// `EAGAIN` if it keeps changing; the errors of the kernel.
    pub(super) fn read(fd: BorrowedFd) -> nix::Result<Self> {
        for _ in 0..LOOKS {
            let before = Counts::read(fd)?;
            let looked = before.look(fd, None);
            if Counts::read(fd)? == before {
                return looked;
            }
        }
        Err(Errno::EAGAIN)
    }

    /// Reads a connection with urgent data among the received bytes, as [`read`](Self::read) does;
    /// `None` without.
    ///
    /// # Errors
    /// In the inner result, those of [`read`](Self::read).
    pub(super) fn read_marked(
        kernel: &mut Kernel,
        fd: BorrowedFd,
    ) -> KernelResult<nix::Result<Option<Self>>> {
        let mut looked = Ok(None);
        for _ in 0..LOOKS {
            let Some(marked) = urgent::read(kernel, fd)? else { return Ok(Ok(None)) };
            looked = Counts::read(fd).and_then(|before| {
                let connection = before.look(fd, Some(&marked))?;
                let is_whole = connection.entry.inq_seq == marked.end;
                Ok((Counts::read(fd)? == before && is_whole).then_some(connection))
            });
            match looked {
                Ok(None) => {}
                looked => return Ok(looked),
            }
        }
        Ok(looked.and(Err(Errno::EAGAIN)))
    }

    /// Writes the image.
    ///
    /// # Errors
    /// [`FileError::Image`](crate::res::file::FileError) of the writer.
    pub(super) fn write(&self, images: &SnapshotWriter, inode: u32) -> Result<()> {
        let mut image = images.create(Kind::TcpStream, inode.into())?;
        image.message(&self.entry)?;
        image.raw(&self.received)?;
        image.raw(&self.sent)?;
        image.finish()?;
        Ok(())
    }

    /// Reads the image of a socket that has this state.
    ///
    /// # Errors
    /// The errors of the reader. The inner error is a problem of the socket, for a message
    /// about its entry.
    pub(super) fn load(images: &Store, inode: u32, state: u32) -> Result<Result<Self, String>> {
        let mut image = images.image(Kind::TcpStream, inode.into())?;
        let Some(entry) = image.next_message::<proto::TcpStreamEntry>()? else {
            return Ok(Err("its tcp-stream image is empty".to_owned()));
        };
        let (received_bytes, sent_bytes) = (entry.inq_len, entry.outq_len);
        if received_bytes.max(sent_bytes) > QUEUE_MAX_BYTES {
            return Ok(Err(format!("its queues have {received_bytes} and {sent_bytes} bytes")));
        }
        if entry.unsq_len.is_some_and(|unsent| unsent > sent_bytes) {
            return Ok(Err("more bytes are unsent than there are".to_owned()));
        }
        let (mut received, mut sent) = (Vec::new(), Vec::new());
        image.append(received_bytes.into(), "bytes that were received", &mut received)?;
        image.append(sent_bytes.into(), "bytes that were sent", &mut sent)?;
        Ok(Ok(Self { state, entry, received, sent, urgent: None, urgent_sent: None }))
    }

    /// Recreates the connection on a new socket. The socket stays in repair mode, so the peer
    /// receives nothing, even if the socket is closed, until [`repair::end_with_probe`]. A socket
    /// that was connecting is bound and numbered; [`connect_again`] connects it.
    ///
    /// # Errors
    /// The step that failed, as a verb, and the error of the kernel.
    pub(super) fn make(
        &self,
        fd: BorrowedFd,
        (own, peer): Ends,
    ) -> std::result::Result<(), (&'static str, Errno)> {
        let failed = |step| move |errno| (step, errno);
        repair::begin(fd).map_err(failed("begin to repair"))?;
        let address = |of: SocketAddr| SockaddrStorage::from(of);
        bind(fd.as_raw_fd(), &address(own)).map_err(failed("bind"))?;
        let numbers = failed("number the bytes of");
        repair::set_sequence(fd, Queue::Received, self.first_received()).map_err(numbers)?;
        repair::set_sequence(fd, Queue::Sent, self.first_sent()).map_err(numbers)?;
        if self.state == state::SYN_SENT {
            return Ok(());
        }
        connect(fd.as_raw_fd(), &address(peer)).map_err(failed("connect"))?;
        let negotiated = failed("set the options of");
        repair::set_negotiated(fd, &self.negotiated()).map_err(negotiated)?;
        if let Some(clock) = self.entry.timestamp {
            repair::set_clock(fd, clock).map_err(failed("set the clock of"))?;
        }
        self.fill(fd, (own, peer)).map_err(failed("fill the queues of"))?;
        if let Some(window) = self.window() {
            repair::set_window(fd, &window).map_err(failed("set the windows of"))?;
        }
        self.close(fd, (own, peer)).map_err(failed("end the data of"))
    }

    /// Returns the sequence number of the first byte received, but not read.
    fn first_received(&self) -> u32 {
        let end = u32::from(peer_has_ended(self.state));
        self.entry.inq_seq.wrapping_sub(self.entry.inq_len).wrapping_sub(end)
    }

    /// Returns the sequence number of the first byte sent, but not acknowledged.
    fn first_sent(&self) -> u32 {
        // A SYN takes a number, too.
        let is_connecting = self.state == state::SYN_SENT;
        let has_ended = own_end(self.state).is_some_and(|end| end != OwnEnd::Open);
        let end = u32::from(is_connecting || has_ended);
        self.entry.outq_seq.wrapping_sub(self.entry.outq_len).wrapping_sub(end)
    }

    fn negotiated(&self) -> Vec<Negotiated> {
        let entry = &self.entry;
        let has = |option| entry.opt_mask & option != 0;
        let mut options = vec![Negotiated { kind: KIND_MSS, value: entry.mss_clamp }];
        if has(SACK) {
            options.push(Negotiated { kind: KIND_SACK_PERMITTED, value: 0 });
        }
        if has(SCALING) {
            let received = entry.rcv_wscale.unwrap_or_default();
            let value = (entry.snd_wscale & 0xffff) | received << 16;
            options.push(Negotiated { kind: KIND_WINDOW, value });
        }
        if has(TIMESTAMPS) {
            options.push(Negotiated { kind: KIND_TIMESTAMP, value: 0 });
        }
        options
    }

    fn fill(&self, fd: BorrowedFd, ends: Ends) -> nix::Result<()> {
        match &self.urgent {
            None => repair::append(fd, Queue::Received, &self.received)?,
            Some(urgent) => {
                urgent::fill(fd, ends, self.packet(), (&self.received, urgent))?;
            }
        }
        let unsent = self.entry.unsq_len.unwrap_or_default() as usize;
        let (sent, unsent) = self.sent.split_at(self.sent.len() - unsent);
        let urgent = self.urgent_sent.unwrap_or_default() as usize;
        if !sent.is_empty() {
            repair::choose(fd, Queue::Sent)?;
            repair::write_urgent(fd, sent, urgent)?;
        }
        if !unsent.is_empty() {
            // Write as the program did: the kernel sends the bytes when the windows allow it.
            repair::end(fd)?;
            let written = repair::write_urgent(fd, unsent, urgent.saturating_sub(sent.len()));
            repair::begin(fd)?;
            written?;
        }
        repair::choose(fd, Queue::Neither)
    }

    /// Returns the windows as they were before the peer's FIN was received.
    fn window(&self) -> Option<Window> {
        let entry = &self.entry;
        // `rcv_wup` counts the peer's FIN if this end has acknowledged it.
        let told = entry.rcv_wup == Some(entry.inq_seq);
        let end = u32::from(peer_has_ended(self.state) && told);
        Some(Window {
            snd_wl1: entry.snd_wl1?,
            snd_wnd: entry.snd_wnd?,
            max_window: entry.max_window?,
            rcv_wnd: entry.rcv_wnd?.wrapping_add(end),
            rcv_wup: entry.rcv_wup?.wrapping_sub(end),
        })
    }

    /// Returns a packet of the peer, without data, from before the first received byte.
    fn packet(&self) -> Packet {
        let window = self.entry.snd_wnd.unwrap_or_default() >> self.entry.snd_wscale.min(14);
        Packet {
            sequence: self.first_received(),
            acknowledged: self.first_sent(),
            window: u16::try_from(window).unwrap_or(u16::MAX),
            ends: false,
            urgent: None,
        }
    }

    /// Repeats the FINs of both ends, in the order that leads to the recorded state.
    fn close(&self, fd: BorrowedFd, (own, peer): Ends) -> nix::Result<()> {
        let own_end = own_end(self.state).unwrap_or(OwnEnd::Open);
        let end_own = || -> nix::Result<()> {
            if own_end == OwnEnd::Acknowledged {
                // The kernel counts the FIN as sent, but sends no packet.
                repair::choose(fd, Queue::Sent)?;
            }
            shutdown(fd.as_raw_fd(), Shutdown::Write)?;
            repair::choose(fd, Queue::Neither)
        };
        if own_end != OwnEnd::Open && own_end_is_first(self.state) {
            end_own()?;
        }
        let mut packet = Packet { ends: true, ..self.packet() };
        packet.sequence = packet.sequence.wrapping_add(self.entry.inq_len);
        if peer_has_ended(self.state) {
            forge::send(own, peer, packet)?;
            packet.sequence = packet.sequence.wrapping_add(1);
        }
        if own_end != OwnEnd::Open && !own_end_is_first(self.state) {
            end_own()?;
        }
        if own_end == OwnEnd::Acknowledged {
            packet.acknowledged = self.entry.outq_seq;
            forge::send(own, peer, Packet { ends: false, ..packet })?;
        }
        Ok(())
    }
}

/// Connects a socket that was connecting when it was dumped, and that [`Connection::make`] has made.
/// Its packet looks to the peer like the earlier one, sent again.
///
/// # Errors
/// The errors of the kernel, such as `ECONNREFUSED`: the program will not learn of them.
pub(super) fn connect_again(fd: BorrowedFd, peer: SocketAddr) -> nix::Result<()> {
    repair::end(fd)?;
    let before = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(before | OFlag::O_NONBLOCK))?;
    let connected = connect(fd.as_raw_fd(), &SockaddrStorage::from(peer));
    fcntl(fd, FcntlArg::F_SETFL(before))?;
    match connected {
        Err(Errno::EINPROGRESS) => Ok(()),
        connected => connected,
    }
}

/// Values that differ if a connection has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Counts {
    state: u32,
    options: u32,
    /// The window scales in `tcpi_snd_wscale` and `tcpi_rcv_wscale`.
    scaling: (u32, u32),
    received_bytes: u32,
    /// This and `unsent_bytes` also count the FIN.
    sent_bytes: u32,
    unsent_bytes: u32,
}

impl Counts {
    fn read(fd: BorrowedFd) -> nix::Result<Self> {
        let mut info = [0; INFO_BYTES];
        socket::option_bytes(fd, libc::SOL_TCP, libc::TCP_INFO, &mut info)?;
        let scaling = u32::from(info[INFO_SCALING]);
        Ok(Self {
            state: info[INFO_STATE].into(),
            options: info[INFO_OPTIONS].into(),
            scaling: (scaling & 0xf, scaling >> 4),
            received_bytes: fds::readable_bytes(fd)?,
            sent_bytes: fds::unacknowledged_bytes(fd)?,
            unsent_bytes: fds::unsent_bytes(fd)?,
        })
    }

    /// Reads a connection. `marked` has what it has received if urgent data is among it.
    fn look(&self, fd: BorrowedFd, marked: Option<&Marked>) -> nix::Result<Connection> {
        let end = u32::from(own_end(self.state) == Some(OwnEnd::Sent));
        let outq_len = self.sent_bytes.saturating_sub(end);
        let has = |option| self.options & option != 0;
        let timestamp = has(TIMESTAMPS).then(|| repair::clock(fd)).transpose()?;
        let received = match marked {
            None => repair::peek(fd, self.received_bytes)?,
            Some(marked) => marked.received.clone(),
        };
        let (mss_clamp, inq_seq, outq_seq, window, sent) = repair::during(fd, || {
            // Only in repair mode does the kernel return the negotiated size.
            let mss_clamp = socket::option(fd, libc::SOL_TCP, libc::TCP_MAXSEG)?;
            let window = repair::window(fd)?;
            let received_end = repair::sequence(fd, Queue::Received)?;
            let sent_end = repair::sequence(fd, Queue::Sent)?;
            Ok((mss_clamp, received_end, sent_end, window, repair::peek(fd, outq_len)?))
        })?;
        // No window is agreed on yet, and CRIU would set what is there.
        let window = Some(window).filter(|_| self.state != state::SYN_SENT);
        let entry = proto::TcpStreamEntry {
            inq_len: u32::try_from(received.len()).map_err(|_| Errno::EFBIG)?,
            inq_seq,
            outq_len,
            outq_seq,
            opt_mask: self.options,
            snd_wscale: if has(SCALING) { self.scaling.0 } else { 0 },
            rcv_wscale: has(SCALING).then_some(self.scaling.1),
            mss_clamp,
            timestamp,
            unsq_len: Some(self.unsent_bytes.saturating_sub(end)),
            snd_wl1: window.map(|window| window.snd_wl1),
            snd_wnd: window.map(|window| window.snd_wnd),
            max_window: window.map(|window| window.max_window),
            rcv_wnd: window.map(|window| window.rcv_wnd),
            rcv_wup: window.map(|window| window.rcv_wup),
            cork: None,
            nodelay: None,
        };
        let urgent = marked.map(|marked| marked.urgent);
        Ok(Connection { state: self.state, entry, received, sent, urgent, urgent_sent: None })
    }
}

#[cfg(test)]
mod tests;
