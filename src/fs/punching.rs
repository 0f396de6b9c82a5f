//! Freeing the pages that a mount shows.
//!
//! Only the flat pages files in the root can be punched: those of the shown snapshot. Each
//! read through the mount holds [`crate::chain::Chain::reading`], so that a page is freed
//! only after the reads that have found it; later reads fail.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use log::{debug, error, info};

use crate::{
    causes::with_sources,
    chain::{ChainError, FlatPages, Freeing, PUNCH_ON_COMMIT, Result},
    image::disk::Kernel,
    units::{PAGE_SIZE, PageRanges, page_bytes},
    view::{Ino, View},
};

/// Read bytes that are freed in one batch: journals are synced for each batch.
const BATCH_BYTES: u64 = 16 << 20;

/// Partially read pages of one open file that are remembered.
const PARTS_KEPT: usize = 64;

/// When a mount frees pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Punch {
    /// When a program punches them.
    OnRequest,
    /// When they have been read, or when a program punches them.
    OnRead,
    /// When a program has punched them and then commits.
    Commit,
}

impl Punch {
    /// Returns the name of the option's value, which the mount publishes as
    /// [`PUNCH_XATTR`](crate::chain::PUNCH_XATTR).
    pub const fn name(self) -> &'static str {
        match self {
            Self::OnRequest => "on-request",
            Self::OnRead => "on-read",
            Self::Commit => PUNCH_ON_COMMIT,
        }
    }
}

/// Frees pages of the snapshot that a mount shows.
#[derive(Debug)]
pub(super) struct Punching {
    mode: Punch,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    freeing: Freeing,
    /// Pages of flat files that were punched, to be freed on commit.
    noted: HashMap<Ino, (Arc<FlatPages>, PageRanges)>,
    /// Pages that are in the page cache, for processes that have mapped the file. As long as the
    /// file is open, the kernel may drop them and ask for them again.
    cached: HashMap<Ino, PageRanges>,
    /// Partially read pages, by handle.
    parts: HashMap<u64, Vec<Part>>,
}

/// The bytes of a page that were read.
#[derive(Debug)]
struct Part {
    page: u64,
    bytes: Range<u64>,
}

impl Punching {
    /// Checks and opens all files that hold pages of the shown snapshot, without changes.
    ///
    /// # Errors
    /// What [`Freeing::prepare`] returns; an index that cannot be built.
    pub(super) fn new(view: &View, mode: Punch) -> Result<Self> {
        let chain = view.chain();
        let mut freeing = Freeing::new(Arc::clone(chain), Arc::new(Kernel));
        for memory in chain.memories(view.tip())? {
            freeing.prepare_all(&*chain.index(view.tip(), memory)?)?;
        }
        let state =
            State { freeing, noted: HashMap::new(), cached: HashMap::new(), parts: HashMap::new() };
        Ok(Self { mode, state: Mutex::new(state) })
    }

    pub(super) fn mode(&self) -> Punch {
        self.mode
    }

    /// Frees or records the whole pages in a range of a flat file that a program has
    /// punched.
    ///
    /// # Errors
    /// Why they cannot be freed.
    pub(super) fn punch(
        &self,
        ino: Ino,
        file: &Arc<FlatPages>,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let pages = offset.div_ceil(PAGE_SIZE)..offset.saturating_add(len) / PAGE_SIZE;
        if pages.is_empty() {
            return Ok(());
        }
        let mut state = self.lock();
        if self.mode == Punch::Commit {
            let (_, noted) =
                state.noted.entry(ino).or_insert_with(|| (Arc::clone(file), PageRanges::new()));
            noted.insert(pages);
            return Ok(());
        }
        state.note(file, pages)?;
        state.free().map(drop)
    }

    /// Handles a read of bytes of a flat file through the open file `handle`; `mapped` if
    /// the page cache holds them now.
    pub(super) fn was_read(
        &self,
        ino: Ino,
        handle: u64,
        file: &FlatPages,
        bytes: Range<u64>,
        mapped: bool,
    ) {
        if self.mode != Punch::OnRead || bytes.is_empty() {
            return;
        }
        let mut state = self.lock();
        let whole = bytes.start.div_ceil(PAGE_SIZE)..bytes.end / PAGE_SIZE;
        if mapped {
            state.cached.entry(ino).or_default().insert(whole);
            return;
        }
        let mut read: PageRanges = std::iter::once(whole).collect();
        state.add_parts(handle, &bytes, &mut read);
        let noted = read.iter().try_for_each(|pages| state.note(file, pages));
        let enough = page_bytes(state.freeing.noted_pages()) >= BATCH_BYTES;
        let freed = noted.and_then(|()| if enough { state.free().map(drop) } else { Ok(()) });
        log_failure(freed);
    }

    /// Handles the close of an open file; `last` if it was the last open one.
    pub(super) fn closed(&self, ino: Ino, handle: u64, file: &FlatPages, last: bool) {
        if self.mode != Punch::OnRead {
            return;
        }
        let mut state = self.lock();
        state.parts.remove(&handle);
        let mut result = Ok(());
        if last && let Some(cached) = state.cached.remove(&ino) {
            result = cached.iter().try_for_each(|pages| state.note(file, pages));
        }
        log_failure(result.and_then(|()| state.free().map(drop)));
    }

    /// Frees the recorded pages, and returns their number.
    ///
    /// # Errors
    /// Why they cannot be freed.
    pub(super) fn commit(&self) -> Result<u64> {
        let mut state = self.lock();
        for (file, pages) in std::mem::take(&mut state.noted).into_values() {
            pages.iter().try_for_each(|pages| state.note(&file, pages))?;
        }
        let freed = state.free()?;
        info!("freed {freed} pages");
        Ok(freed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Records pages of a flat file for freeing in the files that hold them.
    fn note(&mut self, file: &FlatPages, pages: Range<u64>) -> Result<()> {
        let memory = file.index().memory();
        for (layer, pages) in file.places(pages) {
            self.freeing.note(memory, layer, pages)?;
        }
        Ok(())
    }

    fn free(&mut self) -> Result<u64> {
        if self.freeing.noted_pages() == 0 {
            return Ok(0);
        }
        self.freeing.sync()?;
        let freed = self.freeing.free(&mut |_| ())?;
        debug!("freed {freed} pages");
        Ok(freed)
    }

    /// Adds to `read` the pages that this read completes. The kernel splits large reads at
    /// page borders of the reader's buffer, wherever the pages of the file begin.
    fn add_parts(&mut self, handle: u64, bytes: &Range<u64>, read: &mut PageRanges) {
        let parts = self.parts.entry(handle).or_default();
        for page in [bytes.start / PAGE_SIZE, (bytes.end - 1) / PAGE_SIZE] {
            if read.contains(page) {
                continue;
            }
            let begin = page * PAGE_SIZE;
            let mut new = bytes.start.max(begin)..bytes.end.min(begin + PAGE_SIZE);
            if let Some(position) = parts.iter().position(|part| part.page == page) {
                let old = parts.swap_remove(position).bytes;
                if old.start <= new.end && new.start <= old.end {
                    new = old.start.min(new.start)..old.end.max(new.end);
                }
            }
            if new.end - new.start == PAGE_SIZE {
                read.insert(page..page + 1);
                continue;
            }
            if parts.len() >= PARTS_KEPT {
                parts.remove(0);
            }
            parts.push(Part { page, bytes: new });
        }
    }
}

/// Logs pages that could not be freed when no request waits for an answer. They are retried
/// with the next ones.
fn log_failure(result: Result<(), ChainError>) {
    if let Err(failure) = result {
        error!("free what was read: {}", with_sources(&failure));
    }
}
