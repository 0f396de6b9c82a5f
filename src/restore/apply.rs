//! Turns the new processes into those of the images: the phases, and in each phase all
//! kinds of state.

use super::{
    Result, memory,
    plan::{Body, Plan, TaskPlan, ThreadPlan},
    tree::Puppets,
};
use crate::{
    fault::{self, Point},
    image::tree::Arena,
    inject::{Answers, InjectError, Script},
    res::{
        calls::{Calls, OfRestorer},
        file::Installer,
        task, thread,
    },
};

/// Returns the live processes, with their positions in the plan.
fn living(plan: &Plan) -> impl Iterator<Item = (usize, &TaskPlan, &Body)> {
    let all = plan.tasks.iter().enumerate();
    all.filter_map(|(position, planned)| Some((position, planned, planned.body.as_ref()?)))
}

/// Returns what the kinds of state learn about a process.
fn process<'a>(plan: &'a Plan, position: usize, own: &'a OfRestorer) -> task::Restored<'a> {
    let planned = &plan.tasks[position];
    let body = planned.body.as_ref().expect("what has ended has no state");
    task::Restored {
        pid: planned.pid,
        host: plan.host(planned.pid),
        core: planned.core(),
        mm: &body.mm,
        fs: &body.fs,
        arenas: (&plan.arenas, position),
        own,
        pids: &plan.pids,
    }
}

/// Returns what the kinds of state learn about a thread.
fn thread_of<'a>(
    plan: &'a Plan,
    planned: &TaskPlan,
    of: &'a ThreadPlan,
    own: &'a OfRestorer,
) -> thread::Restored<'a> {
    let session_in_tree = !plan.is_outside(planned.session);
    thread::Restored {
        pid: planned.pid,
        tid: of.tid,
        host_pid: plan.host(planned.pid),
        host_tid: plan.host(of.tid),
        core: &of.core,
        session_in_tree,
        parent_exits: planned.parent.is_none() && plan.parent_exits,
        own,
        pids: &plan.pids,
    }
}

/// Gives all processes their files, threads and attributes.
///
/// # Errors
/// The first failure.
pub(super) fn all(
    plan: &Plan,
    puppets: &mut Puppets,
    files: &mut Installer<'_>,
    own: &OfRestorer,
) -> Result<()> {
    for (owner, planned, body) in living(plan) {
        if !plan.arenas.owns(Arena::Files, owner) {
            continue;
        }
        // Descriptors that do not belong in a shared table are closed for all its sharers.
        let sharers = plan.arenas.sharers(Arena::Files, owner);
        for position in sharers.filter(|position| *position != owner) {
            let script = prepare(plan, position, files, own)?;
            run(puppets, position, 0, &script)?;
        }
        let mut script = prepare(plan, owner, files, own)?;
        files.install(planned.pid, &body.fds, &mut script)?;
        run(puppets, owner, 0, &script)?;
    }
    fault::hit(Point::RestoreFiles)?;
    for (position, ..) in living(plan) {
        puppets.make_threads(position)?;
    }
    files.open_deferred()?;
    for (position, planned, body) in living(plan) {
        let mut script = Script::new();
        let of = process(plan, position, own);
        task::KINDS.iter().try_for_each(|kind| kind.place_deferred(&of, files, &mut script))?;
        if plan.arenas.owns(Arena::Files, position) {
            files.install_deferred(planned.pid, &body.fds, &mut script)?;
        }
        if !script.is_empty() {
            run(puppets, position, 0, &script)?;
        }
    }
    for (position, ..) in living(plan).filter(|(at, ..)| plan.arenas.owns(Arena::Files, *at)) {
        let mut script = Script::new();
        files.forget_director(&mut script);
        if !script.is_empty() {
            run(puppets, position, 0, &script)?;
        }
    }
    for (position, planned, body) in living(plan) {
        let puppet = puppets.tasks[position].as_mut().expect("it lives");
        let layout = std::mem::take(&mut puppet.layout);
        for (number, of) in planned.threads.iter().enumerate() {
            let mut make = |script: &Script| run(puppets, position, number, script);
            let mut calls = Calls::new(&mut make);
            if number == 0 {
                let of = process(plan, position, own);
                task::KINDS.iter().try_for_each(|kind| kind.set(&of, &mut calls))?;
                // Before an attribute can forbid it.
                if plan.arenas.owns(Arena::Memory, position) {
                    memory::finish(body, &layout, &mut calls.script);
                }
            }
            let of = thread_of(plan, planned, of, own);
            thread::KINDS.iter().try_for_each(|kind| kind.set(&of, &mut calls))?;
            plan.common.iter().try_for_each(|kind| kind.set(&of, &mut calls))?;
            calls.flush()?;
        }
    }
    fault::hit(Point::RestoreThreads)?;
    puppets.end_the_dead()?;
    for (position, planned, _) in living(plan) {
        for script in files.take(planned.pid)? {
            run(puppets, position, 0, &script)?;
        }
    }
    files.after_take()?;
    for (position, planned, body) in living(plan) {
        let process = process(plan, position, own);
        // The leader comes last: a change of credentials in another thread would reset what
        // it sets.
        for (number, of) in planned.threads.iter().enumerate().rev() {
            let mut script = Script::new();
            if number == 0 {
                task::KINDS.iter().for_each(|kind| kind.before_credentials(&process, &mut script));
            }
            let of = thread_of(plan, planned, of, own);
            thread::KINDS.iter().for_each(|kind| kind.set_credentials(&of, &mut script));
            if number == 0 {
                task::KINDS.iter().for_each(|kind| kind.after_credentials(&process, &mut script));
                files.own(planned.pid, &body.fds, &mut script);
            }
            run(puppets, position, number, &script)?;
        }
    }
    own.differences.borrow().tell();
    Ok(())
}

/// Returns the calls of a process that need the descriptors of this program, which it still
/// has. Processes that share a directory all enter the same one.
fn prepare(
    plan: &Plan,
    position: usize,
    files: &mut Installer<'_>,
    own: &OfRestorer,
) -> Result<Script> {
    let mut script = Script::new();
    let of = process(plan, position, own);
    task::KINDS.iter().try_for_each(|kind| kind.place(&of, files, &mut script))?;
    files.prepare(of.pid, &mut script)?;
    Ok(script)
}

/// Gives all threads their registers and pending signals. After this they can only be
/// released.
///
/// # Errors
/// The first failure.
pub(super) fn finish(
    plan: &Plan,
    puppets: &mut Puppets,
    files: &mut Installer<'_>,
    own: &OfRestorer,
) -> Result<()> {
    for (position, planned, _) in living(plan) {
        for (number, of) in planned.threads.iter().enumerate() {
            let mut script = Script::new();
            let of = thread_of(plan, planned, of, own);
            thread::KINDS.iter().try_for_each(|kind| kind.last_calls(&of, &mut script))?;
            if number == 0 {
                let of = process(plan, position, own);
                task::KINDS.iter().try_for_each(|kind| kind.last_calls(&of, &mut script))?;
            }
            if !script.is_empty() {
                let scratch = puppets.scratch;
                let puppet = puppets.tasks[position].as_mut().expect("it lives");
                // From here on signals are pending, maybe those of traps.
                scratch.run_without_traps(&mut puppet.threads[number], &script)?;
            }
        }
        // Parents come before their children, which therefore do not notice this end.
        let mut script = Script::new();
        let of = process(plan, position, own);
        task::KINDS.iter().for_each(|kind| kind.end(&of, &mut script));
        if !script.is_empty() {
            puppets.end_leader(position, &script)?;
        }
    }
    files.start()?;
    fault::hit(Point::RestoreLast)?;
    for (position, ..) in living(plan) {
        // A process whose children stop waits for them first.
        if !puppets.awaits_stops(position) {
            puppets.set_resume_state(position)?;
        }
    }
    Ok(files.position_deferred()?)
}

fn run(
    puppets: &mut Puppets,
    position: usize,
    number: usize,
    script: &Script,
) -> Result<Answers, InjectError> {
    let scratch = puppets.scratch;
    let puppet = puppets.tasks[position].as_mut().expect("it lives");
    scratch.run(&mut puppet.threads[number], script)
}
