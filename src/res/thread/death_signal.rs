//! The parent-death signal: the kernel sends it to a thread when the thread that created it exits.

use nix::libc;

use super::{Collect, Exited, Kind, Restored, Thread, own};
use crate::{
    causes::{HELP, tell},
    image::proto::CoreEntry,
    inject::Script,
    res::Result,
};

pub(super) struct DeathSignal;

impl Kind for DeathSignal {
    fn ask(&self, _: Thread, script: &mut Script) -> Collect {
        let signal = script.space(size_of::<u32>());
        let arguments = [libc::PR_GET_PDEATHSIG.into(), signal.into()];
        script.call("read the parent-death signal", libc::SYS_prctl, &arguments);
        Box::new(move |_, answers, core| {
            let signal: u32 = answers.value(signal);
            own(core).pdeath_sig = (signal != 0).then_some(signal);
            Ok(())
        })
    }

    fn exited(&self, _: &Exited<'_>, core: &mut CoreEntry) -> Result<()> {
        own(core).pdeath_sig = None;
        Ok(())
    }

    fn last_calls(&self, of: &Restored<'_>, script: &mut Script) -> Result<()> {
        // A new thread has none. The threads and zombies that had to exit have done so by now.
        let thread = of.core.thread_core.as_ref();
        let signal = thread.and_then(|thread| thread.pdeath_sig).unwrap_or(0);
        if signal != 0 && of.parent_exits {
            let message = format!(
                "process {} loses its parent-death signal, {signal}: its new parent, rcriu, is about to \
                 exit{HELP}restore it without -d, or with --restore-sibling",
                of.pid
            );
            tell(log::Level::Warn, &message);
        } else if signal != 0 {
            let arguments = [libc::PR_SET_PDEATHSIG.into(), signal.into()];
            script.call("set the parent-death signal", libc::SYS_prctl, &arguments);
        }
        Ok(())
    }
}
