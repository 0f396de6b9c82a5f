//! Image directories and the parent links between them.

use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Arc, RwLockReadGuard},
};

use nix::sys::resource::{Resource, getrlimit};

use super::{
    ChainError, FileId, Files, Index, LinkError, Result, bonds::Bonds, cache::IndexCache,
    discovery::Discovery, freed::Freed, readable::Readable,
};
use crate::{
    image::{
        ImageStore, Kind, MemoryId, PARENT_LINK, Store,
        store::{self, Cache, Found, Opening, Probe},
    },
    parallel,
};

/// With this many directories, examining them takes longer than starting a thread.
const WORTH_A_THREAD: usize = 32;

/// How many files of a chain are kept open, if the process may open twice as many: the
/// other half is for active requests and other parts of the program.
const OPEN_FILES: u64 = 2048;

/// The number of a snapshot in its chain: its position in [`Chain::snapshots`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotId(u32);

impl SnapshotId {
    pub(super) fn at(position: usize) -> Self {
        Self(u32::try_from(position).expect("fewer snapshots than 2^32"))
    }

    /// Returns the snapshot's position among the chain's snapshots.
    pub fn position(self) -> usize {
        self.0 as usize
    }
}

/// A snapshot of a chain.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its name, which is unique in the chain.
    pub name: String,
    /// Its images.
    pub images: Store,
    /// The snapshot that has the pages which this one does not hold.
    pub parent: Result<Option<SnapshotId>, LinkError>,
}

impl Snapshot {
    /// Returns the path of the snapshot in messages: the absolute path of its directory,
    /// without symbolic links.
    pub fn path(&self) -> &Path {
        self.images.name()
    }

    /// Returns its directory, if its images are in one.
    pub fn directory(&self) -> Option<&Path> {
        self.images.directory()
    }
}

/// Snapshots with their links: a single path from tip to base, or several paths that share
/// their beginnings.
#[derive(Debug)]
pub struct Chain {
    snapshots: Vec<Snapshot>,
    unfinished: Vec<PathBuf>,
    files: Files,
    indexes: IndexCache,
    pub(super) readable: Readable,
    freed: Freed,
    bonds: Bonds,
    cache: Cache,
}

impl Chain {
    /// Opens the chain at `path`: an image directory with its ancestors, or a
    /// directory of image directories with theirs.
    ///
    /// Reads only links, no images. A broken link is kept with its snapshot; it is an error
    /// only when a page behind it is needed.
    ///
    /// # Errors
    /// [`ChainError::Directory`], [`ChainError::NoImages`].
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |source| ChainError::Directory { path: path.to_owned(), source };
        Self::of_place(path, store::find(path).map_err(failed)?)
    }

    /// Opens the chain at `path` as [`Self::open`] does, or the one in an archive there.
    ///
    /// # Errors
    /// As [`Self::open`]; [`ChainError::Archive`].
    pub fn open_anywhere(path: &Path, opening: &Opening) -> Result<Self> {
        let failed = |source: std::io::Error| {
            let path = path.to_owned();
            if source.kind() == std::io::ErrorKind::NotFound {
                ChainError::Missing { path, source }
            } else if path.is_dir() {
                ChainError::Directory { path, source }
            } else {
                ChainError::Archive { path, source }
            }
        };
        let chain = Self::of_place(path, store::find_anywhere(path, opening).map_err(failed)?)?;
        Ok(Self { cache: opening.cache.clone(), ..chain })
    }

    fn of_place(path: &Path, place: Found) -> Result<Self> {
        let mut found = Discovery::default();
        let mut unfinished = Vec::new();
        match place {
            Found::Snapshot(images) => drop(found.enter(images)),
            Found::Several(dirs) => {
                let probes = parallel::map(&dirs, WORTH_A_THREAD, |_, dir| dir.probe());
                found.reserve(dirs.len());
                for (dir, probe) in dirs.into_iter().zip(probes) {
                    match probe {
                        Probe::Snapshot { parent } => {
                            let position = found.enter(dir.shared());
                            found.links[position] = parent;
                        }
                        Probe::Unfinished => unfinished.push(dir.name().to_owned()),
                        Probe::Nothing => {}
                    }
                }
            }
            Found::Archived(archived) => {
                found.reserve(archived.snapshots.len());
                for images in archived.snapshots {
                    found.enter(images);
                }
                unfinished = archived.unfinished;
            }
        }
        if found.snapshots.is_empty() {
            return Err(ChainError::NoImages { path: path.to_owned() });
        }
        Ok(Self::of_found(found, unfinished))
    }

    /// Opens the chain that ends with a snapshot, in any kind of store.
    pub fn of(images: Store) -> Self {
        let mut found = Discovery::default();
        found.enter(images);
        Self::of_found(found, Vec::new())
    }

    fn of_found(mut found: Discovery, unfinished: Vec<PathBuf>) -> Self {
        found.follow_links();
        found.break_circles();
        let snapshots = found.sorted();
        Self {
            bonds: Bonds::new(snapshots.len()),
            snapshots,
            unfinished,
            files: Files::new(open_files()),
            indexes: IndexCache::default(),
            readable: Readable::default(),
            freed: Freed::default(),
            cache: Cache::default(),
        }
    }

    /// Returns all snapshots, each after its parent.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    /// Returns the directories beside the snapshots that hold images but no inventory: the
    /// remains of failed dumps.
    pub fn unfinished(&self) -> &[PathBuf] {
        &self.unfinished
    }

    /// Returns the numbers of all snapshots, in the order of [`Self::snapshots`].
    pub fn ids(&self) -> impl Iterator<Item = SnapshotId> + use<> {
        (0..self.snapshots.len()).map(SnapshotId::at)
    }

    /// Returns the snapshot with this number.
    pub fn snapshot(&self, id: SnapshotId) -> &Snapshot {
        &self.snapshots[id.position()]
    }

    /// Returns the images of a snapshot.
    pub fn images(&self, id: SnapshotId) -> &Store {
        &self.snapshot(id).images
    }

    /// Returns the directory of a snapshot, for changing it.
    ///
    /// # Errors
    /// [`ChainError::ReadOnly`] if its images are not in a directory.
    pub fn directory(&self, id: SnapshotId) -> Result<&Path> {
        let snapshot = self.snapshot(id);
        let read_only = || ChainError::ReadOnly { path: snapshot.path().to_owned() };
        snapshot.directory().ok_or_else(read_only)
    }

    /// Returns the files that hold the chain's bytes.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// Returns where compressed contents are unpacked.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    pub(super) fn bonds(&self) -> &Bonds {
        &self.bonds
    }

    /// Returns the pages that were freed after the chain was opened.
    pub(super) fn freed(&self) -> &Freed {
        &self.freed
    }

    /// Whether pages were freed after the chain was opened.
    pub fn has_freed(&self) -> bool {
        !self.freed.is_empty()
    }

    /// Keeps this program from freeing pages until the guard is dropped. If another thread
    /// may free pages, a reader holds the guard from looking up where bytes are until it
    /// has read them.
    pub fn reading(&self) -> RwLockReadGuard<'_, ()> {
        self.freed.reading()
    }

    /// Checks that no page of a snapshot was freed, so that all of it is readable.
    ///
    /// # Errors
    /// [`ChainError::Punched`] for the first freed page; errors of [`Self::index`].
    pub fn require_whole(&self, id: SnapshotId) -> Result<()> {
        for memory in self.memories(id)? {
            self.index(id, memory)?.require_whole(self)?;
        }
        Ok(())
    }

    /// Returns the snapshots without children.
    pub fn tips(&self) -> Vec<SnapshotId> {
        let mut tip = vec![true; self.snapshots.len()];
        for snapshot in &self.snapshots {
            if let Ok(Some(parent)) = snapshot.parent {
                tip[parent.position()] = false;
            }
        }
        self.ids().filter(|id| tip[id.position()]).collect()
    }

    /// Returns the snapshots whose parent is absent or cannot be found. Users of a chain
    /// lock these.
    pub fn bases(&self) -> impl Iterator<Item = SnapshotId> + '_ {
        self.ids().filter(|id| !matches!(self.snapshot(*id).parent, Ok(Some(_))))
    }

    /// Returns the oldest ancestor of a snapshot that can be found; the snapshot itself if
    /// there is none.
    pub fn base(&self, id: SnapshotId) -> SnapshotId {
        let mut base = id;
        while let Ok(Some(parent)) = self.snapshot(base).parent {
            base = parent;
        }
        base
    }

    /// Returns the snapshot called `name`; without a name, the only tip.
    ///
    /// # Errors
    /// [`ChainError::NoSuchSnapshot`], [`ChainError::SeveralTips`],
    /// [`ChainError::NoTip`].
    pub fn choose(&self, name: Option<&str>) -> Result<SnapshotId> {
        if let Some(name) = name {
            return self.find(name).ok_or_else(|| ChainError::NoSuchSnapshot {
                name: name.to_owned(),
                known: self.names(self.ids()),
            });
        }
        match self.tips().as_slice() {
            [tip] => Ok(*tip),
            [] => Err(ChainError::NoTip),
            tips => Err(ChainError::SeveralTips { tips: self.names(tips.iter().copied()) }),
        }
    }

    /// Returns the snapshot called `name`.
    pub fn find(&self, name: &str) -> Option<SnapshotId> {
        self.ids().find(|id| self.snapshot(*id).name == name)
    }

    /// Returns the snapshot with this path in messages: the canonical path of its
    /// directory.
    pub fn at(&self, path: &Path) -> Option<SnapshotId> {
        self.ids().find(|id| self.snapshot(*id).path() == path)
    }

    fn names(&self, ids: impl Iterator<Item = SnapshotId>) -> String {
        let names: Vec<&str> = ids.map(|id| self.snapshot(id).name.as_str()).collect();
        names.join(", ")
    }

    /// Returns the path of an image of a snapshot in messages.
    pub fn image_path(&self, id: SnapshotId, kind: Kind, number: u64) -> PathBuf {
        self.images(id).path(kind, number)
    }

    /// Adds a pages file of a snapshot to [`Self::files`].
    pub(crate) fn enter_pages(&self, id: SnapshotId, pages_id: u32) -> FileId {
        self.files.enter(self.images(id), &Kind::Pages.file_name(pages_id.into()))
    }

    /// Returns the names of all files of a snapshot, in no particular order.
    ///
    /// # Errors
    /// [`ChainError::Directory`].
    pub fn list(&self, id: SnapshotId) -> Result<Vec<String>> {
        let path = || self.snapshot(id).path().to_owned();
        let names = self.images(id).list();
        names.map_err(|source| ChainError::Directory { path: path(), source })
    }

    /// Resolves one memory of a snapshot across its ancestors, or returns it from the
    /// cache.
    ///
    /// # Errors
    /// As [`Index::build`].
    pub fn index(&self, id: SnapshotId, memory: MemoryId) -> Result<Arc<Index>> {
        self.indexes.get((id, memory), || Index::build(self, id, memory))
    }
}

/// Returns how many files to keep open.
fn open_files() -> NonZeroUsize {
    let (allowed, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    let half = usize::try_from((allowed / 2).min(OPEN_FILES)).unwrap_or(0);
    NonZeroUsize::new(half).unwrap_or(NonZeroUsize::MIN)
}

/// Returns the image directories beside `dir` whose parent is `dir`, sorted. Those
/// elsewhere cannot be found.
///
/// # Errors
/// [`ChainError::Directory`].
pub fn children(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        |source| ChainError::Directory { path, source }
    };
    let dir = dir.canonicalize().map_err(failed(dir))?;
    let Some(above) = dir.parent() else { return Ok(Vec::new()) };
    let mut beside = store::directories(above).map_err(failed(above))?;
    beside.sort_unstable();
    beside.dedup();
    let found = parallel::map(&beside, WORTH_A_THREAD, |_, other| {
        // Only a link can lead to `dir`: a directory of that name is a copy.
        let link = other.join(PARENT_LINK);
        fs::read_link(&link).is_ok()
            && store::has_inventory(other)
            && link.canonicalize().is_ok_and(|parent| parent == dir)
    });
    Ok(beside
        .into_iter()
        .zip(found)
        .filter_map(|(other, is_child)| is_child.then_some(other))
        .collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::image::proto::InventoryEntry;

    /// Makes directories with inventories and the given parent links.
    fn chain(links: &[(&str, Option<&str>)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, parent) in links {
            let dir = root.path().join(name);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("inventory.img"), "").unwrap();
            if let Some(parent) = parent {
                symlink(parent, dir.join("parent")).unwrap();
            }
        }
        root
    }

    fn order(chain: &Chain) -> Vec<&str> {
        chain.snapshots().iter().map(|snapshot| snapshot.name.as_str()).collect()
    }

    #[test]
    fn parents_come_first_and_numbers_are_numbers() {
        let root = chain(&[
            ("10", Some("../9")),
            ("9", Some("../1")),
            ("2", Some("../1")),
            ("1", None),
            ("0-late", Some("../10")),
        ]);
        let chain = Chain::open(root.path()).unwrap();
        assert_eq!(order(&chain), ["1", "2", "9", "10", "0-late"]);
        let tips = chain.choose(None).unwrap_err().to_string();
        assert_eq!(tips, "the chain has several tips: 2, 0-late\nhelp: choose one with --snapshot");
        assert_eq!(chain.snapshot(chain.choose(Some("9")).unwrap()).name, "9");
        let missing = chain.choose(Some("x")).unwrap_err().to_string();
        assert_eq!(missing, "no snapshot is called \"x\"\nhelp: choose one of 1, 2, 9, 10, 0-late");
    }

    #[test]
    fn an_image_directory_brings_its_ancestors() {
        let root = chain(&[("a", None), ("b", Some("../a")), ("c", Some("../b"))]);
        let chain = Chain::open(&root.path().join("b")).unwrap();
        assert_eq!(order(&chain), ["a", "b"]);
        assert_eq!(chain.snapshot(chain.choose(None).unwrap()).name, "b");
    }

    #[test]
    fn links_and_names_that_meet_are_kept_apart() {
        let root = chain(&[("1", None), ("2", Some("../elsewhere/1"))]);
        symlink("2", root.path().join("latest")).unwrap();
        let elsewhere = root.path().join("elsewhere/1");
        fs::create_dir_all(&elsewhere).unwrap();
        fs::write(elsewhere.join("inventory.img"), "").unwrap();
        let chain = Chain::open(root.path()).unwrap();
        assert_eq!(order(&chain), ["1", "1~2", "2"]);
    }

    #[test]
    fn an_absolute_link_is_followed() {
        let elsewhere = chain(&[("1", None)]);
        let parent = elsewhere.path().join("1");
        let root = chain(&[("2", parent.to_str())]);
        let chain = Chain::open(root.path()).unwrap();
        assert_eq!(order(&chain), ["1", "2"]);
        assert_eq!(chain.base(chain.choose(None).unwrap()), chain.find("1").unwrap());
        assert_eq!(children(&parent).unwrap(), [] as [PathBuf; 0]);
    }

    /// Copies a directory like `cp -rL`.
    fn copy_following_links(from: &Path, to: &Path) {
        fs::create_dir(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
            if from.is_dir() {
                copy_following_links(&from, &to);
            } else {
                fs::copy(&from, &to).unwrap();
            }
        }
    }

    #[test]
    fn a_chain_that_was_copied_with_its_links_followed_is_the_same_chain() {
        let root = chain(&[("1", None), ("2", Some("../1")), ("3", Some("../2"))]);
        let write = |name: &str, id: Option<&str>| {
            let path = root.path().join(name).join("inventory.img");
            fs::remove_file(&path).unwrap();
            let mut image = crate::image::ImageWriter::create(&path, Kind::Inventory).unwrap();
            let dump_criu_run_id = id.map(|id| id.as_bytes().to_vec());
            let entry = InventoryEntry { dump_criu_run_id, img_version: 2, ..Default::default() };
            image.message(&entry).unwrap();
            image.finish().unwrap();
        };
        ["1", "2", "3"].iter().for_each(|name| write(name, Some(name)));
        assert_eq!(children(&root.path().join("1")).unwrap(), [root.path().join("2")]);
        let copies = tempfile::tempdir().unwrap();
        let copy = copies.path().join("copy");
        copy_following_links(root.path(), &copy);
        let opened = Chain::open(&copy).unwrap();
        assert_eq!(order(&opened), ["1", "2", "3"]);
        assert_eq!(opened.choose(None).unwrap(), opened.find("3").unwrap());
        // Only one of them.
        assert_eq!(order(&Chain::open(&copy.join("3")).unwrap()), ["parent~2", "parent", "3"]);
        // A copy that differs is a snapshot of its own, and so is a dump without an id.
        fs::write(copy.join("2/parent/core-1.img"), "").unwrap();
        assert_eq!(Chain::open(&copy).unwrap().snapshots().len(), 4);
        ["1", "2", "3"].iter().for_each(|name| write(name, None));
        let copy = copies.path().join("without");
        copy_following_links(root.path(), &copy);
        assert_eq!(Chain::open(&copy).unwrap().tips().len(), 3);
    }

    #[test]
    fn bad_links_are_kept_with_who_has_them() {
        let root = chain(&[
            ("absolute", Some("/nowhere/at/all")),
            ("dangling", Some("../nowhere")),
            ("plain", Some("../nothing")),
            ("x", Some("../y")),
            ("y", Some("../z")),
            ("z", Some("../y")),
            ("self", Some(".")),
        ]);
        fs::create_dir(root.path().join("nothing")).unwrap();
        let chain = Chain::open(root.path()).unwrap();
        let problem = |name: &str| {
            let id = chain.find(name).unwrap();
            chain.snapshot(id).parent.as_ref().map_err(ToString::to_string).map(Option::is_some)
        };
        assert!(problem("absolute").unwrap_err().contains("leads to /nowhere/at/all: No such"));
        assert!(problem("dangling").unwrap_err().contains("leads to ../nowhere: No such file"));
        assert!(problem("plain").unwrap_err().contains("has no inventory.img"));
        assert_eq!(problem("x"), Ok(true));
        for circular in ["y", "z", "self"] {
            assert!(problem(circular).unwrap_err().contains("form a cycle"), "{circular}");
        }
    }

    #[test]
    fn places_without_images_are_errors() {
        let root = tempfile::tempdir().unwrap();
        let problem = Chain::open(root.path()).unwrap_err().to_string();
        assert!(problem.starts_with("no image directory at "), "{problem}");
        assert!(matches!(
            Chain::open(&root.path().join("gone")),
            Err(ChainError::Directory { .. })
        ));
    }
}
