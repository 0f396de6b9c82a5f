//! Whether the numbers of a tree are free, and waiting for those that are about to be.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{RestoreError, Result};
use crate::{proc, sys::process, units::HostPid};

/// How long to wait for what is on its way out: the first process of some machines looks
/// for dead orphans every second or two.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long to wait for who holds a dead child, which may be about to look at it.
const SHORT_PATIENCE: Duration = Duration::from_millis(500);

/// How long to wait for a process that lives: one that was killed a moment ago is neither
/// pending to be killed nor exiting, until it gets a processor.
const GRACE: Duration = Duration::from_millis(100);

/// How long to sleep between two looks.
const NAP: Duration = Duration::from_millis(2);

/// `SIGKILL` in a set of signals.
const KILL_BIT: u64 = 1 << (nix::libc::SIGKILL - 1);

/// The process that orphans come to.
const INIT: i32 = 1;

/// What is to become of who has a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Prospect {
    /// It goes by itself.
    Leaves,
    /// It is dead, and goes when its parent looks.
    Held,
    /// It stays.
    Stays,
}

/// Who has a number.
#[derive(Debug)]
struct Holder {
    /// The process.
    pid: HostPid,
    prospect: Prospect,
    /// More about it, to follow its name.
    state: String,
}

/// Waiting with an end.
#[derive(Debug)]
pub(super) struct Waiting {
    begin: Instant,
}

impl Waiting {
    /// Begins.
    pub(super) fn begin() -> Self {
        Self { begin: Instant::now() }
    }

    /// Waits until there is no process or thread of a number.
    ///
    /// # Errors
    /// [`RestoreError::PidInUse`] if one stays.
    pub(super) fn until_free(&self, pid: HostPid) -> Result<()> {
        while process::exists(pid) {
            self.nap(pid)?;
        }
        Ok(())
    }

    /// Sleeps for a moment, if who has a number may be gone afterwards.
    ///
    /// # Errors
    /// [`RestoreError::PidInUse`] if it stays.
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

/// Returns who has a number: as its own, or as that of its session or group.
fn holder(pid: HostPid) -> Option<Holder> {
    if process::exists(pid) {
        // A thread has a directory, too, though it is not listed.
        let status = proc::status(pid).ok()?;
        return Some(of_process(status.tgid, ""));
    }
    let members = proc::pids().unwrap_or_default().into_iter().filter(|member| {
        proc::stat(*member).is_ok_and(|stat| stat.session == pid || stat.pgrp == pid)
    });
    let holders = members.map(|member| of_process(member, ", whose session or group it is"));
    // Whoever stays longest.
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
    // A leader is a zombie for as long as other threads end.
    if stat.state != 'Z' || threads.len() > 1 {
        return leaves(format!("{relation}, which is ending"));
    }
    let parent = stat.ppid;
    let state = format!(
        "{relation}, which is dead but was not yet waited for by its parent, process {parent} ({})",
        name(parent)
    );
    let prospect = if parent.0 == INIT { Prospect::Leaves } else { Prospect::Held };
    Holder { pid, prospect, state }
}
