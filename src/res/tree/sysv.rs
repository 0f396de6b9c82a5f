//! System V shared memory segments (`shmget(2)`): those that processes have attached and, of a tree
//! with an IPC namespace of its own, all others of that namespace.
//!
//! A segment belongs to the IPC namespace and survives the processes that attach it. In the namespace
//! of the restorer, the restore reuses the segment with the same id if it has the same key and size and
//! no process has it attached; otherwise it creates one with this id. It overwrites the bytes in any
//! case.

use std::{cell::Cell, collections::BTreeMap, fs::File, path::Path};

use nix::{errno::Errno, libc};

use super::{Begun, Collector, Memory, Plan, Restorer};
use crate::{
    image::{
        self, ImageStore, Kind, SnapshotWriter,
        proto::{IpcShmEntry, VmaEntry},
        vma,
    },
    inject::{Script, Task, living},
    proc::Mapping,
    res::{
        ResError, Result,
        mm::mapping::{self, Object},
        ns,
        sysv::{SEGMENT, desc, permissions, to_host, visit},
    },
    sys::{
        fds,
        shm::{self, Segment},
        sysv::Permissions,
    },
    units::{HostPid, HugeSize, IdMap, PAGE_SIZE, RemoteAddr},
};

/// The number that images give to the dumper's IPC namespace.
const NAMESPACE: u32 = 3;

/// `SHM_DEST` (`linux/shm.h`): the kernel removes the segment when the last process detaches it.
const DESTROYED: u32 = 0o1000;

/// `SHM_LOCKED` (`linux/shm.h`): the pages are not swapped out.
const LOCKED: u32 = 0o2000;

/// The permission bits of `shm_perm.mode`.
const PERMISSIONS: u32 = 0o777;

/// `SHM_HUGETLB` (`linux/shm.h`).
const HUGE: u32 = libc::SHM_HUGETLB.cast_unsigned();

/// The segments of a tree.
#[derive(Debug)]
struct Segments {
    /// The number of their namespace in the images.
    namespace: u32,
    /// A process in that namespace, if it is the tree's own.
    pid: Option<HostPid>,
    /// Those that the tree has attached, and all of its own namespace, by id.
    entries: BTreeMap<u32, IpcShmEntry>,
    /// The users and groups of the tree.
    ids: IdMap,
    /// Those of the namespace that no mapping has shown yet.
    unseen: BTreeMap<u32, Segment>,
    /// Those found since the last call of `memory`.
    memory: Vec<Memory>,
}

/// Starts with the segments of the tree's own namespace.
pub(super) fn collector(tasks: &[Task], ids: &IdMap) -> Begun<dyn Collector> {
    let first = living(tasks).next().map(Task::witness);
    let number = first.and_then(|pid| ns::number_of_first(pid, "ipc"));
    let mut segments = Segments {
        namespace: number.unwrap_or(NAMESPACE),
        pid: number.and(first),
        ids: ids.clone(),
        entries: BTreeMap::new(),
        unseen: BTreeMap::new(),
        memory: Vec::new(),
    };
    if let Some(visit) = visit(segments.pid)? {
        for id in shm::segments().map_err(failed("list", 0))? {
            let segment = shm::stat(id).map_err(failed("look at", id))?;
            segments.unseen.insert(id, segment);
        }
        drop(visit);
    }
    Ok(Box::new(segments))
}

impl Collector for Segments {
    fn mapping(&mut self, pid: HostPid, mapping: &Mapping, object: Object) -> Result<Option<u64>> {
        if object != Object::SystemV {
            return Ok(None);
        }
        let id = u32::try_from(mapping.inode).map_err(|_| ResError::Unsupported {
            pid,
            what: format!("it has the System V segment {} attached", mapping.inode),
        })?;
        if self.entries.contains_key(&id) {
            return Ok(Some(id.into()));
        }
        let visit = visit(self.pid)?;
        let segment = shm::stat(id).map_err(failed("look at", id))?;
        drop(visit);
        self.unseen.remove(&id);
        let (RemoteAddr(start), RemoteAddr(end)) = (mapping.start, mapping.end);
        let path = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
        let file = fds::open_noatime(Path::new(&path))
            .map_err(|source| ResError::Read { path: path.into(), source })?;
        self.entries.insert(id, image(id, &segment, mapping::huge_size(mapping), &self.ids));
        self.memory.push(memory(id, file));
        Ok(Some(id.into()))
    }

    /// Opens the segments that no process of the tree has attached, by attaching them.
    fn memory(&mut self) -> Result<Vec<Memory>> {
        let visit = visit(self.pid)?;
        for (id, segment) in std::mem::take(&mut self.unseen) {
            let (file, page_bytes) = shm::open_to_read(id, segment.bytes).map_err(|source| {
                ResError::SharedMemory { number: id.into(), step: "open", source }
            })?;
            let huge = (page_bytes != PAGE_SIZE).then(|| HugeSize::of(page_bytes));
            self.entries.insert(id, image(id, &segment, huge, &self.ids));
            self.memory.push(memory(id, file));
        }
        drop(visit);
        Ok(std::mem::take(&mut self.memory))
    }

    fn write(&self, images: &SnapshotWriter) -> image::Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let entries: Vec<_> = self.entries.values().cloned().collect();
        images.write(Kind::IpcnsShm, self.namespace.into(), &entries)
    }
}

/// Returns a segment as a memory object.
fn memory(id: u32, file: File) -> Memory {
    Memory { number: id.into(), name: format!("System V segment {id}"), file }
}

/// The segments to restore.
#[derive(Debug)]
struct Wanted {
    entries: Vec<IpcShmEntry>,
    /// A process in their namespace, if that is the tree's own.
    first: Cell<Option<HostPid>>,
    is_own: bool,
}

pub(super) fn restorer(plan: &Plan<'_>) -> Begun<dyn Restorer> {
    let own = plan.namespaces.number_of("ipc");
    let mut entries = read(plan.images, own.unwrap_or(NAMESPACE))?;
    let ids = plan.namespaces.ids();
    entries.iter_mut().for_each(|entry| to_host(&mut entry.desc, &ids));
    Ok(Box::new(Wanted { entries, first: Cell::new(None), is_own: own.is_some() }))
}

impl Restorer for Wanted {
    fn make(&self, first: Option<HostPid>) -> Result<Vec<Memory>> {
        self.first.set(first.filter(|_| self.is_own));
        let _visit = visit(self.first.get())?;
        let make = |entry: &IpcShmEntry| {
            let id = entry.desc.id;
            let number = u64::from(id);
            create(entry).map_err(|problem| ResError::Segment { id, problem })?;
            let file = open(entry).map_err(|source| ResError::SharedMemory {
                number,
                step: "open",
                source,
            })?;
            if entry.desc.mode & LOCKED != 0 {
                shm::lock(id).map_err(failed("lock", id))?;
            }
            Ok(memory(id, file))
        };
        self.entries.iter().map(make).collect()
    }

    fn map(&self, entry: &VmaEntry, script: &mut Script) -> bool {
        let is_segment = entry.status & vma::SYSVIPC != 0;
        if is_segment {
            attach(entry, script);
        }
        is_segment
    }

    /// Removes the segments that were marked for removal, now that processes have them attached.
    fn finish(&self) -> Result<()> {
        let _visit = visit(self.first.get())?;
        self.entries
            .iter()
            .try_for_each(|entry| finish(entry).map_err(failed("mark for removal", entry.desc.id)))
    }
}

/// Returns a constructor of the error for a failed call on a segment.
fn failed(step: &'static str, id: u32) -> impl Fn(Errno) -> ResError {
    move |errno| ResError::SharedMemory { number: id.into(), step, source: errno.into() }
}

/// Builds the image entry for a segment.
fn image(id: u32, segment: &Segment, huge: Option<HugeSize>, ids: &IdMap) -> IpcShmEntry {
    IpcShmEntry {
        desc: desc(id, &segment.permissions, ids),
        size: segment.bytes,
        in_pagemaps: Some(true),
        hugetlb_flag: huge.map(|size| size.flags() | HUGE),
    }
}

/// Reads the image of the segments, if there is one.
///
/// # Errors
/// Those of reading an image. Images of CRIU before version 3, which hold the bytes of segments
/// here, are not supported.
fn read(images: &dyn ImageStore, namespace: u32) -> image::Result<Vec<IpcShmEntry>> {
    Ok(images.messages_if_any(Kind::IpcnsShm, namespace.into())?.unwrap_or_default())
}

/// Finds or creates a segment.
///
/// # Errors
/// The id or the key is in use, or a call failed.
fn create(entry: &IpcShmEntry) -> Result<(), String> {
    let desc = &entry.desc;
    match shm::stat(desc.id) {
        Ok(found) => return check(entry, &found),
        Err(Errno::EINVAL | Errno::EIDRM) => {}
        Err(errno) => return Err(format!("look at segment {}: {errno}", desc.id)),
    }
    let (huge, help) = match huge_size(entry) {
        Some(size) => {
            (size.flags() | HUGE, "\nhelp: it has huge pages: see vm.nr_hugepages (hugetlbpage)")
        }
        None => (0, ""),
    };
    let mode = desc.mode & PERMISSIONS | huge;
    let make = || shm::create(desc.key, entry.size, mode);
    SEGMENT.create(desc, make, shm::remove).map_err(|problem| problem + help)?;
    let wanted = Permissions { mode: desc.mode & PERMISSIONS, ..permissions(desc) };
    shm::set_owner(desc.id, &wanted).map_err(|errno| format!("set its owner: {errno}"))
}

fn huge_size(entry: &IpcShmEntry) -> Option<HugeSize> {
    entry.hugetlb_flag.map(HugeSize::in_flags)
}

fn check(entry: &IpcShmEntry, found: &Segment) -> Result<(), String> {
    let desc = &entry.desc;
    if found.permissions.key != desc.key || found.bytes != entry.size {
        return Err(format!(
            "id {} is in use by another segment, with key {:#x} and {} bytes\nhelp: remove that segment with ipcrm(1)",
            desc.id, found.permissions.key, found.bytes
        ));
    }
    if found.attached > 0 {
        return Err(format!(
            "{} other mappings have segment {} attached, the last one by process {}\nhelp: end those processes",
            found.attached, desc.id, found.last_pid
        ));
    }
    Ok(())
}

/// Adds the call that attaches a segment at the address of a mapping.
fn attach(entry: &VmaEntry, script: &mut Script) {
    let read_only = entry.prot & libc::PROT_WRITE.cast_unsigned() == 0;
    let flags = libc::SHM_REMAP | if read_only { libc::SHM_RDONLY } else { 0 };
    let what = format!("attach segment {} at {:#x}", entry.shmid, entry.start);
    script.call(
        what,
        libc::SYS_shmat,
        &[entry.shmid.into(), (entry.start - entry.pgoff).into(), flags.into()],
    );
}

/// Marks a segment for removal if it was marked.
fn finish(entry: &IpcShmEntry) -> Result<(), Errno> {
    if entry.desc.mode & DESTROYED != 0 { shm::remove(entry.desc.id) } else { Ok(()) }
}

/// Opens a segment to fill it.
fn open(entry: &IpcShmEntry) -> std::io::Result<File> {
    let page_bytes = huge_size(entry).map_or(PAGE_SIZE, HugeSize::bytes);
    shm::open(entry.desc.id, entry.size, page_bytes)
}
