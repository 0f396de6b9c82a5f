//! Cgroup namespaces: which cgroups `/proc/PID/cgroup` shows as the root.
//!
//! The images have the root as a part of the paths of cgroups (`cgns_prefix`), which the kind of
//! the tree writes and reads ([`crate::res::tree::cgroup`]). The root of a new namespace is where its
//! first process is, so the restore moves that process there first.

use std::{cell::RefCell, path::PathBuf};

use nix::libc;

use super::{Building, Dumped, Namespace, Options, Restoring};
use crate::{
    image::ImageStore,
    inject::{Script, living},
    res::{ResError, Result, cgroups},
};

#[derive(Debug)]
pub(super) struct Cgroup;

impl Namespace for Cgroup {
    /// None: the first process makes it, once it is in the right cgroups.
    fn clone_flag(&self) -> u64 {
        0
    }

    fn check(&self, of: &Dumped<'_>) -> Result<()> {
        for task in living(of.tasks) {
            let roots = cgroups::roots_of(task.witness())?;
            if let Some(path) = roots.into_values().find_map(Result::err) {
                return Err(ResError::Refused {
                    pid: task.pid,
                    what: format!("is in a cgroup outside of its cgroup namespace ({path})"),
                    help: "move it into the root cgroup of the namespace, or below",
                });
            }
        }
        Ok(())
    }

    fn restore(&self, _: &dyn ImageStore, _: u32, _: &Options) -> Result<Box<dyn Restoring>> {
        Ok(Box::new(Wanted::default()))
    }
}

/// A namespace to be restored.
#[derive(Debug, Default)]
struct Wanted {
    /// The directories of its root cgroups, other than those that rcriu is in.
    roots: RefCell<Vec<PathBuf>>,
}

impl Restoring for Wanted {
    fn set_root_cgroups(&self, roots: Vec<PathBuf>) {
        self.roots.replace(roots);
    }

    fn build(&mut self, on: &Building<'_>) -> Result<()> {
        let first = on.first;
        let mut roots = self.roots.get_mut().iter();
        roots.try_for_each(|root| cgroups::put(first, &root.join("cgroup.procs")))
    }

    fn script(&self) -> Script {
        let mut script = Script::new();
        let flag = libc::CLONE_NEWCGROUP.into();
        script.call("make a cgroup namespace", libc::SYS_unshare, &[flag]);
        script
    }
}
