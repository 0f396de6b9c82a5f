//! The processes of a snapshot, read and checked against each other.
//!
//! All defects that images alone can have are found here, without looking at the machine. A
//! restore runs these checks before it makes a process; `imgfs check` reports all of their
//! findings. State that is valid but not supported by a restore is reported as such.

mod arenas;
mod below;
mod births;
mod files;
mod memory;
mod namespaces;
mod order;
pub mod place;
mod task;

use std::fmt;

use super::{ImageError, ImageStore, Kind, proto, read_files, seccomp, vma};

use crate::arch::Machine;

pub use self::{
    arenas::{Arena, ArenaIds, Arenas},
    below::below,
    births::{Birth, Births, HelperPlan, Kin, Maker},
    files::timer_problem,
    namespaces::{time_problem, user_problem, uts_problem},
    task::undone,
};

/// The supported versions of the format (`inventory_entry.img_version`): CRIU's
/// `CRTOOLS_IMAGES_V1`, and `CRTOOLS_IMAGES_V1_1`, in which a common magic comes before the
/// magic of each image.
pub const VERSIONS: [u32; 2] = [1, 2];

/// A reason why a tree cannot be restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Whether the images contradict themselves or the kernel. Otherwise they are valid,
    /// but hold state that this program does not restore.
    pub is_broken: bool,
    /// The message, which names the object.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Collects problems.
#[derive(Debug, Default)]
struct Problems(Vec<Problem>);

impl Problems {
    fn broken(&mut self, text: impl Into<String>) {
        self.0.push(Problem { is_broken: true, text: text.into() });
    }

    fn not_restored(&mut self, text: impl Into<String>) {
        self.0.push(Problem { is_broken: false, text: text.into() });
    }

    /// Returns an image; records a problem if it could not be read.
    fn image<T>(&mut self, image: Result<T, ImageError>) -> Option<T> {
        let failed = |error| self.broken(crate::causes::with_sources(&error));
        image.map_err(failed).ok()
    }

    /// Like [`Self::image`], for the image `name` of a process, which must exist.
    fn own_image<T>(&mut self, name: &str, image: Result<T, ImageError>) -> Option<T> {
        match image {
            Err(error) if error.is_missing() => {
                self.broken(format!("there is no {name}"));
                None
            }
            image => self.image(image),
        }
    }
}

/// A process of a snapshot.
#[derive(Clone, Debug)]
pub struct Task {
    /// Its pid, group and session.
    pub entry: proto::PstreeEntry,
    /// The position of its parent; `None` for the root.
    pub parent: Option<usize>,
    /// The cores of its threads, that of the leader first.
    pub threads: Vec<(u32, proto::CoreEntry)>,
    /// The ids of what it may share with others.
    pub ids: ArenaIds,
    /// The rest, if it has not ended.
    pub body: Option<Body>,
}

/// The state of a process that has not ended.
#[derive(Clone, Debug)]
pub struct Body {
    /// Its address space, without its mappings.
    pub mm: proto::MmEntry,
    /// Its mappings, ascending.
    pub vmas: Vec<proto::VmaEntry>,
    /// Its ranges of guard pages, ascending.
    pub guards: Vec<proto::VmaEntry>,
    /// Its root and working directory.
    pub fs: proto::FsEntry,
    /// Its descriptors.
    pub fds: Vec<proto::FdinfoEntry>,
    /// The numbers of its namespaces, and of what it may share with others.
    pub ids: proto::TaskKobjIdsEntry,
}

/// The processes of a snapshot and their open files.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    /// Parents before their children.
    pub tasks: Vec<Task>,
    /// The table of open files.
    pub files: Vec<proto::FileEntry>,
    /// The inventory, in which the dump describes itself.
    pub inventory: proto::InventoryEntry,
}

/// Values of `task_core_entry.task_state` (CRIU 4.2, `compel/include/uapi/task-state.h`).
pub mod state {
    /// It runs or sleeps.
    pub const ALIVE: u32 = 1;
    /// It has ended, and its parent has not waited for it.
    pub const DEAD: u32 = 2;
    /// A signal has stopped it.
    pub const STOPPED: u32 = 3;
}

/// Returns the signal that reports the end of a process to its parent; 0 for none. `core` is that
/// of its first thread.
pub fn exit_signal(core: &proto::CoreEntry) -> u32 {
    /// `SIGCHLD` (`asm-generic/signal.h`).
    const SIGCHLD: u32 = 17;
    core.tc.as_ref().and_then(|task| task.rcriu_exit_signal).unwrap_or(SIGCHLD)
}

/// Whether a snapshot is a pre-dump, which has memory but no processes.
pub fn is_pre_dump(images: &dyn ImageStore) -> bool {
    !images.has(Kind::Pstree, 0)
}

/// Returns what is wrong with the format version in the inventory of `images`, if anything.
/// CRIU 3.17 gives pre-dumps no version.
pub fn version_problem(images: &dyn ImageStore, found: u32) -> Option<String> {
    let [first, last] = VERSIONS;
    let known = VERSIONS.contains(&found) || (found == 0 && is_pre_dump(images));
    (!known).then(|| {
        format!(
            "its images have format version {found} (img_version), expected {first} or {last}\
             \nhelp: use a program that knows that version"
        )
    })
}

/// Whether a restore supports files of a type.
pub type IsRestored = fn(proto::FdTypes) -> bool;

/// Reads the processes of a snapshot, and returns the reasons why they cannot be restored.
/// Leaves out what cannot be read.
pub fn read(images: &dyn ImageStore, is_restored: IsRestored) -> (Tree, Vec<Problem>) {
    let mut problems = Problems::default();
    let mut tree = Tree::default();
    let inventory: Option<proto::InventoryEntry> =
        problems.image(images.message(Kind::Inventory, 0));
    if let Some(inventory) = inventory {
        if let Some(problem) = version_problem(images, inventory.img_version) {
            // After that, no other image can be trusted.
            problems.broken(problem);
            return (tree, problems.0);
        }
        if inventory.fdinfo_per_id != Some(true) && !is_pre_dump(images) {
            problems.not_restored(
                "it was written by CRIU before 1.0, whose descriptor images are not supported"
                    .to_owned(),
            );
        }
        tree.inventory = inventory;
    }
    if is_pre_dump(images) {
        return (tree, problems.0);
    }
    tree.files = problems.image(read_files(images)).flatten().unwrap_or_default();
    let pstree = problems.image(images.messages(Kind::Pstree, 0));
    let ordered = match order::order(pstree.unwrap_or_default()) {
        Ok(ordered) => ordered,
        Err(problem) => {
            problems.broken(problem);
            return (tree, problems.0);
        }
    };
    for (entry, parent) in ordered {
        let pid = entry.pid;
        let mut found = Problems::default();
        tree.tasks.push(read_task(images, entry, parent, &mut found));
        problems.0.extend(found.0.into_iter().map(|problem| {
            let text = format!("images of process {pid}: {}", problem.text);
            Problem { text, ..problem }
        }));
    }
    order::check(&tree.tasks, &mut problems);
    check_filters(images, &tree.tasks, &mut problems);
    files::check(images, &tree, is_restored, &mut problems);
    namespaces::check(images, &tree, &mut problems);
    (tree, problems.0)
}

/// Checks the seccomp filters of all threads.
fn check_filters(images: &dyn ImageStore, tasks: &[Task], problems: &mut Problems) {
    let entry = problems.image(images.message_if_any(Kind::Seccomp, 0)).flatten();
    for task in tasks {
        let cores: Vec<_> = task.threads.iter().map(|(_, core)| core).collect();
        if let Err(problem) = seccomp::of_process(entry.as_ref(), &cores) {
            problems.broken(format!("images of process {}: {problem}", task.entry.pid));
        }
    }
}

fn read_task(
    images: &dyn ImageStore,
    entry: proto::PstreeEntry,
    parent: Option<usize>,
    problems: &mut Problems,
) -> Task {
    let pid = entry.pid;
    let name = |tid: u32| Kind::Core.file_name(tid.into());
    let core = |tid: u32| -> Result<proto::CoreEntry, ImageError> {
        images.message(Kind::Core, tid.into())
    };
    let mut task =
        Task { entry, parent, threads: Vec::new(), ids: ArenaIds::default(), body: None };
    let Some(leader) = problems.own_image(&name(pid), core(pid)) else { return task };
    let of_task = leader.tc.clone();
    task.threads.push((pid, leader));
    let Some(of_task) = of_task else {
        problems.broken("its core has no task state");
        return task;
    };
    match of_task.task_state {
        // The threads that CRIU lists for it have arbitrary numbers.
        state::DEAD => return task,
        state::ALIVE | state::STOPPED => {}
        other => {
            problems.broken(format!("its state {other} is unknown"));
            return task;
        }
    }
    task::check_task(&of_task, problems);
    if let Some((first, others)) = task.entry.threads.split_first() {
        if *first != pid {
            problems.broken(format!("its first thread is {first}"));
        }
        for tid in others {
            if let Some(core) = problems.own_image(&name(*tid), core(*tid)) {
                task.threads.push((*tid, core));
            }
        }
    }
    if of_task.rcriu_leader_exited.is_some() && task.entry.threads.len() < 2 {
        problems.broken("its first thread has exited, and it has no other thread");
    }
    for (tid, core) in &task.threads {
        task::check_thread(*tid, core, problems);
    }
    if let Some(body) = read_body(images, &task, problems) {
        (task.ids, task.body) = (ArenaIds::of(&body.ids), Some(body));
    }
    task
}

fn read_body(images: &dyn ImageStore, task: &Task, problems: &mut Problems) -> Option<Body> {
    let number = u64::from(task.entry.pid);
    let mm = problems.image(images.message(Kind::Mm, number));
    let fs = problems.image(images.message(Kind::Fs, number));
    let ids = match images.message_if_any::<proto::TaskKobjIdsEntry>(Kind::Ids, number) {
        Ok(None) => {
            let ids = task.threads.first().and_then(|(_, core)| core.ids);
            if ids.is_none() {
                problems.broken("it has no ids");
            }
            ids
        }
        ids => problems.image(ids).flatten(),
    };
    let fds = ids.and_then(|ids| {
        let fds = images.messages_if_any(Kind::Fdinfo, ids.files_id.into());
        problems.image(fds).map(Option::unwrap_or_default)
    });
    let mut mm: proto::MmEntry = mm?;
    let mut all = std::mem::take(&mut mm.vmas);
    all.retain(|entry| entry.status & vma::VSYSCALL == 0);
    let (guards, vmas): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|entry| entry.status & vma::GUARD != 0);
    // Unknown machines have been reported already.
    let machine = task.threads.first().and_then(|(_, core)| Machine::of(core).ok());
    memory::check(&mm, &vmas, &guards, machine.unwrap_or(Machine::NATIVE), problems);
    Some(Body { mm, vmas, guards, fs: fs?, fds: fds?, ids: ids? })
}
