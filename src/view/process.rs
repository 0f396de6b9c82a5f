//! One dumped process and what it maps.

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

/// The first address that no process can have: the upper half is the kernel's.
const USER_END: u64 = 1 << 63;

/// `vma_entry.prot`: may be read (`asm-generic/mman-common.h`, as the others).
pub(super) const PROT_READ: u32 = 1;
/// May be written.
pub(super) const PROT_WRITE: u32 = 2;
/// May be executed.
pub(super) const PROT_EXEC: u32 = 4;

/// A mapping of a process.
#[derive(Clone, Debug)]
pub(super) struct Area {
    /// The first address.
    pub(super) start: u64,
    /// The first address after it.
    pub(super) end: u64,
    /// What the process may do with it: `PROT_*`.
    pub(super) prot: u32,
    /// The offset of `start` in the file or object that is mapped, in bytes.
    pub(super) offset: u64,
    /// Whether pages may be in the process's private memory.
    pub(super) private: bool,
    /// What pages show that are not.
    pub(super) below: Below,
}

impl Area {
    /// Returns the offset in what is mapped of the byte at `address`.
    pub(super) fn offset_of(&self, address: u64) -> u64 {
        self.offset + (address - self.start)
    }
}

/// What an area shows where its process has no private page.
#[derive(Clone, Debug)]
pub(super) enum Below {
    /// A file, a shared object, or zeros.
    Mapped(Mapped),
    /// What the kernel or a device has there; no image tells.
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
    /// Reads what the process `pid` of a snapshot maps. Neither pagemaps nor the
    /// mapped files are looked at.
    ///
    /// # Errors
    /// [`ViewError::NoSuchProcess`]; [`ViewError::NoAddressSpace`] for a zombie;
    /// [`ViewError::PageSize`]; [`ViewError::BadVma`] for mappings that overlap or are not of whole
    /// pages; [`ViewError::NoSuchFile`]; [`ViewError::Image`].
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
        // Pagemaps do not say in which unit they count.
        if let Some(size) = told_page_size(&mm.mm_saved_auxv).filter(|size| *size != PAGE_SIZE) {
            return Err(ViewError::PageSize { dir: dir.to_owned(), pid, size });
        }
        let areas = Mappings { tables, pid }.areas(mm.vmas.clone())?;
        let private = private_of(tables, pid)?;
        Ok(Self { tables: Arc::clone(tables), entry, mm, areas, private })
    }

    /// Returns the process's pid, as the process itself knew it.
    pub fn pid(&self) -> u32 {
        self.entry.pid
    }

    /// Returns the first address after the process's highest mapping.
    pub fn end(&self) -> u64 {
        self.areas.last().map_or(0, |area| area.end)
    }

    /// Returns the tables of the snapshot that the process is in.
    pub fn tables(&self) -> &Arc<Tables> {
        &self.tables
    }

    /// Returns the name of the process's private memory. Of processes that share it
    /// (`CLONE_VM`), one has it.
    pub fn private(&self) -> MemoryId {
        self.private
    }

    /// Returns the process's place in the tree, in sessions and in groups.
    pub(super) fn entry(&self) -> &proto::PstreeEntry {
        &self.entry
    }

    /// Returns what is known of the process's memory besides its mappings.
    pub(super) fn mm(&self) -> &proto::MmEntry {
        &self.mm
    }

    /// Returns the auxiliary vector, which ends with a pair of zeros.
    pub(super) fn auxiliary_vector(&self) -> Vec<u8> {
        let (pairs, _) = self.mm.mm_saved_auxv.as_chunks::<2>();
        let pairs = pairs.iter().take_while(|[kind, _]| *kind != 0);
        pairs.chain([&[0, 0]]).flatten().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// Returns the process's mappings, ascending and without overlap.
    pub(super) fn areas(&self) -> &[Area] {
        &self.areas
    }
}

/// Returns the memory that holds the private pages of a process: that of another one if the
/// images say that both have the same, and have pages of the other one only.
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

/// Reads what the process `pid` maps; `None` if it has no address space.
pub(super) fn read_mm(tables: &Tables, pid: u32) -> Result<Option<proto::MmEntry>> {
    let images = tables.images();
    let mm: Option<proto::MmEntry> = images.message_if_any(Kind::Mm, pid.into())?;
    let Some(mut mm) = mm else { return Ok(None) };
    if mm.vmas.is_empty() {
        // Older images have them apart.
        mm.vmas = images.messages_if_any(Kind::Vmas, pid.into())?.unwrap_or_default();
    }
    Ok(Some(mm))
}

/// Makes areas of a process's mappings.
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
            // The kernel's half of the address space has no images either.
            if area.end < USER_END {
                areas.push(area);
            }
        }
        Ok(areas)
    }

    fn area(&self, entry: &proto::VmaEntry, mapped: &MappedFiles) -> Result<Area> {
        let aligned = |address| PageIndex::at(address).is_some();
        if entry.start >= entry.end {
            return Err(self.bad(entry, "it ends before it begins"));
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

/// Whether the pages of a mapping with this status are looked for in private
/// memory, as CRIU 4.2 does (`vma_entry_is_private`, `criu/include/vma.h`).
fn is_private(status: u32) -> bool {
    status & (vma::SHSTK | vma::AIORING) != 0
        || status & vma::REGULAR != 0 && status & (vma::ANON_PRIVATE | vma::FILE_PRIVATE) != 0
}
