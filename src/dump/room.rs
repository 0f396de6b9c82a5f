//! Checks that a process has room for scratch memory while the dump works in it.
//!
//! Scratch memory counts against the limits of the process's cgroups. If a cgroup has no
//! room left, the kernel does not fail the system call, but kills a process of the cgroup.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{DumpError, Result};
use crate::{
    inject::{Task, living},
    proc,
    sys::swap,
};

/// The most memory that a process gets: code, a table of calls and their results, and page
/// tables.
const NEEDED_BYTES: u64 = 128 << 10;

/// The files of a cgroup's limit and usage, and the entries of its statistics for memory
/// that the kernel reclaims before it kills a process.
struct Names {
    limit: &'static str,
    usage: &'static str,
    reclaimed: &'static [&'static str],
}

const VERSION_1: Names = Names {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimed: &["total_inactive_file", "total_active_file"],
};

const VERSION_2: Names = Names {
    limit: "memory.max",
    usage: "memory.current",
    reclaimed: &["inactive_file", "active_file", "slab_reclaimable"],
};

/// Checks that each process of a tree can get scratch memory. The cgroups must have room for `more`
/// bytes besides.
///
/// # Errors
/// [`DumpError::NoRoom`] for the first process that cannot.
pub(super) fn check(tasks: &[Task], more: u64) -> Result<()> {
    let needed = NEEDED_BYTES.saturating_add(more);
    let mounts = proc::mounts()?;
    let mut checked: Vec<PathBuf> = Vec::new();
    for task in living(tasks) {
        for (hierarchy, name, path) in proc::cgroups(task.witness())? {
            let Some(names) = names(hierarchy, &name) else { continue };
            // Nothing is known about a cgroup that is not visible here.
            let Ok(group) = proc::cgroup_directory(&name, &path, &mounts) else { continue };
            for group in group.ancestors() {
                if checked.iter().any(|checked| checked == group) {
                    break;
                }
                let Some(left) = left(group, names, needed) else { break };
                if left < needed {
                    let (pid, group) = (task.pid, group.to_owned());
                    return Err(DumpError::NoRoom { pid, group, left, needed });
                }
                checked.push(group.to_owned());
            }
        }
    }
    Ok(())
}

/// Returns the files of a cgroup that limits memory.
fn names(hierarchy: u32, controllers: &[u8]) -> Option<&'static Names> {
    match hierarchy {
        0 => Some(&VERSION_2),
        _ => {
            let mut controllers = controllers.split(|byte| *byte == b',');
            controllers.any(|name| name == b"memory").then_some(&VERSION_1)
        }
    }
}

/// Returns how many bytes a cgroup has left; `None` if it has no limit, like the root
/// cgroup.
fn left(group: &Path, names: &Names, needed: u64) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let limit = read(names.limit)?;
    // "max" is not a number.
    let Ok(limit) = limit.trim().parse::<u64>() else { return Some(u64::MAX) };
    let usage: u64 = read(names.usage)?.trim().parse().ok()?;
    if limit.saturating_sub(usage) >= needed {
        return Some(limit - usage);
    }
    let statistics = read("memory.stat")?;
    let reclaimed: u64 = statistics
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| names.reclaimed.contains(name))
        .filter_map(|(_, bytes)| bytes.parse::<u64>().ok())
        .sum();
    Some(limit.saturating_sub(usage).saturating_add(reclaimed).saturating_add(swap::bytes().1))
}
