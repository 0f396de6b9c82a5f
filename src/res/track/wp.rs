//! Asynchronous write protection: making the userfaultfd of another process.

use std::os::fd::AsRawFd;

use nix::libc;

use super::TrackError;
use crate::{
    inject::{Script, TABLE_BYTES, Task, with_scratch},
    proc::Mapping,
    sys::{
        Features, process,
        userfaultfd::{MAKE_FLAGS, WriteProtect},
    },
    units::TargetFd,
};

/// Whether the kernel has it, with what goes with it.
pub(super) fn is_there() -> bool {
    let features = Features::probe_tracking();
    features.pagemap_scan && features.write_protect_private
}

/// Makes a userfaultfd for a stopped process, which has no descriptor of it
/// afterwards.
///
/// # Errors
/// [`TrackError::Inject`]; [`TrackError::Kernel`].
pub(super) fn make(task: &mut Task, mappings: &[Mapping]) -> Result<WriteProtect, TrackError> {
    let pid = task.pid;
    let pidfd = process::pidfd_open(pid).map_err(TrackError::kernel(pid, "open a descriptor"))?;
    let made = with_scratch(&mut task.threads, mappings, TABLE_BYTES, |scratch, threads| {
        let mut script = Script::new();
        let flags = [MAKE_FLAGS.into()];
        let made = script.call("make a userfaultfd", libc::SYS_userfaultfd, &flags);
        let number = scratch.run(&mut threads[0], &script)?.result(made);
        let number = i32::try_from(number.expect("it must succeed")).expect("small");
        let fd = process::pidfd_getfd(&pidfd, TargetFd(number));
        let mut script = Script::new();
        script.call("close a userfaultfd", libc::SYS_close, &[number.into()]);
        scratch.run(&mut threads[0], &script)?;
        Ok(fd)
    })?;
    let fd = made.map_err(TrackError::kernel(pid, "take the userfaultfd"))?;
    debug_assert!(fd.as_raw_fd() >= 0);
    WriteProtect::set_up(fd).map_err(TrackError::kernel(pid, "set up the userfaultfd"))
}
