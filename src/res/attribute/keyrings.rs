//! Keyrings of a thread and of a process, which the kernel destroys when their owner exits.
//!
//! The dump does not ask for the session keyring, because asking creates one.

use nix::{errno::Errno, libc};

use super::{Asked, Kind, Label, Owner};
use crate::inject::{Answers, Script};

/// `KEYCTL_GET_KEYRING_ID` (`linux/keyctl.h`).
const GET_KEYRING_ID: i32 = 0;

/// 1 if there is a keyring. A restore cannot recreate it: only its owner may read the keys.
pub(super) struct Keyring {
    label: Label,
    /// `KEY_SPEC_*_KEYRING`.
    which: i32,
}

pub(super) const OF_THREAD: Keyring = Keyring {
    label: Label::of_thread("thread_keyring", "a thread keyring (KEY_SPEC_THREAD_KEYRING)"),
    which: -1,
};

pub(super) const OF_PROCESS: Keyring = Keyring {
    label: Label::of_process("process_keyring", "a process keyring (KEY_SPEC_PROCESS_KEYRING)"),
    which: -2,
};

impl Kind for Keyring {
    fn label(&self) -> Label {
        self.label
    }

    fn ask(&self, script: &mut Script) -> Asked {
        let arguments = [GET_KEYRING_ID.into(), self.which.into(), 0.into()];
        Asked::call(script.attempt(libc::SYS_keyctl, &arguments))
    }

    fn read(&self, _: Owner, asked: &Asked, answers: &Answers) -> Option<Vec<u64>> {
        match answers.result(*asked.calls.first()?) {
            Ok(_) => Some(vec![1]),
            Err(Errno::ENOKEY) => Some(vec![0]),
            Err(_) => None,
        }
    }

    fn set(&self, _: &[u64], _: Owner, _: &mut Script) -> Result<(), Errno> {
        Ok(())
    }

    fn is_lost(&self, values: &[u64]) -> bool {
        values != [0]
    }
}
