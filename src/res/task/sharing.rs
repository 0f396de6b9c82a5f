//! State that threads and processes share.

use std::cmp::Ordering;

use super::{Checked, Kind};
use crate::{
    res::{ResError, Result},
    sys::process::{self, Shared},
    units::HostPid,
};

/// State that all threads of a restored process share.
const OF_PROCESS: [(&str, Shared); 3] = [
    ("a descriptor table (CLONE_FILES)", Shared::Files),
    ("a root, working directory and umask (CLONE_FS)", Shared::Fs),
    ("a list of semaphore operations to be undone (CLONE_SYSVSEM)", Shared::Undo),
];

/// The kind.
pub(super) struct Sharing;

impl Kind for Sharing {
    fn check(&self, of: &Checked<'_>) -> Result<()> {
        let (pid, first) = (of.task.pid, of.task.witness());
        // Fail early if the kernel cannot compare. Otherwise shared state would look separate.
        compare(first, first, Shared::Memory)?;
        for thread in of.task.threads.iter().skip(1) {
            for (what, kind) in OF_PROCESS {
                if compare(first, thread.tid, kind)? != Ordering::Equal {
                    return Err(ResError::own_of_thread(pid, thread.tid, what));
                }
            }
        }
        Ok(())
    }
}

/// Compares an object of two processes or threads, in the kernel's order. A failure is an error: a
/// guess would restore the tree without what it shares.
///
/// # Errors
/// [`ResError::Compare`].
pub fn compare(a: HostPid, b: HostPid, kind: Shared) -> Result<Ordering> {
    process::kcmp(a, b, kind).map_err(|source| ResError::Compare { pid: a, source })
}
