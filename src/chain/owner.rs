//! Whose images a chain is made of.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{Chain, ChainError, Result, SnapshotId};
use crate::image::Kind;

/// Others may create files in a directory: `S_IWOTH`, `S_IWGRP` (`inode(7)`).
const OTHERS_WRITE: u32 = 0o002;
const GROUP_WRITES: u32 = 0o020;

/// Whose images a chain is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// All of this user.
    One(u32),
    /// Of several users, or in a directory where several can put some.
    Several {
        /// A directory where that shows.
        dir: PathBuf,
    },
}

impl Owner {
    /// Finds the users who could have written the files in the directories of a chain: the
    /// owners of the directories and of their inventories, and the users who can write
    /// there.
    ///
    /// A group that has the number of its directory's owner is taken for that user alone.
    pub fn of(chain: &Chain) -> Self {
        let mut one = None;
        for snapshot in chain.snapshots() {
            let dir = &snapshot.dir;
            match owner_of(dir) {
                Some(owner) if *one.get_or_insert(owner) == owner => {}
                _ => return Self::Several { dir: dir.clone() },
            }
        }
        // A chain has snapshots.
        one.map_or_else(|| Self::Several { dir: PathBuf::new() }, Self::One)
    }
}

/// Snapshots that have descendants of other users.
///
/// Pages may be freed in the others only: any user can make a link called `parent`.
#[derive(Debug)]
pub(super) struct ForeignChildren {
    owners: HashMap<SnapshotId, u32>,
    /// With such a descendant.
    found: HashMap<SnapshotId, SnapshotId>,
}

impl ForeignChildren {
    /// Looks at all inventories of a chain.
    pub(super) fn of(chain: &Chain) -> Self {
        let owner = |id| {
            let inventory = chain.image_path(id, Kind::Inventory, 0);
            fs::symlink_metadata(inventory).ok().map(|meta| (id, meta.uid()))
        };
        let owners: HashMap<_, _> = chain.ids().filter_map(owner).collect();
        let mut found = HashMap::new();
        // Each comes after its parent.
        let mut ids: Vec<_> = chain.ids().collect();
        ids.reverse();
        for child in ids {
            let Ok(Some(parent)) = chain.snapshot(child).parent else { continue };
            if owners.get(&child) != owners.get(&parent) {
                found.insert(parent, child);
            } else if let Some(below) = found.get(&child).copied() {
                found.entry(parent).or_insert(below);
            }
        }
        Self { owners, found }
    }

    /// Checks that pages may be freed in a snapshot.
    ///
    /// # Errors
    /// [`ChainError::ForeignChild`].
    pub(super) fn check(&self, chain: &Chain, id: SnapshotId) -> Result<()> {
        let Some(child) = self.found.get(&id) else { return Ok(()) };
        let owner = |id| self.owners.get(id).copied().unwrap_or(u32::MAX);
        Err(ChainError::ForeignChild {
            dir: chain.snapshot(id).dir.clone(),
            owner: owner(&id),
            child: chain.snapshot(*child).dir.clone(),
            child_owner: owner(child),
        })
    }
}

/// Returns the one user who can put files into an image directory.
fn owner_of(dir: &Path) -> Option<u32> {
    let meta = fs::symlink_metadata(dir).ok()?;
    let inventory = fs::symlink_metadata(dir.join(Kind::Inventory.file_name(0))).ok()?;
    let group = meta.mode() & GROUP_WRITES != 0 && meta.gid() != meta.uid();
    let alone = meta.mode() & OTHERS_WRITE == 0 && !group && inventory.uid() == meta.uid();
    alone.then(|| meta.uid())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::chain::testing::TestChain;

    #[test]
    fn whoever_can_write_to_a_directory_counts() {
        let mut disk = TestChain::new();
        let first = disk.push(&[]);
        disk.push(&[]);
        let me = nix::unistd::geteuid().as_raw();
        assert_eq!(Owner::of(&disk.open()), Owner::One(me));
        let dir = disk.dir(first);
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o1777)).unwrap();
        assert!(matches!(Owner::of(&disk.open()), Owner::Several { dir: found } if found == dir));
    }
}
