//! Network devices.
//!
//! A device of a kind that `ip link add` can create is created again with the attributes that the kernel lists of
//! it, and with its number. CRIU's images have no room for these attributes: they are in an extension.

use std::collections::BTreeSet;

use nix::{errno::Errno, libc};

use super::{outside, peers::Neighbours, sysctl, tun};
use crate::{
    image::proto::{
        MacvlanLinkEntry, NdType, NetDeviceEntry, RcriuLink, RcriuOutside, TunLinkEntry,
    },
    res::{
        ResError, Result,
        netlink::{Attributes, Body, Message, Talk, TalkError, text, word},
    },
    units::HostPid,
};

/// Types of messages (`linux/rtnetlink.h`).
pub(super) const NEW_LINK: u16 = 16;
pub(super) const GET_LINKS: u16 = 18;

/// The size of `struct ifinfomsg`.
const FIXED_BYTES: usize = 16;

/// Attributes of a device (`linux/if_link.h`).
pub(super) mod of {
    pub(in super::super) const ADDRESS: u16 = 1;
    pub(in super::super) const NAME: u16 = 3;
    pub(in super::super) const MTU: u16 = 4;
    pub(in super::super) const LOWER: u16 = 5;
    pub(in super::super) const MASTER: u16 = 10;
    pub(in super::super) const QUEUE_LEN: u16 = 13;
    pub(in super::super) const INFO: u16 = 18;
    pub(in super::super) const ALIAS: u16 = 20;
    pub(in super::super) const GROUP: u16 = 27;
    pub(in super::super) const SEND_QUEUES: u16 = 31;
    pub(in super::super) const RECEIVE_QUEUES: u16 = 32;
    pub(in super::super) const LOWER_NAMESPACE: u16 = 37;
    pub(in super::super) const PROPERTIES: u16 = 52;
    pub(in super::super) const OTHER_NAME: u16 = 53;
}

/// Attributes within [`of::INFO`].
pub(super) mod info {
    pub(in super::super) const KIND: u16 = 1;
    pub(in super::super) const DATA: u16 = 2;
    pub(in super::super) const PORT_KIND: u16 = 4;
    pub(in super::super) const PORT_DATA: u16 = 5;
}

/// `IFLA_MACVLAN_MODE`, `IFLA_MACVLAN_FLAGS`.
pub(super) const MACVLAN_MODE: u16 = 1;
pub(super) const MACVLAN_FLAGS: u16 = 2;

/// Flags that a program sets: `IFF_UP`, `IFF_NOTRAILERS`, `IFF_NOARP`, `IFF_PROMISC`,
/// `IFF_ALLMULTI`, `IFF_DYNAMIC` (`linux/if.h`).
const UP: u32 = 1;
/// `IFF_RUNNING`.
pub(super) const RUNNING: u32 = 0x40;
const FLAGS: u32 = UP | 0x20 | 0x80 | 0x100 | 0x200 | 0x8000;

/// `ARPHRD_LOOPBACK`, `linux/if_arp.h`.
const LOOPBACK: u16 = 772;

/// The longest name of a device with its zero (`IFNAMSIZ`), and of an alternative one.
const NAME_BYTES: usize = 16;
const OTHER_NAME_BYTES: usize = 128;

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
    pub(super) fn parse(message: &Message) -> Self {
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
            && !(neighbours.is_here(number)
                && (outside::other_end(here, self).is_some()
                    || outside::below(here, self).is_some()))
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
                lower: self.lower.filter(|lower| *lower != 0 && outside.is_none()),
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
pub(super) fn kind_of(device: &NetDeviceEntry) -> Option<String> {
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

pub(super) fn is_veth(device: &NetDeviceEntry) -> bool {
    device.r#type == i32::from(NdType::Veth)
}

pub(super) fn is_tun(device: &NetDeviceEntry) -> bool {
    device.r#type == i32::from(NdType::Tun)
}

/// Returns `struct ifinfomsg`. `flags` are those to change, with their values.
pub(super) fn fixed(index: u32, flags: Option<u32>) -> Body {
    let (flags, change) = flags.map_or((0, 0), |flags| (flags & FLAGS, FLAGS));
    let family = u32::from(u8::try_from(libc::AF_UNSPEC).expect("it is 0"));
    Body::new(&[family, index, flags, change].map(u32::to_ne_bytes).concat())
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
