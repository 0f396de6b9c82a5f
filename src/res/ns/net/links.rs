//! Network devices.
//!
//! A device of a kind that `ip link add` can create is created again with the attributes that the kernel lists of
//! it, and with its number. CRIU's images have no room for these attributes: they are in an extension.

use std::{
    collections::BTreeSet,
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use nix::{errno::Errno, libc};

use super::{
    Problem, outside,
    peers::{FarEnd, Neighbours},
    sysctl, tun,
};
use crate::{
    image::proto::{
        MacvlanLinkEntry, NdType, NetDeviceEntry, RcriuLink, RcriuOutside, TunLinkEntry,
    },
    res::{
        ResError, Result,
        netlink::{Attributes, Body, CREATE, EXCLUSIVE, Message, Talk, TalkError, text, word},
        ns::HeldDevice,
    },
    units::HostPid,
};

/// Types of messages (`linux/rtnetlink.h`).
const NEW_LINK: u16 = 16;
const GET_LINKS: u16 = 18;
const SET_LINK: u16 = 19;
const NEW_PROPERTY: u16 = 108;

/// The size of `struct ifinfomsg`.
const FIXED_BYTES: usize = 16;

/// Attributes of a device (`linux/if_link.h`).
pub(super) mod of {
    pub(in super::super) const ADDRESS: u16 = 1;
    pub(in super::super) const NAME: u16 = 3;
    pub(in super::super) const MTU: u16 = 4;
    pub(super) const LOWER: u16 = 5;
    pub(super) const MASTER: u16 = 10;
    pub(super) const QUEUE_LEN: u16 = 13;
    pub(super) const INFO: u16 = 18;
    pub(super) const ALIAS: u16 = 20;
    pub(super) const GROUP: u16 = 27;
    pub(super) const SEND_QUEUES: u16 = 31;
    pub(super) const RECEIVE_QUEUES: u16 = 32;
    pub(super) const LOWER_NAMESPACE: u16 = 37;
    pub(super) const PROPERTIES: u16 = 52;
    pub(super) const OTHER_NAME: u16 = 53;
}

/// Attributes within [`of::INFO`].
mod info {
    pub(super) const KIND: u16 = 1;
    pub(super) const DATA: u16 = 2;
    pub(super) const PORT_KIND: u16 = 4;
    pub(super) const PORT_DATA: u16 = 5;
}

/// `IFLA_NET_NS_FD`, `linux/if_link.h`.
pub(super) const NAMESPACE: u16 = 28;

/// `VETH_INFO_PEER`, `linux/veth.h`.
const VETH_PEER: u16 = 1;

/// `IFLA_MACVLAN_MODE`, `IFLA_MACVLAN_FLAGS`.
const MACVLAN_MODE: u16 = 1;
const MACVLAN_FLAGS: u16 = 2;

/// Flags that a program sets: `IFF_UP`, `IFF_NOTRAILERS`, `IFF_NOARP`, `IFF_PROMISC`,
/// `IFF_ALLMULTI`, `IFF_DYNAMIC` (`linux/if.h`).
const UP: u32 = 1;
const FLAGS: u32 = UP | 0x20 | 0x80 | 0x100 | 0x200 | 0x8000;

/// `ARPHRD_LOOPBACK`, `linux/if_arp.h`.
const LOOPBACK: u16 = 772;

/// The longest name of a device with its zero (`IFNAMSIZ`), and of an alternative one.
const NAME_BYTES: usize = 16;
const OTHER_NAME_BYTES: usize = 128;

/// Attributes of a bridge (`IFLA_BR_*`) that show its state, or that the kernel does not take: identifiers, timers, counters.
const OF_BRIDGE_STATE: [u16; 14] = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 21, 40, 47, 48];

/// Attributes of a port of a bridge that can be set (`IFLA_BRPORT_*`).
const OF_PORT: [u16; 23] =
    [2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 25, 27, 28, 29, 30, 31, 32, 33, 37, 39, 40, 42, 43];

/// The devices that the kernel adds to each namespace by itself.
const AUTOMATIC: [&str; 9] =
    ["sit0", "gre0", "gretap0", "erspan0", "tunl0", "ip_vti0", "ip6tnl0", "ip6_vti0", "ip6gre0"];

/// Kinds of devices that are created with the attributes that are listed of them.
const KINDS: [&str; 20] = [
    "veth", "bridge", "dummy", "ifb", "nlmon", "vcan", "vlan", "macvlan", "macvtap", "ipvlan",
    "ipvtap", "vxlan", "geneve", "vrf", "gre", "gretap", "ipip", "sit", "ip6tnl", "ip6gre",
];

/// A device as the kernel lists it.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) flags: u32,
    pub(super) hardware: u16,
    pub(super) name: Vec<u8>,
    pub(super) mtu: u32,
    pub(super) address: Option<Vec<u8>>,
    pub(super) master: Option<u32>,
    /// The device below it, or its other end.
    pub(super) lower: Option<u32>,
    /// The number of the namespace of that one, if it is another.
    pub(super) lower_namespace: Option<u32>,
    other_names: Vec<Vec<u8>>,
    alias: Option<Vec<u8>>,
    group: u32,
    queue_len: u32,
    queues: [u32; 2],
    pub(super) kind: Vec<u8>,
    pub(super) data: Option<Vec<u8>>,
    port_kind: Option<Vec<u8>>,
    port_data: Option<Vec<u8>>,
}

impl Link {
    fn parse(message: &Message) -> Self {
        let attribute = |kind| message.attribute(FIXED_BYTES, kind);
        let number = |kind| attribute(kind).map(|value| word(value, 0));
        let info = |kind| {
            let found = attribute(of::INFO).and_then(|info| {
                Attributes(info).find(|(found, _)| *found == kind).map(|(_, value)| value)
            });
            found.map(<[u8]>::to_vec)
        };
        let properties = attribute(of::PROPERTIES).map_or(Attributes(&[]), Attributes);
        Self {
            index: word(&message.body, 1),
            flags: word(&message.body, 2),
            hardware: (word(&message.body, 0) >> 16) as u16,
            name: attribute(of::NAME).map(text).unwrap_or_default(),
            mtu: number(of::MTU).unwrap_or(0),
            address: attribute(of::ADDRESS).map(<[u8]>::to_vec),
            master: number(of::MASTER),
            lower: number(of::LOWER),
            lower_namespace: number(of::LOWER_NAMESPACE),
            other_names: properties
                .filter(|(kind, _)| *kind == of::OTHER_NAME)
                .map(|(_, name)| text(name))
                .collect(),
            alias: attribute(of::ALIAS).map(text),
            group: number(of::GROUP).unwrap_or(0),
            queue_len: number(of::QUEUE_LEN).unwrap_or(0),
            queues: [of::SEND_QUEUES, of::RECEIVE_QUEUES].map(|kind| number(kind).unwrap_or(1)),
            kind: info(info::KIND).map(|kind| text(&kind)).unwrap_or_default(),
            data: info(info::DATA),
            port_kind: info(info::PORT_KIND).map(|kind| text(&kind)),
            port_data: info(info::PORT_DATA),
        }
    }

    fn is_loopback(&self) -> bool {
        self.hardware == LOOPBACK
    }

    /// Whether the kernel adds it by itself, so that it need not be kept.
    fn is_automatic(&self) -> bool {
        AUTOMATIC.iter().any(|name| name.as_bytes() == self.name) && self.flags & UP == 0
    }

    /// Refuses a device that cannot be created again. `here` are the devices of the namespace of rcriu.
    pub(super) fn check(
        &self,
        pid: HostPid,
        here: &[Link],
        (neighbours, files): (&Neighbours, &tun::Files),
    ) -> Result<()> {
        let (name, kind) = (shown(&self.name), shown(&self.kind));
        let (what, help) = if self.is_loopback() || self.is_automatic() {
            return Ok(());
        } else if kind.is_empty() {
            let what = format!("has the network device {name}, which is no virtual device");
            (what, "move it to the namespace of the machine for the dump: ip link set DEV netns 1")
        } else if kind == tun::KIND {
            return files.check(self, pid);
        } else if !KINDS.contains(&kind.as_str()) {
            let what = format!("has the network device {name} of kind {kind}, which is not kept");
            (what, "remove it for the dump, or dump with --external net[INODE]:NAME")
        } else if let Some(number) = self.lower_namespace
            && !(kind == "veth" && neighbours.find(number).is_some())
            && !(neighbours.is_here(number) && outside::other_end(here, self).is_some())
        {
            return Err(self.connected(pid));
        } else {
            return Ok(());
        };
        Err(ResError::Refused { pid, what, help })
    }

    /// Returns the refusal of a device that is connected to a namespace outside of the images.
    fn connected(&self, pid: HostPid) -> ResError {
        let (name, kind) = (shown(&self.name), shown(&self.kind));
        let what = format!(
            "has the network device {name} of kind {kind}, which is connected to another network namespace"
        );
        let help = "remove it for the dump, or dump with --external net[INODE]:NAME";
        ResError::Refused { pid, what, help }
    }

    fn nd_type(&self) -> NdType {
        if self.is_loopback() {
            return NdType::Loopback;
        }
        match self.kind.as_slice() {
            b"veth" => NdType::Veth,
            b"bridge" => NdType::Bridge,
            b"macvlan" => NdType::Macvlan,
            kind if kind == tun::KIND.as_bytes() => NdType::Tun,
            // CRIU needs a plugin for it.
            _ => NdType::Extlink,
        }
    }

    /// Returns the entry of the image. `lower_in` is the number of the namespace of the device below it, or of its other
    /// end, if the images have that.
    fn entry(
        self,
        lower_in: Option<u32>,
        outside: Option<RcriuOutside>,
        tun: Option<TunLinkEntry>,
    ) -> NetDeviceEntry {
        let nd_type = self.nd_type();
        let macvlan = self.data.as_ref().filter(|_| nd_type == NdType::Macvlan).map(|data| {
            let value = |wanted| Attributes(data).find(|(kind, _)| *kind == wanted);
            let mode = value(MACVLAN_MODE).map_or(0, |(_, mode)| word(mode, 0));
            let short = |value: &[u8]| u16::from_ne_bytes([value[0], value[1]]).into();
            let flags = value(MACVLAN_FLAGS).filter(|(_, flags)| flags.len() >= 2);
            MacvlanLinkEntry { mode, flags: flags.map(|(_, flags)| short(flags)) }
        });
        let mut entry = NetDeviceEntry {
            r#type: nd_type.into(),
            ifindex: self.index,
            mtu: self.mtu,
            flags: self.flags,
            name: self.name,
            address: self.address.filter(|_| nd_type != NdType::Loopback),
            macvlan,
            tun,
            peer_ifindex: Some(self.lower.unwrap_or(self.index)),
            peer_nsid: lower_in,
            master: self.master,
            rcriu_link: Some(RcriuLink {
                kind: self.kind,
                data: self.data,
                port_kind: self.port_kind,
                port_data: self.port_data,
                group: self.group,
                queue_len: self.queue_len,
                send_queues: self.queues[0],
                receive_queues: self.queues[1],
                alias: self.alias,
                other_names: self.other_names,
                lower: self.lower.filter(|lower| *lower != 0),
                outside,
            }),
            ..NetDeviceEntry::default()
        };
        sysctl::read_device(&mut entry);
        entry
    }
}

/// Returns the name of a bridge, or of a port of one, that has other VLANs than each gets by itself, in the
/// namespace that the calling thread is in.
///
/// # Errors
/// The error of the kernel.
pub(super) fn with_vlans() -> Result<Option<String>, TalkError> {
    /// `IFLA_EXT_MASK` with `RTEXT_FILTER_BRVLAN`; `IFLA_AF_SPEC`; `IFLA_BRIDGE_VLAN_INFO`.
    const EXTENT: u16 = 29;
    const VLANS: u32 = 2;
    const SPECIFIC: u16 = 26;
    const VLAN: u16 = 2;
    /// `BRIDGE_VLAN_INFO_PVID` and `_UNTAGGED`: what the one VLAN of a new port has.
    const DEFAULT: u16 = 2 | 4;
    let family = u32::from(u8::try_from(libc::AF_BRIDGE).expect("families are small"));
    let asked = Body::new(&[family, 0, 0, 0].map(u32::to_ne_bytes).concat()).number(EXTENT, VLANS);
    let ports = match Talk::about_routes().list(GET_LINKS, &asked, NEW_LINK) {
        Err(error) if error.errno == Errno::EOPNOTSUPP => return Ok(None),
        ports => ports?,
    };
    let has_others = |port: &&Message| {
        let specific = port.attribute(FIXED_BYTES, SPECIFIC).unwrap_or_default();
        let mut vlans = Attributes(specific).filter(|(kind, _)| *kind == VLAN);
        let first = vlans.next().map(|(_, value)| word(value, 0));
        vlans.next().is_some() || first.is_some_and(|first| first & 0xffff != u32::from(DEFAULT))
    };
    let found = ports.iter().find(has_others);
    Ok(found.and_then(|port| port.attribute(FIXED_BYTES, of::NAME)).map(|name| shown(&text(name))))
}

/// Lists the devices of the namespace that the calling thread is in.
///
/// # Errors
/// The error of the kernel.
pub(super) fn list() -> Result<Vec<Link>, TalkError> {
    let all = Talk::about_routes().list(GET_LINKS, &Body::new(&[0; FIXED_BYTES]), NEW_LINK)?;
    Ok(all.iter().map(Link::parse).collect())
}

/// Returns the entries of the image; `namespace` is the number of the namespace there.
pub(super) fn entries(
    links: Vec<Link>,
    namespace: u32,
    (here, neighbours): (&outside::Here, &Neighbours),
    tun_entry: impl Fn(&Link) -> TunLinkEntry,
) -> Vec<NetDeviceEntry> {
    let kept = links.into_iter().filter(|link| !link.is_automatic());
    let entry = |link: Link| {
        let (lower_in, outside) = match link.lower_namespace {
            None => (Some(namespace), None),
            Some(number) if neighbours.is_here(number) => (None, here.end_of(&link)),
            Some(number) => (neighbours.find(number), None),
        };
        let tun = (link.kind == tun::KIND.as_bytes()).then(|| tun_entry(&link));
        link.entry(lower_in, outside, tun)
    };
    kept.map(entry).collect()
}

/// Checks the entries of an image.
///
/// # Errors
/// What is wrong with them.
pub(super) fn check(devices: &[NetDeviceEntry]) -> Result<(), String> {
    let is_name = |name: &[u8], most: usize| {
        let is_bad = |byte: &u8| matches!(byte, b'/' | b':' | 0) || byte.is_ascii_whitespace();
        !matches!(name, b"" | b"." | b"..") && name.len() < most && !name.iter().any(is_bad)
    };
    let mut numbers = BTreeSet::new();
    for device in devices {
        let (name, link) = (shown(&device.name), device.rcriu_link.clone().unwrap_or_default());
        if !is_name(&device.name, NAME_BYTES) {
            return Err(format!("{name:?} is not the name of a network device"));
        }
        if let Some(other) = link.other_names.iter().find(|name| !is_name(name, OTHER_NAME_BYTES)) {
            let other = shown(other);
            return Err(format!("{other:?} is not another name of the network device {name}"));
        }
        if link.outside.is_some_and(|end| !is_name(&end.name, NAME_BYTES)) {
            return Err(format!("the other end of the network device {name} has no name"));
        }
        if device.ifindex == 0 || device.ifindex > i32::MAX.cast_unsigned() {
            return Err(format!("the network device {name} has the number {}", device.ifindex));
        }
        if !numbers.insert(device.ifindex) {
            return Err(format!("two network devices have the number {}", device.ifindex));
        }
        if kind_of(device).is_none() {
            return Err(format!(
                "the network device {name} has the type {} ({:?}), which rcriu does not restore\nhelp: \
                 use --external net[INODE]:NAME for the dump",
                device.r#type, link.kind
            ));
        }
    }
    Ok(())
}

/// Returns the kind that a device is created with; empty for the loopback device, which is there.
fn kind_of(device: &NetDeviceEntry) -> Option<String> {
    let known = |kind: &str| KINDS.contains(&kind).then(|| kind.to_owned());
    match NdType::try_from(device.r#type).ok()? {
        NdType::Loopback => Some(String::new()),
        NdType::Veth => known("veth"),
        NdType::Bridge => known("bridge"),
        NdType::Macvlan => known("macvlan"),
        NdType::Tun => device.tun.is_some().then(|| tun::KIND.to_owned()),
        NdType::Extlink => known(&shown(&device.rcriu_link.as_ref()?.kind)),
        _ => None,
    }
}

pub(super) fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

pub(super) fn is_loopback(device: &NetDeviceEntry) -> bool {
    device.r#type == i32::from(NdType::Loopback)
}

fn is_tun(device: &NetDeviceEntry) -> bool {
    device.r#type == i32::from(NdType::Tun)
}

/// Returns `struct ifinfomsg`. `flags` are those to change, with their values.
pub(super) fn fixed(index: u32, flags: Option<u32>) -> Body {
    let (flags, change) = flags.map_or((0, 0), |flags| (flags & FLAGS, FLAGS));
    let family = u32::from(u8::try_from(libc::AF_UNSPEC).expect("it is 0"));
    Body::new(&[family, index, flags, change].map(u32::to_ne_bytes).concat())
}

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
    let there = list().map_err(Problem::about("list the network devices"))?;
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
            if !is_ready(lower) {
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
        if let Some(lower) = link.lower {
            body = body.number(of::LOWER, lower);
        }
        let macvlan = device.macvlan.as_ref().filter(|_| kind == "macvlan").map(|macvlan| {
            let data = Body::default().number(MACVLAN_MODE, macvlan.mode);
            let flags = macvlan.flags.and_then(|flags| u16::try_from(flags).ok());
            flags.map_or(data.clone(), |flags| data.with(MACVLAN_FLAGS, &flags.to_ne_bytes())).0
        });
        link.data.clone().or(macvlan)
    };
    let mut info = Body::default().text(info::KIND, kind.as_bytes());
    if let Some(data) = data.filter(|_| kind != "bridge") {
        let data = if kind == "vxlan" { of_vxlan(&data) } else { Body(data) };
        info = info.nested(info::DATA, &data);
    }
    let body = body.nested(of::INFO, &info);
    let begin = Instant::now();
    loop {
        match talk.change(NEW_LINK, CREATE | EXCLUSIVE, &body.0) {
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
    if let Some(data) = link.data.filter(|_| kind == "bridge") {
        set_bridge(talk, device, &data)?;
    }
    Ok(other_end)
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
    let found = talk.get(GET_LINKS, &fixed(device.ifindex, None), NEW_LINK);
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
    talk.change(NEW_LINK, 0, &body.0).map_err(about("set the attributes of", device))
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
    talk.change(NEW_LINK, 0, &body.0).map_err(about("set the attributes of the port of", device))
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
    Talk::about_routes().change(NEW_LINK, 0, &fixed(index, Some(flags)).0)
}

/// Sets the flags of the devices, which come up if they were.
///
/// # Errors
/// The first failure.
pub(super) fn start(devices: &[NetDeviceEntry]) -> Result<(), Problem> {
    let mut talk = Talk::about_routes();
    for device in devices {
        let body = fixed(device.ifindex, Some(device.flags));
        talk.change(NEW_LINK, 0, &body.0).map_err(about("set the flags of", device))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(number: u32, name: &str) -> NetDeviceEntry {
        let r#type = NdType::Veth.into();
        NetDeviceEntry { r#type, ifindex: number, name: name.into(), ..Default::default() }
    }

    #[test]
    fn devices_have_names_and_numbers_of_their_own() {
        let checked = |devices: &[NetDeviceEntry]| check(devices).unwrap_err();
        assert_eq!(check(&[device(1, "a"), device(2, "b")]), Ok(()));
        assert!(checked(&[device(1, "a"), device(1, "b")]).contains("two network devices"));
        assert!(checked(&[device(0, "a")]).contains("has the number 0"));
        for name in ["", "..", "a/b", "a b", "0123456789abcdef"] {
            assert!(checked(&[device(1, name)]).contains("is not the name"), "{name:?}");
        }
        let mut unknown = device(1, "a");
        unknown.r#type = NdType::Extlink.into();
        assert!(checked(&[unknown]).contains("which rcriu does not restore"));
    }
}
