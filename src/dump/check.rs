//! Checks whether a stopped tree can be dumped: everything that is visible from outside,
//! before the dump changes anything in it.

use std::cmp::Ordering;

use super::{Goal, Result};
use crate::{
    image::tree::{Arena, ArenaIds, Arenas, Births, Kin},
    inject::{Task, living},
    proc,
    res::{
        ResError, ns,
        task::{self, compare},
        thread::{self, Thread},
        tree as common,
    },
    sys::process::Shared,
    units::{HostPid, PidMap},
};

/// The number that images give to what belongs to this program.
const NUMBER_OF_OWN: u32 = 1;

/// The pid of the first process of a pid namespace.
const FIRST_PID: i32 = 1;

/// Checks that the dump can kill or stop the first process of this pid namespace, if it
/// must: the kernel blocks such signals from inside the namespace.
fn check_first(tasks: &[Task], goal: Goal) -> Result<()> {
    match tasks.iter().find(|task| task.pid.0 == FIRST_PID) {
        Some(first) if !goal.runs_on() => Err(ResError::Refused {
            pid: first.pid,
            what:
                "is the first process of this pid namespace, which no process inside can kill or stop"
                    .to_owned(),
            help: "dump it with --leave-running, and kill it from outside",
        }
        .into()),
        _ => Ok(()),
    }
}

/// Checks that a tree can be dumped, and returns the ids that the images give to what its
/// processes may share.
///
/// # Errors
/// [`ResError::Refused`] for the first problem.
pub(super) fn tree(
    tasks: &[Task],
    pids: &PidMap,
    goal: Goal,
    (options, (own, namespaces)): (&common::DumpOptions, (&ns::OfTree, &ns::Options)),
) -> Result<Vec<ArenaIds>> {
    check_first(tasks, goal)?;
    for task in living(tasks) {
        task::check(&task::Checked { task, memory_only: goal.is_pre_dump() })?;
        for thread in &task.threads {
            let of = Thread { pid: task.pid, witness: task.witness(), tid: thread.tid };
            thread::check(of, thread)?;
        }
    }
    own.check(tasks, pids.ids(), namespaces)?;
    common::check(tasks, options)?;
    let ids = arenas(tasks)?;
    check_births(tasks, pids, &ids)?;
    Ok(ids)
}

/// Numbers what the processes of a tree may share, from 2 on: 1 stands for what belongs to
/// this program. Zombies have nothing.
fn arenas(tasks: &[Task]) -> Result<Vec<ArenaIds>> {
    let mut next = NUMBER_OF_OWN;
    // The first owner of each, in the order of kcmp(2).
    let mut known: [Vec<(HostPid, u32)>; 4] = Default::default();
    let mut found = Vec::with_capacity(tasks.len());
    for task in tasks {
        let mut ids = ArenaIds::default();
        if task.is_zombie() {
            found.push(ids);
            continue;
        }
        next += 1;
        let witness = task.witness();
        for (arena, known) in Arena::ALL.into_iter().zip(&mut known) {
            let kind = match arena {
                Arena::Memory => Shared::Memory,
                Arena::Files => Shared::Files,
                Arena::Fs => Shared::Fs,
                Arena::Handlers => Shared::Handlers,
            };
            let mut failure = None;
            let place = known.binary_search_by(|(other, _)| {
                compare(*other, witness, kind).unwrap_or_else(|error| {
                    failure = Some(error);
                    Ordering::Less
                })
            });
            if let Some(error) = failure {
                return Err(error.into());
            }
            let id = match place {
                Ok(place) => known[place].1,
                Err(place) => {
                    known.insert(place, (witness, next));
                    next
                }
            };
            ids.set(arena, id);
        }
        found.push(ids);
    }
    Ok(found)
}

/// Checks that a restore can make the processes with everything that they share.
fn check_births(tasks: &[Task], pids: &PidMap, ids: &[ArenaIds]) -> Result<()> {
    if !Arenas::new(ids.to_vec()).any_shared() {
        return Ok(());
    }
    let position = |pid| tasks.iter().position(|task| task.pid == pid);
    let mut kin = Vec::with_capacity(tasks.len());
    let space = |task: &Task| {
        // That of a dead process does not matter: nothing is shared with it.
        proc::thread_namespace(task.pid, task.witness(), "pid").unwrap_or(0)
    };
    for (task, ids) in tasks.iter().zip(ids) {
        kin.push(Kin {
            pid: pids.ns(task.pid),
            parent: if kin.is_empty() { None } else { position(task.parent) },
            session: pids.ns(proc::stat(task.pid)?.session),
            ids: *ids,
            space: space(task),
        });
    }
    Births::plan(&kin, true, false).map_err(|(pid, problem)| ResError::Refused {
        pid: pids.host(pid),
        what: format!("could not be restored: {problem}"),
        help: "dump the tree when one of these processes has ended",
    })?;
    Ok(())
}
