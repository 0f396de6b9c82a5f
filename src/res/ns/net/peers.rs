//! Network namespaces of a tree that know each other: the numbers that one has for others (`ip netns set`,
//! `link-netnsid`), and pairs of devices with an end in each of two.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use super::{Problem, external};
use crate::{
    image::{
        ImageStore, Kind,
        proto::{NdType, NetDeviceEntry, NetnsId},
    },
    res::{
        ResError, Result,
        netlink::{Body, Message, Talk, TalkError, word},
        ns::{Building, Dumped},
    },
};

/// The name of the kind in `/proc/PID/ns`.
const FILE: &str = "net";

/// `RTM_NEWNSID`, `RTM_GETNSID` (`linux/rtnetlink.h`).
const NEW_NUMBER: u16 = 88;
const GET_NUMBER: u16 = 90;

/// `NETNSA_NSID`, `NETNSA_FD` (`linux/net_namespace.h`).
const NUMBER: u16 = 1;
const DESCRIPTOR: u16 = 3;

/// The size of `struct rtgenmsg` with its padding.
const FIXED_BYTES: usize = 4;

/// What a namespace has for another one without a number (`NETNSA_NSID_NOT_ASSIGNED`).
const NONE: i32 = -1;

/// The other namespaces for which one has numbers.
#[derive(Debug)]
pub(super) struct Neighbours {
    /// Those of the tree that are in the images: the number there, and the number in the namespace.
    of_tree: Vec<(u32, i32)>,
    /// The number that it has for the namespace of rcriu.
    here: Option<i32>,
}

impl Neighbours {
    /// Finds those of the namespace that the calling thread is in. `all` are those of the tree, `here` is that of
    /// rcriu.
    ///
    /// # Errors
    /// The error of the kernel; a process is gone.
    pub(super) fn look(all: &[Dumped<'_>], here: &OwnedFd) -> Result<Self> {
        let mut talk = Talk::about_routes();
        let mut of_tree = Vec::new();
        for of in all {
            let pid = of.pid;
            let failed = |source| ResError::Process { pid, step: "find the networks of", source };
            if external(pid, &of.options.network)?.is_some() {
                continue;
            }
            let path = format!("/proc/{pid}/ns/{FILE}");
            let file =
                File::open(&path).map_err(|source| ResError::Read { path: path.into(), source })?;
            let found = ask(&mut talk, file.as_fd()).map_err(|error| failed(error.errno))?;
            of_tree.extend(found.map(|number| (of.number, number)));
        }
        // A kernel that does not tell has no such numbers.
        let here = ask(&mut talk, here.as_fd()).ok().flatten();
        Ok(Self { of_tree, here })
    }

    /// Returns the number in the images of the namespace that has this number.
    pub(super) fn find(&self, number: u32) -> Option<u32> {
        let number = number.cast_signed();
        self.of_tree.iter().find(|(_, known)| *known == number).map(|(namespace, _)| *namespace)
    }

    /// Whether the number is that of the namespace of rcriu.
    pub(super) fn is_here(&self, number: u32) -> bool {
        self.here == Some(number.cast_signed())
    }

    /// Returns what the image has of them.
    pub(super) fn entries(&self) -> Vec<NetnsId> {
        let entry = |(namespace, number): &(u32, i32)| NetnsId {
            target_ns_id: *namespace,
            netnsid_value: *number,
        };
        self.of_tree.iter().map(entry).collect()
    }
}

/// Returns the number that the namespace of the calling thread has for another one.
fn ask(talk: &mut Talk, namespace: BorrowedFd<'_>) -> std::result::Result<Option<i32>, TalkError> {
    let descriptor = namespace.as_raw_fd().cast_unsigned();
    let body = Body::new(&[0; FIXED_BYTES]).number(DESCRIPTOR, descriptor);
    let found = talk.get(GET_NUMBER, &body, NEW_NUMBER)?;
    let number = |message: &Message| message.attribute(FIXED_BYTES, NUMBER).map(|it| word(it, 0));
    let number = found.first().and_then(number).map(u32::cast_signed);
    Ok(number.filter(|number| *number != NONE))
}

/// Gives the namespace of the calling thread its numbers for others. `own` is its own number in the images.
///
/// # Errors
/// The first failure.
pub(super) fn number(ids: &[NetnsId], own: u32, on: &Building<'_>) -> Result<(), Problem> {
    let mut talk = Talk::about_routes();
    for id in ids {
        let (target, value) = (id.target_ns_id, id.netnsid_value);
        let about = |error: String| {
            Problem(format!("give the network namespace {target} the number {value}: {error}"))
        };
        let entrance = on.entrance(FILE, target);
        let entrance = match entrance {
            Some(entrance) => entrance.map_err(|error| about(error.to_string()))?,
            None if target == own => {
                super::outside::open().map_err(|errno| about(errno.to_string()))?
            }
            None => return Err(about("the images do not have it".to_owned())),
        };
        let body = Body::new(&[0; FIXED_BYTES])
            .number(DESCRIPTOR, entrance.as_raw_fd().cast_unsigned())
            .number(NUMBER, value.cast_unsigned());
        talk.change(NEW_NUMBER, 0, &body.0).map_err(|error| about(error.to_string()))?;
    }
    Ok(())
}

/// The other end of a device, in another namespace of the tree.
#[derive(Debug)]
pub(super) struct FarEnd {
    /// The number of the device that it belongs to.
    pub(super) of: u32,
    /// The number of its namespace in the images.
    pub(super) namespace: u32,
    /// Its entry there.
    pub(super) device: NetDeviceEntry,
}

/// Finds the other ends of devices that the images have in other namespaces than that with the number `own`.
///
/// # Errors
/// A malformed image; ends that do not belong to each other.
pub(super) fn far_ends(
    images: &dyn ImageStore,
    own: u32,
    devices: &[NetDeviceEntry],
) -> Result<Vec<FarEnd>> {
    let veth = i32::from(NdType::Veth);
    let mut found = Vec::new();
    for device in devices.iter().filter(|device| device.r#type == veth) {
        let (Some(namespace), Some(number)) = (device.peer_nsid, device.peer_ifindex) else {
            continue;
        };
        let has_outside = device.rcriu_link.as_ref().is_some_and(|link| link.outside.is_some());
        if namespace == own || has_outside {
            continue;
        }
        let all: Option<Vec<NetDeviceEntry>> =
            images.messages_if_any(Kind::Netdev, namespace.into())?;
        let Some(all) = all else { continue };
        let is_end = |other: &NetDeviceEntry| {
            (other.r#type, other.ifindex) == (veth, number)
                && (other.peer_nsid, other.peer_ifindex) == (Some(own), Some(device.ifindex))
        };
        let end = all.into_iter().find(is_end).ok_or_else(|| {
            let problem = format!(
                "the other end of the network device {} is the device {number} of the network namespace \
                 {namespace}, which is not there, or belongs to another one",
                super::links::shown(&device.name)
            );
            super::wrong(own, &problem)
        })?;
        found.push(FarEnd { of: device.ifindex, namespace, device: end });
    }
    Ok(found)
}

/// Opens the network namespace of an end.
///
/// # Errors
/// The tree does not get it.
pub(super) fn open(end: &FarEnd, on: &Building<'_>) -> Result<OwnedFd, Problem> {
    let name = super::links::shown(&end.device.name);
    let namespace = end.namespace;
    let opened = on.entrance(FILE, namespace).and_then(std::io::Result::ok);
    opened.ok_or_else(|| {
        Problem(format!(
            "the network device {name} is in the network namespace {namespace}, in which no process of the tree is"
        ))
    })
}
