//! A thread group leader that has exited while other threads of its process live.
//!
//! The kernel keeps it as a zombie until the others exit, and shows almost nothing of the
//! process through it. The images still need it: during a restore the leader creates the other
//! threads, and its core holds what belongs to the whole process. So the dump writes it as a
//! thread whose next instruction calls `exit(2)`. Any restorer, CRIU included, then restores a
//! leader that exits at once.

use std::os::fd::OwnedFd;

use nix::{errno::Errno, libc};

use super::{Checked, Kind, Process, Restored, Stopped};
use crate::{
    arch::native::{self, Registers},
    image::proto::CoreEntry,
    inject::{Script, Tracee, registers_to_exit},
    proc,
    res::{ResError, Result, thread},
    sys::process,
    units::HostPid,
};

/// The kind.
pub(super) struct Leader;

impl Kind for Leader {
    fn check(&self, of: &Checked<'_>) -> Result<()> {
        if of.task.is_leaderless() && !of.memory_only {
            open(of.task.into())?;
        }
        Ok(())
    }

    fn split_leader(
        &self,
        of: &Stopped<'_>,
        first: &Tracee,
        core: &mut CoreEntry,
    ) -> Result<Option<CoreEntry>> {
        let Process { pid, witness } = of.of;
        if pid == witness {
            return Ok(None);
        }
        let code = exit_code(pid)?;
        let exit = registers_to_exit(first, of.mappings, code)?;
        split(of, code, &exit, core).map(Some)
    }

    fn end(&self, of: &Restored<'_>, script: &mut Script) {
        let code = of.core.tc.as_ref().and_then(|task| task.rcriu_leader_exited);
        if let Some(code) = code {
            script.call("exit the thread group leader", libc::SYS_exit, &[code.into()]);
        }
    }
}

/// Returns a pidfd of a process, with which the dump duplicates its descriptors.
///
/// # Errors
/// [`ResError::Refused`] if the kernel cannot open a pidfd of a process whose leader has
/// exited; [`ResError::Process`].
pub fn open(of: Process) -> Result<OwnedFd> {
    let opened = if of.witness == of.pid {
        process::pidfd_open(of.pid)
    } else {
        process::pidfd_open_thread(of.witness)
    };
    opened.map_err(|source| match source {
        Errno::EINVAL => ResError::Refused {
            pid: of.pid,
            what: "has live threads, but its first thread has exited (pthread_exit(3) in main)"
                .to_owned(),
            help: "let main wait for its threads, or use Linux 6.9 or newer",
        },
        source => ResError::Process { pid: of.pid, step: "open", source },
    })
}

/// A signal mask that blocks all signals.
const ALL_SIGNALS: u64 = u64::MAX;

/// Returns the exit code of a leader that has exited. Before Linux 5.17 the kernel reports it as
/// the exit code of the process if the last thread exits in the same way.
fn exit_code(pid: HostPid) -> Result<u8> {
    let stat = proc::thread_stat(pid, pid)?;
    Ok(u8::try_from(stat.exit_code >> 8 & 0xff).expect("it is a byte"))
}

/// Moves the state of the process from the core of another thread to a new core for the leader,
/// which exits with `code` through the registers `to_exit`.
fn split(
    of: &Stopped<'_>,
    code: u8,
    to_exit: &Registers,
    core: &mut CoreEntry,
) -> Result<CoreEntry> {
    let mut leader = core.clone();
    core.tc = None;
    thread::exited(of.of.pid, of.pids.ids(), &mut leader)?;
    native::replace_general(&mut leader, to_exit);
    thread::own(&mut leader).blk_sigset = Some(ALL_SIGNALS);
    if let Some(task) = &mut leader.tc {
        task.blk_sigset = ALL_SIGNALS;
        task.rcriu_leader_exited = Some(code.into());
    }
    Ok(leader)
}
