//! How nice a session is as a whole, where each is scheduled as a group.

use std::fs;

use nix::errno::Errno;

use super::{Asked, Kind, Scope, Who};
use crate::inject::{Answers, Script};

/// The nice value of `/proc/PID/autogroup`.
pub(super) struct Autogroup;

impl Kind for Autogroup {
    fn name(&self) -> &'static str {
        "autogroup"
    }

    fn about(&self) -> &'static str {
        "how nice its session is (/proc/PID/autogroup)"
    }

    fn scope(&self) -> Scope {
        Scope::Process
    }

    fn read(&self, who: Who, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        // /autogroup-25 nice 0; nothing if it is scheduled otherwise.
        let text = fs::read_to_string(path(who)).ok()?;
        let nice: i64 = text.trim().rsplit_once(" nice ")?.1.parse().ok()?;
        Some(vec![nice.cast_unsigned()])
    }

    fn set(&self, values: &[u64], who: Who, _: &mut Script) -> Result<(), Errno> {
        let &[nice] = values else { return Err(Errno::EINVAL) };
        // That of who restores is not ours to change.
        if !who.own_session {
            return Ok(());
        }
        fs::write(path(who), nice.cast_signed().to_string())
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))
    }
}

fn path(who: Who) -> String {
    format!("/proc/{}/autogroup", who.pid)
}
