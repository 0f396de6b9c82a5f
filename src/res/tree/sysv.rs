//! System V shared memory segments (`shmget(2)`): those that processes have attached and, of a tree
//! with an IPC namespace of its own, all others of that namespace.
//!
//! A segment belongs to the IPC namespace and survives the processes that attach it. In the namespace
//! of the restorer, the restore reuses the segment with the same id if it has the same key and size and
//! no process has it attached; otherwise it creates one with this id. It overwrites the bytes in any
//! case.

use std::{cell::RefCell, collections::BTreeMap, fs::File, path::Path};

use nix::{errno::Errno, libc};

use super::{Begun, Collector, Memory, Plan, Restorer};
use crate::{
    image::{
        self, ImageStore, Kind, SnapshotWriter,
        ipc::memory_of,
        proto::{IpcShmEntry, VmaEntry},
        vma,
    },
    inject::{Script, Task, living},
    proc::{self, Mapping},
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
        visit::{Place, Visit},
    },
    units::{HostPid, HugeSize, IdMap, PAGE_SIZE, RemoteAddr},
};

/// The name of IPC namespaces in `/proc/PID/ns`.
const FILE: &str = "ipc";

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
    /// Those of the namespace of the first process come first.
    spaces: Vec<Space>,
    /// The users and groups of the tree.
    ids: IdMap,
    /// Those found since the last call of `memory`.
    memory: Vec<Memory>,
}

/// The segments of an IPC namespace.
#[derive(Debug)]
struct Space {
    inode: u64,
    /// The number of the namespace in the images.
    namespace: u32,
    /// A process in it, if it is the tree's own.
    pid: Option<HostPid>,
    is_first: bool,
    /// Those that the tree has attached, and all of its own namespace, by id.
    entries: BTreeMap<u32, IpcShmEntry>,
    /// Those of the namespace that no mapping has shown yet.
    unseen: BTreeMap<u32, Segment>,
}

/// Starts with the segments of the tree's own namespaces.
pub(super) fn collector(tasks: &[Task], ids: &IdMap) -> Begun<dyn Collector> {
    let namespaces = ns::OfTree::of(tasks);
    let mut spaces: Vec<Space> = Vec::new();
    for pid in living(tasks).map(Task::witness) {
        let inode = proc::namespace(pid, FILE)?;
        if spaces.iter().any(|space| space.inode == inode) {
            continue;
        }
        let (namespace, member) =
            namespaces.look_up(FILE, inode).unwrap_or((NAMESPACE, HostPid::own()));
        let pid = (member != HostPid::own()).then_some(member);
        let is_first = spaces.is_empty();
        let (entries, mut unseen) = (BTreeMap::new(), BTreeMap::new());
        if let Some(visit) = visit(pid)? {
            for id in shm::segments().map_err(failed("list", 0))? {
                let segment = shm::stat(id).map_err(failed("look at", id))?;
                unseen.insert(id, segment);
            }
            drop(visit);
        }
        spaces.push(Space { inode, namespace, pid, is_first, entries, unseen });
    }
    Ok(Box::new(Segments { spaces, ids: ids.clone(), memory: Vec::new() }))
}

impl Space {
    /// Returns the number of the memory of a segment. That of another namespace than the first process's cannot be
    /// its id, which a segment of each namespace may have.
    fn number(&self, id: u32) -> u64 {
        let space = if self.is_first { 0 } else { u64::from(self.namespace) << u32::BITS };
        space | u64::from(id)
    }

    fn add(&mut self, id: u32, segment: &Segment, huge: Option<HugeSize>, ids: &IdMap) {
        let number = self.number(id);
        let mut entry = image(id, segment, huge, ids);
        entry.rcriu_shmid = (number != u64::from(id)).then_some(number);
        self.entries.insert(id, entry);
    }
}

impl Collector for Segments {
    fn mapping(&mut self, pid: HostPid, mapping: &Mapping, object: Object) -> Result<Option<u64>> {
        if object != Object::SystemV {
            return Ok(None);
        }
        let unsupported = |what: String| ResError::Unsupported { pid, what };
        let id = u32::try_from(mapping.inode).map_err(|_| {
            unsupported(format!("it has the System V segment {} attached", mapping.inode))
        })?;
        let inode = proc::namespace(pid, FILE)?;
        let space = self.spaces.iter_mut().find(|space| space.inode == inode);
        let space = space.expect("the tree is stopped");
        let number = space.number(id);
        if space.entries.get(&id).is_some_and(|entry| is_shown(mapping, entry.desc.key)) {
            return Ok(Some(number));
        }
        let visit = visit(space.pid)?;
        let segment = shm::stat(id);
        drop(visit);
        // A process keeps what it has attached when it moves to another namespace.
        let segment = match segment {
            Ok(segment) if is_shown(mapping, segment.permissions.key) => segment,
            Ok(_) | Err(Errno::EINVAL | Errno::EIDRM) => {
                return Err(unsupported(format!(
                    "it has the System V segment {id} ({}) attached, which is not one of its IPC namespace",
                    String::from_utf8_lossy(&mapping.name)
                )));
            }
            Err(errno) => return Err(failed("look at", id)(errno)),
        };
        space.unseen.remove(&id);
        let (RemoteAddr(start), RemoteAddr(end)) = (mapping.start, mapping.end);
        let path = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
        let file = fds::open_noatime(Path::new(&path))
            .map_err(|source| ResError::Read { path: path.into(), source })?;
        space.add(id, &segment, mapping::huge_size(mapping), &self.ids);
        self.memory.push(memory(number, id, file));
        Ok(Some(number))
    }

    /// Opens the segments that no process of the tree has attached, by attaching them.
    fn memory(&mut self) -> Result<Vec<Memory>> {
        for space in &mut self.spaces {
            let visit = visit(space.pid)?;
            for (id, segment) in std::mem::take(&mut space.unseen) {
                let (file, page_bytes) =
                    shm::open_to_read(id, segment.bytes).map_err(|source| {
                        ResError::SharedMemory { number: id.into(), step: "open", source }
                    })?;
                let huge = (page_bytes != PAGE_SIZE).then(|| HugeSize::of(page_bytes));
                space.add(id, &segment, huge, &self.ids);
                self.memory.push(memory(space.number(id), id, file));
            }
            drop(visit);
        }
        Ok(std::mem::take(&mut self.memory))
    }

    fn write(&self, images: &SnapshotWriter) -> image::Result<()> {
        for space in self.spaces.iter().filter(|space| !space.entries.is_empty()) {
            let entries: Vec<_> = space.entries.values().cloned().collect();
            images.write(Kind::IpcnsShm, space.namespace.into(), &entries)?;
        }
        Ok(())
    }
}

/// Whether a mapping may be one of the segment with this key: the kernel names the mapping by it.
fn is_shown(mapping: &Mapping, key: u32) -> bool {
    mapping.name.starts_with(format!("/SYSV{key:08x}").as_bytes())
}

/// Returns a segment as a memory object.
fn memory(number: u64, id: u32, file: File) -> Memory {
    Memory { number, name: format!("System V segment {id}"), file }
}

/// The segments to restore.
#[derive(Debug)]
struct Wanted {
    spaces: Vec<WantedSpace>,
    /// The number of the namespace that the first process gets of its own.
    home: Option<u32>,
    /// The ways to the namespaces of the tree, once they are made.
    entrances: RefCell<Vec<(u32, File)>>,
}

/// The segments of a namespace, which has this number in the images.
#[derive(Debug)]
struct WantedSpace {
    namespace: u32,
    entries: Vec<IpcShmEntry>,
}

pub(super) fn restorer(plan: &Plan<'_>) -> Begun<dyn Restorer> {
    let home = plan.namespaces.number_of(FILE);
    let mut numbers = vec![home.unwrap_or(NAMESPACE)];
    numbers.extend(plan.namespaces.other_numbers(FILE));
    if !numbers.contains(&NAMESPACE) {
        numbers.push(NAMESPACE);
    }
    let ids = plan.namespaces.ids();
    let mut spaces = Vec::new();
    for namespace in numbers {
        let mut entries = read(plan.images, namespace)?;
        entries.iter_mut().for_each(|entry| to_host(&mut entry.desc, &ids));
        spaces.push(WantedSpace { namespace, entries });
    }
    Ok(Box::new(Wanted { spaces, home, entrances: RefCell::default() }))
}

impl Wanted {
    /// Enters a namespace; stays in that of rcriu if it is none of the tree's own.
    fn visit(&self, namespace: u32) -> Result<Option<Visit>> {
        let entrances = self.entrances.borrow();
        let found = entrances.iter().find(|(number, _)| *number == namespace);
        let visit = found.map(|(_, entrance)| Visit::with(entrance, Place::Ipc)).transpose();
        visit.map_err(|source| {
            let path = format!("/proc/thread-self/ns/{FILE}");
            ResError::Read { path: path.into(), source }
        })
    }
}

impl Restorer for Wanted {
    fn make(&self, first: Option<HostPid>, namespaces: &ns::Wanted) -> Result<Vec<Memory>> {
        let mut entrances = Vec::new();
        if let Some((home, first)) = self.home.zip(first) {
            let path = format!("/proc/{first}/ns/{FILE}");
            let opened = File::open(&path);
            let opened = opened.map_err(|source| ResError::Read { path: path.into(), source })?;
            entrances.push((home, opened));
        }
        let others = namespaces.others(FILE).map_err(|source| ResError::Read {
            path: format!("/proc/self/ns/{FILE}").into(),
            source,
        })?;
        entrances.extend(others);
        self.entrances.replace(entrances);
        let mut made = Vec::new();
        for space in &self.spaces {
            let visit = self.visit(space.namespace)?;
            for entry in &space.entries {
                made.push(make(entry)?);
            }
            drop(visit);
        }
        Ok(made)
    }

    fn map(&self, entry: &VmaEntry, script: &mut Script) -> bool {
        let is_segment = entry.status & vma::SYSVIPC != 0;
        if is_segment {
            let mut all = self.spaces.iter().flat_map(|space| &space.entries);
            let found = all.find(|segment| memory_of(segment) == entry.shmid);
            attach(entry, found.map_or(entry.shmid, |segment| segment.desc.id.into()), script);
        }
        is_segment
    }

    /// Removes the segments that were marked for removal, now that processes have them attached.
    fn finish(&self) -> Result<()> {
        for space in &self.spaces {
            let _visit = self.visit(space.namespace)?;
            for entry in &space.entries {
                finish(entry).map_err(failed("mark for removal", entry.desc.id))?;
            }
        }
        Ok(())
    }
}

/// Makes a segment in the namespace of the calling thread.
fn make(entry: &IpcShmEntry) -> Result<Memory> {
    let id = entry.desc.id;
    let number = memory_of(entry);
    create(entry).map_err(|problem| ResError::Segment { id, problem })?;
    let opened = open(entry);
    let file = opened.map_err(|source| ResError::SharedMemory { number, step: "open", source })?;
    if entry.desc.mode & LOCKED != 0 {
        shm::lock(id).map_err(failed("lock", id))?;
    }
    Ok(memory(number, id, file))
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
        rcriu_shmid: None,
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
fn attach(entry: &VmaEntry, id: u64, script: &mut Script) {
    let read_only = entry.prot & libc::PROT_WRITE.cast_unsigned() == 0;
    let flags = libc::SHM_REMAP | if read_only { libc::SHM_RDONLY } else { 0 };
    let what = format!("attach segment {id} at {:#x}", entry.start);
    script.call(
        what,
        libc::SYS_shmat,
        &[id.into(), (entry.start - entry.pgoff).into(), flags.into()],
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
