//! The shared objects of a snapshot.

use std::collections::{BTreeMap, btree_map::Entry};

use super::{Result, Tables, files::ANONYMOUS, process::read_mm};
use crate::{
    image::{Kind, MemoryId, desc, ipc::memory_of, payload::Layout, proto, vma},
    units::page_bytes,
};

/// The properties of a shared object, without its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SharedObject {
    /// Its size in bytes.
    pub(super) size: Size,
    /// For contents stored outside of pages: the name of an image, and an offset in it.
    pub(super) inline: Option<(String, u64)>,
    /// The key of a System V segment.
    pub(super) key: Option<u32>,
    /// The name that users know: of a memfd, or from the key of a segment.
    pub(super) name: Option<String>,
}

/// The size of a shared object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    /// The size that the kernel reported.
    Exactly(u64),
    /// The end of its highest mapping; pages after it may be stored nevertheless.
    AtLeast(u64),
}

/// Returns the shared objects of a snapshot by shmid: those with pages, and those that are only mapped
/// or open.
pub(super) fn load(tables: &Tables) -> Result<BTreeMap<u64, SharedObject>> {
    let mut objects = BTreeMap::new();
    for memory in tables.chain().memories(tables.snapshot())? {
        if let MemoryId::Shared(shmid) = memory {
            objects.insert(
                shmid,
                SharedObject { size: Size::AtLeast(0), inline: None, key: None, name: None },
            );
        }
    }
    // A pre-dump has neither processes nor descriptors.
    for process in optional_tree(tables)? {
        let Some(mm) = read_mm(tables, process)? else { continue };
        for area in mm.vmas {
            if area.status & vma::ANON_SHARED != 0 && area.status & vma::MEMFD == 0 {
                let end = area.pgoff.saturating_add(area.end.saturating_sub(area.start));
                mapped(&mut objects, area.shmid, end);
            }
        }
    }
    let inodes = tables.images().messages_if_any::<proto::MemfdInodeEntry>(Kind::MemfdInode, 0)?;
    for inode in inodes.into_iter().flatten() {
        let name = String::from_utf8_lossy(&inode.name).replace(['/', '\0'], "?");
        let name = (inode.name != ANONYMOUS).then(|| format!("memfd:{name}"));
        let size = Size::Exactly(inode.size);
        let object = SharedObject { size, inline: None, key: None, name };
        objects.insert(inode.shmid.into(), object);
    }
    for name in segment_images(tables)? {
        segments(tables, &name, &mut objects)?;
    }
    Ok(objects)
}

fn optional_tree(tables: &Tables) -> Result<Vec<u32>> {
    if !tables.images().has(Kind::Pstree, 0) {
        return Ok(Vec::new());
    }
    Ok(tables.tree()?.iter().map(|process| process.pid).collect())
}

/// Records that an object is mapped up to the offset `end`.
fn mapped(objects: &mut BTreeMap<u64, SharedObject>, shmid: u64, end: u64) {
    match objects.entry(shmid) {
        Entry::Vacant(vacant) => {
            vacant.insert(SharedObject {
                size: Size::AtLeast(end),
                inline: None,
                key: None,
                name: None,
            });
        }
        Entry::Occupied(mut occupied) => {
            if let Size::AtLeast(known) = &mut occupied.get_mut().size {
                *known = end.max(*known);
            }
        }
    }
}

/// Returns the names of the images of System V segments, one for each IPC namespace.
fn segment_images(tables: &Tables) -> Result<Vec<String>> {
    let is_one = |name: &String| {
        desc::by_file_name(name).is_some_and(|(desc, _)| desc.kind == Kind::IpcnsShm)
    };
    let names = tables.chain().list(tables.snapshot())?;
    Ok(names.into_iter().filter(is_one).collect())
}

/// Reads the sizes of System V segments. Older images contain the bytes themselves: records where.
fn segments(tables: &Tables, name: &str, objects: &mut BTreeMap<u64, SharedObject>) -> Result<()> {
    let mut reader = tables.images().image_called(name, Kind::IpcnsShm)?;
    while let Some(segment) = reader.next_message::<proto::IpcShmEntry>()? {
        let in_pagemaps = segment.in_pagemaps();
        let start = reader.offset();
        if let Layout::Stretches(stretches) = Layout::ipc_shm(segment.size, in_pagemaps) {
            for stretch in stretches {
                reader.skip(stretch.length, stretch.name)?;
                reader.skip(stretch.padding, "padding")?;
            }
        }
        let inline = (!in_pagemaps).then(|| (name.to_owned(), start));
        let key = Some(segment.desc.key);
        let name = Some(format!("SYSV{:08x}", segment.desc.key));
        let object = SharedObject { size: Size::Exactly(segment.size), inline, key, name };
        objects.insert(memory_of(&segment), object);
    }
    Ok(())
}

impl Size {
    /// Returns the size of an object whose last stored page is followed by page number `pages`.
    pub(super) fn bytes(self, pages: u64) -> u64 {
        match self {
            Self::Exactly(bytes) => bytes,
            Self::AtLeast(bytes) => bytes.max(page_bytes(pages)),
        }
    }
}
