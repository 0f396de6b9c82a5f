//! Seccomp filters of stopped threads: what a thread and a tree have in common.

use nix::errno::Errno;

use crate::{image::proto::SeccompFilter, sys::ptrace, units::HostPid};

/// Returns the filters of a stopped thread, the oldest first; none if it has none or is in strict
/// mode.
///
/// # Errors
/// Those of [`ptrace::seccomp_filter`].
pub fn filters(tid: HostPid) -> Result<Vec<SeccompFilter>, Errno> {
    let mut found = Vec::new();
    loop {
        let filter = match ptrace::seccomp_filter(tid, found.len()) {
            Ok(Some(filter)) => filter,
            Ok(None) => return Ok(found),
            // It has no filters at all.
            Err(Errno::EINVAL) if found.is_empty() => return Ok(found),
            Err(errno) => return Err(errno),
        };
        let flags = match ptrace::seccomp_flags(tid, found.len()) {
            Ok(flags) => u32::try_from(flags).unwrap_or(u32::MAX),
            // Before Linux 4.16.
            Err(Errno::EIO) => 0,
            Err(errno) => return Err(errno),
        };
        found.push(SeccompFilter { filter, flags: Some(flags), prev: None });
    }
}
