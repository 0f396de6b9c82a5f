//! Network namespaces that a tree has for itself.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    process::Command,
};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, lacks, same},
};

pub const ROWS: &[Row] = &[
    ("network_namespace", network_namespace),
    ("network_namespace_down", network_namespace_down),
    ("network_namespace_of_a_child", of_a_child),
    ("network_namespaces", network_namespaces),
    ("network_namespaces_connected", network_namespaces_connected),
    ("network_devices", network_devices),
    ("network_routes", network_routes),
    ("network_settings", network_settings),
    ("network_filters", network_filters),
    ("network_filters_of_iptables", network_filters_of_iptables),
    ("network_outside", network_outside),
    ("network_on_top", network_on_top),
];

/// Moves into a new network namespace and has `ip(8)` make what the lines say.
pub fn enter(lines: &[&str]) -> Verdict {
    sys!(unshare(libc::CLONE_NEWNET))?;
    for line in lines {
        ip(line)?;
    }
    Ok(())
}

/// Runs `ip(8)`, and returns what it says.
pub fn ip(arguments: &str) -> Result<String, String> {
    run(&format!("ip {arguments}"))
}

/// Runs a command, and returns what it says.
fn run(line: &str) -> Result<String, String> {
    let mut words = line.split_whitespace();
    let name = words.next().unwrap_or_default();
    let Ok(output) = Command::new(name).args(words).output() else {
        lacks(name)?;
        return Ok(String::new());
    };
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("Unknown device type") {
        lacks("a kind of network device")?;
    }
    ensure!(output.status.success(), "{line}: {said}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What `ip(8)` shows of the namespace, without what changes by itself.
pub fn seen() -> Result<Vec<String>, String> {
    let mut seen = Vec::new();
    for (what, sorted) in [
        ("-o -d addr", false),
        ("-o -d link", false),
        ("route show table all", true),
        ("-6 route show table all", true),
        ("rule", false),
        ("-6 rule", false),
        ("neigh show nud permanent", true),
        ("neigh show proxy", true),
    ] {
        let shown = ip(what)?;
        let mut lines: Vec<_> = shown.lines().map(without_timers).collect();
        if sorted {
            lines.sort();
        }
        seen.extend(lines);
    }
    Ok(seen)
}

fn without_timers(line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        match word {
            // How often a packet socket wants all packets, the state of a port, and lifetimes.
            "promiscuity" | "state" | "valid_lft" | "preferred_lft" => drop(words.next()),
            _ if word.ends_with("_timer") => drop(words.next()),
            _ => kept.push(word),
        }
    }
    kept.join(" ")
}

/// Waits until no address is checked for duplicates, and all devices have their state.
pub fn settle() -> Verdict {
    crate::kit::wait_until("the end of duplicate address detection", || {
        ip("-o addr show tentative").is_ok_and(|shown| shown.trim().is_empty())
    })
}

/// Sockets of all kinds in a namespace whose only device is up.
fn network_namespace(checkpoint: &Checkpoint) -> Verdict {
    enter(&["link set lo up", "addr add 10.99.0.1/32 dev lo"])?;
    let failed = |error: std::io::Error| error.to_string();
    let listener = TcpListener::bind("10.99.0.1:4711").map_err(failed)?;
    let mut client = TcpStream::connect("10.99.0.1:4711").map_err(failed)?;
    let (mut server, _) = listener.accept().map_err(failed)?;
    let udp = UdpSocket::bind("[::1]:4712").map_err(failed)?;
    let unbound = sys!(socket(libc::AF_INET, libc::SOCK_STREAM, 0))?;
    let name = SocketAddr::from_abstract_name(format!("rcriu-{}", std::process::id()));
    let name = name.map_err(failed)?;
    let unix = UnixListener::bind_addr(&name).map_err(failed)?;
    let packet = sys!(socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0))?;
    let netlink = sys!(socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE))?;
    client.write_all(b"before ").map_err(failed)?;
    udp.send_to(b"to itself", "[::1]:4712").map_err(failed)?;
    let expected = seen()?;
    let check = |server: &mut TcpStream| -> Verdict {
        let mut bytes = [0; 12];
        server.read_exact(&mut bytes).map_err(failed)?;
        same("what came by TCP", b"before after", &bytes)?;
        let mut bytes = [0; 20];
        let (len, _) = udp.recv_from(&mut bytes).map_err(failed)?;
        same("what came by UDP", &b"to itself"[..], &bytes[..len])
    };
    checkpoint.wait();
    same("the namespace", expected, seen()?)?;
    client.write_all(b"after").map_err(failed)?;
    check(&mut server)?;
    // All are still in one namespace: the old sockets and those that are new.
    TcpStream::connect("10.99.0.1:4711").map_err(failed)?;
    listener.accept().map_err(failed)?;
    UnixStream::connect_addr(&name).map_err(failed)?;
    unix.accept().map_err(failed)?;
    let own = fs::metadata("/proc/self/ns/net").map_err(failed)?;
    for fd in [unbound, packet, netlink] {
        const SIOCGSKNS: libc::Ioctl = 0x894c;
        let namespace = sys!(ioctl(fd, SIOCGSKNS))?;
        let found = fs::metadata(format!("/proc/self/fd/{namespace}")).map_err(failed)?;
        let inode = std::os::unix::fs::MetadataExt::ino;
        same("the namespace of a socket", inode(&own), inode(&found))?;
    }
    Ok(())
}

/// A namespace with nothing in it but its device, which is down.
fn network_namespace_down(checkpoint: &Checkpoint) -> Verdict {
    enter(&[])?;
    let expected = seen()?;
    checkpoint.wait();
    same("the namespace", expected, seen()?)?;
    ensure!(TcpStream::connect("127.0.0.1:1").is_err(), "it has a network");
    Ok(())
}

/// Pairs of devices, a bridge with ports, a tunnel, with names, addresses and settings of their own.
fn network_devices(checkpoint: &Checkpoint) -> Verdict {
    enter(&[
        "link set lo up",
        "link add v0 type veth peer name v1",
        "link set v0 address 02:11:22:33:44:55 mtu 1400 up",
        "link set v1 group 7 alias alias up",
        "link property add dev v1 altname a-longer-name-than-fifteen",
        "link add br0 type bridge forward_delay 700 priority 77 mcast_snooping 0",
        "link set br0 up",
        "link add p0 type veth peer name p1",
        "link set p0 master br0 up",
        "link set p0 type bridge_slave cost 77 hairpin on",
        "link set p1 up arp off",
        "addr add 10.1.0.1/24 dev v0",
        "addr add 10.1.0.2/24 dev v1",
        "addr add 10.2.0.1/16 brd + dev br0 label br0:x",
        "addr add fd00::1/64 dev v0",
        "link add vx type vxlan id 77 dstport 4789 local 10.1.0.1 remote 10.1.0.9 dev v0",
        "link set vx up",
        "link add fb type ifb",
        "link set fb txqueuelen 99",
        "link add apart type veth peer name other",
    ])?;
    settle()?;
    let expected = seen()?;
    checkpoint.wait();
    settle()?;
    same("the devices", expected, seen()?)
}

/// Routes of several tables, rules and neighbours; and what the kernel adds, but is not there any more.
fn network_routes(checkpoint: &Checkpoint) -> Verdict {
    enter(&[
        "link set lo up",
        "addr del ::1/128 dev lo",
        "link add v0 type veth peer name v1",
        "link set v0 up",
        "link set v1 up",
        "addr add 10.1.0.1/24 dev v0",
        "addr add fd00::1/64 dev v0 nodad",
        "route add default via 10.1.0.254 dev v0 metric 5",
        "route add 10.6.0.0/16 table 100 via 10.1.0.7",
        "route add blackhole 10.77.0.0/16",
        "route add unreachable default metric 1000 table 7",
        "-6 route add fd01::/64 via fd00::9",
        "-6 route add fd02::/64 via fd00::9 metric 77 table 100",
        "route add 10.3.0.0/16 dev v1 scope link",
        "route add 10.4.0.0/16 via 10.3.0.1",
        "route del fe80::/64 dev v1",
        "rule add from 10.1.0.0/24 table 100 pref 1000",
        "rule add fwmark 5 lookup 7",
        "rule del pref 32767",
        "-6 rule add to fd09::/64 table 100 pref 77",
        "neigh add 10.1.0.77 lladdr 02:00:00:00:00:01 dev v0 nud permanent",
        "neigh add proxy 10.1.0.78 dev v0",
    ])?;
    settle()?;
    let expected = seen()?;
    checkpoint.wait();
    same("routes and rules", expected, seen()?)
}

/// Settings of the namespace and of devices.
fn network_settings(checkpoint: &Checkpoint) -> Verdict {
    const SETTINGS: [(&str, &str); 14] = [
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/v0/rp_filter", "2"),
        ("ipv4/conf/default/proxy_arp", "1"),
        ("ipv4/conf/v0/arp_evict_nocarrier", "0"),
        ("ipv4/neigh/v0/gc_stale_time", "77"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/v1/disable_ipv6", "1"),
        ("ipv6/conf/v0/mtu", "1300"),
        ("ipv4/ip_local_port_range", "20000\t30000"),
        ("ipv4/ping_group_range", "0\t1000"),
        ("ipv4/tcp_keepalive_time", "123"),
        ("core/somaxconn", "777"),
        ("unix/max_dgram_qlen", "33"),
        ("ipv6/neigh/v1/ucast_solicit", "7"),
    ];
    enter(&["link set lo up", "link add v0 type veth peer name v1", "link set v0 up"])?;
    let path = |name: &str| format!("/proc/sys/net/{name}");
    for (name, value) in SETTINGS {
        fs::write(path(name), value).map_err(|error| format!("{name}: {error}"))?;
    }
    checkpoint.wait();
    for (name, value) in SETTINGS {
        let found = fs::read_to_string(path(name)).map_err(|error| format!("{name}: {error}"))?;
        same(name, value, found.trim_end())?;
    }
    Ok(())
}

/// Rules of nftables and iptables, and what they let pass.
fn network_filters(checkpoint: &Checkpoint) -> Verdict {
    enter(&["link set lo up"])?;
    for line in [
        "nft add table inet t",
        "nft add set inet t ports { type inet_service; elements = { 22, 80 } ; }",
        "nft add chain inet t input { type filter hook input priority 0; policy accept; }",
        "nft add rule inet t input tcp dport @ports counter drop",
        "nft add rule inet t input ct state established accept",
        "iptables-legacy -N chain",
        "iptables-legacy -A INPUT -p tcp --dport 81 -j REJECT --reject-with tcp-reset",
        "iptables-legacy -A chain -s 10.0.0.0/8 -m comment --comment words -j RETURN",
        "iptables-legacy -P FORWARD DROP",
    ] {
        run(line)?;
    }
    let seen = || -> Result<Vec<String>, String> {
        let text = run("nft list ruleset")? + &run("iptables-legacy-save")?;
        // Counters go on, and a comment has the time.
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Ok(lines.map(|line| line.split(" [").next().unwrap_or(line).to_owned()).collect())
    };
    let refused = || TcpStream::connect("127.0.0.1:81").map_err(|error| error.raw_os_error());
    let listener = TcpListener::bind("127.0.0.1:81").map_err(|error| error.to_string())?;
    let expected = seen()?;
    ensure!(expected.iter().any(|line| line.contains("@ports")), "no rule is there: {expected:?}");
    ensure!(
        refused().is_err_and(|error| error == Some(libc::ECONNREFUSED)),
        "no packet is refused"
    );
    checkpoint.wait();
    same("the rules", expected, seen()?)?;
    ensure!(
        refused().is_err_and(|error| error == Some(libc::ECONNREFUSED)),
        "no packet is refused"
    );
    drop(listener);
    Ok(())
}

/// Rules of iptables-nft, which nft(8) cannot write, beside others that it can.
fn network_filters_of_iptables(checkpoint: &Checkpoint) -> Verdict {
    enter(&["link set lo up"])?;
    for line in [
        "iptables-nft -t nat -A POSTROUTING -s 10.0.0.0/8 -j MASQUERADE",
        "iptables-nft -t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
        "iptables-nft -N chain",
        "iptables-nft -A chain -s 10.0.0.0/8 -m addrtype --dst-type LOCAL -m comment --comment words -j RETURN",
        "iptables-nft -A INPUT -p tcp --dport 81 -j REJECT --reject-with tcp-reset",
        "iptables-nft -P FORWARD DROP",
        "ip6tables-nft -A INPUT -m conntrack --ctstate INVALID -j DROP",
        "nft add table inet t",
        "nft add chain inet t input { type filter hook input priority 0; policy accept; }",
        "nft add rule inet t input tcp dport 82 drop",
    ] {
        run(line)?;
    }
    let seen = || -> Result<Vec<String>, String> {
        let shown = ["nft list ruleset", "iptables-nft-save", "ip6tables-nft-save"];
        let texts = shown.into_iter().map(run).collect::<Result<Vec<_>, _>>()?;
        // A comment has the time, and the order of tables is not kept.
        let lines = texts.iter().flat_map(|text| text.lines());
        let lines = lines
            .filter(|line| !line.starts_with("# Generated") && !line.starts_with("# Completed"));
        let mut lines: Vec<_> =
            lines.map(|line| line.split(" [").next().unwrap_or(line).to_owned()).collect();
        lines.sort();
        Ok(lines)
    };
    let expected = seen()?;
    for word in ["MASQUERADE", "clamp-mss", "dst-type LOCAL", "dport 82", "INVALID"] {
        ensure!(expected.iter().any(|line| line.contains(word)), "no {word} in {expected:#?}");
    }
    checkpoint.wait();
    same("the rules", expected, seen()?)
}

/// A pair of devices of which one end is in the namespace of the machine, and a socket there.
fn network_outside(checkpoint: &Checkpoint) -> Verdict {
    let failed = |error: std::io::Error| error.to_string();
    let outside = UdpSocket::bind("0.0.0.0:0").map_err(failed)?;
    enter(&["link set lo up"])?;
    let own = std::process::id();
    let there = |line: &str| {
        let parent = std::os::unix::process::parent_id();
        run(&format!("nsenter -t {parent} -n ip {line}"))
    };
    let device = format!("rcriu-{own}");
    let network = format!("10.201.{}.{}", own >> 6 & 255, own << 2 & 255);
    let address = |last: u32| {
        let (start, end) = network.rsplit_once('.').expect("it has dots");
        format!("{start}.{}", end.parse::<u32>().expect("it is a number") + last)
    };
    there(&format!("link add {device} type veth peer name eth0 netns {own}"))?;
    there(&format!("addr add {}/30 dev {device}", address(1)))?;
    there(&format!("link set {device} up"))?;
    ip(&format!("addr add {}/30 dev eth0", address(2)))?;
    ip("link set eth0 up")?;
    settle()?;
    let inside = UdpSocket::bind((address(2), 4711)).map_err(failed)?;
    inside.set_read_timeout(Some(std::time::Duration::from_secs(20))).map_err(failed)?;
    let hears = |word: &[u8]| -> Verdict {
        outside.send_to(word, (address(2), 4711)).map_err(failed)?;
        let mut bytes = [0; 20];
        let (len, from) = inside.recv_from(&mut bytes).map_err(failed)?;
        same("what was sent", word, &bytes[..len])?;
        same("where it came from", address(1), from.ip().to_string())
    };
    // The kernel numbers the end outside.
    let shown = || -> Result<String, String> {
        let shown = there(&format!("-o addr show dev {device} scope global"))?;
        Ok(shown.split_once(' ').map_or(String::new(), |(_, rest)| rest.to_owned()))
    };
    hears(b"before")?;
    let expected = shown()?;
    checkpoint.wait();
    hears(b"after")?;
    same("the end outside", expected, shown()?)
}

/// Devices on top of one of the machine, as networks of Docker with the driver macvlan have them.
fn network_on_top(checkpoint: &Checkpoint) -> Verdict {
    let failed = |error: std::io::Error| error.to_string();
    let (own, parent) = (std::process::id(), std::os::unix::process::parent_id());
    let there = |line: &str| run(&format!("nsenter -t {parent} -n ip {line}"));
    enter(&["link set lo up"])?;
    // The device of the machine goes with its other end, which is here.
    let below = format!("rcriu-{own}");
    there(&format!("link add {below} type veth peer name end0 netns {own}"))?;
    there(&format!("link set {below} up"))?;
    ip("link set end0 up")?;
    for (name, mode) in [("one", "bridge"), ("two", "bridge"), ("own", "private")] {
        there(&format!("link add {name} link {below} netns {own} type macvlan mode {mode}"))?;
        ip(&format!("link set {name} up"))?;
    }
    ip("addr add 10.202.0.1/24 dev one")?;
    ip("addr add fd20::1/64 dev two nodad")?;
    settle()?;
    let connected = || {
        crate::kit::wait_until("the connection", || {
            ip("link show own").is_ok_and(|shown| shown.contains("LOWER_UP"))
        })?;
        settle()
    };
    // The kernel numbers the device of the machine.
    let shown = || -> Result<Vec<String>, String> {
        let without_number = |line: &String| {
            let words =
                line.split_whitespace().map(|word| word.split("@if").next().unwrap_or(word));
            words.collect::<Vec<_>>().join(" ")
        };
        Ok(seen()?.iter().map(without_number).collect())
    };
    connected()?;
    let before = shown()?;
    checkpoint.wait();
    connected()?;
    same("the devices", before, shown()?)?;
    let socket = UdpSocket::bind("10.202.0.1:0").map_err(failed)?;
    socket.send_to(b"x", "10.202.0.9:9").map_err(failed)?;
    ip("link del end0")?;
    ensure!(ip("link show one").is_err(), "the device is not on top of that of the machine");
    Ok(())
}

/// Sockets of a process in its network namespace: a connection, and a datagram that waits. Processes in
/// other namespaces have the same addresses.
struct Sockets {
    server: TcpStream,
    client: TcpStream,
    udp: UdpSocket,
    name: &'static str,
}

impl Sockets {
    fn open(name: &'static str) -> Result<Self, String> {
        let failed = |error: std::io::Error| error.to_string();
        let listener = TcpListener::bind("10.98.0.1:4811").map_err(failed)?;
        let mut client = TcpStream::connect("10.98.0.1:4811").map_err(failed)?;
        let (server, _) = listener.accept().map_err(failed)?;
        let udp = UdpSocket::bind("10.98.0.1:4812").map_err(failed)?;
        client.write_all(name.as_bytes()).map_err(failed)?;
        udp.send_to(name.as_bytes(), "10.98.0.1:4812").map_err(failed)?;
        Ok(Self { server, client, udp, name })
    }

    fn check(mut self) -> Verdict {
        let failed = |error: std::io::Error| error.to_string();
        let mut bytes = vec![0; self.name.len()];
        self.server.read_exact(&mut bytes).map_err(failed)?;
        same("bytes that waited", self.name.as_bytes(), bytes.as_slice())?;
        self.client.write_all(b"after").map_err(failed)?;
        let mut bytes = [0; 5];
        self.server.read_exact(&mut bytes).map_err(failed)?;
        same("bytes sent after", b"after", &bytes)?;
        let mut bytes = [0; 64];
        let (len, _) = self.udp.recv_from(&mut bytes).map_err(failed)?;
        same("a datagram that waited", self.name.as_bytes(), &bytes[..len])?;
        // The socket belongs to the namespace of the process.
        self.udp.send_to(b"again", "10.98.0.1:4812").map_err(failed)?;
        let (len, _) = self.udp.recv_from(&mut bytes).map_err(failed)?;
        same("a datagram sent after", &b"again"[..], &bytes[..len])
    }
}

const ADDRESS: &[&str] = &["link set lo up", "addr add 10.98.0.1/32 dev lo"];

/// A tree in the network namespace of the machine, of which a part has one of its own.
fn of_a_child(checkpoint: &Checkpoint) -> Verdict {
    let outside = UdpSocket::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
    let address = outside.local_addr().map_err(|error| error.to_string())?;
    let child = checkpoint.fork(|child| {
        enter(ADDRESS)?;
        let sockets = Sockets::open("child")?;
        let before = seen()?;
        child.wait();
        same("the network", before, seen()?)?;
        // It still has the socket of the other namespace.
        outside.send_to(b"hello", address).map_err(|error| error.to_string())?;
        sockets.check()
    })?;
    checkpoint.wait();
    child.join()?;
    let mut bytes = [0; 16];
    let (len, _) = outside.recv_from(&mut bytes).map_err(|error| error.to_string())?;
    same("a datagram of the child", &b"hello"[..], &bytes[..len])
}

/// A tree with three network namespaces, with the same addresses in two of them, and a mount of sysfs
/// for each, as `ip netns exec` makes it.
fn network_namespaces(checkpoint: &Checkpoint) -> Verdict {
    enter(ADDRESS)?;
    let roots = Sockets::open("root")?;
    let before = seen()?;
    let first = checkpoint.fork(|child| {
        enter(ADDRESS)?;
        ip("link add name bridge address 02:00:00:00:00:01 type bridge")?;
        crate::mounts::enter()?;
        sys!(mount(c"s".as_ptr(), c"/sys".as_ptr(), c"sysfs".as_ptr(), 0, std::ptr::null()))?;
        let sockets = Sockets::open("first")?;
        let before = seen()?;
        let devices = || {
            let found = fs::read_dir("/sys/class/net").map_err(|error| error.to_string())?;
            let names = found.flatten().map(|entry| entry.file_name());
            let mut names: Vec<_> = names.map(|name| name.to_string_lossy().into_owned()).collect();
            names.sort();
            Ok::<_, String>(names)
        };
        let here = devices()?;
        child.wait();
        same("the network of the first child", before, seen()?)?;
        same("devices that sysfs shows", here, devices()?)?;
        sockets.check()
    })?;
    let second = checkpoint.fork(|child| {
        enter(&["link set lo up"])?;
        let before = seen()?;
        let netlink = sys!(socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE))?;
        child.wait();
        sys!(close(netlink))?;
        same("the network of the second child", before, seen()?)
    })?;
    checkpoint.wait();
    same("the network of the root", before, seen()?)?;
    roots.check()?;
    first.join()?;
    second.join()
}

/// A tree with three network namespaces, which pairs of devices connect: that of the root with each of the children,
/// by a bridge, and the children with each other. One knows another by a number of its own.
fn network_namespaces_connected(checkpoint: &Checkpoint) -> Verdict {
    let failed = |error: std::io::Error| error.to_string();
    enter(&["link set lo up"])?;
    let server = TcpListener::bind("0.0.0.0:4711").map_err(failed)?;
    let talk = |child: &Checkpoint, own: &str, is_second: bool| -> Verdict {
        enter(&["link set lo up"])?;
        child.announce();
        child.wait_mark(&format!("connected {own}"))?;
        ip(&format!("addr add 10.5.0.{own}/24 dev up0"))?;
        ip("link set up0 up")?;
        ip("link set side up")?;
        ip(&format!("addr add 10.6.0.{own}/24 dev side"))?;
        ip("route add default via 10.5.0.1")?;
        crate::kit::wait_until("the connection", || {
            ip("link show side").is_ok_and(|shown| shown.contains("LOWER_UP"))
        })?;
        settle()?;
        let mut to_root = TcpStream::connect("10.5.0.1:4711").map_err(failed)?;
        to_root.write_all(own.as_bytes()).map_err(failed)?;
        let udp = UdpSocket::bind(format!("10.6.0.{own}:9000")).map_err(failed)?;
        udp.set_read_timeout(Some(std::time::Duration::from_secs(20))).map_err(failed)?;
        let before = (seen()?, ip("netns list-id")?);
        child.mark(&format!("ready {own}"));
        child.wait_go();
        settle()?;
        same("the network of a child", before, (seen()?, ip("netns list-id")?))?;
        to_root.write_all(b"after").map_err(failed)?;
        let other = if is_second { "10.6.0.2:9000" } else { "10.6.0.3:9000" };
        let mut bytes = [0; 8];
        // The other child may not listen yet.
        crate::kit::wait_until("the other child", || udp.send_to(b"hello", other).is_ok())?;
        let (len, _) = udp.recv_from(&mut bytes).map_err(failed)?;
        same("a datagram of the other child", &b"hello"[..], &bytes[..len])?;
        child.mark(&format!("done {own}"));
        child.wait_mark(&format!("done {}", if is_second { "2" } else { "3" }))?;
        // The ends of its devices go with its namespace.
        child.wait_mark("looked")
    };
    let mut children = Vec::new();
    for (own, is_second) in [("2", false), ("3", true)] {
        children.push(checkpoint.fork(|child| talk(child, own, is_second))?);
    }
    let pids: Vec<i32> = children.iter().map(|child| child.pid).collect();
    ip("link add br0 type bridge")?;
    ip("addr add 10.5.0.1/24 dev br0")?;
    ip("link set br0 up")?;
    for (own, pid) in ["2", "3"].iter().zip(&pids) {
        ip(&format!("link add port{own} master br0 type veth peer name up0 netns {pid}"))?;
        ip(&format!("link set port{own} up"))?;
    }
    let (one, other) = (pids[0], pids[1]);
    run(&format!("nsenter -t {one} -n ip link set lo mtu 60000"))?;
    ip(&format!("link add tmp0 netns {one} type veth peer name tmp1 netns {other}"))?;
    for (pid, name) in [(one, "tmp0"), (other, "tmp1")] {
        run(&format!("nsenter -t {pid} -n ip link set {name} name side"))?;
    }
    let mut streams = Vec::new();
    for own in ["2", "3"] {
        checkpoint.mark(&format!("connected {own}"));
    }
    for own in ["2", "3"] {
        checkpoint.wait_mark(&format!("ready {own}"))?;
        streams.push(server.accept().map_err(failed)?.0);
    }
    settle()?;
    let before = (seen()?, ip("netns list-id")?);
    checkpoint.wait();
    settle()?;
    same("the network of the root", before, (seen()?, ip("netns list-id")?))?;
    checkpoint.mark("looked");
    children.into_iter().try_for_each(crate::kit::Child::join)?;
    let mut words = Vec::new();
    for stream in &mut streams {
        let mut bytes = [0; 6];
        stream.read_exact(&mut bytes).map_err(failed)?;
        words.push(String::from_utf8_lossy(&bytes).into_owned());
    }
    words.sort();
    same("what the children have sent", vec!["2after".to_owned(), "3after".to_owned()], words)
}
