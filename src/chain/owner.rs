//! Whose images a chain is made of.

use std::{collections::HashMap, fs, os::unix::fs::MetadataExt, path::PathBuf};

use super::{Chain, ChainError, Result, SnapshotId};
use crate::{image::Kind, parallel};

/// Directories that take longer to look at than a thread takes to start.
const WORTH_A_THREAD: usize = 64;

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
    /// Finds the users who could have written the images of a chain
    /// ([`ImageStore::owner`](crate::image::ImageStore::owner)).
    pub fn of(chain: &Chain) -> Self {
        let snapshots = chain.snapshots();
        let owners = parallel::map(snapshots, WORTH_A_THREAD, |_, found| found.images.owner());
        let mut one = None;
        for (snapshot, owner) in snapshots.iter().zip(owners) {
            match owner {
                Some(owner) if *one.get_or_insert(owner) == owner => {}
                _ => return Self::Several { dir: snapshot.path().to_owned() },
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
            let inventory = chain.directory(id).ok()?.join(Kind::Inventory.file_name(0));
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
            dir: chain.snapshot(id).path().to_owned(),
            owner: owner(&id),
            child: chain.snapshot(*child).path().to_owned(),
            child_owner: owner(child),
        })
    }
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
