//! Whether a process may be dumped and looked at by others (`PR_SET_DUMPABLE`).

use nix::libc;

use super::{Collect, Kind, Process, Restored};
use crate::{inject::Script, res::Result};

/// What processes usually are.
const USUAL: i32 = 1;

/// The kind.
pub(super) struct Dumpable;

impl Kind for Dumpable {
    fn ask(&self, _: Process, script: &mut Script) -> Result<Collect> {
        let call = script.attempt(libc::SYS_prctl, &[libc::PR_GET_DUMPABLE.into()]);
        Ok(Box::new(move |_, answers, images| {
            let value = answers.result(call).ok().and_then(|value| i32::try_from(value).ok());
            images.mm.dumpable = Some(value.unwrap_or(USUAL));
            Ok(())
        }))
    }

    fn after_credentials(&self, of: &Restored<'_>, script: &mut Script) {
        let dumpable = of.mm.dumpable.unwrap_or(USUAL);
        // 2 cannot be set, but is what changing credentials leads to.
        if matches!(dumpable, 0 | 1) {
            let arguments = [libc::PR_SET_DUMPABLE.into(), dumpable.into()];
            script.call("set whether it can be dumped", libc::SYS_prctl, &arguments);
        }
    }
}
