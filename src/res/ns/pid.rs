//! Pid namespaces: one of the tree's own, whose first process is the root of the tree.
//!
//! The namespace has no state but the numbers of its processes, which are those in all images.

use std::collections::BTreeSet;

use nix::libc;

use super::{Dumped, Namespace, Options, Restoring};
use crate::{
    image::ImageStore,
    inject::Task,
    proc,
    res::{ResError, Result},
    units::{HostPid, NsPid, PidMap},
};

/// The first process of a pid namespace.
const FIRST: i32 = 1;

#[derive(Debug)]
pub(super) struct Pid;

impl Namespace for Pid {
    fn clone_flag(&self) -> u64 {
        u64::from(libc::CLONE_NEWPID.cast_unsigned())
    }

    fn check(&self, of: &Dumped<'_>) -> Result<()> {
        let tasks = of.tasks;
        let Some(root) = tasks.first() else { return Ok(()) };
        let numbers = proc::status(root.pid)?.ns_pid;
        if numbers.last() != Some(&FIRST) {
            let first = first_of(root.witness())
                .map_or_else(String::new, |first| format!(" (here it is {first})"));
            return Err(ResError::Refused {
                pid: root.pid,
                what: format!(
                    "is not the first process of its pid namespace, and the namespace is not that of \
                     rcriu{first}"
                ),
                help: "dump the first process with all others, or run rcriu in that pid namespace: nsenter \
                       -t PID -p",
            });
        }
        check_all_in_tree(tasks, root.witness())
    }

    fn restore(&self, _: &dyn ImageStore, _: u32, _: &Options) -> Result<Box<dyn Restoring>> {
        Ok(Box::new(Numbers))
    }
}

/// A pid namespace to be restored: it is there with its first process.
#[derive(Debug)]
struct Numbers;

impl Restoring for Numbers {}

/// Returns all processes in the pid namespace of a process.
fn members(of: HostPid) -> Result<Vec<HostPid>> {
    let wanted = proc::namespace(of, "pid")?;
    let is_member = |pid: &HostPid| proc::namespace(*pid, "pid").is_ok_and(|found| found == wanted);
    Ok(proc::pids()?.into_iter().filter(is_member).collect())
}

/// Returns the first process of the pid namespace of a process, if it is visible.
fn first_of(of: HostPid) -> Option<HostPid> {
    let is_first =
        |pid: &HostPid| proc::status(*pid).is_ok_and(|status| status.ns_pid.last() == Some(&FIRST));
    members(of).ok()?.into_iter().find(is_first)
}

/// Checks that all processes in the namespace belong to the tree: the others would be lost with it,
/// and could not be restored.
fn check_all_in_tree(tasks: &[Task], witness: HostPid) -> Result<()> {
    let tree: BTreeSet<HostPid> = tasks.iter().map(|task| task.pid).collect();
    let Some(other) = members(witness)?.into_iter().find(|pid| !tree.contains(pid)) else {
        return Ok(());
    };
    let name = proc::comm(other, other).unwrap_or_default();
    Err(ResError::Refused {
        pid: other,
        what: format!(
            "({}) is in the pid namespace of the tree, but its parent is outside of it, so it would \
             not be dumped",
            String::from_utf8_lossy(&name)
        ),
        help: "it came by nsenter(1), `runc exec` or the like: end it, or wait for its end",
    })
}

/// Returns the map of the pids of a stopped tree: those of its processes and threads, and of groups
/// and sessions whose leaders have ended.
pub(super) fn map(tasks: &[Task]) -> Result<PidMap> {
    let root = tasks.first().filter(|root| proc::is_in_other_namespace(root.witness(), "pid"));
    let Some(root) = root else { return Ok(PidMap::of_own_namespace()) };
    let pids = PidMap::of_other_namespace();
    // Processes may be in namespaces below that of the root, which are refused later.
    let level = proc::status(root.pid)?.ns_pid.len().saturating_sub(1);
    let learn = |numbers: &[i32], here: HostPid| {
        if let Some(number) = numbers.get(level).filter(|number| **number > 0) {
            pids.learn(NsPid::of_image(*number), here);
        }
    };
    for task in tasks {
        let status = proc::status(task.pid)?;
        let stat = proc::stat(task.pid)?;
        learn(&status.ns_pgid, stat.pgrp);
        learn(&status.ns_sid, stat.session);
        learn(&status.ns_pid, task.pid);
        for thread in &task.threads {
            learn(&thread.status()?.ns_pid, thread.tid);
        }
    }
    Ok(pids)
}
