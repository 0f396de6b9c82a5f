//! Memories to copy: their contents, and those of the same memory in the parent.

use std::{fs::File, io, os::unix::fs::FileExt, slice, sync::Arc};

use super::{
    PagesError, ProcessMemory, Result, Stretch,
    process::is_forked,
    scan,
    stretch::{for_each_run, len},
};
use crate::{
    chain::{Chain, ChainError, Content, MemoryBytes, SnapshotId},
    image::MemoryId,
    proc::Mapping,
    sys::swap,
    units::{HostPid, PageIndex, RemoteAddr, page_bytes},
};

/// Where the contents of a memory are.
#[derive(Debug)]
pub enum Origin {
    /// In a process.
    Process(ProcessMemory),
    /// In a shared object.
    Object {
        /// A description that only rcriu uses.
        file: File,
        /// The object, as messages call it.
        name: String,
    },
}

/// A memory to dump.
#[derive(Debug)]
pub struct Memory {
    /// Its name in the images.
    pub id: MemoryId,
    /// Its contents.
    pub origin: Origin,
    /// The pages to copy, in ascending order.
    pub stretches: Vec<Stretch>,
    /// The same memory in the parent chain.
    pub parent: Option<MemoryBytes>,
    /// Whether the tree runs meanwhile: pages may disappear, and are left out.
    pub running: bool,
}

impl Memory {
    /// Returns a shared object with all of its pages that are not in holes.
    ///
    /// # Errors
    /// [`PagesError::ReadObject`]: `lseek(2)` failed.
    pub fn of_object(shmid: u64, file: File, name: String, running: bool) -> Result<Self> {
        let stretches = scan::object(&file, &name).map_err(|source| {
            let name = name.clone();
            PagesError::ReadObject { name, offset: 0, source }
        })?;
        let id = MemoryId::Shared(shmid);
        Ok(Self { id, origin: Origin::Object { file, name }, stretches, parent: None, running })
    }

    /// Returns how many of its bytes have to be copied while the process is stopped: those that a shadow
    /// does not have.
    pub fn bytes_to_copy_first(&self, mappings: &[Mapping]) -> u64 {
        match self.origin {
            Origin::Process(_) => {
                self.unforked(mappings).map(|stretch| page_bytes(stretch.pages)).sum()
            }
            Origin::Object { .. } => {
                let to_read = self.stretches.iter().filter(|stretch| !stretch.unwritten);
                to_read.map(|stretch| page_bytes(stretch.pages)).sum()
            }
        }
    }

    /// From now on, reads the memory of a stopped process from its shadow. What that does not have is
    /// read now.
    ///
    /// # Errors
    /// [`PagesError::Open`], [`PagesError::ReadMemory`].
    pub fn turn_to_shadow(&mut self, shadow: HostPid, mappings: &[Mapping]) -> Result<()> {
        let mut lacking = Vec::new();
        for stretch in self.unforked(mappings) {
            let mut bytes = vec![0; len(stretch.pages)];
            self.origin.read(slice::from_ref(stretch), &mut bytes, false)?;
            lacking.push((RemoteAddr(stretch.first.address()), bytes));
        }
        self.origin = Origin::Process(ProcessMemory::of_shadow(shadow, mappings, lacking)?);
        Ok(())
    }

    fn unforked(&self, mappings: &[Mapping]) -> impl Iterator<Item = &Stretch> {
        let left_out = mappings.iter().filter(|mapping| !is_forked(mapping));
        let ranges: Vec<_> = left_out.map(|mapping| mapping.start.0..mapping.end.0).collect();
        // A page server may turn out not to have a page that the parent has.
        self.stretches.iter().filter(move |stretch| {
            ranges.iter().any(|range| range.contains(&stretch.first.address()))
        })
    }

    /// Whether it is a shared object.
    pub fn is_shared(&self) -> bool {
        matches!(self.origin, Origin::Object { .. })
    }
}

impl Origin {
    /// Reads runs of pages, and moves pages that were in swap back there.
    ///
    /// # Errors
    /// [`PagesError::ReadMemory`], [`PagesError::ReadObject`].
    pub(super) fn read(&self, runs: &[Stretch], bytes: &mut [u8], running: bool) -> Result<()> {
        match self {
            Self::Process(process) => process.read(runs, bytes, running),
            Self::Object { file, name } => {
                for_each_run(runs, bytes, |run, target| {
                    let offset = run.first.address();
                    read_object(file, offset, target).map_err(|source| PagesError::ReadObject {
                        name: name.clone(),
                        offset,
                        source,
                    })
                })?;
                self.page_out(runs);
                Ok(())
            }
        }
    }

    /// Moves pages that were in swap back there. Those that wait for a list of another CPU stay.
    pub(super) fn page_out(&self, runs: &[Stretch]) {
        let swapped = runs.iter().filter(|run| run.swapped);
        match self {
            Self::Process(process) => process.page_out(swapped),
            Self::Object { file, name } => {
                for pages in swapped.map(Stretch::range) {
                    if let Err(error) = swap::page_out(file, pages) {
                        log::debug!("{name}: cannot move pages back to swap: {error}");
                    }
                }
            }
        }
    }
}

/// Reads part of an object. Bytes after its end read as zeros.
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

/// Returns the memory in the parent chain, by address or offset, if it has any pages there.
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
        Err(ChainError::NoMemory { .. } | ChainError::PagesElsewhere { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
