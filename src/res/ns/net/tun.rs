//! Network devices of programs (`/dev/net/tun`), which belong to a namespace of the tree.
//!
//! Some of their attributes are shown only by files that are attached to them. The restore makes a device by a file of
//! its own, which it holds until one of the tree is attached: so the device is connected while it gets its routes.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use nix::{errno::Errno, sys::stat::fstat};

use super::{
    Problem,
    links::{Link, shown},
    warn,
};
use crate::{
    image::proto::{NetDeviceEntry, TunLinkEntry},
    inject::{Task, living},
    proc,
    res::{
        ResError, Result,
        netlink::{Attributes, word},
        ns::HeldDevice,
        task,
    },
    sys::{
        process::{self, Shared},
        tun,
    },
    units::{HostId, HostPid, IdMap, NsId, TargetFd},
};

/// The kind of such devices.
pub(super) const KIND: &str = "tun";

/// Attributes of a device (`IFLA_TUN_*`, `linux/if_link.h`).
mod of {
    pub(super) const OWNER: u16 = 1;
    pub(super) const GROUP: u16 = 2;
    pub(super) const TYPE: u16 = 3;
    pub(super) const HAS_HEAD: u16 = 4;
    pub(super) const HAS_OFFLOAD_HEAD: u16 = 5;
    pub(super) const IS_PERSISTENT: u16 = 6;
    pub(super) const IS_MULTI_QUEUE: u16 = 7;
    pub(super) const QUEUES: u16 = 8;
    pub(super) const DETACHED_QUEUES: u16 = 9;
}

/// `IFF_LOWER_UP` (`linux/if.h`).
const LOWER_UP: u32 = 0x10000;

/// Types of packets (`linux/if_arp.h`): `ARPHRD_ETHER` and `ARPHRD_NONE`.
const ETHERNET: u16 = 1;
const NO_LINK_LAYER: u16 = 0xfffe;

/// No user, no group.
const NOBODY: i32 = -1;

/// The files of a tree that are attached to devices of a network namespace.
#[derive(Debug)]
pub(super) struct Files(Vec<Attached>);

#[derive(Debug)]
struct Attached {
    fd: OwnedFd,
    /// Who has it.
    pid: HostPid,
    number: TargetFd,
    device: tun::Device,
}

impl Files {
    /// Finds them for the namespace of a process, which has these devices.
    ///
    /// # Errors
    /// The errors of reading `/proc`.
    pub(super) fn find(tasks: &[Task], member: HostPid, links: &[Link]) -> Result<Self> {
        if !links.iter().any(|link| link.kind == KIND.as_bytes()) {
            return Ok(Self(Vec::new()));
        }
        let inode = proc::namespace(member, "net")?;
        let mut found: Vec<Attached> = Vec::new();
        for task in living(tasks) {
            let pid = task.witness();
            let process = task::open_process(task.into())?;
            for number in proc::Descriptors::open(pid)?.numbers()? {
                let path = format!("/proc/{pid}/fd/{number}");
                let stat = fs::metadata(&path);
                if !stat.is_ok_and(|stat| tun::is_tun(stat.mode(), stat.rdev())) {
                    continue;
                }
                let failed = |source| ResError::Process { pid, step: "look at a file of", source };
                let fd = process::pidfd_getfd(&process, number).map_err(failed)?;
                // `EBADF` for a file that only refers to the path.
                let device = match tun::device(fd.as_fd()) {
                    Err(Errno::EBADF) | Ok(None) => continue,
                    Ok(Some(device)) => device,
                    Err(errno) => return Err(failed(errno)),
                };
                let place = tun::network(fd.as_fd()).and_then(fstat).map_err(failed)?;
                if place.st_ino == inode && !is_known(&found, &fd).map_err(failed)? {
                    found.push(Attached { fd, pid, number, device });
                }
            }
        }
        Ok(Self(found))
    }

    /// Refuses all of them, if the devices are not kept.
    pub(super) fn refuse(&self, why: &str) -> Result<()> {
        let Some(Attached { pid, number, device, .. }) = self.0.first() else { return Ok(()) };
        let name = shown(&device.name);
        let what = format!("has at descriptor {number} a file of the network device {name}, {why}");
        let help = "have the program close the device, or dump the network namespace with the tree";
        Err(ResError::Refused { pid: *pid, what, help })
    }

    fn of<'a>(&'a self, link: &'a Link) -> impl Iterator<Item = &'a Attached> {
        self.0.iter().filter(|file| file.device.name == link.name)
    }

    /// Refuses a device that cannot be made again.
    pub(super) fn check(&self, link: &Link, pid: HostPid) -> Result<()> {
        let name = shown(&link.name);
        let refused = |what: String, help| Err(ResError::Refused { pid, what, help });
        let number = |kind| attribute(link, kind);
        let is_detached = |file: &&Attached| file.device.is_detached;
        let known = (self.of(link).count(), self.of(link).filter(is_detached).count());
        let all = if number(of::IS_MULTI_QUEUE) == Some(1) {
            let detached = number(of::DETACHED_QUEUES).unwrap_or(0);
            (number(of::QUEUES).unwrap_or(0) + detached, detached)
        } else {
            let is_open = number(of::IS_PERSISTENT) != Some(1) || link.flags & LOWER_UP != 0;
            (u32::from(is_open), 0)
        };
        let counts = |(all, detached): (u32, u32)| (all as usize, detached as usize);
        if known.0 < counts(all).0 {
            let what = format!(
                "has the network device {name} of kind tun, which a process outside of the tree has open (or \
                 a file of which waits in a socket)"
            );
            let help = "dump the tree with that process, or dump with --external net[INODE]:NAME";
            return refused(what, help);
        }
        let usual = if number(of::TYPE) == Some(tun::TAP) { ETHERNET } else { NO_LINK_LAYER };
        if link.hardware != usual {
            let what = format!(
                "has the network device {name} of kind tun, whose packets are of the type {} (TUNSETLINK), \
                 which is not kept",
                link.hardware
            );
            return refused(
                what,
                "remove it for the dump, or dump with --external net[INODE]:NAME",
            );
        }
        Ok(())
    }

    /// Returns the part of the entry of a device that only such devices have.
    pub(super) fn entry(&self, link: &Link, ids: &IdMap) -> TunLinkEntry {
        let file = self.of(link).next();
        let number = |kind| attribute(link, kind);
        let flag = |kind, flag| if number(kind) == Some(1) { flag } else { 0 };
        let mut flags = number(of::TYPE).unwrap_or(tun::TUN)
            | flag(of::HAS_OFFLOAD_HEAD, tun::OFFLOAD_HEAD)
            | flag(of::IS_PERSISTENT, tun::PERSISTENT)
            | flag(of::IS_MULTI_QUEUE, tun::MULTI_QUEUE)
            | file.map_or(0, |file| file.device.flags);
        if number(of::HAS_HEAD) == Some(0) {
            flags |= tun::NO_HEAD;
        }
        let (user, group) = (number(of::OWNER), number(of::GROUP));
        let (ns_user, ns_group) = ids.ns_owner((user.unwrap_or(0), group.unwrap_or(0)));
        let asked = |ask: fn(std::os::fd::BorrowedFd<'_>) -> nix::Result<u32>| {
            file.and_then(|file| ask(file.fd.as_fd()).ok())
        };
        if file.is_none() {
            warn(&format!(
                "no process has the network device {} open, so its send buffer and the size of its header for \
                 offloads are not known: the restore gives it those of a new device",
                shown(&link.name)
            ));
        }
        let buffer = asked(tun::send_buffer);
        let differs = |other: &Attached| tun::send_buffer(other.fd.as_fd()).ok() != buffer;
        if self.of(link).any(differs) {
            warn(&format!(
                "the files of the network device {} have send buffers of different sizes: the restore gives \
                 all that of the first",
                shown(&link.name)
            ));
        }
        TunLinkEntry {
            flags,
            owner: user.map_or(NOBODY, |_| ns_user.cast_signed()),
            group: group.map_or(NOBODY, |_| ns_group.cast_signed()),
            vnethdr: asked(tun::header_bytes).unwrap_or(tun::HEADER_BYTES),
            sndbuf: buffer.unwrap_or(tun::SEND_BUFFER_BYTES),
        }
    }
}

fn is_known(known: &[Attached], fd: &OwnedFd) -> nix::Result<bool> {
    use std::os::fd::AsRawFd;
    let own = HostPid::own();
    for other in known {
        let pair = Shared::File(other.fd.as_raw_fd(), fd.as_raw_fd());
        if process::kcmp(own, own, pair)?.is_eq() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns an attribute of a device, of whichever size the kernel gives it.
fn attribute(link: &Link, wanted: u16) -> Option<u32> {
    let data = link.data.as_deref().unwrap_or_default();
    let (_, value) = Attributes(data).find(|(kind, _)| *kind == wanted)?;
    match value {
        [byte] => Some(u32::from(*byte)),
        value => Some(word(value, 0)),
    }
}

/// Turns the users and groups of the images into those here.
pub(super) fn translate(device: &mut NetDeviceEntry, ids: &IdMap) {
    let Some(entry) = &mut device.tun else { return };
    let number = |id: i32| NsId(id.cast_unsigned());
    let here = |found: Option<HostId>| found.map_or(NOBODY, |id| id.0.cast_signed());
    if entry.owner != NOBODY {
        entry.owner = here(ids.host_user(number(entry.owner)));
    }
    if entry.group != NOBODY {
        entry.group = here(ids.host_group(number(entry.group)));
    }
}

/// Creates a device in the namespace that the calling thread is in. Returns the file that keeps it connected.
///
/// # Errors
/// The first failure.
pub(super) fn create(device: &NetDeviceEntry) -> Result<Option<HeldDevice>, Problem> {
    let name = shown(&device.name);
    let about = |step: &str| {
        let step = step.to_owned();
        let name = name.clone();
        move |errno: Errno| Problem(format!("{step} the network device {name}: {}", errno.desc()))
    };
    let Some(entry) = &device.tun else {
        return Err(Problem(format!("the network device {name} lacks the attributes of its kind")));
    };
    let file = File::options().read(true).write(true).open(tun::PATH);
    let file: OwnedFd = file
        .map_err(|error| {
            Problem(format!("open {} for the network device {name}: {error}", tun::PATH))
        })?
        .into();
    let fd = file.as_fd();
    tun::set_number(fd, device.ifindex).map_err(about("number"))?;
    tun::attach(fd, &device.name, entry.flags).map_err(about("create"))?;
    // It stays until a file of the tree is attached to it.
    tun::set_persistent(fd, true).map_err(about("keep"))?;
    if entry.owner != NOBODY {
        tun::set_owner(fd, entry.owner.cast_unsigned()).map_err(about("set the owner of"))?;
    }
    if entry.group != NOBODY {
        tun::set_group(fd, entry.group.cast_unsigned()).map_err(about("set the group of"))?;
    }
    tun::set_header_bytes(fd, entry.vnethdr).map_err(about("set the header of"))?;
    let is_connected = device.flags & LOWER_UP != 0;
    Ok(is_connected.then(|| HeldDevice { name: device.name.clone(), file }))
}
