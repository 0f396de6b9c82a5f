//! A dumped process and its mappings.

use std::sync::Arc;

use super::{
    Result, Tables, ViewError,
    mapped::{Mapped, MappedFiles},
};
use crate::{
    arch::told_page_size,
    image::{
        Kind, MemoryId, proto,
        tree::{Arena, ArenaIds},
        vma,
    },
    units::{PAGE_SIZE, PageIndex},
};

/// The first address that no process can have: the upper half belongs to the kernel.
const USER_END: u64 = 1 << 63;

/// A bit of `vma_entry.prot`: readable (`asm-generic/mman-common.h`, like the others).
pub(super) const PROT_READ: u32 = 1;
/// Writable.
pub(super) const PROT_WRITE: u32 = 2;
/// Executable.
pub(super) const PROT_EXEC: u32 = 4;

/// A mapping of a process.
#[derive(Clone, Debug)]
pub(super) struct Area {
    /// The first address.
    pub(super) start: u64,
    /// The address after the last byte.
    pub(super) end: u64,
    /// The permissions: `PROT_*`.
    pub(super) prot: u32,
    /// The offset of `start` in the mapped file or object, in bytes.
    pub(super) offset: u64,
    /// Whether the process may have private pages there.
    pub(super) private: bool,
    /// The backing of addresses without a private page.
    pub(super) below: Below,
}

impl Area {
    /// Returns the offset in the mapped object of the byte at `address`.
    pub(super) fn offset_of(&self, address: u64) -> u64 {
        self.offset + (address - self.start)
    }
}

/// The backing of an area: its contents where its process has no private page.
#[derive(Clone, Debug)]
pub(super) enum Below {
    /// A file, a shared object, or zeros.
    Mapped(Mapped),
    /// Memory of the kernel or a device, which no image has.
    Unknown,
}

/// A process of a snapshot.
#[derive(Debug)]
pub struct Process {
    tables: Arc<Tables>,
    entry: proto::PstreeEntry,
    mm: Arc<proto::MmEntry>,
    areas: Vec<Area>,
    private: MemoryId,
}

impl Process {
    /// Reads the mappings of the process `pid` of a snapshot, but neither pagemaps nor mapped files.
    ///
    /// # Errors
    /// [`ViewError::NoSuchProcess`]; [`ViewError::NoAddressSpace`] for a zombie;
    /// [`ViewError::PageSize`]; [`ViewError::BadVma`] for mappings that overlap or do not consist of
    /// whole pages; [`ViewError::NoSuchFile`]; [`ViewError::Image`].
    pub fn load(tables: &Arc<Tables>, pid: u32) -> Result<Self> {
        let dir = tables.path();
        let tree = tables.tree()?;
        let entry = tree
            .iter()
            .find(|entry| entry.pid == pid)
            .ok_or_else(|| ViewError::NoSuchProcess { dir: dir.to_owned(), pid })?
            .clone();
        let mm = tables
            .mm(pid)?
            .ok_or_else(|| ViewError::NoAddressSpace { dir: dir.to_owned(), pid })?;
        // Pagemaps do not record the page size.
        if let Some(size) = told_page_size(&mm.mm_saved_auxv).filter(|size| *size != PAGE_SIZE) {
            return Err(ViewError::PageSize { dir: dir.to_owned(), pid, size });
        }
        let areas = Mappings { tables, pid }.areas(mm.vmas.clone())?;
        let private = private_of(tables, pid)?;
        Ok(Self { tables: Arc::clone(tables), entry, mm, areas, private })
    }

    /// Returns the pid of the process in its own pid namespace.
    pub fn pid(&self) -> u32 {
        self.entry.pid
    }

    /// Returns the address after the highest mapping.
    pub fn end(&self) -> u64 {
        self.areas.last().map_or(0, |area| area.end)
    }

    /// Returns the tables of the snapshot.
    pub fn tables(&self) -> &Arc<Tables> {
        &self.tables
    }

    /// Returns the memory that holds the private pages of the process. Of processes that share memory
    /// (`CLONE_VM`), only one has a pagemap.
    pub fn private(&self) -> MemoryId {
        self.private
    }

    /// Returns the entry of the process in the process tree.
    pub(super) fn entry(&self) -> &proto::PstreeEntry {
        &self.entry
    }

    /// Returns the process's `mm` entry.
    pub(super) fn mm(&self) -> &proto::MmEntry {
        &self.mm
    }

    /// Returns the auxiliary vector, including the pair of zeros at its end.
    pub(super) fn auxiliary_vector(&self) -> Vec<u8> {
        let (pairs, _) = self.mm.mm_saved_auxv.as_chunks::<2>();
        let pairs = pairs.iter().take_while(|[kind, _]| *kind != 0);
        pairs.chain([&[0, 0]]).flatten().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// Returns the mappings, ascending and without overlaps.
    pub(super) fn areas(&self) -> &[Area] {
        &self.areas
    }
}

/// Returns the memory that holds the private pages of a process: that of another process if both share
/// their memory and only the other one has a pagemap.
fn private_of(tables: &Tables, pid: u32) -> Result<MemoryId> {
    let images = tables.images();
    let own = MemoryId::Private(pid.into());
    let has_pages = |memory: MemoryId| images.stat(&memory.pagemap_name()).is_ok();
    if has_pages(own) {
        return Ok(own);
    }
    let ids = |pid: u32| -> Result<Option<ArenaIds>> {
        let ids: Option<proto::TaskKobjIdsEntry> = images.message_if_any(Kind::Ids, pid.into())?;
        Ok(ids.as_ref().map(ArenaIds::of))
    };
    let Some(own_ids) = ids(pid)? else { return Ok(own) };
    for other in tables.tree()?.iter().map(|entry| entry.pid) {
        let memory = MemoryId::Private(other.into());
        let shares = |ids: ArenaIds| ids.share(&own_ids, Arena::Memory);
        if has_pages(memory) && ids(other)?.is_some_and(shares) {
            return Ok(memory);
        }
    }
    Ok(own)
}

/// Reads the `mm` entry of the process `pid`; `None` if it has no address space.
pub(super) fn read_mm(tables: &Tables, pid: u32) -> Result<Option<proto::MmEntry>> {
    let images = tables.images();
    let mm: Option<proto::MmEntry> = images.message_if_any(Kind::Mm, pid.into())?;
    let Some(mut mm) = mm else { return Ok(None) };
    if mm.vmas.is_empty() {
        // Older images have the mappings in a separate image.
        mm.vmas = images.messages_if_any(Kind::Vmas, pid.into())?.unwrap_or_default();
    }
    Ok(Some(mm))
}

/// Converts the mappings of a process to areas.
struct Mappings<'a> {
    tables: &'a Tables,
    pid: u32,
}

impl Mappings<'_> {
    fn areas(&self, mut vmas: Vec<proto::VmaEntry>) -> Result<Vec<Area>> {
        vmas.retain(|entry| entry.status & (vma::GUARD | vma::VSYSCALL) == 0);
        vmas.sort_by_key(|entry| (entry.start, entry.end));
        let mapped = self.tables.mapped()?;
        let mut areas: Vec<Area> = Vec::with_capacity(vmas.len());
        for entry in &vmas {
            let area = self.area(entry, &mapped)?;
            if areas.last().is_some_and(|before| before.end > area.start) {
                return Err(self.bad(entry, "it overlaps another"));
            }
            // Leave out mappings in the kernel's half of the address space.
            if area.end < USER_END {
                areas.push(area);
            }
        }
        Ok(areas)
    }

    fn area(&self, entry: &proto::VmaEntry, mapped: &MappedFiles) -> Result<Area> {
        let aligned = |address| PageIndex::at(address).is_some();
        if entry.start >= entry.end {
            return Err(self.bad(entry, "its end is not after its start"));
        }
        if !aligned(entry.start) || !aligned(entry.end) {
            return Err(self.bad(entry, "it is not made of whole pages"));
        }
        let below = self.below(entry, mapped)?;
        let placed = matches!(below, Below::Mapped(Mapped::Shared(_) | Mapped::File(_)));
        if placed {
            if !aligned(entry.pgoff) {
                return Err(self.bad(entry, "its offset is not that of a page"));
            }
            if entry.pgoff.checked_add(entry.end - entry.start).is_none() {
                return Err(self.bad(entry, "its offset is beyond the end of all files"));
            }
        }
        Ok(Area {
            start: entry.start,
            end: entry.end,
            prot: entry.prot,
            offset: if placed { entry.pgoff } else { 0 },
            private: is_private(entry.status),
            below,
        })
    }

    fn below(&self, entry: &proto::VmaEntry, mapped: &MappedFiles) -> Result<Below> {
        let is = |bits| entry.status & bits != 0;
        let found = if is(vma::VVAR | vma::SOCKET | vma::PLUGIN) {
            return Ok(Below::Unknown);
        } else if is(vma::FILE_PRIVATE | vma::FILE_SHARED) && is(vma::MEMFD) {
            mapped.memfd(entry.shmid)
        } else if is(vma::FILE_PRIVATE | vma::FILE_SHARED) {
            mapped.file(entry.shmid)
        } else if is(vma::ANON_SHARED) {
            Some(Mapped::Shared(entry.shmid))
        } else if is_private(entry.status) {
            Some(Mapped::Zero)
        } else {
            return Ok(Below::Unknown);
        };
        found.map(Below::Mapped).ok_or_else(|| ViewError::NoSuchFile {
            dir: self.tables.path().to_owned(),
            pid: self.pid,
            start: entry.start,
            id: entry.shmid,
        })
    }

    fn bad(&self, entry: &proto::VmaEntry, problem: &'static str) -> ViewError {
        ViewError::BadVma {
            dir: self.tables.path().to_owned(),
            pid: self.pid,
            start: entry.start,
            end: entry.end,
            problem,
        }
    }
}

/// Whether pages of a mapping with this status may be in private memory, by CRIU 4.2's rule
/// (`vma_entry_is_private`, `criu/include/vma.h`).
fn is_private(status: u32) -> bool {
    status & (vma::SHSTK | vma::AIORING) != 0
        || status & vma::REGULAR != 0 && status & (vma::ANON_PRIVATE | vma::FILE_PRIVATE) != 0
}
