//! Which pid namespace a proc file system shows.

use std::{
    collections::HashMap,
    fs,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::Path,
};

use super::reach::reach;
use crate::{
    proc::Mount,
    res::{Result, ns::Dumped},
};

/// Returns the numbers of the pid namespaces below that of the tree, by the devices of the proc file systems
/// that show them. `mounts` have the positions of their namespaces among `all`.
pub(super) fn pid_spaces(
    all: &[Dumped<'_>],
    mounts: &[(usize, Mount)],
) -> Result<HashMap<(u32, u32), u32>> {
    let mut found = HashMap::new();
    let Some(below) = all.first().map(|of| of.pids_below).filter(|below| !below.is_empty()) else {
        return Ok(found);
    };
    let is_proc = |mount: &Mount| mount.fs_type == b"proc" && mount.root == Path::new("/");
    let mut looked_at = HashMap::new();
    for (space, mount) in mounts.iter().filter(|(_, mount)| is_proc(mount)) {
        if looked_at.get(&mount.device) == Some(&true) {
            continue;
        }
        let Some(tree) = reach(all[*space].pid, mount)? else {
            looked_at.insert(mount.device, false);
            continue;
        };
        looked_at.insert(mount.device, true);
        // The first process there is in the namespace that the file system shows.
        let path = format!("/proc/self/fd/{}/1/ns/pid", tree.as_raw_fd());
        let inode = fs::metadata(path).map(|stat| stat.ino()).ok();
        let shown = below.iter().find(|(below, _)| inode == Some(*below));
        found.extend(shown.map(|(_, number)| (mount.device, *number)));
    }
    if looked_at.values().any(|is_seen| !is_seen) {
        log::warn!(
            "a proc file system is hidden for good by another mount: a restore makes it show the pid \
             namespace of the tree"
        );
    }
    Ok(found)
}
