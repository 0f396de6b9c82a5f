//! The priority of a thread's I/O.

use nix::errno::Errno;

use super::{Asked, Kind, Who};
use crate::{
    inject::{Answers, Script},
    sys::task,
};

/// Class and level, as `ioprio_get(2)` has them.
pub(super) struct IoPriority;

impl Kind for IoPriority {
    fn name(&self) -> &'static str {
        "io_priority"
    }

    fn about(&self) -> &'static str {
        "the priority of I/O (ioprio_set(2))"
    }

    fn read(&self, who: Who, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        Some(vec![task::io_priority(who.tid).ok()?.into()])
    }

    fn set(&self, values: &[u64], who: Who, _: &mut Script) -> Result<(), Errno> {
        let &[priority] = values else { return Err(Errno::EINVAL) };
        task::set_io_priority(who.tid, u32::try_from(priority).map_err(|_| Errno::EINVAL)?)
    }
}
