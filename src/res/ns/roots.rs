//! The root directories in which the paths of a tree are looked up.

use std::collections::HashMap;

use super::mnt;
use crate::{
    res::Result,
    sys::root::Root,
    units::{HostPid, IdMap, NsPid},
};

/// One root directory for each mount namespace of a tree.
#[derive(Clone, Debug)]
pub struct Roots {
    /// That of the namespace of the first process comes first.
    spaces: Vec<Space>,
    /// Positions in `spaces`.
    by_mount: HashMap<i32, usize>,
    by_process: HashMap<NsPid, usize>,
}

#[derive(Clone, Debug, Default)]
struct Space {
    root: Root,
    /// The number of its root mount, unless it is rcriu's.
    mount: Option<i32>,
}

impl Default for Roots {
    fn default() -> Self {
        let (by_mount, by_process) = Default::default();
        Self { spaces: vec![Space::default()], by_mount, by_process }
    }
}

impl Roots {
    /// Takes the root of the mount namespace of a process for that of the first process. `ids` are the users
    /// and groups of the tree.
    ///
    /// # Errors
    /// The process is gone, or rcriu may not enter its mount namespace.
    pub fn set_home(&mut self, pid: HostPid, ids: &IdMap) -> Result<()> {
        self.spaces[0].root = mnt::root_of(pid, ids)?;
        Ok(())
    }

    /// Adds the mounts of the namespace of the first process, the root mount first.
    pub fn add_to_home(&mut self, mounts: impl IntoIterator<Item = i32>) {
        self.learn(0, mounts);
    }

    /// Adds another namespace: its root, its mounts, the root mount first, and the processes in it.
    pub fn add(
        &mut self,
        root: &Root,
        mounts: impl IntoIterator<Item = i32>,
        processes: impl IntoIterator<Item = NsPid>,
    ) {
        let space = self.spaces.len();
        self.spaces.push(Space { root: root.clone(), mount: None });
        self.learn(space, mounts);
        self.by_process.extend(processes.into_iter().map(|pid| (pid, space)));
    }

    fn learn(&mut self, space: usize, mounts: impl IntoIterator<Item = i32>) {
        let mut mounts = mounts.into_iter().peekable();
        if !self.spaces[space].root.is_own() {
            self.spaces[space].mount = mounts.peek().copied();
        }
        self.by_mount.extend(mounts.map(|mount| (mount, space)));
    }

    /// Whether the tree has several mount namespaces.
    pub fn are_several(&self) -> bool {
        self.spaces.len() > 1
    }

    /// Returns the position of the namespace that has this mount, or else of that of a process.
    pub fn position(&self, mount: i32, pid: NsPid) -> usize {
        let space = self.by_mount.get(&mount).copied();
        space.unwrap_or_else(|| self.position_of_process(pid))
    }

    /// Returns the position of the namespace that a process is in.
    pub fn position_of_process(&self, pid: NsPid) -> usize {
        self.by_process.get(&pid).copied().unwrap_or(0)
    }

    /// Returns the root of the namespace that has this mount.
    pub fn of_mount(&self, mount: Option<i32>) -> &Root {
        let space = mount.and_then(|mount| self.by_mount.get(&mount));
        &self.spaces[space.copied().unwrap_or(0)].root
    }

    /// Returns the root of the namespace that a process is in.
    pub fn of_process(&self, pid: NsPid) -> &Root {
        &self.spaces[self.position_of_process(pid)].root
    }

    /// Returns the position of the namespace below whose root a file is that a process has. The file may
    /// be on a mount of none: it was opened before the process, or another of the tree, came into its
    /// namespace. Then it is in the one where its path leads to it.
    pub fn position_of_file(
        &self,
        mount: i32,
        pid: NsPid,
        is_there: impl Fn(&Root) -> bool,
    ) -> usize {
        let position = self.position(mount, pid);
        let is_certain = position == 0 || self.by_mount.contains_key(&mount);
        let is_at_home =
            || !is_there(&self.spaces[position].root) && is_there(&self.spaces[0].root);
        if !is_certain && is_at_home() { 0 } else { position }
    }

    /// Returns the root of the namespace at a position.
    pub fn root(&self, position: usize) -> &Root {
        &self.spaces[position].root
    }

    /// Returns the number of a mount as images name it for a file in the namespace at a position, which
    /// has another one if the file is on a mount of none. `None` in the namespace of rcriu, of which
    /// images have no mounts.
    pub fn mount_at(&self, position: usize, mount: i32) -> Option<i32> {
        let space = &self.spaces[position];
        space.mount.map(|root| if self.by_mount.contains_key(&mount) { mount } else { root })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_belongs_to_the_namespace_of_its_mount_or_else_of_its_process() {
        let other = || Root::at(std::fs::File::open("/").unwrap().into());
        let at = |roots: &Roots, mount, pid, is_there| {
            let position = roots.position_of_file(mount, pid, |_| is_there);
            (roots.root(position).is_own(), roots.mount_at(position, mount))
        };
        let (first, child) = (NsPid::of_image(1), NsPid::of_image(2));
        let mut roots = Roots::default();
        assert_eq!(at(&roots, 7, first, true), (true, None));
        roots.add_to_home([1, 2]);
        roots.add(&other(), [11, 12], [child]);
        assert_eq!(at(&roots, 2, child, false), (true, None));
        assert_eq!(at(&roots, 12, first, false), (false, Some(12)));
        assert_eq!(at(&roots, 99, first, true), (true, None));
        assert_eq!(at(&roots, 99, child, true), (false, Some(11)));
        let only_at_home = roots.position_of_file(99, child, Root::is_own);
        assert!(roots.root(only_at_home).is_own());
        assert!(!roots.of_process(child).is_own() && roots.of_mount(None).is_own());
    }
}
