//! Bonds: whether the parent of a snapshot is still the dump that the snapshot was made on.
//!
//! Directory names do not show that: another dump may have replaced the parent. Every
//! inventory of CRIU 4.2 and of this program has an id of its dump, and this program
//! records the id of the parent in the child (`inventory_entry.rcriu_parent_run_id`, a
//! field of our own). For children that CRIU wrote, only dates and the time since boot give
//! a hint.

use std::{
    io::{self, Read},
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use xxhash_rust::xxh3::xxh3_128;

use super::{Chain, ChainError, LinkError, Snapshot, SnapshotId};
use crate::{
    image::{ImageError, ImageReader, ImageStore, Kind, proto, tree},
    parallel,
};

/// The beginning of the name of a dump without an id; the hash of its inventory follows.
const HASHED: &str = "inventory-xxh3:";

/// The most bytes that are read of an inventory: the longest message.
const INVENTORY_BYTES: u64 = 32 << 20;

/// With this many inventories, reading them takes longer than starting a thread.
const WORTH_A_THREAD: usize = 32;

/// The identity of a dump, according to its inventory.
#[derive(Clone, Debug)]
struct Identity {
    /// Its unique name.
    name: Vec<u8>,
    /// The name of its parent, if the dump recorded it.
    parent: Option<Vec<u8>>,
    version: u32,
    uptime: Option<Duration>,
}

/// The identities of the dumps of a chain, by position.
#[derive(Debug)]
pub(super) struct Bonds {
    identities: Vec<OnceLock<Option<Identity>>>,
}

impl Bonds {
    pub(super) fn new(snapshots: usize) -> Self {
        Self { identities: (0..snapshots).map(|_| OnceLock::new()).collect() }
    }
}

/// Returns the unique name of a dump, which its children record.
///
/// # Errors
/// An unreadable inventory.
pub fn dump_name(images: &dyn ImageStore) -> Result<Vec<u8>, ImageError> {
    read(images).map(|identity| identity.name)
}

/// Returns the id of a dump, if it has one.
pub(super) fn run_id(images: &dyn ImageStore) -> Option<Vec<u8>> {
    let inventory: proto::InventoryEntry = images.message(Kind::Inventory, 0).ok()?;
    inventory.dump_criu_run_id.filter(|id| !id.is_empty())
}

/// Reads an inventory with as few system calls as possible: a chain may have thousands.
fn read(images: &dyn ImageStore) -> Result<Identity, ImageError> {
    let path = images.path(Kind::Inventory, 0);
    let failed = |source| ImageError::Open { path: path.clone(), source };
    let bytes = bytes(images).map_err(failed)?;
    let reader = ImageReader::new(&path, &*bytes)?;
    reader.require(Kind::Inventory)?;
    let inventory: proto::InventoryEntry = reader.only()?;
    let own_id = inventory.dump_criu_run_id.filter(|id| !id.is_empty());
    let name = own_id.unwrap_or_else(|| format!("{HASHED}{:032x}", xxh3_128(&bytes)).into_bytes());
    let uptime = inventory.dump_uptime.map(Duration::from_micros);
    let (parent, version) = (inventory.rcriu_parent_run_id, inventory.img_version);
    Ok(Identity { name, parent, version, uptime })
}

/// Reads the bytes of an inventory.
fn bytes(images: &dyn ImageStore) -> io::Result<Vec<u8>> {
    let input = images.open(&Kind::Inventory.file_name(0))?;
    // One byte more, so that the read that detects the end has room.
    let len = usize::try_from(input.len.min(INVENTORY_BYTES)).unwrap_or(0);
    let mut bytes = Vec::with_capacity(len + 1);
    let mut input = input.bytes.take(INVENTORY_BYTES + 1);
    if input.read_to_end(&mut bytes)? as u64 > INVENTORY_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

impl Chain {
    /// Checks that this program knows the format version of a snapshot's images. An
    /// unreadable inventory passes: the code that needs it reports the error.
    ///
    /// # Errors
    /// [`ChainError::Version`].
    pub fn require_version(&self, id: SnapshotId) -> Result<(), ChainError> {
        let Snapshot { images, .. } = self.snapshot(id);
        let this = self.identity(id);
        match this.and_then(|this| tree::version_problem(&**images, this.version)) {
            Some(problem) => Err(ChainError::Version { dir: images.name().to_owned(), problem }),
            None => Ok(()),
        }
    }

    /// Checks that the parent of a snapshot, if there is one, is the dump that the snapshot
    /// was made on, if the snapshot recorded that.
    ///
    /// # Errors
    /// [`LinkError::Replaced`].
    pub fn require_bond(&self, id: SnapshotId) -> Result<(), LinkError> {
        let Ok(Some(parent)) = self.snapshot(id).parent else { return Ok(()) };
        let Some(expected) = self.identity(id).and_then(|child| child.parent.as_ref()) else {
            return Ok(());
        };
        let found = self.identity(parent).map(|parent| &parent.name);
        if found == Some(expected) {
            return Ok(());
        }
        let text = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
        Err(LinkError::Replaced {
            dir: self.snapshot(id).path().to_owned(),
            parent: self.snapshot(parent).path().to_owned(),
            found: found
                .map_or_else(|| "a dump without a readable inventory".into(), |id| text(id)),
            expected: text(expected),
        })
    }

    /// Does both checks for many snapshots, except for the parent of the last, and returns
    /// the first error.
    ///
    /// # Errors
    /// [`ChainError::Version`], [`LinkError::Replaced`].
    pub(super) fn require_layers(&self, ids: &[SnapshotId]) -> Result<(), ChainError> {
        let look = |position: usize, id: &SnapshotId| {
            self.require_version(*id)?;
            if position + 1 < ids.len() {
                self.require_bond(*id)?;
            }
            Ok(())
        };
        parallel::map(ids, WORTH_A_THREAD, look).into_iter().collect()
    }

    /// Whether a snapshot that did not record its parent is older than the parent, by date
    /// and by time since boot. Copying changes dates and booting resets the time since
    /// boot, so this is only a suspicion.
    pub fn is_older_than_parent(&self, id: SnapshotId) -> bool {
        let Ok(Some(above)) = self.snapshot(id).parent else { return false };
        let (Some(child), Some(parent)) = (self.identity(id), self.identity(above)) else {
            return false;
        };
        let earlier = |pair: Option<(Duration, Duration)>| pair.is_some_and(|(a, b)| a < b);
        child.parent.is_none()
            && earlier(child.uptime.zip(parent.uptime))
            && self.date(id).zip(self.date(above)).is_some_and(|(child, parent)| child < parent)
    }

    /// Returns when a snapshot was completed.
    fn date(&self, id: SnapshotId) -> Option<SystemTime> {
        self.images(id).stat(&Kind::Inventory.file_name(0)).map(|stat| stat.modified).ok()
    }

    fn identity(&self, id: SnapshotId) -> Option<&Identity> {
        let place = &self.bonds().identities[id.position()];
        place.get_or_init(|| read(&**self.images(id)).ok()).as_ref()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::Path};

    use super::*;
    use crate::image::{Directory, ImageWriter};

    fn snapshot(root: &Path, name: &str, entry: proto::InventoryEntry) {
        let dir = root.join(name);
        let _ = fs::create_dir(&dir);
        let path = dir.join("inventory.img");
        let _ = fs::remove_file(&path);
        let mut image = ImageWriter::create(&path, Kind::Inventory).unwrap();
        image.message(&entry).unwrap();
        image.finish().unwrap();
    }

    fn entry(id: Option<&str>, uptime: u64) -> proto::InventoryEntry {
        proto::InventoryEntry {
            dump_criu_run_id: id.map(|id| id.as_bytes().to_vec()),
            dump_uptime: Some(uptime),
            img_version: 2,
            ..Default::default()
        }
    }

    #[test]
    fn a_parent_that_was_replaced_is_told_whoever_wrote_it() {
        // The parent has an id; its inventory is replaced by one without.
        for parent_id in [Some("first"), None] {
            let root = tempfile::tempdir().unwrap();
            let root = root.path();
            snapshot(root, "1", entry(parent_id, 10));
            let name = dump_name(&Directory::at(root.join("1"))).unwrap();
            let child =
                proto::InventoryEntry { rcriu_parent_run_id: Some(name), ..entry(Some("b"), 20) };
            snapshot(root, "2", child);
            symlink("../1", root.join("2/parent")).unwrap();
            let bond = || {
                let chain = Chain::open(root).unwrap();
                let tip = chain.find("2").unwrap();
                (
                    chain.require_bond(tip).map_err(|e| e.to_string()),
                    chain.is_older_than_parent(tip),
                )
            };
            assert_eq!(bond(), (Ok(()), false));
            snapshot(root, "1", entry(parent_id.map(|_| "second"), 30));
            let why = bond().0.unwrap_err();
            assert!(why.contains("is not the snapshot that"), "{why}");
        }
    }

    #[test]
    fn a_child_that_recorded_nothing_is_older_only_if_all_says_so() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (uptime, newer, expected) in [(30, true, true), (5, true, false), (30, false, false)] {
            snapshot(root, "2", entry(None, 20));
            let _ = symlink("../1", root.join("2/parent"));
            snapshot(root, "1", entry(Some("a"), uptime));
            let late = if newer { "2" } else { "1" };
            let file = fs::File::options().write(true).open(root.join(late).join("inventory.img"));
            file.unwrap().set_modified(old).unwrap();
            let chain = Chain::open(root).unwrap();
            let tip = chain.find("2").unwrap();
            assert_eq!(chain.is_older_than_parent(tip), expected, "{uptime} {newer}");
            chain.require_bond(tip).unwrap();
        }
    }
}
