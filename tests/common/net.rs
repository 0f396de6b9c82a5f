//! Servers on the loopback device, and clients that wait for them.

use std::{
    net::{Ipv4Addr, TcpStream},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use super::live::wait_for;

/// How long an end waits for the other: longer than retransmissions that were dropped take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Ports of each test program.
const PORTS: u16 = 16;

/// Returns a port that no other test has, below those that the kernel gives out.
pub fn port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let base = 11_000 + u16::try_from(std::process::id() % 1000).unwrap() * PORTS;
    base + NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Connects to a server as soon as it listens.
pub fn connect(port: u16) -> TcpStream {
    let mut stream = None;
    wait_for("the server", || {
        stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok();
        stream.is_some()
    });
    let stream = stream.unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}
