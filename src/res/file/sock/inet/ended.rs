//! TCP sockets whose connection has ended, or was never made, with what the program has still to
//! read: data, and an error.
//!
//! The restore connects such a socket to itself, sends the data, and ends the connection in the way
//! that leaves the same error.

use std::{
    io::Write,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    poll::{PollFd, PollFlags, poll},
    sys::socket::{
        Backlog, MsgFlags, Shutdown, SockaddrStorage, bind, connect, getsockname, listen, send,
        shutdown,
    },
};

use crate::{
    res::{
        file::sock::{opts, skb},
        kernel::{Kernel, KernelResult},
    },
    sys::{fds, socket},
};

/// How long the restore waits for its own connections.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between looks at a socket that shows no event.
const PAUSE: Duration = Duration::from_millis(1);

/// The least timeout of a connection (`TCP_USER_TIMEOUT`): the second probe of the peer ends it.
const SHORTEST_MS: u32 = 1;

/// The most bytes, and the bytes at a time, to fill the buffers of a connection with.
const FILL_MAX_BYTES: usize = 64 << 20;
const FILL_BYTES: usize = 64 << 10;

/// States of a `struct socket` (`linux/net.h`).
const SS_CONNECTING: u32 = 2;
const SS_CONNECTED: u32 = 3;

/// Reads the pending error of a TCP socket in the memory of the kernel, where it stays; the second
/// value is the state of its `struct socket`. No call returns the error without clearing it.
pub(super) fn read_error(kernel: &mut Kernel, fd: BorrowedFd) -> KernelResult<(u32, u32)> {
    let socket = skb::socket(kernel, fd)?;
    let sock = kernel.pointer(socket, "socket", "sk")?;
    Ok((kernel.word(sock, "sock", "sk_err")?, kernel.word(socket, "socket", "state")?))
}

/// Whether a restore can cause an error in a socket of this state.
pub(super) fn can_be_caused((error, of): (u32, u32)) -> bool {
    match Errno::from_raw(error.cast_signed()) {
        Errno::ECONNREFUSED => of == SS_CONNECTING,
        Errno::ECONNRESET | Errno::EPIPE | Errno::ETIMEDOUT => of == SS_CONNECTED,
        _ => false,
    }
}

/// Makes a new socket one whose connection has ended, with data that it has received and an error.
///
/// # Errors
/// `EOPNOTSUPP` for an error that the restore cannot cause; the errors of the kernel.
pub(super) fn restore(
    fd: BorrowedFd,
    family: i32,
    received: &[u8],
    error: Option<u32>,
) -> nix::Result<()> {
    let error = error.map(|error| Errno::from_raw(error.cast_signed()));
    match error {
        Some(Errno::ECONNREFUSED) => {
            // This address is bound, but does not listen.
            let (_taken, address) = bound(family)?;
            let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
            fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
            match connect(fd.as_raw_fd(), &address) {
                Err(Errno::EINPROGRESS) => {}
                result => return result.and(Err(Errno::EISCONN)),
            }
            fcntl(fd, FcntlArg::F_SETFL(flags))?;
        }
        None => {
            let other = connected(fd, family, received)?;
            shutdown(other.as_raw_fd(), Shutdown::Write)?;
            wait_for(fd, PollFlags::from_bits_retain(libc::POLLRDHUP))?;
            shutdown(fd.as_raw_fd(), Shutdown::Write)?;
            return wait_for(fd, PollFlags::empty());
        }
        Some(Errno::ECONNRESET) => {
            let other = connected(fd, family, received)?;
            wait_for_bytes(fd, received.len())?;
            reset(other)?;
        }
        Some(Errno::EPIPE) => {
            let other = connected(fd, family, received)?;
            shutdown(other.as_raw_fd(), Shutdown::Write)?;
            wait_for(fd, PollFlags::from_bits_retain(libc::POLLRDHUP))?;
            reset(other)?;
        }
        Some(Errno::ETIMEDOUT) => {
            let other = connected(fd, family, received)?;
            wait_for_bytes(fd, received.len())?;
            return time_out(fd, other);
        }
        Some(_) => return Err(Errno::EOPNOTSUPP),
    }
    wait_for(fd, PollFlags::empty())
}

/// Returns a new socket that is bound to a free port of the loopback device.
fn bound(family: i32) -> nix::Result<(OwnedFd, SockaddrStorage)> {
    let localhost = if family == libc::AF_INET6 {
        SocketAddr::from((Ipv6Addr::LOCALHOST, 0))
    } else {
        SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
    };
    let fd = socket::create(family, libc::SOCK_STREAM, libc::IPPROTO_TCP)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(localhost))?;
    let address = getsockname(fd.as_raw_fd())?;
    Ok((fd, address))
}

/// Connects a socket, and sends it data. Returns the other end.
fn connected(fd: BorrowedFd, family: i32, received: &[u8]) -> nix::Result<TcpStream> {
    let (listener, address) = bound(family)?;
    listen(&listener, Backlog::new(1)?)?;
    // The receive buffer must hold all of the data.
    let room = i32::try_from(received.len()).map_err(|_| Errno::EFBIG)?.saturating_mul(2);
    if room > 0 {
        opts::widen_to_receive(fd, room);
    }
    connect(fd.as_raw_fd(), &address)?;
    let failed = |error: std::io::Error| crate::sys::errno(&error);
    let (other, _) = TcpListener::from(listener).accept().map_err(failed)?;
    other.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
    (&other).write_all(received).map_err(failed)?;
    Ok(other)
}

/// Waits for events. poll(2) always reports `POLLERR` and `POLLHUP`.
fn wait_for(fd: BorrowedFd, events: PollFlags) -> nix::Result<()> {
    let mut polled = [PollFd::new(fd, events)];
    let patience = u16::try_from(PATIENCE.as_millis()).expect("it is short");
    match poll(&mut polled, patience)? {
        0 => Err(Errno::ETIMEDOUT),
        _ => Ok(()),
    }
}

/// Waits until a socket has received a number of bytes.
fn wait_for_bytes(fd: BorrowedFd, bytes: usize) -> nix::Result<()> {
    let begin = Instant::now();
    while (fds::readable_bytes(fd)? as usize) < bytes {
        if begin.elapsed() > PATIENCE {
            return Err(Errno::ETIMEDOUT);
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Closes a socket by force: its peer gets an error.
fn reset(other: TcpStream) -> nix::Result<()> {
    const AT_ONCE: [i32; 2] = [1, 0];
    socket::set_option(other.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &AT_ONCE)?;
    drop(other);
    Ok(())
}

/// Lets a connection time out: its peer never reads what it sends.
fn time_out(fd: BorrowedFd, other: TcpStream) -> nix::Result<()> {
    let bytes = vec![0; FILL_BYTES];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let mut sent = 0;
    loop {
        match send(fd.as_raw_fd(), &bytes, flags) {
            Ok(count) => sent += count,
            Err(Errno::EAGAIN) => break,
            Err(errno) => return Err(errno),
        }
        if sent > FILL_MAX_BYTES {
            return Err(Errno::EFBIG);
        }
    }
    let set = |value: u32| socket::set_option(fd, libc::SOL_TCP, libc::TCP_USER_TIMEOUT, &value);
    set(SHORTEST_MS)?;
    wait_for(fd, PollFlags::empty())?;
    reset(other)?;
    set(0)
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{getsockopt, sockopt};

    use super::*;

    #[test]
    fn every_error_is_caused_again_behind_the_data() {
        let errors = [Errno::ECONNRESET, Errno::EPIPE, Errno::ETIMEDOUT, Errno::ECONNREFUSED];
        for family in [libc::AF_INET, libc::AF_INET6] {
            for error in errors.map(Some).into_iter().chain([None]) {
                let fd = socket::create(family, libc::SOCK_STREAM, libc::IPPROTO_TCP).unwrap();
                let data: &[u8] =
                    if error == Some(Errno::ECONNREFUSED) { b"" } else { b"what it has received" };
                let number = error.map(|error| (error as i32).cast_unsigned());
                restore(fd.as_fd(), family, data, number).unwrap();
                assert_eq!(fds::readable_bytes(fd.as_fd()).unwrap() as usize, data.len());
                let mut bytes = [0; 64];
                if !data.is_empty() {
                    let len = nix::unistd::read(&fd, &mut bytes).unwrap();
                    assert_eq!(&bytes[..len], data, "{error:?}");
                }
                let found = getsockopt(&fd, sockopt::SocketError).unwrap();
                assert_eq!(found, error.map_or(0, |error| error as i32));
                assert_eq!(nix::unistd::read(&fd, &mut bytes), Ok(0), "{error:?}");
            }
        }
    }
}
