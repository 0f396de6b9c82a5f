//! Whether a process is a subreaper, which adopts orphaned descendants.

use nix::libc;

use super::{Calling, Collect, Kind, Restored};
use crate::{
    inject::Script,
    res::{Result, calls::Calls},
};

pub(super) struct Subreaper;

impl Kind for Subreaper {
    fn ask(&self, _: &Calling<'_>, script: &mut Script) -> Result<Collect> {
        let answer = script.space(size_of::<u32>());
        let arguments = [libc::PR_GET_CHILD_SUBREAPER.into(), answer.into()];
        script.call("ask whether it is a subreaper", libc::SYS_prctl, &arguments);
        Ok(Box::new(move |_, answers, images| {
            images.core.child_subreaper = Some(answers.value::<u32>(answer) != 0);
            Ok(())
        }))
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        if of.core.tc.as_ref().is_some_and(|task| task.child_subreaper == Some(true)) {
            let arguments = [libc::PR_SET_CHILD_SUBREAPER.into(), 1.into()];
            calls.script.call("become a subreaper", libc::SYS_prctl, &arguments);
        }
        Ok(())
    }
}
