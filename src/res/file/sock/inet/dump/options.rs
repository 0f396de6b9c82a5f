//! Addresses and options in the form of the images.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::BorrowedFd,
};

use nix::libc::{self, c_int};

use crate::{
    image::proto,
    res::file::sock::{
        inet::{IPV6_FREEBIND, IPV6_RECVPKTINFO, raw},
        opts,
    },
    sys::socket,
};

/// Returns an address in the form of the images: its bytes in network order, read as native words.
pub(in super::super) fn words(address: Option<SocketAddr>, family: c_int) -> Vec<u32> {
    let bytes = match address.map(|address| address.ip()) {
        Some(IpAddr::V4(v4)) => v4.octets().to_vec(),
        Some(IpAddr::V6(v6)) => v6.octets().to_vec(),
        None if family == libc::AF_INET => Ipv4Addr::UNSPECIFIED.octets().to_vec(),
        None => Ipv6Addr::UNSPECIFIED.octets().to_vec(),
    };
    bytes
        .chunks_exact(4)
        .map(|word| u32::from_ne_bytes(word.try_into().expect("chunks of 4")))
        .collect()
}

/// Returns the interface of a link-local address.
pub(super) fn scope(fd: BorrowedFd, own: Option<SocketAddr>) -> nix::Result<Option<Vec<u8>>> {
    match own {
        Some(SocketAddr::V6(v6)) if v6.port() != 0 && v6.scope_id() != 0 => {
            opts::bound_interface(fd)
        }
        _ => Ok(None),
    }
}

pub(super) fn v6only(fd: BorrowedFd, family: c_int) -> nix::Result<Option<bool>> {
    let ask = || socket::option::<c_int>(fd, libc::SOL_IPV6, libc::IPV6_V6ONLY);
    (family == libc::AF_INET6).then(ask).transpose().map(|found| found.map(|found| found != 0))
}

pub(super) fn ip_options(
    fd: BorrowedFd,
    family: c_int,
    (kind, protocol): (c_int, c_int),
) -> nix::Result<proto::IpOptsEntry> {
    let raw = (kind == libc::SOCK_RAW).then(|| raw::options(fd, (family, protocol))).transpose()?;
    let number = |level, name| -> nix::Result<Option<u32>> {
        Ok(Some(socket::option::<u32>(fd, level, name)?).filter(|value| *value != 0))
    };
    let set = |level, name| Ok(number(level, name)?.map(|_| true));
    if family == libc::AF_INET6 {
        return Ok(proto::IpOptsEntry {
            freebind: set(libc::SOL_IPV6, IPV6_FREEBIND)?,
            pktinfo: set(libc::SOL_IPV6, IPV6_RECVPKTINFO)?,
            raw,
            ..proto::IpOptsEntry::default()
        });
    }
    Ok(proto::IpOptsEntry {
        freebind: set(libc::SOL_IP, libc::IP_FREEBIND)?,
        pktinfo: set(libc::SOL_IP, libc::IP_PKTINFO)?,
        tos: number(libc::SOL_IP, libc::IP_TOS)?,
        ttl: number(libc::SOL_IP, libc::IP_TTL)?,
        raw,
    })
}

pub(super) fn tcp_options(fd: BorrowedFd, of: (c_int, c_int)) -> nix::Result<proto::TcpOptsEntry> {
    if of != (libc::SOCK_STREAM, libc::IPPROTO_TCP) {
        return Ok(proto::TcpOptsEntry::default());
    }
    let number = |name| -> nix::Result<Option<u32>> {
        Ok(Some(socket::option::<u32>(fd, libc::SOL_TCP, name)?).filter(|value| *value != 0))
    };
    Ok(proto::TcpOptsEntry {
        cork: number(libc::TCP_CORK)?.map(|_| true),
        nodelay: number(libc::TCP_NODELAY)?.map(|_| true),
        keepcnt: number(libc::TCP_KEEPCNT)?,
        keepidle: number(libc::TCP_KEEPIDLE)?,
        keepintvl: number(libc::TCP_KEEPINTVL)?,
    })
}
