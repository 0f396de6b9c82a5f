//! Lists processes, threads, children and descriptors.

use std::{fs, path::Path};

use super::{ProcError, Result, of_process, of_thread, read, stat, text};
use crate::units::{HostPid, TargetFd};

/// Returns all processes that this `/proc` shows, in ascending order. May include or miss one
/// that starts or exits meanwhile.
///
/// # Errors
///
/// See the [module](super).
pub fn pids() -> Result<Vec<HostPid>> {
    Ok(numbered(Path::new("/proc"))?.into_iter().map(HostPid).collect())
}

/// Returns the threads of a process: the leader first, even if it has exited, then the others in
/// ascending order.
///
/// # Errors
///
/// See the [module](super).
pub fn threads(pid: HostPid) -> Result<Vec<HostPid>> {
    let numbers = numbered(&of_process(pid, "task"))?;
    let mut threads: Vec<HostPid> = numbers.into_iter().map(HostPid).collect();
    threads.sort_unstable_by_key(|&tid| (tid != pid, tid));
    Ok(threads)
}

/// Returns the descriptors of a process in ascending order. A zombie has none.
///
/// # Errors
///
/// See the [module](super).
pub fn fds(pid: HostPid) -> Result<Vec<TargetFd>> {
    Ok(numbered(&of_process(pid, "fd"))?.into_iter().map(TargetFd).collect())
}

/// Returns the children of all threads of a process, including zombies, in ascending order.
///
/// The list is complete only if neither the process nor its children can fork or exit meanwhile.
/// On kernels without `CONFIG_PROC_CHILDREN`, it is built from the parents of all processes.
///
/// # Errors
///
/// See the [module](super).
pub fn children(pid: HostPid) -> Result<Vec<HostPid>> {
    let mut found = Vec::new();
    for tid in threads(pid)? {
        let path = of_thread(pid, tid, "children");
        match read(path, |text| text::numbers(text, "pid of child")) {
            Ok(numbers) => found.extend(numbers.into_iter().map(HostPid)),
            // The leader's directory exists as long as the process does.
            Err(error) if error.is_vanished() && tid == pid => {
                stat(pid)?;
                return children_by_parent(pid);
            }
            // Another thread has exited: other threads have adopted its children.
            Err(error) if error.is_vanished() => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// Returns the processes whose parent is `pid`, in ascending order.
pub(super) fn children_by_parent(pid: HostPid) -> Result<Vec<HostPid>> {
    let mut found = Vec::new();
    for candidate in pids()? {
        match stat(candidate) {
            Ok(stat) if stat.ppid == pid => found.push(candidate),
            Ok(_) => {}
            Err(error) if error.is_vanished() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Returns the names in a directory that are numbers, in ascending order.
pub(super) fn numbered(dir: &Path) -> Result<Vec<i32>> {
    let failed = |source| ProcError::from_io(dir, source);
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}
