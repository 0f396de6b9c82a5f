//! System V shared memory segments (`shmget(2)`) that processes have attached.
//!
//! A segment belongs to the IPC namespace and survives the processes that attach it. The restore
//! reuses the segment with the same id if it has the same key and size and no process has it
//! attached; otherwise it creates one with this id. It overwrites the bytes in any case.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::{self, File},
    path::Path,
};

use nix::{errno::Errno, libc};

use super::{Begun, Collector, Memory, Plan, Restorer};
use crate::{
    image::{
        self, ImageStore, Kind, SnapshotWriter,
        proto::{IpcDescEntry, IpcShmEntry, VmaEntry},
        vma,
    },
    inject::Script,
    proc::Mapping,
    res::{
        ResError, Result,
        mm::mapping::{self, Object},
    },
    sys::{
        fds,
        shm::{self, Segment},
    },
    units::{HostPid, HugeSize, PAGE_SIZE, RemoteAddr},
};

/// The number that images give to the dumper's IPC namespace.
const NAMESPACE: u64 = 3;

/// `SHM_DEST` (`linux/shm.h`): the kernel removes the segment when the last process detaches it.
const DESTROYED: u32 = 0o1000;

/// The permission bits of `shm_perm.mode`.
const PERMISSIONS: u32 = 0o777;

/// `SHM_HUGETLB` (`linux/shm.h`).
const HUGE: u32 = libc::SHM_HUGETLB.cast_unsigned();

/// The file that chooses the id of the next segment.
const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";

/// The segments that the tree has attached, by id.
#[derive(Debug, Default)]
struct Attached {
    entries: BTreeMap<u32, IpcShmEntry>,
    /// The segments found since the last call of `memory`.
    memory: Vec<Memory>,
}

/// Starts without segments.
pub(super) fn collector() -> Begun<dyn Collector> {
    Ok(Box::new(Attached::default()))
}

impl Collector for Attached {
    fn mapping(&mut self, pid: HostPid, mapping: &Mapping, object: Object) -> Result<Option<u64>> {
        if object != Object::SystemV {
            return Ok(None);
        }
        let id = u32::try_from(mapping.inode).map_err(|_| ResError::Unsupported {
            pid,
            what: format!("it has the System V segment {} attached", mapping.inode),
        })?;
        if let Entry::Vacant(place) = self.entries.entry(id) {
            let entry = collect(id, mapping).map_err(failed("look at", id))?;
            let (RemoteAddr(start), RemoteAddr(end)) = (mapping.start, mapping.end);
            let path = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
            let file = fds::open_noatime(Path::new(&path))
                .map_err(|source| ResError::Read { path: path.into(), source })?;
            place.insert(entry);
            self.memory.push(memory(id, file));
        }
        Ok(Some(id.into()))
    }

    fn memory(&mut self) -> Vec<Memory> {
        std::mem::take(&mut self.memory)
    }

    fn write(&self, images: &SnapshotWriter) -> image::Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let entries: Vec<_> = self.entries.values().cloned().collect();
        images.write(Kind::IpcnsShm, NAMESPACE, &entries)
    }
}

/// Returns a segment as a memory object.
fn memory(id: u32, file: File) -> Memory {
    Memory { number: id.into(), name: format!("System V segment {id}"), file }
}

/// The segments to restore.
#[derive(Debug)]
struct Segments(Vec<IpcShmEntry>);

pub(super) fn restorer(plan: &Plan<'_>) -> Begun<dyn Restorer> {
    Ok(Box::new(Segments(read(plan.images)?)))
}

impl Restorer for Segments {
    fn make(&self) -> Result<Vec<Memory>> {
        let make = |entry: &IpcShmEntry| {
            let id = entry.desc.id;
            let number = u64::from(id);
            create(entry).map_err(|problem| ResError::Segment { id, problem })?;
            let file = open(entry).map_err(|source| ResError::SharedMemory {
                number,
                step: "open",
                source,
            })?;
            Ok(memory(id, file))
        };
        self.0.iter().map(make).collect()
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
        self.0
            .iter()
            .try_for_each(|entry| finish(entry).map_err(failed("mark for removal", entry.desc.id)))
    }
}

/// Returns a constructor of the error for a failed call on a segment.
fn failed(step: &'static str, id: u32) -> impl Fn(Errno) -> ResError {
    move |errno| ResError::SharedMemory { number: id.into(), step, source: errno.into() }
}

/// Builds the image entry for a mapped segment.
///
/// # Errors
/// `EINVAL` if the segment no longer exists.
fn collect(id: u32, mapping: &Mapping) -> Result<IpcShmEntry, Errno> {
    let segment = shm::stat(id)?;
    Ok(IpcShmEntry {
        desc: IpcDescEntry {
            key: segment.key,
            uid: segment.uid,
            gid: segment.gid,
            cuid: segment.creator_uid,
            cgid: segment.creator_gid,
            mode: segment.mode,
            id,
        },
        size: segment.bytes,
        in_pagemaps: Some(true),
        hugetlb_flag: mapping::huge_size(mapping).map(|size| size.flags() | HUGE),
    })
}

/// Reads the image of the segments, if there is one.
///
/// # Errors
/// Those of reading an image. Images of CRIU before version 3, which hold the bytes of segments
/// here, are not supported.
fn read(images: &dyn ImageStore) -> image::Result<Vec<IpcShmEntry>> {
    Ok(images.messages_if_any(Kind::IpcnsShm, NAMESPACE)?.unwrap_or_default())
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
    fs::write(NEXT_ID, desc.id.to_string()).map_err(|error| format!("write {NEXT_ID}: {error}"))?;
    let (huge, of_what) = match huge_size(entry) {
        Some(size) => (size.flags() | HUGE, " of huge pages (see vm.nr_hugepages)"),
        None => (0, ""),
    };
    let made = shm::create(desc.key, entry.size, desc.mode & PERMISSIONS | huge)
        .map_err(|errno| format!("create a segment{of_what} with key {:#x}: {errno}", desc.key))?;
    if made != desc.id {
        let _ = shm::remove(made);
        return Err(format!("the kernel created segment {made} instead of {}", desc.id));
    }
    shm::set_owner(made, desc.uid, desc.gid, desc.mode & PERMISSIONS)
        .map_err(|errno| format!("set the owner of segment {made}: {errno}"))
}

fn huge_size(entry: &IpcShmEntry) -> Option<HugeSize> {
    entry.hugetlb_flag.map(HugeSize::in_flags)
}

fn check(entry: &IpcShmEntry, found: &Segment) -> Result<(), String> {
    let desc = &entry.desc;
    if found.key != desc.key || found.bytes != entry.size {
        return Err(format!(
            "id {} is in use by another segment, with key {:#x} and {} bytes\nhelp: remove that segment with ipcrm(1)",
            desc.id, found.key, found.bytes
        ));
    }
    if found.attached > 0 {
        return Err(format!(
            "{} other mappings have segment {} attached, the last one by process {}\nhelp: end those processes",
            desc.id, found.attached, found.last_pid
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
