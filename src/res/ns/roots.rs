//! The root directories in which the paths of a tree are looked up.

use std::collections::HashMap;

use super::mnt;
use crate::{
    res::Result,
    sys::root::Root,
    units::{HostPid, NsPid},
};

/// One root directory for each mount namespace of a tree.
#[derive(Clone, Debug, Default)]
pub struct Roots {
    /// That of the first process.
    home: Root,
    /// Those of all namespaces, if there are several, by the mounts of these and by their processes.
    by_mount: HashMap<i32, Root>,
    by_process: HashMap<NsPid, Root>,
}

impl Roots {
    /// Takes the root of the mount namespace of a process for that of the first process.
    ///
    /// # Errors
    /// The process is gone, or rcriu may not enter its mount namespace.
    pub fn set_home(&mut self, pid: HostPid) -> Result<()> {
        self.home = mnt::root_of(pid)?;
        Ok(())
    }

    /// Adds the root of a mount namespace, with its mounts and the processes in it.
    pub fn add(
        &mut self,
        root: &Root,
        mounts: impl IntoIterator<Item = i32>,
        processes: impl IntoIterator<Item = NsPid>,
    ) {
        self.by_mount.extend(mounts.into_iter().map(|mount| (mount, root.clone())));
        self.by_process.extend(processes.into_iter().map(|pid| (pid, root.clone())));
    }

    /// Returns the root of the namespace of the first process.
    pub fn home(&self) -> &Root {
        &self.home
    }

    /// Returns the root of the namespace that has this mount.
    pub fn of_mount(&self, mount: Option<i32>) -> &Root {
        mount.and_then(|mount| self.by_mount.get(&mount)).unwrap_or(&self.home)
    }

    /// Returns the root of the namespace that a process is in.
    pub fn of_process(&self, pid: NsPid) -> &Root {
        self.by_process.get(&pid).unwrap_or(&self.home)
    }

    /// Returns the root of the namespace that has this mount, or else of that of a process which has
    /// a file on it.
    pub fn of_file(&self, mount: i32, pid: NsPid) -> &Root {
        self.by_mount.get(&mount).unwrap_or_else(|| self.of_process(pid))
    }
}
