//! UNIX connections that were not accepted, with data sent into them, and data with credentials of
//! its sender.

use std::ptr;

use crate::{
    Row,
    files::{ready, watch},
    kit::{Checkpoint, Verdict, bytes, lacks, read_some, same, write_all},
    sockets::{
        abstract_name, accept, connected, listening, pair, path_name, receive, receive_descriptors,
        receive_with_control, send_descriptors, set_option,
    },
};

pub const ROWS: &[Row] = &[
    ("unix_pending_order", unix_pending_order),
    ("unix_pending_closed", unix_pending_closed),
    ("unix_pending_packets", unix_pending_packets),
    ("unix_pending_credentials", unix_pending_credentials),
    ("unix_queued_credentials", unix_queued_credentials),
    ("unix_nested_descriptors", unix_nested_descriptors),
    ("unix_urgent", unix_urgent),
    ("unix_queued_epoll", unix_queued_epoll),
    ("unix_queued_pidfd_senders", unix_queued_pidfd_senders),
];

/// The pid that a socket shows of its peer.
fn peer_pid(fd: i32) -> Result<i32, String> {
    let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as u32;
    let at = (&raw mut found).cast();
    sys!(getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, at, &raw mut length))?;
    Ok(found.pid)
}

fn own_pid() -> i32 {
    std::process::id().cast_signed()
}

/// All that was sent, to the end or until there is nothing.
fn drained(fd: i32) -> Result<Vec<u8>, String> {
    let mut found = Vec::new();
    while let Some(more) = receive(fd)?.filter(|more| !more.is_empty()) {
        found.extend(more);
    }
    Ok(found)
}

/// Connections of several processes, with data of any length.
fn unix_pending_order(checkpoint: &Checkpoint) -> Verdict {
    let name = path_name(checkpoint, "socket");
    let server = listening(&name, libc::SOCK_STREAM)?;
    let kind = libc::SOCK_STREAM;
    let [first, second] = [connected(&name, kind)?, connected(&name, kind)?];
    let child = checkpoint.fork(|child| {
        let own = connected(&name, kind)?;
        write_all(own, b"of the child")?;
        child.wait();
        child.wait_mark("accepted")?;
        same("answer", &b"answer"[..], &read_some(own, 100)?[..])
    })?;
    let last = connected(&name, kind)?;
    // Data that does not fit into the head of a message is in pages.
    let large = bytes(7, 100_000);
    write_all(last, &large)?;
    write_all(first, b"one, ")?;
    write_all(first, b"two")?;
    sys!(shutdown(first, libc::SHUT_WR))?;
    let mut pipe = [0; 2];
    sys!(pipe2(pipe.as_mut_ptr(), 0))?;
    send_descriptors(second, b"pipe", &[pipe[1]])?;
    checkpoint.wait();
    let end = accept(server)?;
    same("process of the first", own_pid(), peer_pid(end)?)?;
    same("bytes of the first", &b"one, two"[..], &drained(end)?[..])?;
    same("the end", Some(Vec::new()), receive(end)?)?;
    let end = accept(server)?;
    let (data, got) = receive_descriptors(end)?;
    same("message of the second", (&b"pipe"[..], 1), (&data[..], got.len()))?;
    write_all(got[0], b"through it")?;
    same("bytes of the pipe", &b"through it"[..], &read_some(pipe[0], 100)?[..])?;
    write_all(end, b"back")?;
    same("bytes back", &b"back"[..], &read_some(second, 100)?[..])?;
    let end = accept(server)?;
    same("process of the third", child.pid, peer_pid(end)?)?;
    same("bytes of the third", &b"of the child"[..], &read_some(end, 100)?[..])?;
    write_all(end, b"answer")?;
    checkpoint.mark("accepted");
    child.join()?;
    let end = accept(server)?;
    ensure!(drained(end)? == large, "bytes of the last have changed");
    sys!(fcntl(server, libc::F_SETFL, libc::O_NONBLOCK))?;
    ensure!(accept(server).is_err(), "one connection too many");
    Ok(())
}

/// Sockets that have connected, sent something and are closed.
fn unix_pending_closed(checkpoint: &Checkpoint) -> Verdict {
    let name = abstract_name(&format!("closed {}", own_pid()));
    let kind = libc::SOCK_STREAM;
    let server = listening(&name, kind)?;
    let large = bytes(8, 60_000);
    for data in [&b""[..], b"the last words", &large] {
        let client = connected(&name, kind)?;
        write_all(client, data)?;
        sys!(close(client))?;
    }
    let open = connected(&name, kind)?;
    checkpoint.wait();
    for data in [&b""[..], b"the last words", &large] {
        let end = accept(server)?;
        same("process", own_pid(), peer_pid(end)?)?;
        ensure!(drained(end)? == data, "{} bytes have changed", data.len());
        same("the end", Some(Vec::new()), receive(end)?)?;
    }
    let end = accept(server)?;
    same("nothing yet", None, receive(end)?)?;
    write_all(open, b"later")?;
    same("bytes of the open one", Some(b"later".to_vec()), receive(end)?)
}

fn unix_pending_packets(checkpoint: &Checkpoint) -> Verdict {
    let name = path_name(checkpoint, "socket");
    let kind = libc::SOCK_SEQPACKET;
    let server = listening(&name, kind)?;
    let client = connected(&name, kind)?;
    let large = bytes(9, 30_000);
    for data in [&b"one"[..], &large, b"three"] {
        write_all(client, data)?;
    }
    checkpoint.wait();
    let end = accept(server)?;
    for data in [&b"one"[..], &large, b"three"] {
        ensure!(receive(end)?.as_deref() == Some(data), "a packet of {} bytes", data.len());
    }
    same("one packet too many", None, receive(end)?)
}

/// Receives up to `len` bytes and the process that has sent them.
fn receive_from(fd: i32, len: usize) -> Result<(Vec<u8>, i32, u32), String> {
    let (data, control) = receive_with_control(fd, len)?;
    let (kind, bytes) = control.ok_or("no credentials")?;
    ensure!(kind == libc::SCM_CREDENTIALS, "other control data");
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    // `struct ucred`: pid, user, group.
    Ok((data, word(0).cast_signed(), word(4)))
}

/// A server that asks for the sender, as those of logs do.
fn unix_pending_credentials(checkpoint: &Checkpoint) -> Verdict {
    let name = path_name(checkpoint, "socket");
    let kind = libc::SOCK_STREAM;
    let server = listening(&name, kind)?;
    set_option(server, libc::SOL_SOCKET, libc::SO_PASSCRED, 1)?;
    let client = connected(&name, kind)?;
    write_all(client, b"parent")?;
    let child = checkpoint.fork(|child| {
        write_all(client, b"child")?;
        child.wait();
        child.wait_mark("read")
    })?;
    checkpoint.wait();
    let end = accept(server)?;
    same("first", (b"parent".to_vec(), own_pid(), 0), receive_from(end, 100)?)?;
    same("second", (b"child".to_vec(), child.pid, 0), receive_from(end, 100)?)?;
    checkpoint.mark("read");
    child.join()
}

/// Data of a living process, and of one that has ended, of another user.
fn unix_queued_credentials(checkpoint: &Checkpoint) -> Verdict {
    let kinds = [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET];
    let mut ends = Vec::new();
    for kind in kinds {
        let [left, right] = pair(kind)?;
        set_option(right, libc::SOL_SOCKET, libc::SO_PASSCRED, 1)?;
        write_all(left, b"parent")?;
        // SAFETY: the child makes two calls and exits.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: the bytes outlive the call; nothing needs to be unwound.
            unsafe {
                libc::setuid(1234);
                libc::write(left, b"ended".as_ptr().cast(), 5);
                libc::_exit(0);
            }
        }
        sys!(waitpid(pid, ptr::null_mut(), 0))?;
        write_all(left, b"again")?;
        ends.push((right, pid));
    }
    checkpoint.wait();
    for (right, pid) in ends {
        same("first", (b"parent".to_vec(), own_pid(), 0), receive_from(right, 100)?)?;
        same("second", (b"ended".to_vec(), pid, 1234), receive_from(right, 100)?)?;
        same("third", (b"again".to_vec(), own_pid(), 0), receive_from(right, 100)?)?;
    }
    Ok(())
}

fn received_one(fd: i32, what: &str) -> Result<i32, String> {
    let (data, got) = receive_descriptors(fd)?;
    same("message", (what.as_bytes(), 1), (&data[..], got.len()))?;
    Ok(got[0])
}

/// Descriptors queued in sockets that are queued themselves, and in themselves.
fn unix_nested_descriptors(checkpoint: &Checkpoint) -> Verdict {
    // Each end is only in the queue of the one before.
    let outermost = pair(libc::SOCK_STREAM)?;
    let mut last = outermost[0];
    for depth in 0..5 {
        let kind = if depth % 2 == 0 { libc::SOCK_DGRAM } else { libc::SOCK_SEQPACKET };
        let [left, right] = pair(kind)?;
        send_descriptors(last, b"deeper", &[right])?;
        sys!(close(right))?;
        last = left;
    }
    let mut pipe = [0; 2];
    sys!(pipe2(pipe.as_mut_ptr(), 0))?;
    write_all(pipe[1], b"at the bottom")?;
    send_descriptors(last, b"pipe", &[pipe[0]])?;
    sys!(close(pipe[0]))?;
    // A socket that is in its own queue.
    let own = pair(libc::SOCK_STREAM)?;
    send_descriptors(own[0], b"itself", &[own[1]])?;
    // A listening socket with a connection that waits, which is nowhere but in a queue.
    let name = path_name(checkpoint, "queued");
    let server = listening(&name, libc::SOCK_STREAM)?;
    let client = connected(&name, libc::SOCK_STREAM)?;
    write_all(client, b"patient")?;
    let carrier = pair(libc::SOCK_STREAM)?;
    send_descriptors(carrier[0], b"server", &[server])?;
    sys!(close(server))?;
    checkpoint.wait();
    let mut at = outermost[1];
    for _ in 0..5 {
        at = received_one(at, "deeper")?;
    }
    let bottom = received_one(at, "pipe")?;
    same("bytes of the pipe", &b"at the bottom"[..], &read_some(bottom, 100)?[..])?;
    let itself = received_one(own[1], "itself")?;
    write_all(own[0], b"once")?;
    same("bytes", &b"once"[..], &read_some(itself, 100)?[..])?;
    same("bytes once more", None, receive(own[1])?)?;
    let server = received_one(carrier[1], "server")?;
    let end = accept(server)?;
    same("bytes that waited", Some(b"patient".to_vec()), receive(end)?)
}

/// Out-of-band bytes, before and behind other data.
fn unix_urgent(checkpoint: &Checkpoint) -> Verdict {
    let oob = |fd: i32, data: &[u8]| {
        sys!(send(fd, data.as_ptr().cast(), data.len(), libc::MSG_OOB)).map(drop)
    };
    let mut ends = Vec::new();
    for (before, behind) in [(&b""[..], &b""[..]), (b"before", b""), (b"before", b"behind")] {
        let [left, right] = pair(libc::SOCK_STREAM)?;
        write_all(left, before)?;
        oob(left, b"!")?;
        write_all(left, behind)?;
        ends.push((right, before, behind));
    }
    // A part of the data before it was read.
    let [left, right] = pair(libc::SOCK_STREAM)?;
    write_all(left, b"partly read")?;
    oob(left, b"with the last?")?;
    same("the first part", &b"partly "[..], &read_some(right, 7)?[..])?;
    checkpoint.wait();
    let urgent = |fd: i32| -> Result<u8, String> {
        let mut byte = 0_u8;
        sys!(recv(fd, (&raw mut byte).cast(), 1, libc::MSG_OOB))?;
        Ok(byte)
    };
    for (right, before, behind) in ends {
        same("urgent byte", b'!', urgent(right)?)?;
        for data in [before, behind] {
            if !data.is_empty() {
                same("data", Some(data.to_vec()), receive(right)?)?;
            }
        }
        same("one byte too many", None, receive(right)?)?;
    }
    same("data before the mark", Some(b"readwith the last".to_vec()), receive(right)?)?;
    same("urgent byte", b'?', urgent(right)?)
}

/// An epoll instance that is nowhere but in the queue of a socket which it watches.
fn unix_queued_epoll(checkpoint: &Checkpoint) -> Verdict {
    let [left, right] = pair(libc::SOCK_STREAM)?;
    let epoll = sys!(epoll_create1(libc::EPOLL_CLOEXEC))?;
    watch(epoll, right, libc::EPOLLIN, 0x1234)?;
    send_descriptors(left, b"epoll", &[epoll])?;
    sys!(close(epoll))?;
    checkpoint.wait();
    let epoll = received_one(right, "epoll")?;
    same("events of an empty queue", Vec::new(), ready(epoll)?)?;
    write_all(left, b"x")?;
    same("events", vec![(0x1234, libc::EPOLLIN as u32)], ready(epoll)?)
}

/// Data for a socket that asks for the pidfds of senders.
fn unix_queued_pidfd_senders(checkpoint: &Checkpoint) -> Verdict {
    const SO_PASSPIDFD: i32 = 76;
    let [left, right] = pair(libc::SOCK_STREAM)?;
    if set_option(right, libc::SOL_SOCKET, SO_PASSPIDFD, 1).is_err() {
        return lacks("SO_PASSPIDFD");
    }
    write_all(left, b"queued")?;
    checkpoint.wait();
    same("bytes", Some(b"queued".to_vec()), receive(right)?)
}
