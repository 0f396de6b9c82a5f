//! Refuses threads whose system calls are caught (`PR_SET_SYSCALL_USER_DISPATCH`): such a thread
//! can make none for rcriu. While the selector lets calls pass, the setting is an attribute of the
//! thread ([`crate::res::attribute`]).

use super::{Kind, Stopped};
use crate::{
    res::Result,
    sys::{process, ptrace},
    units::RemoteAddr,
};

/// The value of the selector with which system calls pass (`SYSCALL_DISPATCH_FILTER_ALLOW`,
/// `linux/prctl.h`).
const ALLOW: u8 = 0;

/// The kind.
pub(super) struct Dispatch;

impl Kind for Dispatch {
    fn check(&self, of: &Stopped<'_>) -> Result<()> {
        let tid = of.of.tid;
        let dispatch = ptrace::syscall_dispatch(tid).unwrap_or_default();
        let mut selector = [!ALLOW];
        let passes = dispatch.mode == 0
            || (dispatch.selector != 0
                && process::read_memory(tid, RemoteAddr(dispatch.selector), &mut selector).is_ok()
                && selector == [ALLOW]);
        if !passes {
            return Err(of.refused(
                "its system calls caught (PR_SET_SYSCALL_USER_DISPATCH)",
                "dump it when the selector allows calls: until then it can make none for rcriu",
            ));
        }
        Ok(())
    }
}
