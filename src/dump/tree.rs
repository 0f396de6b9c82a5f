//! Collects the processes of a stopped tree and writes their images.

use std::{collections::HashMap, path::PathBuf, rc::Rc};

use super::{DumpError, Result, live::AddressSpace, tracking::Tracking};
use crate::{
    image::{
        Kind, MemoryId, SnapshotWriter, proto,
        tree::{Arena, ArenaIds, Arenas},
        vma,
    },
    inject::{Script, TABLE_BYTES, Task, with_session},
    pages::{
        Memory, Origin, ProcessMemory,
        scan::{self, Shown},
    },
    proc::{self, Mapping},
    res::{
        file::FileTable,
        mm::mapping::{self, Object},
        ns,
        task::{self, Calling, Process},
        thread::{self, Thread},
        tree as common,
    },
    sys::pagemap::{PagemapFile, Query, Region, category},
    units::{HostPid, NsPid, PidMap, RemoteAddr},
};

/// The state of a dump while it goes through the processes of a tree.
pub(super) struct Collection<'a> {
    pub(super) images: &'a SnapshotWriter,
    pids: PidMap,
    /// The ids of what processes may share.
    ids: Vec<ArenaIds>,
    arenas: Arenas,
    /// Stack pointers of all threads, by the id of their memory.
    stacks: HashMap<u32, Vec<RemoteAddr>>,
    /// The address spaces that several processes share, by their ids.
    shared_memory: HashMap<u32, proto::MmEntry>,
    pub(super) files: FileTable,
    pub(super) tracking: Tracking,
    /// State of the whole tree.
    common: Vec<Box<dyn common::Collector>>,
    pub(super) memories: Vec<Memory>,
    /// The ids of mapped files of shared memory, by device and inode.
    shared: HashMap<(u32, u32, u64), u32>,
    /// The address spaces of the tree, if they are needed ([`super::live`]).
    pub(super) spaces: Option<Vec<AddressSpace>>,
    pstree: Vec<proto::PstreeEntry>,
    namespaces: Rc<ns::OfTree>,
}

impl<'a> Collection<'a> {
    pub(super) fn new(
        images: &'a SnapshotWriter,
        (pids, arenas, namespaces): (PidMap, Vec<ArenaIds>, Rc<ns::OfTree>),
        files: FileTable,
        tracking: Tracking,
        common: Vec<Box<dyn common::Collector>>,
        tasks: &[Task],
    ) -> Self {
        let mut stacks: HashMap<u32, Vec<RemoteAddr>> = HashMap::new();
        for (task, ids) in tasks.iter().zip(&arenas) {
            let of_memory = stacks.entry(ids.get(Arena::Memory)).or_default();
            of_memory.extend(task.stack_pointers());
        }
        Self {
            images,
            pids,
            ids: arenas.clone(),
            arenas: Arenas::new(arenas),
            stacks,
            shared_memory: HashMap::new(),
            files,
            tracking,
            common,
            memories: Vec::new(),
            shared: HashMap::new(),
            spaces: None,
            pstree: Vec::new(),
            namespaces,
        }
    }

    /// Collects a process and writes its images. What it shares with an earlier process is
    /// in the images already, under the same id.
    ///
    /// # Errors
    /// Why it cannot be dumped.
    pub(super) fn task(&mut self, task: &mut Task, position: usize) -> Result<()> {
        let pid = task.pid;
        let stat = proc::stat(pid)?;
        let number = |pid: HostPid| self.pids.ns(pid).image();
        let mut threads: Vec<HostPid> = task.threads.iter().map(|thread| thread.tid).collect();
        if threads.first() != Some(&pid) {
            threads.insert(0, pid);
        }
        self.pstree.push(proto::PstreeEntry {
            pid: number(pid),
            ppid: if position == 0 { 0 } else { number(task.parent) },
            pgid: number(stat.pgrp),
            sid: number(stat.session),
            threads: threads.iter().copied().map(number).collect(),
            ..self.below(pid, &threads, &stat)
        });
        if task.is_zombie() {
            return Ok(self.write_one(Kind::Core, pid, &task::zombie(pid)?)?);
        }
        let witness = task.witness();
        let mappings = proc::smaps(witness)?;
        let ids = self.ids[position];
        let mut images = self.ask(task, &mappings, ids.get(Arena::Memory))?;
        let kobj_ids = proto::TaskKobjIdsEntry {
            vm_id: ids.get(Arena::Memory),
            files_id: ids.get(Arena::Files),
            fs_id: ids.get(Arena::Fs),
            sighand_id: ids.get(Arena::Handlers),
            ..self.namespaces.ids(witness)
        };
        self.write_one(Kind::Ids, pid, &kobj_ids)?;
        if self.arenas.owns(Arena::Files, position) {
            let fds = self.files.collect_fds(witness, &task::open_process((&*task).into())?)?;
            self.images.write(Kind::Fdinfo, ids.get(Arena::Files).into(), &fds)?;
        }
        images.enter_files((&*task).into(), &mut self.files)?;
        images.write(self.pids.ns(pid).image().into(), self.images)?;
        let memory_id = ids.get(Arena::Memory);
        let is_alone = !self.arenas.is_shared(Arena::Memory, position);
        if let Some(mm) = self.shared_memory.get(&memory_id) {
            // The pages are in the pagemap of the first process that has this memory.
            self.write_one(Kind::Mm, pid, mm)?;
            self.tracking.begin(task, &mappings, is_alone)?;
            return Ok(());
        }
        let mm = self.memory(task, &mappings, images.mm, is_alone)?;
        if let Some(spaces) = &mut self.spaces {
            let id = MemoryId::Private(self.pids.ns(pid).image().into());
            let stacks = self.stacks[&memory_id].clone();
            spaces.push(AddressSpace { pid, id, mappings, stacks });
        }
        self.write_one(Kind::Mm, pid, &mm)?;
        if !is_alone {
            self.shared_memory.insert(memory_id, mm);
        }
        Ok(())
    }

    /// Writes the images of the tree's own namespaces.
    ///
    /// # Errors
    /// Why one cannot be dumped.
    pub(super) fn namespaces(&mut self, tasks: &[Task], options: &ns::Options) -> Result<()> {
        Ok(self.namespaces.dump(tasks, self.pids.ids(), options, self.images)?)
    }

    /// Returns an entry with the numbers of a process in the pid namespaces below that of the tree.
    fn below(&self, pid: HostPid, threads: &[HostPid], stat: &proc::Stat) -> proto::PstreeEntry {
        let Some(below) = self.pids.below() else { return proto::PstreeEntry::default() };
        let spaces = below.numbers(self.pids.ns(pid));
        let numbers = |of: HostPid| {
            let known = below.numbers(self.pids.ns(of));
            let here = |(space, _): &(u64, i32)| {
                let found = known.iter().find(|(other, _)| other == space);
                found.map_or(0, |(_, number)| number.cast_unsigned())
            };
            spaces.iter().map(here).collect::<Vec<u32>>()
        };
        proto::PstreeEntry {
            rcriu_pids: numbers(pid),
            rcriu_groups: numbers(stat.pgrp),
            rcriu_sessions: numbers(stat.session),
            rcriu_tids: threads.iter().copied().flat_map(numbers).collect(),
            ..Default::default()
        }
    }

    fn write_one<M: prost::Message>(
        &self,
        kind: Kind,
        pid: HostPid,
        message: &M,
    ) -> Result<(), crate::image::ImageError> {
        let number = self.pids.ns(pid).image();
        self.images.write(kind, number.into(), std::slice::from_ref(message))
    }

    /// Asks the threads of a process for what only they know, writes their cores, and
    /// returns what is left to write.
    fn ask(
        &mut self,
        task: &mut Task,
        mappings: &[Mapping],
        memory_id: u32,
    ) -> Result<task::Images> {
        let (pid, witness) = (task.pid, task.witness());
        let stopped_by = task.stopped_by();
        let process = Process { pid, witness };
        let mut questions = Vec::new();
        let mut about_task = Vec::new();
        let mut about_namespaces = Vec::new();
        for (position, thread) in task.threads.iter().enumerate() {
            let mut script = Script::new();
            let of = Thread { pid, witness, tid: thread.tid };
            let kinds = thread::ask(of, &mut script);
            if position == 0 {
                about_task = task::ask(&Calling { of: process, mappings }, &mut script)?;
                about_namespaces = self.namespaces.ask(witness, &mut script);
                self.common.iter_mut().for_each(|kind| kind.ask(process, &mut script));
            }
            questions.push((script, of, kinds));
        }
        let room = questions.iter().map(|(script, ..)| script.bytes_needed()).max().unwrap_or(0);
        let locked = proc::status(witness)?.vm_lck_kib;
        let mut later = task::LockLater::default();
        let answers = with_session(
            &mut task.threads,
            mappings,
            &self.stacks[&memory_id],
            TABLE_BYTES.max(room * 2),
            |session, threads| {
                // With mlockall(MCL_FUTURE), memory that was just mapped is locked, too. A process
                // without any locked memory hardly has that.
                let needed = locked.is_some_and(|kib| kib != 0);
                session.with_new_page(threads, mappings, needed, |session, page| {
                    later.locked =
                        session.is_locked() || proc::status(witness)?.vm_lck_kib != locked;
                    later.on_fault =
                        later.locked && page.is_some_and(|page| !is_present(witness, page));
                    Ok(())
                })?;
                let each = questions.iter().enumerate();
                each.map(|(position, (script, ..))| session.run(threads, position, script))
                    .collect::<Result<Vec<_>, _>>()
            },
        )?;
        for (number, collect) in about_namespaces {
            collect(&answers[0], number, self.images)?;
        }
        let mut about_task = Some(about_task);
        let mut of_task = task::Images::default();
        let of_threads = questions.into_iter().zip(&answers).zip(&task.threads);
        for (((_, of, kinds), answers), thread) in of_threads {
            let status = thread.status()?.clone().inside(self.pids.ids());
            let stopped = thread::Stopped { of, thread, status: &status };
            let mut core = thread::collect(kinds, &stopped, answers)?;
            self.common.iter_mut().try_for_each(|kind| kind.thread(of, &mut core))?;
            if let Some(kinds) = about_task.take() {
                let stopped = task::Stopped {
                    of: process,
                    stopped_by,
                    blocked: thread.signal_mask,
                    stat: &proc::stat(pid)?,
                    mappings,
                    pids: &self.pids,
                    lock_later: later,
                };
                let mut images = task::collect(kinds, &stopped, answers)?;
                for kind in &mut self.common {
                    kind.collect(&stopped, answers, &mut images);
                }
                thread::own(&mut core).rcriu_attributes.append(&mut images.attributes);
                core.tc = Some(std::mem::take(&mut images.core));
                of_task = images;
                if let Some(leader) = task::split_leader(&stopped, thread, &mut core)? {
                    self.write_one(Kind::Core, pid, &leader)?;
                }
            }
            self.write_one(Kind::Core, of.tid, &core)?;
        }
        Ok(of_task)
    }

    /// Collects the mappings of a process and plans the copying of its memory; `is_alone`
    /// if no other process shares it.
    fn memory(
        &mut self,
        task: &mut Task,
        mappings: &[Mapping],
        mm: proto::MmEntry,
        is_alone: bool,
    ) -> Result<proto::MmEntry> {
        let pid = task.witness();
        let watch = self.tracking.begin(task, mappings, is_alone)?;
        let pagemap_path = proc_path(pid, "pagemap");
        let failed = |source| DumpError::File { path: proc_path(pid, "pagemap"), source };
        let pagemap = PagemapFile::open(&pagemap_path).map_err(failed)?;
        let mut vmas: Vec<proto::VmaEntry> = Vec::new();
        let mut guards = Vec::new();
        let mut stretches = Vec::new();
        let mut regions = Vec::new();
        for mapping in mappings {
            let object = mapping::object(pid, mapping)?;
            let shmid = match object {
                Object::Vsyscall => continue,
                Object::File => self.files.enter_mapped(pid, mapping)?.into(),
                Object::SharedMemory => {
                    self.tracking.note(pid, mapping);
                    self.shared_object(pid, mapping)?.into()
                }
                _ => 0,
            };
            let number = common::mapping(&mut self.common, pid, mapping, object)?;
            let entry = mapping::entry(mapping, object, number.unwrap_or(shmid));
            if mapping::is_private(&entry) {
                self.tracking.untracked.private += scan::mapping(
                    &pagemap,
                    watch.as_deref(),
                    mapping,
                    shown(object),
                    &mut stretches,
                )
                .map_err(failed)?;
                regions.clear();
                let query = Query { all: category::GUARD, ..Query::default() };
                pagemap.scan(mapping.start, mapping.end, query, &mut regions).map_err(failed)?;
                guards.extend(regions.iter().map(guard));
            }
            match vmas.last_mut() {
                Some(last) if mapping::continues(last, &entry) => last.end = entry.end,
                _ => vmas.push(entry),
            }
        }
        if let Some(watch) = watch {
            watch.scanned()?;
        }
        vmas.extend(guards);
        let mm = proto::MmEntry { vmas, ..mm };
        self.memories.push(Memory {
            id: MemoryId::Private(self.pids.ns(task.pid).image().into()),
            origin: Origin::Process(ProcessMemory::open(pid, mappings)?),
            stretches,
            parent: None,
            running: false,
        });
        Ok(mm)
    }

    /// Returns the id of the file of a mapping of shared memory.
    fn shared_object(&mut self, pid: HostPid, mapping: &Mapping) -> Result<u32> {
        let key = (mapping.dev_major, mapping.dev_minor, mapping.inode);
        if let Some(file_id) = self.shared.get(&key) {
            return Ok(*file_id);
        }
        let file_id = self.files.enter_object(pid, proc::map_file(pid, mapping))?;
        self.shared.insert(key, file_id);
        Ok(file_id)
    }

    /// Plans the copying of shared objects, and writes the images of the whole tree.
    ///
    /// # Errors
    /// Why files cannot be dumped.
    pub(super) fn finish(&mut self) -> Result<()> {
        let mut objects = Vec::new();
        for (shmid, fd) in self.files.shared_memory()? {
            let name = format!("shared memory {shmid}");
            objects.push(Memory::of_object(shmid, fd.into(), name, false)?);
        }
        let pid = |entry: &proto::PstreeEntry| self.pids.host(NsPid::of_image(entry.pid));
        let tree: Vec<_> = self.pstree.iter().map(pid).collect();
        self.tracking.look_at_shared(&tree, &mut objects);
        self.memories.append(&mut objects);
        for kind in &mut self.common {
            for common::Memory { number, name, file } in kind.memory()? {
                let memory = Memory::of_object(number, file, name, false)?;
                self.tracking.note_untracked(&memory);
                self.memories.push(memory);
            }
            kind.write(self.images)?;
        }
        // A fixed order, so that the same tree always gives the same images.
        self.memories.sort_by_key(|memory| memory.id);
        self.files.write(self.images)?;
        Ok(self.images.write(Kind::Pstree, 0, &self.pstree)?)
    }
}

/// Returns what a private mapping shows where the process has no page of its own.
pub(super) fn shown(object: Object) -> Shown {
    match object {
        Object::Vdso => Shown::Vdso,
        Object::AioRing => Shown::AioRing,
        Object::File | Object::SharedMemory => Shown::File,
        _ => Shown::Zeros,
    }
}

/// Whether a page of a process is present in memory.
fn is_present(pid: HostPid, address: RemoteAddr) -> bool {
    let mut regions = Vec::new();
    let query = Query { all: category::PRESENT, ..Query::default() };
    let end = address.plus(crate::units::PAGE_SIZE);
    PagemapFile::open(&proc_path(pid, "pagemap"))
        .and_then(|pagemap| pagemap.scan(address, end, query, &mut regions))
        .is_ok_and(|_| !regions.is_empty())
}

fn guard(region: &Region) -> proto::VmaEntry {
    proto::VmaEntry {
        start: region.start().0,
        end: region.end().0,
        status: vma::GUARD,
        ..Default::default()
    }
}

pub(super) fn proc_path(pid: HostPid, file: &str) -> PathBuf {
    format!("/proc/{pid}/{file}").into()
}
