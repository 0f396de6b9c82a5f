//! The dumpable attribute of a process (`PR_SET_DUMPABLE`).

use nix::libc;

use super::{Calling, Collect, Kind, Restored};
use crate::{inject::Script, res::Result};

/// The default: the user of the process may trace it.
const USUAL: i32 = 1;

pub(super) struct Dumpable;

impl Kind for Dumpable {
    fn ask(&self, _: &Calling<'_>, script: &mut Script) -> Result<Collect> {
        let call = script.attempt(libc::SYS_prctl, &[libc::PR_GET_DUMPABLE.into()]);
        Ok(Box::new(move |_, answers, images| {
            let value = answers.result(call).ok().and_then(|value| i32::try_from(value).ok());
            images.mm.dumpable = Some(value.unwrap_or(USUAL));
            Ok(())
        }))
    }

    fn after_credentials(&self, of: &Restored<'_>, script: &mut Script) {
        let dumpable = of.mm.dumpable.unwrap_or(USUAL);
        // The kernel sets 2 itself, when credentials change; prctl(2) cannot set it.
        if matches!(dumpable, 0 | 1) {
            let arguments = [libc::PR_SET_DUMPABLE.into(), dumpable.into()];
            script.call("set the dumpable attribute", libc::SYS_prctl, &arguments);
        }
    }
}
