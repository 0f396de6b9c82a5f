//! Whether a process is stopped, its name, and the signal that it sends its parent on exit.

use nix::libc;

use super::{ALIVE, Calling, Collect, DEAD, Kind, STOPPED};
use crate::{arch::Machine, image::proto, inject::Script, proc, res::Result, units::HostPid};

/// The restore does the rest elsewhere: it stops the process when it releases it, and the leader
/// sets the name.
pub(super) struct State;

impl Kind for State {
    fn ask(&self, _: &Calling<'_>, _: &mut Script) -> Result<Collect> {
        Ok(Box::new(|of, _, images| {
            let stopped = of.stopped_by != 0;
            let core = &mut images.core;
            core.task_state = if stopped { STOPPED } else { ALIVE };
            core.stop_signo = stopped.then_some(of.stopped_by.cast_unsigned());
            core.flags = proc::stat(of.of.witness)?.flags;
            core.blk_sigset = of.blocked;
            core.comm = proc::comm(of.of.pid, of.of.pid)?;
            core.rcriu_exit_signal = exit_signal(of.stat);
            Ok(())
        }))
    }
}

/// Returns the exit signal of a process, unless it is `SIGCHLD`.
fn exit_signal(stat: &proc::Stat) -> Option<u32> {
    (stat.exit_signal != libc::SIGCHLD).then_some(stat.exit_signal.cast_unsigned())
}

/// Builds the core of a zombie.
pub fn zombie(pid: HostPid) -> Result<proto::CoreEntry> {
    let stat = proc::stat(pid)?;
    Ok(proto::CoreEntry {
        mtype: Machine::NATIVE.march().into(),
        tc: Some(proto::TaskCoreEntry {
            task_state: DEAD,
            exit_code: stat.exit_code.cast_unsigned(),
            flags: stat.flags,
            rcriu_exit_signal: exit_signal(&stat),
            comm: stat.comm,
            ..Default::default()
        }),
        ..Default::default()
    })
}
