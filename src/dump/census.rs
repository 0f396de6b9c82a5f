//! Whether the processes of a tree live through their dump.
//!
//! Somebody may kill one, or the kernel for want of memory. What was read of it is no
//! snapshot then. A process is known by a descriptor, so that one which takes over its
//! number is not taken for it.

use std::{
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use nix::errno::Errno;

use super::{DumpError, Result};
use crate::{
    inject::Task,
    proc,
    step::StepError,
    sys::process::{self, End},
    units::HostPid,
};

/// How long a process that was killed may take to get a processor and begin to end.
const DYING: Duration = Duration::from_secs(1);

/// How long to sleep between two looks.
const NAP: Duration = Duration::from_millis(1);

/// The living processes of a tree.
#[derive(Debug)]
pub(super) struct Census(Vec<Citizen>);

#[derive(Debug)]
struct Citizen {
    pid: HostPid,
    fd: OwnedFd,
    /// The thread that tells whether it lives.
    witness: HostPid,
}

impl Census {
    /// Takes a tree that was stopped.
    ///
    /// # Errors
    /// [`StepError::Process`]; [`DumpError::Died`].
    pub(super) fn take(tasks: &[Task]) -> Result<Self> {
        let mut citizens = Vec::with_capacity(tasks.len());
        for task in tasks.iter().filter(|task| !task.is_zombie()) {
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

    /// Checks that all processes of a stopped tree are still there.
    ///
    /// # Errors
    /// [`DumpError::Died`] for the first that is not.
    pub(super) fn check_stopped(&self) -> Result<()> {
        // A large one takes its time to die: it no longer stands still, at least.
        let dead = self.0.iter().find(|citizen| citizen.is_dead() || !citizen.stands_still());
        Self::died(dead)
    }

    fn died(dead: Option<&Citizen>) -> Result<()> {
        dead.map_or(Ok(()), |citizen| {
            // A process that stands still does not end by itself.
            let how = match citizen.end() {
                End::Killed(signal) => format!("was killed by {}", name(signal)),
                End::Exited(_) | End::Unknown => "was killed".to_owned(),
            };
            Err(DumpError::Died { pid: citizen.pid, how })
        })
    }

    /// Checks that no process of a tree that runs was killed; they may exit.
    ///
    /// # Errors
    /// [`DumpError::Died`] for the first that was, and for one of which it is not known how
    /// it has ended (before Linux 6.15).
    pub(super) fn check_running(&self) -> Result<()> {
        for citizen in self.0.iter().filter(|citizen| process::has_ended(&citizen.fd)) {
            let how = match citizen.end() {
                End::Exited(code) => {
                    log::info!("{}: has exited with code {code} meanwhile", citizen.pid);
                    continue;
                }
                End::Killed(signal) => format!("was killed by {}", name(signal)),
                End::Unknown => "has ended, and the kernel does not tell how,".to_owned(),
            };
            return Err(DumpError::Died { pid: citizen.pid, how });
        }
        Ok(())
    }

    /// Says that a process has died rather than what came of it.
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

/// Whether an error is that a thread is no longer there, or no longer stands still.
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
    /// Whether the process has ended. Its dead threads keep a traced process from being
    /// told as ended, until the tracer has waited for them.
    fn is_dead(&self) -> bool {
        process::has_ended(&self.fd)
            || self.stat().map_or_else(|error| error.is_vanished(), |stat| stat.has_ended())
    }

    /// Whether the process is stopped by this program.
    fn stands_still(&self) -> bool {
        self.stat().is_ok_and(|stat| stat.state == 't')
    }

    fn stat(&self) -> Result<proc::Stat, proc::ProcError> {
        proc::thread_stat(self.pid, self.witness)
    }

    fn end(&self) -> End {
        // What is left of it tells, until it is reaped.
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
