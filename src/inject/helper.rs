//! Helper processes, which make system calls with the ids of another process and then exit.

use nix::libc;

use super::{
    Answers, InjectError, Result, Scratch, Script, TABLE_BYTES, Tracee, session::free_place,
};
use crate::{
    proc,
    sys::{
        process,
        ptrace::{self, Wait, options},
    },
    units::HostPid,
};

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
        while !matches!(ptrace::wait(self.0), Err(_) | Ok(Wait::Exited(_) | Wait::Killed(_))) {}
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
        let kill = Kill(pid);
        let wanted = options::SYSGOOD | options::EXITKILL;
        ptrace::seize(pid, wanted).map_err(InjectError::trace(pid, "trace"))?;
        ptrace::interrupt(pid).map_err(InjectError::trace(pid, "interrupt"))?;
        let mut tracee = loop {
            match ptrace::wait(pid).map_err(InjectError::trace(pid, "wait for"))? {
                Wait::Interrupted | Wait::Stopped(_) => break Tracee::new(pid, 0)?,
                wait @ (Wait::Exited(_) | Wait::Killed(_)) => {
                    return Err(InjectError::Lost { tid: pid, what: format!("ended ({wait:?})") });
                }
                _ => ptrace::resume(pid, 0).map_err(InjectError::trace(pid, "resume"))?,
            }
        };
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
