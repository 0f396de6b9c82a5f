//! Dumps sockets of the test process, closes them, restores them, and compares.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use nix::{
    libc,
    sys::socket::{Shutdown, SockaddrStorage, bind, setsockopt, shutdown, sockopt},
};

use super::dump::words;
use crate::{
    res::file::{
        DumpOptions, FileError,
        sock::testing::{dump, inet, odd_options, option, receive_all, refused, set_odd_options},
    },
    sys::socket,
};

fn localhosts() -> [SocketAddr; 2] {
    [(Ipv4Addr::LOCALHOST, 0).into(), (Ipv6Addr::LOCALHOST, 0).into()]
}

fn tcp(family: i32) -> OwnedFd {
    socket::create(family, libc::SOCK_STREAM, libc::IPPROTO_TCP).unwrap()
}

fn defaults() -> DumpOptions {
    DumpOptions::default()
}

#[test]
fn listening_sockets_listen_again() {
    for address in localhosts() {
        let listener = TcpListener::bind(address).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(7).unwrap()).unwrap();
        listener.set_nonblocking(true).unwrap();
        set_odd_options(&listener);
        setsockopt(&listener, sockopt::TcpNoDelay, &true).unwrap();
        setsockopt(&listener, sockopt::TcpKeepIdle, &77).unwrap();
        let (before, options) = (listener.local_addr().unwrap(), odd_options(&listener));
        let dumped = dump(vec![listener], &defaults()).unwrap();
        assert_eq!((inet(&dumped, 0).state, inet(&dumped, 0).backlog), (10, 7));
        let restored = dumped.open().unwrap();
        let listener: TcpListener = restored.take_as(0);
        assert_eq!(listener.local_addr().unwrap(), before);
        assert_eq!(odd_options(&listener), options);
        assert!(option(&listener, sockopt::TcpNoDelay));
        assert_eq!(option(&listener, sockopt::TcpKeepIdle), 77);
        assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        let client = TcpStream::connect(before).unwrap();
        assert_eq!(listener.accept().unwrap().1, client.local_addr().unwrap());
        // Another socket has the address now.
        let error = dumped.open().unwrap_err();
        assert!(matches!(error, FileError::Restore { step: "bind", .. }), "{error:?}");
        assert!(error.to_string().contains(&before.to_string()), "{error}");
    }
}

#[test]
fn tcp_sockets_that_are_not_used_yet_are_made_again() {
    for address in localhosts() {
        let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let bound = tcp(family);
        bind(bound.as_raw_fd(), &SockaddrStorage::from(address)).unwrap();
        let before = std::mem::ManuallyDrop::new(TcpListener::from(bound.try_clone().unwrap()));
        let before_name = before.local_addr().unwrap();
        drop(std::mem::ManuallyDrop::into_inner(before));
        let restored = dump(vec![tcp(family), bound], &defaults()).unwrap().open().unwrap();
        let [plain, bound]: [TcpListener; 2] = [restored.take_as(0), restored.take_as(1)];
        assert_eq!(plain.local_addr().unwrap().port(), 0);
        assert_eq!(bound.local_addr().unwrap(), before_name);
        let backlog = nix::sys::socket::Backlog::new(1).unwrap();
        nix::sys::socket::listen(&bound, backlog).unwrap();
        let stream: TcpStream = plain.try_clone().map(OwnedFd::from).unwrap().into();
        nix::sys::socket::connect(stream.as_raw_fd(), &SockaddrStorage::from(before_name)).unwrap();
        bound.accept().unwrap();
    }
}

#[test]
fn sockets_that_share_a_port_share_it_again() {
    let reuse = |fd: &OwnedFd, on: bool| {
        setsockopt(fd, sockopt::ReuseAddr, &on).unwrap();
        setsockopt(fd, sockopt::ReusePort, &on).unwrap();
    };
    for forget in [false, true] {
        let [a, b] = [tcp(libc::AF_INET), tcp(libc::AF_INET)];
        reuse(&a, true);
        reuse(&b, true);
        bind(a.as_raw_fd(), &SockaddrStorage::from(localhosts()[0])).unwrap();
        let name: SockaddrStorage = nix::sys::socket::getsockname(a.as_raw_fd()).unwrap();
        bind(b.as_raw_fd(), &name).unwrap();
        if forget {
            reuse(&a, false);
            reuse(&b, false);
        }
        let restored = dump(vec![a, b], &defaults()).unwrap().open().unwrap();
        for id in [0, 1] {
            let fd = restored.get(id);
            let after: SockaddrStorage = nix::sys::socket::getsockname(fd.as_raw_fd()).unwrap();
            assert_eq!(after, name);
            assert_eq!(option(&fd, sockopt::ReusePort), !forget);
            assert_eq!(option(&fd, sockopt::ReuseAddr), !forget);
        }
    }
}

#[test]
fn udp_sockets_are_bound_and_connected_as_they_were() {
    for address in localhosts() {
        for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_UDPLITE] {
            let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            let make = || socket::create(family, libc::SOCK_DGRAM, protocol);
            // Newer kernels do not have UDP-Lite.
            let Ok(server) = make() else { continue };
            bind(server.as_raw_fd(), &SockaddrStorage::from(address)).unwrap();
            let [client, plain] = [make().unwrap(), make().unwrap()];
            let name: SockaddrStorage = nix::sys::socket::getsockname(server.as_raw_fd()).unwrap();
            nix::sys::socket::connect(client.as_raw_fd(), &name).unwrap();
            set_odd_options(&client);
            setsockopt(&client, sockopt::IpFreebind, &true).unwrap();
            let options = odd_options(&client);
            let clients: SockaddrStorage =
                nix::sys::socket::getsockname(client.as_raw_fd()).unwrap();
            let dumped = dump(vec![client, server, plain], &defaults()).unwrap();
            let restored = dumped.open().unwrap();
            let client: UdpSocket = restored.take_as(0);
            assert_eq!(SockaddrStorage::from(client.local_addr().unwrap()), clients);
            assert_eq!(SockaddrStorage::from(client.peer_addr().unwrap()), name);
            assert_eq!(odd_options(&client), options);
            if family == libc::AF_INET {
                assert!(option(&client, sockopt::IpFreebind));
            }
            client.send(b"hello").unwrap();
            assert_eq!(receive_all(restored.get(1), 10), [b"hello"]);
            let plain: UdpSocket = restored.take_as(2);
            assert_eq!(plain.local_addr().unwrap().port(), 0);
        }
    }
}

#[test]
fn udp_sockets_stay_shut_down() {
    let server = UdpSocket::bind(localhosts()[0]).unwrap();
    let client = UdpSocket::bind(localhosts()[0]).unwrap();
    client.connect(server.local_addr().unwrap()).unwrap();
    shutdown(client.as_raw_fd(), Shutdown::Write).unwrap();
    let restored = dump(vec![client, server], &defaults()).unwrap().open().unwrap();
    let client: UdpSocket = restored.take_as(0);
    assert_eq!(client.send(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn a_shared_port_loses_its_queue() {
    let server = UdpSocket::bind(localhosts()[0]).unwrap();
    setsockopt(&server, sockopt::ReuseAddr, &true).unwrap();
    let client = UdpSocket::bind(localhosts()[0]).unwrap();
    client.send_to(b"lost", server.local_addr().unwrap()).unwrap();
    let restored = dump(vec![server], &defaults()).unwrap().open().unwrap();
    assert!(receive_all(restored.get(0), 10).is_empty());
}

#[test]
fn ipv6_sockets_take_ipv4_or_not_as_before() {
    for only in [false, true] {
        let fd = tcp(libc::AF_INET6);
        setsockopt(&fd, sockopt::Ipv6V6Only, &only).unwrap();
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        bind(fd.as_raw_fd(), &SockaddrStorage::from(any)).unwrap();
        let restored = dump(vec![fd], &defaults()).unwrap().open().unwrap();
        let fd = restored.get(0);
        let found: i32 = socket::option(fd, libc::SOL_IPV6, libc::IPV6_V6ONLY).unwrap();
        assert_eq!(found != 0, only);
    }
}

#[test]
fn filters_and_interfaces_are_restored() {
    let server = UdpSocket::bind(localhosts()[0]).unwrap();
    // The filter returns 3 bytes of each packet (BPF_RET | BPF_K).
    let filter = [socket::FilterStep { code: 6, operand: 8 + 3, ..Default::default() }];
    socket::attach_filter(server.as_fd(), &filter).unwrap();
    socket::set_option(server.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, &b"lo"[..])
        .unwrap();
    let address = server.local_addr().unwrap();
    let restored = dump(vec![server], &defaults()).unwrap().open().unwrap();
    assert_eq!(socket::filter(restored.get(0)).unwrap(), filter);
    assert_eq!(option(&restored.get(0), sockopt::BindToDevice), "lo");
    UdpSocket::bind(localhosts()[0]).unwrap().send_to(b"cut short", address).unwrap();
    assert_eq!(receive_all(restored.get(0), 100), [b"cut"]);
}

#[test]
fn connections_are_refused_by_both_addresses() {
    let listener = TcpListener::bind(localhosts()[0]).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (own, peer) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
    let message = refused(vec![listener.try_clone().unwrap()], &defaults());
    assert!(message.contains("with 1 connection not accepted yet"), "{message}");
    let _server = listener.accept().unwrap();
    let message = refused(vec![client], &defaults());
    let expected = format!("the TCP connection {own} -> {peer} in state ESTABLISHED");
    assert!(message.contains(&expected) && message.contains("--tcp-established"), "{message}");
}

#[test]
fn other_protocols_are_refused_by_name() {
    // Not every kernel can create all of these; those that exist must be rejected.
    for (kind, protocol, name) in [
        (libc::SOCK_STREAM, libc::IPPROTO_MPTCP, "multipath TCP"),
        (libc::SOCK_STREAM, libc::IPPROTO_SCTP, "SCTP"),
    ] {
        if let Ok(fd) = socket::create(libc::AF_INET, kind, protocol) {
            let message = refused(vec![fd], &defaults());
            assert!(message.contains(name), "{message}");
        }
    }
    if let Ok(fd) = socket::create(libc::AF_VSOCK, libc::SOCK_STREAM, 0) {
        let message = refused(vec![fd], &defaults());
        assert!(message.contains("virtual machine socket (AF_VSOCK)"), "{message}");
    }
}

#[test]
fn the_words_of_addresses_are_bytes_in_order() {
    let v4 = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 1), 80));
    assert_eq!(words(Some(v4), libc::AF_INET), [u32::from_le(0x0100_007f)]);
    assert_eq!(words(None, libc::AF_INET6), [0; 4]);
}
