//! The I/O flusher state: memory allocations of the thread do not wait for I/O
//! (`PR_SET_IO_FLUSHER`).

use nix::{errno::Errno, libc};

use super::{Asked, Kind, Label, Owner};
use crate::{
    inject::{Answers, Script},
    proc,
};

/// `PF_MEMALLOC_NOIO` and `PF_LOCAL_THROTTLE` (`linux/sched.h`), which the state consists of.
const FLAGS: u32 = 0x0008_0000 | 0x0010_0000;

/// `PR_SET_IO_FLUSHER` (`linux/prctl.h`).
const SET_IO_FLUSHER: i32 = 57;

/// 1 for an I/O flusher. `PR_GET_IO_FLUSHER` needs `CAP_SYS_RESOURCE`; the flags in
/// `/proc/PID/stat` do not.
pub(super) struct IoFlusher;

impl Kind for IoFlusher {
    fn label(&self) -> Label {
        Label::of_thread("io_flusher", "the I/O flusher state (PR_SET_IO_FLUSHER)")
    }

    fn read(&self, owner: Owner, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        let stat = proc::thread_stat(owner.pid, owner.tid).ok()?;
        Some(vec![u64::from(stat.flags & FLAGS == FLAGS)])
    }

    fn set(&self, values: &[u64], _: Owner, script: &mut Script) -> Result<(), Errno> {
        let &[value] = values else { return Err(Errno::EINVAL) };
        script.attempt(libc::SYS_prctl, &[SET_IO_FLUSHER.into(), value.into()]);
        Ok(())
    }
}
