//! Syscall user dispatch: system calls that a thread handles itself
//! (`PR_SET_SYSCALL_USER_DISPATCH`).

use super::{Kind, Stopped};
use crate::{res::Result, sys::ptrace};

/// The kind.
pub(super) struct Dispatch;

impl Kind for Dispatch {
    fn check(&self, of: &Stopped<'_>) -> Result<()> {
        if ptrace::syscall_dispatch(of.of.tid).is_ok_and(|dispatch| dispatch.mode != 0) {
            return Err(of.refused(
                "its system calls caught (PR_SET_SYSCALL_USER_DISPATCH)",
                "dump it when the dispatch is off: until then it can make no system calls for rcriu",
            ));
        }
        Ok(())
    }
}
