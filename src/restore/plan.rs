//! What is to be restored: the images of a tree, read and checked.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
    sync::Arc,
};

use super::{RestoreError, Result, pids::Waiting};
use crate::{
    chain::{Chain, ChainError, Content, MemoryBytes, SnapshotId},
    image::{Kind, MemoryId, proto, read_all, read_files, read_one, vma},
    res::{
        cgroup::{self, Places},
        mapping,
        task::state,
    },
    sys::lock::{Access, DirectoryLocks},
    units::{HostPid, PAGE_SIZE, PageIndex},
};

/// The end of the addresses that a process may have (`TASK_SIZE_MAX` with four
/// levels of page tables).
pub(super) const ADDRESSES_END: u64 = 0x7fff_ffff_f000;

/// A process to be restored.
#[derive(Debug)]
pub(super) struct TaskPlan {
    pub(super) pid: HostPid,
    /// The position of its parent among the tasks; `None` for the root.
    pub(super) parent: Option<usize>,
    pub(super) group: HostPid,
    pub(super) session: HostPid,
    /// Its threads, the leader first.
    pub(super) threads: Vec<ThreadPlan>,
    /// What it has if it lives.
    pub(super) body: Option<Body>,
}

/// A thread to be restored.
#[derive(Debug)]
pub(super) struct ThreadPlan {
    pub(super) tid: HostPid,
    pub(super) core: proto::CoreEntry,
}

/// What a process has that has not ended.
#[derive(Debug)]
pub(super) struct Body {
    pub(super) mm: proto::MmEntry,
    /// Its mappings, ascending, and its ranges of guard pages.
    pub(super) vmas: Vec<proto::VmaEntry>,
    pub(super) guards: Vec<proto::VmaEntry>,
    pub(super) fs: proto::FsEntry,
    pub(super) fds: Vec<proto::FdinfoEntry>,
    /// Its private memory, by address.
    pub(super) memory: Option<MemoryBytes>,
}

impl TaskPlan {
    /// Returns the leader's core.
    pub(super) fn core(&self) -> &proto::CoreEntry {
        &self.threads[0].core
    }

    fn task(&self) -> Result<&proto::TaskCoreEntry> {
        self.core().tc.as_ref().ok_or_else(|| RestoreError::Images {
            pid: self.pid,
            problem: "its core does not say what it was doing".into(),
        })
    }

    /// Returns the signal by which its end is told to its parent; 0 for none.
    pub(super) fn exit_signal(&self) -> u32 {
        let stored = self.core().tc.as_ref().and_then(|task| task.rcriu_exit_signal);
        stored.unwrap_or(nix::libc::SIGCHLD.cast_unsigned())
    }

    /// Returns the process's state, see [`state`].
    pub(super) fn state(&self) -> u32 {
        self.core().tc.as_ref().map_or(state::DEAD, |task| task.task_state)
    }
}

/// A tree to be restored.
#[derive(Debug)]
pub(super) struct Plan {
    /// Parents before their children.
    pub(super) tasks: Vec<TaskPlan>,
    pub(super) files: Vec<proto::FileEntry>,
    pub(super) chain: Arc<Chain>,
    pub(super) snapshot: SnapshotId,
    /// The number of the set of cgroups that the dumper was in.
    dumper_set: Option<u32>,
}

impl Plan {
    /// Returns the directory of the images.
    pub(super) fn dir(&self) -> &Path {
        &self.chain.snapshot(self.snapshot).dir
    }

    /// Says who uses a file of the images, as what, and what it is called: as in
    /// "descriptor 3 of process 12 (/var/log/messages)".
    pub(super) fn user_of(&self, id: u32) -> Option<String> {
        // The path of a FIFO or terminal has an entry of its own.
        let has_path = |entry: &&proto::FileEntry| {
            let fifo = entry.fifo.as_ref().and_then(|fifo| fifo.regf_id);
            [fifo, entry.tty.as_ref().and_then(|tty| tty.regf_id)].contains(&Some(id))
        };
        let id = self.files.iter().find(has_path).map_or(id, |entry| entry.id);
        let users = self.tasks.iter().filter_map(|task| {
            let body = task.body.as_ref()?;
            let descriptor = body.fds.iter().find(|entry| entry.id == id);
            let mapping = body.vmas.iter().find(|entry| {
                entry.status & (vma::FILE_PRIVATE | vma::FILE_SHARED) != 0
                    && entry.shmid == u64::from(id)
            });
            let pid = task.pid;
            Some(match (descriptor, mapping) {
                (Some(entry), _) => format!("descriptor {} of process {pid}", entry.fd),
                _ if body.fs.cwd_id == id => format!("working directory of process {pid}"),
                _ if body.fs.root_id == id => format!("root directory of process {pid}"),
                _ if body.mm.exe_file_id == id => format!("program of process {pid}"),
                (_, Some(entry)) => format!("mapping at {:#x} of process {pid}", entry.start),
                _ => return None,
            })
        });
        let user = users.into_iter().next()?;
        let entry = self.files.iter().find(|entry| entry.id == id)?;
        let path = |id: u32| self.files.iter().find(|entry| entry.id == id)?.reg.as_ref();
        let fifo = entry.fifo.as_ref().and_then(|fifo| fifo.regf_id);
        let name = [Some(id), fifo, entry.tty.as_ref().and_then(|tty| tty.regf_id)];
        let name = name.into_iter().flatten().find_map(path);
        Some(match name {
            Some(file) => format!("{user} ({})", String::from_utf8_lossy(&file.name)),
            None => user,
        })
    }

    /// Reads the images in `dir`, after keeping others from changing them, or from
    /// using them if this program changes them.
    ///
    /// # Errors
    /// What is missing, malformed or contradictory; who changes them now.
    pub(super) fn read(
        dir: &Path,
        mut locks: Option<(&mut DirectoryLocks, Access)>,
    ) -> Result<Self> {
        let mut lock =
            |dir: &Path| locks.as_mut().map_or(Ok(()), |(locks, access)| locks.take(dir, *access));
        lock(dir)?;
        let problem = |problem: String| RestoreError::Directory { path: dir.to_owned(), problem };
        let inventory: proto::InventoryEntry =
            match read_one(&dir.join(Kind::Inventory.file_name(0)), Kind::Inventory) {
                Err(error) if error.is_missing() => {
                    let what =
                        "it has no inventory.img, so it is no complete dump; name one with -D";
                    return Err(problem(what.into()));
                }
                inventory => inventory?,
            };
        if inventory.fdinfo_per_id != Some(true) {
            return Err(problem(
                "it is of a dumper before CRIU 1.0, whose descriptors are not read".into(),
            ));
        }
        let canonical = dir.canonicalize().map_err(|error| problem(error.to_string()))?;
        let chain = Arc::new(Chain::open(&canonical)?);
        let snapshot = chain
            .ids()
            .find(|id| chain.snapshot(*id).dir == canonical)
            .ok_or_else(|| problem("it is no image directory".into()))?;
        lock(&chain.snapshot(chain.base(snapshot)).dir)?;
        let pstree_path = dir.join(Kind::Pstree.file_name(0));
        let pstree: Vec<proto::PstreeEntry> = match read_all(&pstree_path, Kind::Pstree) {
            Err(error) if error.is_missing() => {
                return Err(problem("it has no pstree.img; is it a pre-dump?".into()));
            }
            pstree => pstree?,
        };
        let files = read_files(dir)?.unwrap_or_default();
        let dumper_set = inventory.root_cg_set;
        let mut plan = Self { tasks: Vec::new(), files, chain, snapshot, dumper_set };
        let ordered = order(pstree).map_err(problem)?;
        for (entry, parent) in ordered {
            let task = plan.task(dir, &entry, parent)?;
            plan.tasks.push(task);
        }
        plan.check_pids()?;
        Ok(plan)
    }

    fn task(
        &self,
        dir: &Path,
        entry: &proto::PstreeEntry,
        parent: Option<usize>,
    ) -> Result<TaskPlan> {
        let pid = host_pid(entry.pid);
        let wrong = |problem: String| RestoreError::Images { pid, problem };
        let thread = |tid: u32| -> Result<ThreadPlan> {
            let path = dir.join(Kind::Core.file_name(tid.into()));
            Ok(ThreadPlan { tid: host_pid(tid), core: read_one(&path, Kind::Core)? })
        };
        let mut task = TaskPlan {
            pid,
            parent,
            group: host_pid(entry.pgid),
            session: host_pid(entry.sid),
            threads: vec![thread(entry.pid)?],
            body: None,
        };
        match task.task()?.task_state {
            // The threads that CRIU lists of it are arbitrary numbers.
            state::DEAD => return Ok(task),
            state::ALIVE | state::STOPPED => {}
            other => return Err(wrong(format!("its state is {other}, which is unknown"))),
        }
        if let Some((first, others)) = entry.threads.split_first() {
            if *first != entry.pid {
                return Err(wrong(format!("its first thread is {first}")));
            }
            for tid in others {
                task.threads.push(thread(*tid)?);
            }
        }
        for thread in &task.threads {
            let filtered = thread.core.thread_core.as_ref().is_some_and(|core| {
                core.seccomp_mode
                    .is_some_and(|mode| mode != i32::from(proto::SeccompMode::Disabled))
            });
            if filtered {
                let problem = format!(
                    "thread {} has a seccomp filter, which is not restored yet",
                    thread.tid
                );
                return Err(wrong(problem));
            }
        }
        let number = u64::from(entry.pid);
        let mut mm: proto::MmEntry = read_one(&dir.join(Kind::Mm.file_name(number)), Kind::Mm)?;
        if !mm.aios.is_empty() {
            return Err(wrong(
                "it has a ring of asynchronous I/O, which is not restored yet".into(),
            ));
        }
        let mut all = std::mem::take(&mut mm.vmas);
        all.retain(|entry| !mapping::is_vsyscall(entry));
        let (guards, vmas): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|entry| entry.status & vma::GUARD != 0);
        check_vmas(&vmas).map_err(wrong)?;
        check_vmas(&guards).map_err(wrong)?;
        let files_id = match read_one::<proto::TaskKobjIdsEntry>(
            &dir.join(Kind::Ids.file_name(number)),
            Kind::Ids,
        ) {
            Ok(ids) => ids.files_id,
            Err(error) if error.is_missing() => {
                let ids = task.core().ids.as_ref();
                ids.ok_or_else(|| wrong("it has no ids".into()))?.files_id
            }
            Err(error) => return Err(error.into()),
        };
        let fds = match read_all(&dir.join(Kind::Fdinfo.file_name(files_id.into())), Kind::Fdinfo) {
            Err(error) if error.is_missing() => Vec::new(),
            fds => fds?,
        };
        let memory = match self.chain.index(self.snapshot, MemoryId::Private(number)) {
            Ok(index) => {
                Some(MemoryBytes::new(Arc::clone(&self.chain), index, PageIndex::END.address()))
            }
            Err(ChainError::NoMemory { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let memory = memory.filter(|memory| !memory.is_empty());
        let fs = read_one(&dir.join(Kind::Fs.file_name(number)), Kind::Fs)?;
        task.body = Some(Body { mm, vmas, guards, fs, fds, memory });
        Ok(task)
    }

    /// Checks that every number is free, or waits until it is.
    fn check_pids(&self) -> Result<()> {
        let mut own = HashMap::new();
        for task in &self.tasks {
            for thread in &task.threads {
                if let Some(other) = own.insert(thread.tid, task.pid) {
                    let problem = format!("thread {} is also one of process {other}", thread.tid);
                    return Err(RestoreError::Images { pid: task.pid, problem });
                }
            }
        }
        let waiting = Waiting::begin();
        own.keys().try_for_each(|pid| waiting.until_free(*pid))?;
        Ok(())
    }

    /// Finds the cgroups of the tree.
    ///
    /// # Errors
    /// What is missing.
    pub(super) fn cgroups(&self) -> Result<Places> {
        let threads = self.tasks.iter().flat_map(|task| &task.threads);
        let sets = threads.filter_map(|thread| cgroup::set_of(&thread.core));
        Ok(Places::find(self.dir(), self.dumper_set, sets)?)
    }

    /// Whether the leader of a session or group is no process of the tree.
    pub(super) fn is_outside(&self, leader: HostPid) -> bool {
        !self.tasks.iter().any(|task| task.pid == leader)
    }
}

fn host_pid(number: u32) -> HostPid {
    HostPid(i32::try_from(number).unwrap_or(-1))
}

/// Orders processes so that parents come before their children, with the position
/// of each one's parent.
fn order(
    entries: Vec<proto::PstreeEntry>,
) -> Result<Vec<(proto::PstreeEntry, Option<usize>)>, String> {
    let known: BTreeSet<u32> = entries.iter().map(|entry| entry.pid).collect();
    if known.len() != entries.len() {
        return Err("pstree.img names a process twice".into());
    }
    if let Some(bad) = entries.iter().find(|entry| host_pid(entry.pid).0 <= 0) {
        return Err(format!("pstree.img names a process {}", bad.pid));
    }
    let roots = entries.iter().filter(|entry| !known.contains(&entry.ppid)).count();
    if roots != 1 {
        return Err(format!("pstree.img has {roots} processes without a parent, one expected"));
    }
    let mut children: HashMap<u32, Vec<proto::PstreeEntry>> = HashMap::new();
    let mut ordered: Vec<(proto::PstreeEntry, Option<usize>)> = Vec::new();
    for entry in entries {
        if known.contains(&entry.ppid) {
            children.entry(entry.ppid).or_default().push(entry);
        } else {
            ordered.push((entry, None));
        }
    }
    let mut next = 0;
    while next < ordered.len() {
        for child in children.remove(&ordered[next].0.pid).unwrap_or_default() {
            ordered.push((child, Some(next)));
        }
        next += 1;
    }
    if children.is_empty() { Ok(ordered) } else { Err("pstree.img has a circle".into()) }
}

fn check_vmas(vmas: &[proto::VmaEntry]) -> Result<(), String> {
    let mut end = 0;
    for entry in vmas {
        let aligned = entry.start.is_multiple_of(PAGE_SIZE) && entry.end.is_multiple_of(PAGE_SIZE);
        let fine =
            aligned && entry.start >= end && entry.start < entry.end && entry.end <= ADDRESSES_END;
        if !fine {
            return Err(format!(
                "the mapping {:#x}-{:#x} is malformed or overlaps",
                entry.start, entry.end
            ));
        }
        end = entry.end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_first_and_nonsense_is_refused() {
        let entry = |pid, ppid| proto::PstreeEntry { pid, ppid, ..Default::default() };
        let pids = |entries| {
            order(entries)
                .map(|ordered| ordered.iter().map(|(e, p)| (e.pid, *p)).collect::<Vec<_>>())
        };
        assert_eq!(
            pids(vec![entry(3, 2), entry(1, 0), entry(2, 1)]).unwrap(),
            [(1, None), (2, Some(0)), (3, Some(1))]
        );
        assert!(pids(vec![entry(1, 0), entry(2, 0)]).unwrap_err().contains("2 processes"));
        assert!(pids(vec![entry(1, 0), entry(2, 3), entry(3, 2)]).unwrap_err().contains("circle"));
        assert!(pids(vec![entry(1, 0), entry(1, 0)]).unwrap_err().contains("twice"));
        assert!(pids(vec![entry(0, 7)]).unwrap_err().contains("process 0"));
        let vma = |start, end| proto::VmaEntry { start, end, ..Default::default() };
        check_vmas(&[vma(0x1000, 0x2000), vma(0x2000, 0x4000)]).unwrap();
        for bad in [vma(0x1800, 0x3000), vma(0x3000, 0x3000), vma(0x1000, 1 << 60)] {
            check_vmas(&[vma(0x1000, 0x2000), bad]).unwrap_err();
        }
    }
}
