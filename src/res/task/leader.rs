//! A thread group leader that has exited while other threads of its process live.
//!
//! The kernel keeps it as a zombie until the others exit, and shows almost nothing of the
//! process through it. The images still need it: during a restore the leader creates the other
//! threads, and its core holds what belongs to the whole process. So the dump writes it as a
//! thread whose next instruction calls `exit(2)`. Any restorer, CRIU included, then restores a
//! leader that exits at once.

use nix::libc;

use crate::{
    arch::native::{self, Registers},
    image::proto,
    inject::Script,
    proc,
    res::{
        ResError, Result, attribute,
        thread::{creds, scheduling},
    },
    sys::process,
    units::HostPid,
};

/// A signal mask that blocks all signals.
const ALL_SIGNALS: u64 = u64::MAX;

/// Returns the exit code of a leader that has exited. Before Linux 5.17 the kernel reports it as
/// the exit code of the process if the last thread exits in the same way.
pub fn exit_code(pid: HostPid) -> Result<u8> {
    let stat = proc::thread_stat(pid, pid)?;
    Ok(u8::try_from(stat.exit_code >> 8 & 0xff).expect("it is a byte"))
}

/// Moves what belongs to the process from the core of another thread to a new core for the
/// leader, which exits with `code` by the registers `to_exit`.
pub fn split(
    pid: HostPid,
    code: u8,
    to_exit: &Registers,
    core: &mut proto::CoreEntry,
) -> Result<proto::CoreEntry> {
    let mut leader = core.clone();
    core.tc = None;
    let failed = |step| move |source| ResError::Thread { tid: pid, step, source };
    let status = proc::thread_status(pid, pid)?;
    let its_scheduling = process::scheduling(pid).map_err(failed("read the scheduling of"))?;
    native::replace_general(&mut leader, to_exit);
    if let Some(own) = &mut leader.thread_core {
        let securebits = own.creds.as_ref().map_or(0, |creds| creds.secbits);
        *own = proto::ThreadCoreEntry {
            futex_rla: 0,
            futex_rla_len: 0,
            blk_sigset: Some(ALL_SIGNALS),
            sas: None,
            pdeath_sig: None,
            signals_p: Some(proto::SignalQueueEntry::default()),
            creds: Some(creds::entry(securebits, &status)),
            comm: Some(proc::comm(pid, pid)?),
            rseq_entry: None,
            ..own.clone()
        };
        scheduling::fill_in(&its_scheduling, own);
        attribute::retain_of_process(&mut own.rcriu_attributes);
    }
    if let Some(task) = &mut leader.tc {
        task.blk_sigset = ALL_SIGNALS;
        task.rcriu_leader_exited = Some(code.into());
    }
    Ok(leader)
}

/// Returns the exit code of the leader, if it has exited.
pub fn has_exited(core: &proto::CoreEntry) -> Option<u32> {
    core.tc.as_ref()?.rcriu_leader_exited
}

/// Adds the call by which the leader exits.
pub fn end(code: u32, script: &mut Script) {
    script.call("exit the thread group leader", libc::SYS_exit, &[code.into()]);
}
