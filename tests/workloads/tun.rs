//! Network devices of programs (`/dev/net/tun`).

use std::{fs, net::UdpSocket};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, lacks, open, read_some, same, write_all},
    networks::{enter, ip, seen, settle},
};

pub const ROWS: &[Row] = &[
    ("tun_device", tun_device),
    ("tap_queues", tap_queues),
    ("tap_of_nobody", tap_of_nobody),
    ("tun_of_the_machine", tun_of_the_machine),
];

/// Requests and flags (`linux/if_tun.h`).
const SET_DEVICE: libc::Ioctl = 0x4004_54ca;
const SET_PERSISTENT: libc::Ioctl = 0x4004_54cb;
const SET_OWNER: libc::Ioctl = 0x4004_54cc;
const SET_GROUP: libc::Ioctl = 0x4004_54ce;
const SET_QUEUE: libc::Ioctl = 0x4004_54d9;
const SET_SEND_BUFFER: libc::Ioctl = 0x4004_54d4;
const SET_HEADER: libc::Ioctl = 0x4004_54d8;
const GET_DEVICE: libc::Ioctl = 0x8004_54d2;
const GET_SEND_BUFFER: libc::Ioctl = 0x8004_54d3;
const GET_HEADER: libc::Ioctl = 0x8004_54d7;
const TUN: i16 = 1;
const TAP: i16 = 2;
const MULTI_QUEUE: i16 = 0x100;
const DETACH: i16 = 0x400;
const NO_HEAD: i16 = 0x1000;
const OFFLOAD_HEAD: i16 = 0x4000;

fn request(name: &str, flags: i16) -> libc::ifreq {
    // SAFETY: numbers and arrays of numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = flags;
    request
}

/// Opens the device; -1 if the machine has none.
fn file() -> Result<i32, String> {
    if !fs::exists("/dev/net/tun").unwrap_or(false) {
        lacks("/dev/net/tun")?;
    }
    open(c"/dev/net/tun", libc::O_RDWR | libc::O_NONBLOCK)
}

/// Opens a file that is attached to a device with this name.
fn attached(name: &str, flags: i16) -> Result<i32, String> {
    let fd = file()?;
    sys!(ioctl(fd, SET_DEVICE, &request(name, flags)))?;
    Ok(fd)
}

/// What a file shows of its device.
fn shown(fd: i32) -> Result<(String, i16, i32, i32), String> {
    let mut device = request("", 0);
    sys!(ioctl(fd, GET_DEVICE, &raw mut device))?;
    let name = device.ifr_name.iter().take_while(|byte| **byte != 0);
    let name = name.map(|byte| char::from(byte.to_ne_bytes()[0])).collect();
    // SAFETY: the kernel has set this member.
    let flags = unsafe { device.ifr_ifru.ifru_flags };
    let (mut buffer, mut header) = (0_i32, 0_i32);
    sys!(ioctl(fd, GET_SEND_BUFFER, &raw mut buffer))?;
    sys!(ioctl(fd, GET_HEADER, &raw mut header))?;
    Ok((name, flags, buffer, header))
}

/// Reads the next packet of a device that has these bytes.
fn expect_packet(fd: i32, with: &[u8]) -> Verdict {
    let has = |packet: &[u8]| packet.windows(with.len()).any(|part| part == with);
    crate::kit::wait_until("a packet", || read_some(fd, 2000).is_ok_and(|packet| has(&packet)))
}

/// An IPv4 packet with a datagram, from 10.7.0.2, port 9, to 10.7.0.1.
fn datagram(port: u16, data: &[u8]) -> Vec<u8> {
    let len = u16::try_from(28 + data.len()).expect("it is short").to_be_bytes();
    let mut packet =
        vec![0x45, 0, len[0], len[1], 0, 0, 0, 0, 64, 17, 0, 0, 10, 7, 0, 2, 10, 7, 0, 1];
    let words = packet.chunks_exact(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    let len = u16::try_from(8 + data.len()).expect("it is short").to_be_bytes();
    let port = port.to_be_bytes();
    packet.extend([0, 9, port[0], port[1], len[0], len[1], 0, 0]);
    packet.extend(data);
    packet
}

/// A device that ends with its file, through which packets go both ways, and a file without a device.
fn tun_device(checkpoint: &Checkpoint) -> Verdict {
    let failed = |error: std::io::Error| error.to_string();
    enter(&["link set lo up"])?;
    let fd = attached("vpn0", TUN | NO_HEAD)?;
    let alone = file()?;
    sys!(ioctl(fd, SET_SEND_BUFFER, &77_000_i32))?;
    ip("link set vpn0 mtu 1400 txqueuelen 77 up")?;
    ip("addr add 10.7.0.1/24 dev vpn0")?;
    ip("addr add fd07::1/64 dev vpn0")?;
    ip("route add default via 10.7.0.2 dev vpn0")?;
    ip("-6 route add default via fd07::2 dev vpn0")?;
    let socket = UdpSocket::bind("10.7.0.1:0").map_err(failed)?;
    socket.set_read_timeout(Some(std::time::Duration::from_secs(20))).map_err(failed)?;
    let port = socket.local_addr().map_err(failed)?.port();
    let passes = |word: &[u8]| -> Verdict {
        socket.send_to(word, "192.0.2.1:9").map_err(failed)?;
        expect_packet(fd, word)?;
        write_all(fd, &datagram(port, word))?;
        let mut bytes = [0; 20];
        let (len, _) = socket.recv_from(&mut bytes).map_err(failed)?;
        same("what came by the device", word, &bytes[..len])
    };
    passes(b"before")?;
    // Only the kernel itself can mark an address as one that it has made up.
    let seen = || -> Result<Vec<String>, String> {
        settle()?;
        Ok(seen()?.iter().map(|line| line.replace(" stable-privacy", "")).collect())
    };
    let expected = (seen()?, shown(fd)?);
    checkpoint.wait();
    passes(b"after")?;
    same("the device", &expected, &(seen()?, shown(fd)?))?;
    let mut device = request("", 0);
    let error = sys!(ioctl(alone, GET_DEVICE, &raw mut device));
    ensure!(error.is_err(), "the file without a device has one");
    // The free file makes another device, and each ends with its file.
    sys!(ioctl(alone, SET_DEVICE, &request("vpn1", TUN | NO_HEAD)))?;
    ip("link show vpn1")?;
    sys!(close(alone))?;
    sys!(close(fd))?;
    ensure!(ip("link show vpn1").is_err() && ip("link show vpn0").is_err(), "a device stays");
    Ok(())
}

/// A device that stays, with three files, of which one is detached, and one that a child shares.
fn tap_queues(checkpoint: &Checkpoint) -> Verdict {
    enter(&["link set lo up"])?;
    let flags = TAP | MULTI_QUEUE | OFFLOAD_HEAD;
    let files = [attached("tap0", flags)?, attached("tap0", flags)?, attached("tap0", flags)?];
    sys!(ioctl(files[0], SET_PERSISTENT, 1_i64))?;
    sys!(ioctl(files[0], SET_OWNER, 77_i64))?;
    sys!(ioctl(files[0], SET_GROUP, 78_i64))?;
    sys!(ioctl(files[0], SET_HEADER, &12_i32))?;
    sys!(ioctl(files[1], SET_QUEUE, &request("", DETACH)))?;
    ip("link set tap0 address 02:00:00:00:00:77 alias x")?;
    ip("link add br0 type bridge")?;
    ip("link set tap0 master br0 up")?;
    let all = || -> Result<_, String> {
        settle()?;
        Ok((seen()?, files.map(shown)))
    };
    let expected = all()?;
    let child = checkpoint.fork(|child| {
        child.wait();
        child.wait_mark("detached")?;
        ensure!(shown(files[2])?.1 & DETACH != 0, "the child has another file");
        Ok(())
    })?;
    checkpoint.wait();
    same("the device and its files", &expected, &all()?)?;
    sys!(ioctl(files[2], SET_QUEUE, &request("", DETACH)))?;
    checkpoint.mark("detached");
    child.join()?;
    for fd in files {
        sys!(close(fd))?;
    }
    ip("link show tap0").map(drop)
}

/// A device that stays, and that no program has open; and one that is down.
fn tap_of_nobody(checkpoint: &Checkpoint) -> Verdict {
    if !fs::exists("/dev/net/tun").unwrap_or(false) {
        lacks("/dev/net/tun")?;
    }
    enter(&[
        "link set lo up",
        "tuntap add dev tap7 mode tap user 77 group 78 vnet_hdr",
        "tuntap add dev tun7 mode tun pi",
        "link set tap7 up",
        "addr add 10.8.0.1/24 dev tap7",
        "addr add 10.9.0.1/24 dev tun7",
    ])?;
    let all = || -> Result<_, String> {
        // The kernel looks at the connection about once a second.
        crate::kit::wait_until("the end of the connection", || {
            ip("link show tap7").is_ok_and(|shown| shown.contains("NO-CARRIER"))
        })?;
        Ok((seen()?, ip("-d tuntap show")?))
    };
    let expected = all()?;
    checkpoint.wait();
    same("the devices", expected, all()?)
}

/// A device in the network namespace of the machine.
fn tun_of_the_machine(checkpoint: &Checkpoint) -> Verdict {
    let name = format!("rcriu{}", std::process::id());
    let fd = attached(&name, TUN | NO_HEAD)?;
    checkpoint.wait();
    sys!(close(fd)).map(drop)
}
