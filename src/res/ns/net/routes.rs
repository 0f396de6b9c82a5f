//! Addresses, routes, rules and neighbours, as messages of the kernel (`rtnetlink(7)`).
//!
//! The images are those of `ip addr save`, `ip route save` and `ip rule save`.

use nix::{errno::Errno, libc};

use super::{Problem, read_raw, warn, write_raw, wrong};
use crate::{
    image::{ImageStore, Kind, SnapshotWriter, proto::NetnsEntry},
    res::{
        ResError, Result,
        netlink::{APPEND, Body, CREATE, EXCLUSIVE, Message, REPLACE, Talk, TalkError, word},
    },
    units::HostPid,
};

/// Types of messages (`linux/rtnetlink.h`).
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const GET_ADDRESSES: u16 = 22;
const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const GET_ROUTES: u16 = 26;
const NEW_NEIGHBOUR: u16 = 28;
const GET_NEIGHBOURS: u16 = 30;
const NEW_RULE: u16 = 32;
const DELETE_RULE: u16 = 33;
const GET_RULES: u16 = 34;

/// The first word of the images of `ip(8)`.
const ADDRESS_MAGIC: u32 = 0x4736_1222;
const ROUTE_MAGIC: u32 = 0x4531_1224;
const RULE_MAGIC: u32 = 0x7170_6986;

/// Sizes of `struct ifaddrmsg`, `rtmsg` and `ndmsg`.
const ADDRESS_BYTES: usize = 8;
const ROUTE_BYTES: usize = 12;
const NEIGHBOUR_BYTES: usize = 12;

/// `IFA_FLAGS`, and the flags of addresses (`linux/if_addr.h`).
const ADDRESS_FLAGS: u16 = 8;
const ADDRESS_LIFETIME: u16 = 6;
const NO_DAD: u32 = 2;
const OPTIMISTIC: u32 = 4;
const DAD_FAILED: u32 = 8;
const TENTATIVE: u32 = 0x40;

/// `RTM_F_CLONED` (`linux/rtnetlink.h`), and flags of next hops that only the kernel sets.
const CLONED: u32 = 0x200;
const LOCAL_TABLE: u32 = 255;
const ROUTE_TABLE: u16 = 15;
const ROUTE_CACHE: u16 = 12;
const ROUTE_HOPS: u16 = 9;
/// `RTPROT_KERNEL`.
const BY_KERNEL: u8 = 2;
/// `RTNH_F_DEAD`, `RTNH_F_LINKDOWN`, `RTNH_F_OFFLOAD`, `RTNH_F_UNRESOLVED`, `RTNH_F_TRAP`.
const STATE_OF_HOP: u32 = 1 | 8 | 16 | 32 | 64;

/// `NUD_PERMANENT`, `NUD_NOARP`, and `NTF_PROXY`, `NTF_SELF`, `NTF_EXT_LEARNED` (`linux/neighbour.h`).
const PERMANENT: u16 = 0x80;
const NO_ARP: u16 = 0x40;
const PROXY: u8 = 8;

/// A failure of the dump.
#[derive(Debug)]
pub(super) enum Failure {
    List(&'static str, TalkError),
    Write(ResError),
}

impl Failure {
    /// Returns the error for a namespace that this process is in.
    pub(super) fn of(self, pid: HostPid) -> ResError {
        match self {
            Self::List(step, error) => super::failed(step, pid)(error),
            Self::Write(error) => error,
        }
    }
}

fn family(family: libc::c_int) -> u8 {
    u8::try_from(family).expect("families are small")
}

/// Returns the fixed part of a request with a family.
fn of_family(number: libc::c_int, bytes: usize) -> Body {
    let mut fixed = vec![0; bytes];
    fixed[0] = family(number);
    Body::new(&fixed)
}

fn addresses(talk: &mut Talk) -> Result<Vec<Message>, TalkError> {
    talk.list(GET_ADDRESSES, &of_family(libc::AF_UNSPEC, ADDRESS_BYTES), NEW_ADDRESS)
}

/// Lists the addresses of the namespace that the calling thread is in.
///
/// # Errors
/// The error of the kernel.
pub(super) fn all_addresses() -> Result<Vec<Message>, TalkError> {
    addresses(&mut Talk::about_routes())
}

/// Returns the number of the device of an address.
pub(super) fn device_of(address: &Message) -> u32 {
    word(&address.body, 1)
}

/// Adds addresses of an image to a device, whatever its number was. The kernel may have added some of them.
///
/// # Errors
/// The first failure.
pub(super) fn add_addresses(device: u32, image: &[u8], moment: Moment) -> Result<(), Problem> {
    let mut talk = Talk::about_routes();
    for address in Message::read_all(image).map_err(Problem)? {
        let mut body = ready_address(&address, moment);
        let Some(number) = body.get_mut(4..ADDRESS_BYTES) else { continue };
        number.copy_from_slice(&device.to_ne_bytes());
        let added = talk.change(NEW_ADDRESS, CREATE | REPLACE, &body);
        added.map_err(Problem::about(format!("add the address {}", show(&address))))?;
    }
    Ok(())
}

/// Lists the routes of a family, without those that are copies, and those that addresses bring along.
fn routes(talk: &mut Talk, of: libc::c_int) -> Result<Vec<Message>, TalkError> {
    let mut all = talk.list(GET_ROUTES, &of_family(of, ROUTE_BYTES), NEW_ROUTE)?;
    all.retain(|route| {
        let flags = word(&route.body, 2);
        // A kernel without IPv6 lists those of all families.
        let is_of_family = route.body.first() == Some(&family(of));
        let by_kernel = route.body.get(5) == Some(&BY_KERNEL);
        is_of_family && flags & CLONED == 0 && !(by_kernel && table(route) == LOCAL_TABLE)
    });
    Ok(all)
}

fn table(route: &Message) -> u32 {
    let named = route.attribute(ROUTE_BYTES, ROUTE_TABLE).map(|value| word(value, 0));
    named.unwrap_or_else(|| route.body.get(4).copied().unwrap_or(0).into())
}

fn rules(talk: &mut Talk, of: libc::c_int) -> Result<Vec<Message>, TalkError> {
    let mut all = talk.list(GET_RULES, &of_family(of, ROUTE_BYTES), NEW_RULE)?;
    all.retain(|rule| rule.body.first() == Some(&family(of)));
    Ok(all)
}

/// Lists the neighbours that a program has entered, and those that the machine answers for.
fn neighbours(talk: &mut Talk) -> Result<Vec<Message>, TalkError> {
    let permanent = of_family(libc::AF_UNSPEC, NEIGHBOUR_BYTES);
    let mut all = talk.list(GET_NEIGHBOURS, &permanent, NEW_NEIGHBOUR)?;
    all.retain(|one| word(&one.body, 2) & u32::from(PERMANENT) != 0);
    let mut proxies = vec![0; NEIGHBOUR_BYTES];
    proxies[10] = PROXY;
    for number in [libc::AF_INET, libc::AF_INET6] {
        proxies[0] = family(number);
        all.extend(talk.list(GET_NEIGHBOURS, &Body::new(&proxies), NEW_NEIGHBOUR)?);
    }
    all.retain(|one| {
        let state = word(&one.body, 2) & 0xffff;
        one.body.get(10).is_some_and(|flags| flags & PROXY != 0) || state & u32::from(NO_ARP) == 0
    });
    all.extend(forwarding(talk)?);
    Ok(all)
}

/// Whether an entry has the address of a remote end (`NDA_DST`), as those of VXLAN devices have.
fn has_remote(one: &Message) -> bool {
    const REMOTE: u16 = 1;
    one.body.first() == Some(&family(libc::AF_BRIDGE))
        && one.attribute(NEIGHBOUR_BYTES, REMOTE).is_some()
}

/// Lists the entries of the forwarding databases of bridges and VXLAN devices that a program has entered:
/// static ones, and those with a remote address. The kernel adds those of the devices' own addresses.
fn forwarding(talk: &mut Talk) -> Result<Vec<Message>, TalkError> {
    /// `NDA_CACHEINFO`, `NDA_MASTER` and `NTF_EXT_LEARNED`.
    const ONLY_SHOWN: [u16; 2] = [3, 9];
    const LEARNED: u8 = 0x10;
    let all =
        talk.list(GET_NEIGHBOURS, &of_family(libc::AF_BRIDGE, NEIGHBOUR_BYTES), NEW_NEIGHBOUR);
    let all = match all {
        // A kernel without bridges.
        Err(error) if error.errno == Errno::EOPNOTSUPP => return Ok(Vec::new()),
        all => all?,
    };
    let is_entered = |one: &Message| {
        let state = word(&one.body, 2) & 0xffff;
        let is_permanent = state & u32::from(PERMANENT) != 0;
        let has_remote = has_remote(one);
        one.body.first() == Some(&family(libc::AF_BRIDGE))
            && one.body.get(10).is_some_and(|flags| flags & LEARNED == 0)
            && (state & u32::from(NO_ARP) != 0 || is_permanent && has_remote)
    };
    let ready = |one: &Message| {
        let mut body = Body::new(&one.body[..NEIGHBOUR_BYTES]);
        let kept = one.attributes(NEIGHBOUR_BYTES).filter(|(kind, _)| !ONLY_SHOWN.contains(kind));
        for (kind, value) in kept {
            body = body.with(kind, value);
        }
        Message { kind: NEW_NEIGHBOUR, body: body.0 }
    };
    Ok(all.iter().filter(|one| is_entered(one)).map(ready).collect())
}

fn image(magic: u32, messages: &[Message]) -> Vec<u8> {
    let mut bytes = magic.to_le_bytes().to_vec();
    messages.iter().for_each(|message| message.write(&mut bytes));
    bytes
}

/// Writes the images, and adds to the entry what CRIU has no image for.
pub(super) fn dump(
    images: &SnapshotWriter,
    number: u32,
    entry: &mut NetnsEntry,
) -> Result<(), Failure> {
    let mut talk = Talk::about_routes();
    let list = |step| move |error| Failure::List(step, error);
    let (v4, v6) = (libc::AF_INET, libc::AF_INET6);
    let addresses = addresses(&mut talk).map_err(list("list the addresses of"))?;
    let routes4 = routes(&mut talk, v4).map_err(list("list the routes of"))?;
    let routes6 = routes(&mut talk, v6).map_err(list("list the routes of"))?;
    let rules4 = rules(&mut talk, v4).map_err(list("list the rules of"))?;
    for (kind, magic, messages) in [
        (Kind::Ifaddr, ADDRESS_MAGIC, addresses),
        (Kind::Route, ROUTE_MAGIC, routes4),
        (Kind::Route6, ROUTE_MAGIC, routes6),
        (Kind::Rule, RULE_MAGIC, rules4),
    ] {
        write_raw(images, kind, number, &image(magic, &messages)).map_err(Failure::Write)?;
    }
    let bytes = |messages: Vec<Message>| {
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| message.write(&mut bytes));
        (!bytes.is_empty()).then_some(bytes)
    };
    entry.rcriu_rules6 = bytes(rules(&mut talk, v6).map_err(list("list the rules of"))?);
    entry.rcriu_neighbours = bytes(neighbours(&mut talk).map_err(list("list the neighbours of"))?);
    Ok(())
}

/// What is to be restored; `None` if the images do not say.
#[derive(Debug, Default)]
pub(super) struct Routes {
    addresses: Option<Vec<Message>>,
    routes: [Option<Vec<Message>>; 2],
    rules: [Option<Vec<Message>>; 2],
    neighbours: Vec<Message>,
}

impl Routes {
    /// Reads the images.
    pub(super) fn read(images: &dyn ImageStore, number: u32, entry: &NetnsEntry) -> Result<Self> {
        let parse = |name: &str, bytes: &[u8], kind: u16| {
            let problem = |problem| wrong(number, &format!("{name}: {problem}"));
            let messages = Message::read_all(bytes).map_err(problem)?;
            match messages.iter().find(|message| message.kind != kind) {
                Some(other) => {
                    let what = format!("a message has type {}, expected {kind}", other.kind);
                    Err(problem(what))
                }
                None => Ok(messages),
            }
        };
        let of = |image: Kind, magic: u32, kind: u16| -> Result<Option<Vec<Message>>> {
            let Some(bytes) = read_raw(images, image, number)? else { return Ok(None) };
            let name = image.file_name(number.into());
            // CRIU leaves an empty image if `ip(8)` failed.
            let Some(messages) = bytes.strip_prefix(&magic.to_le_bytes()) else {
                let problem = format!("{name}: it does not begin with the word {magic:#x}");
                return if bytes.is_empty() { Ok(None) } else { Err(wrong(number, &problem)) };
            };
            parse(&name, messages, kind).map(Some)
        };
        let extension = |name: &str, bytes: Option<&Vec<u8>>, kind| {
            bytes.map(|bytes| parse(name, bytes, kind)).transpose()
        };
        let neighbours =
            extension("rcriu_neighbours", entry.rcriu_neighbours.as_ref(), NEW_NEIGHBOUR)?;
        Ok(Self {
            addresses: of(Kind::Ifaddr, ADDRESS_MAGIC, NEW_ADDRESS)?,
            routes: [
                of(Kind::Route, ROUTE_MAGIC, NEW_ROUTE)?,
                of(Kind::Route6, ROUTE_MAGIC, NEW_ROUTE)?,
            ],
            rules: [
                of(Kind::Rule, RULE_MAGIC, NEW_RULE)?,
                extension("rcriu_rules6", entry.rcriu_rules6.as_ref(), NEW_RULE)?,
            ],
            neighbours: neighbours.unwrap_or_default(),
        })
    }

    /// Adds the addresses. The devices are still down, so that no address is checked for duplicates.
    pub(super) fn restore_addresses(&self) -> Result<(), Problem> {
        let mut talk = Talk::about_routes();
        for address in self.addresses.iter().flatten() {
            let body = ready_address(address, Moment::Down);
            match talk.change(NEW_ADDRESS, CREATE | REPLACE, &body) {
                // Nothing but its routes would need such an address.
                Err(error) if error.errno == Errno::EEXIST => {}
                added => {
                    added.map_err(Problem::about(format!("add the address {}", show(address))))?
                }
            }
        }
        Ok(())
    }

    /// Removes what the kernel has added when the devices came up, and adds the rest.
    pub(super) fn restore(&self) -> Result<(), Problem> {
        let mut talk = Talk::about_routes();
        for address in self.addresses.iter().flatten().filter(|address| is_v6(address)) {
            let body = ready_address(address, Moment::Up);
            let changed = talk.change(NEW_ADDRESS, CREATE | REPLACE, &body);
            changed.map_err(Problem::about(format!("change the address {}", show(address))))?;
        }
        if let Some(wanted) = &self.addresses {
            let found = addresses(&mut talk).map_err(Problem::about("list the addresses"))?;
            for extra in found.iter().filter(|one| !wanted.iter().any(|w| same_address(w, one))) {
                let removed = talk.change(DELETE_ADDRESS, 0, &extra.body);
                removed.map_err(Problem::about(format!("remove the address {}", show(extra))))?;
            }
        }
        for (of, wanted) in [libc::AF_INET, libc::AF_INET6].into_iter().zip(&self.routes) {
            if let Some(wanted) = wanted {
                restore_routes(&mut talk, of, wanted)?;
            }
        }
        for (of, wanted) in [libc::AF_INET, libc::AF_INET6].into_iter().zip(&self.rules) {
            if let Some(wanted) = wanted {
                restore_rules(&mut talk, of, wanted)?;
            }
        }
        for one in &self.neighbours {
            // A VXLAN device may have several remote ends for one address.
            let flags = CREATE | if has_remote(one) { APPEND } else { REPLACE };
            if let Err(error) = talk.change(NEW_NEIGHBOUR, flags, &one.body) {
                warn(&format!("a neighbour ({}) is lost: {error}", show(one)));
            }
        }
        Ok(())
    }
}

/// Shows the start of a message: nothing else names it.
fn show(message: &Message) -> String {
    let bytes: Vec<_> = message.body.iter().take(40).map(|byte| format!("{byte:02x}")).collect();
    bytes.concat()
}

/// Whether two messages are about the same address of the same device.
fn same_address(one: &Message, other: &Message) -> bool {
    /// `IFA_LOCAL`, `IFA_ADDRESS`.
    const LOCAL: u16 = 2;
    const ADDRESS: u16 = 1;
    let key = |message: &Message| {
        let address = message.attribute(ADDRESS_BYTES, LOCAL);
        let address = address.or_else(|| message.attribute(ADDRESS_BYTES, ADDRESS));
        let fixed = message.body.get(..ADDRESS_BYTES).map(|fixed| (fixed[0], word(fixed, 1)));
        (fixed, address.map(<[u8]>::to_vec))
    };
    key(one) == key(other)
}

/// When an address is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// Before its device comes up, which would check the address for duplicates.
    Down,
    /// After that. The flag that has prevented the check is taken back.
    Up,
}

fn is_v6(message: &Message) -> bool {
    message.body.first() == Some(&family(libc::AF_INET6))
}

/// Returns the body of a request for an address of the images: usable at once.
fn ready_address(message: &Message, moment: Moment) -> Vec<u8> {
    let Some(fixed) = message.body.get(..ADDRESS_BYTES) else { return message.body.clone() };
    let mut fixed = fixed.to_vec();
    let flags = message.attribute(ADDRESS_BYTES, ADDRESS_FLAGS).map(|value| word(value, 0));
    let flags = flags.unwrap_or_else(|| fixed[2].into());
    let mut flags = flags & !(TENTATIVE | OPTIMISTIC | DAD_FAILED);
    if is_v6(message) && moment == Moment::Down {
        flags |= NO_DAD;
    }
    fixed[2] = 0;
    let mut body = Body::new(&fixed);
    for (kind, value) in message.attributes(ADDRESS_BYTES) {
        if kind == ADDRESS_LIFETIME {
            // The kernel takes the two lifetimes, and no times of creation.
            let lifetimes = [&value[..value.len().min(8)], &[0; 8]].concat();
            body = body.with(kind, &lifetimes);
        } else if kind != ADDRESS_FLAGS {
            body = body.with(kind, value);
        }
    }
    body.number(ADDRESS_FLAGS, flags).0
}

/// Returns a route without what only the kernel sets.
fn ready_route(message: &Message) -> Message {
    let Some(fixed) = message.body.get(..ROUTE_BYTES) else { return message.clone() };
    let flags = word(fixed, 2) & !STATE_OF_HOP;
    let mut body = Body::new(&[&fixed[..8], &flags.to_ne_bytes()].concat());
    for (kind, value) in message.attributes(ROUTE_BYTES) {
        match kind {
            ROUTE_CACHE => {}
            ROUTE_HOPS => body = body.with(kind, &ready_hops(value)),
            _ => body = body.with(kind, value),
        }
    }
    Message { kind: message.kind, body: body.0 }
}

/// Returns the hops of a route (`struct rtnexthop`, each with attributes) without their state.
fn ready_hops(hops: &[u8]) -> Vec<u8> {
    /// Where the flags are, behind a length of two bytes.
    const FLAGS_AT: usize = 2;
    let mut hops = hops.to_vec();
    let mut at = 0;
    while let Some(len) = hops.get(at..at + FLAGS_AT) {
        let len = u16::from_ne_bytes([len[0], len[1]]);
        if let Some(flags) = hops.get_mut(at + FLAGS_AT) {
            *flags &= !STATE_OF_HOP.to_le_bytes()[0];
        }
        at += usize::from(len).max(FLAGS_AT).next_multiple_of(4);
    }
    hops
}

fn restore_routes(talk: &mut Talk, of: libc::c_int, wanted: &[Message]) -> Result<(), Problem> {
    let found = routes(talk, of).map_err(Problem::about("list the routes"))?;
    let wanted: Vec<_> = wanted.iter().map(ready_route).collect();
    let found: Vec<_> = found.iter().map(ready_route).collect();
    for extra in found.iter().filter(|route| !wanted.contains(route)) {
        match talk.change(DELETE_ROUTE, 0, &extra.body) {
            Err(error) if error.errno == Errno::ESRCH => {}
            removed => {
                removed.map_err(Problem::about(format!("remove the route {}", show(extra))))?
            }
        }
    }
    // A route through a gateway needs the one to the gateway, whatever their order.
    let mut rest: Vec<_> = wanted.iter().filter(|route| !found.contains(route)).collect();
    loop {
        let before = rest.len();
        let mut failure = None;
        rest.retain(|route| {
            // Several routes of IPv6 to one destination are one with several hops.
            let added = match talk.change(NEW_ROUTE, CREATE | EXCLUSIVE, &route.body) {
                Err(error) if error.errno == Errno::EEXIST => {
                    talk.change(NEW_ROUTE, CREATE | APPEND, &route.body)
                }
                added => added,
            };
            match added {
                Err(error) if error.errno != Errno::EEXIST => {
                    failure = Some((show(route), error));
                    true
                }
                _ => false,
            }
        });
        match failure {
            None => return Ok(()),
            Some(_) if rest.len() < before => {}
            Some((route, error)) => {
                return Err(Problem::about(format!("add the route {route}"))(error));
            }
        }
    }
}

fn restore_rules(talk: &mut Talk, of: libc::c_int, wanted: &[Message]) -> Result<(), Problem> {
    let found = rules(talk, of).map_err(Problem::about("list the rules"))?;
    for extra in found.iter().filter(|rule| !wanted.contains(rule)) {
        let removed = talk.change(DELETE_RULE, 0, &extra.body);
        removed.map_err(Problem::about(format!("remove the rule {}", show(extra))))?;
    }
    for rule in wanted.iter().filter(|rule| !found.contains(rule)) {
        let added = talk.change(NEW_RULE, CREATE | EXCLUSIVE, &rule.body);
        added.map_err(Problem::about(format!("add the rule {}", show(rule))))?;
    }
    Ok(())
}
