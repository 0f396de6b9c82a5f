//! The nice value of a session's autogroup, in which the kernel schedules the session as a whole.

use std::fs;

use nix::errno::Errno;

use super::{Asked, Kind, Label, Owner};
use crate::inject::{Answers, Script};

/// The nice value in `/proc/PID/autogroup`.
pub(super) struct Autogroup;

impl Kind for Autogroup {
    fn label(&self) -> Label {
        Label::of_process("autogroup", "the nice value of its session (/proc/PID/autogroup)")
    }

    fn read(&self, owner: Owner, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        // The text is "/autogroup-25 nice 0"; without autogroups, the file is missing or empty.
        let text = fs::read_to_string(path(owner)).ok()?;
        let nice: i64 = text.trim().rsplit_once(" nice ")?.1.parse().ok()?;
        Some(vec![nice.cast_unsigned()])
    }

    fn set(&self, values: &[u64], owner: Owner, _: &mut Script) -> Result<(), Errno> {
        let &[nice] = values else { return Err(Errno::EINVAL) };
        // A restore must not change the autogroup of the user's own session.
        if !owner.session_in_tree {
            return Ok(());
        }
        fs::write(path(owner), nice.cast_signed().to_string())
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))
    }
}

fn path(owner: Owner) -> String {
    format!("/proc/{}/autogroup", owner.pid)
}
