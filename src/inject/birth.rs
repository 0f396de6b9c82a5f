//! How a process under control makes another process or thread with a chosen pid.

use std::{fs, mem::offset_of};

use nix::{errno::Errno, libc};
use zerocopy::IntoBytes;

use super::{InjectError, Result, Scratch, Script, Tracee, await_end, await_stop};
use crate::{
    sys::process::{self, CloneArguments},
    units::HostPid,
};

/// The pid that the kernel gave last in the pid namespace of the writer.
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// How often another process may get the pid.
const TRIES: usize = 20;

/// A process or thread to be made.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its pids in the pid namespaces that it is in, from the innermost one to that of its tree.
    pub chosen: Vec<i32>,
    /// Whether the last of these namespaces is that of rcriu.
    pub in_own_namespace: bool,
    /// The rest; the pids are filled in.
    pub arguments: CloneArguments,
}

impl Wanted {
    /// Has a process make it, and returns its pid here.
    ///
    /// A process in a user namespace of its own may not choose pids in the pid namespace of rcriu. Then
    /// rcriu, which may, sets the pid before the one that the kernel gives next.
    ///
    /// # Errors
    /// [`InjectError::Call`], with `EEXIST` if the pid is in use.
    pub fn make(&self, scratch: &Scratch, maker: &mut Tracee) -> Result<HostPid> {
        let (script, _) = self.script(true);
        let denied = match run(scratch, maker, &script) {
            Ok(born) => return Ok(born),
            Err(error @ InjectError::Call { source: Errno::EPERM, .. })
                if self.in_own_namespace =>
            {
                error
            }
            Err(error) => return Err(error),
        };
        let (script, what) = self.script(false);
        // Pids are to be given on from where they were: others may rely on theirs for a while.
        let _last = LastPid::keep();
        for _ in 0..TRIES {
            if fs::write(LAST_PID, (self.pid() - 1).to_string()).is_err() {
                return Err(denied);
            }
            let born = run(scratch, maker, &script)?;
            if born.0 == self.pid() {
                return Ok(born);
            }
            // Another process was faster.
            self.discard(scratch, maker, born)?;
        }
        Err(InjectError::Call { tid: maker.tid, what, source: Errno::EEXIST })
    }

    /// Returns its pid in the pid namespace of its tree.
    fn pid(&self) -> i32 {
        self.chosen.last().copied().unwrap_or(0)
    }

    /// Returns the calls; those that do not choose the pid in the namespace of the tree choose the others.
    fn script(&self, with_pid: bool) -> (Script, String) {
        let mut script = Script::new();
        let pids: Vec<u8> = self.chosen.iter().copied().flat_map(i32::to_ne_bytes).collect();
        let set_tid = script.bytes(&pids);
        let others = self.chosen.len().saturating_sub(1);
        let set_tid_size = if with_pid { self.chosen.len() } else { others } as u64;
        let arguments = CloneArguments { set_tid_size, ..self.arguments };
        let buffer = script.bytes(arguments.as_bytes());
        if set_tid_size > 0 {
            script.point(buffer, offset_of!(CloneArguments, set_tid), set_tid);
        }
        let what = format!("make process {}", self.pid());
        let size = size_of::<CloneArguments>();
        script.call(what.clone(), libc::SYS_clone3, &[buffer.into(), size.into()]);
        (script, what)
    }

    /// Ends a process or thread that got another pid.
    fn discard(&self, scratch: &Scratch, maker: &mut Tracee, born: HostPid) -> Result<()> {
        let mut other = await_stop(born)?;
        let mut script = Script::new();
        if self.arguments.flags & u64::from(libc::CLONE_THREAD.cast_unsigned()) != 0 {
            script.call("exit", libc::SYS_exit, &[0.into()]);
            scratch.start(&mut other, &script)?;
            return await_end(born);
        }
        let kill = InjectError::trace(born, "kill");
        process::signal(born, libc::SIGKILL).map_err(kill)?;
        await_end(born)?;
        // The maker has no other dead child yet, and its number for this one may be another. A sibling is a
        // child of rcriu or of a process that reaps it. `__WALL`: it may have no signal.
        let flags = libc::__WALL | libc::WNOHANG;
        let arguments = [(-1).into(), 0.into(), flags.into(), 0.into()];
        script.attempt(libc::SYS_wait4, &arguments);
        scratch.run(maker, &script).map(drop)
    }
}

/// Sets the last pid back when dropped, unless it has become higher.
struct LastPid(Option<i32>);

impl LastPid {
    fn read() -> Option<i32> {
        fs::read_to_string(LAST_PID).ok()?.trim().parse().ok()
    }

    fn keep() -> Self {
        Self(Self::read())
    }
}

impl Drop for LastPid {
    fn drop(&mut self) {
        if let (Some(before), Some(now)) = (self.0, Self::read())
            && before > now
        {
            // At worst, pids are given again that were free.
            let _ = fs::write(LAST_PID, before.to_string());
        }
    }
}

fn run(scratch: &Scratch, maker: &mut Tracee, script: &Script) -> Result<HostPid> {
    let mut born = None;
    scratch.run_births(maker, script, &mut |child| {
        born = Some(child);
        Ok(())
    })?;
    let what = "has made no process".to_owned();
    born.ok_or(InjectError::Lost { tid: maker.tid, what })
}
