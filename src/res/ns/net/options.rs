//! The user's options for network namespaces.

use std::os::fd::OwnedFd;

use nix::libc;

use super::{super::join, Restoring, enter, filter, wrong};
use crate::{
    image::proto::{NdType, NetDeviceEntry, RcriuOutside},
    inject::Script,
    res::{Result, file::Inherited},
    units::HostPid,
};

/// `IFF_UP`, `linux/if.h`.
const UP: u32 = 1;

/// Options of a dump or a restore.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    external: Vec<String>,
    inherited: Inherited,
    pub(super) is_empty: bool,
}

impl Options {
    /// `external`: namespaces that stay outside of the images, `net[INODE]:NAME`, ends of pairs of
    /// devices, `veth[INSIDE]:OUTSIDE@BRIDGE`, and devices that others are on top of, `macvlan[INSIDE]:OUTSIDE`
    /// (`--external`). `inherited`: the namespaces by name
    /// (`--inherit-fd`).
    pub fn new(external: Vec<String>, inherited: Inherited) -> Self {
        Self { external, inherited, is_empty: false }
    }

    /// `is_empty`: the namespace is kept without contents (`--empty-ns net`).
    #[must_use]
    pub fn empty(mut self, is_empty: bool) -> Self {
        self.is_empty = is_empty;
        self
    }

    /// Returns what the user says about an external resource: what follows `TYPE[ID]:`.
    fn find(&self, kind: &str, id: &[u8]) -> Option<&str> {
        let id = String::from_utf8_lossy(id);
        self.external.iter().find_map(|given| {
            let rest = given.strip_prefix(kind)?.strip_prefix('[')?.strip_prefix(&*id)?;
            let rest = rest.strip_prefix(']')?;
            Some(rest.strip_prefix(':').unwrap_or(rest))
        })
    }

    /// Returns the name of a namespace that stays outside, by its inode.
    pub(super) fn name_of(&self, inode: u64) -> Option<&str> {
        self.find("net", inode.to_string().as_bytes())
    }

    /// Whether the user makes the other end of a device, or chooses the one below it.
    pub(super) fn has_end(&self, device: &[u8]) -> bool {
        self.find("veth", device).or_else(|| self.find("macvlan", device)).is_some()
    }

    /// Has the other ends of devices, and those below them, be what the user says.
    pub(super) fn apply(&self, device: &mut NetDeviceEntry) {
        if device.r#type == i32::from(NdType::Macvlan) {
            if let Some(below) = self.find("macvlan", &device.name).filter(|it| !it.is_empty()) {
                let below = RcriuOutside { name: below.into(), ..RcriuOutside::default() };
                device.rcriu_link.get_or_insert_with(Default::default).outside = Some(below);
            }
            return;
        }
        let Some(end) = self.find("veth", &device.name).filter(|end| !end.is_empty()) else {
            return;
        };
        let (name, master) = match end.split_once('@') {
            Some((name, master)) => (name, Some(master.as_bytes().to_vec())),
            None => (end, None),
        };
        let link = device.rcriu_link.get_or_insert_with(Default::default);
        let known = link.outside.take().filter(|known| known.name == name.as_bytes());
        let mut end = known.unwrap_or_else(|| RcriuOutside {
            name: name.into(),
            mtu: device.mtu,
            flags: UP,
            ..RcriuOutside::default()
        });
        end.master = master.or(end.master);
        link.outside = Some(end);
    }

    /// Returns a namespace that the caller provides.
    pub(super) fn provided(&self, number: u32, name: &[u8]) -> Result<Box<dyn Restoring>> {
        let shown = String::from_utf8_lossy(name);
        let found = self.inherited.duplicate(name).ok().flatten();
        let namespace = found.ok_or_else(|| {
            let problem = format!(
                "the network namespace was external, and is not provided\nhelp: restore with --inherit-fd \
                 fd[N]:{shown}"
            );
            wrong(number, &problem)
        })?;
        Ok(entered(namespace))
    }
}

/// Returns a namespace that exists, and that the first process enters.
pub(in super::super) fn entered(namespace: OwnedFd) -> Box<dyn Restoring> {
    Box::new(Provided(namespace))
}

/// A namespace that exists, and that the first process enters.
#[derive(Debug)]
struct Provided(OwnedFd);

impl Restoring for Provided {
    fn is_made(&self) -> bool {
        false
    }

    fn first_script(&self) -> Script {
        join::enter("network", &self.0, libc::CLONE_NEWNET)
    }

    fn finish(&mut self, root: HostPid) -> Result<()> {
        let _visit = enter(root)?;
        filter::lift_lock();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn external_resources_are_found_by_their_ids() {
        let external = ["net[12]:host", "veth[eth0]:v0@br0", "veth[eth1]:v1", "mnt[/a]:b"];
        let options = Options::new(external.map(str::to_owned).to_vec(), Inherited::default());
        assert_eq!(options.name_of(12), Some("host"));
        assert_eq!((options.name_of(1), options.name_of(123)), (None, None));
        let mut device =
            NetDeviceEntry { name: b"eth0".to_vec(), mtu: 1400, ..NetDeviceEntry::default() };
        options.apply(&mut device);
        let end = device.rcriu_link.take().unwrap().outside.unwrap();
        assert_eq!((end.name.as_slice(), end.master.as_deref()), (&b"v0"[..], Some(&b"br0"[..])));
        assert_eq!(end.mtu, 1400);
        assert!(options.has_end(b"eth1") && !options.has_end(b"eth2"));
        let external = vec!["macvlan[mac0]:eth9".to_owned()];
        let options = Options::new(external, Inherited::default());
        let r#type = NdType::Macvlan.into();
        let mut device =
            NetDeviceEntry { r#type, name: b"mac0".to_vec(), ..NetDeviceEntry::default() };
        options.apply(&mut device);
        assert_eq!(device.rcriu_link.unwrap().outside.unwrap().name, b"eth9");
    }
}
