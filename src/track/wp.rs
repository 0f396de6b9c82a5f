//! Asynchronous write protection: making the userfaultfd of another process.

use super::TrackError;
use crate::{
    inject::{self, RunPaused},
    sys::{
        Features,
        userfaultfd::{MAKE_FLAGS, WriteProtect},
    },
    units::HostPid,
};

/// Whether the kernel has it, with what goes with it.
pub(super) fn is_there() -> bool {
    let features = Features::probe_tracking();
    features.pagemap_scan && features.write_protect_private
}

/// Makes a userfaultfd for a stopped process.
///
/// # Errors
/// [`TrackError::Inject`]; [`TrackError::Kernel`].
pub(super) fn make(pid: HostPid, run: &mut RunPaused<'_>) -> Result<WriteProtect, TrackError> {
    let fd = inject::make_userfault(pid, MAKE_FLAGS, run)?;
    let fd = fd.map_err(TrackError::kernel(pid, "make a userfaultfd"))?;
    WriteProtect::set_up(fd).map_err(TrackError::kernel(pid, "set up the userfaultfd"))
}
