//! Memories without parents: pagemaps put together, and objects in place.

use std::{path::Path, sync::Arc};

use crate::{
    chain::{Chain, Content, Extent, Index, MemoryBytes, Place, Result, Run, SnapshotId, Source},
    image::{
        ImageWriter, Kind, MemoryId, PagemapEntry, PagemapWriter, Presence, Result as ImageResult,
    },
};

/// Bytes that are held in memory.
#[derive(Debug)]
pub(super) struct MemoryFile {
    bytes: Arc<[u8]>,
}

impl MemoryFile {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: bytes.into() }
    }
}

impl Content for MemoryFile {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn allocated(&self) -> u64 {
        self.len()
    }

    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> Result<()> {
        runs.push(Run { len, source: Source::Bytes(Arc::clone(&self.bytes), offset) });
        Ok(())
    }
}

/// Writes the pagemap of a resolved memory, in which nothing is in a parent;
/// errors call it `path`.
pub(super) fn pagemap(path: &Path, index: &Index) -> ImageResult<MemoryFile> {
    let kind = match index.memory() {
        MemoryId::Private(_) => Kind::Pagemap,
        MemoryId::Shared(_) => Kind::ShmemPagemap,
    };
    let image = ImageWriter::new(path, Vec::new(), kind)?;
    let mut writer = PagemapWriter::new(image, index.pages_id())?;
    let mut extents = index.extents().peekable();
    while let Some(extent) = extents.next() {
        let mut entry = entry(&extent);
        // Which file the pages came from no longer matters.
        while let Some(next) = extents.peek()
            && next.first == entry.end()
            && presence(next) == entry.presence
            && next.lazy == entry.lazy
        {
            entry.pages += next.pages;
            extents.next();
        }
        writer.entry(&entry)?;
    }
    Ok(MemoryFile::new(writer.into_image().into_output()))
}

fn presence(extent: &Extent) -> Presence {
    match extent.place {
        Place::Stored { .. } => Presence::Present,
        Place::Absent => Presence::Absent,
    }
}

fn entry(extent: &Extent) -> PagemapEntry {
    PagemapEntry {
        first: extent.first,
        pages: extent.pages,
        presence: presence(extent),
        lazy: extent.lazy,
    }
}

/// Returns the bytes of a shared object, as long as the object was.
pub(super) fn shmem(chain: &Arc<Chain>, id: SnapshotId, shmid: u64) -> Result<MemoryBytes> {
    let index = chain.index(id, MemoryId::Shared(shmid))?;
    let len = index.extents().last().map_or(0, |extent| extent.end().address());
    Ok(MemoryBytes::new(Arc::clone(chain), index, len))
}
