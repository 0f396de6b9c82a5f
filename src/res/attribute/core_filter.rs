//! What memory a core dump of the kernel's has.

use std::fs;

use nix::errno::Errno;

use super::{Asked, Kind, Scope, Who};
use crate::inject::{Answers, Script};

/// The bits of `/proc/PID/coredump_filter`.
pub(super) struct CoreFilter;

impl Kind for CoreFilter {
    fn name(&self) -> &'static str {
        "core_filter"
    }

    fn about(&self) -> &'static str {
        "what a core dump has (/proc/PID/coredump_filter)"
    }

    fn scope(&self) -> Scope {
        Scope::Process
    }

    fn read(&self, who: Who, _: &Asked, _: &Answers) -> Option<Vec<u64>> {
        let text = fs::read_to_string(path(who)).ok()?;
        Some(vec![u64::from_str_radix(text.trim(), 16).ok()?])
    }

    fn set(&self, values: &[u64], who: Who, _: &mut Script) -> Result<(), Errno> {
        let &[bits] = values else { return Err(Errno::EINVAL) };
        fs::write(path(who), format!("{bits:#x}"))
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))
    }
}

fn path(who: Who) -> String {
    format!("/proc/{}/coredump_filter", who.pid)
}
