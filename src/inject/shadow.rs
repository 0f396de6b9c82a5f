//! Shadows: copies of the private memory of stopped processes, as it is at that moment.
//!
//! A shadow is a child that a process of the tree makes by `clone3(2)`. It shares all pages with the
//! process copy-on-write, so that the process may write, unmap and exit while rcriu reads the
//! shadow. It never executes an instruction of the program. The kernel attaches it to rcriu at its
//! birth (`CLONE_PTRACE`), and rcriu never resumes it. If rcriu is killed, the kernel kills the
//! shadow. If rcriu is killed before it could ask for that, the shadow dies of its first access to the
//! stack.
//!
//! A shadow sends no signal when it ends, and `wait(2)` without `__WALL` or `__WCLONE` ignores it. So
//! that no zombie is left, its parent has to reap it, which rcriu has it do at the end.

use std::fs;

use nix::{
    errno::Errno,
    libc,
    sys::wait::{Id, WaitPidFlag, waitid},
    unistd::Pid,
};

use super::{
    Frozen, InjectError, Outcome, Result, Script, TABLE_BYTES, Task, await_end,
    repair::STOP_TIMEOUT, with_session,
};
use crate::{
    causes::with_sources,
    fault::{self, Point},
    proc::{self, Mapping},
    sys::{
        process,
        ptrace::{self, Wait, options},
        supervise::{self, ShadowPids},
    },
    units::{HostPid, RemoteAddr},
};

/// The value of `/proc/PID/oom_score_adj` with which the kernel kills a process first when memory
/// runs out (`linux/oom.h`).
const FIRST_TO_DIE: &str = "1000";

/// The shadows of a tree. Dropping it ends them; the tree must run by then.
#[derive(Debug, Default)]
pub struct Shadows(Vec<ShadowPids>);

impl Shadows {
    /// Makes a shadow of a stopped process, and returns its pid. `in_use` are the stack pointers of
    /// threads of other processes that share the memory.
    ///
    /// # Errors
    /// [`InjectError::OtherNamespace`]; [`InjectError::Shadows`]; those of running scripts.
    pub fn make(
        &mut self,
        task: &mut Task,
        mappings: &[Mapping],
        in_use: &[RemoteAddr],
    ) -> Result<HostPid> {
        let (of, witness) = (task.pid, task.witness());
        let own = proc::namespace(witness, "pid")?;
        if !proc::namespace(witness, "pid_for_children").is_ok_and(|children| children == own) {
            // The shadow would be the first process of that namespace, which would end with it.
            return Err(InjectError::OtherNamespace { pid: of });
        }
        with_session(&mut task.threads, mappings, in_use, TABLE_BYTES, |session, threads| {
            session.fork(threads, mappings, |number| self.take_over(of, number))
        })?;
        Ok(self.0.last().expect("it was just made").pid)
    }

    /// Takes over a shadow that has just been born, stopped.
    fn take_over(&mut self, of: HostPid, number: i32) -> Result<HostPid> {
        let is_it = |child: &HostPid| {
            proc::status(*child).is_ok_and(|status| status.ns_pid.last() == Some(&number))
        };
        let pid = proc::children(of)?.into_iter().find(is_it).ok_or_else(|| {
            let what = format!("has made the process {number}, which cannot be found");
            InjectError::Lost { tid: of, what }
        })?;
        let shadow = ShadowPids { pid, of, number };
        self.0.push(shadow);
        if !supervise::note_shadow(shadow) {
            return Err(InjectError::Shadows);
        }
        fault::hit(Point::LiveForked)?;
        loop {
            match ptrace::wait(pid).map_err(InjectError::trace(pid, "wait for"))? {
                Wait::Interrupted | Wait::Stopped(_) => break,
                wait @ (Wait::Exited(_) | Wait::Killed(_)) => {
                    let what = format!("has ended ({wait:?})");
                    return Err(InjectError::Lost { tid: pid, what });
                }
                _ => ptrace::resume(pid, 0).map_err(InjectError::trace(pid, "resume"))?,
            }
        }
        ptrace::set_options(pid, options::SYSGOOD | options::EXITKILL)
            .map_err(InjectError::trace(pid, "set the options of"))?;
        // What the process writes costs memory. If that runs out, the dump ends, not the process.
        if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), FIRST_TO_DIE) {
            log::debug!("{of}: the kernel does not prefer to kill its shadow: {error}");
        }
        Ok(pid)
    }

    /// Returns the process whose shadow has ended before its time, if there is one.
    pub fn lost(&self) -> Option<HostPid> {
        let ended = |shadow: &&ShadowPids| {
            proc::stat(shadow.pid).map_or_else(|error| error.is_vanished(), |stat| stat.has_ended())
        };
        self.0.iter().find(ended).map(|shadow| shadow.of)
    }

    /// Ends the shadows, and has their parents reap them. The tree must run by then.
    pub fn end(&mut self) {
        for shadow in &self.0 {
            // It may have ended.
            let _ = process::signal(shadow.pid, libc::SIGKILL);
        }
        for shadow in self.0.drain(..) {
            // To free its memory takes a while. Its parent does not see the end before rcriu has, and so
            // not before it is stopped again.
            await_zombie(shadow.pid);
            if let Err(error) = reap(shadow, || await_end(shadow.pid)) {
                let _ = await_end(shadow.pid);
                tell_zombie(shadow, &error);
            }
        }
        supervise::clear_shadows();
    }
}

impl Drop for Shadows {
    fn drop(&mut self) {
        self.end();
    }
}

/// Waits until a killed tracee has ended, without reaping it.
fn await_zombie(pid: HostPid) {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::__WALL;
    while waitid(Id::Pid(Pid::from_raw(pid.0)), flags) == Err(Errno::EINTR) {}
}

/// Has the processes of a tree reap the shadows that a killed worker has left behind.
pub fn reap_shadows(left: Vec<ShadowPids>) {
    for shadow in left {
        // The kernel has killed it.
        if let Ok(pidfd) = process::pidfd_open(shadow.pid) {
            process::await_end(pidfd);
        }
        if let Err(error) = reap(shadow, || Ok(())) {
            tell_zombie(shadow, &error);
        }
    }
}

fn tell_zombie(shadow: ShadowPids, error: &InjectError) {
    log::warn!(
        "process {} keeps a zombie, process {}, until it exits: {}",
        shadow.of,
        shadow.pid,
        with_sources(error)
    );
}

/// Has the parent of a shadow that has ended reap it. Calls `release` while the parent is stopped.
fn reap(shadow: ShadowPids, release: impl FnOnce() -> Result<()>) -> Result<()> {
    let ShadowPids { pid, of, number } = shadow;
    let mut frozen = match Frozen::freeze_alone(of, STOP_TIMEOUT) {
        // Another process has inherited the shadow, and reaps it.
        Err(InjectError::Proc(error)) if error.is_vanished() => return release(),
        frozen => frozen?,
    };
    release()?;
    let Some(task) = frozen.tasks.first_mut().filter(|task| !task.is_zombie()) else {
        return Ok(());
    };
    let is_left = |stat: &proc::Stat| stat.state == 'Z' && stat.ppid == of && stat.exit_signal == 0;
    if !proc::stat(pid).is_ok_and(|stat| is_left(&stat)) {
        return Ok(());
    }
    let mappings = proc::maps(task.witness())?;
    let mut script = Script::new();
    let flags = libc::__WALL | libc::WNOHANG;
    let wait = [number.into(), 0.into(), flags.into(), 0.into()];
    script.attempt(libc::SYS_wait4, &wait);
    with_session(&mut task.threads, &mappings, &[], TABLE_BYTES, |session, threads| {
        session.run(threads, 0, &script).map(drop)
    })?;
    frozen.release(Outcome::Run)
}
