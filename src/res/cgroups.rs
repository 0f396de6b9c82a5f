//! What cgroups of a tree and cgroup namespaces share.

use std::{collections::BTreeMap, fs, io, path::Path};

use super::{Result, enter, tree::cgroup::CgroupError};
use crate::{proc, sys::visit::Place, units::HostPid};

/// The path of a group in each hierarchy. Hierarchies are named as in `/proc/PID/cgroup`.
pub(super) type Set = BTreeMap<Vec<u8>, Vec<u8>>;

/// Returns the set that `/proc/PID/cgroup` shows.
pub(super) fn set(of: Vec<proc::Cgroup>) -> Set {
    of.into_iter().map(|(_, name, path)| (name, path)).collect()
}

/// The root of a cgroup namespace in each hierarchy; the path of a process there, if that is not below
/// the root.
pub(super) type Roots = BTreeMap<Vec<u8>, Result<Vec<u8>, String>>;

/// Returns, by hierarchy, the root of the cgroup namespace of a process, as rcriu sees it.
///
/// # Errors
/// The errors of reading `/proc`, and of entering the namespace.
pub(super) fn roots_of(pid: HostPid) -> Result<Roots> {
    let outside = set(proc::cgroups(pid)?);
    let visit = enter(pid, Place::Cgroup)?;
    let inside = set(proc::cgroups(pid)?);
    drop(visit);
    let root = |(name, path): (Vec<u8>, Vec<u8>)| {
        let below = inside.get(&name).map_or(&b"/"[..], Vec::as_slice);
        let shown = || String::from_utf8_lossy(below).into_owned();
        let below = if below == b"/" { &b""[..] } else { below };
        let root = match path.strip_suffix(below) {
            Some(root) if !below.starts_with(b"/..") => Ok(root.to_vec()),
            _ => Err(shown()),
        };
        (name, root)
    };
    Ok(outside.into_iter().map(root).collect())
}

/// Moves a process or thread into a group, by a file of the group.
pub(super) fn put(pid: HostPid, path: &Path) -> Result<()> {
    // `fs::write` would create the file.
    let file = fs::OpenOptions::new().write(true).open(path);
    let written =
        file.and_then(|mut file| io::Write::write_all(&mut file, pid.to_string().as_bytes()));
    Ok(written.map_err(|source| CgroupError::Move { pid, path: path.to_owned(), source })?)
}
