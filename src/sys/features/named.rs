//! Probes of features that nothing in this program asks about, but its users do, by the names that CRIU
//! gives them (`check --feature`).
#![expect(unsafe_code, reason = "system calls that may not be there")]

use std::{
    fs,
    os::fd::{AsRawFd, OwnedFd},
    ptr,
};

use nix::{errno::Errno, libc};

use super::{NLMSG_HEADER_BYTES, descriptor, effective_capabilities, memory::Page};
use crate::{arch::native, units::PAGE_LEN};

// linux/capability.h
const CAP_NET_ADMIN: u32 = 12;
const CAP_NET_RAW: u32 = 13;

/// Reading the state of a timerfd in `fdinfo` (Linux 3.17).
pub fn timerfd() -> bool {
    // SAFETY: plain integers.
    let made = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) };
    descriptor(made.into()).is_some_and(|fd| fdinfo(&fd).contains("\nticks:"))
}

/// Reading locks in `fdinfo` (Linux 4.1).
pub fn fdinfo_lock() -> bool {
    let Some(fd) = memfd(0) else { return false };
    // SAFETY: plain integers; the file is ours alone.
    let locked = unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX) };
    locked == 0 && fdinfo(&fd).contains("\nlock:")
}

/// Shared memory of huge pages without a file system (Linux 4.14).
pub fn memfd_hugetlb() -> bool {
    memfd(libc::MFD_HUGETLB).is_some()
}

fn memfd(flags: libc::c_uint) -> Option<OwnedFd> {
    // SAFETY: the name ends in a zero byte.
    let made = unsafe { libc::memfd_create(c"rcriu-probe".as_ptr(), libc::MFD_CLOEXEC | flags) };
    descriptor(made.into())
}

fn fdinfo(fd: &OwnedFd) -> String {
    fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap_or_default()
}

/// Moving the ring of an AIO context (Linux 3.19).
pub fn aio_remap() -> bool {
    const REQUESTS: libc::c_long = 1;
    let mut context = 0_usize;
    // SAFETY: the kernel writes an address to `context`, which outlives the call.
    if unsafe { libc::syscall(libc::SYS_io_setup, REQUESTS, &raw mut context) } != 0 {
        return false;
    }
    // A ring of one request takes one page. Where it goes is a page that was just unmapped there.
    // SAFETY: a new mapping disturbs no other; only it is replaced.
    let moved = unsafe {
        let room = libc::mmap(
            ptr::null_mut(),
            PAGE_LEN,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        let from = ptr::with_exposed_provenance_mut(context);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        libc::mremap(from, PAGE_LEN, PAGE_LEN, flags, room)
    };
    let has_moved = moved != libc::MAP_FAILED;
    let now = if has_moved { moved.addr() } else { context };
    // SAFETY: the context is ours, and has no requests.
    let destroyed = unsafe { libc::syscall(libc::SYS_io_destroy, now) } == 0;
    has_moved && destroyed
}

/// Mapping the vDSO where a program wants it (Linux 4.9).
pub fn can_map_vdso() -> bool {
    let Some((call, argument)) = native::MAP_VDSO else { return false };
    // SAFETY: a process that has a vDSO gets no other one: the call only fails.
    let result = unsafe { libc::syscall(call, argument, 0_usize) };
    Errno::result(result) == Err(Errno::EEXIST)
}

/// Finding the network namespace of a socket (Linux 4.9).
pub fn socket_namespace() -> bool {
    /// `SIOCGSKNS`, `linux/sockios.h`
    const SIOCGSKNS: libc::c_ulong = 0x894c;
    unix_socket().is_some_and(|socket| {
        // SAFETY: the ioctl makes a descriptor and has no argument.
        let made = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) };
        descriptor(made.into()).is_some()
    })
}

/// Opening the file of a UNIX socket (Linux 4.15).
pub fn unix_file() -> bool {
    /// `SIOCUNIXFILE`, `linux/un.h`
    const SIOCUNIXFILE: libc::c_ulong = 0x89e0;
    unix_socket().is_some_and(|socket| {
        // SAFETY: the ioctl has no argument; this socket has no name, so it fails.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE) };
        Errno::result(result) == Err(Errno::ENOENT)
    })
}

fn unix_socket() -> Option<OwnedFd> {
    // SAFETY: plain integers.
    let made = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    descriptor(made.into())
}

/// Whether a socket of a family has an option.
fn has_option(family: libc::c_int, level: libc::c_int, option: libc::c_int) -> bool {
    // SAFETY: plain integers.
    let made = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    let Some(socket) = descriptor(made.into()) else { return false };
    let mut value: libc::c_int = 0;
    let mut len: libc::socklen_t = 4;
    // SAFETY: the kernel writes at most `len` bytes to `value`; both outlive the call.
    let got = unsafe {
        let value = (&raw mut value).cast();
        libc::getsockopt(socket.as_raw_fd(), level, option, value, &raw mut len)
    };
    got == 0
}

/// Seeing whether a program has set the size of a socket's buffers (Linux 5.15).
pub fn buffer_lock() -> bool {
    /// `SO_BUF_LOCK`, `asm-generic/socket.h`
    const SO_BUF_LOCK: libc::c_int = 72;
    has_option(libc::AF_INET, libc::SOL_SOCKET, SO_BUF_LOCK)
}

/// Binding to addresses of IPv6 that are not there (Linux 4.19).
pub fn ipv6_freebind() -> bool {
    /// `IPV6_FREEBIND`, `linux/in6.h`
    const IPV6_FREEBIND: libc::c_int = 78;
    has_option(libc::AF_INET6, libc::SOL_IPV6, IPV6_FREEBIND)
}

/// Listing raw sockets (Linux 4.10).
pub fn raw_sockets() -> bool {
    /// `IPPROTO_RAW`, `linux/in.h`
    const IPPROTO_RAW: u8 = 255;
    super::sock_diag_inet(IPPROTO_RAW)
}

/// Keeping TCP connections that one side has closed.
pub fn half_closed() -> bool {
    let capabilities = effective_capabilities();
    [CAP_NET_ADMIN, CAP_NET_RAW].iter().all(|bit| capabilities & (1 << bit) != 0)
}

/// Asking for the number by which a network namespace knows another (Linux 4.0).
pub fn namespace_numbers() -> bool {
    /// `RTM_GETNSID`, `linux/rtnetlink.h`
    const RTM_GETNSID: u16 = 90;
    /// `NETNSA_FD`, `linux/net_namespace.h`, with the length of the attribute
    const NETNSA_FD: [u8; 4] = [8, 0, 3, 0];
    let Ok(own) = fs::File::open("/proc/self/ns/net") else { return false };
    // struct rtgenmsg, padded
    let mut request = vec![0; 4];
    request.extend(NETNSA_FD);
    request.extend(own.as_raw_fd().to_ne_bytes());
    answer(libc::NETLINK_ROUTE, RTM_GETNSID, 0, &request).is_some_and(|errno| errno == 0)
}

/// Asking for the devices of another network namespace (Linux 4.16).
pub fn devices_of_others() -> bool {
    /// `RTM_GETLINK`, `linux/rtnetlink.h`
    const RTM_GETLINK: u16 = 18;
    /// Bytes of `struct ifinfomsg`, `linux/rtnetlink.h`.
    const INFO_BYTES: usize = 16;
    /// Where the number of the device is in it.
    const INDEX_AT: usize = 4;
    /// `IFLA_TARGET_NETNSID`, `linux/if_link.h`, with the length of the attribute
    const TARGET_NETNSID: [u8; 4] = [8, 0, 46, 0];
    const NO_NAMESPACE: i32 = i32::MAX;
    let mut request = vec![0; INFO_BYTES];
    request[INDEX_AT] = 1;
    request.extend(TARGET_NETNSID);
    request.extend(NO_NAMESPACE.to_ne_bytes());
    // A kernel that does not know the attribute answers with the device of this namespace.
    answer(libc::NETLINK_ROUTE, RTM_GETLINK, 0, &request)
        .is_some_and(|errno| errno == -libc::EINVAL)
}

/// Using nftables (`CONFIG_NF_TABLES`).
pub fn nftables() -> bool {
    /// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN`, `linux/netfilter`
    const GET_GENERATION: u16 = 10 << 8 | 16;
    // struct nfgenmsg
    answer(libc::NETLINK_NETFILTER, GET_GENERATION, 0, &[0; 4]).is_some_and(|errno| errno == 0)
}

/// Sends a netlink request, and returns the error number of the answer, negative as the kernel has it;
/// 0 if it is an answer to the question.
fn answer(protocol: libc::c_int, kind: u16, flags: u16, request: &[u8]) -> Option<i32> {
    /// `NLM_F_REQUEST`
    const REQUEST: u16 = 1;
    /// `NLMSG_ERROR`
    const ERROR: u16 = 2;
    // SAFETY: plain integers.
    let made =
        unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, protocol) };
    let socket = descriptor(made.into())?;
    let len = u32::try_from(NLMSG_HEADER_BYTES + request.len()).expect("a few dozen bytes");
    let mut message = len.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((REQUEST | flags).to_ne_bytes());
    message.extend([0; 8]); // sequence number, port
    message.extend(request);
    let mut found = [0_u8; NLMSG_HEADER_BYTES + 4];
    let fd = socket.as_raw_fd();
    // SAFETY: both buffers have the lengths that are told, and outlive the calls.
    let got = unsafe {
        if libc::send(fd, message.as_ptr().cast(), message.len(), 0) < 0 {
            return None;
        }
        libc::recv(fd, found.as_mut_ptr().cast(), found.len(), 0)
    };
    if got < found.len().cast_signed() {
        return None;
    }
    let number = |at: usize| i32::from_ne_bytes([0, 1, 2, 3].map(|byte| found[at + byte]));
    let is_error = u16::from_ne_bytes([found[4], found[5]]) == ERROR;
    Some(if is_error { number(NLMSG_HEADER_BYTES) } else { 0 })
}

/// Copying the sharing of a mount to another one (Linux 5.15).
pub fn mount_groups() -> bool {
    /// `MOVE_MOUNT_SET_GROUP`, `linux/mount.h`
    const MOVE_MOUNT_SET_GROUP: libc::c_uint = 0x100;
    const NO_FD: libc::c_int = -1;
    // SAFETY: the paths end in zero bytes; without descriptors, the call only fails.
    let result = unsafe {
        let name = c"".as_ptr();
        libc::syscall(libc::SYS_move_mount, NO_FD, name, NO_FD, name, MOVE_MOUNT_SET_GROUP)
    };
    matches!(Errno::result(result), Err(Errno::EBADF | Errno::ENOENT))
}

/// Seeing in the pid namespaces of a process which pids it has there (Linux 4.1).
pub fn pids_in_namespaces() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|text| text.contains("\nNSpid:"))
}

/// Telling guard pages from others when pages are listed (Linux 6.18).
pub fn scan_of_guards() -> bool {
    /// `PAGE_IS_GUARD`, `linux/fs.h`
    const GUARD: u64 = 1 << 8;
    Page::map(libc::MAP_PRIVATE).is_some_and(|page| page.scan(GUARD).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_supported_kernel_has_is_found() {
        for (name, probe) in [
            ("timerfd", timerfd as fn() -> bool),
            ("fdinfo_lock", fdinfo_lock),
            ("aio_remap", aio_remap),
            ("unix_file", unix_file),
            ("buffer_lock", buffer_lock),
            ("pids_in_namespaces", pids_in_namespaces),
            ("namespace_numbers", namespace_numbers),
            ("devices_of_others", devices_of_others),
        ] {
            assert!(probe(), "{name}");
        }
    }

    /// A question that no kernel knows.
    #[test]
    fn what_no_kernel_has_is_missing() {
        assert!(!has_option(libc::AF_INET, libc::SOL_SOCKET, 30_000));
        let unknown = answer(libc::NETLINK_ROUTE, 4000, 0, &[0; 4]);
        assert_eq!(unknown, Some(-libc::EOPNOTSUPP));
        let page = Page::map(libc::MAP_PRIVATE).unwrap();
        assert_eq!(page.scan(1 << 60), None);
    }
}
