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

/// Returns what a stopped process will lose, as the ends of sentences that begin with
/// "process N". `own` is this program, before it has threads; `in_tree` tells whose
/// operations on semaphores count.
pub fn look(
    pid: HostPid,
    tids: &[HostPid],
    own: HostPid,
    in_tree: &dyn Fn(HostPid) -> bool,
) -> Vec<String> {
    let mut found = Vec::new();
    // Both have none, or it has a list, perhaps an empty one that its threads share.
    if process::kcmp(pid, own, Shared::Undo).is_ok_and(std::cmp::Ordering::is_ne) {
        let sets = task::semaphores_used_by(in_tree);
        if !sets.is_empty() {
            found.push(format!(
                "may have operations on semaphores to be undone (SEM_UNDO, sets {sets:?}): its \
                 end undoes them, and the restored one has none"
            ));
        }
    }
    for tid in tids {
        let read = |pid: HostPid, tid: HostPid, name: &str| {
            let text = fs::read(format!("/proc/{pid}/task/{tid}/attr/{name}")).unwrap_or_default();
            let end = text.iter().rposition(|byte| !matches!(byte, 0 | b'\n'));
            String::from_utf8_lossy(&text[..end.map_or(0, |end| end + 1)]).into_owned()
        };
        let (theirs, ours) = (read(pid, *tid, "current"), read(own, own, "current"));
        if theirs != ours {
            found.push(format!(
                "has the security label {theirs:?} in thread {tid}: the restored one has that of \
                 rcriu restore, which is {ours:?} here"
            ));
        }
        for name in NEXT {
            let label = read(pid, *tid, name);
            if !label.is_empty() {
                found.push(format!(
                    "has the label {label:?} for {name} in thread {tid}, which is lost"
                ));
            }
        }
    }
    if let (Ok(theirs), Ok(ours)) = (proc::session_id(pid), proc::session_id(own))
        && theirs != ours
    {
        found.push(format!(
            "is in the audit session {theirs}: the restored one is in that of rcriu restore"
        ));
    }
    found
}
