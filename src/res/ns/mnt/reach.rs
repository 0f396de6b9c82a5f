//! Reaches a mount of a namespace, whatever other mounts hide.

use std::{
    collections::{HashMap, HashSet},
    ffi::CString,
    fs::File,
    io::{self, Read},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    mount::{MntFlags, MsFlags, mount as change_mount, umount2},
    sched::{CloneFlags, unshare},
    sys::stat::Mode,
};

use super::below;
use crate::{
    proc::{self, Mount},
    res::{ResError, Result},
    sys::{mounts, visit},
    units::HostPid,
};

/// The table of mounts of the calling thread, which can be read in any mount namespace.
pub(super) struct Table(File);

impl Table {
    pub(super) fn open() -> io::Result<Self> {
        File::open("/proc").map(Self)
    }

    pub(super) fn read(&self) -> io::Result<Vec<u8>> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = openat(&self.0, "thread-self/mountinfo", flags, Mode::empty())?;
        let mut text = Vec::new();
        File::from(file).read_to_end(&mut text)?;
        Ok(text)
    }

    fn mounts(&self) -> io::Result<Vec<Mount>> {
        proc::mounts_in(&self.read()?).map_err(io::Error::other)
    }
}

/// Returns a copy of a mount of the namespace of a process, which shows all of it, also what other
/// mounts hide there. `None` if the mount itself is hidden for good: it came from a more privileged
/// namespace together with the one above it (`mount_namespaces(7)`).
pub(super) fn reach(pid: HostPid, mount: &Mount) -> Result<Option<OwnedFd>> {
    let failed = |source: io::Error| ResError::Mount {
        point: mount.point.clone(),
        step: "look into",
        source,
    };
    let path = c_path(&mount.point).map_err(failed)?;
    let table = Table::open().map_err(failed)?;
    let found = visit::in_mounts(pid, || {
        let before = table.mounts()?;
        // A copy of a mount that shares events, or that cannot be bound, is made in a copy of the namespace.
        let is_plain = mount.shared == 0 && mount.master == 0 && !mount.unbindable;
        if is_plain && hiding(&before, mount.id).is_none() {
            return Ok(Some(mounts::copy(&path)?));
        }
        enter_copy()?;
        let mut now = table.mounts()?;
        let copies = counterparts(&before, &now);
        let copy = *copies.get(&mount.id).ok_or(Errno::ENOENT)?;
        while let Some(point) = hiding(&now, copy) {
            match umount2(c_path(&point)?.as_c_str(), MntFlags::MNT_DETACH) {
                Err(Errno::EINVAL) => return Ok(None),
                result => result?,
            }
            let left = table.mounts()?;
            if left.len() >= now.len() {
                return Err(Errno::EBUSY.into());
            }
            now = left;
        }
        Ok(Some(mounts::copy(&path)?))
    });
    found.map_err(failed)
}

/// Returns the numbers of the mounts that the namespace of a process cannot unmount alone, since they came from a
/// more privileged one (`mount_namespaces(7)`). A copy of the namespace tells: there, they can be unmounted as
/// little.
pub(super) fn locked(pid: HostPid) -> Result<HashSet<i32>> {
    let failed = |source: io::Error| ResError::Mount {
        point: "/".into(),
        step: "look for locked mounts below",
        source,
    };
    let table = Table::open().map_err(failed)?;
    let found = visit::in_mounts(pid, || {
        let before = table.mounts()?;
        enter_copy()?;
        let mut now = table.mounts()?;
        let copies = counterparts(&before, &now);
        let mut locked = HashSet::new();
        for mount in upper_first(&before) {
            let Some(copy) = copies.get(&mount.id) else { continue };
            // What cannot be reached cannot be unmounted anyway.
            if hiding(&now, *copy).is_some() {
                continue;
            }
            match umount2(c_path(&mount.point)?.as_c_str(), MntFlags::MNT_DETACH) {
                Err(Errno::EINVAL) => drop(locked.insert(mount.id)),
                Err(errno) => return Err(errno.into()),
                Ok(()) => now.retain(|other| other.id != *copy),
            }
        }
        Ok(locked)
    });
    found.map_err(failed)
}

/// Returns all mounts but the root, each before the one on which it is.
fn upper_first(mounts: &[Mount]) -> Vec<&Mount> {
    let mut on: HashMap<i32, Vec<&Mount>> = HashMap::new();
    for mount in mounts.iter().filter(|mount| mount.id != mount.parent) {
        on.entry(mount.parent).or_default().push(mount);
    }
    let root = mounts.iter().find(|mount| is_root(mounts, mount));
    let mut order: Vec<&Mount> = Vec::new();
    let mut next: Vec<&Mount> = root.and_then(|root| on.remove(&root.id)).unwrap_or_default();
    while let Some(mount) = next.pop() {
        order.push(mount);
        next.extend(on.remove(&mount.id).unwrap_or_default());
    }
    order.reverse();
    order
}

fn is_root(mounts: &[Mount], mount: &Mount) -> bool {
    mount.parent == mount.id || mounts.iter().all(|other| other.id != mount.parent)
}

/// Moves the calling thread to a copy of its mount namespace, whose changes reach nothing else.
fn enter_copy() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    change_mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL.into())
}

/// Returns the mounts of a copy of a namespace, by the numbers of the originals. Mounts that show the same
/// at the same place are as good as each other.
fn counterparts(before: &[Mount], after: &[Mount]) -> HashMap<i32, i32> {
    let first = |mounts: &[Mount]| mounts.iter().find(|mount| is_root(mounts, mount)).cloned();
    let mut found = HashMap::new();
    let mut pending = Vec::new();
    if let (Some(before), Some(after)) = (first(before), first(after)) {
        pending.push((before.id, after.id));
    }
    let on = |mounts: &[Mount], parent: i32| -> Vec<Mount> {
        let on_it = mounts.iter().filter(|mount| mount.parent == parent && mount.id != parent);
        on_it.cloned().collect()
    };
    while let Some((old, new)) = pending.pop() {
        found.insert(old, new);
        let mut candidates = on(after, new);
        for child in on(before, old) {
            let is_copy = |other: &Mount| {
                (&other.point, &other.root, other.device)
                    == (&child.point, &child.root, child.device)
            };
            if let Some(at) = candidates.iter().position(is_copy) {
                pending.push((child.id, candidates.swap_remove(at).id));
            }
        }
    }
    found
}

/// Returns the mount point of a mount that hides the mount with this number, the highest one first.
fn hiding(mounts: &[Mount], number: i32) -> Option<PathBuf> {
    let by_number: HashMap<i32, &Mount> = mounts.iter().map(|mount| (mount.id, mount)).collect();
    let target = by_number.get(&number)?;
    // The way up, from the target to the root.
    let mut way = vec![*target];
    while let Some(above) = way.last().and_then(|mount| by_number.get(&mount.parent)) {
        if way.iter().any(|mount| mount.id == above.id) {
            break;
        }
        way.push(above);
    }
    for (at, mount) in way.iter().enumerate().rev() {
        // What the way goes to from here.
        let next = if at == 0 { target } else { way[at - 1] };
        let hides = |other: &&Mount| {
            other.parent == mount.id
                && other.id != mount.id
                && (at == 0 || other.id != next.id)
                && below(&next.point, &other.point).is_some()
        };
        let points = mounts.iter().filter(hides).map(|other| &other.point);
        if let Some(point) = points.min_by_key(|point| point.components().count()) {
            return Some(point.clone());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(lines: &[&str]) -> Vec<Mount> {
        let line = |line: &&str| {
            let words: Vec<&str> = line.split(' ').collect();
            format!("{} {} {} / {} rw - tmpfs none rw\n", words[0], words[1], words[2], words[3])
        };
        let text: String = lines.iter().map(line).collect();
        proc::mounts_in(text.as_bytes()).unwrap()
    }

    #[test]
    fn the_uppermost_hiding_mount_is_found_first() {
        let all = mounts(&["1 0 0:1 /", "2 1 0:2 /sys", "3 2 0:3 /sys/fs/cgroup", "4 2 0:4 /sys"]);
        assert_eq!(hiding(&all, 3).as_deref(), Some(Path::new("/sys")));
        assert_eq!(hiding(&all, 2).as_deref(), Some(Path::new("/sys")));
        assert_eq!(hiding(&all, 4), None);
        assert_eq!(hiding(&all, 1), None);
        let all = mounts(&["1 0 0:1 /", "2 1 0:2 /a/b", "3 1 0:3 /a", "4 2 0:4 /a/b"]);
        assert_eq!(hiding(&all, 2).as_deref(), Some(Path::new("/a")));
        let all = mounts(&["1 0 0:1 /", "2 1 0:2 /a/b", "4 2 0:4 /a/b"]);
        assert_eq!(hiding(&all, 2).as_deref(), Some(Path::new("/a/b")));
        assert_eq!(hiding(&all, 4), None);
    }

    #[test]
    fn upper_mounts_come_before_those_on_which_they_are() {
        let all = mounts(&["7 0 0:1 /", "2 7 0:2 /a", "1 2 0:3 /a", "9 1 0:4 /a/b", "8 7 0:5 /c"]);
        let order: Vec<i32> = upper_first(&all).iter().map(|mount| mount.id).collect();
        let at = |id: i32| order.iter().position(|other| *other == id).unwrap();
        assert_eq!(order.len(), 4);
        assert!(at(9) < at(1) && at(1) < at(2), "{order:?}");
    }

    #[test]
    fn mounts_of_a_copy_are_told_apart_by_place_and_device() {
        let before = mounts(&["1 0 0:1 /", "2 1 0:2 /a", "3 2 0:3 /a", "4 3 0:2 /a/b"]);
        let after = mounts(&["9 0 0:1 /", "5 9 0:2 /a", "7 5 0:3 /a", "6 7 0:2 /a/b"]);
        let expected = HashMap::from([(1, 9), (2, 5), (3, 7), (4, 6)]);
        assert_eq!(counterparts(&before, &after), expected);
    }
}
