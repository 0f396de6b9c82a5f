//! TCP connections between a tree and processes outside of it, which notice nothing but a
//! pause: dumped, restored, and left alone by dumps that fail.

mod common;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use common::{
    Cap,
    live::{Live, directory, wait_for},
    mounted::Mounted,
    require,
};
use nix::{
    libc,
    sched::{CloneFlags, setns},
};
use rcriu::{
    fault::Point,
    image::{Kind, proto, read_all},
    sys::{
        process::{pidfd_getfd, pidfd_open},
        socket::option,
    },
    units::HostPid,
};

const PYTHON: &str = "/usr/bin/python3";

/// The option of all these dumps and restores.
const ESTABLISHED: &str = "--tcp-established";

/// How long an end waits for the other: longer than retransmissions that were dropped take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts a server that expects so many connections, and returns where it listens: at an
/// address of IPv4, one of IPv6, and one of both by which clients of IPv4 come.
fn server(connections: usize) -> (Live, [SocketAddr; 3]) {
    let dir = directory();
    let script = dir.path().join("echo.py");
    fs::write(&script, include_str!("programs/echo.py")).unwrap();
    let status = dir.path().join("status");
    let told = dir.path().join("status.ports");
    let words = [script.to_str().unwrap(), status.to_str().unwrap(), &connections.to_string()];
    let live = Live::program(PYTHON, &words, dir);
    wait_for("the server", || told.exists());
    let text = fs::read_to_string(told).unwrap();
    let ports: Vec<u16> = text.split(' ').map(|port| port.parse().unwrap()).collect();
    let addresses = [
        SocketAddr::from((Ipv4Addr::LOCALHOST, ports[0])),
        SocketAddr::from((Ipv6Addr::LOCALHOST, ports[1])),
        SocketAddr::from((Ipv4Addr::LOCALHOST, ports[2])),
    ];
    (live, addresses)
}

fn connect(address: SocketAddr) -> BufReader<TcpStream> {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    BufReader::new(stream)
}

/// Sends a line and expects it back with its number.
fn exchange(stream: &mut BufReader<TcpStream>, number: usize, text: &str) {
    writeln!(stream.get_mut(), "{text}").unwrap();
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    assert_eq!(line, format!("{number} {text}\n"));
}

/// Clients that talk to a server all the time.
struct Clients {
    go_on: Arc<AtomicBool>,
    exchanges: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    fn start(addresses: &[SocketAddr]) -> Self {
        let (go_on, exchanges) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
        let threads = addresses.iter().map(|address| {
            let (go_on, exchanges, address) =
                (Arc::clone(&go_on), Arc::clone(&exchanges), *address);
            thread::spawn(move || {
                let mut stream = connect(address);
                for number in 1.. {
                    let text = format!("line {number} ").repeat(number % 300);
                    exchange(&mut stream, number, &text);
                    exchanges.fetch_add(1, Ordering::Relaxed);
                    if !go_on.load(Ordering::Relaxed) {
                        break;
                    }
                }
            })
        });
        Self { threads: threads.collect(), go_on, exchanges }
    }

    /// Waits until some more lines were exchanged.
    fn go_on(&self) {
        let wanted = self.exchanges.load(Ordering::Relaxed) + 10 * self.threads.len();
        wait_for("exchanges", || self.exchanges.load(Ordering::Relaxed) >= wanted);
    }

    fn end(self) {
        self.go_on.store(false, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

fn needs() {
    require(Cap::Ptrace);
    require(Cap::Program(PYTHON));
}

/// The name of the table that holds back packets for a dump.
fn table(images: &Path) -> String {
    let path = images.join(Kind::Inventory.file_name(0));
    let inventory: Vec<proto::InventoryEntry> = read_all(&path, Kind::Inventory).unwrap();
    let id = inventory[0].dump_criu_run_id.as_deref().unwrap();
    format!("CRIU-{}", std::str::from_utf8(id).unwrap())
}

/// Whether it is there.
fn is_held(images: &Path) -> bool {
    let listed = Command::new("nft").args(["list", "table", "inet", &table(images)]).output();
    listed.unwrap().status.success()
}

#[test]
fn privileged_clients_notice_nothing_but_a_pause() {
    needs();
    require(Cap::Fuse);
    require(Cap::Program("nft"));
    let (mut live, addresses) = server(6);
    let clients = Clients::start(&[addresses, addresses].concat());
    clients.go_on();
    live.images_name = "first";
    live.dump_running(&[ESTABLISHED]);
    clients.go_on();
    assert!(!is_held(&live.images()));
    live.images_name = "second";
    live.dump(&[ESTABLISHED, "--prev-images-dir", "../first"]);
    assert!(is_held(&live.images()));
    live.restore(&[ESTABLISHED]);
    assert!(!is_held(&live.images()));
    clients.go_on();
    live.images_name = "third";
    live.dump(&[ESTABLISHED, "--prev-images-dir", "../second"]);
    // A restore that fails leaves all to the next.
    live.fault = Some(Point::RestoreLast.name().to_owned());
    assert!(!live.try_restore(&[ESTABLISHED]).status.success());
    live.fault = None;
    assert!(is_held(&live.images()));
    let point = live.path("mnt");
    fs::create_dir(&point).unwrap();
    let _mounted = Mounted::new(&live.images(), &point, &[]);
    let work = live.images();
    let output = live.try_restore_from(&point, &[ESTABLISHED, "-W", work.to_str().unwrap()]);
    assert!(output.status.success(), "{}", live.complaint(&output, "restore.log"));
    assert!(!is_held(&live.images()));
    clients.go_on();
    clients.end();
    live.verdict();
}

/// What neither end has read yet arrives, in order, and both ends can close.
#[test]
fn privileged_queues_are_kept() {
    needs();
    const LINES: usize = 40;
    let (mut live, addresses) = server(3);
    let text = "x".repeat(100_000);
    let mut streams = addresses.map(connect);
    for stream in &mut streams {
        // This client does not read the answers, so the server stops reading.
        stream.get_mut().set_nonblocking(true).unwrap();
    }
    let mut sent = [0; 3];
    let whole = format!("{text}\n").repeat(LINES).into_bytes();
    let mut write_more = |streams: &mut [BufReader<TcpStream>; 3]| {
        for (stream, sent) in streams.iter_mut().zip(&mut sent) {
            while let Ok(count) = stream.get_mut().write(&whole[*sent..]) {
                *sent += count;
                if *sent == whole.len() {
                    break;
                }
            }
        }
        sent
    };
    wait_for("full queues", || {
        let before = write_more(&mut streams);
        thread::sleep(Duration::from_millis(200));
        before == write_more(&mut streams)
    });
    live.dump(&[ESTABLISHED]);
    live.restore(&[ESTABLISHED]);
    let done = write_more(&mut streams);
    for (mut stream, sent) in streams.into_iter().zip(done) {
        stream.get_mut().set_nonblocking(false).unwrap();
        let mut writer = stream.get_ref().try_clone().unwrap();
        let rest = whole[sent..].to_vec();
        let writing = thread::spawn(move || {
            writer.write_all(&rest).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        for number in 1..=LINES {
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            assert!(line == format!("{number} {text}\n"), "line {number}: {line:.80}");
        }
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"");
        writing.join().unwrap();
    }
    live.verdict();
}

#[test]
fn privileged_dumps_that_fail_leave_connections_as_they_are() {
    needs();
    let (mut live, addresses) = server(6);
    let clients = Clients::start(&addresses);
    // These wait, as what is killed in the few microseconds of a repair is not seen by a
    // program that does not use the socket then.
    let mut waiting = addresses.map(connect);
    for (point, how) in [
        (Point::TcpRepairing, ""),
        (Point::DumpFiles, ""),
        (Point::DumpFiles, ":kill"),
        (Point::DumpCommit, ":kill"),
        (Point::TcpParted, ""),
    ] {
        clients.go_on();
        failed_dump(&mut live, &format!("{}{how}", point.name()));
    }
    clients.go_on();
    clients.end();
    for stream in &mut waiting {
        exchange(stream, 1, "first");
    }
    for (number, options) in [(2, &[][..]), (3, &["-R"])] {
        live.fault = Some(format!("{}:kill", Point::TcpRepairing.name()));
        assert!(!live.try_dump(&[&[ESTABLISHED], options].concat()).status.success());
        for stream in &mut waiting {
            exchange(stream, number, "after that");
        }
        assert_eq!(reused(&live), 6, "SO_REUSEADDR of the listening and the accepted sockets");
    }
    live.fault = None;
    live.dump_running(&[ESTABLISHED]);
    drop(waiting);
    live.verdict();
}

/// How many TCP sockets of a server have `SO_REUSEADDR`, as asyncio sets it.
fn reused(live: &Live) -> usize {
    let root = HostPid(live.root.as_raw());
    let process = pidfd_open(root).unwrap();
    let numbers = rcriu::proc::fds(root).unwrap().into_iter();
    let files = numbers.filter_map(|number| pidfd_getfd(&process, number).ok());
    let is_tcp = |fd: &OwnedFd| {
        let kind: nix::Result<i32> = option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL);
        kind == Ok(libc::IPPROTO_TCP)
    };
    let reuse = |fd: OwnedFd| option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR) == Ok(1_i32);
    files.filter(is_tcp).filter(|fd| reuse(fd.try_clone().unwrap())).count()
}

fn failed_dump(live: &mut Live, fault: &str) {
    live.fault = Some(fault.to_owned());
    assert!(!live.try_dump(&[ESTABLISHED]).status.success(), "{fault}");
    let _ = fs::remove_dir_all(live.images());
}

/// When connections are to end without a packet, the snapshot is complete: the tree ends with
/// the dump.
#[test]
fn privileged_a_dump_that_is_killed_at_its_end_has_succeeded() {
    needs();
    let (mut live, addresses) = server(3);
    let clients = Clients::start(&addresses);
    clients.go_on();
    live.fault = Some(format!("{}:kill", Point::TcpParted.name()));
    let output = live.try_dump(&[ESTABLISHED]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("the snapshot is complete, and the tree has ended"), "{text}");
    live.wait_gone();
    live.fault = None;
    live.restore(&[ESTABLISHED]);
    clients.go_on();
    clients.end();
    live.verdict();
}

#[test]
fn privileged_connections_are_not_dumped_or_restored_unasked() {
    needs();
    let (mut live, addresses) = server(1);
    let mut stream = connect(addresses[0]);
    exchange(&mut stream, 1, "first");
    let said = |output: &std::process::Output| {
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let text = said(&live.try_dump(&[]));
    assert!(text.contains("in state ESTABLISHED") && text.contains(ESTABLISHED), "{text}");
    live.dump(&[ESTABLISHED]);
    let text = said(&live.try_restore(&[]));
    assert!(text.contains("help: restore with --tcp-established to keep it"), "{text}");
    live.restore(&[ESTABLISHED]);
    exchange(&mut stream, 2, "second");
    drop(stream);
    live.verdict();
}

/// Both ends see that their connection has ended, and others can be made.
#[test]
fn privileged_connections_are_closed_if_asked() {
    needs();
    for (dump, restore) in [("--tcp-close", &[][..]), (ESTABLISHED, &["--tcp-close"])] {
        let (mut live, addresses) = server(4);
        let mut streams = addresses.map(connect);
        for stream in &mut streams {
            exchange(stream, 1, "first");
        }
        live.dump(&[dump]);
        live.restore(restore);
        for mut stream in streams {
            // It may be told only when it sends something.
            let _ = stream.get_mut().write(b"something");
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
            assert_eq!(rest, b"", "{dump}");
        }
        let mut new = connect(addresses[0]);
        exchange(&mut new, 1, "first");
        drop(new);
        live.verdict();
    }
}

/// A dump that was never restored holds back the packets still.
#[test]
fn privileged_the_lock_of_another_dump_is_named() {
    needs();
    require(Cap::Program("nft"));
    let (mut live, addresses) = server(1);
    let mut stream = connect(addresses[0]);
    exchange(&mut stream, 1, "first");
    live.images_name = "lost";
    live.dump(&[ESTABLISHED]);
    let (lost, table) = (live.images(), table(&live.images()));
    assert!(is_held(&lost));
    // The same tree, of another dump.
    let inventory = lost.join("inventory.img");
    let whole = fs::read(&inventory).unwrap();
    let name = table.strip_prefix("CRIU-").unwrap();
    let at = whole.windows(name.len()).position(|part| part == name.as_bytes()).unwrap();
    let mut other = whole.clone();
    other[at] = if other[at] == b'0' { b'1' } else { b'0' };
    fs::write(&inventory, &other).unwrap();
    let output = live.try_restore(&[ESTABLISHED]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let remedy = format!("nft delete table inet {table}");
    assert!(!output.status.success() && text.contains(&remedy), "{text}");
    let words: Vec<_> = remedy.split(' ').skip(1).collect();
    assert!(Command::new("nft").args(words).status().unwrap().success());
    live.restore(&[ESTABLISHED]);
    exchange(&mut stream, 2, "second");
    drop(stream);
    live.verdict();
}

/// Another machine: a network namespace, with a cable of virtual devices to this one.
struct Machine {
    name: String,
    device: String,
    /// The addresses of this end of the cable, and of the other.
    ends: [Ipv4Addr; 2],
}

fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {words}: {output:?}");
}

impl Machine {
    fn new() -> Self {
        let pid = std::process::id();
        let [_, _, third, fourth] = pid.to_be_bytes();
        let end = |last| Ipv4Addr::new(10, third, fourth, last);
        let (name, device) = (format!("rcriu-{pid}"), format!("rcriu{}", pid % 1_000_000));
        let machine = Self { name, device, ends: [end(1), end(2)] };
        let Self { name, device, ends: [here, there] } = &machine;
        ip(&format!("netns add {name}"));
        ip(&format!("link add {device} type veth peer name eth0 netns {name}"));
        ip(&format!("addr add {here}/24 dev {device}"));
        ip(&format!("link set {device} up"));
        ip(&format!("-n {name} addr add {there}/24 dev eth0"));
        ip(&format!("-n {name} link set eth0 up"));
        machine
    }

    /// Runs a command there.
    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(Path::new("/run/netns").join(&self.name)).unwrap();
        thread::scope(|scope| {
            let there = scope.spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            there.join().unwrap()
        })
    }

    /// The TCP counters of its kernel: retransmissions, and all signs of a connection that did not
    /// end well.
    fn counts(&self) -> (u64, Vec<u64>) {
        let text = self.run(|| fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
        let (names, values) = (lines.next().unwrap().split(' '), lines.next().unwrap().split(' '));
        let all: BTreeMap<_, u64> =
            names.zip(values).map(|(name, value)| (name, value.parse().unwrap_or(0))).collect();
        let bad = ["AttemptFails", "EstabResets", "InErrs", "OutRsts"].map(|name| all[name]);
        (all["RetransSegs"], bad.to_vec())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
        let _ = Command::new("ip").args(["link", "del", &self.device]).output();
    }
}

/// While no process has the connection, this machine does not answer the other one at all.
#[test]
fn privileged_another_machine_notices_nothing_but_a_pause() {
    needs();
    require(Cap::Program("ip"));
    let machine = Machine::new();
    for lock in ["nftables", "iptables"] {
        let (mut live, addresses) = server(1);
        let address = SocketAddr::from((machine.ends[0], addresses[2].port()));
        let mut stream = machine.run(|| connect(address));
        exchange(&mut stream, 1, "before");
        let before = machine.counts();
        live.dump(&[ESTABLISHED, "--network-lock", lock]);
        writeln!(stream.get_mut(), "meanwhile").unwrap();
        wait_for("packets without an answer", || machine.counts().0 > before.0);
        live.restore(&[ESTABLISHED]);
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        assert_eq!(line, "2 meanwhile\n");
        exchange(&mut stream, 3, "afterwards");
        assert_eq!(machine.counts().1, before.1, "{lock}");
        drop(stream);
        live.verdict();
    }
}
