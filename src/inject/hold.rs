//! Why a process cannot be stopped.

use super::{
    InjectError,
    cgroup::{Freezable, frozen_above},
};
use crate::{arch::native::waits_for_child, proc, units::HostPid};

/// Returns the error for a process that a frozen cgroup keeps from running.
pub(super) fn frozen(pid: HostPid, cgroup: &Freezable) -> InjectError {
    InjectError::FrozenCgroup {
        pid,
        cgroup: cgroup.directory().to_owned(),
        thaw: cgroup.how_to_thaw(),
    }
}

/// Returns why a thread does not stop.
pub(super) fn why_running(pid: HostPid, tid: HostPid) -> InjectError {
    if let Ok(cgroups) = proc::thread_cgroups(pid, tid)
        && let Some(cgroup) = frozen_above(&cgroups).first()
    {
        return frozen(pid, cgroup);
    }
    let waits = proc::thread_stat(pid, tid).is_ok_and(|stat| stat.state == 'D');
    if waits && is_vfork(pid, tid) {
        return InjectError::Vfork { tid };
    }
    let what = if waits { "it is in uninterruptible sleep" } else { "the machine may be slow" };
    InjectError::Lost { tid, what: format!("does not stop in time ({what}; see --timeout)") }
}

/// Whether a sleeping thread is in a call that creates a child and waits for it.
fn is_vfork(pid: HostPid, tid: HostPid) -> bool {
    let Ok(text) = proc::syscall(pid, tid) else { return false };
    let text = String::from_utf8_lossy(&text).into_owned();
    let mut words = text.split_whitespace();
    let number: i64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(-1);
    let first =
        words.next().and_then(|word| i32::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    waits_for_child(number, first)
}
