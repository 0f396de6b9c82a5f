//! What the threads of a process have in common, and processes with each other.

use std::cmp::Ordering;

use super::{Checked, Kind};
use crate::{
    res::{ResError, Result},
    sys::process::{self, Shared},
    units::HostPid,
};

/// What all threads of a restored process share.
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
        // Fails early if the kernel cannot compare: otherwise shared state would look separate.
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

/// Compares what two processes or threads have, in the order of the kernel. A failure is an
/// error: if the answer were guessed, the tree would be restored without what it shares.
///
/// # Errors
/// [`ResError::Compare`].
pub fn compare(a: HostPid, b: HostPid, kind: Shared) -> Result<Ordering> {
    process::kcmp(a, b, kind).map_err(|source| ResError::Compare { pid: a, source })
}
