//! The owner of the images of a chain.

use std::{collections::HashMap, fs, os::unix::fs::MetadataExt, path::PathBuf};

use super::{Chain, ChainError, Result, SnapshotId};
use crate::{image::Kind, parallel};

/// With this many directories, examining them takes longer than starting a thread.
const WORTH_A_THREAD: usize = 64;

/// The owner of the images of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// This user owns all of them.
    One(u32),
    /// Several users own them, or could have put images into a directory.
    Several {
        /// A directory that shows it.
        dir: PathBuf,
    },
}

impl Owner {
    /// Determines which users could have written the images of a chain
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
        // A chain has at least one snapshot.
        one.map_or_else(|| Self::Several { dir: PathBuf::new() }, Self::One)
    }
}

/// Snapshots that have descendants of another user.
///
/// Pages may be freed only in other snapshots: any user can make a link called `parent`.
#[derive(Debug)]
pub(super) struct ForeignChildren {
    owners: HashMap<SnapshotId, u32>,
    /// Each such snapshot, and one of those descendants.
    found: HashMap<SnapshotId, SnapshotId>,
}

impl ForeignChildren {
    /// Examines all inventories of a chain.
    pub(super) fn of(chain: &Chain) -> Self {
        let owner = |id| {
            let inventory = chain.directory(id).ok()?.join(Kind::Inventory.file_name(0));
            fs::symlink_metadata(inventory).ok().map(|meta| (id, meta.uid()))
        };
        let owners: HashMap<_, _> = chain.ids().filter_map(owner).collect();
        let mut found = HashMap::new();
        // Children come after their parents.
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

    /// Checks that freeing pages of a snapshot harms no other user.
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
