//! Pid namespaces: one of the tree's own, whose first process is the root of the tree, and others below.
//!
//! A pid namespace has no state but the numbers of its processes. All images have the numbers in the
//! namespace of the root. Those of the namespaces below are in `pstree.img`, as an extension
//! ([`crate::image::tree::below`]). Such a namespace comes into being with its first process, which the
//! maker of that process makes so ([`crate::restore`]), and all other processes in it are made inside.

use std::collections::{BTreeSet, HashMap};

use nix::libc;

use super::{Dumped, Member, Namespace, Options, Restoring};
use crate::{
    image::ImageStore,
    inject::{Task, living},
    proc,
    res::{ResError, Result},
    units::{Below, HostPid, NsPid, PidMap},
};

/// Its name in `/proc/PID/ns`.
pub(super) const FILE: &str = "pid";

/// The first process of a pid namespace.
const FIRST: i32 = 1;

#[derive(Debug)]
pub(super) struct Pid;

impl Namespace for Pid {
    fn clone_flag(&self) -> u64 {
        u64::from(libc::CLONE_NEWPID.cast_unsigned())
    }

    fn begins_with_process(&self) -> bool {
        true
    }

    fn check_all(&self, all: &[Dumped<'_>]) -> Result<()> {
        let (own, below): (Vec<_>, Vec<_>) = all.iter().partition(|of| of.is_first);
        own.into_iter().try_for_each(|of| self.check(of))?;
        below.iter().try_for_each(|of| check_all_in_tree(of.tasks, of.pid))?;
        below.first().map_or(Ok(()), |of| check_parents(of.tasks))
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

    /// Those below come into being with their first processes.
    fn restore_all(
        &self,
        images: &dyn ImageStore,
        home: &Member,
        members: &[Member],
        options: &Options,
    ) -> Result<Vec<(Member, Box<dyn Restoring>)>> {
        let own = members.iter().find(|member| member.number == home.number);
        let own = own.map(|own| Ok((own.clone(), self.restore(images, own.number, options)?)));
        own.into_iter().collect()
    }
}

/// A pid namespace to be restored: it is there with its first process.
#[derive(Debug)]
struct Numbers;

impl Restoring for Numbers {}

/// Returns all processes in the pid namespace of a process.
fn members(of: HostPid) -> Result<Vec<HostPid>> {
    let wanted = proc::namespace(of, FILE)?;
    let is_member = |pid: &HostPid| proc::namespace(*pid, FILE).is_ok_and(|found| found == wanted);
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

/// Refuses a process in another pid namespace than its parent that is not the first one there: a restore
/// makes each process in the namespace of its parent, or as the first one of a new namespace.
fn check_parents(tasks: &[Task]) -> Result<()> {
    let mut inodes = HashMap::new();
    for task in living(tasks) {
        let own = namespace_of(task)?;
        inodes.insert(task.pid, own);
        let Some(of_parent) = inodes.get(&task.parent).filter(|of_parent| **of_parent != own)
        else {
            continue;
        };
        let parent = proc::status(task.parent)?.ns_pid.len();
        let numbers = proc::status(task.pid)?.ns_pid;
        if numbers.last() != Some(&FIRST) || numbers.len() != parent + 1 {
            return Err(ResError::Refused {
                pid: task.pid,
                what: format!(
                    "is in the pid namespace pid:[{own}], its parent {} is in pid:[{of_parent}], and it is \
                     not the first process of a namespace directly below that",
                    task.parent
                ),
                help: "it came by nsenter(1), `docker exec` or the like: end it, or wait for its end",
            });
        }
    }
    Ok(())
}

fn namespace_of(task: &Task) -> Result<u64> {
    Ok(proc::thread_namespace(task.pid, task.witness(), FILE)?)
}

/// Returns the map of the pids of a stopped tree: those of its processes and threads, and of groups
/// and sessions whose leaders have ended.
pub(super) fn map(tasks: &[Task]) -> Result<PidMap> {
    let Some(root) = tasks.first() else { return Ok(PidMap::of_own_namespace()) };
    let pids = if proc::is_in_other_namespace(root.witness(), FILE) {
        PidMap::of_other_namespace()
    } else {
        PidMap::of_own_namespace()
    };
    let level = proc::status(root.pid)?.ns_pid.len().saturating_sub(1);
    let learn = |numbers: &[i32], here: HostPid| {
        if let Some(number) = numbers.get(level).filter(|number| **number > 0) {
            pids.learn(NsPid::of_image(*number), here);
        }
    };
    let mut paths: HashMap<HostPid, Vec<u64>> = HashMap::new();
    let mut below = Below::default();
    for task in tasks {
        let status = proc::status(task.pid)?;
        let stat = proc::stat(task.pid)?;
        learn(&status.ns_pgid, stat.pgrp);
        learn(&status.ns_sid, stat.session);
        learn(&status.ns_pid, task.pid);
        // That of a dead process has no file any more.
        let own = if task.is_zombie() { None } else { Some(namespace_of(task)?) };
        let path = path(paths.get(&task.parent), own);
        let mut add = |numbers: &[i32], here: HostPid| {
            let inner = path.iter().skip(1).copied().zip(numbers.iter().skip(level + 1).copied());
            let inner: Vec<_> = inner.take_while(|(_, number)| *number > 0).collect();
            if !inner.is_empty() {
                below.add(pids.ns(here), inner);
            }
        };
        add(&status.ns_pgid, stat.pgrp);
        add(&status.ns_sid, stat.session);
        add(&status.ns_pid, task.pid);
        for thread in &task.threads {
            let numbers = &thread.status()?.ns_pid;
            learn(numbers, thread.tid);
            add(numbers, thread.tid);
        }
        paths.insert(task.pid, path);
    }
    Ok(pids.with_below(below))
}

/// Returns the namespaces in which a process is, that of the root of the tree first. `above` are those of its
/// parent, `own` is the innermost one.
fn path(above: Option<&Vec<u64>>, own: Option<u64>) -> Vec<u64> {
    let mut path = above.cloned().unwrap_or_default();
    path.extend(own.filter(|own| path.last() != Some(own)));
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_in_the_namespaces_of_its_parent_and_perhaps_in_one_more() {
        assert_eq!(path(None, Some(1)), [1]);
        assert_eq!(path(Some(&vec![1]), Some(1)), [1]);
        assert_eq!(path(Some(&vec![1]), Some(2)), [1, 2]);
        assert_eq!(path(Some(&vec![1, 2]), None), [1, 2]);
    }
}
