//! Files of `/dev/net/tun`, by which programs send and receive the packets of a network device.
//!
//! The device itself belongs to its network namespace ([`res::ns`](crate::res::ns)), which makes it before any file is
//! open, and holds it until a file takes its place. In an image the path of such a file has an entry of its own.

use std::os::fd::AsFd;

use nix::{poll::PollFlags, sys::stat::fstat};

use super::{
    Collector, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage, descriptor,
    path,
};
use crate::{
    causes::tell,
    image::{
        Kind as Image,
        proto::{FdTypes, FileEntry, NetDeviceEntry, TunfileEntry},
    },
    sys::tun,
};

/// Comes before the files with a path.
pub(super) const KIND: FileKind = FileKind {
    name: "file of a network device",
    types: &[FdTypes::Tunf],
    usage: Usage::Descriptor,
    collector: |_| Box::new(Tun),
    opener: |_| Box::new(Tun),
};

/// `IFF_UP` and `IFF_LOWER_UP` (`linux/if.h`).
const UP: u32 = 1;
const LOWER_UP: u32 = 0x10000;

#[derive(Debug)]
struct Tun;

impl Collector for Tun {
    fn claims(&self, file: &Description) -> bool {
        tun::is_tun(file.stat.st_mode, file.stat.st_rdev) && !descriptor::is_path(file.flags)
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<FileEntry> {
        let found = tun::device(file.fd.as_fd()).map_err(file.failed("find the device of"))?;
        let network = file.network.as_ref().expect("it was looked for");
        let name = found.as_ref().map(|device| String::from_utf8_lossy(&device.name).into_owned());
        if let (Some(device), Some(name)) = (&found, &name) {
            let what = |rest: &str| format!("attached to the network device {name}, {rest}");
            if network.is_dumpers() {
                let rest = "which is in the network namespace of rcriu";
                let help = "have the program close it, or run the tree in a network namespace of its own \
                            (unshare --net)";
                return Err(file.unsupported(what(rest), help));
            }
            let place = tun::network(file.fd.as_fd());
            let place =
                place.map_err(file.failed("find the network namespace of the device of"))?;
            let place = fstat(place).map_err(file.failed("examine the network namespace of"))?;
            if !network.is(place.st_ino) {
                let rest = "which has moved to another network namespace since";
                let help =
                    "have the program open /dev/net/tun in the network namespace of the device";
                return Err(file.unsupported(what(rest), help));
            }
            if device.flags & tun::TAP != 0
                && tun::has_filter(file.fd.as_fd()).map_err(file.failed("find the filter of"))?
            {
                let rest = "which has a packet filter that cannot be read (TUNATTACHFILTER)";
                return Err(file.unsupported(what(rest), "have the program close the device"));
            }
            warn_of_packets(file, name)?;
        }
        let mut path = path::entry_of(file, intake)?;
        // The kernel shows the length of the last packet, and CRIU would seek there.
        path.reg.iter_mut().for_each(|reg| reg.pos = descriptor::NO_POSITION);
        let entry = TunfileEntry {
            id: file.id,
            netdev: found.as_ref().map(|device| device.name.clone()),
            detached: found.filter(|device| device.is_detached).map(|_| true),
            ns_id: Some(network.number),
        };
        Ok(FileEntry { r#type: FdTypes::Tunf.into(), tunf: Some(entry), ..path })
    }
}

/// Warns of packets that the program has not read.
fn warn_of_packets(file: &Description, device: &str) -> Result<()> {
    let wait = descriptor::events_among(file.fd.as_fd(), PollFlags::POLLIN);
    if wait.map_err(file.failed("poll"))?.contains(PollFlags::POLLIN) {
        let what = format!(
            "packets that wait in the network device {device} are lost at the restore, as a network may lose \
             packets"
        );
        tell(log::Level::Warn, &what);
    }
    Ok(())
}

impl Opener for Tun {
    fn open(&mut self, entries: &[FileEntry], opened: &mut Opened) -> Result<()> {
        let (mut buffers, mut detached) = (Vec::new(), Vec::new());
        let mut without_carrier = Vec::new();
        for entry in entries {
            let missing =
                || FileError::image(entry.id, "it is a file of /dev/net/tun without a path");
            let file = entry.reg.clone().ok_or_else(missing)?;
            let missing = || FileError::image(entry.id, "its entry is missing");
            let tunf = entry.tunf.as_ref().ok_or_else(missing)?;
            let fd = {
                let networks = std::rc::Rc::clone(&opened.networks);
                // The file belongs to the network namespace in which it is opened.
                let _visit = networks.visit(tunf.ns_id)?;
                path::open_entry(&file, file.flags.cast_signed(), opened)?
            };
            if let Some(name) = &tunf.netdev {
                let stat =
                    fstat(&fd).map_err(FileError::restore(entry.id, "examine", &file.name))?;
                if !tun::is_tun(stat.st_mode, stat.st_rdev) {
                    let problem =
                        format!("{} is not /dev/net/tun", String::from_utf8_lossy(&file.name));
                    return Err(FileError::image(entry.id, problem));
                }
                let device = device_of(entry.id, tunf, name, opened)?;
                let flags = device.tun.as_ref().map_or(0, |tun| tun.flags);
                let failed = |step| FileError::restore(entry.id, step, name);
                // A device may have room for one file only.
                opened.networks.release(tunf.ns_id, name);
                tun::attach(fd.as_fd(), name, flags).map_err(failed("attach a file to"))?;
                if flags & tun::PERSISTENT == 0 {
                    tun::set_persistent(fd.as_fd(), false).map_err(failed("set the end of"))?;
                }
                // It is one of the file, but set for all files that are attached.
                if let Some(bytes) = device.tun.as_ref().map(|tun| tun.sndbuf) {
                    buffers.push((entry.id, name, bytes));
                }
                if tunf.detached == Some(true) {
                    detached.push((entry.id, name));
                }
                if device.flags & (UP | LOWER_UP) == UP {
                    without_carrier.push((entry.id, name));
                }
            }
            opened.insert(entry.id, fd);
        }
        for (id, name, bytes) in buffers {
            let set = tun::set_send_buffer(opened.get(id)?, bytes);
            set.map_err(FileError::restore(id, "set the send buffer of", name))?;
        }
        // Later files would take the places of queues that are gone.
        for (id, name) in detached {
            tun::detach(opened.get(id)?).map_err(FileError::restore(
                id,
                "detach a file from",
                name,
            ))?;
        }
        for (id, name) in without_carrier {
            let set = tun::set_carrier(opened.get(id)?, false);
            set.map_err(FileError::restore(id, "disconnect", name))?;
        }
        opened.networks.release_all();
        Ok(())
    }
}

/// Returns the entry of the device that a file was attached to.
fn device_of(id: u32, file: &TunfileEntry, name: &[u8], opened: &Opened) -> Result<NetDeviceEntry> {
    let number = opened.networks.number(file.ns_id);
    let shown = String::from_utf8_lossy(name);
    let unknown = || {
        let problem =
            format!("it was attached to the network device {shown}, which the images do not have");
        FileError::image(id, problem)
    };
    let number = number.ok_or_else(unknown)?;
    let all = opened.images.messages_if_any::<NetDeviceEntry>(Image::Netdev, number.into())?;
    let mut all = all.into_iter().flatten();
    let found = all.find(|device| device.name == name && device.tun.is_some());
    found.ok_or_else(unknown)
}
