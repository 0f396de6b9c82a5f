//! Asynchronous write protection: making the userfaultfd of another process.

use nix::{errno::Errno, libc};

use super::TrackError;
use crate::{
    inject::{self, Answers, Script},
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

/// What lets the process make the calls of a script, and acts when that pauses.
pub(super) type Run<'a> =
    dyn FnMut(&Script, &mut dyn FnMut(&Answers)) -> inject::Result<Answers> + 'a;

/// Makes a userfaultfd for a stopped process, which has no descriptor of it
/// afterwards: one of its threads makes it and closes it again.
///
/// # Errors
/// [`TrackError::Inject`]; [`TrackError::Kernel`].
pub(super) fn make(pid: HostPid, run: &mut Run<'_>) -> Result<WriteProtect, TrackError> {
    let pidfd = process::pidfd_open(pid).map_err(TrackError::kernel(pid, "open a descriptor"))?;
    let mut script = Script::new();
    let flags = [MAKE_FLAGS.into()];
    let made = script.call("make a userfaultfd", libc::SYS_userfaultfd, &flags);
    script.pause();
    script.attempt(libc::SYS_close, &[made.into()]);
    let mut fd = Err(Errno::EBADF);
    run(&script, &mut |so_far| {
        fd = so_far.result(made).and_then(|number| {
            process::pidfd_getfd(&pidfd, TargetFd(i32::try_from(number).expect("small")))
        });
    })?;
    let fd = fd.map_err(TrackError::kernel(pid, "take the userfaultfd"))?;
    WriteProtect::set_up(fd).map_err(TrackError::kernel(pid, "set up the userfaultfd"))
}
