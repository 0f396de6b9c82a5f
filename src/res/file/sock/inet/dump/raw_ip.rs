//! Raw IP and ICMP sockets.

use std::{
    collections::hash_map::Entry,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    libc::{self, c_int},
    poll::PollFlags,
    sys::socket::getpeername,
};

use super::{Facts, InetCollector, inode, process_in};
use crate::{
    proc,
    res::file::{
        Description, Result, descriptor,
        sock::{inet::address, state},
    },
};

impl InetCollector {
    pub(super) fn raw(&mut self, file: &Description, family: c_int, what: &str) -> Result<Facts> {
        let fd = file.fd.as_fd();
        let seen = descriptor::events_among(fd, PollFlags::POLLIN).map_err(file.failed("poll"))?;
        if seen.contains(PollFlags::POLLERR) {
            log::warn!("{what} has an unread error (ICMP): it will be lost");
        }
        if seen.contains(PollFlags::POLLIN) {
            log::warn!("{what} has packets in its queue: they will be lost");
        }
        let listed = match self.raw.entry((file.network_number(), family)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                place.insert(proc::raw_sockets(process_in(file), family == libc::AF_INET6)?)
            }
        };
        let found = listed.iter().find(|socket| socket.inode == inode(file));
        let peer = address(getpeername(fd.as_raw_fd())).or_else(|| {
            let found = found.filter(|socket| !socket.peer.is_unspecified())?;
            Some(SocketAddr::new(found.peer, found.peer_port))
        });
        let state = if peer.is_some() { state::ESTABLISHED } else { state::CLOSE };
        Ok(Facts { state, peer, ..Facts::default() })
    }
}
