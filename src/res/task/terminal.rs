//! Processes without the controlling terminal of their session.
//!
//! A process has it from its parent, and can give it up (`TIOCNOTTY`). The format says which
//! terminal a session has, but not which of its processes have it: that is an extension.

use nix::{errno::Errno, libc};

use super::{Calling, Collect, Kind, Restored};
use crate::{
    inject::Script,
    proc,
    res::{Result, calls::Calls},
    sys::tty,
};

pub(super) struct Terminal;

impl Kind for Terminal {
    fn ask(&self, _: &Calling<'_>, _: &mut Script) -> Result<Collect> {
        Ok(Box::new(|of, _, images| {
            let has_one = |leader| proc::stat(leader).is_ok_and(|stat| stat.tty_nr != 0);
            if of.stat.tty_nr == 0 && of.stat.session != of.of.pid && has_one(of.stat.session) {
                images.core.rcriu_no_terminal = Some(true);
            }
            Ok(())
        }))
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        if of.core.tc.as_ref().is_none_or(|task| task.rcriu_no_terminal != Some(true)) {
            return Ok(());
        }
        let mut script = Script::new();
        let path = script.string(c"/dev/tty");
        let flags = libc::O_RDWR | libc::O_CLOEXEC;
        let arguments = [libc::AT_FDCWD.into(), path.into(), flags.into()];
        let terminal = script.attempt(libc::SYS_openat, &arguments);
        let leave =
            script.attempt(libc::SYS_ioctl, &[terminal.into(), tty::TIOCNOTTY.into(), 0.into()]);
        script.attempt(libc::SYS_close, &[terminal.into()]);
        let answers = calls.make(&script)?;
        match answers.result(terminal).and_then(|_| answers.result(leave)) {
            // It has none.
            Ok(_) | Err(Errno::ENXIO) => {}
            Err(errno) => log::warn!(
                "process {} has the controlling terminal of its session, which it did not have \
                 when it was dumped: {errno}",
                of.pid
            ),
        }
        Ok(())
    }
}
