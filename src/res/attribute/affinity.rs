//! CPU affinity.

use nix::errno::Errno;

use super::{Asked, Kind, Label, Owner};
use crate::{
    inject::{Answers, Script},
    sys::task,
};

/// The set of CPUs, one word for each 64.
pub(super) struct Affinity;

impl Kind for Affinity {
    fn label(&self) -> Label {
        Label::of_thread("affinity", "the CPU affinity (sched_setaffinity(2))")
    }

    fn read(&self, owner: Owner, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        task::affinity(owner.tid).ok()
    }

    fn set(&self, values: &[u64], owner: Owner, _: &mut Script) -> Result<(), Errno> {
        task::set_affinity(owner.tid, values)
    }
}
