//! Asynchronous write protection: making the userfaultfd of another process.

use nix::libc;

use super::TrackError;
use crate::{
    inject::{Scratch, Script, Tracee},
    sys::{
        Features, process,
        userfaultfd::{MAKE_FLAGS, WriteProtect},
    },
    units::{HostPid, TargetFd},
};

/// Whether the kernel has it, with what goes with it.
pub(super) fn is_there() -> bool {
    let features = Features::probe_tracking();
    features.pagemap_scan && features.write_protect_private
}

/// Makes a userfaultfd for a stopped process, which has no descriptor of it
/// afterwards: one of its threads works in scratch memory.
///
/// # Errors
/// [`TrackError::Inject`]; [`TrackError::Kernel`].
pub(super) fn make(
    pid: HostPid,
    scratch: &Scratch,
    thread: &mut Tracee,
) -> Result<WriteProtect, TrackError> {
    let pidfd = process::pidfd_open(pid).map_err(TrackError::kernel(pid, "open a descriptor"))?;
    let mut script = Script::new();
    let flags = [MAKE_FLAGS.into()];
    let made = script.call("make a userfaultfd", libc::SYS_userfaultfd, &flags);
    let number = scratch.run(thread, &script)?.result(made);
    let number = i32::try_from(number.expect("it must succeed")).expect("small");
    let fd = process::pidfd_getfd(&pidfd, TargetFd(number));
    let mut script = Script::new();
    script.call("close a userfaultfd", libc::SYS_close, &[number.into()]);
    scratch.run(thread, &script)?;
    let fd = fd.map_err(TrackError::kernel(pid, "take the userfaultfd"))?;
    WriteProtect::set_up(fd).map_err(TrackError::kernel(pid, "set up the userfaultfd"))
}
