//! Single processes and threads of a restore: how they are taken over, waited for and
//! ended.

use std::{
    thread,
    time::{Duration, Instant},
};

use nix::{errno::Errno, libc};

use super::{Result, pids::Waiting};
use crate::{
    inject::{InjectError, Scratch, Script, Tracee, Wanted, await_end, await_stop},
    proc,
    step::StepError,
    sys::{
        process::{self, CloneArguments},
        ptrace,
    },
    units::{HostPid, NsPid, PidMap},
};

/// How long a process may take to stop.
const REST_PATIENCE: Duration = Duration::from_secs(1);

/// The pause between two checks.
const REST_NAP: Duration = Duration::from_micros(100);

/// Makes a puppet create a process or thread with this pid in its namespace, and adds its numbers to
/// `pids`.
pub(super) fn make(
    scratch: &Scratch,
    maker: &mut Tracee,
    (pid, pids): (NsPid, &PidMap),
    arguments: CloneArguments,
) -> Result<Tracee> {
    let in_own_namespace = pids.is_own_namespace();
    let wanted = Wanted { chosen: pids.chosen(pid), in_own_namespace, arguments };
    let waiting = Waiting::begin();
    loop {
        match wanted.make(scratch, maker) {
            Err(InjectError::Call { source: Errno::EEXIST, .. }) => waiting.nap(pids.host(pid))?,
            Err(error) => return Err(error.into()),
            Ok(host) => {
                pids.learn(pid, host);
                return Ok(await_stop(host)?);
            }
        }
    }
}

/// Ends a puppet with this wait status (`wait(2)`).
pub(super) fn end(scratch: &Scratch, leader: &mut Tracee, status: u32) -> Result<()> {
    let pid = leader.tid;
    let trace = |step| move |source| StepError::Process { pid, step, source };
    let number = (status & 0x7f).cast_signed();
    if number == 0 {
        let mut script = Script::new();
        script.call("exit", libc::SYS_exit_group, &[(status >> 8 & 0xff).into()]);
        scratch.start(leader, &script)?;
    } else {
        // The thread is stopped, and continues with the signal that ends it.
        ptrace::set_signal_mask(pid, 0).map_err(trace("unblock the signals of"))?;
        ptrace::resume(pid, number).map_err(trace("resume"))?;
    }
    Ok(await_end(pid)?)
}

pub(super) fn kill(pid: HostPid) -> Result<()> {
    signal(pid, libc::SIGKILL)
}

pub(super) fn signal(pid: HostPid, number: i32) -> Result<()> {
    let step = "send a signal to";
    let failed = |source| StepError::Process { pid, step, source };
    Ok(process::signal(pid, number).map_err(failed)?)
}

/// Waits until a released process or thread is in a state that `rests` accepts; gives up
/// after [`REST_PATIENCE`], since another process may have continued it.
pub(super) fn await_state(tid: HostPid, rests: impl Fn(char) -> bool) {
    let deadline = Instant::now() + REST_PATIENCE;
    let runs = |stat: proc::Stat| !rests(stat.state);
    while proc::thread_stat(tid, tid).is_ok_and(runs) && Instant::now() < deadline {
        thread::sleep(REST_NAP);
    }
}
