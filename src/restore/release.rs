//! The last phase of a restore: dead processes end, parents learn of stopped children, and
//! the processes are released.

use nix::libc;

use super::{
    Result,
    plan::TaskPlan,
    tracees::{await_state, end, kill, signal},
    tree::Puppets,
};
use crate::{
    image::tree::{Arena, Maker},
    inject::{Script, await_end, await_ends},
    proc,
    res::{task::STOPPED, thread, tree::Child},
    step::StepError,
    sys::ptrace,
    units::{HostPid, PidMap},
};

impl Puppets<'_> {
    /// Ends the helpers and the processes that are dead in the images, and removes the
    /// traces of their ends. All signals still have their default actions: a parent that
    /// ignored the deaths of its children would get no zombies.
    ///
    /// # Errors
    /// [`StepError::Inject`].
    pub(super) fn end_the_dead(&mut self) -> Result<()> {
        let scratch = self.scratch;
        // A process that is to be dead may have made a helper, and has to wait for it.
        let helpers = std::mem::take(&mut self.helpers);
        for helper in &helpers {
            let pid = self.plan.host(helper.pid);
            kill(pid)?;
            await_end(pid)?;
            match helper.maker {
                Maker::Task(position) => {
                    let maker = self.plan.tasks[position].pid;
                    let number = thread::local(helper.pid, maker, &self.plan.pids)?;
                    let mut script = Script::new();
                    let arguments = [number.into(), 0.into(), libc::__WALL.into(), 0.into()];
                    script.call("reap a helper", libc::SYS_wait4, &arguments);
                    let puppet = self.tasks[position].as_mut().expect("all were made");
                    scratch.run(&mut puppet.threads[0], &script)?;
                }
                // A child of this program is reaped when it is waited for.
                Maker::Director | Maker::Helper(_) => {}
            }
        }
        for (task, puppet) in self.plan.tasks.iter().zip(&mut self.tasks) {
            if task.body.is_some() {
                continue;
            }
            let Some(puppet) = puppet else { continue };
            let leader = &mut puppet.threads[0];
            let core = task.core().tc.as_ref();
            let status = core.map_or(0, |core| core.exit_code);
            let mut script = Script::new();
            if let Some(core) = core {
                let mut name = core.comm.clone();
                name.push(0);
                let name = script.bytes(&name);
                let arguments = [libc::PR_SET_NAME.into(), name.into()];
                script.call("set the name", libc::SYS_prctl, &arguments);
                // This death must not leave a core file.
                let arguments = [libc::PR_SET_DUMPABLE.into(), 0.into()];
                script.call("forbid core files", libc::SYS_prctl, &arguments);
            }
            scratch.run(leader, &script)?;
            end(&scratch, leader, status)?;
        }
        self.forget_deaths()
    }

    /// Removes the signals that told processes of deaths.
    fn forget_deaths(&mut self) -> Result<()> {
        let scratch = self.scratch;
        for (task, puppet) in self.plan.tasks.iter().zip(&mut self.tasks) {
            let (Some(_), Some(puppet)) = (&task.body, puppet) else { continue };
            let dead = self.plan.tasks.iter().filter(|dead| {
                let parent = dead.parent.map(|parent| self.plan.tasks[parent].pid);
                dead.body.is_none() && parent == Some(task.pid)
            });
            let dead: Vec<_> = dead.map(|dead| child_of(dead, task, &self.plan.pids)).collect();
            let mut script = Script::new();
            self.plan.common.iter().for_each(|kind| kind.children_ended(&dead, &mut script));
            scratch.run(&mut puppet.threads[0], &script)?;
        }
        Ok(())
    }

    /// Whether a task stays stopped.
    fn stays_stopped(&self, task: &TaskPlan) -> bool {
        task.body.is_some() && (self.leave_stopped || task.state() == STOPPED)
    }

    /// Whether children of a task must be stopped before it runs.
    pub(super) fn awaits_stops(&self, position: usize) -> bool {
        let mut tasks = self.plan.tasks.iter();
        tasks.any(|task| task.parent == Some(position) && self.stays_stopped(task))
    }

    /// Unmaps the scratch memory of a task, unless another task shares the memory and still
    /// needs it, and gives the task's threads their registers.
    ///
    /// # Errors
    /// [`StepError::Inject`], [`StepError::State`].
    pub(super) fn set_resume_state(&mut self, position: usize) -> Result<()> {
        // The last sharer that needs the scratch memory unmaps it.
        let mut sharers = self.plan.arenas.sharers(Arena::Memory, position);
        let is_needed = sharers.any(|other| {
            other != position && self.tasks[other].as_ref().is_some_and(|other| !other.is_dressed)
        });
        let puppet = self.tasks[position].as_mut().expect("it lives");
        if !is_needed {
            self.scratch.unmap(&mut puppet.threads[0])?;
        }
        puppet.is_dressed = true;
        for of in &self.plan.tasks[position].threads {
            let tid = self.plan.host(of.tid);
            if puppet.threads.iter().any(|thread| thread.tid == tid) {
                thread::set_resume_state(&of.core, of.tid, tid)?;
            }
        }
        Ok(())
    }

    /// Ends the first thread of a task whose other threads live. The tracer detaches from
    /// it first: the kernel reports the end of a traced thread only to its tracer.
    ///
    /// # Errors
    /// [`StepError::Inject`], [`StepError::Process`].
    pub(super) fn end_leader(&mut self, position: usize, script: &Script) -> Result<()> {
        let puppet = self.tasks[position].as_mut().expect("it lives");
        let leader = puppet.threads.remove(0);
        let pid = leader.tid;
        self.scratch.let_go(leader, script)?;
        await_state(pid, |state| matches!(state, 'Z' | 'X'));
        Ok(())
    }

    /// Lets a task see which of its children have stopped.
    fn tell_of_stops(&mut self, position: usize) -> Result<()> {
        let plan = self.plan;
        let task = &plan.tasks[position];
        let children = plan.tasks.iter().filter(|child| child.parent == Some(position));
        let stopped = children.filter(|child| self.stays_stopped(child));
        let stopped: Vec<_> = stopped.map(|child| child_of(child, task, &plan.pids)).collect();
        let mut script = Script::new();
        for kind in &plan.common {
            kind.children_stopped(task.core(), &stopped, &mut script);
        }
        let puppet = self.tasks[position].as_mut().expect("it lives");
        self.scratch.run(&mut puppet.threads[0], &script)?;
        Ok(())
    }

    /// Releases all processes: children before their parents, and first those that stay
    /// stopped, so that their parents find them stopped.
    ///
    /// # Errors
    /// [`StepError::Process`]; processes that were released by then run on.
    pub(super) fn release(mut self) -> Result<()> {
        self.released = true;
        let plan = self.plan;
        let mut go_on = Vec::new();
        for (position, task) in plan.tasks.iter().enumerate().rev() {
            if task.body.is_none() || self.tasks[position].is_none() {
                continue;
            }
            if self.awaits_stops(position) {
                self.tell_of_stops(position)?;
                self.set_resume_state(position)?;
            }
            if self.stays_stopped(task) {
                signal(plan.host(task.pid), libc::SIGSTOP)?;
                self.let_go(position)?;
                let witness = self.tasks[position].as_ref().expect("it lives").threads[0].tid;
                await_state(witness, |state| matches!(state, 'T' | 'Z' | 'X'));
            } else {
                go_on.push(position);
            }
        }
        plan.common.iter().for_each(|kind| kind.about_to_run());
        go_on.into_iter().try_for_each(|position| self.let_go(position))
    }

    fn let_go(&self, position: usize) -> Result<()> {
        for thread in self.tasks[position].iter().flat_map(|puppet| &puppet.threads) {
            ptrace::detach(thread.tid, 0).map_err(|source| StepError::Process {
                pid: thread.tid,
                step: "let go of",
                source,
            })?;
        }
        Ok(())
    }
}

/// Returns what the kinds of the tree need of a child.
fn child_of<'a>(task: &'a TaskPlan, parent: &TaskPlan, pids: &PidMap) -> Child<'a> {
    Child { number: pids.local(task.pid, parent.pid), core: task.core() }
}

impl Drop for Puppets<'_> {
    /// Kills all processes, unless they were released.
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let host = |pid| self.plan.host(pid);
        let mut pids: Vec<HostPid> = self.helpers.iter().map(|helper| host(helper.pid)).collect();
        pids.extend(self.makers.first());
        for (task, puppet) in self.plan.tasks.iter().zip(&self.tasks) {
            if puppet.is_some() {
                pids.push(host(task.pid));
            }
        }
        for pid in &pids {
            let _ = signal(*pid, libc::SIGKILL);
        }
        // The kernel reports the end of a leader only after all of its threads are gone, for which
        // this program has to wait.
        let threads = pids.iter().flat_map(|pid| proc::threads(*pid).unwrap_or_default());
        let all: Vec<HostPid> = threads.chain(pids.iter().copied()).collect();
        let _ = await_ends(all);
        // Processes whose parents have died with them are now children of this program, a
        // subreaper.
        let _ = await_ends(pids);
    }
}
