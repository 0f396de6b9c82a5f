//! Frees pages in the files that hold them, in such a way that no reader gets zeros for
//! them.
//!
//! The order is always the same, and all of it is here. First the pages are gone for
//! readers in this program ([`Chain`] knows them), then the journals name them, then the
//! journals are synced, and only then the pages are freed. A crash in between leaves pages
//! that are gone although their bytes exist. So pages may be recorded only if another
//! lasting place has them, or if they are no longer needed. The next program that opens the
//! file for freeing finishes the work.

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

/// The pages that were freed after a chain was opened. Indexes that were built earlier do
/// not know them.
#[derive(Debug, Default)]
pub(super) struct Freed {
    any: AtomicBool,
    files: RwLock<HashMap<FileId, PageRanges>>,
    /// Read-locked while a reader uses files whose pages may be freed.
    reading: RwLock<()>,
}

impl Freed {
    /// Whether no page was freed.
    pub(super) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Acquire)
    }

    /// Splits pages of a file into ranges; the second value says whether a range is gone.
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

    /// Marks pages as gone. When it returns, all reads that began before have ended.
    fn add(&self, file: FileId, pages: &PageRanges) {
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        files.entry(file).or_default().extend(pages);
        drop(files);
        self.any.store(true, Ordering::Release);
        drop(self.reading.write().unwrap_or_else(PoisonError::into_inner));
    }
}

/// A pages file in which pages are freed.
#[derive(Debug)]
struct Target {
    path: PathBuf,
    id: FileId,
    pages: u64,
    journal: JournalWriter,
    /// Pages that the journal on disk does not name yet.
    noted: PageRanges,
    /// Pages that are to be freed.
    ready: PageRanges,
    /// Pages that this program has freed.
    done: PageRanges,
}

/// Frees pages in the files of a chain.
///
/// Call [`Self::prepare`] for every file that may be affected; then [`Self::note`],
/// [`Self::sync`] and [`Self::free`] as often as needed. The caller holds the locks of the
/// directories.
#[derive(Debug)]
pub struct Freeing {
    chain: Arc<Chain>,
    disk: Arc<dyn Disk>,
    /// By snapshot and `pages_id`.
    targets: BTreeMap<(SnapshotId, u32), Target>,
    foreign: ForeignChildren,
}

impl Freeing {
    /// Starts to free pages of `chain` through `disk`.
    pub fn new(chain: Arc<Chain>, disk: Arc<dyn Disk>) -> Self {
        let foreign = ForeignChildren::of(&chain);
        Self { chain, disk, targets: BTreeMap::new(), foreign }
    }

    /// Opens the pages file of a layer of `memory` and its journal; changes nothing. Takes
    /// up pages that an earlier run has named but may not have freed.
    ///
    /// [`ChainError::NoPunching`] if the file system cannot punch holes,
    /// [`ChainError::Free`] if the file is not writable, [`ChainError::Image`] for a
    /// journal that cannot be trusted.
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
        // Nothing is stored behind the end, so this changes nothing.
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

    /// Prepares all files in which `index` finds pages.
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

    /// Records pages of a file for freeing; `pages` counts in the *file*. Ignores pages
    /// behind its end, and pages that were freed already.
    ///
    /// Only pages that another lasting place has, or that are no longer needed, may be
    /// recorded.
    ///
    /// # Errors
    /// As [`Self::prepare`], unless it was called for the layer before.
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

    /// Returns how many pages are recorded but not freed yet.
    pub fn noted_pages(&self) -> u64 {
        self.targets.values().map(|target| target.noted.pages() + target.ready.pages()).sum()
    }

    /// Makes the recorded pages permanently gone.
    ///
    /// # Errors
    /// [`ChainError::Image`] for a journal that cannot be written; then nothing is freed.
    pub fn sync(&mut self) -> Result<()> {
        fault::hit(Point::FreeNoted)?;
        let disk = &*self.disk;
        // One at a time, so that few files are open however deep the chain is.
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

    /// Frees the pages that are gone since [`Self::sync`], and returns how many that are. Calls
    /// `progress` with the number of pages that were freed since the last call.
    ///
    /// # Errors
    /// [`ChainError::Free`]; the pages are gone nevertheless, but still occupy space.
    pub fn free(&mut self, progress: &mut dyn FnMut(u64)) -> Result<u64> {
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
                progress(range.end - range.start);
            }
            target.done.extend(&target.ready);
            target.ready = PageRanges::new();
        }
        fault::hit(Point::FreeDone)?;
        Ok(freed)
    }
}

/// Returns the other snapshots that find pages in the same places as `id`, in the order of
/// the chain: those that can no longer be restored once the pages of `id` are freed.
///
/// # Errors
/// An index of `id` that cannot be built. A broken snapshot cannot be restored anyway, and
/// does not count.
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
    // Every snapshot on the path from `id` to the one that holds a page finds the page
    // there; that is known without an index.
    let mut path = vec![id];
    while let Ok(Some(parent)) = chain.snapshot(path[path.len() - 1]).parent {
        path.push(parent);
    }
    if let Some(deepest) = path.iter().rposition(|ancestor| holders.contains(ancestor)) {
        sharing.extend(&path[1..=deepest]);
    }
    let base = chain.base(id);
    for other in chain.ids() {
        // Snapshots that descend from another base share nothing.
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

/// Opens the chain that ends with the image directory `dir`, together with its relatives
/// beside that directory: snapshots that descend from the same base. Returns the chain and
/// the snapshot.
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

/// Returns the warning that other snapshots lose pages if those of `id` are freed; `None`
/// if there are none.
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
        Place::Punched { .. } | Place::Absent | Place::Unanswered { .. } => None,
    })
}

/// Returns the error for a freed page.
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
