//! Whether a thread's allocations may not wait for I/O (`PR_SET_IO_FLUSHER`).

use nix::{errno::Errno, libc};

use super::{Asked, Kind, Who};
use crate::{
    inject::{Answers, Script},
    proc,
};

/// `PF_MEMALLOC_NOIO` and `PF_LOCAL_THROTTLE` (`linux/sched.h`), which it sets together.
const FLAGS: u32 = 0x0008_0000 | 0x0010_0000;

/// `PR_SET_IO_FLUSHER` (`linux/prctl.h`).
const SET_IO_FLUSHER: i32 = 57;

/// 1 if it is one. The question itself needs `CAP_SYS_RESOURCE`, but its flags are seen.
pub(super) struct IoFlusher;

impl Kind for IoFlusher {
    fn name(&self) -> &'static str {
        "io_flusher"
    }

    fn about(&self) -> &'static str {
        "whether it writes back for others (PR_SET_IO_FLUSHER)"
    }

    fn read(&self, who: Who, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        let stat = proc::thread_stat(who.pid, who.tid).ok()?;
        Some(vec![u64::from(stat.flags & FLAGS == FLAGS)])
    }

    fn set(&self, values: &[u64], _: Who, script: &mut Script) -> Result<(), Errno> {
        let &[value] = values else { return Err(Errno::EINVAL) };
        script.attempt(libc::SYS_prctl, &[SET_IO_FLUSHER.into(), value.into()]);
        Ok(())
    }
}
