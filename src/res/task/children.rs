//! The pid namespace that the children of a process will be in: `unshare(2)` and `setns(2)` change that of the
//! children only.
//!
//! The images name it by its first process, which is in the tree.

use nix::libc;

use super::{Calling, Collect, Kind, Restored};
use crate::{
    inject::Script,
    proc,
    res::{Result, calls::Calls},
    units::NsPid,
};

pub(super) struct Children;

impl Kind for Children {
    fn ask(&self, of: &Calling<'_>, _: &mut Script) -> Result<Collect> {
        let witness = of.of.witness;
        let space = proc::namespace(witness, "pid_for_children").ok();
        let own = proc::namespace(witness, "pid").ok();
        let space = space.filter(|space| Some(*space) != own);
        Ok(Box::new(move |of, _, images| {
            let first = space.and_then(|space| of.pids.below()?.first_of(space));
            images.core.rcriu_children_pid_ns = first.map(NsPid::image);
            Ok(())
        }))
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        let first = of.core.tc.as_ref().and_then(|task| task.rcriu_children_pid_ns);
        if let Some(first) = first {
            let first = of.local(NsPid::of_image(first))?;
            let script = &mut calls.script;
            let what = "open the first process of the pid namespace for children";
            let pidfd = script.call(what, libc::SYS_pidfd_open, &[first.into(), 0.into()]);
            let arguments = [pidfd.into(), libc::CLONE_NEWPID.into()];
            script.call("enter the pid namespace for children", libc::SYS_setns, &arguments);
            script.call("close it", libc::SYS_close, &[pidfd.into()]);
        }
        Ok(())
    }
}
