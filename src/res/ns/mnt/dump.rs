//! Dumps mount namespaces.

use std::{collections::HashSet, os::unix::ffi::OsStrExt};

use super::{
    FROM_HOST, NAMED, UNKNOWN, contents, deleted, kernel_device,
    reach::{locked, reach},
    survey::{self, Found, Source},
};
use crate::{
    image::{Kind, SnapshotWriter, proto::MntEntry},
    proc::Mount,
    res::{Result, ns::Dumped},
    units::{HostId, IdMap},
};

/// Flags of mounts in the images: `MS_*` (`linux/mount.h`) by their names in `mountinfo`.
const MOUNT_FLAGS: [(&str, u32); 8] = [
    ("ro", 1),
    ("nosuid", 2),
    ("nodev", 4),
    ("noexec", 8),
    ("nosymfollow", 1 << 8),
    ("noatime", 1 << 10),
    ("nodiratime", 1 << 11),
    ("relatime", 1 << 21),
];

/// Flags of file systems.
const FILE_SYSTEM_FLAGS: [(&str, u32); 5] =
    [("ro", 1), ("sync", 1 << 4), ("mand", 1 << 6), ("dirsync", 1 << 7), ("lazytime", 1 << 25)];

/// `MS_UNBINDABLE`, `MS_PRIVATE`, `MS_SLAVE` and `MS_SHARED`.
const UNBINDABLE: u32 = 1 << 17;
const PRIVATE: u32 = 1 << 18;
const SLAVE: u32 = 1 << 19;
const SHARED: u32 = 1 << 20;

/// Writes the images of the mount namespaces of a tree.
pub(super) fn write(all: &[Dumped<'_>], images: &SnapshotWriter) -> Result<()> {
    let found = survey::look(all)?;
    let deleted = deleted::write(all, &found, images)?;
    for (space, of) in all.iter().enumerate() {
        // Only a more privileged user namespace locks mounts.
        let locked = match of.ids.is_own_namespace() {
            true => HashSet::new(),
            false => locked(of.pid)?,
        };
        let in_it = found.iter().filter(|found| found.space == space);
        let entries = in_it.map(|found| {
            let rcriu_deleted = deleted.get(&found.mount.id).copied();
            let rcriu_locked = locked.contains(&found.mount.id).then_some(true);
            MntEntry { rcriu_deleted, rcriu_locked, ..entry(found, of.ids) }
        });
        let entries: Vec<MntEntry> = entries.collect();
        images.write(Kind::Mnts, of.number.into(), &entries)?;
    }
    let mut packed = HashSet::new();
    for Found { space, mount, source, .. } in &found {
        let has_content =
            mount.fs_type == b"tmpfs" && matches!(source, Source::New(_) | Source::Root(None));
        if has_content && packed.insert(mount.device) {
            let Dumped { pid, ids, .. } = all[*space];
            let users = (!ids.is_own_namespace()).then_some(pid);
            let tree = reach(pid, mount)?;
            if tree.is_none() {
                log::warn!(
                    "the tmpfs at {} is hidden for good by another mount there: a restore makes it empty",
                    mount.point.display()
                );
            }
            let image = (Kind::TmpfsDev, kernel_device(mount.device));
            contents::pack(tree.as_ref(), mount, image, images, users)?;
        }
    }
    Ok(())
}

fn entry(found: &Found, ids: &IdMap) -> MntEntry {
    let Found { mount, source, .. } = found;
    let names = mount.flags.split(|byte| *byte == b',');
    let (sb_flags, options) = split(&mount.options, &FILE_SYSTEM_FLAGS);
    let is_new = matches!(source, Source::New(_));
    let known = super::FileSystem::by_name(&mount.fs_type);
    let (fstype, fsname) = match (source, known) {
        (Source::New(None), _) => (NAMED, Some(mount.fs_type.clone())),
        (_, Some(known)) => (known.code, None),
        (_, None) => (UNKNOWN, None),
    };
    // The kernel does not show that an instance is a new one, which CRIU wants to know.
    let mut options = if is_new || *source == Source::Root(None) {
        with_owners_inside(&options, ids)
    } else {
        options
    };
    if is_new && mount.fs_type == b"devpts" {
        options = [&b"newinstance,"[..], &options].concat();
    }
    let (source_path, ext_key) = match source {
        Source::Host(path) => (path.as_os_str().as_bytes(), Some(FROM_HOST.to_vec())),
        Source::External(key) => {
            (mount.source.as_os_str().as_bytes(), Some(key.clone().into_bytes()))
        }
        _ => (mount.source.as_os_str().as_bytes(), None),
    };
    let former_root = survey::former_root(mount).filter(|_| *source == Source::Deleted);
    MntEntry {
        fstype,
        mnt_id: mount.id.cast_unsigned(),
        root_dev: kernel_device(mount.device),
        parent_mnt_id: mount.parent.cast_unsigned(),
        flags: flags(names, &MOUNT_FLAGS) | propagation(mount),
        root: former_root.unwrap_or(&mount.root).as_os_str().as_bytes().to_vec(),
        mountpoint: mount.point.as_os_str().as_bytes().to_vec(),
        source: source_path.to_vec(),
        options,
        shared_id: Some(mount.shared),
        master_id: Some(mount.master),
        fsname,
        deleted: former_root.is_some().then_some(true),
        sb_flags: Some(sb_flags),
        ext_key,
        rcriu_pid_ns: found.pid_space,
        ..Default::default()
    }
}

/// Turns users and groups in the options of a file system (`uid=`, `gid=`), which the kernel shows as
/// those of the first user namespace, into those of the tree. Leaves out what its namespace does not map:
/// there the option could not be given.
fn with_owners_inside(options: &[u8], ids: &IdMap) -> Vec<u8> {
    let translate = |option: &[u8]| -> Option<Vec<u8>> {
        let text = str::from_utf8(option).unwrap_or_default();
        let (key, number) = match text.split_once('=') {
            Some((key @ ("uid" | "gid"), value)) => (key, value.parse().ok()?),
            _ => return Some(option.to_vec()),
        };
        let inside = if key == "uid" {
            ids.has_user(HostId(number)).then(|| ids.ns_user(HostId(number)))
        } else {
            ids.has_group(HostId(number)).then(|| ids.ns_group(HostId(number)))
        };
        if inside.is_none() {
            log::warn!("no {text} in the user namespace of the tree: left out of the options");
        }
        inside.map(|id| format!("{key}={}", id.0).into_bytes())
    };
    let options = options.split(|byte| *byte == b',').filter_map(translate);
    options.collect::<Vec<_>>().join(&b',')
}

fn propagation(mount: &Mount) -> u32 {
    let shared = if mount.shared == 0 { 0 } else { SHARED };
    let slave = if mount.master == 0 { 0 } else { SLAVE };
    let unbindable = if mount.unbindable { UNBINDABLE } else { 0 };
    match shared | slave | unbindable {
        0 => PRIVATE,
        flags => flags,
    }
}

fn flags<'a>(names: impl Iterator<Item = &'a [u8]>, known: &[(&str, u32)]) -> u32 {
    names.fold(0, |flags, name| {
        let found = known.iter().find(|(known, _)| known.as_bytes() == name);
        flags | found.map_or(0, |(_, flag)| *flag)
    })
}

/// Splits the options of a file system into its flags and all others.
fn split(options: &[u8], known: &[(&str, u32)]) -> (u32, Vec<u8>) {
    let is_flag =
        |name: &&[u8]| *name == b"rw" || known.iter().any(|(known, _)| known.as_bytes() == *name);
    let all = || options.split(|byte| *byte == b',').filter(|name| !name.is_empty());
    // Security modules add theirs to all file systems.
    let rest: Vec<&[u8]> = all().filter(|name| !is_flag(name) && *name != b"seclabel").collect();
    (flags(all(), known), rest.join(&b','))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::IdRange;

    #[test]
    fn options_of_file_systems_are_split() {
        let (flags, rest) = split(b"ro,size=64k,lazytime,mode=755,seclabel", &FILE_SYSTEM_FLAGS);
        assert_eq!((flags, rest.as_slice()), (1 | 1 << 25, &b"size=64k,mode=755"[..]));
        assert_eq!(split(b"rw", &FILE_SYSTEM_FLAGS), (0, Vec::new()));
    }

    #[test]
    fn owners_in_options_are_those_of_the_tree() {
        let range = |inside, outside| IdRange { inside, outside, count: 10 };
        let ids = IdMap::new(vec![range(0, 1000)], vec![range(5, 2000)]);
        let inside = |text: &[u8]| String::from_utf8(with_owners_inside(text, &ids)).unwrap();
        assert_eq!(inside(b"size=64k,uid=1003,gid=2000,mode=620"), "size=64k,uid=3,gid=5,mode=620");
        assert_eq!(inside(b"uid=7,gid=2010,uid=x,ptmxmode=666"), "ptmxmode=666");
        let own = IdMap::of_own_namespace();
        assert_eq!(with_owners_inside(b"uid=7,mode=1", &own), b"uid=7,mode=1");
        assert_eq!(with_owners_inside(b"", &own), b"");
    }
}
