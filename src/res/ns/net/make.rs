//! Creates the network devices of a namespace.

use std::{
    collections::BTreeSet,
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use nix::errno::Errno;

use super::{
    Problem,
    links::{self, Link, fixed, info, is_loopback, is_tun, kind_of, of, shown},
    outside,
    peers::FarEnd,
    sysctl, tun,
};
use crate::{
    image::proto::{NdType, NetDeviceEntry, RcriuOutside},
    res::{
        netlink::{Attributes, Body, CREATE, EXCLUSIVE, Talk, TalkError},
        ns::HeldDevice,
    },
    sys::visit::{Place, Visit},
};

/// `RTM_SETLINK`, `RTM_NEWLINKPROP` (`linux/rtnetlink.h`).
const SET_LINK: u16 = 19;
const NEW_PROPERTY: u16 = 108;

/// `IFLA_NET_NS_FD`, `linux/if_link.h`.
pub(super) const NAMESPACE: u16 = 28;

/// `VETH_INFO_PEER`, `linux/veth.h`.
const VETH_PEER: u16 = 1;

/// Attributes of a bridge (`IFLA_BR_*`) that show its state, or that the kernel does not take: identifiers, timers, counters.
const OF_BRIDGE_STATE: [u16; 14] = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 21, 40, 47, 48];

/// Attributes of a port of a bridge that can be set (`IFLA_BRPORT_*`).
const OF_PORT: [u16; 23] =
    [2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 25, 27, 28, 29, 30, 31, 32, 33, 37, 39, 40, 42, 43];

/// Creates the devices with their settings, down, and without addresses. Returns the files that keep those of
/// programs connected.
///
/// # Errors
/// The first failure.
pub(super) fn make(
    devices: &[NetDeviceEntry],
    here: &OwnedFd,
    far_ends: &[(&FarEnd, OwnedFd)],
) -> Result<Vec<HeldDevice>, Problem> {
    let mut talk = Talk::about_routes();
    // Those whose other end another namespace has made already.
    let there = links::list().map_err(Problem::about("list the network devices"))?;
    let there = there.iter().filter(|link| link.kind == b"veth").map(|link| link.index);
    let mut made: BTreeSet<u32> = there.collect();
    let mut held = Vec::new();
    let mut rest: Vec<&NetDeviceEntry> = devices.iter().collect();
    while !rest.is_empty() {
        let before = rest.len();
        for device in std::mem::take(&mut rest) {
            let lower = device.rcriu_link.as_ref().and_then(|link| link.lower);
            let is_ready = |wanted: Option<u32>| {
                let is_device = |number: u32| devices.iter().any(|device| device.ifindex == number);
                let is_veth = device.r#type == i32::from(NdType::Veth);
                wanted.is_none_or(|number| is_veth || made.contains(&number) || !is_device(number))
            };
            let below = device.rcriu_link.as_ref().and_then(|link| link.outside.as_ref());
            let below = below.filter(|_| !links::is_veth(device));
            // The device below may be the other end of a pair.
            let is_waiting = below.is_some_and(|below| {
                let is_end = |one: &&NetDeviceEntry| {
                    let link = one.rcriu_link.as_ref().filter(|_| links::is_veth(one));
                    let end = link.and_then(|link| link.outside.as_ref());
                    end.is_some_and(|end| end.name == below.name)
                };
                devices.iter().find(is_end).is_some_and(|end| !made.contains(&end.ifindex))
            });
            if !is_ready(lower) || is_waiting {
                rest.push(device);
                continue;
            }
            if is_tun(device) {
                held.extend(tun::create(device)?);
            } else if !is_loopback(device) && !made.contains(&device.ifindex) {
                let far = far_ends.iter().find(|(end, _)| end.of == device.ifindex);
                let far = far.map(|(end, namespace)| (*end, namespace));
                made.extend(create(&mut talk, device, devices, (here, far))?);
            }
            made.insert(device.ifindex);
            set(&mut talk, device)?;
        }
        if rest.len() == before {
            let names: Vec<_> = rest.iter().map(|device| shown(&device.name)).collect();
            return Err(Problem(format!("the devices {} need each other", names.join(", "))));
        }
    }
    for device in devices.iter().filter(|device| device.master.is_some()) {
        join(&mut talk, device)?;
    }
    devices.iter().for_each(sysctl::write_device);
    Ok(held)
}

fn about(what: &str, device: &NetDeviceEntry) -> impl FnOnce(TalkError) -> Problem + use<> {
    Problem::about(format!("{what} the network device {}", shown(&device.name)))
}

/// How long a device outside may take to go that belonged to a namespace which has ended.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(2);

/// The pause between two attempts.
const REMOVAL_NAP: Duration = Duration::from_millis(5);

/// Creates a device. Returns the number of the other end if it has one.
fn create(
    talk: &mut Talk,
    device: &NetDeviceEntry,
    devices: &[NetDeviceEntry],
    (here, far): (&OwnedFd, Option<(&FarEnd, &OwnedFd)>),
) -> Result<Option<u32>, Problem> {
    let kind = kind_of(device).expect("it was checked");
    let link = device.rcriu_link.clone().unwrap_or_default();
    let mut body = with_attributes(fixed(device.ifindex, None), device);
    for (attribute, count) in
        [(of::SEND_QUEUES, link.send_queues), (of::RECEIVE_QUEUES, link.receive_queues)]
    {
        if count > 1 {
            body = body.number(attribute, count);
        }
    }
    let mut other_end = None;
    // That of the device, if it is created from the one of rcriu.
    let mut namespace = None;
    let data = if let ("veth", Some(end)) = (kind.as_str(), &link.outside) {
        Some(Body::default().nested(VETH_PEER, &outside::attributes(end, here)).0)
    } else if let ("veth", Some((end, namespace))) = (kind.as_str(), far) {
        let far = with_attributes(fixed(end.device.ifindex, None), &end.device);
        let far = far.number(NAMESPACE, namespace.as_raw_fd().cast_unsigned());
        Some(Body::default().nested(VETH_PEER, &far).0)
    } else if kind == "veth" {
        let is_inside = |number: &u32| *number != device.ifindex && device.peer_nsid.is_some();
        let other = device.peer_ifindex.filter(is_inside);
        let other = devices.iter().find(|one| Some(one.ifindex) == other);
        let other = other.ok_or_else(|| {
            Problem(format!(
                "the other end of the network device {} is in another namespace, and the images do not say in \
                 which",
                shown(&device.name)
            ))
        })?;
        other_end = Some(other.ifindex);
        let other = with_attributes(fixed(other.ifindex, None), other);
        Some(Body::default().nested(VETH_PEER, &other).0)
    } else {
        let lower = match &link.outside {
            Some(below) => {
                let own = outside::open().map_err(|errno| {
                    Problem(format!(
                        "open the network namespace of {}: {errno}",
                        shown(&device.name)
                    ))
                })?;
                body = body.number(NAMESPACE, own.as_raw_fd().cast_unsigned());
                namespace = Some(own);
                Some(index_of(below, device, here)?)
            }
            None if kind == "macvlan" && link.lower.is_none() => {
                let name = shown(&device.name);
                return Err(Problem(format!(
                    "the images do not say which device is below the network device {name}\nhelp: restore with \
                     --external macvlan[{name}]:DEVICE"
                )));
            }
            None => link.lower,
        };
        if let Some(lower) = lower {
            body = body.number(of::LOWER, lower);
        }
        let macvlan = device.macvlan.as_ref().filter(|_| kind == "macvlan").map(|macvlan| {
            let data = Body::default().number(links::MACVLAN_MODE, macvlan.mode);
            let flags = macvlan.flags.and_then(|flags| u16::try_from(flags).ok());
            flags
                .map_or(data.clone(), |flags| data.with(links::MACVLAN_FLAGS, &flags.to_ne_bytes()))
                .0
        });
        link.data.clone().or(macvlan)
    };
    let mut info = Body::default().text(info::KIND, kind.as_bytes());
    if let Some(data) = data.filter(|_| kind != "bridge") {
        let data = match kind.as_str() {
            "vxlan" => of_vxlan(&data),
            "macvlan" | "macvtap" => of_macvlan(&data),
            _ => Body(data),
        };
        info = info.nested(info::DATA, &data);
    }
    let body = body.nested(of::INFO, &info);
    let begin = Instant::now();
    let mut from_here = Talk::about_routes();
    let visit = namespace.as_ref().map(|_| visit(here)).transpose()?;
    let talk_there = if visit.is_some() { &mut from_here } else { &mut *talk };
    loop {
        match talk_there.change(links::NEW_LINK, CREATE | EXCLUSIVE, &body.0) {
            // The kernel removes the devices of a namespace a moment after its last process.
            Err(error)
                if error.errno == Errno::EEXIST
                    && link.outside.is_some()
                    && begin.elapsed() < REMOVAL_PATIENCE =>
            {
                thread::sleep(REMOVAL_NAP);
            }
            made => break made.map_err(about("create", device))?,
        }
    }
    drop(visit);
    if let Some(data) = link.data.filter(|_| kind == "bridge") {
        set_bridge(talk, device, &data)?;
    }
    Ok(other_end)
}

fn visit(here: &OwnedFd) -> Result<Visit, Problem> {
    let failed = |error| Problem(format!("return to the network namespace of rcriu: {error}"));
    Visit::with(here, Place::Net).map_err(failed)
}

/// Returns the number of the device in the namespace of rcriu that is below another one.
fn index_of(below: &RcriuOutside, device: &NetDeviceEntry, here: &OwnedFd) -> Result<u32, Problem> {
    let _visit = visit(here)?;
    let all = links::list().map_err(about("find the device below", device))?;
    let found = all.iter().find(|link| link.name == below.name).map(|link| link.index);
    found.ok_or_else(|| {
        let (name, wanted) = (shown(&device.name), shown(&below.name));
        Problem(format!(
            "the network device {name} is on top of {wanted}, which is not there\nhelp: make a device with this \
             name, or restore with --external macvlan[{name}]:OTHER if it is a macvlan"
        ))
    })
}

/// Returns the attributes of a device of the kind macvlan as the kernel takes them.
fn of_macvlan(data: &[u8]) -> Body {
    /// `IFLA_MACVLAN_BC_QUEUE_LEN`, `_BC_CUTOFF`, which a new device takes like mode and flags.
    const TAKEN: [u16; 4] = [links::MACVLAN_MODE, links::MACVLAN_FLAGS, 7, 9];
    /// `IFLA_MACVLAN_MACADDR_MODE` with the order `MACVLAN_MACADDR_SET`, and `IFLA_MACVLAN_MACADDR_DATA`: the addresses
    /// of the mode `source`.
    const ORDER: u16 = 3;
    const SET: u32 = 3;
    const ADDRESSES: u16 = 5;
    let addresses = only(data, |(kind, value)| *kind == ADDRESSES && !value.is_empty());
    let mut taken = only(data, |(kind, _)| TAKEN.contains(kind));
    if !addresses.0.is_empty() {
        taken = taken.number(ORDER, SET);
        taken.0.extend(addresses.0);
    }
    taken
}

/// Returns the attributes of a VXLAN device as the kernel takes them.
fn of_vxlan(data: &[u8]) -> Body {
    /// `IFLA_VXLAN_TTL_INHERIT`, which the kernel lists as a number, and takes as a flag.
    const FLAG: u16 = 28;
    /// Attributes of `IFLA_VXLAN_*` that are off if they are 0, or missing. Of some of them, the
    /// kernel asks only whether they are there.
    const OFF: [u16; 9] = [11, 12, 13, 14, 19, 20, 21, 22, 25];
    let is_on = Attributes(data).any(|(kind, value)| kind == FLAG && value.first() != Some(&0));
    let is_wanted =
        |(kind, value): &(u16, &[u8])| *kind != FLAG && !(OFF.contains(kind) && *value == [0]);
    let data = only(data, is_wanted);
    if is_on { data.with(FLAG, &[]) } else { data }
}

/// Sets the attributes of a new bridge that differ. A kernel may lack some that have their defaults.
fn set_bridge(talk: &mut Talk, device: &NetDeviceEntry, data: &[u8]) -> Result<(), Problem> {
    let found = talk.get(links::GET_LINKS, &fixed(device.ifindex, None), links::NEW_LINK);
    let found = found.map_err(about("look at", device))?;
    let found = found.first().map(Link::parse).and_then(|link| link.data).unwrap_or_default();
    let differs = |(kind, value): &(u16, &[u8])| {
        !OF_BRIDGE_STATE.contains(kind) && !Attributes(&found).any(|one| one == (*kind, *value))
    };
    let data = only(data, differs);
    if data.0.is_empty() {
        return Ok(());
    }
    let info = Body::default().text(info::KIND, b"bridge").nested(info::DATA, &data);
    let body = fixed(device.ifindex, None).nested(of::INFO, &info);
    talk.change(links::NEW_LINK, 0, &body.0).map_err(about("set the attributes of", device))
}

/// Returns the attributes that satisfy a condition.
fn only(attributes: &[u8], is_wanted: impl Fn(&(u16, &[u8])) -> bool) -> Body {
    let mut kept = Body::default();
    // With the flags of their types, unlike what the iterator returns.
    let mut rest = attributes;
    while let Some((kind, value)) = Attributes(rest).next() {
        let whole = (value.len() + 4).next_multiple_of(4).min(rest.len());
        if is_wanted(&(kind, value)) {
            kept.0.extend(&rest[..whole]);
            kept.0.resize(kept.0.len().next_multiple_of(4), 0);
        }
        rest = &rest[whole..];
    }
    kept
}

/// Adds the attributes that a device of any kind has from the start.
fn with_attributes(body: Body, device: &NetDeviceEntry) -> Body {
    let mut body = body.text(of::NAME, &device.name).number(of::MTU, device.mtu);
    if let Some(address) = device.address.as_ref().filter(|_| !is_loopback(device)) {
        body = body.with(of::ADDRESS, address);
    }
    match &device.rcriu_link {
        Some(link) => body.number(of::GROUP, link.group).number(of::QUEUE_LEN, link.queue_len),
        None => body,
    }
}

/// Sets what a device cannot have from the start.
fn set(talk: &mut Talk, device: &NetDeviceEntry) -> Result<(), Problem> {
    if is_loopback(device) || is_tun(device) {
        let body = with_attributes(fixed(device.ifindex, None), device);
        talk.change(SET_LINK, 0, &body.0).map_err(about("set the attributes of", device))?;
    }
    if let Some(alias) = device.rcriu_link.as_ref().and_then(|link| link.alias.as_ref()) {
        let body = fixed(device.ifindex, None).with(of::ALIAS, alias);
        talk.change(SET_LINK, 0, &body.0).map_err(about("set the alias of", device))?;
    }
    let names = device.rcriu_link.iter().flat_map(|link| &link.other_names);
    for name in names {
        let names = Body::default().text(of::OTHER_NAME, name);
        let body = fixed(device.ifindex, None).nested(of::PROPERTIES, &names);
        talk.change(NEW_PROPERTY, CREATE | EXCLUSIVE, &body.0).map_err(about("name", device))?;
    }
    Ok(())
}

/// Makes a device a port of another.
fn join(talk: &mut Talk, device: &NetDeviceEntry) -> Result<(), Problem> {
    let Some(master) = device.master else { return Ok(()) };
    let body = fixed(device.ifindex, None).number(of::MASTER, master);
    talk.change(SET_LINK, 0, &body.0).map_err(about("set the master of", device))?;
    let link = device.rcriu_link.as_ref();
    let Some((kind, data)) =
        link.and_then(|link| link.port_kind.as_ref().zip(link.port_data.as_ref()))
    else {
        return Ok(());
    };
    if kind != b"bridge" {
        return Ok(());
    }
    let data = only(data, |(attribute, _)| OF_PORT.contains(attribute));
    let info = Body::default().text(info::PORT_KIND, kind).nested(info::PORT_DATA, &data);
    let body = fixed(device.ifindex, None).nested(of::INFO, &info);
    talk.change(links::NEW_LINK, 0, &body.0)
        .map_err(about("set the attributes of the port of", device))
}

/// Makes a device a port of another, by their numbers.
///
/// # Errors
/// The error of the kernel.
pub(super) fn join_to(index: u32, master: u32) -> Result<(), TalkError> {
    let body = fixed(index, None).number(of::MASTER, master);
    Talk::about_routes().change(SET_LINK, 0, &body.0)
}

/// Sets the flags of a device.
///
/// # Errors
/// The error of the kernel.
pub(super) fn set_flags(index: u32, flags: u32) -> Result<(), TalkError> {
    Talk::about_routes().change(links::NEW_LINK, 0, &fixed(index, Some(flags)).0)
}

/// Sets the flags of the devices, which come up if they were.
///
/// # Errors
/// The first failure.
pub(super) fn start(devices: &[NetDeviceEntry]) -> Result<(), Problem> {
    let mut talk = Talk::about_routes();
    for device in devices {
        let body = fixed(device.ifindex, Some(device.flags));
        talk.change(links::NEW_LINK, 0, &body.0).map_err(about("set the flags of", device))?;
    }
    Ok(())
}

/// Waits until the kernel has noticed that devices with these numbers are connected, which takes it up to a second.
/// Only then does it add addresses and routes of its own, which the restore removes if they were not there.
pub(super) fn await_running(numbers: &[u32]) {
    const PATIENCE: Duration = Duration::from_secs(2);
    let begin = Instant::now();
    let is_running = |links: &[Link], number: u32| {
        links.iter().any(|link| link.index == number && link.flags & links::RUNNING != 0)
    };
    while begin.elapsed() < PATIENCE {
        let links = links::list().unwrap_or_default();
        if numbers.iter().all(|number| is_running(&links, *number)) {
            return;
        }
        thread::sleep(REMOVAL_NAP);
    }
    log::warn!("the network devices {numbers:?} are not connected yet");
}
