//! Mounts of the slave of a pseudoterminal, as container managers make them at `/dev/console`.
//!
//! A restore makes the slave again, with a new master. If a process outside of the tree has the master, the
//! programs would be left with a terminal that has hung up.

use std::os::unix::{ffi::OsStrExt, fs::MetadataExt};

use nix::sys::stat::makedev;

use super::survey::{Found, Source};
use crate::{
    inject::Task,
    proc::{self, FdDetail, Mount},
    res::{ResError, Result, ns::Dumped},
};

const HELP: &str = "provide it at the restore (--external 'mnt[POINT]:KEY'), leave it out \
                    (--skip-mnt), or make the container without it (LXC: lxc.tty.max = 0)";

/// Checks that the tree has the masters of all such mounts, unless the client of the restore takes new ones.
pub(super) fn check(all: &[Dumped<'_>], found: &[Found]) -> Result<()> {
    if all.first().is_none_or(|first| first.options.mounts.orphans) {
        return Ok(());
    }
    let is_made_again = |mount: &Mount| {
        let mut same = found.iter().filter(|other| other.mount.device == mount.device);
        same.any(|other| matches!(other.source, Source::New(_)))
    };
    for Found { space, mount, source, .. } in found {
        let Some(index) = slave(mount).filter(|_| *source == Source::Bind) else { continue };
        let Dumped { pid, tasks, .. } = all[*space];
        if is_made_again(mount) && !has_master(tasks, mount, index, found) {
            let what = format!(
                "has a mount at {} of a pseudoterminal whose other end is outside the tree",
                mount.point.display()
            );
            return Err(ResError::Refused { pid, what, help: HELP });
        }
    }
    Ok(())
}

/// Returns the number of the slave that a mount shows.
fn slave(mount: &Mount) -> Option<u32> {
    let name = mount.root.as_os_str().as_bytes().strip_prefix(b"/")?;
    (mount.fs_type == b"devpts").then(|| std::str::from_utf8(name).ok()?.parse().ok())?
}

/// Whether a process of the tree has the master of a slave open.
fn has_master(tasks: &[Task], mount: &Mount, index: u32, found: &[Found]) -> bool {
    let device = |mount: &Mount| makedev(mount.device.0.into(), mount.device.1.into());
    // A master that was opened by /dev/ptmx is on no devpts.
    let is_on_other = |on: u64| {
        on != device(mount)
            && found
                .iter()
                .any(|Found { mount, .. }| mount.fs_type == b"devpts" && device(mount) == on)
    };
    tasks.iter().map(Task::witness).any(|pid| {
        let numbers = proc::fds(pid).unwrap_or_default();
        numbers.into_iter().any(|number| {
            let is_ptmx = proc::fd_link(pid, number).is_ok_and(|link| link.ends_with(b"/ptmx"));
            is_ptmx
                && proc::fdinfo(pid, number)
                    .is_ok_and(|info| info.detail == FdDetail::Master { index })
                && proc::fd_metadata(pid, number).is_ok_and(|data| !is_on_other(data.dev()))
        })
    })
}
