//! System V shared memory segments (`shmget(2)`) that processes have attached.
//!
//! A segment lives in the IPC namespace and outlives those who attach it. A restore
//! finds it again by its id if it is still the one that was dumped and nobody uses it,
//! else it makes one with this id. Its bytes are those of the dump in any case.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::{self, File},
    path::Path,
};

use nix::{errno::Errno, libc};

use super::{Begun, Collector, Memory, Plan, Restorer};
use crate::{
    image::{
        ImageStore, Kind, SnapshotWriter,
        proto::{IpcDescEntry, IpcShmEntry, VmaEntry},
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

/// The number of this program's IPC namespace in images.
const NAMESPACE: u64 = 3;

/// `SHM_DEST` (`linux/shm.h`): the segment goes when nobody has it attached.
const DESTROYED: u32 = 0o1000;

/// What of `shm_perm.mode` are permissions.
const PERMISSIONS: u32 = 0o777;

/// `SHM_HUGETLB` (`linux/shm.h`).
const HUGE: u32 = libc::SHM_HUGETLB.cast_unsigned();

/// Where the id of the next segment can be chosen.
const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";

/// The segments of a tree that is dumped, by their ids.
#[derive(Debug, Default)]
struct Attached(BTreeMap<u32, (IpcShmEntry, File)>);

/// Begins without any.
///
/// # Errors
/// None.
pub(super) fn collector() -> Begun<dyn Collector> {
    Ok(Box::new(Attached::default()))
}

impl Collector for Attached {
    fn mapping(&mut self, pid: HostPid, mapping: &Mapping, object: Object) -> Result<()> {
        if object != Object::SystemV {
            return Ok(());
        }
        let id = u32::try_from(mapping.inode).map_err(|_| ResError::Unsupported {
            pid,
            what: format!("it has the System V segment {} attached", mapping.inode),
        })?;
        if let Entry::Vacant(place) = self.0.entry(id) {
            let entry = collect(id, mapping).map_err(failed("look at", id))?;
            let (RemoteAddr(start), RemoteAddr(end)) = (mapping.start, mapping.end);
            let path = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
            let file = fds::open_unseen(Path::new(&path))
                .map_err(|source| ResError::Read { path: path.into(), source })?;
            place.insert((entry, file));
        }
        Ok(())
    }

    fn finish(&mut self, images: &SnapshotWriter) -> Result<Vec<Memory>> {
        let mut entries = Vec::new();
        let mut memories = Vec::new();
        for (id, (entry, file)) in std::mem::take(&mut self.0) {
            entries.push(entry);
            let name = format!("System V segment {id}");
            memories.push(Memory { number: id.into(), name, file });
        }
        write(&entries, images)?;
        Ok(memories)
    }
}

/// The segments of a tree that is restored.
#[derive(Debug)]
struct Segments(Vec<IpcShmEntry>);

/// Reads the images.
///
/// # Errors
/// Those of reading an image.
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
            Ok(Memory { number, name: format!("System V segment {id}"), file })
        };
        self.0.iter().map(make).collect()
    }

    /// Lets segments go with those who have them attached, if they were to.
    fn finish(&self) -> Result<()> {
        self.0
            .iter()
            .try_for_each(|entry| finish(entry).map_err(failed("let go of", entry.desc.id)))
    }
}

/// Returns what makes an error of one about a segment.
fn failed(step: &'static str, id: u32) -> impl Fn(Errno) -> ResError {
    move |errno| ResError::SharedMemory { number: id.into(), step, source: errno.into() }
}

/// Returns what an image says of a segment, of which there is a mapping.
///
/// # Errors
/// `EINVAL` if it is gone.
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

/// Writes the image of the segments.
///
/// # Errors
/// [`crate::image::ImageError::Write`].
fn write(segments: &[IpcShmEntry], images: &SnapshotWriter) -> crate::image::Result<()> {
    if segments.is_empty() { Ok(()) } else { images.write(Kind::IpcnsShm, NAMESPACE, segments) }
}

/// Reads the image of the segments; there are none without it.
///
/// # Errors
/// Those of reading an image; segments whose bytes are in that image itself, as of
/// dumped namespaces before CRIU 3, are not among them.
fn read(images: &dyn ImageStore) -> crate::image::Result<Vec<IpcShmEntry>> {
    Ok(images.messages_if_any(Kind::IpcnsShm, NAMESPACE)?.unwrap_or_default())
}

/// Finds or makes a segment.
///
/// # Errors
/// Why it cannot be had: what has its id or its key, or which call failed.
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
        .map_err(|errno| format!("make a segment{of_what} with key {:#x}: {errno}", desc.key))?;
    if made != desc.id {
        let _ = shm::remove(made);
        return Err(format!("the kernel made segment {made} instead of {}", desc.id));
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
            "id {} is in use by another segment, of key {:#x} and {} bytes\nhelp: remove that segment with ipcrm(1)",
            desc.id, found.key, found.bytes
        ));
    }
    if found.attached > 0 {
        return Err(format!(
            "segment {} is attached by {} other mappings, last by process {}\nhelp: end those processes",
            desc.id, found.attached, found.last_pid
        ));
    }
    Ok(())
}

/// Adds the call that attaches a segment where a process has it.
pub fn attach(entry: &VmaEntry, script: &mut Script) {
    let read_only = entry.prot & libc::PROT_WRITE.cast_unsigned() == 0;
    let flags = libc::SHM_REMAP | if read_only { libc::SHM_RDONLY } else { 0 };
    let what = format!("attach segment {} at {:#x}", entry.shmid, entry.start);
    script.call(
        what,
        libc::SYS_shmat,
        &[entry.shmid.into(), (entry.start - entry.pgoff).into(), flags.into()],
    );
}

/// Lets a segment go with those who have it attached, if it was to.
///
/// # Errors
/// What `shmctl(2)` returns.
fn finish(entry: &IpcShmEntry) -> Result<(), Errno> {
    if entry.desc.mode & DESTROYED != 0 { shm::remove(entry.desc.id) } else { Ok(()) }
}

/// Opens a segment to fill it.
///
/// # Errors
/// What `shmat(2)` returns; what opening the mapping returns.
fn open(entry: &IpcShmEntry) -> std::io::Result<File> {
    let page_bytes = huge_size(entry).map_or(PAGE_SIZE, HugeSize::bytes);
    shm::open(entry.desc.id, entry.size, page_bytes)
}
