//! Destinations of copied pages.

use std::{
    io::{self, IoSlice},
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use super::{PagesError, Result};
use crate::{
    image::{
        Kind, MemoryId, PagemapEntry, PagemapWriter, SnapshotWriter,
        store::{Output, StoredOutput},
    },
    parallel::lock,
    sys::fds,
    units::page_bytes,
};

/// How many bytes of a pages file are written back at a time: enough for the file system to allocate
/// them contiguously.
const EARLY_BYTES: u64 = 32 << 20;

/// Receives the pages of one memory.
///
/// Stored pages are numbered from 0, in the order in which they are entered. Several threads use a
/// sink at the same time.
pub trait PageSink: Sync + Sized {
    /// Whether pages are entered before they are stored.
    const ENTERED_FIRST: bool = false;

    /// Records where pages are: stored in this snapshot, or in the parent. Entries come one at
    /// a time, in ascending order.
    fn enter(&self, entry: &PagemapEntry) -> Result<()>;

    /// Stores the bytes of consecutive stored pages, the first of which has the number `first`.
    /// Calls come in any order, before or after the pages are entered; see [`Self::ENTERED_FIRST`].
    fn store(&self, first: u64, pages: Vec<IoSlice<'_>>) -> Result<()>;

    /// Completes the memory, after all pages were entered and stored.
    fn finish(self) -> Result<()>;
}

/// Writes a memory to a pagemap and a pages file of a snapshot.
#[derive(Debug)]
pub struct FileSink {
    pagemap: Mutex<PagemapWriter<StoredOutput>>,
    pages: Box<dyn Output>,
    path: PathBuf,
    /// Held while writing: the kernel lets only one thread at a time write to a file, and threads
    /// that wait for it in the kernel use processor time.
    writing: Mutex<()>,
    early: bool,
}

impl FileSink {
    /// Creates the files of a memory. If `early`, starts write-back while pages are stored.
    pub fn create(
        images: &SnapshotWriter,
        memory: MemoryId,
        pages_id: u32,
        early: bool,
    ) -> Result<Self> {
        let (kind, number) = memory.pagemap();
        let pagemap = PagemapWriter::new(images.create(kind, number)?, pages_id)?;
        Ok(Self {
            pagemap: Mutex::new(pagemap),
            pages: images.create_raw(Kind::Pages, pages_id.into())?,
            path: images.path(Kind::Pages, pages_id.into()),
            writing: Mutex::new(()),
            early,
        })
    }

    fn write(&self, mut offset: u64, mut slices: &mut [IoSlice]) -> io::Result<u64> {
        let _writing = lock(&self.writing);
        while !slices.is_empty() {
            let count = self.pages.write_vectored_at(slices, offset)?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            offset += count as u64;
            IoSlice::advance_slices(&mut slices, count);
        }
        Ok(offset)
    }
}

impl PageSink for FileSink {
    fn enter(&self, entry: &PagemapEntry) -> Result<()> {
        Ok(lock(&self.pagemap).entry(entry)?)
    }

    fn store(&self, first: u64, mut pages: Vec<IoSlice<'_>>) -> Result<()> {
        let from = page_bytes(first);
        let end = self
            .write(from, &mut pages)
            .map_err(|source| PagesError::Write { path: self.path.clone(), source })?;
        let stretch = |offset: u64| offset / EARLY_BYTES;
        if self.early
            && stretch(from) != stretch(end)
            && let Some(file) = self.pages.file()
        {
            fds::start_writeback(file, stretch(from) * EARLY_BYTES, EARLY_BYTES);
        }
        Ok(())
    }

    fn finish(self) -> Result<()> {
        let pagemap = self.pagemap.into_inner().unwrap_or_else(PoisonError::into_inner);
        pagemap.into_image().finish()?;
        Ok(())
    }
}
