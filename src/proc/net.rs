//! Tables of sockets and multicast groups of a network namespace (`/proc/PID/net`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::text::{self, Defect, Parsed};
use crate::units::HostPid;

/// A socket in `raw`, `raw6`, `icmp` or `icmp6` (`raw_sock_seq_show`, `net/ipv4/raw.c`, and the like).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawSocket {
    /// Its inode.
    pub inode: u32,
    /// Where it is connected to; unspecified if it is not connected.
    pub peer: IpAddr,
    /// The port that it has connected to, which the kernel does not use.
    pub peer_port: u16,
}

/// A multicast group that an interface receives, in `igmp` or `igmp6` (`igmp_mc_seq_show`,
/// `net/ipv4/igmp.c`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MulticastGroup {
    /// The number of the interface.
    pub index: u32,
    /// Its name.
    pub interface: Vec<u8>,
    /// The address of the group.
    pub address: IpAddr,
}

/// Reads the raw and ICMP sockets of a family in the network namespace of a process.
///
/// # Errors
///
/// See the [module](super). A table that the kernel lacks is empty.
pub fn raw_sockets(pid: HostPid, v6: bool) -> super::Result<Vec<RawSocket>> {
    let names = if v6 { ["net/raw6", "net/icmp6"] } else { ["net/raw", "net/icmp"] };
    let mut found = Vec::new();
    for name in names {
        found.extend(table(pid, name, raw)?);
    }
    Ok(found)
}

/// Reads the multicast groups of the interfaces in the network namespace of a process.
///
/// # Errors
///
/// See the [module](super). A table that the kernel lacks is empty.
pub fn multicast_groups(pid: HostPid) -> super::Result<Vec<MulticastGroup>> {
    let mut found = table(pid, "net/igmp", groups)?;
    found.extend(table(pid, "net/igmp6", groups6)?);
    Ok(found)
}

fn table<T>(
    pid: HostPid,
    name: &str,
    parser: impl FnOnce(&[u8]) -> Parsed<Vec<T>>,
) -> super::Result<Vec<T>> {
    let path = super::of_process(pid, name);
    // All processes have this directory, so that a file that is missing is no process that is.
    if !path.exists() && super::of_process(pid, "net").exists() {
        return Ok(Vec::new());
    }
    super::read(path, parser)
}

/// Parses `raw` and the like.
fn raw(text: &[u8]) -> Parsed<Vec<RawSocket>> {
    text::lines(text).skip(1).map(raw_socket).collect()
}

fn raw_socket(line: &[u8]) -> Parsed<RawSocket> {
    let missing = || Defect::new("a raw socket", line);
    let words: Vec<_> = text::words(line).collect();
    let (address, port) =
        words.get(2).and_then(|peer| text::split_once(peer, b':')).ok_or_else(missing)?;
    let inode = words.get(9).ok_or_else(missing)?;
    Ok(RawSocket {
        inode: text::unsigned(inode, 10, "an inode")?,
        peer: native_words(address)?,
        peer_port: text::unsigned(port, 16, "a port")?,
    })
}

/// Parses an address that is shown as native words of its bytes.
fn native_words(digits: &[u8]) -> Parsed<IpAddr> {
    let mut bytes = Vec::new();
    for word in digits.chunks(8) {
        let word: u32 = text::unsigned(word, 16, "a word of an address")?;
        bytes.extend(word.to_ne_bytes());
    }
    if let Ok(v4) = <[u8; 4]>::try_from(bytes.as_slice()) {
        return Ok(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes.as_slice());
    v6.map(|v6| Ipv6Addr::from(v6).into()).map_err(|_| Defect::new("an address", digits))
}

/// Parses `igmp`: a line for each interface, then lines that begin with tabs, one for each group.
fn groups(text: &[u8]) -> Parsed<Vec<MulticastGroup>> {
    let mut found = Vec::new();
    let mut interface: Option<(u32, &[u8])> = None;
    for line in text::lines(text).skip(1) {
        let mut words = text::words(line);
        let first = words.next().ok_or_else(|| Defect::missing("an interface or a group"))?;
        if line.starts_with(b"\t") {
            let (index, name) =
                interface.ok_or_else(|| Defect::new("an interface before a group", line))?;
            let address = native_words(first)?;
            found.push(MulticastGroup { index, interface: name.to_owned(), address });
        } else {
            let name = words.next().ok_or_else(|| Defect::new("an interface's name", line))?;
            let name = name.strip_suffix(b":").unwrap_or(name);
            interface = Some((text::unsigned(first, 10, "an interface's number")?, name));
        }
    }
    Ok(found)
}

/// Parses `igmp6`: a line for each group of an interface.
fn groups6(text: &[u8]) -> Parsed<Vec<MulticastGroup>> {
    let group = |line| -> Parsed<MulticastGroup> {
        let mut words = text::words(line);
        let mut next = || words.next().ok_or_else(|| Defect::new("a multicast group", line));
        let (index, interface, digits) = (next()?, next()?, next()?);
        let mut address = [0; 16];
        let pairs = digits.chunks_exact(2);
        if pairs.len() != address.len() {
            return Err(Defect::new("an address", digits));
        }
        for (byte, pair) in address.iter_mut().zip(pairs) {
            *byte = text::unsigned(pair, 16, "a byte of an address")?;
        }
        Ok(MulticastGroup {
            index: text::unsigned(index, 10, "an interface's number")?,
            interface: interface.to_owned(),
            address: Ipv6Addr::from(address).into(),
        })
    };
    text::lines(text).map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_sockets_show_their_peers() {
        let text = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt\n\
            1: 00000000:0001 0100007F:0000 01 00000000:00000000 00:00000000 00000000 0 0 4711 2 0 0\n";
        let peer = Ipv4Addr::LOCALHOST.into();
        assert_eq!(raw(text).unwrap(), [RawSocket { inode: 4711, peer, peer_port: 0 }]);
        let text = b"header\n 58: 00000000000000000000000000000000:003A \
            00000000000000000000000001000000:0007 01 0:0 00:0 0 0 0 12 2 0 0\n";
        let peer = Ipv6Addr::LOCALHOST.into();
        assert_eq!(raw(text).unwrap(), [RawSocket { inode: 12, peer, peer_port: 7 }]);
        assert!(raw(b"header\n 1: 2 3\n").is_err());
    }

    #[test]
    fn groups_belong_to_the_interface_above() {
        let text = b"Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
            1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
            7\tveth0     :     1      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n";
        let found = groups(text).unwrap();
        let shown: Vec<_> =
            found.iter().map(|group| (group.index, &group.interface[..], group.address)).collect();
        let address = |last| IpAddr::from(Ipv4Addr::new(224, 0, 0, last));
        assert_eq!(shown, [(1, &b"lo"[..], address(1)), (7, b"veth0", address(251))]);
        let text = b"1    lo              ff020000000000000000000000000001     1 0000000C 0\n";
        let found = groups6(text).unwrap();
        assert_eq!(found[0].address, "ff02::1".parse::<IpAddr>().unwrap());
        assert!(groups(b"header\n\t\t010000E0 1\n").is_err());
        assert!(groups6(b"1 lo ff02 1\n").is_err());
    }
}
