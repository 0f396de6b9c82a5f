//! Makes a userfaultfd of another process's memory.

use std::os::fd::OwnedFd;

use nix::{errno::Errno, libc};

use super::{Answers, Result, Script};
use crate::{
    sys::process,
    units::{HostPid, TargetFd},
};

/// What lets the process make the calls of a script, and acts when that pauses.
pub type RunPaused<'a> = dyn FnMut(&Script, &mut dyn FnMut(&Answers)) -> Result<Answers> + 'a;

/// Makes a userfaultfd with these flags for a stopped process, which has no descriptor of it
/// afterwards: one of its threads makes it and closes it again.
///
/// # Errors
/// [`super::InjectError`]; the inner error is that of the process's call, such as `EPERM`, or of taking
/// the descriptor.
pub fn make_userfault(
    pid: HostPid,
    flags: libc::c_int,
    run: &mut RunPaused<'_>,
) -> Result<nix::Result<OwnedFd>> {
    let pidfd = match process::pidfd_open(pid) {
        Ok(pidfd) => pidfd,
        Err(errno) => return Ok(Err(errno)),
    };
    let mut script = Script::new();
    let made = script.attempt(libc::SYS_userfaultfd, &[flags.into()]);
    script.pause();
    script.attempt(libc::SYS_close, &[made.into()]);
    let mut fd = Err(Errno::EBADF);
    run(&script, &mut |so_far| {
        fd = so_far.result(made).and_then(|number| {
            process::pidfd_getfd(&pidfd, TargetFd(i32::try_from(number).expect("small")))
        });
    })?;
    Ok(fd)
}
