//! A first thread that has ended while others of its process live.
//!
//! The kernel keeps it, as a zombie, until the others have ended, and shows nothing of the
//! process by it. The images need it all the same: it is the one that makes the others in a
//! restore, and it has what belongs to the whole process. So it is dumped as a thread whose
//! next instruction calls `exit(2)`: whatever restores it, CRIU as well, it ends at once.

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

/// A thread that blocks all signals.
const ALL_SIGNALS: u64 = u64::MAX;

/// Returns the exit code of a leader that has ended. It is that of the process on kernels
/// before Linux 5.17, if the others end like it.
///
/// # Errors
/// Those of reading `/proc`.
pub fn exit_code(pid: HostPid) -> Result<u8> {
    let stat = proc::thread_stat(pid, pid)?;
    Ok(u8::try_from(stat.exit_code >> 8 & 0xff).expect("it is a byte"))
}

/// Takes out of the core of another thread what belongs to the process, and returns it as
/// the core of its leader, which ends by the registers `to_exit` with this exit code.
///
/// # Errors
/// What keeps something of the leader from being read.
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

/// Returns the exit code with which the leader of a process has ended, if it has.
pub fn has_exited(core: &proto::CoreEntry) -> Option<u32> {
    core.tc.as_ref()?.rcriu_leader_exited
}

/// Adds the call by which the leader ends.
pub fn end(code: u32, script: &mut Script) {
    script.call("end the first thread", libc::SYS_exit, &[code.into()]);
}
