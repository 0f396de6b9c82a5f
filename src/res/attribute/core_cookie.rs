//! The core scheduling cookie of a thread: it shares a core only with threads of the same cookie.

use nix::errno::Errno;

use super::{Asked, Kind, Label, Owner};
use crate::{
    inject::{Answers, Script},
    sys::task,
};

/// The cookie. Its value has no meaning other than being equal to another's.
pub(super) struct CoreCookie;

impl Kind for CoreCookie {
    fn label(&self) -> Label {
        Label::of_thread("core_cookie", "a core scheduling cookie (PR_SCHED_CORE)")
    }

    fn read(&self, owner: Owner, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        Some(vec![task::core_cookie(owner.tid).ok()?])
    }

    fn set(&self, _: &[u64], _: Owner, _: &mut Script) -> Result<(), Errno> {
        Ok(())
    }

    fn is_lost(&self, values: &[u64]) -> bool {
        values != [0]
    }
}
