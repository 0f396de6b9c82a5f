//! The processors that a thread may run on.

use nix::errno::Errno;

use super::{Asked, Kind, Who};
use crate::{
    inject::{Answers, Script},
    sys::task,
};

/// A word for each 64 processors.
pub(super) struct Affinity;

impl Kind for Affinity {
    fn name(&self) -> &'static str {
        "affinity"
    }

    fn about(&self) -> &'static str {
        "the set of processors (sched_setaffinity(2))"
    }

    fn read(&self, who: Who, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        task::affinity(who.tid).ok()
    }

    fn set(&self, values: &[u64], who: Who, _: &mut Script) -> Result<(), Errno> {
        task::set_affinity(who.tid, values)
    }
}
