//! Which mappings the kernel writes to a core dump of the process.

use std::fs;

use nix::errno::Errno;

use super::{Asked, Kind, Label, Owner};
use crate::inject::{Answers, Script};

/// The bits in `/proc/PID/coredump_filter`.
pub(super) struct CoreFilter;

impl Kind for CoreFilter {
    fn label(&self) -> Label {
        Label::of_process("core_filter", "the core dump filter (/proc/PID/coredump_filter)")
    }

    fn read(&self, owner: Owner, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        let text = fs::read_to_string(path(owner)).ok()?;
        Some(vec![u64::from_str_radix(text.trim(), 16).ok()?])
    }

    fn set(&self, values: &[u64], owner: Owner, _: &mut Script) -> Result<(), Errno> {
        let &[bits] = values else { return Err(Errno::EINVAL) };
        fs::write(path(owner), format!("{bits:#x}"))
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))
    }
}

fn path(owner: Owner) -> String {
    format!("/proc/{}/coredump_filter", owner.pid)
}
