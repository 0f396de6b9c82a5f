//! State that the dump can see but no restore can set. The dump warns about it.

use std::fs;

use crate::{
    causes::tell,
    inject::{Task, living},
    proc,
    res::Result,
    units::HostPid,
};

/// Security attributes for the next `execve(2)` or the next new object.
const NEXT: [&str; 4] = ["exec", "fscreate", "keycreate", "sockcreate"];

/// Warns about state that the processes of a tree will lose.
///
/// # Errors
/// None.
pub(super) fn check(tasks: &[Task]) -> Result<()> {
    let own = OfDumper::read();
    for task in living(tasks) {
        let tids: Vec<_> = task.threads.iter().map(|thread| thread.tid).collect();
        for what in own.look(task.witness(), &tids) {
            tell(log::Level::Warn, &format!("process {} {what}", task.pid));
        }
    }
    Ok(())
}

/// The same state of rcriu itself, to compare with.
#[derive(Clone, Debug)]
struct OfDumper {
    /// Its security label; `None` if no security module uses labels.
    label: Option<String>,
    audit_session: Option<u32>,
}

impl OfDumper {
    /// Reads the state of this process.
    fn read() -> Self {
        let pid = HostPid::own();
        Self { label: label(pid, pid, "current"), audit_session: proc::session_id(pid).ok() }
    }

    /// Returns sentences about the state that a stopped process will lose, without their subject,
    /// "process N".
    fn look(&self, pid: HostPid, tids: &[HostPid]) -> Vec<String> {
        let mut found = Vec::new();
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
                "is in audit session {theirs}: the restored process is in that of rcriu restore"
            ));
        }
        found
    }
}

/// Lists the security labels that a thread loses.
fn labels(pid: HostPid, tid: HostPid, ours: &str, found: &mut Vec<String>) {
    let theirs = label(pid, tid, "current").unwrap_or_default();
    if theirs != ours {
        found.push(format!(
            "has the security label {theirs:?} in thread {tid}: the restored thread has that of rcriu \
             restore, which is {ours:?} here"
        ));
    }
    for name in NEXT {
        if let Some(label) = label(pid, tid, name).filter(|label| !label.is_empty()) {
            found.push(format!(
                "has the security label {label:?} for {name} in thread {tid}: it is lost"
            ));
        }
    }
}

/// Reads a security label of a thread; `None` if no security module uses labels.
fn label(pid: HostPid, tid: HostPid, name: &str) -> Option<String> {
    let text = fs::read(format!("/proc/{pid}/task/{tid}/attr/{name}")).ok()?;
    let end = text.iter().rposition(|byte| !matches!(byte, 0 | b'\n'));
    Some(String::from_utf8_lossy(&text[..end.map_or(0, |end| end + 1)]).into_owned())
}
