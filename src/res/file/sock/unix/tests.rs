//! Dumps sockets of the test process, closes them, restores them, and compares.

use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::{
            fs::{MetadataExt, PermissionsExt},
            net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
        },
    },
    sync::atomic::{AtomicU32, Ordering},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr,
        getpeername, getsockname, sendmsg, setsockopt, shutdown, socketpair, sockopt,
    },
    unistd::pipe,
};

use crate::{
    image::proto,
    res::file::{
        DumpOptions, FileError, Opened, RestoreOptions, UnixOptions,
        owner::Holder,
        sock::testing::{dump, odd_options, option, receive_all, refused, set_odd_options, unix},
    },
    sys::socket,
    units::{NsPid, PidMap, TargetFd},
};

fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

fn send(fd: &impl AsFd, bytes: &[u8]) {
    nix::sys::socket::send(fd.as_fd().as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT).unwrap();
}

fn send_fds(fd: &impl AsFd, bytes: &[u8], fds: &[BorrowedFd]) {
    let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let data = [std::io::IoSlice::new(bytes)];
    let rights = [ControlMessage::ScmRights(&fds)];
    let flags = MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(fd.as_fd().as_raw_fd(), &data, &rights, flags, None).unwrap();
}

fn name(fd: BorrowedFd) -> String {
    getsockname::<UnixAddr>(fd.as_raw_fd()).unwrap().to_string()
}

fn peer_name(fd: BorrowedFd) -> String {
    getpeername::<UnixAddr>(fd.as_raw_fd()).unwrap().to_string()
}

/// Returns an abstract name that no other socket has.
fn abstract_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("rcriu-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    SocketAddr::from_abstract_name(name).unwrap()
}

fn defaults() -> DumpOptions {
    DumpOptions::default()
}

#[test]
fn pairs_keep_what_is_queued_in_both_directions() {
    for (kind, pieces) in [(SockType::Stream, 1), (SockType::Datagram, 2), (SockType::SeqPacket, 2)]
    {
        let (a, b) = pair(kind);
        send(&a, b"one");
        send(&a, b"three");
        send(&b, b"back");
        let dumped = dump(vec![a, b], &defaults()).unwrap();
        let restored = dumped.open().unwrap();
        let messages = receive_all(restored.get(1), 100);
        assert_eq!((messages.len(), messages.concat()), (pieces, b"onethree".to_vec()));
        assert_eq!(receive_all(restored.get(0), 100), [b"back"]);
        send(&restored.get(0), b"again");
        assert_eq!(receive_all(restored.get(1), 100), [b"again"]);
    }
}

#[test]
fn looking_at_a_queue_takes_nothing_out() {
    for kind in [SockType::Stream, SockType::Datagram, SockType::SeqPacket] {
        let (a, b) = pair(kind);
        send_fds(&a, b"first", &[a.as_fd()]);
        send(&a, b"second");
        socket::set_option(b.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, &3).unwrap();
        let watched = b.try_clone().unwrap();
        dump(vec![a, b], &defaults()).unwrap();
        let offset: i32 =
            socket::option(watched.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap();
        assert_eq!(offset, 3);
        let first = socket::receive(watched.as_fd(), &mut [0; 5], MsgFlags::MSG_DONTWAIT).unwrap();
        assert_eq!((first.len, first.fds.len()), (5, 1));
        assert_eq!(receive_all(watched.as_fd(), 100), [b"second"]);
    }
}

#[test]
fn large_packets_and_empty_ones_are_kept() {
    let (a, b) = pair(SockType::Datagram);
    setsockopt(&a, sockopt::SndBuf, &2_000_000).unwrap();
    let large: Vec<u8> = (0..300_000_u32).map(|at| (at % 251) as u8).collect();
    send(&a, &large);
    send(&a, b"");
    send(&a, b"small");
    let dumped = dump(vec![a, b], &defaults()).unwrap();
    let restored = dumped.open().unwrap();
    let mut buffer = vec![0; 400_000];
    let mut receive = || {
        let (fd, flags) = (restored.get(1), MsgFlags::MSG_DONTWAIT);
        let len = socket::receive(fd, &mut buffer, flags).unwrap().len;
        buffer[..len].to_vec()
    };
    assert!(receive() == large);
    assert_eq!(receive(), b"");
    assert_eq!(receive(), b"small");
}

#[test]
fn a_pair_whose_other_end_is_closed_is_closed_again() {
    for kind in [SockType::Stream, SockType::SeqPacket] {
        let (a, b) = pair(kind);
        send(&a, b"last");
        drop(a);
        let dumped = dump(vec![b], &defaults()).unwrap();
        assert_eq!((unix(&dumped, 0).peer, unix(&dumped, 0).shutdown), (0, Some(3)));
        let restored = dumped.open().unwrap();
        let mut stream: UnixStream = restored.take_as(0);
        let mut text = Vec::new();
        stream.read_to_end(&mut text).unwrap();
        assert_eq!(text, b"last");
        assert_eq!(stream.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    }
    let (a, b) = pair(SockType::Datagram);
    send(&a, b"last");
    drop(a);
    let restored = dump(vec![b], &defaults()).unwrap().open().unwrap();
    let datagram: UnixDatagram = restored.take_as(0);
    assert_eq!(receive_all(datagram.as_fd(), 10), [b"last"]);
    assert_eq!(datagram.send(b"x").unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn directions_that_are_shut_down_stay_so() {
    let (a, b) = pair(SockType::Stream);
    send(&a, b"end");
    shutdown(a.as_raw_fd(), Shutdown::Write).unwrap();
    let dumped = dump(vec![a, b], &defaults()).unwrap();
    assert_eq!((unix(&dumped, 0).shutdown, unix(&dumped, 1).shutdown), (Some(2), Some(1)));
    let restored = dumped.open().unwrap();
    let mut text = Vec::new();
    restored.take_as::<UnixStream>(1).read_to_end(&mut text).unwrap();
    assert_eq!(text, b"end");
    send(&restored.get(1), b"still");
    assert_eq!(receive_all(restored.get(0), 10), [b"still"]);
}

#[test]
fn queued_descriptors_come_with_the_bytes_they_were_sent_with() {
    let (a, b) = pair(SockType::Stream);
    let (reader, writer) = pipe().unwrap();
    send(&a, b"plain");
    send_fds(&a, b"two", &[reader.as_fd(), writer.as_fd()]);
    send_fds(&a, b"one", &[writer.as_fd()]);
    send(&a, b"rest");
    let dumped = dump(vec![a, b], &defaults()).unwrap();
    drop((reader, writer));
    let restored = dumped.open().unwrap();
    let mut buffer = [0; 5];
    let mut next = |len: usize| {
        let (fd, flags) = (restored.get(1), MsgFlags::MSG_DONTWAIT);
        let received = socket::receive(fd, &mut buffer[..len], flags).unwrap();
        (buffer[..received.len].to_vec(), received.fds)
    };
    let (text, fds) = next(5);
    assert_eq!((&text[..], fds.len()), (&b"plain"[..], 0));
    let (text, fds) = next(3);
    assert_eq!((&text[..], fds.len()), (&b"two"[..], 2));
    nix::unistd::write(&fds[1], b"through").unwrap();
    let mut through = [0; 7];
    nix::unistd::read(&fds[0], &mut through).unwrap();
    assert_eq!(&through, b"through");
    let (text, fds) = next(3);
    assert_eq!((&text[..], fds.len()), (&b"one"[..], 1));
    let (text, fds) = next(4);
    assert_eq!((&text[..], fds.len()), (&b"rest"[..], 0));
}

#[test]
fn descriptors_behind_much_data_stay_behind_it() {
    let (a, b) = pair(SockType::Stream);
    setsockopt(&a, sockopt::SndBuf, &2_000_000).unwrap();
    let much = vec![b'x'; 300_000];
    send(&a, &much);
    send_fds(&a, b"fd", &[a.as_fd()]);
    let restored = dump(vec![a, b], &defaults()).unwrap().open().unwrap();
    let mut buffer = vec![0; much.len()];
    let mut found = 0;
    while found < much.len() {
        let room = &mut buffer[found..];
        let received = socket::receive(restored.get(1), room, MsgFlags::MSG_DONTWAIT).unwrap();
        assert!(received.fds.is_empty());
        found += received.len;
    }
    assert!(buffer == much);
    let last = socket::receive(restored.get(1), &mut buffer, MsgFlags::MSG_DONTWAIT).unwrap();
    assert_eq!((&buffer[..last.len], last.fds.len()), (&b"fd"[..], 1));
}

#[test]
fn a_socket_that_only_a_queue_holds_is_restored_in_it() {
    let (a, b) = pair(SockType::SeqPacket);
    let (c, d) = pair(SockType::Stream);
    send(&c, b"inside");
    send_fds(&a, b"d", &[d.as_fd()]);
    drop(d);
    let restored = dump(vec![a, b, c], &defaults()).unwrap().open().unwrap();
    let received = socket::receive(restored.get(1), &mut [0], MsgFlags::MSG_DONTWAIT).unwrap();
    assert_eq!(receive_all(received.fds[0].as_fd(), 10), [b"inside"]);
    send(&received.fds[0], b"out");
    assert_eq!(receive_all(restored.get(2), 10), [b"out"]);
}

#[test]
fn connections_through_a_listening_socket_keep_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = SocketAddr::from_pathname(dir.path().join("socket")).unwrap();
    for address in [path, abstract_address()] {
        let listener = UnixListener::bind_addr(&address).unwrap();
        let client = UnixStream::connect_addr(&address).unwrap();
        let (server, _) = listener.accept().unwrap();
        (&client).write_all(b"question").unwrap();
        (&server).write_all(b"answer").unwrap();
        let waiting = UnixStream::connect_addr(&address).unwrap();
        let expected = name(listener.as_fd());
        let fds: Vec<OwnedFd> = vec![server.into(), client.into(), waiting.into(), listener.into()];
        let dumped = dump(fds, &defaults()).unwrap();
        assert_eq!(unix(&dumped, 2).peer, unix(&dumped, 3).ino);
        let restored = dumped.open().unwrap();
        assert_eq!(name(restored.get(0)), expected);
        assert_eq!(peer_name(restored.get(1)), expected);
        assert_eq!(peer_name(restored.get(2)), expected);
        assert_eq!(receive_all(restored.get(0), 10), [b"question"]);
        assert_eq!(receive_all(restored.get(1), 10), [b"answer"]);
        let listener: UnixListener = restored.take_as(3);
        send(&restored.get(2), b"late");
        let (accepted, _) = listener.accept().unwrap();
        assert_eq!(receive_all(accepted.as_fd(), 10), [b"late"]);
        // Clients still find the listening socket at its name.
        let client = UnixStream::connect_addr(&address).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        (&client).write_all(b"new").unwrap();
        assert_eq!(receive_all(accepted.as_fd(), 10), [b"new"]);
    }
}

#[test]
fn connections_keep_their_names_without_the_listening_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    for address in [SocketAddr::from_pathname(&path).unwrap(), abstract_address()] {
        let listener = UnixListener::bind_addr(&address).unwrap();
        let ends = || {
            let client = UnixStream::connect_addr(&address).unwrap();
            let (server, _) = listener.accept().unwrap();
            [OwnedFd::from(client), server.into()]
        };
        let fds: Vec<OwnedFd> = ends().into_iter().chain(ends()).collect();
        let expected = name(listener.as_fd());
        drop(listener);
        let restored = dump(fds, &defaults()).unwrap().open().unwrap();
        for (client, server) in [(0, 1), (2, 3)] {
            assert_eq!(peer_name(restored.get(client)), expected);
            assert_eq!(name(restored.get(server)), expected);
            send(&restored.get(client), b"x");
            assert_eq!(receive_all(restored.get(server), 10), [b"x"]);
        }
    }
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
}

#[test]
fn the_file_of_a_socket_has_its_owner_and_permissions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o751)).unwrap();
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(&path, Some(12), Some(34)).unwrap();
    }
    let before = fs::metadata(&path).unwrap();
    let dumped = dump(vec![listener], &defaults()).unwrap();
    // A process that another test has just forked may keep the socket open a moment longer.
    let open_in_time = || {
        for _ in 0..500 {
            if let Ok(opened) = dumped.open() {
                return opened;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        dumped.open().unwrap()
    };
    let restored = open_in_time();
    let after = fs::metadata(&path).unwrap();
    let facts = |found: &fs::Metadata| (found.mode(), found.uid(), found.gid());
    assert_eq!(facts(&after), facts(&before));
    // This time, the file belongs to an open socket.
    let error = dumped.open().unwrap_err();
    assert!(matches!(error, FileError::Restore { step: "bind", .. }), "{error:?}");
    drop(restored);
    open_in_time();
}

#[test]
fn a_socket_whose_file_is_deleted_leaves_the_new_file_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gone").join("socket");
    fs::create_dir(dir.path().join("gone")).unwrap();
    let server = UnixDatagram::bind(&path).unwrap();
    let client = UnixDatagram::unbound().unwrap();
    client.connect(&path).unwrap();
    client.send(b"queued").unwrap();
    fs::remove_dir_all(dir.path().join("gone")).unwrap();
    let dumped = dump(vec![client, server], &defaults()).unwrap();
    assert_eq!(unix(&dumped, 1).deleted, Some(true));
    let check = || {
        let restored = dumped.open().unwrap();
        assert_eq!(name(restored.get(1)), path.display().to_string());
        send(&restored.get(0), b"new");
        assert_eq!(receive_all(restored.get(1), 10), [&b"queued"[..], b"new"]);
    };
    check();
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    fs::create_dir(dir.path().join("gone")).unwrap();
    fs::write(&path, "another").unwrap();
    check();
    assert_eq!(fs::read_to_string(&path).unwrap(), "another");
}

#[test]
fn a_relative_name_stays_relative() {
    let dir = tempfile::tempdir().unwrap();
    let (listener, client) = std::thread::scope(|scope| {
        let bind = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
            nix::unistd::chdir(dir.path()).unwrap();
            let listener = UnixListener::bind("socket").unwrap();
            let client = UnixStream::connect("socket").unwrap();
            (OwnedFd::from(listener), OwnedFd::from(client))
        };
        scope.spawn(bind).join().unwrap()
    });
    let dumped = dump(vec![listener, client], &defaults()).unwrap();
    let entry = unix(&dumped, 0);
    assert_eq!(entry.name, b"socket\0");
    assert_eq!(entry.name_dir.as_deref(), Some(dir.path().as_os_str().as_encoded_bytes()));
    let restored = dumped.open().unwrap();
    assert_eq!(name(restored.get(0)), "socket");
    assert_eq!(peer_name(restored.get(1)), "socket");
    UnixStream::connect(dir.path().join("socket")).unwrap();
}

#[test]
fn datagram_sockets_are_connected_as_they_were() {
    let (first, second) = (abstract_address(), abstract_address());
    let server = UnixDatagram::bind_addr(&first).unwrap();
    let named = UnixDatagram::bind_addr(&second).unwrap();
    named.connect_addr(&first).unwrap();
    named.send(b"named").unwrap();
    let unnamed = UnixDatagram::unbound().unwrap();
    unnamed.connect_addr(&second).unwrap_err();
    unnamed.connect_addr(&first).unwrap();
    // From here on the socket accepts data only from its peer; other senders do not notice.
    server.connect_addr(&first).unwrap();
    server.send(b"self").unwrap();
    let restored = dump(vec![unnamed, named, server], &defaults()).unwrap().open().unwrap();
    let server = restored.get(2);
    assert_eq!(peer_name(restored.get(0)), peer_name(restored.get(1)));
    assert_eq!(peer_name(server), name(server));
    assert_eq!(receive_all(server, 10), [&b"named"[..], b"self"]);
    let unnamed: UnixDatagram = restored.take_as(0);
    assert_eq!(unnamed.send(b"x").unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
}

#[test]
fn datagram_sockets_with_names_may_be_connected_to_each_other() {
    let (first, second) = (abstract_address(), abstract_address());
    let a = UnixDatagram::bind_addr(&first).unwrap();
    let b = UnixDatagram::bind_addr(&second).unwrap();
    let c = UnixDatagram::unbound().unwrap();
    c.connect_addr(&second).unwrap();
    a.connect_addr(&second).unwrap();
    b.connect_addr(&first).unwrap();
    a.send(b"ab").unwrap();
    b.send(b"ba").unwrap();
    let restored = dump(vec![a, b, c], &defaults()).unwrap().open().unwrap();
    let (a, b) = (restored.take_as::<UnixDatagram>(0), restored.take_as::<UnixDatagram>(1));
    let mut buffer = [0; 10];
    let (len, sender) = b.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..len], sender.as_abstract_name()), (&b"ab"[..], first.as_abstract_name()));
    assert_eq!(receive_all(a.as_fd(), 10), [b"ba"]);
    assert_eq!(peer_name(restored.get(2)), name(restored.get(1)));
}

#[test]
fn lone_sockets_options_and_flags_are_restored() {
    for kind in [SockType::Stream, SockType::Datagram, SockType::SeqPacket] {
        let lone =
            nix::sys::socket::socket(AddressFamily::Unix, kind, SockFlag::SOCK_NONBLOCK, None)
                .unwrap();
        let (a, b) = pair(kind);
        for fd in [&lone, &a] {
            set_odd_options(fd);
            setsockopt(fd, sockopt::PassCred, &true).unwrap();
        }
        let before = [odd_options(&lone), odd_options(&a), odd_options(&b)];
        let restored = dump(vec![lone, a, b], &defaults()).unwrap().open().unwrap();
        for (id, before) in (0..).zip(&before) {
            assert_eq!(&odd_options(&restored.get(id)), before, "{id}");
        }
        let passes = |id| option(&restored.get(id), sockopt::PassCred);
        assert_eq!((passes(0), passes(1), passes(2)), (true, true, false));
        let flags =
            |id| OFlag::from_bits_retain(fcntl(restored.get(id), FcntlArg::F_GETFL).unwrap());
        assert!(flags(0).contains(OFlag::O_NONBLOCK) && !flags(1).contains(OFlag::O_NONBLOCK));
    }
}

#[test]
fn sockets_whose_peers_are_elsewhere_are_refused_by_name() {
    let (a, _b) = pair(SockType::Stream);
    let message = refused(vec![a], &DumpOptions { unix: UnixOptions::new(true), ..defaults() });
    assert!(message.contains("the UNIX stream socket ["), "{message}");
    assert!(message.contains("is not open in the tree"), "{message}");

    let address = abstract_address();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let client = UnixStream::connect_addr(&address).unwrap();
    let message = refused(vec![listener.try_clone().unwrap()], &defaults());
    assert!(message.contains("is not open in the tree"), "{message}");
    let policy = DumpOptions { unix: UnixOptions::default().skip_in_flight(true), ..defaults() };
    let left_out = dump(vec![listener], &policy).unwrap().restore();
    let restored: UnixListener = left_out.take_as(0);
    restored.set_nonblocking(true).unwrap();
    assert!(restored.accept().is_err(), "the connection is not left out");
    drop(client);
}

#[test]
fn datagram_sockets_find_external_servers_by_name() {
    let address = abstract_address();
    let server = UnixDatagram::bind_addr(&address).unwrap();
    let client = UnixDatagram::unbound().unwrap();
    client.connect_addr(&address).unwrap();
    let clone = client.try_clone().unwrap();
    let message = refused(vec![clone], &defaults());
    assert!(message.contains("--ext-unix-sk") && message.contains("not open"), "{message}");

    let policy = DumpOptions { unix: UnixOptions::new(true), ..defaults() };
    let mut dumped = dump(vec![client], &policy).unwrap();
    let restored = dumped.open().unwrap();
    send(&restored.get(0), b"hello");
    assert_eq!(receive_all(server.as_fd(), 10), [b"hello"]);
    dumped.options.unix = UnixOptions::new(false);
    let error = dumped.open().unwrap_err();
    assert!(error.to_string().contains("use --ext-unix-sk"), "{error}");
}

#[test]
fn the_process_that_listened_listens_once_more() {
    let listener = UnixListener::bind_addr(&abstract_address()).unwrap();
    let lone = UnixDatagram::unbound().unwrap();
    let dumped = dump(vec![OwnedFd::from(listener), lone.into()], &defaults()).unwrap();
    let own = std::process::id().cast_signed();
    assert_eq!(dumped.entries[0].sock.as_ref().unwrap().peer.as_ref().unwrap().pid, own);
    let entries = dumped.entries.clone();
    let mut opened = Opened::new(
        &crate::image::Directory::at(dumped.images()).shared(),
        &RestoreOptions::default(),
        entries.clone(),
        PidMap::of_own_namespace(),
    );
    let creds = std::rc::Rc::new(proto::CredsEntry::default());
    opened.holders = [0, 1]
        .map(|id| (dumped.entry(id).id, Holder { pid: NsPid::of_image(own), creds: creds.clone() }))
        .into();
    let mut opener = (super::KIND.opener)(&RestoreOptions::default());
    opener.open(&entries, &mut opened).unwrap();
    let calls = [own, own + 1].map(|pid| {
        let mut script = crate::inject::Script::new();
        let at = |_| Ok(TargetFd(3));
        opener.prepare_process(NsPid::of_image(pid), &at, &mut script).unwrap();
        script.is_empty()
    });
    assert_eq!(calls, [false, true]);
}

#[test]
fn an_error_is_seen_and_not_taken() {
    for kind in [SockType::Stream, SockType::SeqPacket] {
        let (a, b) = pair(kind);
        send(&a, b"never read");
        drop(b);
        let watched = a.try_clone().unwrap();
        for _ in 0..2 {
            let dumped = dump(vec![a.try_clone().unwrap()], &defaults()).unwrap();
            let error = dumped.entries[0].sock.as_ref().unwrap().error;
            assert_eq!(error, Some(libc::ECONNRESET.cast_unsigned()));
        }
        assert_eq!(option(&watched, sockopt::SocketError), libc::ECONNRESET);
    }
}

#[test]
fn a_renamed_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("a")).unwrap();
    fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
    let message = refused(vec![listener], &defaults());
    assert!(message.contains("/b\nhelp: images"), "{message}");
}
