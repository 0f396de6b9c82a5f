//! Makes connections again in every state, and lets both ends go on.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsFd,
    time::Duration,
};

use super::*;
use crate::res::file::sock::inet::lock::{self, Lock};

/// Bytes that no window has room for.
const LARGE: usize = 8 << 20;

/// The way in which one end of a connection gets into a state.
struct Way {
    state: u32,
    /// Before packets are held back, and after that.
    before: fn(&TcpStream, &TcpStream),
    after: fn(&TcpStream, Ends),
}

fn nothing(_: &TcpStream, _: &TcpStream) {}

fn end(stream: &TcpStream, _: Ends) {
    stream.shutdown(std::net::Shutdown::Write).unwrap();
}

const WAYS: [Way; 7] = [
    Way { state: state::ESTABLISHED, before: nothing, after: |_, _| {} },
    Way { state: state::FIN_WAIT1, before: nothing, after: end },
    Way {
        state: state::FIN_WAIT2,
        before: |own, _| own.shutdown(std::net::Shutdown::Write).unwrap(),
        after: |_, _| {},
    },
    Way {
        state: state::CLOSE_WAIT,
        before: |_, peer| peer.shutdown(std::net::Shutdown::Write).unwrap(),
        after: |_, _| {},
    },
    Way {
        state: state::LAST_ACK,
        before: |_, peer| peer.shutdown(std::net::Shutdown::Write).unwrap(),
        after: end,
    },
    // The peer's end crosses the own one.
    Way { state: state::CLOSING, before: nothing, after: cross },
    // It is closed for good: a restore of CRIU's images makes it.
    Way {
        state: state::CLOSE,
        before: |own, peer| {
            peer.shutdown(std::net::Shutdown::Write).unwrap();
            wait_for(own, state::CLOSE_WAIT);
            own.shutdown(std::net::Shutdown::Write).unwrap();
        },
        after: |_, _| {},
    },
];

fn cross(own: &TcpStream, (here, there): Ends) {
    end(own, (here, there));
    repair::begin(own.as_fd()).unwrap();
    let sequence = repair::sequence(own.as_fd(), Queue::Received).unwrap();
    let written = repair::sequence(own.as_fd(), Queue::Sent).unwrap();
    repair::end(own.as_fd()).unwrap();
    let unacknowledged = fds::unacknowledged_bytes(own.as_fd()).unwrap();
    let acknowledged = written.wrapping_sub(unacknowledged);
    let packet = Packet { sequence, acknowledged, window: 1000, ends: true, urgent: None };
    forge::send(here, there, packet).unwrap();
}

fn state_of(stream: &TcpStream) -> u32 {
    let mut info = [0; INFO_BYTES];
    socket::option_bytes(stream.as_fd(), libc::SOL_TCP, libc::TCP_INFO, &mut info).unwrap();
    info[INFO_STATE].into()
}

fn wait_for(stream: &TcpStream, state: u32) {
    for _ in 0..2000 {
        if state_of(stream) == state {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("state {}, not {state}", state_of(stream));
}

fn ends(stream: &TcpStream) -> Ends {
    (stream.local_addr().unwrap(), stream.peer_addr().unwrap())
}

/// Returns two connected ends, of which the first is the one that was accepted.
fn pair(address: &str, client: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = TcpStream::connect((client, port)).unwrap();
    (listener.accept().unwrap().0, client)
}

fn read(stream: &TcpStream) -> Connection {
    Connection::read(stream.as_fd()).unwrap()
}

/// The state that does not depend on time.
fn lasting(mut connection: Connection) -> Connection {
    connection.entry.timestamp = None;
    connection
}

#[test]
fn privileged_connections_are_made_again_in_every_state() {
    let _alone = lock::ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // A socket of IPv6 whose packets are those of IPv4 is one of these.
    for (listens, connects) in [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")] {
        for way in &WAYS {
            for large in [false, true] {
                made_again(way, pair(listens, connects), large);
            }
        }
    }
}

fn made_again(way: &Way, (own, mut peer): (TcpStream, TcpStream), large: bool) {
    let patience = Some(Duration::from_secs(20));
    peer.set_read_timeout(patience).unwrap();
    let ends = ends(&own);
    peer.write_all(b"to be read").unwrap();
    let closed = way.state == state::CLOSE;
    (way.before)(&own, &peer);
    let mut lock = Lock::begin().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    lock.hold(&[ends]).unwrap();
    let writes = matches!(way.state, state::ESTABLISHED | state::CLOSE_WAIT);
    let mut written = 0;
    if large && (writes || !matches!(way.state, state::FIN_WAIT2 | state::CLOSE)) {
        own.set_nonblocking(true).unwrap();
        while let Ok(count) = (&own).write(&[7; 4096]) {
            written += count;
            assert!(written < LARGE);
        }
    }
    (way.after)(&own, ends);
    wait_for(&own, way.state);
    let before = read(&own);
    assert_eq!(before.received, b"to be read");
    assert_eq!(before.sent, vec![7; written], "state {}", way.state);
    // It closes without sending a packet.
    repair::begin(own.as_fd()).unwrap();
    drop(own);
    let family = if ends.0.is_ipv6() { libc::AF_INET6 } else { libc::AF_INET };
    let fd = socket::create(family, libc::SOCK_STREAM, libc::IPPROTO_TCP).unwrap();
    crate::res::file::sock::opts::widen(fd.as_fd());
    before.make(fd.as_fd(), ends).unwrap();
    let mut own = TcpStream::from(fd);
    wait_for(&own, way.state);
    if !closed {
        repair::end(own.as_fd()).unwrap();
        let mut again = lasting(read(&own));
        // As much may be sent as the congestion window of a new connection allows.
        again.entry.unsq_len = before.entry.unsq_len;
        // The end of the data is one byte more, which is rounded up.
        let windows = [again.entry.rcv_wnd.unwrap(), before.entry.rcv_wnd.unwrap()];
        let unit = 1 << before.entry.rcv_wscale.unwrap();
        assert!(windows[0].wrapping_sub(windows[1]) <= unit, "windows {windows:?}");
        again.entry.rcv_wnd = before.entry.rcv_wnd;
        // The kernel may take its time to acknowledge a FIN.
        if peer_has_ended(way.state) && again.entry.rcv_wup != before.entry.rcv_wup {
            assert_eq!(again.entry.rcv_wup.unwrap().wrapping_add(1), again.entry.inq_seq);
            again.entry.rcv_wup = before.entry.rcv_wup;
        }
        assert_eq!(again, lasting(before.clone()), "state {}", way.state);
        repair::begin(own.as_fd()).unwrap();
    }
    drop(lock);
    repair::end_with_probe(own.as_fd()).unwrap();
    if way.state == state::CLOSING {
        // This peer has never sent what it is said to.
        return;
    }
    // Both ends have all that was on its way, in order, and can go on.
    let mut taken = [0; 10];
    own.set_read_timeout(patience).unwrap();
    own.read_exact(&mut taken).unwrap();
    assert_eq!(&taken, b"to be read");
    if writes {
        own.write_all(b"more").unwrap();
        own.shutdown(std::net::Shutdown::Write).unwrap();
    }
    if way.state == state::ESTABLISHED {
        peer.write_all(b"and more").unwrap();
    }
    if !closed && way.state != state::LAST_ACK {
        let _ = peer.shutdown(std::net::Shutdown::Write);
    }
    let mut rest = Vec::new();
    if !closed {
        peer.read_to_end(&mut rest)
            .unwrap_or_else(|error| panic!("state {}, {large}: {error}", way.state));
        let more: &[u8] = if writes { b"more" } else { b"" };
        assert_eq!(rest, [&vec![7; written][..], more].concat(), "state {}", way.state);
    }
    let mut rest = Vec::new();
    own.read_to_end(&mut rest)
        .unwrap_or_else(|error| panic!("state {}, {large}: {error}", way.state));
    let more: &[u8] = if way.state == state::ESTABLISHED { b"and more" } else { b"" };
    assert_eq!(rest, more);
}
