//! What a process has besides its threads, memory and files.

pub mod leader;
pub mod stop;
pub mod timers;

use nix::libc;

use super::{ResError, Result, signals};
use crate::{
    image::proto,
    inject::{Answers, Buffer, CallId, Script},
    proc,
    sys::ptrace,
    units::HostPid,
};

pub use crate::image::tree::state;

/// `MEMBARRIER_CMD_GET_REGISTRATIONS` (`linux/membarrier.h`, since Linux 6.3).
const MEMBARRIER_REGISTRATIONS: i32 = 1 << 9;

/// Where `modify_ldt(2)` reads entries from the table, and the bytes of one.
const READ_LDT: u64 = 0;
const LDT_ENTRY_BYTES: usize = 8;

/// What a process was asked.
#[derive(Clone, Debug)]
pub struct Asked {
    actions: signals::Asked,
    timers: timers::Asked,
    subreaper: Buffer,
    dumpable: CallId,
    brk: CallId,
    membarrier: CallId,
    ldt: CallId,
}

/// Adds the questions to a process; `witness` is a thread of it that lives.
///
/// # Errors
/// Those of reading `/proc`.
pub fn ask(witness: HostPid, script: &mut Script) -> Result<Asked> {
    let posix = match proc::timers(witness) {
        Err(error) if error.is_vanished() => Vec::new(),
        timers => timers?,
    };
    let subreaper = script.space(size_of::<u32>());
    let entry = script.space(LDT_ENTRY_BYTES);
    let arguments = [libc::PR_GET_CHILD_SUBREAPER.into(), subreaper.into()];
    script.call("ask whether it is a subreaper", libc::SYS_prctl, &arguments);
    Ok(Asked {
        actions: signals::ask(script),
        timers: timers::ask(posix, script),
        subreaper,
        dumpable: script.attempt(libc::SYS_prctl, &[libc::PR_GET_DUMPABLE.into()]),
        brk: script.attempt(libc::SYS_brk, &[0.into()]),
        membarrier: script.attempt(libc::SYS_membarrier, &[MEMBARRIER_REGISTRATIONS.into()]),
        ldt: script.attempt(
            libc::SYS_modify_ldt,
            &[READ_LDT.into(), entry.into(), (LDT_ENTRY_BYTES as u64).into()],
        ),
    })
}

/// What belongs into other images than the core.
#[derive(Clone, Copy, Debug)]
pub struct ForMemory {
    /// Whether the process can be dumped (`PR_GET_DUMPABLE`).
    pub dumpable: i32,
    /// The end of the heap.
    pub brk: u64,
}

/// Fills in what an image says of a stopped process; `witness` is a thread of it that
/// lives.
///
/// # Errors
/// What keeps something from being read.
pub fn collect(
    asked: &Asked,
    answers: &Answers,
    (pid, witness): (HostPid, HostPid),
    stopped_by: i32,
    core: &mut proto::CoreEntry,
) -> Result<ForMemory> {
    // Nothing is read where there is no table.
    if answers.result(asked.ldt).is_ok_and(|bytes| bytes > 0) {
        let what = "it has a local descriptor table (modify_ldt(2))".to_owned();
        return Err(ResError::Unsupported { pid, what });
    }
    let stat = proc::stat(pid)?;
    let limits = proc::limits(witness)?;
    let pending = ptrace::queued_signals(witness, true).map_err(|source| ResError::Thread {
        tid: witness,
        step: "read the signals of",
        source,
    })?;
    let subreaper: u32 = answers.value(asked.subreaper);
    let membarrier = answers.result(asked.membarrier).unwrap_or(0);
    let stopped = stopped_by != 0;
    core.tc = Some(proto::TaskCoreEntry {
        task_state: if stopped { state::STOPPED } else { state::ALIVE },
        exit_code: 0,
        personality: proc::personality(witness)?,
        flags: proc::stat(witness)?.flags,
        blk_sigset: core.thread_core.as_ref().and_then(|thread| thread.blk_sigset).unwrap_or(0),
        comm: proc::comm(pid, pid)?,
        timers: Some(timers::collect(&asked.timers, answers)),
        rlimits: Some(proto::TaskRlimitsEntry {
            rlimits: limits.map(|(cur, max)| proto::RlimitEntry { cur, max }).to_vec(),
        }),
        signals_s: Some(signals::queue(pending)),
        loginuid: proc::loginuid(witness)?,
        oom_score_adj: Some(proc::oom_score_adj(witness)?),
        sigactions: signals::collect(&asked.actions, answers),
        child_subreaper: Some(subreaper != 0),
        stop_signo: stopped.then_some(stopped_by.cast_unsigned()),
        membarrier_registration_mask: (membarrier != 0)
            .then(|| u32::try_from(membarrier).unwrap_or(0)),
        rcriu_exit_signal: exit_signal(&stat),
        ..Default::default()
    });
    Ok(ForMemory {
        dumpable: answers
            .result(asked.dumpable)
            .map_or(1, |value| i32::try_from(value).unwrap_or(1)),
        brk: answers.result(asked.brk).unwrap_or(0),
    })
}

/// Returns what an image says of the signal by which a process tells its end.
fn exit_signal(stat: &proc::Stat) -> Option<u32> {
    (stat.exit_signal != libc::SIGCHLD).then_some(stat.exit_signal.cast_unsigned())
}

/// Returns the core of a process that has ended and was not waited for.
///
/// # Errors
/// Those of reading `/proc`.
pub fn zombie(pid: HostPid) -> Result<proto::CoreEntry> {
    let stat = proc::stat(pid)?;
    Ok(proto::CoreEntry {
        mtype: proto::core_entry::March::X8664.into(),
        tc: Some(proto::TaskCoreEntry {
            task_state: state::DEAD,
            exit_code: stat.exit_code.cast_unsigned(),
            flags: stat.flags,
            rcriu_exit_signal: exit_signal(&stat),
            comm: stat.comm,
            ..Default::default()
        }),
        ..Default::default()
    })
}

/// Bits that no personality has (`linux/personality.h`).
const NO_PERSONALITY: u32 = 0xff00;

/// Returns the personality that an image tells of.
///
/// CRIU reads the hexadecimal digits of `/proc/PID/personality` as decimal ones. All
/// flags that have decimal digits only then give a number with bits that mean nothing.
fn personality(stored: u32) -> u32 {
    if stored & NO_PERSONALITY == 0 {
        return stored;
    }
    let read = u32::from_str_radix(&stored.to_string(), 16);
    read.ok().filter(|read| read & NO_PERSONALITY == 0).unwrap_or(stored)
}

/// Returns the scripts that make the timers of a process whose threads are there.
///
/// # Errors
/// [`ResError::Image`].
pub fn timers(core: &proto::CoreEntry, pid: HostPid) -> Result<timers::Creation> {
    let timers = core.tc.as_ref().and_then(|task| task.timers.as_ref());
    let posix = timers.map_or(&[][..], |timers| &timers.posix);
    timers::create(posix).map_err(|problem| ResError::Image { pid, problem })
}

/// Adds the calls that a process makes for itself while it still has the
/// credentials of this program. `own_limits` are the limits of this program.
pub fn apply(core: &proto::CoreEntry, own_limits: &[(u64, u64)], script: &mut Script) {
    let Some(task) = &core.tc else { return };
    let personality = personality(task.personality);
    script.call("set the personality", libc::SYS_personality, &[personality.into()]);
    if task.child_subreaper == Some(true) {
        let arguments = [libc::PR_SET_CHILD_SUBREAPER.into(), 1.into()];
        script.call("become a subreaper", libc::SYS_prctl, &arguments);
    }
    for bit in 0..u32::BITS {
        if task.membarrier_registration_mask.unwrap_or(0) >> bit & 1 == 1 {
            let command = 1_u32 << bit;
            script.attempt(libc::SYS_membarrier, &[command.into(), 0.into()]);
        }
    }
    let limits = task.rlimits.iter().flat_map(|limits| &limits.rlimits);
    for (number, limit) in limits.enumerate() {
        if own_limits.get(number) == Some(&(limit.cur, limit.max)) {
            continue;
        }
        let mut bytes = limit.cur.to_le_bytes().to_vec();
        bytes.extend_from_slice(&limit.max.to_le_bytes());
        let buffer = script.bytes(&bytes);
        let what = format!("set limit {number} to {} of at most {}", limit.cur, limit.max);
        script.call(what, libc::SYS_prlimit64, &[0.into(), number.into(), buffer.into()]);
    }
}

/// Adds the calls that set the actions of signals, when all who were dead are so again.
pub fn apply_actions(core: &proto::CoreEntry, script: &mut Script) {
    if let Some(task) = &core.tc {
        signals::apply(&task.sigactions, script);
    }
}

/// Adds the last calls of a process: what waits for it, and what runs by itself.
///
/// # Errors
/// [`ResError::Image`].
pub fn finish(core: &proto::CoreEntry, pid: HostPid, script: &mut Script) -> Result<()> {
    let Some(task) = &core.tc else { return Ok(()) };
    if let Some(queue) = &task.signals_s {
        signals::requeue(queue, pid, None, script).map_err(|_| ResError::Image {
            pid,
            problem: "a signal in its queue is malformed".into(),
        })?;
    }
    if let Some(timers) = &task.timers {
        timers::start(timers, script);
    }
    Ok(())
}

/// Sets what can be set from outside.
///
/// # Errors
/// [`ResError::Write`].
pub fn apply_outside(core: &proto::CoreEntry, pid: HostPid) -> Result<()> {
    let Some(task) = &core.tc else { return Ok(()) };
    if let Some(adjustment) = task.oom_score_adj
        && proc::oom_score_adj(pid)? != adjustment
    {
        write_proc(pid, "oom_score_adj", &adjustment.to_string())?;
    }
    if let Some(loginuid) = task.loginuid
        && proc::loginuid(pid)?.is_some_and(|now| now != loginuid)
    {
        write_proc(pid, "loginuid", &loginuid.to_string())?;
    }
    Ok(())
}

fn write_proc(pid: HostPid, file: &str, value: &str) -> Result<()> {
    let path = format!("/proc/{pid}/{file}");
    std::fs::write(&path, value).map_err(|source| ResError::Write { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn personalities_of_criu_are_understood() {
        // PER_LINUX32, ADDR_NO_RANDOMIZE, UNAME26 with it, READ_IMPLIES_EXEC.
        for value in [8, 0x40000, 0x60000, 0x0040_0000] {
            assert_eq!(personality(value), value);
            let digits: u32 = format!("{value:08x}").parse().unwrap();
            assert_eq!(personality(digits), value, "{digits}");
        }
    }
}
