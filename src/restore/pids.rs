//! Checks that the pids of a tree are free, and waits for those that are about to be.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{RestoreError, Result};
use crate::{proc, sys::process, units::HostPid};

/// How long to wait for a process that is exiting: on some machines init reaps orphans only
/// every second or two.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long to wait for the parent of a zombie, which may be about to reap it.
const SHORT_PATIENCE: Duration = Duration::from_millis(500);

/// How long to wait for a live process: one that was killed a moment ago shows neither a
/// pending SIGKILL nor that it exits, until it gets a processor.
const GRACE: Duration = Duration::from_millis(100);

/// The pause between two checks.
const NAP: Duration = Duration::from_millis(2);

/// `SIGKILL` in a signal set.
const KILL_BIT: u64 = 1 << (nix::libc::SIGKILL - 1);

/// The process that inherits orphans.
const INIT: i32 = 1;

/// What will happen to the holder of a pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Prospect {
    /// It is about to go.
    Leaves,
    /// It is a zombie, and goes when its parent reaps it.
    Held,
    /// It stays.
    Stays,
}

/// The process that holds a pid.
#[derive(Debug)]
struct Holder {
    /// The process.
    pid: HostPid,
    prospect: Prospect,
    /// More about it, to follow its name in messages.
    state: String,
}

/// A wait with a deadline.
#[derive(Debug)]
pub(super) struct Waiting {
    begin: Instant,
}

impl Waiting {
    /// Starts the deadline.
    pub(super) fn begin() -> Self {
        Self { begin: Instant::now() }
    }

    /// Waits until no process or thread has this pid.
    ///
    /// # Errors
    /// [`RestoreError::PidInUse`] if one keeps it.
    pub(super) fn until_free(&self, pid: HostPid) -> Result<()> {
        while process::exists(pid) {
            self.nap(pid)?;
        }
        Ok(())
    }

    /// Sleeps for a moment, if the holder of a pid may be gone afterwards.
    ///
    /// # Errors
    /// [`RestoreError::PidInUse`] if it keeps the pid.
    pub(super) fn nap(&self, pid: HostPid) -> Result<()> {
        let holder = holder(pid);
        let patience = match holder.as_ref().map(|holder| holder.prospect) {
            None | Some(Prospect::Leaves) => PATIENCE,
            Some(Prospect::Held) => SHORT_PATIENCE,
            Some(Prospect::Stays) => GRACE,
        };
        if self.begin.elapsed() < patience {
            thread::sleep(NAP);
            return Ok(());
        }
        let (holder, state) = match holder {
            Some(holder) => (holder.pid, holder.state),
            None => (pid, ", which cannot be seen from here".into()),
        };
        Err(RestoreError::PidInUse { pid, holder, name: name(holder), state })
    }
}

fn name(pid: HostPid) -> String {
    proc::comm(pid, pid)
        .map_or_else(|_| "unknown".into(), |name| String::from_utf8_lossy(&name).into_owned())
}

/// Returns the holder of a pid: as its own pid, or as that of its session or group.
fn holder(pid: HostPid) -> Option<Holder> {
    if process::exists(pid) {
        // A thread has a directory in `/proc`, too, but is not listed there.
        let status = proc::status(pid).ok()?;
        return Some(of_process(status.tgid, ""));
    }
    let members = proc::pids().unwrap_or_default().into_iter().filter(|member| {
        proc::stat(*member).is_ok_and(|stat| stat.session == pid || stat.pgrp == pid)
    });
    let holders = members.map(|member| of_process(member, ", whose session or group it is"));
    // The holder that stays longest.
    holders.max_by_key(|holder| holder.prospect)
}

fn of_process(pid: HostPid, relation: &str) -> Holder {
    let leaves = |state: String| Holder { pid, prospect: Prospect::Leaves, state };
    let Ok(stat) = proc::stat(pid) else {
        return leaves(format!("{relation}, which has just ended"));
    };
    let threads = proc::threads(pid).unwrap_or_default();
    let is_killed = |tid: HostPid| {
        proc::thread_status(pid, tid)
            .is_ok_and(|status| (status.sig_pending | status.shared_pending) & KILL_BIT != 0)
    };
    let lives = threads.iter().any(|tid| {
        proc::thread_stat(pid, *tid).is_ok_and(|stat| !stat.has_ended()) && !is_killed(*tid)
    });
    if lives {
        return Holder { pid, prospect: Prospect::Stays, state: relation.into() };
    }
    // A leader remains a zombie while other threads exit.
    if stat.state != 'Z' || threads.len() > 1 {
        return leaves(format!("{relation}, which is ending"));
    }
    let parent = stat.ppid;
    let state = format!(
        "{relation}, a zombie that its parent, process {parent} ({}), has not reaped yet",
        name(parent)
    );
    let prospect = if parent.0 == INIT { Prospect::Leaves } else { Prospect::Held };
    Holder { pid, prospect, state }
}
