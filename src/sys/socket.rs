//! Socket calls that no crate covers: arbitrary options, addresses in the kernel's form, and
//! descriptors in messages.
#![expect(unsafe_code, reason = "options and addresses are passed as bytes")]

use std::{
    io::IoSliceMut,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

use memmap2::MmapMut;
use nix::{
    errno::Errno,
    libc::{self, c_int, socklen_t},
    sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, UnixCredentials, recvmsg},
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The longest name of a UNIX socket (`UNIX_PATH_MAX`, `linux/un.h`).
pub const UNIX_NAME_MAX: usize = 108;

/// Opens the file of a socket with `O_PATH` (`SIOCUNIXFILE`, `linux/un.h`, since Linux 4.11).
const SIOCUNIXFILE: libc::Ioctl = 0x89e0;

/// Opens the network namespace of a socket (`SIOCGSKNS`, `linux/sockios.h`, since Linux 4.10).
const SIOCGSKNS: libc::Ioctl = 0x894c;

/// The size of the control buffer of one message: 253 descriptors (`SCM_MAX_FD`, `net/scm.h`),
/// credentials, and a security label.
const CONTROL_BYTES: usize = 8192;

/// One instruction of a socket filter (`struct sock_filter`, `linux/filter.h`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct FilterStep {
    /// The operation.
    pub code: u16,
    /// How many instructions to skip if true.
    pub jump_true: u8,
    /// How many instructions to skip if false.
    pub jump_false: u8,
    /// Its operand.
    pub operand: u32,
}

const _: () = assert!(size_of::<FilterStep>() == size_of::<libc::sock_filter>());

/// The most groups that a process can have (`NGROUPS_MAX`, `linux/limits.h`).
const GROUPS_MAX: usize = 65536;

/// `SO_PEERGROUPS` (`asm-generic/socket.h`, since Linux 4.13).
const SO_PEERGROUPS: c_int = 59;

/// Returns the supplementary groups of the peer of a connected UNIX socket.
///
/// # Errors
/// `ENODATA` without a peer; `ENOPROTOOPT` before Linux 4.13.
pub fn peer_groups(fd: BorrowedFd) -> nix::Result<Vec<u32>> {
    let mut groups = vec![0; GROUPS_MAX * size_of::<u32>()];
    let len = option_bytes(fd, libc::SOL_SOCKET, SO_PEERGROUPS, &mut groups)?;
    let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().expect("chunks of 4"));
    Ok(groups[..len].chunks_exact(size_of::<u32>()).map(word).collect())
}

/// Gets an option that has the size of `T` (`getsockopt(2)`).
///
/// # Errors
/// `EINVAL` for an option of another size.
pub fn option<T: FromBytes + IntoBytes>(
    fd: BorrowedFd,
    level: c_int,
    name: c_int,
) -> nix::Result<T> {
    let mut value = T::new_zeroed();
    let bytes = value.as_mut_bytes();
    let wanted = bytes.len();
    if option_bytes(fd, level, name, bytes)? != wanted {
        return Err(Errno::EINVAL);
    }
    Ok(value)
}

/// Gets an option into `value`, and returns its length.
pub fn option_bytes(
    fd: BorrowedFd,
    level: c_int,
    name: c_int,
    value: &mut [u8],
) -> nix::Result<usize> {
    assert!(name != libc::SO_GET_FILTER || level != libc::SOL_SOCKET, "its length is no bytes");
    let mut len = socklen_t::try_from(value.len()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `value` is borrowed mutably and `len` bytes long; the kernel writes no
    // more, but for SO_GET_FILTER, which is excluded above.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len)
    };
    Errno::result(result)?;
    Ok(len as usize)
}

/// Sets an option (`setsockopt(2)`).
///
/// # Panics
/// For options whose values contain addresses.
pub fn set_option<T: IntoBytes + Immutable + ?Sized>(
    fd: BorrowedFd,
    level: c_int,
    name: c_int,
    value: &T,
) -> nix::Result<()> {
    let with_addresses = [libc::SO_ATTACH_FILTER, libc::SO_ATTACH_REUSEPORT_CBPF];
    assert!(
        level != libc::SOL_SOCKET || !with_addresses.contains(&name),
        "the value of the option holds no address"
    );
    let bytes = value.as_bytes();
    let len = socklen_t::try_from(bytes.len()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `bytes` is borrowed and `len` long; the kernel only reads it, and
    // what it reads is no pointer, as was asserted.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, bytes.as_ptr().cast(), len) };
    Errno::result(result).map(drop)
}

/// Returns the classic filter of a socket (`SO_GET_FILTER`); empty without one.
pub fn filter(fd: BorrowedFd) -> nix::Result<Vec<FilterStep>> {
    let get = |steps: *mut FilterStep, mut len: socklen_t| {
        let (level, name) = (libc::SOL_SOCKET, libc::SO_GET_FILTER);
        // SAFETY: the length of this option counts instructions; `steps` has room
        // for so many, or the length is 0 and nothing is written.
        let result =
            unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, steps.cast(), &raw mut len) };
        Errno::result(result).map(|_| len)
    };
    let count = get(ptr::null_mut(), 0)?;
    let mut steps = vec![FilterStep::default(); count as usize];
    if count > 0 {
        get(steps.as_mut_ptr(), count)?;
    }
    Ok(steps)
}

/// Attaches a classic filter to a socket (`SO_ATTACH_FILTER`).
pub fn attach_filter(fd: BorrowedFd, steps: &[FilterStep]) -> nix::Result<()> {
    let len = u16::try_from(steps.len()).map_err(|_| Errno::EINVAL)?;
    let program = libc::sock_fprog { len, filter: steps.as_ptr().cast_mut().cast() };
    let size = socklen_t::try_from(size_of_val(&program)).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `program` points to `len` instructions, which are borrowed until after
    // the call; the kernel copies them and writes to nothing.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size,
        )
    };
    Errno::result(result).map(drop)
}

/// A received message.
#[derive(Debug)]
pub struct Received {
    /// The number of bytes received; with `MSG_TRUNC`, the length of the message.
    pub len: usize,
    /// The descriptors in its control data.
    pub fds: Vec<OwnedFd>,
    /// Its sender, for a socket that asks for it (`SO_PASSCRED`).
    pub sender: Option<Sender>,
    /// Whether it had other control data, except timestamps.
    pub other_control: bool,
}

/// The sender of a message (`struct ucred`, `unix(7)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    /// Its process; 0 if it is not known.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// Returns the credentials with which a message is sent.
pub fn credentials(pid: i32, uid: u32, gid: u32) -> UnixCredentials {
    libc::ucred { pid, uid, gid }.into()
}

/// Receives a message and its descriptors (`recvmsg(2)`). With `MSG_PEEK`, the descriptors are
/// duplicates.
pub fn receive(fd: BorrowedFd, buffer: &mut [u8], flags: MsgFlags) -> nix::Result<Received> {
    let mut data = [IoSliceMut::new(buffer)];
    let mut control = vec![0; CONTROL_BYTES];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(fd.as_raw_fd(), &mut data, Some(&mut control), flags)?;
    let mut received =
        Received { len: message.bytes, fds: Vec::new(), sender: None, other_control: false };
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::ScmRights(numbers) => {
                for number in numbers {
                    // SAFETY: the kernel has just created this descriptor for this process,
                    // and no other code has its number; each one is taken once.
                    received.fds.push(unsafe { OwnedFd::from_raw_fd(number) });
                }
            }
            ControlMessageOwned::ScmCredentials(sender) => {
                let (pid, uid, gid) = (sender.pid(), sender.uid(), sender.gid());
                received.sender = Some(Sender { pid, uid, gid });
            }
            ControlMessageOwned::ScmTimestamp(_) | ControlMessageOwned::ScmTimestampns(_) => {}
            _ => received.other_control = true,
        }
    }
    Ok(received)
}

/// Peeks at a stream. Returns the total length of the messages that fit into `buffer` as a whole.
///
/// The kernel does not report where messages end. But it omits a message that it cannot copy
/// completely, and after `buffer` comes memory that it cannot write to.
pub fn peek_whole(fd: BorrowedFd, buffer: &mut [u8]) -> nix::Result<usize> {
    let wall = MmapMut::map_anon(1)
        .and_then(MmapMut::make_read_only)
        .map_err(|error| error.raw_os_error().map_or(Errno::ENOMEM, Errno::from_raw))?;
    let mut pieces = [
        libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() },
        libc::iovec { iov_base: wall.as_ptr().cast_mut().cast(), iov_len: wall.len() },
    ];
    let mut message = MaybeUninit::<libc::msghdr>::zeroed();
    // SAFETY: all zeros are a message header without anything.
    let message = unsafe { message.assume_init_mut() };
    (message.msg_iov, message.msg_iovlen) = (pieces.as_mut_ptr(), pieces.len());
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: `message` holds two pieces of memory: one is borrowed mutably, the other
    // a mapping that lives until after the call and that the kernel cannot write to,
    // since it is read-only; it returns EFAULT instead. There is no control buffer,
    // so no descriptors are made.
    let received = unsafe { libc::recvmsg(fd.as_raw_fd(), message, flags) };
    match Errno::result(received) {
        Ok(received) => Ok(received.cast_unsigned().min(buffer.len())),
        Err(Errno::EFAULT | Errno::EAGAIN) => Ok(0),
        Err(errno) => Err(errno),
    }
}

/// Returns the address (`struct sockaddr_un`) of a UNIX socket with this name. The name is in the
/// kernel's form: a path, optionally with its NUL byte, or a NUL byte followed by any bytes.
///
/// # Errors
/// `ENAMETOOLONG`.
pub fn unix_address(name: &[u8]) -> nix::Result<Vec<u8>> {
    // The kernel appends a NUL byte even to a path that fills the whole address.
    let name = match name.strip_suffix(b"\0") {
        Some(path) if path.len() == UNIX_NAME_MAX => path,
        _ => name,
    };
    if name.len() > UNIX_NAME_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    let family = libc::sa_family_t::try_from(libc::AF_UNIX).expect("families are small");
    Ok([&family.to_ne_bytes(), name].concat())
}

/// Calls `call` with the address of a UNIX socket with this name.
fn with_unix_address(
    name: &[u8],
    call: impl FnOnce(*const libc::sockaddr, socklen_t) -> c_int,
) -> nix::Result<()> {
    let address = unix_address(name)?;
    let len = socklen_t::try_from(address.len()).map_err(|_| Errno::EINVAL)?;
    Errno::result(call(address.as_ptr().cast(), len)).map(drop)
}

/// Binds a UNIX socket to a name in the form of `sock_diag(7)` (`bind(2)`). For an empty name the
/// kernel chooses one.
pub fn bind_unix(fd: BorrowedFd, name: &[u8]) -> nix::Result<()> {
    with_unix_address(name, |address, len| {
        // SAFETY: `address` is valid for `len` bytes during the call, which only
        // reads it.
        unsafe { libc::bind(fd.as_raw_fd(), address, len) }
    })
}

/// Connects a UNIX socket to the one with this name (`connect(2)`).
pub fn connect_unix(fd: BorrowedFd, name: &[u8]) -> nix::Result<()> {
    with_unix_address(name, |address, len| {
        // SAFETY: `address` is valid for `len` bytes during the call, which only
        // reads it.
        unsafe { libc::connect(fd.as_raw_fd(), address, len) }
    })
}

/// Disconnects a datagram socket from its peer (`connect(2)` with `AF_UNSPEC`).
pub fn disconnect(fd: BorrowedFd) -> nix::Result<()> {
    let family = libc::sa_family_t::try_from(libc::AF_UNSPEC).expect("families are small");
    let address = libc::sockaddr { sa_family: family, sa_data: [0; 14] };
    let len = socklen_t::try_from(size_of_val(&address)).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `address` is valid for `len` bytes during the call, which only reads it.
    let result = unsafe { libc::connect(fd.as_raw_fd(), &raw const address, len) };
    Errno::result(result).map(drop)
}

/// Binds a packet socket to a protocol, in network byte order, and to an interface by its number,
/// or to all if it is 0 (`packet(7)`).
pub fn bind_packet(fd: BorrowedFd, protocol: u16, interface: u32) -> nix::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::sa_family_t::try_from(libc::AF_PACKET).expect("families are small"),
        sll_protocol: protocol,
        sll_ifindex: i32::try_from(interface).map_err(|_| Errno::ENODEV)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let len = socklen_t::try_from(size_of_val(&address)).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `address` is valid for `len` bytes during the call, which only reads it.
    let result = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) };
    Errno::result(result).map(drop)
}

/// Opens the file that a UNIX socket is bound to, with `O_PATH`.
///
/// # Errors
/// `ENOENT` if it is not bound to a file; `EPERM` without `CAP_NET_ADMIN`.
pub fn unix_file(fd: BorrowedFd) -> nix::Result<OwnedFd> {
    // SAFETY: the request takes no argument.
    let opened = Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE) })?;
    // SAFETY: the kernel has just created this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(opened) })
}

/// Opens the network namespace of a socket.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` in the namespace.
pub fn network(fd: BorrowedFd) -> nix::Result<OwnedFd> {
    // SAFETY: the request takes no argument.
    let opened = Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), SIOCGSKNS) })?;
    // SAFETY: the kernel has just created this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(opened) })
}

/// Creates a socket of any family, type and protocol (`socket(2)`), with `SOCK_CLOEXEC`.
pub fn create(family: c_int, kind: c_int, protocol: c_int) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes no memory.
    let fd = Errno::result(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the kernel has just created this descriptor for this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
