//! Raw IP sockets and ICMP ("ping") sockets.
//!
//! They have no connections, but may have an address of their own, and one that they are connected
//! to. The port of a raw socket is its protocol; that of a ping socket, the identifier of its
//! requests. `getpeername(2)` does not show an address without a port, so the dump reads
//! `/proc/PID/net/raw` and the like. Packets in a queue are lost: sent again, they would come to
//! every raw socket of the machine.

use std::os::fd::BorrowedFd;

use nix::{
    errno::Errno,
    libc::{self, c_int},
};

use crate::{image::proto::IpOptsRawEntry, res::file::sock::opts, sys::socket};

/// `linux/in6.h`, since Linux 4.14.
const IPV6_HDRINCL: c_int = 36;
/// `linux/icmp.h` and `linux/icmpv6.h`.
const SOL_RAW: c_int = 255;
const ICMP_FILTER: c_int = 1;
const SOL_ICMPV6: c_int = 58;
const ICMPV6_FILTER: c_int = 1;

/// The words of `struct icmp_filter` and `struct icmp6_filter`.
const FILTER_WORDS: usize = 1;
const FILTER_WORDS_V6: usize = 8;

/// Whether a socket of this type and protocol is a raw or a ping socket.
pub(super) fn is_raw((kind, protocol): (c_int, c_int)) -> bool {
    let is_icmp = matches!(protocol, libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6);
    kind == libc::SOCK_RAW || kind == libc::SOCK_DGRAM && is_icmp
}

/// Returns the option with which a program brings its own IP headers.
fn header_option(family: c_int) -> (c_int, c_int) {
    if family == libc::AF_INET6 {
        (libc::SOL_IPV6, IPV6_HDRINCL)
    } else {
        (libc::SOL_IP, libc::IP_HDRINCL)
    }
}

/// Returns the filter of ICMP types that a socket has, with its number of words.
fn filter_option((family, protocol): (c_int, c_int)) -> Option<(c_int, c_int, usize)> {
    match (family, protocol) {
        (libc::AF_INET, libc::IPPROTO_ICMP) => Some((SOL_RAW, ICMP_FILTER, FILTER_WORDS)),
        (libc::AF_INET6, libc::IPPROTO_ICMPV6) => {
            Some((SOL_ICMPV6, ICMPV6_FILTER, FILTER_WORDS_V6))
        }
        _ => None,
    }
}

/// Reads the options that only raw sockets have.
pub(super) fn options(
    fd: BorrowedFd,
    (family, protocol): (c_int, c_int),
) -> nix::Result<IpOptsRawEntry> {
    let (level, name) = header_option(family);
    let has_headers = socket::option::<c_int>(fd, level, name)? != 0;
    let mut filter = Vec::new();
    if let Some((level, name, words)) = filter_option((family, protocol)) {
        let mut bytes = vec![0; words * size_of::<u32>()];
        if socket::option_bytes(fd, level, name, &mut bytes)? != bytes.len() {
            return Err(Errno::EINVAL);
        }
        let words = bytes.chunks_exact(size_of::<u32>());
        let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().expect("chunks of 4"));
        filter = words.map(word).collect();
    }
    let is_v4 = family == libc::AF_INET;
    let not_joined = is_v4 && socket::option::<c_int>(fd, libc::SOL_IP, libc::IP_NODEFRAG)? != 0;
    Ok(IpOptsRawEntry {
        // Sockets of this protocol have it from the beginning.
        hdrincl: (has_headers || protocol == libc::IPPROTO_RAW).then_some(has_headers),
        nodefrag: not_joined.then_some(true),
        checksum: None,
        icmpv_filter: filter,
    })
}

/// Sets the options that only raw sockets have.
///
/// # Errors
/// `EINVAL` for a filter that no socket of this protocol has; the errors of the kernel.
pub(super) fn restore_options(
    fd: BorrowedFd,
    (family, protocol): (c_int, c_int),
    options: &IpOptsRawEntry,
) -> nix::Result<()> {
    if !options.icmpv_filter.is_empty() {
        let (level, name, words) = filter_option((family, protocol)).ok_or(Errno::EINVAL)?;
        if options.icmpv_filter.len() != words {
            return Err(Errno::EINVAL);
        }
        socket::set_option(fd, level, name, options.icmpv_filter.as_slice())?;
    }
    if let Some(nodefrag) = options.nodefrag {
        opts::ensure(fd, libc::SOL_IP, libc::IP_NODEFRAG, nodefrag.into())?;
    }
    if let Some(has_headers) = options.hdrincl {
        let (level, name) = header_option(family);
        opts::ensure(fd, level, name, has_headers.into())?;
    }
    Ok(())
}
