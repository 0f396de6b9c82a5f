//! Dumps sockets of the test process, restores them next to the originals, and compares both.

use std::{
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{libc, sys::socket::sockopt};

use crate::{
    image::proto,
    res::file::{
        DumpOptions, FileError, Result,
        testing::{Dumped, Tree},
    },
    sys::socket,
};

/// Dumps these descriptors, which get the numbers 0, 1, ..., and closes them.
pub(super) fn dump<T: Into<OwnedFd>>(fds: Vec<T>, options: &DumpOptions) -> Result<Dumped> {
    let mut tree = Tree::with_options(options.clone());
    for (id, fd) in (0..).zip(fds) {
        tree.add(id, fd.into());
    }
    tree.try_dump()
}

/// Returns the error message of a dump that must fail.
pub(super) fn refused<T: Into<OwnedFd>>(fds: Vec<T>, options: &DumpOptions) -> String {
    match dump(fds, options) {
        Ok(_) => panic!("it was dumped"),
        Err(error @ FileError::Unsupported { .. }) => error.to_string(),
        Err(error) => panic!("{error:?}"),
    }
}

/// Returns the image entry of a UNIX socket.
pub(super) fn unix(dumped: &Dumped, id: u32) -> &proto::UnixSkEntry {
    dumped.entry(id).usk.as_ref().unwrap()
}

/// Returns the image entry of an internet socket.
pub(super) fn inet(dumped: &Dumped, id: u32) -> &proto::InetSkEntry {
    dumped.entry(id).isk.as_ref().unwrap()
}

pub(super) fn option<T: nix::sys::socket::GetSockOpt>(fd: &impl AsFd, option: T) -> T::Val {
    nix::sys::socket::getsockopt(fd, option).unwrap()
}

/// Returns the messages in the queue of a socket, each at most `len` bytes long.
pub(super) fn receive_all(fd: BorrowedFd, len: usize) -> Vec<Vec<u8>> {
    use nix::sys::socket::{MsgFlags, recv};
    let mut messages = Vec::new();
    let mut buffer = vec![0; len];
    while let Ok(received) = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
        if received == 0 {
            break;
        }
        messages.push(buffer[..received].to_owned());
    }
    messages
}

/// Sets options to values other than the defaults.
pub(super) fn set_odd_options(fd: &impl AsFd) {
    use nix::sys::{socket::setsockopt, time::TimeVal};
    setsockopt(fd, sockopt::SndBuf, &40_000).unwrap();
    setsockopt(fd, sockopt::RcvBuf, &50_000).unwrap();
    setsockopt(fd, sockopt::SendTimeout, &TimeVal::new(3, 500_000)).unwrap();
    setsockopt(fd, sockopt::ReceiveTimeout, &TimeVal::new(0, 250_000)).unwrap();
    setsockopt(fd, sockopt::KeepAlive, &true).unwrap();
    setsockopt(fd, sockopt::Broadcast, &true).unwrap();
    socket::set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_PRIORITY, &3).unwrap();
    setsockopt(fd, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 5 }).unwrap();
}

/// Returns the values of these options.
pub(super) fn odd_options(fd: &impl AsFd) -> HashMap<&'static str, String> {
    HashMap::from([
        ("SO_SNDBUF", format!("{:?}", option(fd, sockopt::SndBuf))),
        ("SO_RCVBUF", format!("{:?}", option(fd, sockopt::RcvBuf))),
        ("SO_SNDTIMEO", format!("{:?}", option(fd, sockopt::SendTimeout))),
        ("SO_RCVTIMEO", format!("{:?}", option(fd, sockopt::ReceiveTimeout))),
        ("SO_KEEPALIVE", format!("{:?}", option(fd, sockopt::KeepAlive))),
        ("SO_BROADCAST", format!("{:?}", option(fd, sockopt::Broadcast))),
        (
            "SO_PRIORITY",
            format!("{:?}", {
                socket::option::<u32>(fd.as_fd(), libc::SOL_SOCKET, libc::SO_PRIORITY)
            }),
        ),
        ("SO_LINGER", format!("{:?}", option(fd, sockopt::Linger))),
    ])
}
