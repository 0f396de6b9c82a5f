//! Mounts of proc file systems that show a pid namespace below that of the tree, and what is on them.
//!
//! Only a process in a pid namespace can mount its proc file system, and a pid namespace comes into being
//! with its first process, which the restore makes when the mount namespaces are complete. So that process
//! makes these mounts, before anything else happens in it.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use nix::libc;

use super::{
    below, calls,
    plan::{Mount, Plan, Source},
    restore::parameters,
};
use crate::{
    inject::{Arg, CallId, Script},
    res::{Result, ns::wrong},
    sys::mounts::{MountAttributes, attribute},
};

/// A mount to be made by the first process of a pid namespace, which has the descriptors that rcriu had
/// when it built the mount namespaces.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Its position in the plan.
    at: usize,
    /// The pid namespace, by its number.
    pid_space: u64,
    /// The mount, if it could be made already.
    made: Option<OwnedFd>,
    /// Its mount point, if that is there already.
    point: Option<OwnedFd>,
}

/// The mounts of one mount namespace to be made by the first process of a pid namespace, which is in that mount
/// namespace meanwhile.
#[derive(Debug)]
pub struct Later<'a> {
    plan: &'a Plan,
    mounts: Vec<&'a Waiting>,
}

impl Plan {
    /// Returns the pid namespace whose first process makes a mount, if it is one that waits.
    pub(super) fn waits_for(&self, at: usize) -> Option<u64> {
        let mut at = Some(at);
        while let Some(mount) = at.map(|at| &self.mounts[at]) {
            if let Some(space) = self.shows(mount) {
                return Some(space);
            }
            at = mount.parent;
        }
        None
    }

    /// Returns the pid namespace below that of the tree that a mount shows.
    pub(super) fn shows(&self, mount: &Mount) -> Option<u64> {
        let own = mount.entry.rcriu_pid_ns;
        let bound = match &mount.source {
            Source::Bind(from, _) => self.mounts[*from].entry.rcriu_pid_ns,
            _ => None,
        };
        own.or(bound).map(u64::from)
    }

    /// Keeps a mount for later, with its mount point if that is there.
    pub(super) fn keep(&mut self, at: usize, made: Option<OwnedFd>, point: Option<OwnedFd>) {
        if let Some(pid_space) = self.waits_for(at) {
            self.waiting.push(Waiting { at, pid_space, made, point });
        }
    }

    /// Returns the mounts that the first process of a pid namespace makes, with the number of the mount
    /// namespace in which it does so.
    pub(super) fn mounts_of_first(&self, pid_space: u64) -> Vec<(u32, Later<'_>)> {
        let of_space = |space: usize| {
            let mounts = self.waiting.iter().filter(move |waiting| {
                waiting.pid_space == pid_space && self.mounts[waiting.at].space == space
            });
            Later { plan: self, mounts: mounts.collect() }
        };
        let spaces = self.spaces.iter().enumerate();
        let spaces = spaces.map(|(at, space)| (space.member.number, of_space(at)));
        spaces.filter(|(_, later)| !later.mounts.is_empty()).collect()
    }

    /// Returns the numbers of the mounts that wait.
    pub(super) fn later_mounts(&self) -> Vec<i32> {
        self.waiting
            .iter()
            .map(|waiting| self.mounts[waiting.at].entry.mnt_id.cast_signed())
            .collect()
    }
}

impl Later<'_> {
    /// Adds the calls of the first process.
    ///
    /// # Errors
    /// The images name something that is not there.
    pub fn script(&self, script: &mut Script) -> Result<()> {
        let mut made: Vec<(usize, Arg)> = Vec::new();
        let mut close: Vec<CallId> = Vec::new();
        for waiting in &self.mounts {
            let mount = &self.plan.mounts[waiting.at];
            let what = mount.what("mount a proc file system at");
            let fd = match (&waiting.made, &mount.source) {
                (Some(fd), _) => Arg::from(fd.as_raw_fd()),
                (None, Source::Bind(_, rest)) if !rest.as_os_str().is_empty() => {
                    // The file system as this mount namespace has it.
                    let is_of = |other: &Mount| {
                        other.entry.root_dev == mount.entry.root_dev && other.root == Path::new("/")
                    };
                    let from = self.find(&made, waiting.at, |at| is_of(&self.plan.mounts[at]))?;
                    let opened = calls::ask_to_open(script, from, rest, &what)?;
                    let copy = calls::ask_to_copy(script, opened.into(), &what);
                    close.extend([opened, copy]);
                    copy.into()
                }
                (None, _) => {
                    let parameters = parameters(mount, b"proc");
                    let new = calls::ask_to_make(script, b"proc", &parameters, &what)?;
                    close.push(new);
                    new.into()
                }
            };
            if waiting.made.is_none() {
                let attributes = MountAttributes {
                    set: mount.attributes(),
                    clear: attribute::ALL,
                    propagation: libc::MS_PRIVATE,
                    ..MountAttributes::default()
                };
                calls::ask_to_set(script, fd, attributes, &what);
            }
            let point = self.point(script, &made, waiting, &mut close)?;
            calls::ask_to_attach(script, fd, point, &what);
            made.push((waiting.at, fd));
        }
        for fd in close {
            script.call("close a mount", libc::SYS_close, &[fd.into()]);
        }
        Ok(())
    }

    /// Returns a mount that the script has made or attached before, for the one at a position.
    fn find(
        &self,
        made: &[(usize, Arg)],
        at: usize,
        is_wanted: impl Fn(usize) -> bool,
    ) -> Result<Arg> {
        let found = made.iter().find(|(known, _)| is_wanted(*known)).map(|(_, fd)| *fd);
        found.ok_or_else(|| {
            let Mount { point, space, .. } = &self.plan.mounts[at];
            let problem = format!(
                "the mount at {} is on a mount, or bound from one, that shows a pid namespace below that of \
                 the tree, and the first process of that namespace cannot make it",
                point.display()
            );
            wrong(self.plan.spaces[*space].member.number, &problem)
        })
    }

    /// Returns the mount point of a mount.
    fn point(
        &self,
        script: &mut Script,
        made: &[(usize, Arg)],
        waiting: &Waiting,
        close: &mut Vec<CallId>,
    ) -> Result<Arg> {
        let mut waiting = waiting;
        loop {
            if let Some(point) = &waiting.point {
                return Ok(point.as_raw_fd().into());
            }
            let mount = &self.plan.mounts[waiting.at];
            let missing = || wrong(self.plan.home.number, "a mount has no mount point");
            let parent = mount.parent.ok_or_else(missing)?;
            let rest = below(&mount.point, &self.plan.mounts[parent].point);
            let rest = rest.unwrap_or(Path::new(""));
            if !rest.as_os_str().is_empty() {
                let what = mount.what("open the mount point");
                let on = self.find(made, waiting.at, |at| at == parent)?;
                let opened = calls::ask_to_open(script, on, rest, &what)?;
                close.push(opened);
                return Ok(opened.into());
            }
            // The kernel puts it on top of what is mounted there.
            let all = &self.plan.waiting;
            waiting = all.iter().find(|other| other.at == parent).ok_or_else(missing)?;
        }
    }
}
