//! Into how many slots the kernel spreads the private futexes of a process.

use nix::{errno::Errno, libc};

use super::{Asked, Kind, Label, Owner};
use crate::inject::{Answers, Script};

/// Of `linux/prctl.h`, since Linux 6.16.
const PR_FUTEX_HASH: i32 = 78;
const SET_SLOTS: i32 = 1;
const GET_SLOTS: i32 = 2;

/// The number of slots; 0 if the process uses those of all processes. The kernel chooses one when
/// the first thread is made.
pub(super) struct FutexHash;

impl Kind for FutexHash {
    fn label(&self) -> Label {
        Label::of_process("futex_hash", "the number of slots for private futexes (PR_FUTEX_HASH)")
    }

    fn ask(&self, script: &mut Script) -> Asked {
        let arguments = [PR_FUTEX_HASH.into(), GET_SLOTS.into(), 0.into(), 0.into(), 0.into()];
        Asked::call(script.attempt(libc::SYS_prctl, &arguments))
    }

    fn read(&self, _: Owner, asked: &Asked, answers: &Answers) -> Option<Vec<u64>> {
        Some(vec![asked.result(answers)?])
    }

    fn set(&self, values: &[u64], _: Owner, script: &mut Script) -> Result<(), Errno> {
        let &[slots] = values else { return Err(Errno::EINVAL) };
        let arguments = [PR_FUTEX_HASH.into(), SET_SLOTS.into(), slots.into(), 0.into(), 0.into()];
        script.attempt(libc::SYS_prctl, &arguments);
        Ok(())
    }
}
