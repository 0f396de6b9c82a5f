//! Memberships in multicast groups: `sk_state_entry.groups`, an extension.
//!
//! `/proc/PID/net/igmp` shows which groups an interface receives, but not for which socket.
//! `MCAST_MSFILTER` shows the sources that a socket has chosen in a group, and fails if the socket is not
//! in the group. So the dump asks each socket for each group of each interface.
//!
//! A program leaves a group by the number of the interface or by a local address, whichever it has
//! joined by. The kernel does not show the address. The restore gives the first address of the
//! interface, so that either way works.

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::BorrowedFd,
};

use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    libc::{self, c_int},
    net::if_::if_nametoindex,
};
use zerocopy::{FromZeros, Immutable, IntoBytes};

use crate::{image::proto::SkGroupEntry, proc::MulticastGroup, sys::socket};

/// `linux/in.h`.
const MCAST_JOIN_GROUP: c_int = 42;
const MCAST_MSFILTER: c_int = 48;
const MCAST_INCLUDE: u32 = 1;
const MCAST_EXCLUDE: u32 = 0;

/// The most sources that a dump asks for; more than `net.ipv4.igmp_max_msf` and
/// `net.ipv6.mld_max_msf` allow by default.
const SOURCES_MAX: usize = 1024;

/// `struct sockaddr_storage`: a family, and an address at a place that depends on it.
#[derive(Clone, Copy, FromZeros, IntoBytes, Immutable)]
#[repr(C, align(8))]
struct Storage {
    family: u16,
    rest: [u8; 126],
}

/// `struct group_req`, `linux/in.h`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Join {
    interface: u32,
    pad: u32,
    group: Storage,
}

/// The head of `struct group_filter`, `linux/in.h`; the sources follow.
#[derive(Clone, Copy, FromZeros, IntoBytes, Immutable)]
#[repr(C)]
struct Filter {
    interface: u32,
    pad: u32,
    group: Storage,
    mode: u32,
    sources: u32,
}

const _: () = assert!(size_of::<Filter>() == 144 && size_of::<Storage>() == 128);

impl Storage {
    fn new(address: IpAddr) -> Self {
        let mut storage = Self { family: 0, rest: [0; 126] };
        let (family, at, bytes) = match address {
            // After a port, and a flow label.
            IpAddr::V4(v4) => (libc::AF_INET, 2, v4.octets().to_vec()),
            IpAddr::V6(v6) => (libc::AF_INET6, 6, v6.octets().to_vec()),
        };
        storage.family = u16::try_from(family).expect("families are small");
        storage.rest[at..at + bytes.len()].copy_from_slice(&bytes);
        storage
    }
}

fn level(address: IpAddr) -> c_int {
    if address.is_ipv4() { libc::SOL_IP } else { libc::SOL_IPV6 }
}

/// Returns which of these groups a socket is in.
///
/// # Errors
/// The errors of the kernel, except those for a group that the socket is not in.
pub(super) fn joined(
    fd: BorrowedFd,
    family: c_int,
    groups: &[MulticastGroup],
) -> nix::Result<Vec<SkGroupEntry>> {
    let mut found = Vec::new();
    // A socket of IPv6 may be in groups of IPv4, too.
    for group in groups.iter().filter(|group| group.address.is_ipv4() || family == libc::AF_INET6) {
        found.extend(membership(fd, group)?);
    }
    Ok(found)
}

fn membership(fd: BorrowedFd, group: &MulticastGroup) -> nix::Result<Option<SkGroupEntry>> {
    let size = size_of::<Filter>();
    let mut bytes = vec![0; size + SOURCES_MAX * size_of::<Storage>()];
    let filter = Filter {
        interface: group.index,
        pad: 0,
        group: Storage::new(group.address),
        mode: 0,
        sources: u32::try_from(SOURCES_MAX).expect("it is small"),
    };
    bytes[..size].copy_from_slice(filter.as_bytes());
    match socket::option_bytes(fd, level(group.address), MCAST_MSFILTER, &mut bytes) {
        Err(Errno::EADDRNOTAVAIL | Errno::EINVAL | Errno::ENOPROTOOPT) => return Ok(None),
        result => result?,
    };
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let (mode, count) = (word(size - 8), word(size - 4) as usize);
    let sources = bytes[size..].chunks_exact(size_of::<Storage>()).take(count);
    let source = |storage: &[u8]| match group.address {
        IpAddr::V4(_) => storage[4..8].to_vec(),
        IpAddr::V6(_) => storage[8..24].to_vec(),
    };
    Ok(Some(SkGroupEntry {
        interface: group.interface.clone(),
        address: octets(group.address),
        include: mode == MCAST_INCLUDE,
        sources: sources.map(source).collect(),
    }))
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn parse(bytes: &[u8]) -> nix::Result<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).map_err(|_| Errno::EINVAL)
}

/// Lets a socket join groups.
///
/// # Errors
/// `ENODEV` if there is no such interface; the errors of the kernel.
pub(super) fn restore(fd: BorrowedFd, groups: &[SkGroupEntry]) -> nix::Result<()> {
    for entry in groups {
        let address = parse(&entry.address)?;
        let interface = if_nametoindex(entry.interface.as_slice())?;
        match address {
            IpAddr::V4(v4) => {
                // `struct ip_mreqn`.
                let local = first_address(&entry.interface).unwrap_or(Ipv4Addr::UNSPECIFIED);
                let index = interface.to_ne_bytes();
                let request = [v4.octets(), local.octets(), index].concat();
                socket::set_option(fd, libc::SOL_IP, libc::IP_ADD_MEMBERSHIP, &request[..])?;
            }
            IpAddr::V6(_) => {
                let join = Join { interface, pad: 0, group: Storage::new(address) };
                socket::set_option(fd, libc::SOL_IPV6, MCAST_JOIN_GROUP, &join)?;
            }
        }
        if !entry.include && entry.sources.is_empty() {
            continue;
        }
        let mut bytes = Filter {
            interface,
            pad: 0,
            group: Storage::new(address),
            mode: if entry.include { MCAST_INCLUDE } else { MCAST_EXCLUDE },
            sources: u32::try_from(entry.sources.len()).map_err(|_| Errno::EINVAL)?,
        }
        .as_bytes()
        .to_vec();
        for source in &entry.sources {
            bytes.extend_from_slice(Storage::new(parse(source)?).as_bytes());
        }
        socket::set_option(fd, level(address), MCAST_MSFILTER, &bytes[..])?;
    }
    Ok(())
}

/// Returns the first IPv4 address of an interface.
fn first_address(interface: &[u8]) -> Option<Ipv4Addr> {
    let of_interface =
        |one: &nix::ifaddrs::InterfaceAddress| one.interface_name.as_bytes() == interface;
    let address = |one: nix::ifaddrs::InterfaceAddress| Some(one.address?.as_sockaddr_in()?.ip());
    getifaddrs().ok()?.filter(of_interface).find_map(address)
}
