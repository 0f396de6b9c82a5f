//! Network namespaces: devices, addresses, routes, packet filters and settings.
//!
//! The images are those of CRIU, which calls `ip(8)`, `nft(8)` and `iptables-save(8)`: the messages that the kernel lists
//! devices, addresses, routes and rules with go into them as they are. rcriu asks the kernel itself for
//! these, and runs only the programs for packet filters, those of the host, in the network namespace.
//!
//! Sockets belong to their namespace, too: [`res::file`] keeps them.

mod filter;
mod links;
mod make;
mod options;
mod others;
mod outside;
mod peers;
mod routes;
mod sysctl;
mod tun;
mod xtables;

use std::{
    fmt::Display,
    fs,
    io::Read,
    net::{Ipv6Addr, UdpSocket},
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use nix::libc;

use super::{Building, Dumped, HeldDevice, Namespace, Restoring, wrong};
use crate::{
    causes::tell,
    image::{
        ImageStore, Kind, SnapshotWriter,
        proto::{NetDeviceEntry, NetnsEntry},
    },
    proc,
    res::{self, ResError, Result, netlink::TalkError},
    sys::visit::{Place, Visit},
    units::{HostPid, IdMap},
};

/// The most bytes of an image of the kernel's messages, or of a packet filter.
const LARGEST_IMAGE_BYTES: u64 = 64 << 20;

pub use options::Options;
pub(super) use options::entered;
use peers::Neighbours;

#[derive(Debug)]
pub(super) struct Net;

impl Namespace for Net {
    fn clone_flag(&self) -> u64 {
        u64::from(libc::CLONE_NEWNET.cast_unsigned())
    }

    fn check_all(&self, all: &[Dumped<'_>]) -> Result<()> {
        all.iter().try_for_each(|of| check(of, all))
    }

    fn dump_all(&self, all: &[Dumped<'_>], images: &SnapshotWriter) -> Result<()> {
        all.iter().try_for_each(|of| dump(of, all, images))
    }

    fn restore(
        &self,
        images: &dyn ImageStore,
        number: u32,
        options: &super::Options,
    ) -> Result<Box<dyn Restoring>> {
        let options = &options.network;
        // The oldest images have none.
        let entry: NetnsEntry =
            images.message_if_any(Kind::Netns, number.into())?.unwrap_or_default();
        if let Some(name) = &entry.ext_key {
            return options.provided(number, name);
        }
        let problem = |problem: String| wrong(number, &problem);
        let mut devices: Vec<NetDeviceEntry> =
            images.messages_if_any(Kind::Netdev, number.into())?.unwrap_or_default();
        if options.is_empty {
            devices.retain(links::is_loopback);
        }
        devices.iter_mut().for_each(|device| options.apply(device));
        links::check(&devices).map_err(problem)?;
        if options.is_empty {
            let network = Network { number, devices, ..Network::default() };
            return Ok(Box::new(network));
        }
        let far_ends = peers::far_ends(images, number, &devices)?;
        let routes = routes::Routes::read(images, number, &entry)?;
        let filters = filter::Filters::read(images, number)?;
        let held = Vec::new();
        Ok(Box::new(Network { number, devices, entry, routes, filters, far_ends, held }))
    }
}

fn check(of: &Dumped<'_>, all: &[Dumped<'_>]) -> Result<()> {
    let (pid, options) = (of.pid, &of.options.network);
    let failed = || failed("list the devices of", pid);
    let here = links::list().map_err(failed())?;
    let rcrius = open_here(pid)?;
    let _visit = enter(pid)?;
    let links = links::list().map_err(failed())?;
    let files = tun::Files::find(of.tasks, pid, &links)?;
    if options.is_empty {
        return files.refuse("while the dump leaves out all devices (--empty-ns net)");
    }
    if external(pid, options)?.is_some() {
        return files.refuse("whose network namespace the dump leaves out (--external)");
    }
    let neighbours = Neighbours::look(all, &rcrius)?;
    let mut kept = links.iter().filter(|link| !options.has_end(&link.name));
    kept.try_for_each(|link| link.check(pid, &here, (&neighbours, &files)))?;
    others::check(pid, &neighbours)
}

fn dump(of: &Dumped<'_>, all: &[Dumped<'_>], images: &SnapshotWriter) -> Result<()> {
    let Dumped { pid, number, options, .. } = *of;
    if let Some(name) = external(pid, &options.network)? {
        let entry = NetnsEntry { ext_key: Some(name.into()), ..NetnsEntry::default() };
        return Ok(images.write(Kind::Netns, number.into(), &[entry])?);
    }
    // The thread is where this one is now.
    let fresh = (!options.network.is_empty).then(sysctl::OfNewNamespace::read);
    let here = outside::Here::look().map_err(failed("list the devices beside those of", pid))?;
    let rcrius = open_here(pid)?;
    let _visit = enter(pid)?;
    let links = links::list().map_err(failed("list the devices of", pid))?;
    let files = tun::Files::find(of.tasks, pid, &links)?;
    let neighbours = Neighbours::look(all, &rcrius)?;
    let tun_entry = |link: &links::Link| files.entry(link, of.ids);
    let mut devices = links::entries(links, number, (&here, &neighbours), tun_entry);
    let Some(fresh) = fresh else {
        // The loopback device is there in any namespace, and connections within it need it.
        devices.retain(links::is_loopback);
        return Ok(images.write(Kind::Netdev, number.into(), &devices)?);
    };
    images.write(Kind::Netdev, number.into(), &devices)?;
    let mut entry = sysctl::read_common(fresh, pid)?;
    entry.nsids = neighbours.entries();
    routes::dump(images, number, &mut entry).map_err(|error| error.of(pid))?;
    filter::dump(images, number, pid)?;
    Ok(images.write(Kind::Netns, number.into(), &[entry])?)
}

/// Returns the name of the namespace of a process, if it stays outside of the images.
fn external(pid: HostPid, options: &Options) -> Result<Option<&str>> {
    Ok(options.name_of(proc::namespace(pid, "net")?))
}

/// A network namespace to be restored. One that is kept empty has its loopback device only.
#[derive(Debug, Default)]
struct Network {
    number: u32,
    devices: Vec<NetDeviceEntry>,
    entry: NetnsEntry,
    routes: routes::Routes,
    filters: filter::Filters,
    far_ends: Vec<peers::FarEnd>,
    held: Vec<HeldDevice>,
}

impl Restoring for Network {
    fn translate(&mut self, ids: &IdMap) {
        self.devices.iter_mut().for_each(|device| tun::translate(device, ids));
    }

    fn take_devices(&mut self) -> Vec<HeldDevice> {
        std::mem::take(&mut self.held)
    }

    fn has_rounds(&self) -> bool {
        true
    }

    /// Devices first, since pairs of them connect namespaces; then their addresses, since a pair is connected when
    /// both ends are up; then what depends on connected devices.
    fn go_on(&mut self, on: &Building<'_>, round: u32) -> Result<bool> {
        let first = on.first;
        let number = self.number;
        let problem = |what: Problem| ResError::Namespace { number, problem: what.0 };
        let here = open_here(first)?;
        let _visit = enter(first)?;
        match round {
            0 => {
                sysctl::write_common(&self.entry);
                peers::number(&self.entry.nsids, number, on).map_err(problem)?;
                let ends = self.far_ends.iter().map(|end| Ok((end, peers::open(end, on)?)));
                let ends = ends.collect::<Result<Vec<_>, _>>().map_err(problem)?;
                self.held = make::make(&self.devices, &here, &ends).map_err(problem)?;
            }
            1 => {
                self.routes.restore_addresses().map_err(problem)?;
                make::start(&self.devices).map_err(problem)?;
            }
            _ => {
                make::await_running(&self.connected());
                self.routes.restore().map_err(problem)?;
                self.filters.restore().map_err(problem)?;
                sysctl::write_others(&self.entry);
                await_loopback();
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn finish(&mut self, _: HostPid) -> Result<()> {
        let number = self.number;
        let pairs = self.devices.iter().filter(|device| links::is_veth(device));
        let outside = pairs.filter_map(|device| device.rcriu_link.as_ref());
        let mut outside = outside.filter_map(|link| link.outside.as_ref());
        let connected = outside.try_for_each(outside::connect);
        connected.map_err(|what: Problem| ResError::Namespace { number, problem: what.0 })
    }
}

impl Network {
    /// Returns the numbers of the devices that ends in other namespaces of the tree connect: the other ends of these,
    /// and the bridges of which they are ports.
    fn connected(&self) -> Vec<u32> {
        let is_end = |number: u32| self.far_ends.iter().any(|end| end.of == number);
        let has_end = |number: u32| {
            let mut ports = self.devices.iter().filter(|port| port.master == Some(number));
            ports.any(|port| is_end(port.ifindex))
        };
        let was_running = self.devices.iter().filter(|device| device.flags & links::RUNNING != 0);
        let numbers = was_running.map(|device| device.ifindex);
        numbers.filter(|number| is_end(*number) || has_end(*number)).collect()
    }
}

/// What cannot be restored, and why.
#[derive(Debug)]
struct Problem(String);

impl Problem {
    /// Returns the constructor for a failed request about an object.
    fn about(what: impl Display) -> impl FnOnce(TalkError) -> Self {
        move |error| Self(format!("{what}: {error}"))
    }
}

/// Waits until packets reach `::1`: the kernel adds its route a moment after the device is up, and until
/// then no datagram could be queued again.
fn await_loopback() {
    const PATIENCE: Duration = Duration::from_secs(1);
    const NAP: Duration = Duration::from_millis(1);
    /// `::1` as the kernel prints it.
    const LOOPBACK: &str = "00000000000000000000000000000001 ";
    let addresses = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    if !addresses.lines().any(|line| line.starts_with(LOOPBACK)) {
        return;
    }
    let begin = Instant::now();
    let reached = || {
        let socket = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0))?;
        // No packet is sent.
        socket.connect((Ipv6Addr::LOCALHOST, 9))
    };
    while reached().is_err() && begin.elapsed() < PATIENCE {
        thread::sleep(NAP);
    }
}

/// Opens the network namespace of rcriu, beside which a process is in one of its own.
fn open_here(first: HostPid) -> Result<OwnedFd> {
    let step = "open the network namespace beside that of";
    outside::open().map_err(|source| ResError::Process { pid: first, step, source })
}

/// Moves the calling thread into the network namespace of a process.
fn enter(pid: HostPid) -> Result<Visit> {
    res::enter(pid, Place::Net)
}

/// Returns the constructor of an error of the dump.
fn failed(step: &'static str, pid: HostPid) -> impl FnOnce(TalkError) -> ResError {
    move |error| {
        log::error!("{step} process {pid}: {error}");
        ResError::Process { pid, step, source: error.errno }
    }
}

/// Says that something is not as it was, and goes on.
fn warn(what: &str) {
    tell(log::Level::Warn, what);
}

/// Reads an image without magic; `None` if there is none.
fn read_raw(images: &dyn ImageStore, kind: Kind, number: u32) -> Result<Option<Vec<u8>>> {
    let name = kind.file_name(number.into());
    let broken = |source| ResError::Read { path: images.path_of(&name), source };
    let input = match images.open(&name) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        input => input.map_err(broken)?,
    };
    if input.len > LARGEST_IMAGE_BYTES {
        let problem =
            format!("{name} has {} bytes, at most {LARGEST_IMAGE_BYTES} expected", input.len);
        return Err(wrong(number, &problem));
    }
    let mut bytes = Vec::new();
    input.bytes.take(LARGEST_IMAGE_BYTES).read_to_end(&mut bytes).map_err(broken)?;
    Ok(Some(bytes))
}

/// Writes an image without magic.
fn write_raw(images: &SnapshotWriter, kind: Kind, number: u32, bytes: &[u8]) -> Result<()> {
    let output = images.create_raw(kind, number.into())?;
    let mut at = 0;
    while at < bytes.len() {
        let part = std::io::IoSlice::new(&bytes[at..]);
        at += output
            .write_vectored_at(&[part], at as u64)
            .map_err(|source| ResError::Write { path: images.path(kind, number.into()), source })?;
    }
    Ok(())
}
