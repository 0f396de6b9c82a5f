//! Controls of speculative execution.

use nix::{errno::Errno, libc};

use super::{Asked, Kind, Label, Owner};
use crate::inject::{Answers, Script};

/// `PR_SPEC_PRCTL` (`linux/prctl.h`): the thread may change the control.
const MAY_CHOOSE: u64 = 1;

/// `linux/prctl.h`.
const PR_GET_SPECULATION_CTRL: i32 = 52;
const PR_SET_SPECULATION_CTRL: i32 = 53;

/// One control of `PR_GET_SPECULATION_CTRL`, with its value (`PR_SPEC_*`).
pub(super) struct Speculation {
    label: Label,
    which: u64,
}

pub(super) const STORE_BYPASS: Speculation = Speculation {
    label: Label::of_thread("store_bypass", "speculative store bypass (PR_SPEC_STORE_BYPASS)"),
    which: 0,
};

pub(super) const INDIRECT_BRANCH: Speculation = Speculation {
    label: Label::of_thread(
        "indirect_branch",
        "indirect branch speculation (PR_SPEC_INDIRECT_BRANCH)",
    ),
    which: 1,
};

pub(super) const CACHE_FLUSH: Speculation = Speculation {
    label: Label::of_thread("l1d_flush", "the L1D cache flush (PR_SPEC_L1D_FLUSH)"),
    which: 2,
};

impl Kind for Speculation {
    fn label(&self) -> Label {
        self.label
    }

    fn ask(&self, script: &mut Script) -> Asked {
        let arguments = [PR_GET_SPECULATION_CTRL.into(), self.which.into()];
        Asked::call(script.attempt(libc::SYS_prctl, &arguments))
    }

    fn read(&self, _: Owner, asked: &Asked, answers: &Answers) -> Option<Vec<u64>> {
        Some(vec![asked.result(answers)?])
    }

    fn set(&self, values: &[u64], _: Owner, script: &mut Script) -> Result<(), Errno> {
        let &[value] = values else { return Err(Errno::EINVAL) };
        if value & MAY_CHOOSE != 0 {
            let option = PR_SET_SPECULATION_CTRL;
            let arguments = [option.into(), self.which.into(), (value & !MAY_CHOOSE).into()];
            script.attempt(libc::SYS_prctl, &arguments);
        }
        Ok(())
    }
}
