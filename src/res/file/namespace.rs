//! Descriptors of namespaces, as `setns(2)` takes them.
//!
//! A file of a namespace below `/proc/PID/ns` has no path: the kernel shows its kind and its
//! number. The images name the namespace as those of processes ([`ns`]), so it must be one of the
//! tree, or of the dumper. A bind mount of such a file has a path, and is a regular file here.

use std::os::fd::OwnedFd;

use nix::libc;

use super::{
    Collector, Deferred, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage,
    deferred, descriptor,
};
use crate::{
    image::{
        Kind as Image,
        proto::{self, FdTypes, InventoryEntry, NsFileEntry, TaskKobjIdsEntry},
    },
    res::ns,
    sys::root::Root,
    units::NsPid,
};

pub(super) const KIND: FileKind = FileKind {
    name: "namespace",
    types: &[FdTypes::Ns],
    usage: Usage::Descriptor,
    collector: |_| Box::new(Namespaces),
    opener: |_| Box::new(Namespaces),
};

/// `CLONE_NEWTIME` (`linux/sched.h`).
const NEW_TIME: u32 = 0x80;

/// The names of namespaces in `/proc/PID/ns`, and their flags of `clone(2)`.
const NAMES: [(&str, u32); 8] = [
    ("pid", libc::CLONE_NEWPID.cast_unsigned()),
    ("net", libc::CLONE_NEWNET.cast_unsigned()),
    ("ipc", libc::CLONE_NEWIPC.cast_unsigned()),
    ("uts", libc::CLONE_NEWUTS.cast_unsigned()),
    ("time", NEW_TIME),
    ("mnt", libc::CLONE_NEWNS.cast_unsigned()),
    ("user", libc::CLONE_NEWUSER.cast_unsigned()),
    ("cgroup", libc::CLONE_NEWCGROUP.cast_unsigned()),
];

struct Namespaces;

/// Returns the name, the flag and the inode in a link such as `net:[4026531840]`.
fn parse(link: &[u8]) -> Option<(&'static str, u32, u64)> {
    let text = std::str::from_utf8(link).ok()?;
    let (name, rest) = text.split_once(":[")?;
    let inode = rest.strip_suffix(']')?.parse().ok()?;
    let (name, flag) = NAMES.into_iter().find(|(known, _)| *known == name)?;
    Some((name, flag, inode))
}

impl Collector for Namespaces {
    fn claims(&self, file: &Description) -> bool {
        parse(&file.link).is_some()
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
        let found = parse(&file.link).and_then(|(name, flag, inode)| {
            let (number, _) = intake.namespaces().look_up(name, inode)?;
            Some((number, flag))
        });
        let Some((ns_id, ns_cflag)) = found else {
            let link = String::from_utf8_lossy(&file.link);
            let what = format!("{link}, a namespace that no process of the tree is in");
            let help = "have the program open a bind mount of it, which has a path, or close it";
            return Err(file.unsupported(what, help));
        };
        Ok(proto::FileEntry {
            r#type: FdTypes::Ns.into(),
            id: file.id,
            nsf: Some(NsFileEntry { id: file.id, ns_id, ns_cflag, flags: file.status() }),
            ..Default::default()
        })
    }
}

impl Opener for Namespaces {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        for entry in entries {
            let file = inner(entry)?;
            let name = name_of(file)?;
            let image = |source| FileError::from(source);
            let inventory: InventoryEntry =
                opened.images.message(Image::Inventory, 0).map_err(image)?;
            let dumpers = inventory.root_ids.and_then(|ids| ns::number_in(&ids, name));
            let fd = if dumpers == Some(file.ns_id) {
                open(file, name, "self")?
            } else {
                deferred::placeholder(entry.id, Deferred::ByPath, opened)?
            };
            opened.insert(entry.id, fd);
        }
        Ok(())
    }

    fn open_deferred(&mut self, entry: &proto::FileEntry, opened: &mut Opened) -> Result<OwnedFd> {
        let file = inner(entry)?;
        let name = name_of(file)?;
        let is_in = |pid: &&NsPid| {
            let ids =
                opened.images.message_if_any::<TaskKobjIdsEntry>(Image::Ids, pid.image().into());
            let number = ids.ok().flatten().and_then(|ids| ns::number_in(&ids, name));
            number == Some(file.ns_id)
        };
        let Some(pid) = opened.processes.iter().find(is_in) else {
            let problem = format!("no process has the {name} namespace {}", file.ns_id);
            return Err(FileError::image(entry.id, problem));
        };
        open(file, name, &opened.pids.host(*pid).to_string())
    }
}

fn open(file: &NsFileEntry, name: &str, process: &str) -> Result<OwnedFd> {
    let path = format!("/proc/{process}/ns/{name}");
    descriptor::open(&Root::own(), path.as_bytes(), file.flags)
        .map_err(FileError::restore(file.id, "open", path))
}

fn name_of(file: &NsFileEntry) -> Result<&'static str> {
    let known = NAMES.into_iter().find(|(_, flag)| *flag == file.ns_cflag);
    known.map(|(name, _)| name).ok_or_else(|| {
        let problem = format!("it is a namespace of the unknown kind {:#x}", file.ns_cflag);
        FileError::image(file.id, problem)
    })
}

fn inner(entry: &proto::FileEntry) -> Result<&NsFileEntry> {
    let missing = || FileError::image(entry.id, "it is a namespace, but its entry is missing");
    entry.nsf.as_ref().ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_namespaces_are_parsed() {
        let net = ("net", libc::CLONE_NEWNET.cast_unsigned(), 4_026_531_840);
        assert_eq!(parse(b"net:[4026531840]"), Some(net));
        for other in [&b"socket:[12]"[..], b"net:[]", b"net:[1", b"/run/netns/a", b"\xff:[1]"] {
            assert_eq!(parse(other), None);
        }
    }
}
