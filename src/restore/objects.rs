//! Shared memory: this program makes it once and fills it while the processes are made; the
//! processes map it.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::{Arc, Mutex, PoisonError},
};

use memmap2::{MmapOptions, MmapRaw};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use super::{RestoreError, Result, free::Free, plan::Plan};
use crate::{
    chain::{Chain, ChainError, MemoryBytes, SnapshotId, read_at},
    image::MemoryId,
    pages::Chunks,
    res::{file::Installer, mm::mapping, tree},
    sys::process,
    units::{HostPid, PageIndex, RemoteAddr, page_bytes},
};

/// Shared memory that is to be filled.
#[derive(Debug)]
pub(super) struct Object {
    shmid: u64,
    file: File,
    memory: Option<MemoryBytes>,
}

/// Makes all shared memory of the tree, still empty; [`fill`] fills it.
///
/// # Errors
/// [`RestoreError::Object`].
pub(super) fn create(plan: &Plan, files: &mut Installer<'_>) -> Result<Vec<Object>> {
    let mut objects = Vec::new();
    for shmid in files.make_memory()? {
        objects.push(object(plan, shmid, &files.opened.objects[&shmid])?);
    }
    let opened = &mut files.opened;
    for (shmid, bytes) in anonymous(plan) {
        let failed = |source| RestoreError::Object { shmid, step: "make", source };
        let fd = process::shared_anonymous(bytes, None).map_err(failed)?;
        objects.push(object(plan, shmid, &fd)?);
        opened.objects.insert(shmid, fd);
    }
    let first = opened.helpers.first();
    let namespaces = plan.namespaces.borrow();
    for kind in &plan.common {
        for tree::Memory { number, file, .. } in kind.make(first, &namespaces)? {
            let memory = memory_of(&plan.chain, plan.snapshot, number)?;
            objects.push(Object { shmid: number, file, memory });
        }
    }
    Ok(objects)
}

/// Returns the shared objects that are known only from mappings, and the sizes that the
/// mappings imply.
fn anonymous(plan: &Plan) -> BTreeMap<u64, u64> {
    let mut found = BTreeMap::new();
    let bodies = plan.tasks.iter().filter_map(|task| task.body.as_ref());
    for entry in bodies.flat_map(|body| &body.vmas) {
        if mapping::is_anonymous_object(entry) {
            let end = entry.pgoff.saturating_add(entry.end - entry.start);
            let size = found.entry(entry.shmid).or_insert(0);
            *size = end.max(*size);
        }
    }
    found
}

fn object(plan: &Plan, shmid: u64, fd: &OwnedFd) -> Result<Object> {
    let failed = |source| RestoreError::Object { shmid, step: "open", source };
    // A separate file description: that of the tree may be in append mode, which ignores
    // the offset.
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let file = File::options().read(true).write(true).open(path).map_err(failed)?;
    Ok(Object { shmid, file, memory: memory_of(&plan.chain, plan.snapshot, shmid)? })
}

fn memory_of(chain: &Arc<Chain>, snapshot: SnapshotId, shmid: u64) -> Result<Option<MemoryBytes>> {
    match chain.index(snapshot, MemoryId::Shared(shmid)) {
        Ok(index) => Ok(Some(MemoryBytes::new(Arc::clone(chain), index, PageIndex::END.address()))),
        Err(ChainError::NoMemory { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether the images hold pages of any object.
pub(super) fn any_filled(objects: &[Object]) -> bool {
    objects.iter().any(|object| object.memory.is_some())
}

/// Fills all objects, and reports the pages to `free`.
///
/// # Errors
/// [`RestoreError::Object`]; errors of the chain.
pub(super) fn fill(objects: &[Object], free: Option<&Free>) -> Result<()> {
    for object in objects {
        let Some(memory) = &object.memory else { continue };
        let failed = |source| RestoreError::Object { shmid: object.shmid, step: "fill", source };
        let target = Target::new(&object.file).map_err(failed)?;
        // The object may end within its last page.
        let size = object.file.metadata().map_err(failed)?.len();
        let all = PageIndex(0)..PageIndex::END;
        let chunks = Chunks::new(memory, std::slice::from_ref(&all));
        // The kernel lets one thread at a time write to a file; other threads would only
        // take processor time from those that fill private memory.
        let writing = Mutex::new(());
        chunks.try_each(|chunk, buffer| {
            buffer.resize(usize::try_from(page_bytes(chunk.pages)).expect("a chunk"), 0);
            let offset = chunk.first.address();
            read_at(memory, offset, buffer)?;
            let inside = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
            buffer.truncate(inside);
            let turn = writing.lock().unwrap_or_else(PoisonError::into_inner);
            target.write(buffer, offset).map_err(failed)?;
            drop(turn);
            free.map_or(Ok(()), |free| free.restored(memory.index(), chunk.first, chunk.pages))
        })?;
    }
    Ok(())
}

/// Where the bytes of an object go.
enum Target<'a> {
    File(&'a File),
    Mapping(MmapRaw),
}

impl<'a> Target<'a> {
    fn new(file: &'a File) -> io::Result<Self> {
        if fstatfs(file)?.filesystem_type() != HUGETLBFS_MAGIC {
            return Ok(Self::File(file));
        }
        // Files of huge pages cannot be written, but mapped. The mappings of the tree
        // reserve the pages.
        MmapOptions::new().no_reserve_swap().map_raw(file).map(Self::Mapping)
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.write_all_at(bytes, offset),
            Self::Mapping(mapping) => {
                // The kernel writes, and reports if there is no huge page left.
                let own = HostPid::own();
                let start = mapping.as_mut_ptr().addr() as u64;
                Ok(process::write_memory(own, RemoteAddr(start + offset), bytes)?)
            }
        }
    }
}
