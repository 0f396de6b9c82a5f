//! What is seen from outside and no restore gives back: a dump warns of it.

use std::fs;

use crate::{
    proc,
    sys::{
        process::{self, Shared},
        task,
    },
    units::HostPid,
};

/// Attributes of security modules that `execve(2)` or a new object takes.
const NEXT: [&str; 4] = ["exec", "fscreate", "keycreate", "sockcreate"];

/// What this program has itself, to tell what is not the same.
#[derive(Clone, Debug)]
pub struct Own {
    pid: HostPid,
    /// Its security label; `None` where no module has any.
    label: Option<String>,
    audit_session: Option<u32>,
}

impl Own {
    /// Reads it. This program must have no threads yet, so that it has no list of
    /// operations to be undone.
    pub fn read() -> Self {
        let pid = HostPid(nix::unistd::getpid().as_raw());
        Self { pid, label: label(pid, pid, "current"), audit_session: proc::session_id(pid).ok() }
    }

    /// Returns what a stopped process will lose, as the ends of sentences that begin with
    /// "process N". `in_tree` tells whose operations on semaphores count.
    pub fn look(
        &self,
        pid: HostPid,
        tids: &[HostPid],
        in_tree: &dyn Fn(HostPid) -> bool,
    ) -> Vec<String> {
        let mut found = Vec::new();
        // Both have none, or it has a list, perhaps an empty one that its threads share.
        if process::kcmp(pid, self.pid, Shared::Undo).is_ok_and(std::cmp::Ordering::is_ne) {
            let sets = task::semaphores_used_by(in_tree);
            if !sets.is_empty() {
                found.push(format!(
                    "may have operations on semaphores to be undone (SEM_UNDO, sets {sets:?}): \
                     its end undoes them, and the restored one has none"
                ));
            }
        }
        if let Some(ours) = &self.label {
            for tid in tids {
                labels(pid, *tid, ours, &mut found);
            }
        }
        let audit_session = proc::session_id(pid).ok();
        if let (Some(theirs), Some(ours)) = (audit_session, self.audit_session)
            && theirs != ours
        {
            found.push(format!(
                "is in the audit session {theirs}: the restored one is in that of rcriu restore"
            ));
        }
        found
    }
}

/// Says what of a thread's security labels will be another.
fn labels(pid: HostPid, tid: HostPid, ours: &str, found: &mut Vec<String>) {
    let theirs = label(pid, tid, "current").unwrap_or_default();
    if theirs != ours {
        found.push(format!(
            "has the security label {theirs:?} in thread {tid}: the restored one has that of rcriu \
             restore, which is {ours:?} here"
        ));
    }
    for name in NEXT {
        if let Some(label) = label(pid, tid, name).filter(|label| !label.is_empty()) {
            found
                .push(format!("has the label {label:?} for {name} in thread {tid}, which is lost"));
        }
    }
}

/// Reads one of a thread's labels; `None` where no security module has any.
fn label(pid: HostPid, tid: HostPid, name: &str) -> Option<String> {
    let text = fs::read(format!("/proc/{pid}/task/{tid}/attr/{name}")).ok()?;
    let end = text.iter().rposition(|byte| !matches!(byte, 0 | b'\n'));
    Some(String::from_utf8_lossy(&text[..end.map_or(0, |end| end + 1)]).into_owned())
}
