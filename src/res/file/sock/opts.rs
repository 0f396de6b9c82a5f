//! Options that all kinds of sockets have.
//!
//! The kernel doubles the buffer sizes that a program sets, and returns the doubled sizes; the
//! images store these. The restore sets half of them. With `CAP_NET_ADMIN` it uses
//! `SO_SNDBUFFORCE` and `SO_RCVBUFFORCE`; otherwise the limits of the system apply
//! (`net.core.wmem_max`, `rmem_max`).
//!
//! The restore sets only options that differ from those of the new socket: some need privileges
//! to set, even to the same value.

use std::os::fd::BorrowedFd;

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    libc::{self, c_int},
};
use zerocopy::IntoBytes;

use crate::{
    image::proto,
    res::file::{FileError, Result},
    sys::socket::{self, FilterStep},
};

/// `asm-generic/socket.h`, since Linux 5.14.
const SO_BUF_LOCK: c_int = 72;

/// `asm-generic/socket.h`, since Linux 6.5.
pub(super) const SO_PASSPIDFD: c_int = 76;

/// The largest buffer size: the kernel doubles the number, which is an `int`.
const LARGEST_BUFFER: c_int = c_int::MAX / 2;

/// Status flags that `F_SETFL` can change.
const SETTABLE: OFlag = OFlag::O_APPEND
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_ASYNC)
    .union(OFlag::O_DIRECT)
    .union(OFlag::O_NOATIME);

/// A socket that is being restored, for error messages.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    /// Its number in the images.
    pub(super) id: u32,
    /// Its name in messages.
    pub(super) object: String,
}

impl Subject {
    /// Returns a constructor of [`FileError::Restore`] for `map_err`.
    pub(super) fn failed(&self, step: &'static str) -> impl Fn(Errno) -> FileError + '_ {
        move |source| FileError::Restore { id: self.id, step, object: self.object.clone(), source }
    }

    /// Returns [`FileError::Image`].
    pub(super) fn wrong(&self, problem: impl Into<String>) -> FileError {
        let problem = format!("{}: {}", self.object, problem.into());
        FileError::Image { id: self.id, problem }
    }
}

fn number(fd: BorrowedFd, name: c_int) -> nix::Result<c_int> {
    socket::option(fd, libc::SOL_SOCKET, name)
}

fn unsigned(fd: BorrowedFd, name: c_int) -> nix::Result<u32> {
    socket::option(fd, libc::SOL_SOCKET, name)
}

fn flag(fd: BorrowedFd, name: c_int) -> nix::Result<Option<bool>> {
    Ok(Some(number(fd, name)? != 0))
}

/// Returns the family (`AF_UNIX`, ...) of a socket.
///
/// # Errors
/// `ENOTSOCK` for a file that is not a socket.
pub(super) fn family(fd: BorrowedFd) -> nix::Result<c_int> {
    number(fd, libc::SO_DOMAIN)
}

/// Returns the type (`SOCK_STREAM`, ...) of a socket.
pub(super) fn kind(fd: BorrowedFd) -> nix::Result<c_int> {
    number(fd, libc::SO_TYPE)
}

/// Returns the protocol of a socket.
pub(super) fn protocol(fd: BorrowedFd) -> nix::Result<c_int> {
    number(fd, libc::SO_PROTOCOL)
}

/// Returns the name of the interface that a socket is bound to, if any.
pub(super) fn bound_interface(fd: BorrowedFd) -> nix::Result<Option<Vec<u8>>> {
    let mut name = [0; libc::IFNAMSIZ];
    let len = socket::option_bytes(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, &mut name)?;
    let name = name[..len].split(|byte| *byte == 0).next().unwrap_or_default();
    Ok((!name.is_empty()).then(|| name.to_owned()))
}

/// Builds the image entry for the options of a socket of this family.
pub(super) fn read(fd: BorrowedFd, family: c_int) -> nix::Result<proto::SkOptsEntry> {
    let time = |name| -> nix::Result<[u64; 2]> { socket::option(fd, libc::SOL_SOCKET, name) };
    let [so_snd_tmo_sec, so_snd_tmo_usec] = time(libc::SO_SNDTIMEO)?;
    let [so_rcv_tmo_sec, so_rcv_tmo_usec] = time(libc::SO_RCVTIMEO)?;
    let local = matches!(family, libc::AF_UNIX | libc::AF_NETLINK);
    let of_local = |name| if local { flag(fd, name) } else { Ok(None) };
    let [lingers, linger]: [u32; 2] = socket::option(fd, libc::SOL_SOCKET, libc::SO_LINGER)?;
    let mark = unsigned(fd, libc::SO_MARK)?;
    let filter = socket::filter(fd)?;
    Ok(proto::SkOptsEntry {
        so_sndbuf: unsigned(fd, libc::SO_SNDBUF)?,
        so_rcvbuf: unsigned(fd, libc::SO_RCVBUF)?,
        so_snd_tmo_sec,
        so_snd_tmo_usec,
        so_rcv_tmo_sec,
        so_rcv_tmo_usec,
        reuseaddr: flag(fd, libc::SO_REUSEADDR)?,
        so_priority: Some(unsigned(fd, libc::SO_PRIORITY)?),
        so_rcvlowat: Some(unsigned(fd, libc::SO_RCVLOWAT)?),
        so_mark: (mark != 0).then_some(mark),
        so_passcred: of_local(libc::SO_PASSCRED)?,
        so_passsec: of_local(libc::SO_PASSSEC)?,
        so_dontroute: flag(fd, libc::SO_DONTROUTE)?,
        so_no_check: flag(fd, libc::SO_NO_CHECK)?,
        so_bound_dev: bound_interface(fd)?,
        so_filter: filter.iter().map(encode_step).collect(),
        so_reuseport: flag(fd, libc::SO_REUSEPORT)?,
        so_broadcast: flag(fd, libc::SO_BROADCAST)?,
        so_keepalive: flag(fd, libc::SO_KEEPALIVE)?,
        so_oobinline: Some(u32::from(number(fd, libc::SO_OOBINLINE)? != 0)),
        so_linger: (lingers != 0).then_some(linger),
        // Kernels before 5.14 do not have this option.
        so_buf_lock: unsigned(fd, SO_BUF_LOCK).ok(),
        ..proto::SkOptsEntry::default()
    })
}

fn encode_step(step: &FilterStep) -> u64 {
    u64::from(step.code) << 48
        | u64::from(step.jump_true) << 40
        | u64::from(step.jump_false) << 32
        | u64::from(step.operand)
}

fn decode_step(step: &u64) -> FilterStep {
    let [code_high, code_low, jump_true, jump_false, operand @ ..] = step.to_be_bytes();
    FilterStep {
        code: u16::from_be_bytes([code_high, code_low]),
        jump_true,
        jump_false,
        operand: u32::from_be_bytes(operand),
    }
}

/// Sets an option whose value is not `value` yet.
pub(super) fn ensure(fd: BorrowedFd, level: c_int, name: c_int, value: u32) -> nix::Result<()> {
    if socket::option::<u32>(fd, level, name) == Ok(value) {
        return Ok(());
    }
    socket::set_option(fd, level, name, &value)
}

/// Gives a socket the largest possible send buffer, to refill a queue at once.
pub(super) fn widen(fd: BorrowedFd) {
    let set = |name| socket::set_option(fd, libc::SOL_SOCKET, name, &LARGEST_BUFFER);
    if set(libc::SO_SNDBUFFORCE).is_err() && set(libc::SO_SNDBUF).is_err() {
        log::debug!("cannot enlarge the send buffer of a socket");
    }
}

/// Gives a socket room to receive `bytes`, within the limits of the system.
pub(super) fn widen_to_receive(fd: BorrowedFd, bytes: c_int) {
    let set = |name| socket::set_option(fd, libc::SOL_SOCKET, name, &bytes);
    if set(libc::SO_RCVBUFFORCE).is_err() && set(libc::SO_RCVBUF).is_err() {
        log::debug!("cannot enlarge the receive buffer of a socket");
    }
}

fn set_buffer(
    fd: BorrowedFd,
    (read, force, set): (c_int, c_int, c_int),
    bytes: u32,
) -> nix::Result<()> {
    if unsigned(fd, read)? == bytes {
        return Ok(());
    }
    let half = bytes / 2;
    match socket::set_option(fd, libc::SOL_SOCKET, force, &half) {
        Err(Errno::EPERM) => socket::set_option(fd, libc::SOL_SOCKET, set, &half)?,
        result => result?,
    }
    let found = unsigned(fd, read)?;
    if found < bytes {
        log::warn!(
            "the buffer of a socket has {found} bytes instead of {bytes}: this is the system's limit"
        );
    }
    Ok(())
}

/// Sets the options of a socket, except those that matter for binding it ([`restore_reuse`]).
pub(super) fn restore(
    fd: BorrowedFd,
    options: &proto::SkOptsEntry,
    restored: &Subject,
) -> Result<()> {
    let send = (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF);
    let receive = (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF);
    set_buffer(fd, send, options.so_sndbuf).map_err(restored.failed("set the send buffer of"))?;
    set_buffer(fd, receive, options.so_rcvbuf)
        .map_err(restored.failed("set the receive buffer of"))?;

    let on = |value: Option<bool>| value.map(u32::from);
    let numbers = [
        (SO_BUF_LOCK, options.so_buf_lock, "set SO_BUF_LOCK of"),
        (libc::SO_PRIORITY, options.so_priority, "set SO_PRIORITY of"),
        (libc::SO_RCVLOWAT, options.so_rcvlowat, "set SO_RCVLOWAT of"),
        (libc::SO_MARK, options.so_mark, "set SO_MARK of"),
        (libc::SO_PASSCRED, on(options.so_passcred), "set SO_PASSCRED of"),
        (libc::SO_PASSSEC, on(options.so_passsec), "set SO_PASSSEC of"),
        (libc::SO_DONTROUTE, on(options.so_dontroute), "set SO_DONTROUTE of"),
        (libc::SO_NO_CHECK, on(options.so_no_check), "set SO_NO_CHECK of"),
        (libc::SO_BROADCAST, on(options.so_broadcast), "set SO_BROADCAST of"),
        (libc::SO_KEEPALIVE, on(options.so_keepalive), "set SO_KEEPALIVE of"),
        (libc::SO_OOBINLINE, options.so_oobinline, "set SO_OOBINLINE of"),
    ];
    for (name, value, step) in numbers {
        if let Some(value) = value {
            ensure(fd, libc::SOL_SOCKET, name, value).map_err(restored.failed(step))?;
        }
    }
    let set = |name, value: &[u8], step| {
        socket::set_option(fd, libc::SOL_SOCKET, name, value).map_err(restored.failed(step))
    };
    if let Some(seconds) = options.so_linger {
        set(libc::SO_LINGER, [1, seconds].as_bytes(), "set SO_LINGER of")?;
    }
    let times = [
        (
            libc::SO_SNDTIMEO,
            [options.so_snd_tmo_sec, options.so_snd_tmo_usec],
            "set SO_SNDTIMEO of",
        ),
        (
            libc::SO_RCVTIMEO,
            [options.so_rcv_tmo_sec, options.so_rcv_tmo_usec],
            "set SO_RCVTIMEO of",
        ),
    ];
    for (name, time, step) in times {
        if time != [0; 2] {
            set(name, time.as_bytes(), step)?;
        }
    }
    restore_interface(fd, options, restored)?;
    if !options.so_filter.is_empty() {
        let steps: Vec<FilterStep> = options.so_filter.iter().map(decode_step).collect();
        socket::attach_filter(fd, &steps).map_err(restored.failed("attach the filter of"))?;
    }
    Ok(())
}

/// Binds a socket to the interface in `options`, unless it is bound to it already.
pub(super) fn restore_interface(
    fd: BorrowedFd,
    options: &proto::SkOptsEntry,
    restored: &Subject,
) -> Result<()> {
    let Some(name) = options.so_bound_dev.as_deref() else { return Ok(()) };
    let step = "bind to its interface";
    if bound_interface(fd).map_err(restored.failed(step))?.as_deref() == Some(name) {
        return Ok(());
    }
    socket::set_option(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, name)
        .map_err(restored.failed(step))
}

/// Sets whether other sockets may share the address of a socket.
pub(super) fn restore_reuse(
    fd: BorrowedFd,
    (address, port): (Option<bool>, Option<bool>),
    restored: &Subject,
) -> Result<()> {
    let options = [
        (libc::SO_REUSEADDR, address, "set SO_REUSEADDR of"),
        (libc::SO_REUSEPORT, port, "set SO_REUSEPORT of"),
    ];
    for (name, value, step) in options {
        if let Some(value) = value {
            ensure(fd, libc::SOL_SOCKET, name, value.into()).map_err(restored.failed(step))?;
        }
    }
    Ok(())
}

/// Sets the status flags of a description.
pub(super) fn restore_flags(fd: BorrowedFd, flags: u32, restored: &Subject) -> Result<()> {
    let flags = OFlag::from_bits_truncate(flags.cast_signed()) & SETTABLE;
    fcntl(fd, FcntlArg::F_SETFL(flags)).map_err(restored.failed("set the flags of")).map(drop)
}

/// Returns the [`proto::SkShutdown`] for the kernel's bits, which have the same values.
pub(super) fn shutdown(bits: u8) -> Option<i32> {
    (bits != 0).then(|| i32::from(bits))
}

/// Returns the argument of `shutdown(2)` for a value in the images.
pub(super) fn how(shutdown: Option<i32>) -> Option<nix::sys::socket::Shutdown> {
    use nix::sys::socket::Shutdown;
    match proto::SkShutdown::try_from(shutdown?).ok()? {
        proto::SkShutdown::None => None,
        proto::SkShutdown::Read => Some(Shutdown::Read),
        proto::SkShutdown::Write => Some(Shutdown::Write),
        proto::SkShutdown::Both => Some(Shutdown::Both),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_of_a_filter_is_a_number_with_its_fields_in_order() {
        let step = FilterStep { code: 0x15, jump_true: 2, jump_false: 3, operand: 0xdead_beef };
        assert_eq!(encode_step(&step), 0x0015_0203_dead_beef);
        assert_eq!(decode_step(&encode_step(&step)), step);
    }
}
