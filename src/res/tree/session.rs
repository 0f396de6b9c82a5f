//! Sessions and process groups whose leaders are outside the tree.

use std::collections::BTreeSet;

use crate::{
    inject::Task,
    proc,
    res::{ResError, Result},
    sys::process,
    units::HostPid,
};

/// The user's options.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    shell_job: bool,
}

impl Options {
    /// `shell_job`: they are allowed (`--shell-job`).
    pub fn new(shell_job: bool) -> Self {
        Self { shell_job }
    }
}

/// Refuses processes in sessions and process groups of other processes, unless the user allows it.
///
/// # Errors
/// [`ResError::Refused`], or the errors of reading `/proc`.
pub(super) fn check(tasks: &[Task], options: Options) -> Result<()> {
    if options.shell_job {
        return Ok(());
    }
    let members: BTreeSet<HostPid> = tasks.iter().map(|task| task.pid).collect();
    for task in tasks {
        let stat = proc::stat(task.pid)?;
        for (kind, leader) in [("session", stat.session), ("process group", stat.pgrp)] {
            let refused = |what, help| Err(ResError::Refused { pid: task.pid, what, help });
            // The kernel reports leaders outside of this pid namespace as 0.
            if leader.0 == 0 {
                return refused(
                    format!("is in a {kind} whose leader is outside of this pid namespace"),
                    "start the tree with setsid(1), dump it from a namespace that sees the leader, or \
                     use --shell-job",
                );
            }
            // The leader may have exited, but must not be outside the tree.
            if !members.contains(&leader) && process::exists(leader) {
                return refused(
                    format!("is in the {kind} of process {leader}, which is not in the tree"),
                    "dump that process, start the tree with setsid(1), or use --shell-job",
                );
            }
        }
    }
    Ok(())
}
