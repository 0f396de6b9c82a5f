//! Frees restored pages in the images (`--auto-dedup`).

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::errno::Errno;

use super::{
    AutoDedup, RestoreError, Result,
    plan::Plan,
    source::{self, Punches},
};
use crate::{
    causes::tell,
    chain::{Chain, ChainError, Freeing, Index, Layer, Place, SnapshotId, freed},
    image::{
        Disk, Kind,
        disk::{DiskFile, Kernel},
    },
    step::StepError,
    sys::commit,
    units::{PAGE_SIZE, PageIndex, PageRanges, page_bytes},
};

/// How many bytes are freed together during the restore: the journals are synced once for
/// each batch.
const BATCH_BYTES: u64 = 16 << 20;

/// Frees what has been restored.
#[derive(Debug)]
pub(super) struct Free {
    when: AutoDedup,
    place: Mutex<Where>,
    freed_pages: AtomicU64,
}

/// Where the pages are freed.
#[derive(Debug)]
enum Where {
    /// In the chain, by this program.
    Chain(Freeing),
    /// In the images behind a mount of `imgfs`: its daemon knows where they are, and keeps
    /// the journals.
    Mount(MountedPages),
}

impl Free {
    /// Prepares freeing the pages of `plan`, whose images are at `dir`, and warns on
    /// standard error if other snapshots share them. Changes nothing yet.
    ///
    /// # Errors
    /// Why pages could not be freed.
    pub(super) fn prepare(when: AutoDedup, dir: &Path, plan: &Plan) -> Result<Self> {
        let chain = &plan.chain;
        let place = if let Some(punches) = source::punches(dir) {
            let root = File::open(dir).map_err(|error| StepError::Directory {
                path: dir.to_owned(),
                problem: error.to_string(),
            })?;
            let mut mounted =
                MountedPages { path: dir.to_owned(), root, punches, files: BTreeMap::new() };
            for index in indexes(plan)? {
                mounted.prepare(chain, &index)?;
            }
            Where::Mount(mounted)
        } else {
            warn_of_sharing(plan.chain.directory(plan.snapshot)?)?;
            let mut freeing = Freeing::new(Arc::clone(chain), Arc::new(Kernel));
            for index in indexes(plan)? {
                freeing.prepare_all(&index)?;
            }
            Where::Chain(freeing)
        };
        Ok(Self { when, place: Mutex::new(place), freed_pages: AtomicU64::new(0) })
    }

    /// Records that pages of a memory are in place in the restored processes.
    ///
    /// # Errors
    /// Why they cannot be freed, if they are freed during the restore.
    pub(super) fn restored(&self, index: &Index, first: PageIndex, pages: u64) -> Result<()> {
        if self.when != AutoDedup::Now {
            return Ok(());
        }
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        place.note(index, first, pages)?;
        if page_bytes(place.noted_pages()) >= BATCH_BYTES {
            self.count(place.free()?);
        }
        Ok(())
    }

    /// Frees all pages of the snapshot once the tree runs. Returns how many were freed in
    /// total.
    ///
    /// # Errors
    /// Why they cannot be freed.
    pub(super) fn all(&self, plan: &Plan) -> Result<u64> {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        for index in indexes(plan)? {
            place.note(&index, PageIndex(0), PageIndex::END.0)?;
            // One memory at a time: the records of one take room.
            self.count(place.free()?);
        }
        place.finish()?;
        Ok(self.freed_pages())
    }

    /// Returns how many pages have been freed so far.
    pub(super) fn freed_pages(&self) -> u64 {
        self.freed_pages.load(Ordering::Relaxed)
    }

    fn count(&self, pages: u64) {
        self.freed_pages.fetch_add(pages, Ordering::Relaxed);
    }
}

/// Returns the indexes of all memories of the snapshot.
fn indexes(plan: &Plan) -> Result<Vec<Arc<Index>>> {
    let memories = plan.chain.memories(plan.snapshot)?;
    let indexes = memories.into_iter().map(|memory| plan.chain.index(plan.snapshot, memory));
    Ok(indexes.collect::<Result<_, ChainError>>()?)
}

/// Warns which snapshots, in the chain and beside it, lose pages.
fn warn_of_sharing(dir: &Path) -> Result<()> {
    let (chain, id): (Chain, SnapshotId) = freed::with_relatives(dir)?;
    if let Some(warning) = freed::warning(&chain, id)? {
        tell(log::Level::Warn, &warning);
    }
    Ok(())
}

impl Where {
    fn note(&mut self, index: &Index, first: PageIndex, pages: u64) -> Result<()> {
        let end = PageIndex(first.0.saturating_add(pages));
        let mut position = index.position(first);
        while let Some(extent) = index.extent(position).filter(|extent| extent.first < end) {
            position += 1;
            let Place::Stored { layer, file_page } = extent.place else { continue };
            let (from, to) = (extent.first.max(first), extent.end().min(end));
            let start = file_page + (from.0 - extent.first.0);
            let pages = start..start + (to.0 - from.0);
            let layer = &index.layers()[layer as usize];
            match self {
                Self::Chain(freeing) => freeing.note(index.memory(), layer, pages)?,
                Self::Mount(mounted) => mounted.note(layer, pages),
            }
        }
        Ok(())
    }

    fn noted_pages(&self) -> u64 {
        match self {
            Self::Chain(freeing) => freeing.noted_pages(),
            Self::Mount(mounted) => mounted.noted_pages(),
        }
    }

    fn free(&mut self) -> Result<u64> {
        match self {
            Self::Chain(freeing) => {
                freeing.sync()?;
                Ok(freeing.free(&mut |_| ())?)
            }
            Self::Mount(mounted) => mounted.free(),
        }
    }

    /// Tells the mount that the restore has succeeded.
    fn finish(&mut self) -> Result<()> {
        match self {
            Self::Chain(_) => Ok(()),
            Self::Mount(mounted) => mounted.finish(),
        }
    }
}

/// Pages files behind a mount that frees punched pages.
#[derive(Debug)]
struct MountedPages {
    path: PathBuf,
    root: File,
    punches: Punches,
    /// By `pages_id`.
    files: BTreeMap<u32, MountedFile>,
}

#[derive(Debug)]
struct MountedFile {
    file: DiskFile,
    /// Still to be punched.
    noted: PageRanges,
    /// Already punched.
    done: PageRanges,
}

impl MountedPages {
    fn prepare(&mut self, chain: &Chain, index: &Index) -> Result<()> {
        for layer in index.layers().iter().filter(|layer| layer.pages > 0) {
            let path = chain.image_path(layer.snapshot, Kind::Pages, layer.pages_id.into());
            let failed =
                |source| ChainError::Free { path: path.clone(), step: "open for writing", source };
            let file = Kernel.open(&path).map_err(failed)?;
            let (noted, done) = (PageRanges::new(), PageRanges::new());
            self.files.insert(layer.pages_id, MountedFile { file, noted, done });
        }
        Ok(())
    }

    fn note(&mut self, layer: &Layer, pages: std::ops::Range<u64>) {
        let Some(file) = self.files.get_mut(&layer.pages_id) else { return };
        let parts = file.done.split(pages).filter(|(_, done)| !done);
        parts.for_each(|(part, _)| file.noted.insert(part));
    }

    fn noted_pages(&self) -> u64 {
        self.files.values().map(|file| file.noted.pages()).sum()
    }

    /// Punches the recorded pages, and returns how many that freed.
    fn free(&mut self) -> Result<u64> {
        let mut freed = 0;
        for MountedFile { file, noted, done } in self.files.values_mut() {
            for pages in noted.iter() {
                let bytes = pages.start * PAGE_SIZE..pages.end * PAGE_SIZE;
                Kernel.punch(file, bytes).map_err(|source| ChainError::Free {
                    path: file.path().to_owned(),
                    step: "free pages of",
                    source,
                })?;
                freed += pages.end - pages.start;
            }
            done.extend(noted);
            *noted = PageRanges::new();
        }
        Ok(if self.punches == Punches::OnCommit { 0 } else { freed })
    }

    /// Lets the mount free the pages that it may have held back, unless the user decides
    /// that.
    fn finish(&self) -> Result<()> {
        if self.punches == Punches::OnCommit {
            let path = self.path.display();
            let message = format!(
                "the mount has recorded the restored pages, but has not freed them yet\nhelp: \
                 `imgfs commit {path}` frees them"
            );
            tell(log::Level::Info, &message);
            return Ok(());
        }
        match commit::commit(&self.root) {
            // The owner of the mount frees the recorded pages with `imgfs commit`.
            Err(Errno::EPERM) => {
                log::warn!(
                    "the mount belongs to another user: only that user can free the recorded pages"
                );
                Ok(())
            }
            result => result.map(drop).map_err(|errno| RestoreError::Commit { source: errno }),
        }
    }
}
