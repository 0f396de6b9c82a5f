//! POSIX message queues.

use std::{ffi::CString, mem, ptr};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, bytes, same},
};

pub const ROWS: &[Row] = &[
    ("message_queues", message_queues),
    ("message_queue_notification", notification),
    ("message_queue_thread", thread),
];

fn own_name(what: &str) -> CString {
    CString::new(format!("/rcriu-{what}-{}", std::process::id())).expect("no NUL")
}

fn made(name: &CString, flags: i32) -> Result<i32, String> {
    // SAFETY: all zeros is a valid value.
    let mut size: libc::mq_attr = unsafe { mem::zeroed() };
    size.mq_maxmsg = 9;
    size.mq_msgsize = 8192;
    let flags = flags | libc::O_CREAT | libc::O_EXCL;
    sys!(mq_open(name.as_ptr(), flags, 0o640, &raw mut size))
}

fn send(fd: i32, data: &[u8], priority: u32) -> Verdict {
    sys!(mq_send(fd, data.as_ptr().cast(), data.len(), priority)).map(drop)
}

fn receive(fd: i32) -> Result<(Vec<u8>, u32), String> {
    let (mut data, mut priority) = (vec![0_u8; 8192], 0);
    let at = data.as_mut_ptr().cast();
    let count = sys!(mq_receive(fd, at, data.len(), &raw mut priority))?;
    data.truncate(count as usize);
    Ok((data, priority))
}

/// Flags, limits and number of messages.
fn attributes(fd: i32) -> Result<[i64; 4], String> {
    // SAFETY: all zeros is a valid value.
    let mut found: libc::mq_attr = unsafe { mem::zeroed() };
    sys!(mq_getattr(fd, &raw mut found))?;
    Ok([found.mq_flags, found.mq_maxmsg, found.mq_msgsize, found.mq_curmsgs])
}

/// A queue with a name, and one whose name was removed.
fn message_queues(checkpoint: &Checkpoint) -> Verdict {
    let large = bytes(5, 8192);
    let mut queues = Vec::new();
    for (what, unlinked) in [("kept", false), ("unlinked", true)] {
        let name = own_name(what);
        let writer = made(&name, libc::O_RDWR | libc::O_NONBLOCK)?;
        let reader = sys!(mq_open(name.as_ptr(), libc::O_RDONLY))?;
        if unlinked {
            sys!(mq_unlink(name.as_ptr()))?;
        }
        for (data, priority) in [(&b"low"[..], 1), (&large, 5), (b"", 5), (b"high", 30_000)] {
            send(writer, data, priority)?;
        }
        queues.push((name, unlinked, writer, reader));
    }
    let seen = || {
        let ends = queues.iter().flat_map(|(_, _, writer, reader)| [*writer, *reader]);
        ends.map(attributes).collect::<Result<Vec<_>, _>>()
    };
    let before = seen()?;
    checkpoint.wait();
    same("attributes", before, seen()?)?;
    for (name, unlinked, writer, reader) in queues {
        send(writer, b"later", 5)?;
        let expected = [(&b"high"[..], 30_000), (&large, 5), (b"", 5), (b"later", 5), (b"low", 1)];
        for (data, priority) in expected {
            let found = receive(reader)?;
            ensure!(found == (data.to_vec(), priority), "message of priority {priority}");
        }
        ensure!(receive(writer).is_err(), "one message too many");
        let again = sys!(mq_open(name.as_ptr(), libc::O_RDONLY));
        same("whether the name is gone", unlinked, again.is_err())?;
        if !unlinked {
            sys!(mq_unlink(name.as_ptr()))?;
        }
    }
    Ok(())
}

fn notification(checkpoint: &Checkpoint) -> Verdict {
    let name = own_name("notified");
    let queue = made(&name, libc::O_RDWR | libc::O_NONBLOCK)?;
    sys!(mq_unlink(name.as_ptr()))?;
    let signal = libc::SIGRTMIN() + 2;
    // SAFETY: all zeros is a valid value for both.
    let (mut event, mut set): (libc::sigevent, libc::sigset_t) = unsafe { mem::zeroed() };
    event.sigev_notify = libc::SIGEV_SIGNAL;
    event.sigev_signo = signal;
    event.sigev_value = libc::sigval { sival_ptr: ptr::without_provenance_mut(0x1234_5678) };
    sys!(sigemptyset(&raw mut set))?;
    sys!(sigaddset(&raw mut set, signal))?;
    sys!(sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()))?;
    sys!(mq_notify(queue, &raw const event))?;
    checkpoint.wait();
    send(queue, b"notice", 1)?;
    let timeout = libc::timespec { tv_sec: 10, tv_nsec: 0 };
    // SAFETY: all zeros is a valid value.
    let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
    let got = sys!(sigtimedwait(&raw const set, &raw mut info, &raw const timeout))?;
    // SAFETY: the signal came with a value.
    let value = unsafe { info.si_value().sival_ptr.addr() };
    same("signal and value", (signal, 0x1234_5678), (got, value))?;
    same("message", (b"notice".to_vec(), 1), receive(queue)?)
}

/// A notification that starts a thread: the C library waits for it at a netlink socket.
fn thread(checkpoint: &Checkpoint) -> Verdict {
    let name = own_name("thread");
    let queue = made(&name, libc::O_RDWR | libc::O_NONBLOCK)?;
    sys!(mq_unlink(name.as_ptr()))?;
    let socket = sys!(socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0))?;
    // `NOTIFY_COOKIE_LEN` (`linux/mqueue.h`); the kernel replaces the last byte.
    let cookie = [7_u8; 32];
    // SAFETY: all zeros is a valid value.
    let mut event: libc::sigevent = unsafe { mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD;
    event.sigev_signo = socket;
    event.sigev_value = libc::sigval { sival_ptr: cookie.as_ptr().cast_mut().cast() };
    sys!(syscall(libc::SYS_mq_notify, queue, &raw const event))?;
    checkpoint.wait();
    send(queue, b"notice", 1)?;
    let mut found = [0_u8; 64];
    let got = sys!(recv(socket, found.as_mut_ptr().cast(), found.len(), 0))?;
    same("cookie", &cookie[..31], &found[..31.min(got as usize)])?;
    // `NOTIFY_WOKENUP`
    same("notice", 1, found[31])
}
