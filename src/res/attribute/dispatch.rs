//! Syscall user dispatch: system calls that a thread handles itself
//! (`PR_SET_SYSCALL_USER_DISPATCH`).
//!
//! A byte in the memory of the thread, the selector, switches the dispatch on and off. The dump
//! refuses a thread for which it is on ([`crate::res::thread`]), so that the new thread can make
//! calls for the restore, too.

use nix::errno::Errno;

use super::{Asked, Kind, Label, Owner};
use crate::{
    inject::{Answers, Script},
    sys::ptrace::{self, SyscallDispatch},
};

/// Mode, address of the selector, start and length of the code whose calls always pass.
pub(super) struct Dispatch;

impl Kind for Dispatch {
    fn label(&self) -> Label {
        let about = "the interception of system calls (PR_SET_SYSCALL_USER_DISPATCH)";
        Label::of_thread("syscall_dispatch", about)
    }

    fn read(&self, owner: Owner, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        let config = ptrace::syscall_dispatch(owner.tid).ok()?;
        Some(vec![config.mode, config.selector, config.offset, config.len])
    }

    fn set(&self, values: &[u64], owner: Owner, _: &mut Script) -> Result<(), Errno> {
        let &[mode, selector, offset, len] = values else { return Err(Errno::EINVAL) };
        let config = SyscallDispatch { mode, selector, offset, len };
        ptrace::set_syscall_dispatch(owner.tid, config)
    }
}
