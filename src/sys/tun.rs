//! Network devices of programs: `/dev/net/tun` (`linux/if_tun.h`).
#![expect(unsafe_code, reason = "ioctls")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::{
    errno::Errno,
    libc::{self, c_int},
    sys::stat::makedev,
};

/// Where the device for making such devices is.
pub const PATH: &str = "/dev/net/tun";

/// Flags of a device (`linux/if_tun.h`): its type, ...
pub const TUN: u32 = 1;
/// See [`TUN`].
pub const TAP: u32 = 2;
/// Packets come without four bytes that tell their protocol.
pub const NO_HEAD: u32 = 0x1000;
/// Packets come with a header that tells about offloads.
pub const OFFLOAD_HEAD: u32 = 0x4000;
/// The device stays when no program has it open.
pub const PERSISTENT: u32 = 0x800;
/// Several files can be attached to the device.
pub const MULTI_QUEUE: u32 = 0x100;
/// `IFF_NAPI`, `IFF_NAPI_FRAGS`, `IFF_NO_CARRIER`, `IFF_ONE_QUEUE`.
const OTHERS: u32 = 0x10 | 0x20 | 0x40 | 0x2000;
/// All flags that describe a device, and that [`attach`] takes.
const KNOWN: u32 = TUN | TAP | NO_HEAD | OFFLOAD_HEAD | PERSISTENT | MULTI_QUEUE | OTHERS;

/// `IFF_DETACH_QUEUE`: no packets come to the file. `TUNSETQUEUE` takes it as an order.
const DETACHED: u32 = 0x400;

/// The size of the header before packets with [`OFFLOAD_HEAD`], unless a program sets it
/// (`struct virtio_net_hdr`), and that of the send buffer.
pub const HEADER_BYTES: u32 = 10;
/// See [`HEADER_BYTES`].
pub const SEND_BUFFER_BYTES: u32 = i32::MAX.cast_unsigned();

const fn ioc(direction: libc::Ioctl, number: libc::Ioctl) -> libc::Ioctl {
    direction << 30
        | (size_of::<c_int>() as libc::Ioctl) << 16
        | (b'T' as libc::Ioctl) << 8
        | number
}
const SET: libc::Ioctl = 1;
const GET: libc::Ioctl = 2;

const TUNSETIFF: libc::Ioctl = ioc(SET, 202);
const TUNSETPERSIST: libc::Ioctl = ioc(SET, 203);
const TUNSETOWNER: libc::Ioctl = ioc(SET, 204);
const TUNSETGROUP: libc::Ioctl = ioc(SET, 206);
const TUNGETIFF: libc::Ioctl = ioc(GET, 210);
const TUNGETSNDBUF: libc::Ioctl = ioc(GET, 211);
const TUNSETSNDBUF: libc::Ioctl = ioc(SET, 212);
const TUNGETVNETHDRSZ: libc::Ioctl = ioc(GET, 215);
const TUNSETVNETHDRSZ: libc::Ioctl = ioc(SET, 216);
const TUNSETQUEUE: libc::Ioctl = ioc(SET, 217);
const TUNSETIFINDEX: libc::Ioctl = ioc(SET, 218);
const TUNSETCARRIER: libc::Ioctl = ioc(SET, 226);
/// Since Linux 5.5.
const TUNGETDEVNETNS: libc::Ioctl = (b'T' as libc::Ioctl) << 8 | 227;
/// `_IOR('T', 219, struct sock_fprog)`.
const TUNGETFILTER: libc::Ioctl = GET << 30
    | (size_of::<libc::sock_fprog>() as libc::Ioctl) << 16
    | (b'T' as libc::Ioctl) << 8
    | 219;
const _: () = assert!(TUNSETIFF == 0x4004_54ca && TUNGETIFF == 0x8004_54d2);

/// A device as a file that is attached to it shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: Vec<u8>,
    /// Its flags. [`NO_HEAD`] is not among them: the kernel uses its bit otherwise here.
    pub flags: u32,
    /// Whether no packets come to the file (`TUNSETQUEUE`).
    pub is_detached: bool,
}

/// Whether a file with this device number and mode is open on [`PATH`].
pub fn is_tun(mode: u32, device: u64) -> bool {
    /// `MISC_MAJOR` (`linux/major.h`) and `TUN_MINOR` (`linux/miscdevice.h`).
    const NUMBER: (u32, u32) = (10, 200);
    mode & libc::S_IFMT == libc::S_IFCHR && device == makedev(NUMBER.0.into(), NUMBER.1.into())
}

/// Whether devices can be made, with the numbers that images have.
pub fn is_there() -> bool {
    let file = std::fs::File::options().read(true).write(true).open(PATH);
    file.is_ok_and(|file| set_number(file.as_fd(), 1).is_ok())
}

fn request(name: &[u8], flags: u32) -> libc::ifreq {
    // SAFETY: numbers and arrays of numbers; all bits 0 is a value of each.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    let flags = u16::try_from(flags & 0xffff).expect("it was masked").cast_signed();
    request.ifr_ifru.ifru_flags = flags;
    request
}

/// Returns the device that a file is attached to, if any.
///
/// # Errors
/// The errors of `TUNGETIFF`.
pub fn device(fd: BorrowedFd<'_>) -> nix::Result<Option<Device>> {
    let mut found = request(b"", 0);
    // SAFETY: `found` is a `struct ifreq`, which the kernel fills, and outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut found) };
    match Errno::result(result) {
        Err(Errno::EBADFD) => return Ok(None),
        result => result?,
    };
    let name = found.ifr_name.iter().map(|byte| byte.to_ne_bytes()[0]);
    let name = name.take_while(|byte| *byte != 0).collect();
    // SAFETY: the kernel has set this member.
    let flags = u32::from(unsafe { found.ifr_ifru.ifru_flags }.cast_unsigned());
    let is_detached = flags & DETACHED != 0;
    Ok(Some(Device { name, flags: flags & KNOWN & !NO_HEAD, is_detached }))
}

/// Opens the network namespace of the device that a file is attached to. Since Linux 5.5.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN` there.
pub fn network(fd: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    // SAFETY: this ioctl takes no argument; the descriptor is open.
    let made = Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETDEVNETNS) })?;
    // SAFETY: the kernel has just made this descriptor for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

/// Whether a program has given the device a packet filter, be it that it has removed it since.
///
/// # Errors
/// `EINVAL` for a device without Ethernet headers, which has none.
pub fn has_filter(fd: BorrowedFd<'_>) -> nix::Result<bool> {
    let mut filter = libc::sock_fprog { len: 0, filter: std::ptr::null_mut() };
    // SAFETY: the kernel fills `filter`, which outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETFILTER, &raw mut filter) })?;
    Ok(filter.len != 0)
}

fn get(fd: BorrowedFd<'_>, question: libc::Ioctl) -> nix::Result<u32> {
    let mut found: c_int = 0;
    // SAFETY: the ioctls that `get` is called with write an `int`; `found` outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), question, &raw mut found) })?;
    Ok(found.cast_unsigned())
}

fn set(fd: BorrowedFd<'_>, what: libc::Ioctl, value: u32) -> nix::Result<()> {
    // SAFETY: the ioctls that `set` is called with read an `int`, which outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), what, &raw const value) }).map(drop)
}

fn order(fd: BorrowedFd<'_>, what: libc::Ioctl, value: u32) -> nix::Result<()> {
    let value = libc::c_ulong::from(value);
    // SAFETY: the ioctls that `order` is called with take a number.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), what, value) }).map(drop)
}

/// Returns the size of the send buffer of the device.
///
/// # Errors
/// The errors of the ioctl.
pub fn send_buffer(fd: BorrowedFd<'_>) -> nix::Result<u32> {
    get(fd, TUNGETSNDBUF)
}

/// Returns the size of the header that tells about offloads.
///
/// # Errors
/// The errors of the ioctl.
pub fn header_bytes(fd: BorrowedFd<'_>) -> nix::Result<u32> {
    get(fd, TUNGETVNETHDRSZ)
}

/// Attaches a file to the device with this name, which is made if it is not there.
///
/// # Errors
/// `EBUSY` if the device has as many files as it can have; `EINVAL` if it is of another type.
pub fn attach(fd: BorrowedFd<'_>, name: &[u8], flags: u32) -> nix::Result<()> {
    let wanted = request(name, flags & KNOWN & !PERSISTENT);
    // SAFETY: the kernel reads and fills a `struct ifreq`, which outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw const wanted) }).map(drop)
}

/// Has no more packets come to the file.
///
/// # Errors
/// `EINVAL` for a device with one queue.
pub fn detach(fd: BorrowedFd<'_>) -> nix::Result<()> {
    let wanted = request(b"", DETACHED);
    // SAFETY: as for `attach`.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETQUEUE, &raw const wanted) }).map(drop)
}

/// Chooses the number of the device that [`attach`] is to make.
///
/// # Errors
/// `EINVAL` if the file is attached already.
pub fn set_number(fd: BorrowedFd<'_>, number: u32) -> nix::Result<()> {
    set(fd, TUNSETIFINDEX, number)
}

/// Has the device stay without files, or go with the last.
///
/// # Errors
/// The errors of the ioctl.
pub fn set_persistent(fd: BorrowedFd<'_>, is_persistent: bool) -> nix::Result<()> {
    order(fd, TUNSETPERSIST, is_persistent.into())
}

/// Sets the user who may attach files.
///
/// # Errors
/// `EINVAL` for a user without a number in the own user namespace.
pub fn set_owner(fd: BorrowedFd<'_>, user: u32) -> nix::Result<()> {
    order(fd, TUNSETOWNER, user)
}

/// Sets the group that may attach files.
///
/// # Errors
/// As [`set_owner`].
pub fn set_group(fd: BorrowedFd<'_>, group: u32) -> nix::Result<()> {
    order(fd, TUNSETGROUP, group)
}

/// Sets the size of the send buffer.
///
/// # Errors
/// `EINVAL` for 0 and negative sizes.
pub fn set_send_buffer(fd: BorrowedFd<'_>, bytes: u32) -> nix::Result<()> {
    set(fd, TUNSETSNDBUF, bytes)
}

/// Sets the size of the header that tells about offloads.
///
/// # Errors
/// `EINVAL` if it is shorter than [`HEADER_BYTES`].
pub fn set_header_bytes(fd: BorrowedFd<'_>, bytes: u32) -> nix::Result<()> {
    set(fd, TUNSETVNETHDRSZ, bytes)
}

/// Sets whether the device seems to be connected.
///
/// # Errors
/// `EINVAL` for a device that is down.
pub fn set_carrier(fd: BorrowedFd<'_>, is_there: bool) -> nix::Result<()> {
    set(fd, TUNSETCARRIER, is_there.into())
}
