//! State of a network namespace that is not kept: a dump refuses it by name, or warns of it.
//!
//! A tree that was restored without its IPsec policies would send in the clear, and without an ipset its
//! packet filter would mean something else; so these are refused. Traffic control changes only the order
//! and the pace of packets, so a dump warns of it.

use nix::errno::Errno;

use super::{failed, links, peers::Neighbours, warn};
use crate::{
    res::{
        ResError, Result,
        netlink::{Body, Message, Talk, TalkError, text, word},
    },
    units::HostPid,
};

/// Types of messages (`linux/rtnetlink.h`, `linux/xfrm.h`).
const NEW_QUEUEING: u16 = 36;
const GET_QUEUEINGS: u16 = 38;
const NEW_NEXT_HOP: u16 = 104;
const GET_NEXT_HOPS: u16 = 106;
const NEW_ASSOCIATION: u16 = 0x10;
const GET_ASSOCIATIONS: u16 = 0x12;
const NEW_POLICY: u16 = 0x13;
const GET_POLICIES: u16 = 0x15;
const NEW_NUMBER: u16 = 88;
const GET_NUMBERS: u16 = 90;

/// Sizes of `struct tcmsg`, `nhmsg`, `nfgenmsg` and `rtgenmsg`.
const QUEUEING_BYTES: usize = 20;
const NEXT_HOP_BYTES: usize = 8;
const FILTER_BYTES: usize = 4;
const GENERIC_BYTES: usize = 4;

/// `TCA_KIND` and `IPSET_ATTR_SETNAME`.
const KIND: u16 = 1;
const SET_NAME: u16 = 2;

/// `NFNL_SUBSYS_IPSET << 8 | IPSET_CMD_LIST`, and `IPSET_ATTR_PROTOCOL` with the oldest version that
/// all kernels take (`linux/netfilter/ipset/ip_set.h`).
const LIST_SETS: u16 = 6 << 8 | 7;
const SET_PROTOCOL: u16 = 1;
const SET_VERSION: u8 = 6;
/// `IPSET_ATTR_FLAGS` with `IPSET_FLAG_LIST_SETNAME`: names alone. In the network's byte order.
const SET_FLAGS: u16 = 6;
const BIG_ENDIAN: u16 = 0x4000;
const NAMES_ONLY: u32 = 2;

/// `NETNSA_NSID`.
const NUMBER: u16 = 1;

/// Asks for a list, which is empty if the kernel lacks the whole feature.
fn list(
    talk: &mut Talk,
    kind: u16,
    fixed: &Body,
    answer: u16,
) -> std::result::Result<Vec<Message>, TalkError> {
    match talk.list(kind, fixed, answer) {
        Err(error)
            if matches!(
                error.errno,
                Errno::EPROTONOSUPPORT | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOENT
            ) =>
        {
            Ok(Vec::new())
        }
        found => found,
    }
}

/// Refuses what a restore would lose, and warns of what matters less. The calling thread is in the
/// namespace.
///
/// # Errors
/// [`ResError::Refused`], or the error of the kernel.
pub(super) fn check(pid: HostPid, neighbours: &Neighbours) -> Result<()> {
    let refused = |what: String, help: &'static str| Err(ResError::Refused { pid, what, help });
    let mut ipsec = Talk::about_ipsec();
    for (kind, answer, name) in [
        (GET_ASSOCIATIONS, NEW_ASSOCIATION, "security associations (ip xfrm state)"),
        (GET_POLICIES, NEW_POLICY, "policies (ip xfrm policy)"),
    ] {
        let found = list(&mut ipsec, kind, &Body::default(), answer);
        let found = found.map_err(failed("list the IPsec state of", pid))?;
        if !found.is_empty() {
            let count = found.len();
            let what =
                format!("is in a network namespace with IPsec: {count} {name}, which are not kept");
            return refused(
                what,
                "remove them for the dump (ip xfrm state flush, ip xfrm policy flush), or dump with \
                 --external net[INODE]:NAME",
            );
        }
    }
    let sets = sets().map_err(failed("list the ipsets of", pid))?;
    if let Some(name) = sets.first() {
        let what = format!(
            "is in a network namespace with the ipset {}, which is not kept",
            String::from_utf8_lossy(name)
        );
        return refused(
            what,
            "use a set of nftables, which is kept; or dump with --external net[INODE]:NAME",
        );
    }
    let mut talk = Talk::about_routes();
    let hops = list(&mut talk, GET_NEXT_HOPS, &Body::new(&[0; NEXT_HOP_BYTES]), NEW_NEXT_HOP);
    let hops = hops.map_err(failed("list the next hops of", pid))?;
    if !hops.is_empty() {
        let what = format!(
            "is in a network namespace with {} objects of next hops (ip nexthop), which are not kept",
            hops.len()
        );
        return refused(
            what,
            "name the next hops in the routes, or dump with --external net[INODE]:NAME",
        );
    }
    if let Some(name) = links::with_vlans().map_err(failed("list the VLANs of", pid))? {
        let what =
            format!("has the network device {name} with VLANs of a bridge, which are not kept");
        return refused(
            what,
            "remove them for the dump (bridge vlan del), or dump with --external net[INODE]:NAME",
        );
    }
    warn_of_queueing(&mut talk).map_err(failed("list the traffic control of", pid))?;
    warn_of_numbers(&mut talk, neighbours)
        .map_err(failed("list the numbers of namespaces for", pid))
}

/// Returns the names of all sets of `ipset(8)`.
fn sets() -> std::result::Result<Vec<Vec<u8>>, TalkError> {
    let body = Body::new(&[0; FILTER_BYTES])
        .with(SET_PROTOCOL, &[SET_VERSION])
        .with(SET_FLAGS | BIG_ENDIAN, &NAMES_ONLY.to_be_bytes());
    let found = list(&mut Talk::about_filters(), LIST_SETS, &body, LIST_SETS)?;
    let name = |set: &Message| set.attribute(FILTER_BYTES, SET_NAME).map(text);
    Ok(found.iter().filter_map(name).collect())
}

/// Names the devices with queueing disciplines that a program has set. Those that the kernel sets by
/// itself have no handle.
fn warn_of_queueing(talk: &mut Talk) -> std::result::Result<(), TalkError> {
    let found = list(talk, GET_QUEUEINGS, &Body::new(&[0; QUEUEING_BYTES]), NEW_QUEUEING)?;
    let mut names: Option<Vec<links::Link>> = None;
    for one in found.iter().filter(|one| word(&one.body, 2) != 0) {
        if names.is_none() {
            names = Some(links::list()?);
        }
        let index = word(&one.body, 1);
        let link = names.iter().flatten().find(|link| link.index == index);
        let device = link.map_or_else(|| index.to_string(), |link| links::shown(&link.name));
        let kind = one.attribute(QUEUEING_BYTES, KIND).map(text).unwrap_or_default();
        let kind = String::from_utf8_lossy(&kind).into_owned();
        warn(&format!(
            "the traffic control of the network device {device} ({kind}) is not kept\nhelp: set it again \
             after the restore: tc qdisc"
        ));
    }
    Ok(())
}

/// Names the numbers that the namespace has for others outside of the tree (`ip netns set`), unless the kernel has
/// given them to the other ends of devices.
fn warn_of_numbers(talk: &mut Talk, neighbours: &Neighbours) -> std::result::Result<(), TalkError> {
    let fixed = Body::new(&[0; GENERIC_BYTES]);
    let found = list(talk, GET_NUMBERS, &fixed, NEW_NUMBER)?;
    if found.is_empty() {
        return Ok(());
    }
    let used: Vec<u32> = links::list()?.iter().filter_map(|link| link.lower_namespace).collect();
    let numbers = found.iter().filter_map(|one| one.attribute(GENERIC_BYTES, NUMBER));
    let is_lost = |number: &u32| !used.contains(number) && neighbours.find(*number).is_none();
    for number in numbers.map(|number| word(number, 0)).filter(is_lost) {
        warn(&format!(
            "the number {number} that the network namespace has for another one (ip netns set) is not kept"
        ));
    }
    Ok(())
}
