//! Freeing pages in the files that hold them, so that no reader gets zeros for them.
//!
//! The order is always the same, and all of it is here: the pages are gone for readers of
//! this program ([`Chain`] knows them), the journals name them, the journals are on disk,
//! and only then are they freed. A crash in between leaves pages that are gone though their
//! bytes are there, so pages may only be noted when another lasting place has them, or when
//! they are no longer needed. The next program that opens the file for freeing finishes
//! what was left.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::unistd::{AccessFlags, access};

use super::{
    Chain, ChainError, FileId, Index, Layer, Place, Result, SnapshotId, owner::ForeignChildren,
};
use crate::{
    fault::{self, Point},
    image::{Disk, Kind, MemoryId, punched::JournalWriter},
    units::{PAGE_SIZE, PageRanges, page_bytes},
};

/// The pages that were freed since a chain was opened, which indexes that were
/// built before do not know.
#[derive(Debug, Default)]
pub(super) struct Freed {
    any: AtomicBool,
    files: RwLock<HashMap<FileId, PageRanges>>,
    /// Held for reading while files are read of which pages may be freed.
    reading: RwLock<()>,
}

impl Freed {
    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Acquire)
    }

    /// Splits pages of a file into those that are there and those that are gone,
    /// which is the second value.
    pub(super) fn split(&self, file: FileId, pages: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        match files.get(&file) {
            Some(gone) => gone.split(pages).collect(),
            None => vec![(pages, false)],
        }
    }

    /// Keeps pages from being freed until the guard is dropped.
    pub(super) fn reading(&self) -> RwLockReadGuard<'_, ()> {
        self.reading.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks pages as gone. When this returns, all reads that began before have ended.
    fn add(&self, file: FileId, pages: &PageRanges) {
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        files.entry(file).or_default().extend(pages);
        drop(files);
        self.any.store(true, Ordering::Release);
        drop(self.reading.write().unwrap_or_else(PoisonError::into_inner));
    }
}

/// A pages file whose pages are freed.
#[derive(Debug)]
struct Target {
    path: PathBuf,
    id: FileId,
    pages: u64,
    journal: JournalWriter,
    /// Not named by the journal on disk yet.
    noted: PageRanges,
    /// To be freed.
    ready: PageRanges,
    /// Freed by us.
    done: PageRanges,
}

/// Frees pages of a chain's files.
///
/// [`Self::prepare`] for every file that may have some, then [`Self::note`] pages,
/// [`Self::sync`] and [`Self::free`], as often as need be. The caller holds the locks of
/// the directories.
#[derive(Debug)]
pub struct Freeing {
    chain: Arc<Chain>,
    disk: Arc<dyn Disk>,
    /// By snapshot and `pages_id`.
    targets: BTreeMap<(SnapshotId, u32), Target>,
    foreign: ForeignChildren,
}

impl Freeing {
    /// Begins to free pages of `chain` by way of `disk`.
    pub fn new(chain: Arc<Chain>, disk: Arc<dyn Disk>) -> Self {
        let foreign = ForeignChildren::of(&chain);
        Self { chain, disk, targets: BTreeMap::new(), foreign }
    }

    /// Opens the pages file of a layer of `memory`, and its journal. Nothing is
    /// changed. What an earlier run has named and may not have freed is taken up.
    ///
    /// # Errors
    /// [`ChainError::NoPunching`] if the file system cannot free parts of a file,
    /// [`ChainError::Free`] if the file cannot be written, [`ChainError::Image`] for
    /// a journal that cannot be trusted.
    pub fn prepare(&mut self, memory: MemoryId, layer: &Layer) -> Result<()> {
        let key = (layer.snapshot, layer.pages_id);
        if self.targets.contains_key(&key) {
            return Ok(());
        }
        self.foreign.check(&self.chain, layer.snapshot)?;
        let dir = self.chain.directory(layer.snapshot)?;
        let path = dir.join(Kind::Pages.file_name(layer.pages_id.into()));
        let failed = |step| {
            let path = path.clone();
            move |source| ChainError::Free { path, step, source }
        };
        let file = self.disk.open(&path).map_err(failed("open for writing"))?;
        let len = file.file().metadata().map_err(failed("look at"))?.len();
        // There is nothing behind the end, so nothing is changed.
        let end = len.next_multiple_of(PAGE_SIZE);
        self.disk.punch(&file, end..end + PAGE_SIZE).map_err(|source| {
            match source.raw_os_error() {
                Some(nix::libc::EOPNOTSUPP | nix::libc::ENOSYS) => {
                    ChainError::NoPunching { path: path.clone() }
                }
                _ => ChainError::Free { path: path.clone(), step: "free pages of", source },
            }
        })?;
        access(dir, AccessFlags::W_OK).map_err(|errno| ChainError::Free {
            path: dir.to_owned(),
            step: "make a journal in",
            source: errno.into(),
        })?;
        let pagemap = memory.pagemap_name();
        let journal = JournalWriter::open(dir, &pagemap, layer.pages_id)?;
        let pages = layer.pages.min(len.div_ceil(PAGE_SIZE));
        let noted: PageRanges = journal.pages().within(0..pages).collect();
        let id = layer.file;
        let (ready, done) = (PageRanges::new(), PageRanges::new());
        self.targets.insert(key, Target { path, id, pages, journal, noted, ready, done });
        Ok(())
    }

    /// Prepares all files that `index` finds pages in.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub fn prepare_all(&mut self, index: &Index) -> Result<()> {
        let mut used = vec![false; index.layers().len()];
        for extent in index.extents() {
            if let Place::Stored { layer, .. } | Place::Punched { layer, .. } = extent.place {
                used[layer as usize] = true;
            }
        }
        let used = index.layers().iter().zip(used).filter(|(_, used)| *used);
        used.map(|(layer, _)| layer).try_for_each(|layer| self.prepare(index.memory(), layer))
    }

    /// Notes pages of a file to be freed: `pages` are those of the *file*. Those
    /// behind its end, and those that were freed by this, are left out.
    ///
    /// Only pages that another lasting place has, or that are no longer needed, may be
    /// noted.
    ///
    /// # Errors
    /// As [`Self::prepare`], if that was not called for the layer before.
    pub fn note(&mut self, memory: MemoryId, layer: &Layer, pages: Range<u64>) -> Result<()> {
        self.prepare(memory, layer)?;
        let target = self.targets.get_mut(&(layer.snapshot, layer.pages_id));
        let target = target.expect("it was prepared");
        for (part, done) in target.done.split(pages.start..pages.end.min(target.pages)) {
            if !done {
                target.noted.insert(part);
            }
        }
        Ok(())
    }

    /// Returns how many pages are noted and not freed yet.
    pub fn noted_pages(&self) -> u64 {
        self.targets.values().map(|target| target.noted.pages() + target.ready.pages()).sum()
    }

    /// Makes the pages that were noted be gone, for good.
    ///
    /// # Errors
    /// [`ChainError::Image`] for a journal that cannot be written; nothing is freed
    /// then.
    pub fn sync(&mut self) -> Result<()> {
        fault::hit(Point::FreeNoted)?;
        let disk = &*self.disk;
        // One after the other, so that few files are open however deep the chain is.
        for target in self.targets.values_mut().filter(|target| !target.noted.is_empty()) {
            self.chain.freed().add(target.id, &target.noted);
            target.journal.append(disk, &target.noted)?;
            fault::hit(Point::FreeAppended)?;
            target.journal.sync(disk)?;
            target.ready.extend(&target.noted);
            target.noted = PageRanges::new();
        }
        Ok(fault::hit(Point::FreeJournalled)?)
    }

    /// Frees what is gone since [`Self::sync`], and returns how many pages that are.
    ///
    /// # Errors
    /// [`ChainError::Free`]; the pages are gone nevertheless, and only their room is
    /// still taken.
    pub fn free(&mut self) -> Result<u64> {
        let mut freed = 0;
        for target in self.targets.values_mut().filter(|target| !target.ready.is_empty()) {
            let failed = |step| {
                let path = target.path.clone();
                move |source| ChainError::Free { path, step, source }
            };
            let file = self.disk.open(&target.path).map_err(failed("open for writing"))?;
            for range in target.ready.iter() {
                let bytes = page_bytes(range.start)..page_bytes(range.end);
                self.disk.punch(&file, bytes).map_err(failed("free pages of"))?;
                if freed == 0 {
                    fault::hit(Point::FreeHalf)?;
                }
                freed += range.end - range.start;
            }
            target.done.extend(&target.ready);
            target.ready = PageRanges::new();
        }
        fault::hit(Point::FreeDone)?;
        Ok(freed)
    }
}

/// Returns the snapshots, besides `id`, that find pages in the same places as `id`
/// does, in the chain's order: those that cannot be restored any more when the pages
/// of `id` are freed.
///
/// # Errors
/// What keeps an index of `id` from being built. A snapshot that is broken cannot be
/// restored as it is, and does not count.
pub fn sharing(chain: &Chain, id: SnapshotId) -> Result<Vec<SnapshotId>> {
    let mut places: HashMap<FileId, PageRanges> = HashMap::new();
    let mut holders = BTreeSet::new();
    for memory in chain.memories(id)? {
        let index = chain.index(id, memory)?;
        for (layer, pages) in stored(&index) {
            holders.insert(layer.snapshot);
            places.entry(layer.file).or_default().insert(pages);
        }
    }
    let mut sharing: BTreeSet<SnapshotId> = BTreeSet::new();
    // On the way from `id` to the snapshot that holds a page, everybody finds it
    // there, and needs no index to be known.
    let mut path = vec![id];
    while let Ok(Some(parent)) = chain.snapshot(path[path.len() - 1]).parent {
        path.push(parent);
    }
    if let Some(deepest) = path.iter().rposition(|ancestor| holders.contains(ancestor)) {
        sharing.extend(&path[1..=deepest]);
    }
    let base = chain.base(id);
    for other in chain.ids() {
        // What has grown out of another base shares nothing.
        if path.contains(&other) || chain.base(other) != base {
            continue;
        }
        if finds_any(chain, other, &places) {
            sharing.insert(other);
        }
    }
    sharing.remove(&id);
    Ok(sharing.into_iter().collect())
}

/// Opens the chain that ends with the image directory `dir`, and what is related to it
/// among the directories beside that one: those that have grown out of the same base.
/// Returns it with the snapshot.
///
/// # Errors
/// As [`Chain::open`].
pub fn with_relatives(dir: &Path) -> Result<(Chain, SnapshotId)> {
    if let Some(above) = dir.parent()
        && let Ok(chain) = Chain::open(above)
        && let Some(id) = chain.at(dir)
    {
        return Ok((chain, id));
    }
    let chain = Chain::open(dir)?;
    let id = chain.at(dir).ok_or_else(|| ChainError::NoImages { path: dir.to_owned() })?;
    Ok((chain, id))
}

/// Returns the warnings before pages of a snapshot are freed, if others lose them, too.
///
/// # Errors
/// As [`sharing`].
pub fn warning(chain: &Chain, id: SnapshotId) -> Result<Option<String>> {
    let sharing = sharing(chain, id)?;
    let names: Vec<&str> = sharing.iter().map(|id| chain.snapshot(*id).name.as_str()).collect();
    Ok((!names.is_empty()).then(|| {
        format!(
            "snapshots that share pages with snapshot {} can no longer be restored once its pages \
             are freed: {}",
            chain.snapshot(id).name,
            names.join(", ")
        )
    }))
}

/// Whether a snapshot finds one of its pages at one of `places`.
fn finds_any(chain: &Chain, id: SnapshotId, places: &HashMap<FileId, PageRanges>) -> bool {
    let memories = chain.memories(id).unwrap_or_default();
    memories.into_iter().any(|memory| {
        chain.index(id, memory).is_ok_and(|index| {
            stored(&index).any(|(layer, pages)| {
                places.get(&layer.file).is_some_and(|taken| taken.within(pages).next().is_some())
            })
        })
    })
}

/// Returns where the stored pages of an index are: layers, and pages of their files.
pub fn stored(index: &Index) -> impl Iterator<Item = (&Layer, Range<u64>)> {
    index.extents().filter_map(|extent| match extent.place {
        Place::Stored { layer, file_page } => {
            Some((&index.layers()[layer as usize], file_page..file_page + extent.pages))
        }
        Place::Punched { .. } | Place::Absent => None,
    })
}

/// Returns the error of a page that was freed.
pub(super) fn punched(
    chain: &Chain,
    memory: MemoryId,
    layer: &Layer,
    first: crate::units::PageIndex,
    pages: u64,
) -> ChainError {
    let path: PathBuf = chain.image_path(layer.snapshot, Kind::Pages, layer.pages_id.into());
    ChainError::Punched { path, memory, first, pages }
}

#[cfg(test)]
mod tests;
