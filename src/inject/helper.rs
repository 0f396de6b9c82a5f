//! Helper processes, which make system calls with the ids of another process and then exit.

use nix::libc;

use super::{
    Answers, InjectError, Result, Scratch, Script, TABLE_BYTES, Tracee, adopt_sleeper, await_end,
    session::free_place,
};
use crate::{proc, sys::process, units::HostPid};

/// `CLONE_CLEAR_SIGHAND` (`linux/sched.h`, since Linux 5.5).
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;

/// A child with a chosen pid that shares rcriu's descriptors. Dropping it kills the child and frees
/// the pid.
#[derive(Debug)]
pub struct Helper {
    tracee: Tracee,
    scratch: Scratch,
}

/// Kills a child when dropped.
struct Kill(HostPid);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = process::signal(self.0, libc::SIGKILL);
        let _ = await_end(self.0);
    }
}

impl Helper {
    /// Creates a helper with this pid.
    ///
    /// # Errors
    /// [`InjectError::Trace`], with `EEXIST` if the pid is in use.
    pub fn spawn(pid: HostPid) -> Result<Self> {
        let flags = CLONE_CLEAR_SIGHAND | u64::from(libc::CLONE_FILES.cast_unsigned());
        process::spawn_sleeper(pid, flags).map_err(InjectError::trace(pid, "make"))?;
        let mut tracee = adopt_sleeper(pid, 0)?;
        let kill = Kill(pid);
        let mappings = proc::maps(pid)?;
        let scratch = Scratch::map(&mut tracee, &mappings, free_place(&mappings), TABLE_BYTES)?;
        std::mem::forget(kill);
        Ok(Self { tracee, scratch })
    }

    /// Has the helper make the calls of a script, like [`Scratch::run`].
    pub fn run(&mut self, script: &Script) -> Result<Answers> {
        self.scratch.run(&mut self.tracee, script)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(Kill(self.tracee.tid));
    }
}
