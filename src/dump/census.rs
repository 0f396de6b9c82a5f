//! Checks that the processes of a tree survive their dump.
//!
//! A user may kill a process during the dump, or the kernel may when memory runs out. Then
//! the state read so far is not a snapshot. Each process is identified by a pidfd, so
//! another process that gets its pid is not mistaken for it.

use std::{
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use nix::errno::Errno;

use super::{DumpError, Result};
use crate::{
    inject::{Task, living},
    proc,
    step::StepError,
    sys::process::{self, End},
    units::HostPid,
};

/// How long a killed process may need until it gets a processor and starts to exit.
const DYING: Duration = Duration::from_secs(1);

/// The pause between two checks.
const NAP: Duration = Duration::from_millis(1);

/// The processes of a tree that have not ended.
#[derive(Debug)]
pub(super) struct Census(Vec<Citizen>);

#[derive(Debug)]
struct Citizen {
    pid: HostPid,
    fd: OwnedFd,
    /// The thread that shows whether the process lives.
    witness: HostPid,
}

impl Census {
    /// Records the processes of a stopped tree.
    ///
    /// # Errors
    /// [`StepError::Process`]; [`DumpError::Died`].
    pub(super) fn take(tasks: &[Task]) -> Result<Self> {
        let mut citizens = Vec::with_capacity(tasks.len());
        for task in living(tasks) {
            let pid = task.pid;
            let step = "open";
            let fd = process::pidfd_open(pid).map_err(|source| StepError::Process {
                pid,
                step,
                source,
            })?;
            citizens.push(Citizen { pid, fd, witness: task.witness() });
        }
        let census = Self(citizens);
        census.check_stopped()?;
        Ok(census)
    }

    /// Checks that all processes of a stopped tree are still alive.
    ///
    /// # Errors
    /// [`DumpError::Died`] for the first that is not.
    pub(super) fn check_stopped(&self) -> Result<()> {
        // A large process takes time to die, but it no longer stands still.
        let dead = self.0.iter().find(|citizen| citizen.is_dead() || !citizen.stands_still());
        Self::died(dead)
    }

    fn died(dead: Option<&Citizen>) -> Result<()> {
        dead.map_or(Ok(()), |citizen| {
            // A stopped process does not exit by itself.
            let how = match citizen.end() {
                End::Killed(signal) => format!("was killed by {}", name(signal)),
                End::Exited(_) | End::Unknown => "was killed".to_owned(),
            };
            Err(DumpError::Died { pid: citizen.pid, how })
        })
    }

    /// Checks that no process of a running tree was killed; processes may exit.
    ///
    /// # Errors
    /// [`DumpError::Died`] for the first that was killed, or whose exit status is unknown
    /// (before Linux 6.15).
    pub(super) fn check_running(&self) -> Result<()> {
        for citizen in self.0.iter().filter(|citizen| process::has_ended(&citizen.fd)) {
            let how = match citizen.end() {
                End::Exited(code) => {
                    log::info!("{}: has exited with code {code} meanwhile", citizen.pid);
                    continue;
                }
                End::Killed(signal) => format!("was killed by {}", name(signal)),
                End::Unknown => "has ended in a way that this kernel does not report".to_owned(),
            };
            return Err(DumpError::Died { pid: citizen.pid, how });
        }
        Ok(())
    }

    /// Replaces an error that the death of a process caused by [`DumpError::Died`].
    pub(super) fn explain<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let begin = Instant::now();
            loop {
                let dead = self.0.iter().find(|citizen| citizen.is_dead());
                if let Err(died) = Self::died(dead) {
                    return died;
                }
                if !lost_a_thread(&error) || begin.elapsed() > DYING {
                    return error;
                }
                thread::sleep(NAP);
            }
        })
    }
}

/// Whether the error is that a thread is gone, or no longer stopped.
fn lost_a_thread(error: &DumpError) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref() == Some(&Errno::ESRCH) {
            return true;
        }
        cause = error.source();
    }
    false
}

impl Citizen {
    /// Whether the process has ended. The kernel does not report a traced process as ended
    /// until its tracer has waited for its dead threads.
    fn is_dead(&self) -> bool {
        process::has_ended(&self.fd)
            || self.stat().map_or_else(|error| error.is_vanished(), |stat| stat.has_ended())
    }

    /// Whether this program has the process stopped.
    fn stands_still(&self) -> bool {
        self.stat().is_ok_and(|stat| stat.state == 't')
    }

    fn stat(&self) -> Result<proc::Stat, proc::ProcError> {
        proc::thread_stat(self.pid, self.witness)
    }

    fn end(&self) -> End {
        // A zombie shows it, until it is reaped.
        match proc::stat(self.pid) {
            Ok(stat) if stat.state == 'Z' => End::of_status(stat.exit_code),
            _ => process::end(&self.fd),
        }
    }
}

fn name(signal: i32) -> String {
    nix::sys::signal::Signal::try_from(signal)
        .map_or_else(|_| format!("signal {signal}"), |signal| signal.as_str().to_owned())
}
