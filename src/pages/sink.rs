//! Where copied pages go.

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

/// Bytes of a pages file that the disk is given at a time: large enough to lie in one
/// piece there.
const EARLY_BYTES: u64 = 32 << 20;

/// Where the pages of one memory go: files, or whatever else keeps them.
///
/// Stored pages are counted from 0 in the order in which they are entered. Several threads
/// use a sink side by side.
pub trait PageSink: Sync + Sized {
    /// Says where pages are: in this snapshot, if they are present, or in the parent. Entries
    /// come one at a time, in ascending order.
    ///
    /// # Errors
    /// What keeps it from being noted.
    fn enter(&self, entry: &PagemapEntry) -> Result<()>;

    /// Takes the bytes of stored pages, the first of which is stored page `first`. Calls come
    /// in any order, before or after their pages are entered.
    ///
    /// # Errors
    /// What keeps them from being kept.
    fn store(&self, first: u64, pages: Vec<IoSlice<'_>>) -> Result<()>;

    /// Ends it: everything was entered and stored.
    ///
    /// # Errors
    /// What keeps it from being complete.
    fn finish(self) -> Result<()>;
}

/// The pagemap and the pages file of a memory among the images of a snapshot.
#[derive(Debug)]
pub struct FileSink {
    pagemap: Mutex<PagemapWriter<StoredOutput>>,
    pages: Box<dyn Output>,
    path: PathBuf,
    /// Held while writing: the kernel lets one thread write to a file at a time, and
    /// those that wait for it in the kernel burn time.
    writing: Mutex<()>,
    early: bool,
}

impl FileSink {
    /// Creates the files of a memory. The disk begins with them at once if `early`.
    ///
    /// # Errors
    /// [`PagesError::Image`].
    pub fn create(
        images: &SnapshotWriter,
        memory: MemoryId,
        pages_id: u32,
        early: bool,
    ) -> Result<Self> {
        let (kind, number) = match memory {
            MemoryId::Private(pid) => (Kind::Pagemap, pid),
            MemoryId::Shared(shmid) => (Kind::ShmemPagemap, shmid),
        };
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
            fds::begin_writing(file, stretch(from) * EARLY_BYTES, EARLY_BYTES);
        }
        Ok(())
    }

    fn finish(self) -> Result<()> {
        let pagemap = self.pagemap.into_inner().unwrap_or_else(PoisonError::into_inner);
        pagemap.into_image().finish()?;
        Ok(())
    }
}
