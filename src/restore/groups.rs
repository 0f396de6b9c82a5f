//! Process groups during a restore.

use std::collections::HashMap;

use nix::libc;

use super::{
    RestoreError, Result,
    pids::Waiting,
    plan::TaskPlan,
    tree::{Puppet, Puppets},
};
use crate::{
    image::tree::Maker,
    inject::{Script, Tracee},
    proc,
};

impl Puppets<'_> {
    /// Puts all processes into their process groups.
    pub(super) fn set_groups(&mut self, shell_job: bool) -> Result<()> {
        let plan = self.plan;
        for (position, task) in plan.tasks.iter().enumerate() {
            if task.group == task.pid {
                self.with_puppet(position, |all, puppet| {
                    all.begin_group(task, &mut puppet.threads[0])
                })?;
            }
        }
        let mut made = HashMap::new();
        for (position, task) in plan.tasks.iter().enumerate() {
            if task.group == task.pid {
                continue;
            }
            let outside = plan.is_outside(task.group);
            let has_helper = self.helpers.iter().any(|helper| helper.pid == task.group);
            if outside && shell_job && task.group == plan.tasks[0].group {
                continue; // that of this program, which all inherit
            }
            self.with_puppet(position, |all, puppet| {
                let member = &mut puppet.threads[0];
                if outside && !has_helper && !made.contains_key(&task.group) {
                    Waiting::begin().until_free(plan.host(task.group))?;
                    let mut helper = all.fork_helper(member, task.group, position)?;
                    let mut script = Script::new();
                    script.call("lead a process group", libc::SYS_setpgid, &[0.into(), 0.into()]);
                    all.scratch.run(&mut helper, &script)?;
                    made.insert(task.group, position);
                }
                all.join_group(task, member)
            })?;
        }
        Ok(())
    }

    /// Calls `act` with the puppet at a position, which must have been made.
    fn with_puppet(
        &mut self,
        position: usize,
        act: impl FnOnce(&mut Self, &mut Puppet) -> Result<()>,
    ) -> Result<()> {
        let mut puppet = self.tasks[position].take().expect("all were made");
        let result = act(self, &mut puppet);
        self.tasks[position] = Some(puppet);
        result
    }

    /// Puts the maker of a child into its process group, if the child is in that group as well but cannot join
    /// it: the child is the first process of a pid namespace in which the group has no number.
    pub(super) fn join_group_of_child(
        &mut self,
        maker: Maker,
        child: &TaskPlan,
        by: &mut Tracee,
    ) -> Result<()> {
        let Maker::Task(position) = maker else { return Ok(()) };
        let plan = self.plan;
        let task = &plan.tasks[position];
        if child.group != task.group || plan.pids.local(child.group, child.pid).is_some() {
            return Ok(());
        }
        let leader = plan.tasks.iter().position(|other| other.pid == task.group);
        let Some(leader) = leader.filter(|leader| *leader != position) else {
            // Its own, or that of the restorer.
            return if task.group == task.pid { self.begin_group(task, by) } else { Ok(()) };
        };
        if let Some(mut puppet) = self.tasks[leader].take() {
            let begun = self.begin_group(&plan.tasks[leader], &mut puppet.threads[0]);
            self.tasks[leader] = Some(puppet);
            begun?;
            self.join_group(task, by)?;
        }
        Ok(())
    }

    /// Makes a process the leader of its process group.
    fn begin_group(&self, task: &TaskPlan, by: &mut Tracee) -> Result<()> {
        // The leader of a session leads a group already.
        if task.session == task.pid { Ok(()) } else { self.join_group(task, by) }
    }

    /// Puts a process into its process group, which exists unless the process leads it. The first process of
    /// a pid namespace may have inherited one that has no number there.
    fn join_group(&self, task: &TaskPlan, by: &mut Tracee) -> Result<()> {
        let group = task.group;
        let Some(number) = self.plan.pids.local(group, task.pid) else {
            let inherited = proc::stat(by.tid)?.pgrp;
            if inherited == self.plan.host(group) {
                return Ok(());
            }
            let problem = format!(
                "its process group {group} is led by a process outside of its pid namespace, and the process \
                 that makes it could not be in that group first"
            );
            return Err(RestoreError::Relation { pid: task.pid, problem });
        };
        let mut script = Script::new();
        let what = format!("join process group {group}");
        script.call(what, libc::SYS_setpgid, &[0.into(), number.into()]);
        Ok(self.scratch.run(by, &script).map(drop)?)
    }
}
