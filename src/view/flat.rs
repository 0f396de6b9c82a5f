//! Memories without parents: flattened pagemaps, and shared objects.

use std::{path::Path, sync::Arc};

use super::{
    Result, Tables,
    shared::{SharedObject, Size},
};
use crate::{
    chain::{
        self, BackingFile, ChainError, Content, Extent, Index, MemoryBytes, Place, Run, Source,
    },
    image::{
        ImageWriter, Kind, MemoryId, PagemapEntry, PagemapWriter, Presence, Result as ImageResult,
    },
};

/// A file whose contents are held in memory.
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

    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> chain::Result<()> {
        runs.push(Run { len, source: Source::Bytes(Arc::clone(&self.bytes), offset) });
        Ok(())
    }
}

/// Builds the pagemap of a resolved memory, without references to a parent. Errors call it `path`.
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
        // Extents from different files need no separate entries.
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
        // A freed page keeps its place in the pages file.
        Place::Stored { .. } | Place::Punched { .. } => Presence::Present,
        Place::Absent | Place::Unanswered { .. } => Presence::Absent,
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

/// Returns the contents of a shared object, in the object's length.
pub(super) fn shmem(tables: &Tables, shmid: u64) -> Result<Arc<dyn Content>> {
    let chain = tables.chain();
    let objects = tables.shared()?;
    let object = objects.get(&shmid);
    if let Some(SharedObject { size, inline: Some((name, start)), .. }) = object {
        let file = chain.files().get(chain.files().enter(tables.images(), name))?;
        return Ok(Arc::new(Stretch { file, start: *start, len: size.bytes(0) }));
    }
    let size = object.map_or(Size::AtLeast(0), |object| object.size);
    let index = match chain.readable_index(tables.snapshot(), MemoryId::Shared(shmid)) {
        Ok(index) => index,
        // The object is open or mapped, but was never written.
        Err(ChainError::NoMemory { .. }) => return Ok(Arc::new(Zeros(size.bytes(0)))),
        Err(error) => return Err(error.into()),
    };
    let pages = index.extents().next_back().map_or(0, |extent| extent.end().0);
    let content = MemoryBytes::new(Arc::clone(chain), index, size.bytes(pages));
    Ok(Arc::new(content))
}

/// A range of a file.
#[derive(Debug)]
struct Stretch {
    file: Arc<BackingFile>,
    start: u64,
    len: u64,
}

impl Content for Stretch {
    fn len(&self) -> u64 {
        self.len
    }

    fn allocated(&self) -> u64 {
        self.len
    }

    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> chain::Result<()> {
        runs.push(Run { len, source: Source::File(Arc::clone(&self.file), self.start + offset) });
        Ok(())
    }
}

/// A file of zeros with this length.
#[derive(Debug)]
struct Zeros(u64);

impl Content for Zeros {
    fn len(&self) -> u64 {
        self.0
    }

    fn allocated(&self) -> u64 {
        0
    }

    fn runs(&self, _offset: u64, len: u64, runs: &mut Vec<Run>) -> chain::Result<()> {
        runs.push(Run { len, source: Source::Zero });
        Ok(())
    }
}
