//! TCP sockets.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    rc::Rc,
};

use nix::{
    errno::Errno,
    libc::{self, c_int},
    poll::PollFlags,
    sys::socket::{getpeername, getsockname},
};

use super::{EndedConnection, Facts, Found, InetCollector, inode};
use crate::{
    image::proto::SkMd5KeyEntry,
    res::file::{
        Description, Result, descriptor,
        error::errno,
        sock::{
            SHUT_BOTH,
            attributes::RECEIVED_MAX_BYTES,
            inet::{Connections, address, connection, ended, lock::Ends, md5, repair, urgent},
            queue, state,
        },
    },
    sys::{fds, socket},
};

/// Offsets in `struct tcp_info` (`linux/tcp.h`). Listening sockets use the fields PENDING and BACKLOG
/// for these values, connections for others.
const TCP_INFO_STATE: usize = 0;
const TCP_INFO_PENDING: usize = 24;
const TCP_INFO_BACKLOG: usize = 28;
/// Packets sent and received (`tcpi_segs_out`, `tcpi_segs_in`, since Linux 4.2), including those of
/// a connection that has ended.
const TCP_INFO_PACKETS: [usize; 2] = [136, 140];
const TCP_INFO_BYTES: usize = 144;

/// `asm-generic/socket.h`.
const SO_PEERNAME: c_int = 28;

const HELP_ESTABLISHED: &str =
    "use --tcp-established to keep it or --tcp-close to end it, or have the program close it";
const HELP_CONNECTING: &str =
    "wait until it is established or has failed, then try again; or use --tcp-close to end it";
const HELP_URGENT: &str = "have the program read it (MSG_OOB), then try again";
const HELP_ERROR: &str =
    "have the program read it (SO_ERROR, recv) or close the socket, then try again";
const HELP_UNKNOWN_ERROR: &str = "have the program read it (SO_ERROR, recv), or run rcriu with CAP_BPF and CAP_PERFMON \
    on a kernel with /sys/kernel/btf/vmlinux";
const HELP_UNREAD: &str = "have the program read it or close the socket, then try again";
const HELP_ACCEPT: &str = "use --skip-in-flight to leave them out, which resets them if the tree is killed, or have the \
    program accept them, then try again";
const HELP_LAYER: &str = "have the program close the connection, or use --tcp-close to end it";

/// The most peers that a message names.
const PEERS_SHOWN: usize = 3;

/// `TCP_AO_INFO`, `linux/tcp.h`, since Linux 6.7, and the size of `struct tcp_ao_info_opt`.
const TCP_AO_INFO: c_int = 40;
const TCP_AO_INFO_BYTES: usize = 48;

/// `TCP_ULP_NAME_MAX`, `net/tcp.h`.
const ULP_NAME_BYTES: usize = 16;

impl InetCollector {
    pub(super) fn tcp(&mut self, file: &Description, family: c_int, what: &str) -> Result<Facts> {
        let fd = file.fd.as_fd();
        let mut info = [0; TCP_INFO_BYTES];
        socket::option_bytes(fd, libc::SOL_TCP, libc::TCP_INFO, &mut info)
            .map_err(file.failed("ask for the state of"))?;
        let word = |at: usize| u32::from_ne_bytes(info[at..at + 4].try_into().expect("4 bytes"));
        let state = u32::from(info[TCP_INFO_STATE]);
        match state {
            state::LISTEN => {
                let pending = word(TCP_INFO_PENDING);
                if pending > 0 {
                    let peers = self.unaccepted(file, family, pending)?;
                    let connections = if pending == 1 { "connection" } else { "connections" };
                    let waiting = format!("{pending} {connections} not accepted yet{peers}");
                    if !self.options.skip_in_flight {
                        let what = format!("{what}, listening, with {waiting}");
                        return Err(file.unsupported(what, HELP_ACCEPT));
                    }
                    log::warn!("{what} listens; the dump leaves out {waiting} (--skip-in-flight)");
                }
                let md5_keys = self.md5_keys(file, family)?;
                let backlog = word(TCP_INFO_BACKLOG);
                Ok(Facts { state, backlog, md5_keys, ..Facts::default() })
            }
            state::CLOSE => {
                let seen =
                    descriptor::events_among(fd, PollFlags::POLLIN).map_err(file.failed("poll"))?;
                let error = if seen.contains(PollFlags::POLLERR) {
                    Some(self.pending_error(file, what)?)
                } else {
                    None
                };
                if TCP_INFO_PACKETS.iter().any(|at| word(*at) > 0) {
                    let ended = self.ended(file, family, what)?;
                    let ended = Some(EndedConnection { error, ..ended });
                    return Ok(Facts { state, shutdown: SHUT_BOTH, ended, ..Facts::default() });
                }
                // For a socket that was never connected, the kernel shows only one of the two
                // directions.
                let shutdown = u8::from(seen.contains(PollFlags::POLLIN));
                let md5_keys = self.md5_keys(file, family)?;
                Ok(Facts { state, shutdown, md5_keys, ..Facts::default() })
            }
            _ => {
                let local = address(getsockname(fd.as_raw_fd()));
                let peer = address(getpeername(fd.as_raw_fd()));
                let peer = peer.or_else(|| connecting_to(fd, family));
                let ends = local.zip(peer).filter(|_| connection::is_connection(state));
                match (self.options.connections, ends) {
                    (Connections::Keep, Some(ends)) => {
                        return self.connection(file, (family, state), ends, what);
                    }
                    (Connections::Close, _) => {
                        let ended = Self::to_be_ended(file, what)?;
                        let (state, shutdown) = (state::CLOSE, SHUT_BOTH);
                        return Ok(Facts {
                            state,
                            shutdown,
                            ended: Some(ended),
                            ..Facts::default()
                        });
                    }
                    _ => {}
                }
                let show = |address: Option<SocketAddr>| {
                    address.map_or_else(|| "?".to_owned(), |address| address.to_string())
                };
                let what = format!(
                    "the TCP connection {} -> {} in state {}",
                    show(local),
                    show(peer),
                    state_name(state)
                );
                let help = if ends.is_some() { HELP_ESTABLISHED } else { HELP_CONNECTING };
                Err(file.unsupported(what, help))
            }
        }
    }

    /// Returns the pending error of a socket whose connection has ended, as its number.
    fn pending_error(&mut self, file: &Description, what: &str) -> Result<u32> {
        match self.kernel.read(|kernel| ended::read_error(kernel, file.fd.as_fd())) {
            Ok(found) if ended::can_be_caused(found) => Ok(found.0),
            Ok((0, _)) => {
                let what = format!("{what}, with messages in its error queue (MSG_ERRQUEUE)");
                Err(file.unsupported(what, HELP_ERROR))
            }
            Ok((number, _)) => {
                let error = Errno::from_raw(number.cast_signed());
                let what =
                    format!("{what}, with an unread error, {error}, that no restore can cause");
                Err(file.unsupported(what, HELP_ERROR))
            }
            Err(why) => {
                let what = format!("{what}, with an unread error ({why})");
                Err(file.unsupported(what, HELP_UNKNOWN_ERROR))
            }
        }
    }

    /// Notes a connection, to be read after the packets of all connections are held back.
    fn connection(
        &mut self,
        file: &Description,
        (family, state): (c_int, u32),
        ends: Ends,
        what: &str,
    ) -> Result<Facts> {
        let fd = file.fd.as_fd();
        refuse_layers(file, what)?;
        let md5_keys = self.md5_keys(file, family)?;
        let shutdown =
            self.listed(file, family, libc::IPPROTO_TCP)?.map_or(0, |found| found.shutdown);
        let reuse = repair::reuse(fd).map_err(file.failed("ask for SO_REUSEADDR of"))?;
        self.connections.push(Found {
            id: file.id,
            fd: file.fd.try_clone().map_err(|error| file.failed("duplicate")(errno(&error)))?,
            family,
            pid: file.pid,
            number: file.number,
            inode: inode(file),
            network: Rc::clone(file.network.as_ref().expect("sockets have one")),
            ends,
            reuse,
            connection: None,
        });
        Ok(Facts { state, shutdown, md5_keys, peer: Some(ends.1), ..Facts::default() })
    }

    fn md5_keys(&mut self, file: &Description, family: c_int) -> Result<Vec<SkMd5KeyEntry>> {
        let found = self.listed(file, family, libc::IPPROTO_TCP)?;
        Ok(found.map_or_else(Vec::new, |found| md5::decode(&found.md5_keys)))
    }

    /// Returns the peers of the connections that a socket has not accepted, for a message; empty if
    /// other sockets listen on the same port.
    fn unaccepted(&mut self, file: &Description, family: c_int, count: u32) -> Result<String> {
        let own = address(getsockname(file.fd.as_raw_fd()));
        let Some(own) = own else { return Ok(String::new()) };
        let all = self.all(file, family, libc::IPPROTO_TCP)?.unaccepted.iter();
        let is_own = |local: &SocketAddr| {
            own.port() == local.port() && (own.ip().is_unspecified() || own.ip() == local.ip())
        };
        let peers: Vec<_> = all.filter(|(local, _)| is_own(local)).map(|(_, peer)| *peer).collect();
        if peers.len() != count as usize {
            return Ok(String::new());
        }
        let shown: Vec<_> = peers.iter().take(PEERS_SHOWN).map(ToString::to_string).collect();
        let more = if peers.len() > PEERS_SHOWN { ", ..." } else { "" };
        Ok(format!(" (from {}{more})", shown.join(", ")))
    }

    /// Reads the state of a TCP socket whose connection has ended.
    fn ended(&mut self, file: &Description, family: c_int, what: &str) -> Result<EndedConnection> {
        let ended = Self::to_be_ended(file, what)?;
        // The kernel lists no socket without a port; before Linux 6.8, none that is closed.
        let bound = self.listed(file, family, libc::IPPROTO_TCP)?.is_some();
        if !bound {
            log::warn!(
                "{what}: its connection has ended; after a restore, getsockname(2) shows another \
                 name"
            );
        }
        Ok(EndedConnection { bound, ..ended })
    }

    /// Reads the received data of a TCP socket whose connection has ended, or is to end.
    fn to_be_ended(file: &Description, what: &str) -> Result<EndedConnection> {
        let fd = file.fd.as_fd();
        let failed = file.failed("peek at the queue of");
        if urgent::waits(fd).map_err(file.failed("poll"))? {
            let what = format!("{what}, with urgent data, and its connection has ended");
            return Err(file.unsupported(what, HELP_URGENT));
        }
        let bytes = fds::readable_bytes(fd).map_err(&failed)?;
        if bytes > RECEIVED_MAX_BYTES {
            let what = format!(
                "{what}, whose connection has ended with {bytes} unread bytes, more than the limit \
                 of {RECEIVED_MAX_BYTES}"
            );
            return Err(file.unsupported(what, HELP_UNREAD));
        }
        let received = if bytes == 0 {
            Vec::new()
        } else {
            queue::peek_received(fd, bytes).map_err(&failed)?
        };
        Ok(EndedConnection { received, ..EndedConnection::default() })
    }
}

/// Refuses a connection whose data a protocol in the kernel changes, or whose packets are signed
/// with TCP-AO.
fn refuse_layers(file: &Description, what: &str) -> Result<()> {
    let fd = file.fd.as_fd();
    let mut name = [0; ULP_NAME_BYTES];
    let len = socket::option_bytes(fd, libc::SOL_TCP, libc::TCP_ULP, &mut name).unwrap_or(0);
    let name = name[..len].split(|byte| *byte == 0).next().unwrap_or_default();
    if !name.is_empty() {
        let name = String::from_utf8_lossy(name);
        let what = format!("{what}, with the protocol {name} in the kernel (TCP_ULP)");
        return Err(file.unsupported(what, HELP_LAYER));
    }
    let mut info = [0; TCP_AO_INFO_BYTES];
    if socket::option_bytes(fd, libc::SOL_TCP, TCP_AO_INFO, &mut info).is_ok() {
        let what = format!("{what}, with packets that are signed (TCP-AO)");
        return Err(file.unsupported(what, HELP_LAYER));
    }
    Ok(())
}

/// Returns the address that a socket in the state `SYN_SENT` connects to. `getpeername(2)` does not
/// show it yet.
fn connecting_to(fd: BorrowedFd, family: c_int) -> Option<SocketAddr> {
    let is_v4 = family == libc::AF_INET;
    // The kernel fails if the buffer is longer than the address.
    let len = if is_v4 { size_of::<libc::sockaddr_in>() } else { size_of::<libc::sockaddr_in6>() };
    let mut bytes = vec![0; len];
    socket::option_bytes(fd, libc::SOL_SOCKET, SO_PEERNAME, &mut bytes).ok()?;
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    let ip = if is_v4 {
        IpAddr::from(<[u8; 4]>::try_from(bytes.get(4..8)?).ok()?)
    } else {
        IpAddr::from(<[u8; 16]>::try_from(bytes.get(8..24)?).ok()?)
    };
    Some(SocketAddr::new(ip, port))
}

fn state_name(state: u32) -> String {
    // `net/tcp_states.h`, starting at 1.
    const NAMES: [&str; 12] = [
        "ESTABLISHED",
        "SYN_SENT",
        "SYN_RECV",
        "FIN_WAIT1",
        "FIN_WAIT2",
        "TIME_WAIT",
        "CLOSE",
        "CLOSE_WAIT",
        "LAST_ACK",
        "LISTEN",
        "CLOSING",
        "NEW_SYN_RECV",
    ];
    let name = state.checked_sub(1).and_then(|at| NAMES.get(at as usize));
    name.map_or_else(|| format!("{state} (unknown)"), |name| (*name).to_owned())
}
