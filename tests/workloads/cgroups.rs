//! Cgroup namespaces that a tree has for itself.

use std::{fs, path::PathBuf};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, same, wait_until},
};

pub const ROWS: &[Row] = &[("cgroup_namespace_of_all", cgroup_namespace_of_all)];

/// In cgroups that its test makes: not in the list.
pub const APART: &[Row] = &[("cgroup_namespace", cgroup_namespace)];

fn namespace() -> Result<PathBuf, String> {
    fs::read_link("/proc/self/ns/cgroup").map_err(|error| format!("read the namespace: {error}"))
}

fn shown() -> Result<String, String> {
    fs::read_to_string("/proc/self/cgroup").map_err(|error| format!("read the cgroups: {error}"))
}

/// Makes a namespace when the test has put the process into cgroups (`tests/cgroups.rs`), which it
/// then moves on.
fn cgroup_namespace(checkpoint: &Checkpoint) -> Verdict {
    let outside = namespace()?;
    checkpoint.announce();
    let asked = checkpoint.path("enter");
    wait_until("the cgroups", || asked.exists())?;
    sys!(unshare(libc::CLONE_NEWCGROUP))?;
    checkpoint.mark("entered");
    checkpoint.wait_go();
    ensure!(namespace()? != outside, "it is in the namespace of the machine");
    Ok(())
}

/// A namespace of two processes in the cgroups of the machine.
fn cgroup_namespace_of_all(checkpoint: &Checkpoint) -> Verdict {
    let outside = namespace()?;
    sys!(unshare(libc::CLONE_NEWCGROUP))?;
    let (own, cgroups) = (namespace()?, shown()?);
    let child = checkpoint.fork(move |child| {
        child.wait();
        ensure!(namespace()? != outside, "it is in the namespace of the machine");
        fs::write(child.path("namespace"), namespace()?.as_os_str().as_encoded_bytes())
            .map_err(|error| error.to_string())
    })?;
    ensure!(own == namespace()?, "it has moved");
    checkpoint.wait();
    same("what is shown", cgroups, shown()?)?;
    child.join()
}
