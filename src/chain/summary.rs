//! Statistics of one snapshot of a chain.

use std::time::SystemTime;

use super::{Chain, ChainError, Result, SnapshotId, holes};
use crate::{
    image::{ImageStore, Kind, MemoryId, Presence, proto, punched},
    units::{PAGE_SIZE, PageRanges, page_bytes},
};

/// Where the pages of one kind of memory are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// In the snapshot's own pages files, including freed pages.
    pub present: u64,
    /// In an ancestor.
    pub in_parent: u64,
    /// In no image.
    pub absent: u64,
    /// How many of the present pages were freed or are holes of their file. A hole reads as
    /// zeros: another program freed the page, or a copy made the file sparse.
    pub punched: u64,
}

impl std::ops::AddAssign for PageCounts {
    fn add_assign(&mut self, other: Self) {
        self.present += other.present;
        self.in_parent += other.in_parent;
        self.absent += other.absent;
        self.punched += other.punched;
    }
}

impl PageCounts {
    /// Returns how many bytes the memory would take in images without parents.
    pub fn flat_bytes(&self) -> u64 {
        page_bytes(self.present + self.in_parent)
    }
}

/// Statistics of one snapshot.
#[derive(Clone, Debug)]
pub struct Summary {
    /// When its inventory was written.
    pub date: SystemTime,
    /// The pids of its processes; in a pre-dump, of those with memory.
    pub processes: Vec<u64>,
    /// Whether it is a pre-dump, which has memory but no processes.
    pub pre_dump: bool,
    /// Pages of private memory.
    pub private: PageCounts,
    /// Pages of shared objects.
    pub shared: PageCounts,
    /// How many bytes its files occupy where they are stored.
    pub disk_bytes: u64,
}

impl Summary {
    /// Computes the statistics of a snapshot.
    ///
    /// # Errors
    /// Directories, images and pages files that cannot be read.
    pub fn of(chain: &Chain, id: SnapshotId) -> Result<Self> {
        let images = &**chain.images(id);
        let failed = |source| ChainError::Directory { path: images.name().to_owned(), source };
        let disk_bytes = disk_bytes(images)?;
        let inventory = images.stat(&Kind::Inventory.file_name(0)).map_err(failed)?;
        let date = inventory.modified;
        let (mut private, mut shared) = (PageCounts::default(), PageCounts::default());
        let memories = chain.memories(id)?;
        for memory in &memories {
            let counts = count(chain, id, *memory)?;
            match memory {
                MemoryId::Private(_) => private += counts,
                MemoryId::Shared(_) => shared += counts,
            }
        }
        let tree = processes(chain, id)?;
        let pre_dump = tree.is_none();
        let with_memory = || {
            let pid = |memory: &MemoryId| match memory {
                MemoryId::Private(pid) => Some(*pid),
                MemoryId::Shared(_) => None,
            };
            memories.iter().filter_map(pid).collect()
        };
        let processes = tree.unwrap_or_else(with_memory);
        Ok(Self { date, processes, pre_dump, private, shared, disk_bytes })
    }

    /// Returns the counts of all memory.
    pub fn total(&self) -> PageCounts {
        let mut total = self.private;
        total += self.shared;
        total
    }
}

/// Returns how many bytes the files of a snapshot occupy where they are stored.
///
/// # Errors
/// [`ChainError::Directory`].
pub fn disk_bytes(images: &dyn ImageStore) -> Result<u64> {
    let failed = |source| ChainError::Directory { path: images.name().to_owned(), source };
    images.allocated().map_err(failed)
}

/// Returns the pids of a snapshot's processes; `None` for a pre-dump, which has no process
/// tree.
fn processes(chain: &Chain, id: SnapshotId) -> Result<Option<Vec<u64>>> {
    let tree = chain.images(id).messages_if_any::<proto::PstreeEntry>(Kind::Pstree, 0)?;
    Ok(tree.map(|tree| tree.iter().map(|process| process.pid.into()).collect()))
}

fn count(chain: &Chain, id: SnapshotId, memory: MemoryId) -> Result<PageCounts> {
    let images = &**chain.images(id);
    let mut reader = images.pagemap(memory)?;
    let mut counts = PageCounts::default();
    for entry in reader.by_ref() {
        let entry = entry?;
        let count = match entry.presence {
            Presence::Present => &mut counts.present,
            Presence::Parent => &mut counts.in_parent,
            Presence::Absent => &mut counts.absent,
        };
        // Entries do not overlap, so the sum stays below 2^52.
        *count += entry.pages;
    }
    if counts.present > 0 {
        let file = chain.files().get(chain.enter_pages(id, reader.pages_id()))?;
        let gone = punched::read(images, &memory.pagemap_name(), reader.pages_id())?;
        let mut punched: PageRanges = gone.unwrap_or_default().within(0..counts.present).collect();
        for hole in holes::in_file(&file, 0, page_bytes(counts.present))? {
            punched.insert(hole.start.div_ceil(PAGE_SIZE)..hole.end / PAGE_SIZE);
        }
        counts.punched = punched.pages();
    }
    Ok(counts)
}
