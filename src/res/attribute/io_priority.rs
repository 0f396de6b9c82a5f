//! I/O priority.

use nix::errno::Errno;

use super::{Asked, Kind, Label, Owner};
use crate::{
    inject::{Answers, Script},
    sys::task,
};

/// Class and level, in the form of `ioprio_get(2)`.
pub(super) struct IoPriority;

impl Kind for IoPriority {
    fn label(&self) -> Label {
        Label::of_thread("io_priority", "the I/O priority (ioprio_set(2))")
    }

    fn read(&self, owner: Owner, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        Some(vec![task::io_priority(owner.tid).ok()?.into()])
    }

    fn set(&self, values: &[u64], owner: Owner, _: &mut Script) -> Result<(), Errno> {
        let &[priority] = values else { return Err(Errno::EINVAL) };
        task::set_io_priority(owner.tid, u32::try_from(priority).map_err(|_| Errno::EINVAL)?)
    }
}
