//! The name of a thread.

use nix::libc;

use super::{Collect, Exited, Kind, Restored, Thread, own};
use crate::{
    image::proto::CoreEntry,
    inject::Script,
    proc,
    res::{Result, calls::Calls},
};

pub(super) struct Name;

impl Kind for Name {
    fn ask(&self, _: Thread, _: &mut Script) -> Collect {
        Box::new(|of, _, core| {
            own(core).comm = Some(proc::comm(of.of.pid, of.of.tid)?);
            Ok(())
        })
    }

    fn exited(&self, of: &Exited<'_>, core: &mut CoreEntry) -> Result<()> {
        own(core).comm = Some(proc::comm(of.tid, of.tid)?);
        Ok(())
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        let Some(thread) = &of.core.thread_core else { return Ok(()) };
        let comm = thread.comm.as_ref().or(of.core.tc.as_ref().map(|task| &task.comm));
        if let Some(comm) = comm {
            let mut name = comm.clone();
            name.push(0);
            let name = calls.script.bytes(&name);
            let arguments = [libc::PR_SET_NAME.into(), name.into()];
            calls.script.call("set the name", libc::SYS_prctl, &arguments);
        }
        Ok(())
    }
}
