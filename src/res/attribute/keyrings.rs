//! Keyrings of a thread and of a process: they end with it.
//!
//! The keyring of a session is not asked for: the kernel makes one by the question.

use nix::{errno::Errno, libc};

use super::{Asked, Kind, Scope, Who};
use crate::inject::{Answers, Script};

/// `KEYCTL_GET_KEYRING_ID` (`linux/keyctl.h`).
const GET_KEYRING_ID: i32 = 0;

/// 1 if there is one, which cannot be made again: nobody else may read its keys.
pub(super) struct Keyring {
    name: &'static str,
    about: &'static str,
    scope: Scope,
    /// `KEY_SPEC_*_KEYRING`.
    which: i32,
}

pub(super) const OF_THREAD: Keyring = Keyring {
    name: "thread_keyring",
    about: "a keyring of its own (KEY_SPEC_THREAD_KEYRING)",
    scope: Scope::Thread,
    which: -1,
};

pub(super) const OF_PROCESS: Keyring = Keyring {
    name: "process_keyring",
    about: "a keyring of its process (KEY_SPEC_PROCESS_KEYRING)",
    scope: Scope::Process,
    which: -2,
};

impl Kind for Keyring {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn scope(&self) -> Scope {
        self.scope
    }

    fn ask(&self, script: &mut Script) -> Asked {
        let arguments = [GET_KEYRING_ID.into(), self.which.into(), 0.into()];
        Asked::call(script.attempt(libc::SYS_keyctl, &arguments))
    }

    fn read(&self, _: Who, asked: &Asked, answers: &Answers) -> Option<Vec<u64>> {
        match answers.result(*asked.calls.first()?) {
            Ok(_) => Some(vec![1]),
            Err(Errno::ENOKEY) => Some(vec![0]),
            Err(_) => None,
        }
    }

    fn set(&self, _: &[u64], _: Who, _: &mut Script) -> Result<(), Errno> {
        Ok(())
    }

    fn is_lost(&self, values: &[u64]) -> bool {
        values != [0]
    }
}
