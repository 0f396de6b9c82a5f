//! TCP sockets.

use std::{
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    libc::{self, c_int},
    poll::PollFlags,
    sys::socket::{getpeername, getsockname},
};

use super::{EndedConnection, Facts, Found, HOLD_BACK, InetCollector};
use crate::{
    res::file::{
        Description, Result,
        error::errno,
        sock::{
            SHUT_BOTH,
            attributes::{self, RECEIVED_MAX_BYTES},
            inet::{
                Connections, address,
                connection::{self, Connection},
                lock::{Ends, Lock},
                repair,
            },
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

const HELP_ESTABLISHED: &str =
    "use --tcp-established to keep it or --tcp-close to end it, or have the program close it";
const HELP_CONNECTING: &str =
    "wait until it is established or has failed, then try again; or use --tcp-close to end it";
const HELP_URGENT: &str = "have the program read it (MSG_OOB), then try again";
const HELP_ERROR: &str = "have the program read it (SO_ERROR, recv) or close the socket; reading it is the \
    only way to learn the error, and clears it";
const HELP_UNREAD: &str = "have the program read it or close the socket, then try again";
const HELP_ACCEPT: &str = "have the program accept its connections, then try again";

impl InetCollector {
    pub(super) fn tcp(&mut self, file: &Description, family: c_int, what: &str) -> Result<Facts> {
        let fd = file.fd.as_fd();
        let mut info = [0; TCP_INFO_BYTES];
        socket::option_bytes(fd, libc::SOL_TCP, libc::TCP_INFO, &mut info)
            .map_err(file.failed("ask for the state of"))?;
        let word = |at: usize| u32::from_ne_bytes(info[at..at + 4].try_into().expect("4 bytes"));
        let state = u32::from(info[TCP_INFO_STATE]);
        match state {
            state::LISTEN if word(TCP_INFO_PENDING) > 0 => {
                let what = format!(
                    "{what}, listening, with {} connections not accepted yet",
                    word(TCP_INFO_PENDING)
                );
                Err(file.unsupported(what, HELP_ACCEPT))
            }
            state::LISTEN => {
                Ok(Facts { state, backlog: word(TCP_INFO_BACKLOG), ..Facts::default() })
            }
            state::CLOSE => {
                let seen =
                    attributes::polled(fd, PollFlags::POLLIN).map_err(file.failed("poll"))?;
                if seen.contains(PollFlags::POLLERR) {
                    let what = format!("{what}, with an unread error");
                    return Err(file.unsupported(what, HELP_ERROR));
                }
                if TCP_INFO_PACKETS.iter().any(|at| word(*at) > 0) {
                    let ended = self.ended(file, family, what)?;
                    let shutdown = SHUT_BOTH;
                    return Ok(Facts { state, shutdown, ended: Some(ended), ..Facts::default() });
                }
                // For a socket that was never connected, the kernel shows only one of the two
                // directions.
                let shutdown = u8::from(seen.contains(PollFlags::POLLIN));
                Ok(Facts { state, shutdown, ..Facts::default() })
            }
            _ => {
                let local = address(getsockname(fd.as_raw_fd()));
                let peer = address(getpeername(fd.as_raw_fd()));
                let ends = local.zip(peer).filter(|_| connection::is_connection(state));
                match (self.options.connections, ends) {
                    (Connections::Keep, Some(ends)) => {
                        return self.connection(file, family, ends, what);
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

    /// Reads a connection. If the dump will kill the tree, drops the packets of the connection from
    /// now on.
    fn connection(
        &mut self,
        file: &Description,
        family: c_int,
        ends: Ends,
        what: &str,
    ) -> Result<Facts> {
        let fd = file.fd.as_fd();
        let urgent = attributes::polled(fd, PollFlags::POLLPRI).map_err(file.failed("poll"))?;
        if urgent.contains(PollFlags::POLLPRI) {
            let what = format!("{what}, with urgent data that its program has not read");
            return Err(file.unsupported(what, HELP_URGENT));
        }
        if self.options.hold_packets {
            let held = match &mut self.lock {
                Some(lock) => lock.hold(ends),
                none => Lock::begin().and_then(|lock| none.insert(lock).hold(ends)),
            };
            held.map_err(|error| file.failed(HOLD_BACK)(errno(&error)))?;
        }
        let shutdown =
            self.listed(file, family, libc::IPPROTO_TCP)?.map_or(0, |found| found.shutdown);
        let look = file.failed("look into the connection of (TCP_REPAIR)");
        let reuse = repair::reuse(fd).map_err(&look)?;
        let connection = Connection::read(fd).map_err(&look)?;
        let state = connection.state;
        self.connections.push(Found {
            fd: file.fd.try_clone().map_err(|error| file.failed("duplicate")(errno(&error)))?,
            pid: file.pid,
            number: file.number,
            inode: u32::try_from(file.stat.st_ino).expect("inodes of sockets have 32 bits"),
            ends,
            reuse,
            connection,
        });
        Ok(Facts { state, shutdown, ..Facts::default() })
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

    /// Reads what a TCP socket has received whose connection has ended, or is to end.
    fn to_be_ended(file: &Description, what: &str) -> Result<EndedConnection> {
        let fd = file.fd.as_fd();
        let failed = file.failed("peek at the queue of");
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
        Ok(EndedConnection { bound: false, received })
    }
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
