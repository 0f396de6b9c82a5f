//! Soft-dirty bits (`CONFIG_MEM_SOFT_DIRTY`).
//!
//! Any program may clear the bits of a process: rcriu does not notice a dump by another program in
//! between.

use std::{
    fs::{self, File},
    os::fd::OwnedFd,
};

use super::TrackError;
use crate::{sys::Features, units::HostPid};

/// What clears the bits (`Documentation/filesystems/proc.rst`).
const CLEAR_SOFT_DIRTY: &[u8] = b"4";

/// Whether the kernel has them.
pub(super) fn is_there() -> bool {
    Features::probe_tracking().soft_dirty
}

/// Clears the bits of a process.
///
/// # Errors
/// [`TrackError::Kernel`].
pub(super) fn clear(pid: HostPid) -> Result<(), TrackError> {
    let step = "clear the soft-dirty bits";
    fs::write(format!("/proc/{pid}/clear_refs"), CLEAR_SOFT_DIRTY)
        .map_err(|source| TrackError::Kernel { pid, step, source })
}

/// Returns a descriptor for a keeper that has nothing to keep open.
///
/// # Errors
/// [`TrackError::Keeper`].
pub(super) fn nothing(pid: HostPid) -> Result<OwnedFd, TrackError> {
    let null = File::options().write(true).open("/dev/null");
    null.map(OwnedFd::from).map_err(|source| TrackError::Keeper { pid, source })
}
