//! Which pages a snapshot has besides those in pagemaps.

use std::collections::BTreeMap;

use crate::{
    image::{ImageStore, Kind, MemoryId, proto, vma},
    units::{PAGE_SIZE, PageIndex, PageRanges},
};

/// The pages that a memory may have.
#[derive(Debug, Default)]
pub(super) struct Mapped {
    /// Those that are zero unless a pagemap has them.
    pub(super) zero: PageRanges,
    /// Those that are in a file unless a pagemap has them.
    pub(super) file: PageRanges,
}

impl Mapped {
    /// Returns the pages of all memories of a snapshot. Images that cannot be read have
    /// none: only a dump's pagemaps are needed.
    pub(super) fn of(images: &dyn ImageStore) -> BTreeMap<MemoryId, Self> {
        let mut found: BTreeMap<MemoryId, Self> = BTreeMap::new();
        let tree = images.messages_if_any::<proto::PstreeEntry>(Kind::Pstree, 0);
        for process in tree.ok().flatten().into_iter().flatten() {
            for area in areas(images, process.pid) {
                enter(&mut found, process.pid, &area);
            }
        }
        let inodes = images.messages_if_any::<proto::MemfdInodeEntry>(Kind::MemfdInode, 0);
        for inode in inodes.ok().flatten().into_iter().flatten() {
            let object = found.entry(MemoryId::Shared(inode.shmid.into())).or_default();
            object.zero.insert(0..inode.size.div_ceil(PAGE_SIZE).min(PageIndex::END.0));
        }
        found
    }
}

fn areas(images: &dyn ImageStore, pid: u32) -> Vec<proto::VmaEntry> {
    let mm = images.message_if_any::<proto::MmEntry>(Kind::Mm, pid.into());
    match mm {
        Ok(Some(mm)) if !mm.vmas.is_empty() => mm.vmas,
        // Older images have them apart.
        _ => images.messages_if_any(Kind::Vmas, pid.into()).ok().flatten().unwrap_or_default(),
    }
}

fn enter(found: &mut BTreeMap<MemoryId, Mapped>, pid: u32, area: &proto::VmaEntry) {
    /// Mappings whose pages are not in images.
    const NONE: u32 = vma::VSYSCALL | vma::VVAR | vma::SOCKET | vma::PLUGIN | vma::GUARD;
    let len = area.end.saturating_sub(area.start);
    let pages = |start: u64| {
        let end = start.saturating_add(len).div_ceil(PAGE_SIZE).min(PageIndex::END.0);
        PageIndex::holding(start).0..end
    };
    if area.status & NONE != 0 {
        return;
    }
    let private = MemoryId::Private(pid.into());
    if area.status & vma::ANON_SHARED != 0 {
        let object = found.entry(MemoryId::Shared(area.shmid)).or_default();
        object.zero.insert(pages(area.pgoff));
    } else if area.status & vma::FILE_PRIVATE != 0 {
        found.entry(private).or_default().file.insert(pages(area.start));
    } else if area.status & vma::FILE_SHARED == 0 && area.prot != 0 {
        // What may not be touched is only reserved, often far more than there is.
        found.entry(private).or_default().zero.insert(pages(area.start));
    }
}
