//! What is copied: a memory, where its bytes are, and where they are in the parent.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use super::{PagesError, ProcessMemory, Result, Stretch, scan, stretch::for_each_run};
use crate::{
    chain::{Chain, ChainError, Content, MemoryBytes, SnapshotId},
    image::MemoryId,
    sys::swap,
    units::PageIndex,
};

/// Where the bytes of a memory are read.
#[derive(Debug)]
pub enum Origin {
    /// In a process.
    Process(ProcessMemory),
    /// In the object itself.
    Object {
        /// An open description of this program alone.
        file: File,
        /// What it is called in messages.
        name: String,
    },
}

/// A memory to be dumped.
#[derive(Debug)]
pub struct Memory {
    /// Its name in the images.
    pub id: MemoryId,
    /// Where its bytes are.
    pub origin: Origin,
    /// Ascending.
    pub stretches: Vec<Stretch>,
    /// The same memory in the parent chain.
    pub parent: Option<MemoryBytes>,
    /// Whether the tree runs while it is read: pages may be gone, and are left out.
    pub running: bool,
}

impl Memory {
    /// A shared object, with all that is no hole of it.
    ///
    /// # Errors
    /// [`PagesError::ReadObject`]: what looking for holes returns.
    pub fn of_object(shmid: u64, file: File, name: String, running: bool) -> Result<Self> {
        let stretches = scan::object(&file, &name).map_err(|source| {
            let name = name.clone();
            PagesError::ReadObject { name, offset: 0, source }
        })?;
        let id = MemoryId::Shared(shmid);
        Ok(Self { id, origin: Origin::Object { file, name }, stretches, parent: None, running })
    }

    /// Whether it is a shared object.
    pub fn is_shared(&self) -> bool {
        matches!(self.origin, Origin::Object { .. })
    }
}

impl Origin {
    /// Reads stretches, and sends back to swap what was there.
    ///
    /// # Errors
    /// [`PagesError::ReadMemory`], [`PagesError::ReadObject`].
    pub(super) fn read(&self, runs: &[Stretch], bytes: &mut [u8], running: bool) -> Result<()> {
        match self {
            Self::Process(process) => process.read(runs, bytes, running),
            Self::Object { file, name } => for_each_run(runs, bytes, |run, target| {
                let offset = run.first.address();
                read_object(file, offset, target).map_err(|source| PagesError::ReadObject {
                    name: name.clone(),
                    offset,
                    source,
                })?;
                if run.swapped
                    && let Err(errno) = swap::page_out(file, offset, target.len())
                {
                    log::debug!("{name}: memory that was in swap stays in memory: {errno}");
                }
                Ok(())
            }),
        }
    }
}

/// Reads a stretch of an object; what is behind its end is zero.
fn read_object(file: &File, offset: u64, target: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < target.len() {
        match file.read_at(&mut target[done..], offset + done as u64) {
            Ok(0) => {
                target[done..].fill(0);
                return Ok(());
            }
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Returns the bytes of a memory of the parent chain, by address or offset.
///
/// # Errors
/// [`PagesError::Chain`].
pub fn parent_memory(
    chain: &Arc<Chain>,
    id: SnapshotId,
    memory: MemoryId,
) -> Result<Option<MemoryBytes>> {
    match chain.index(id, memory) {
        Ok(index) => {
            let bytes = MemoryBytes::new(Arc::clone(chain), index, PageIndex::END.address());
            Ok((!bytes.is_empty()).then_some(bytes))
        }
        Err(ChainError::NoMemory { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
