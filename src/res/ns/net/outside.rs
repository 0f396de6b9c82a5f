//! The ends of pairs of devices (veth) that are in the namespace of rcriu, and devices there that others are on top of.
//!
//! The restore makes them with their devices, and connects them last: before, no packet of a peer may come that
//! would find no socket.

use std::{
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::errno::Errno;

use super::{
    Problem,
    links::{self, Link, shown},
    make,
    routes::{self, Moment},
    warn,
};
use crate::{
    image::proto::RcriuOutside,
    res::netlink::{Body, Message, TalkError},
};

/// What a dump sees of the namespace of rcriu.
#[derive(Debug)]
pub(super) struct Here {
    links: Vec<Link>,
    addresses: Vec<Message>,
}

impl Here {
    /// Looks at it. The calling thread is still in it.
    ///
    /// # Errors
    /// The error of the kernel.
    pub(super) fn look() -> Result<Self, TalkError> {
        Ok(Self { links: links::list()?, addresses: routes::all_addresses()? })
    }

    /// Returns the other end of a device, or that which it is on top of, if it is here.
    pub(super) fn end_of(&self, link: &Link) -> Option<RcriuOutside> {
        if let Some(below) = below(&self.links, link) {
            return Some(RcriuOutside { name: below.name.clone(), ..RcriuOutside::default() });
        }
        let end = other_end(&self.links, link)?;
        let mut addresses = Vec::new();
        let of_end =
            self.addresses.iter().filter(|address| routes::device_of(address) == end.index);
        of_end.for_each(|address| address.write(&mut addresses));
        let master = self.links.iter().find(|one| Some(one.index) == end.master);
        Some(RcriuOutside {
            name: end.name.clone(),
            address: end.address.clone(),
            mtu: end.mtu,
            flags: end.flags,
            master: master.map(|master| master.name.clone()),
            addresses: (!addresses.is_empty()).then_some(addresses),
        })
    }
}

/// Returns the other end of a device among those of the namespace of rcriu.
pub(super) fn other_end<'a>(here: &'a [Link], link: &Link) -> Option<&'a Link> {
    here.iter().find(|one| {
        one.kind == b"veth"
            && one.lower_namespace.is_some()
            && (Some(one.index), one.lower) == (link.lower, Some(link.index))
    })
}

/// Returns the device, among those of the namespace of rcriu, that another one is on top of.
pub(super) fn below<'a>(here: &'a [Link], link: &Link) -> Option<&'a Link> {
    /// Kinds of devices that are made from the namespace of the device below.
    const KINDS: [&[u8]; 5] = [b"macvlan", b"macvtap", b"ipvlan", b"ipvtap", b"vlan"];
    let is_below = |one: &&Link| Some(one.index) == link.lower;
    here.iter().find(is_below).filter(|_| KINDS.contains(&link.kind.as_slice()))
}

/// Opens the network namespace that the calling thread is in.
///
/// # Errors
/// `/proc` is not mounted.
pub(super) fn open() -> Result<OwnedFd, Errno> {
    let file = File::open("/proc/thread-self/ns/net");
    let file = file.map_err(|error| crate::sys::errno(&error))?;
    Ok(file.into())
}

/// Returns the attributes that the end outside is made with.
pub(super) fn attributes(end: &RcriuOutside, here: &OwnedFd) -> Body {
    let mut body = links::fixed(0, None).text(links::of::NAME, &end.name);
    body = body.number(links::of::MTU, end.mtu);
    if let Some(address) = &end.address {
        body = body.with(links::of::ADDRESS, address);
    }
    body.number(make::NAMESPACE, here.as_raw_fd().cast_unsigned())
}

/// Gives the end outside its addresses and its bridge, and starts it. The calling thread is in the namespace of
/// rcriu.
///
/// # Errors
/// The first failure.
pub(super) fn connect(end: &RcriuOutside) -> Result<(), Problem> {
    let name = shown(&end.name);
    let about = |step: &str| Problem::about(format!("{step} the network device {name}"));
    let here = links::list().map_err(about("find"))?;
    let find = |wanted: &[u8]| here.iter().find(|link| link.name == wanted).map(|link| link.index);
    let Some(index) = find(&end.name) else {
        return Err(Problem(format!("the network device {name} is gone")));
    };
    if let Some(master) = &end.master {
        match find(master) {
            Some(master) => make::join_to(index, master).map_err(about("set the master of"))?,
            None => warn(&format!(
                "the network device {name} was a port of {}, which does not exist",
                shown(master)
            )),
        }
    }
    let addresses = end.addresses.as_deref().unwrap_or_default();
    routes::add_addresses(index, addresses, Moment::Down)?;
    make::set_flags(index, end.flags).map_err(about("set the flags of"))?;
    routes::add_addresses(index, addresses, Moment::Up)
}
