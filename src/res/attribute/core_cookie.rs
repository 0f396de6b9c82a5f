//! Whom a thread shares the halves of a processor with (core scheduling).

use nix::errno::Errno;

use super::{Asked, Kind, Who};
use crate::{
    inject::{Answers, Script},
    sys::task,
};

/// The cookie: its number says only who has the same one.
pub(super) struct CoreCookie;

impl Kind for CoreCookie {
    fn name(&self) -> &'static str {
        "core_cookie"
    }

    fn about(&self) -> &'static str {
        "a core scheduling cookie (PR_SCHED_CORE)"
    }

    fn read(&self, who: Who, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        Some(vec![task::core_cookie(who.tid).ok()?])
    }

    fn set(&self, _: &[u64], _: Who, _: &mut Script) -> Result<(), Errno> {
        Ok(())
    }

    fn is_lost(&self, values: &[u64]) -> bool {
        values != [0]
    }
}
