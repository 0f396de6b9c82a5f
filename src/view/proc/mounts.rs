//! The mounts of a mount namespace, if the images have them.

use std::fmt::Write;

use super::Proc;
use crate::{
    image::{Kind, proto},
    view::Result,
};

/// Names of file systems by `mnt_entry.fstype`, for entries without a name.
const FILE_SYSTEMS: [(u32, &str); 20] = [
    (1, "proc"),
    (2, "sysfs"),
    (3, "devtmpfs"),
    (4, "binfmt_misc"),
    (5, "tmpfs"),
    (6, "devpts"),
    (7, "simfs"),
    (8, "pstore"),
    (9, "securityfs"),
    (10, "fusectl"),
    (11, "debugfs"),
    (12, "cgroup"),
    (13, "aufs"),
    (14, "mqueue"),
    (15, "fuse"),
    (17, "overlay"),
    (18, "autofs"),
    (19, "tracefs"),
    (23, "cgroup2"),
    (24, "hugetlbfs"),
];

/// The `MS_*` flags (`linux/mount.h`) that `mountinfo` shows.
const MOUNT_FLAGS: [(u32, &str); 6] = [
    (2, "nosuid"),
    (4, "nodev"),
    (8, "noexec"),
    (1024, "noatime"),
    (2048, "nodiratime"),
    (1 << 21, "relatime"),
];
const MS_RDONLY: u32 = 1;

/// Bits of the minor number in a device number of the kernel (`linux/kdev_t.h`), which images have.
const MINOR_BITS: u32 = 20;

/// The bytes that fields of `mountinfo` escape.
const MOUNT_ESCAPES: &[u8] = b" \t\n\\#";

impl Proc<'_> {
    /// Returns the mounts in the namespace of a process; `None` if the images do not have them.
    pub(super) fn mount_entries(&self, pid: u32) -> Result<Option<Vec<proto::MntEntry>>> {
        let Some(id) = self.ids(pid)?.mnt_ns_id else { return Ok(None) };
        Ok(self.tables.images().messages_if_any(Kind::Mnts, id.into())?)
    }

    /// Returns `mountinfo`; `None` if the images do not have the mounts.
    pub(super) fn mountinfo(&self, pid: u32) -> Result<Option<Vec<u8>>> {
        let Some(mounts) = self.mount_entries(pid)? else { return Ok(None) };
        let mut text = Vec::new();
        for mount in &mounts {
            let device = (mount.root_dev >> MINOR_BITS, mount.root_dev & ((1 << MINOR_BITS) - 1));
            let head =
                format!("{} {} {}:{} ", mount.mnt_id, mount.parent_mnt_id, device.0, device.1);
            text.extend(head.into_bytes());
            text.extend(super::escaped(&mount.root, MOUNT_ESCAPES));
            text.push(b' ');
            text.extend(super::escaped(&rooted(&mount.mountpoint), MOUNT_ESCAPES));
            let mut rest = format!(" {}", options(mount.flags));
            if let Some(group) = mount.shared_id.filter(|group| *group != 0) {
                let _ = write!(rest, " shared:{group}");
            }
            if let Some(group) = mount.master_id.filter(|group| *group != 0) {
                let _ = write!(rest, " master:{group}");
            }
            rest.push_str(" - ");
            text.extend(rest.into_bytes());
            text.extend(file_system(mount));
            text.push(b' ');
            text.extend(source(mount));
            let read_only = mount.sb_flags.unwrap_or(mount.flags) & MS_RDONLY != 0;
            text.extend(if read_only { b" ro" } else { b" rw" });
            if !mount.options.is_empty() {
                text.push(b',');
                text.extend(&mount.options);
            }
            text.push(b'\n');
        }
        Ok(Some(text))
    }

    /// Returns `mounts` of the root process; empty if the images do not have them.
    pub(super) fn mounts(&self) -> Result<Vec<u8>> {
        let first = self.tables.tree()?.first().map(|entry| entry.pid);
        let mounts = first.map(|pid| self.mount_entries(pid)).transpose()?.flatten();
        let mut text = Vec::new();
        for mount in &mounts.unwrap_or_default() {
            text.extend(source(mount));
            text.push(b' ');
            text.extend(super::escaped(&rooted(&mount.mountpoint), MOUNT_ESCAPES));
            text.push(b' ');
            text.extend(file_system(mount));
            text.extend(format!(" {} 0 0\n", options(mount.flags)).into_bytes());
        }
        Ok(text)
    }
}

fn file_system(mount: &proto::MntEntry) -> &[u8] {
    let known = FILE_SYSTEMS.iter().find(|(number, _)| *number == mount.fstype);
    let known = known.map_or(&b"unknown"[..], |(_, name)| name.as_bytes());
    mount.fsname.as_deref().unwrap_or(known)
}

fn source(mount: &proto::MntEntry) -> Vec<u8> {
    let source: &[u8] = if mount.source.is_empty() { b"none" } else { &mount.source };
    super::escaped(source, MOUNT_ESCAPES)
}

/// Returns a path that begins with a slash; images may store it relative to the root.
fn rooted(path: &[u8]) -> Vec<u8> {
    let path = path.strip_prefix(b".").unwrap_or(path);
    if path.starts_with(b"/") { path.to_vec() } else { [b"/", path].concat() }
}

fn options(flags: u32) -> String {
    let mut options = String::from(if flags & MS_RDONLY != 0 { "ro" } else { "rw" });
    for (_, name) in MOUNT_FLAGS.iter().filter(|(bit, _)| flags & bit != 0) {
        options.push(',');
        options.push_str(name);
    }
    options
}
