//! Drops the packets of connections that have no socket between a dump and a restore.
//!
//! If a packet arrives for which the kernel has no socket, the kernel resets the connection. So
//! rcriu has nftables drop the packets of the connections, in both directions, from when a dump
//! reads the sockets until a restore has recreated them. The nftables table has two sets with the
//! addresses and ports of the connections, one each for IPv4 and IPv6, and two chains that drop
//! packets that match them. Packets with CRIU's mark pass: the restore sends such packets to
//! complete a connection.
//!
//! During a dump, the table belongs to the dump's netlink socket, so the kernel removes it when the
//! dump exits (`NFT_TABLE_F_OWNER`, since Linux 5.12). A dump that kills its tree leaves a
//! permanent table. It has the name that CRIU uses, with the number of the dump, so both programs
//! find it when they restore.
//!
//! With `--network-lock iptables`, rcriu runs `iptables-restore` instead ([`Rules`]). The kernel does not
//! remove rules of iptables when a process exits: the dump does, or its supervisor.

mod rules;

use std::{
    ffi::{CStr, CString},
    io,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU32, Ordering},
};

use netlink_bindings::nftables::{
    self, Chained, CmpOps, MetaKeys, Nfgenmsg, PayloadBase, PushExprListAttrs, PushRuleAttrs,
    Registers, TableFlags, VerdictCode,
};
use netlink_bindings::traits::Pusher;
use netlink_socket2::NetlinkSocket;
use nix::libc;

pub(super) use self::rules::{Rules, lift_rules};

/// The mark of packets that the chains let pass (`SOCCR_MARK` of CRIU).
pub(super) const MARK: u32 = 0xc114;

/// The prefix of the names of permanent tables.
const PREFIX: &str = "CRIU-";

/// `NFNL_SUBSYS_NFTABLES`, `linux/netfilter/nfnetlink.h`.
const SUBSYSTEM: u16 = 10;

/// `NFPROTO_INET`, `linux/netfilter.h`.
const INET: u8 = 1;

/// The sequence numbers to reserve for a batch, more than it has requests.
const BATCH: u32 = 1 << 16;

/// A set of the table.
struct Set {
    name: &'static CStr,
    /// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
    protocol: u8,
    /// Where the addresses are in the header, source first.
    offset: u32,
    /// Bytes of both addresses.
    addresses_bytes: u32,
}

const SETS: [Set; 2] = [
    Set { name: c"conns4", protocol: 2, offset: 12, addresses_bytes: 8 },
    Set { name: c"conns6", protocol: 10, offset: 8, addresses_bytes: 32 },
];

/// The protocol of packets (`IPPROTO_TCP`).
const TCP: u8 = 6;

/// Elements in one request: an attribute has at most 64 KiB.
const ELEMENTS: usize = 512;

/// The first of the consecutive registers.
const FIRST_REGISTER: u32 = Registers::Reg3200 as u32;

/// `NFTA_LOOKUP_SREG`, `linux/netfilter/nf_tables.h`, and the length of an attribute that
/// holds a number.
const LOOKUP_SREG: u16 = 2;
const ATTRIBUTE_BYTES: u16 = 8;

/// Bytes of both ports.
const PORTS_BYTES: u32 = 4;

/// Bytes of a consecutive register (`NFT_REG32_SIZE`).
const REGISTER_BYTES: u32 = 4;

/// The chains, with their hooks (`linux/netfilter.h`).
const CHAINS: [(&CStr, u32); 2] = [(c"input", 1), (c"output", 3)];

/// How packets are dropped, as recorded in the inventory (`network_lock_method`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Rules of iptables, the default of CRIU.
    Iptables = 1,
    /// A table of nftables.
    Nftables = 2,
    /// Not at all.
    Skip = 3,
}

impl Method {
    /// Returns the method for a number in the inventory.
    pub(super) fn of(number: Option<u32>) -> Self {
        match number {
            Some(2) => Self::Nftables,
            Some(3) => Self::Skip,
            _ => Self::Iptables,
        }
    }
}

/// The local and the remote address of a connection.
pub(super) type Ends = (SocketAddr, SocketAddr);

/// Drops the packets of connections while it exists.
pub(super) struct Lock {
    socket: NetlinkSocket,
    table: CString,
}

impl std::fmt::Debug for Lock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lock").field("table", &self.table).finish_non_exhaustive()
    }
}

impl Lock {
    /// Creates a table without connections.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`; `EPROTONOSUPPORT`, `EOPNOTSUPP` where the kernel
    /// has no nftables.
    pub(super) fn begin() -> io::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("rcriu-{}-{number}", std::process::id());
        let table = CString::new(name).expect("no zeros");
        let mut socket = NetlinkSocket::new();
        make(&mut socket, &table, TableFlags::Owner as u32, &[])?;
        Ok(Self { socket, table })
    }

    /// Drops the packets of more connections. The kernel takes milliseconds for each call.
    ///
    /// # Errors
    /// The errors of the kernel.
    pub(super) fn hold(&mut self, ends: &[Ends]) -> io::Result<()> {
        let table = self.table.clone();
        transact(&mut self.socket, |batch| add_elements(batch, &table, ends))
    }
}

/// Drops the packets of connections until [`lift`] is called for the same dump.
///
/// # Errors
/// The errors of the kernel.
pub(super) fn keep(dump: &str, ends: &[Ends]) -> io::Result<()> {
    make(&mut NetlinkSocket::new(), &name(dump), 0, ends)
}

/// Removes the table that [`keep`], or CRIU, has created for a dump.
///
/// # Errors
/// The errors of the kernel. It is no error if there is no such table, or no nftables.
pub(super) fn lift(dump: &str) -> io::Result<()> {
    let table = name(dump);
    let deleted = transact(&mut NetlinkSocket::new(), |batch| {
        batch.request().op_deltable_do(&header()).encode().push_name(&table);
    });
    match deleted.as_ref().map_err(io::Error::raw_os_error) {
        Err(Some(libc::ENOENT | libc::EPROTONOSUPPORT | libc::EOPNOTSUPP)) => Ok(()),
        _ => deleted,
    }
}

/// Returns the name of a table of another dump that drops packets of one of these connections.
///
/// # Errors
/// The errors of the kernel.
pub(super) fn other_holder(dump: &str, ends: &[Ends]) -> io::Result<Option<String>> {
    let own = name(dump);
    let mut socket = NetlinkSocket::new();
    for table in tables(&mut socket)? {
        if table == own || !table.to_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        for (set, protocol) in SETS.iter().zip([false, true]) {
            let held = elements(&mut socket, &table, set.name)?;
            let wanted = ends.iter().filter_map(|ends| key(*ends));
            if wanted.filter(|(v6, _)| *v6 == protocol).any(|(_, key)| held.contains(&key)) {
                return Ok(Some(table.to_string_lossy().into_owned()));
            }
        }
    }
    Ok(None)
}

fn name(dump: &str) -> CString {
    CString::new(format!("{PREFIX}{dump}")).unwrap_or_default()
}

fn tables(socket: &mut NetlinkSocket) -> io::Result<Vec<CString>> {
    let request = nftables::Request::new().op_gettable_dump(&header());
    let mut found = Vec::new();
    let mut replies = socket.request(&request)?;
    while let Some(reply) = replies.recv() {
        let (_, attributes) = reply?;
        if let Ok(name) = attributes.get_name() {
            found.push(name.to_owned());
        }
    }
    Ok(found)
}

/// Returns the keys in a set. A set that does not exist has none.
fn elements(socket: &mut NetlinkSocket, table: &CStr, set: &CStr) -> io::Result<Vec<Vec<u8>>> {
    let mut request = nftables::Request::new().op_getsetelem_dump(&header());
    request.encode().push_table(table).push_set(set);
    let mut found = Vec::new();
    let mut replies = socket.request(&request)?;
    while let Some(reply) = replies.recv() {
        let (_, attributes) = match reply {
            Err(error) if error.as_io_error().raw_os_error() == Some(libc::ENOENT) => break,
            reply => reply?,
        };
        let Ok(elements) = attributes.get_elements() else { continue };
        for element in elements.flatten() {
            let nftables::SetelemListElemAttrs::Elem(element) = element;
            if let Ok(value) = element.get_key().and_then(|key| key.get_value()) {
                found.push(value.to_vec());
            }
        }
    }
    Ok(found)
}

/// Creates a table with its sets, chains and rules, in one transaction.
fn make(socket: &mut NetlinkSocket, table: &CStr, flags: u32, ends: &[Ends]) -> io::Result<()> {
    transact(socket, |batch| {
        let request = batch.request().set_create().set_excl();
        let mut new = request.op_newtable_do(&header());
        new.encode().push_name(table).push_flags(flags);
        for (id, set) in (1..).zip(&SETS) {
            let bytes = set.addresses_bytes + PORTS_BYTES;
            let mut new = batch.request().set_create().op_newset_do(&header());
            let new = new.encode().push_table(table);
            new.push_name(set.name).push_flags(0).push_key_type(0).push_key_len(bytes).push_id(id);
        }
        add_elements(batch, table, ends);
        for (chain, place) in CHAINS {
            let mut new = batch.request().set_create().op_newchain_do(&header());
            let new = new.encode().push_table(table).push_name(chain);
            new.nested_hook()
                .push_num(place)
                .push_priority(0)
                .end_nested()
                .push_policy(VerdictCode::Accept as u32)
                .push_type(c"filter");
            rule(batch, table, chain, |steps| {
                let steps = compare(load_meta(steps, MetaKeys::Mark), &MARK.to_ne_bytes());
                decide(steps, VerdictCode::Accept)
            });
            for set in &SETS {
                rule(batch, table, chain, |steps| {
                    let steps = compare(load_meta(steps, MetaKeys::Nfproto), &[set.protocol]);
                    let steps = compare(load_meta(steps, MetaKeys::L4Proto), &[TCP]);
                    let addresses = (PayloadBase::NetworkHeader, set.offset, set.addresses_bytes);
                    let ports = (PayloadBase::TransportHeader, 0, PORTS_BYTES);
                    let steps = load_packet(steps, FIRST_REGISTER, addresses);
                    let after = FIRST_REGISTER + set.addresses_bytes / REGISTER_BYTES;
                    let steps = look_up(load_packet(steps, after, ports), set);
                    decide(steps, VerdictCode::Drop)
                });
            }
        }
    })
}

/// Adds the keys of connections to the sets of a table, for both directions.
fn add_elements(batch: &mut Chained, table: &CStr, ends: &[Ends]) {
    let keys: Vec<_> =
        ends.iter().flat_map(|(own, peer)| [key((*own, *peer)), key((*peer, *own))]).collect();
    for (set, is_v6) in SETS.iter().zip([false, true]) {
        let of_set: Vec<_> = keys.iter().flatten().filter(|(v6, _)| *v6 == is_v6).collect();
        for some in of_set.chunks(ELEMENTS) {
            let request = batch.request().set_create();
            let mut new = request.op_newsetelem_do(&header());
            let new = new.encode().push_table(table).push_set(set.name);
            let mut elements = new.nested_elements();
            for (_, key) in some {
                elements =
                    elements.nested_elem().nested_key().push_value(key).end_nested().end_nested();
            }
            elements.end_nested();
        }
    }
}

/// Returns the key of packets from one address to another, and whether it belongs into the set for
/// IPv6; `None` if the addresses are of different families.
fn key(ends: Ends) -> Option<(bool, Vec<u8>)> {
    let ports = [ends.0.port().to_be_bytes(), ends.1.port().to_be_bytes()].concat();
    // The packets of IPv4-mapped IPv6 addresses are IPv4 packets.
    match (ends.0.ip().to_canonical(), ends.1.ip().to_canonical()) {
        (IpAddr::V4(source), IpAddr::V4(target)) => {
            Some((false, [&source.octets()[..], &target.octets(), &ports].concat()))
        }
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            Some((true, [&source.octets()[..], &target.octets(), &ports].concat()))
        }
        _ => None,
    }
}

fn rule(
    batch: &mut Chained,
    table: &CStr,
    chain: &CStr,
    steps: impl FnOnce(Steps<&mut Vec<u8>>) -> Steps<&mut Vec<u8>>,
) {
    let request = batch.request().set_create().set_append();
    let mut new = request.op_newrule_do(&header());
    let new = new.encode().push_table(table).push_chain(chain);
    steps(new.nested_expressions()).end_nested();
}

/// The steps of a rule.
type Steps<Prev> = PushExprListAttrs<PushRuleAttrs<Prev>>;

fn load_meta<P: Pusher>(steps: Steps<P>, key: MetaKeys) -> Steps<P> {
    let step = steps.nested_elem().nested_data_meta();
    step.push_dreg(FIRST_REGISTER).push_key(key as u32).end_nested().end_nested()
}

fn load_packet<P: Pusher>(
    steps: Steps<P>,
    register: u32,
    (base, offset, bytes): (PayloadBase, u32, u32),
) -> Steps<P> {
    let step = steps.nested_elem().nested_data_payload().push_dreg(register);
    step.push_base(base as u32).push_offset(offset).push_len(bytes).end_nested().end_nested()
}

/// Continues with the next rule if the first register has another value.
fn compare<P: Pusher>(steps: Steps<P>, value: &[u8]) -> Steps<P> {
    let step = steps.nested_elem().nested_data_cmp().push_sreg(FIRST_REGISTER);
    let step = step.push_op(CmpOps::Eq as u32).nested_data().push_value(value).end_nested();
    step.end_nested().end_nested()
}

/// Continues with the next rule if the key in the registers is not in the set.
fn look_up<P: Pusher>(steps: Steps<P>, set: &Set) -> Steps<P> {
    let mut step = steps.nested_elem().nested_data_lookup();
    // The crate (0.3.5) uses a different number for this attribute than the kernel.
    let bytes = step.as_vec_mut();
    bytes.extend(ATTRIBUTE_BYTES.to_ne_bytes());
    bytes.extend(LOOKUP_SREG.to_ne_bytes());
    bytes.extend(FIRST_REGISTER.to_be_bytes());
    step.push_set(set.name).end_nested().end_nested()
}

fn decide<P: Pusher>(steps: Steps<P>, verdict: VerdictCode) -> Steps<P> {
    let step = steps.nested_elem().nested_data_immediate();
    let data = step.push_dreg(Registers::RegVerdict as u32).nested_data().nested_verdict();
    data.push_code(verdict as u32).end_nested().end_nested().end_nested().end_nested()
}

/// Sends one transaction: the kernel makes all changes, or none.
fn transact(socket: &mut NetlinkSocket, requests: impl FnOnce(&mut Chained)) -> io::Result<()> {
    let mut batch = Chained::new(socket.reserve_seq(BATCH));
    let mut ends = Nfgenmsg::default();
    ends.set_res_id(SUBSYSTEM);
    batch.request().op_batch_begin_do(&ends);
    requests(&mut batch);
    batch.request().op_batch_end_do(&ends);
    socket.request_chained(&batch.finalize())?.recv_all()?;
    Ok(())
}

fn header() -> Nfgenmsg {
    Nfgenmsg { nfgen_family: INET, ..Nfgenmsg::default() }
}

/// Has to be held by tests that have a [`Lock`]. When a netlink socket is closed, the kernel gives
/// its number away before it removes the tables of that number, so that the table of another
/// socket of the same process can go with it.
#[cfg(test)]
pub(super) static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, Read, Write},
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use super::*;

    fn pair(address: &str) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (listener.accept().unwrap().0, client)
    }

    fn arrives(from: &mut TcpStream, to: &mut TcpStream) -> bool {
        from.write_all(b"x").unwrap();
        to.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        match to.read(&mut [0; 1]) {
            Ok(count) => count == 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Returns a name that is used in place of the number of a dump.
    fn number(of: &str) -> String {
        format!("test-{}-{of}", std::process::id())
    }

    #[test]
    fn privileged_packets_of_a_connection_are_held_back_as_long_as_the_lock_is_there() {
        let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for address in ["127.0.0.1", "::1"] {
            let (mut server, mut client) = pair(address);
            let (mut other, mut friend) = pair(address);
            let ends =
                |stream: &TcpStream| (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
            let mut lock = Lock::begin().unwrap();
            assert!(arrives(&mut server, &mut client));
            lock.hold(&[ends(&server)]).unwrap();
            assert!(!arrives(&mut server, &mut client));
            assert!(arrives(&mut other, &mut friend));
            drop(lock);
            let mut buffer = [0; 1];
            client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            assert_eq!(client.read(&mut buffer).unwrap(), 1);

            let (mine, others) = (number(address), number("other"));
            keep(&mine, &[ends(&client), ends(&friend)]).unwrap();
            assert!(!arrives(&mut client, &mut server));
            assert!(!arrives(&mut other, &mut friend));
            let found = other_holder(&others, &[ends(&server)]).unwrap();
            assert_eq!(found, Some(format!("CRIU-{mine}")));
            assert_eq!(other_holder(&mine, &[ends(&server)]).unwrap(), None);
            lift(&mine).unwrap();
            lift(&mine).unwrap();
            server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            assert_eq!(server.read(&mut buffer).unwrap(), 1);
        }
    }
}
