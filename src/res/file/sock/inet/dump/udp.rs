//! UDP and UDP-Lite sockets.

use std::os::fd::{AsFd, BorrowedFd};

use nix::{
    libc::{self, c_int},
    poll::PollFlags,
};

use super::{Facts, HELP_KIND, InetCollector};
use crate::{
    res::file::{
        Description, Result, descriptor,
        sock::{inet::udp_queue, opts, state},
    },
    sys::socket,
};

/// `UDP_CORK` and `UDP_ENCAP`, `linux/udp.h`.
const UDP_CORK: c_int = 1;
const UDP_ENCAP: c_int = 100;

const HELP_CORK: &str = "have the program uncork it, which sends the datagram, then try again";

impl InetCollector {
    pub(super) fn udp(
        &mut self,
        file: &Description,
        (family, protocol): (c_int, c_int),
        connected: bool,
        what: &str,
    ) -> Result<Facts> {
        let fd = file.fd.as_fd();
        let uses = |option| socket::option::<c_int>(fd, libc::SOL_UDP, option) != Ok(0);
        if uses(UDP_ENCAP) {
            let what = format!("{what}, which encapsulates another protocol (UDP_ENCAP)");
            return Err(file.unsupported(what, HELP_KIND));
        }
        let found = self.listed(file, family, protocol)?;
        if found.is_some_and(|found| found.send_queue > 0) {
            if uses(UDP_CORK) {
                let what = format!("{what}, corked (UDP_CORK), with a datagram that it holds back");
                return Err(file.unsupported(what, HELP_CORK));
            }
            log::warn!(
                "{what} has sent datagrams that have not left, or holds one back (MSG_MORE): they may be lost"
            );
        }
        let seen = descriptor::events_among(fd, PollFlags::empty()).map_err(file.failed("poll"))?;
        if seen.contains(PollFlags::POLLERR) {
            log::warn!("{what} has an unread error (ICMP): it will be lost");
        }
        let mut datagrams = Vec::new();
        if found.is_some_and(|found| found.receive_queue > 0) {
            // Peeking at datagrams would consume the error.
            let kept = if seen.contains(PollFlags::POLLERR) || !can_be_sent_again(fd, protocol) {
                None
            } else {
                udp_queue::peek(fd).map_err(file.failed("peek at the queue of"))?
            };
            datagrams = kept.unwrap_or_else(|| {
                log::warn!("{what} has queued datagrams: they will be lost");
                Vec::new()
            });
        }
        let state = if connected { state::ESTABLISHED } else { state::CLOSE };
        let backlog = found.map_or(0, |found| found.send_queue);
        let shutdown = found.map_or(0, |found| found.shutdown);
        Ok(Facts { state, backlog, shutdown, datagrams, ..Facts::default() })
    }
}

/// Whether datagrams that [`udp_queue`] sends again would reach this UDP socket and no other.
fn can_be_sent_again(fd: BorrowedFd, protocol: c_int) -> bool {
    let uses = |level, option| socket::option::<c_int>(fd, level, option).is_ok_and(|v| v != 0);
    protocol == libc::IPPROTO_UDP
        && !uses(libc::SOL_SOCKET, libc::SO_REUSEADDR)
        && !uses(libc::SOL_SOCKET, libc::SO_REUSEPORT)
        && !uses(libc::SOL_UDP, libc::UDP_GRO)
        && opts::bound_interface(fd).is_ok_and(|interface| interface.is_none())
}
