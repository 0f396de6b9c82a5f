//! The namespaces of a tree, during a dump.

use std::{cell::RefCell, collections::HashSet, path::Path};

use super::{
    Collect, Dumped, KINDS, Kind, NO_VISIT, Options, Roots, VISIT_HELP, may_visit, mnt, number,
    own_ids, pid, time, user,
};
use crate::{
    image::{SnapshotWriter, proto::TaskKobjIdsEntry},
    inject::{Script, Task, living},
    proc,
    res::{ResError, Result},
    sys::namespace,
    units::{HostPid, IdMap, PidMap},
};

/// The namespaces that new children of a thread will be in, if they are others than those of the
/// thread: the name in `/proc/PID/ns`, that of the thread's own, and the name in messages.
static FOR_CHILDREN: [(&str, &str, &str); 2] = [
    ("pid_for_children", "pid", "a pid namespace for its children"),
    ("time_for_children", "time", "a time namespace for its children"),
];

/// The namespaces of a thread, in the order of [`KINDS`]; `None` for a kind that the kernel lacks.
type Places = [Option<u64>; KINDS.len()];

fn places_of(pid: HostPid, tid: HostPid) -> Places {
    KINDS.each_ref().map(|kind| proc::thread_namespace(pid, tid, kind.file).ok())
}

/// Returns the number of the namespace that the first process of a tree has of its own.
pub(super) fn number_of_first(position: usize) -> u32 {
    number(KINDS.len() + position)
}

/// A namespace that processes of the tree are in, and the dumper is not.
#[derive(Debug)]
struct Found {
    /// Its position in [`KINDS`].
    kind: usize,
    inode: u64,
    number: u32,
    /// A process in it.
    pid: HostPid,
    /// Whether the first process of the tree is in it.
    is_first: bool,
}

impl Found {
    fn kind(&self) -> &'static Kind {
        &KINDS[self.kind]
    }
}

/// The namespaces that the processes of a stopped tree have for themselves.
#[derive(Debug, Default)]
pub struct OfTree {
    /// In the order of [`KINDS`], those of the first process before others.
    found: Vec<Found>,
    /// The numbers of those that a process makes the calls about already.
    asked: RefCell<HashSet<u32>>,
}

impl OfTree {
    /// Finds those of a stopped tree.
    pub fn of(tasks: &[Task]) -> Self {
        let own = HostPid::own();
        let dumpers = places_of(own, own);
        let mut found: Vec<Found> = Vec::new();
        let mut next = number_of_first(KINDS.len());
        for (position, task) in living(tasks).enumerate() {
            let pid = task.witness();
            for (kind, inode) in places_of(task.pid, pid).into_iter().enumerate() {
                let Some(inode) =
                    inode.filter(|inode| dumpers[kind].is_some_and(|own| own != *inode))
                else {
                    continue;
                };
                if found.iter().any(|known| (known.kind, known.inode) == (kind, inode)) {
                    continue;
                }
                let is_first = position == 0;
                let number = if is_first { number_of_first(kind) } else { next };
                next += u32::from(!is_first);
                found.push(Found { kind, inode, number, pid, is_first });
            }
        }
        found.sort_by_key(|found| (found.kind, !found.is_first));
        Self { found, asked: RefCell::default() }
    }

    /// Returns the `ids` entry of a process of the tree.
    pub fn ids(&self, pid: HostPid) -> TaskKobjIdsEntry {
        let mut ids = own_ids();
        if self.found.is_empty() {
            return ids;
        }
        for (kind, inode) in KINDS.iter().zip(places_of(pid, pid)) {
            if let Some(found) = inode.and_then(|inode| self.by_inode(kind.file, inode)) {
                *(kind.id)(&mut ids) = Some(found.number);
            }
        }
        ids
    }

    fn by_inode(&self, file: &str, inode: u64) -> Option<&Found> {
        self.found.iter().find(|found| found.kind().file == file && found.inode == inode)
    }

    /// Returns the number of a namespace of the tree or of the dumper, and a process in it. `file` is
    /// the name of its kind in `/proc/PID/ns`.
    pub fn look_up(&self, file: &str, inode: u64) -> Option<(u32, HostPid)> {
        if let Some(found) = self.by_inode(file, inode) {
            return Some((found.number, found.pid));
        }
        let own = HostPid::own();
        let is_own = proc::namespace(own, file).is_ok_and(|own| own == inode);
        let number = is_own.then(|| super::number_in(&own_ids(), file)).flatten()?;
        Some((number, own))
    }

    /// Adds the calls about the namespaces of a process that no other process makes already. Returns,
    /// with the number of each namespace, the function that writes its images.
    pub fn ask(&self, pid: HostPid, script: &mut Script) -> Vec<(u32, Collect)> {
        let mut asked = self.asked.borrow_mut();
        let of_process = self.found.iter().filter(|found| found.pid == pid);
        let ask = |found: &Found| {
            let is_new = asked.insert(found.number);
            is_new.then(|| Some((found.number, found.kind().own.ask(script)?))).flatten()
        };
        of_process.filter_map(ask).collect()
    }

    /// Refuses namespaces that cannot be restored.
    ///
    /// # Errors
    /// [`ResError::Refused`], or the errors of reading `/proc`.
    pub fn check(&self, tasks: &[Task], ids: &IdMap, options: &Options) -> Result<()> {
        self.check_places(tasks)?;
        for found in &self.found {
            let (kind, pid) = (found.kind(), found.pid);
            if !may_visit(kind) {
                let (what, help) = (format!("has {} of its own{NO_VISIT}", kind.name), VISIT_HELP);
                return Err(ResError::Refused { pid, what, help });
            }
            self.check_other(found)?;
        }
        let each = |kind: &'static Kind, all: &[Dumped<'_>]| kind.own.check_all(all);
        self.for_each_kind((tasks, ids, options), each)
    }

    /// Calls `act` for each kind, with all namespaces of it.
    fn for_each_kind(
        &self,
        (tasks, ids, options): (&[Task], &IdMap, &Options),
        act: impl Fn(&'static Kind, &[Dumped<'_>]) -> Result<()>,
    ) -> Result<()> {
        let pids_below = self.of_kind(pid::FILE).filter(|found| !found.is_first);
        let pids_below: Vec<_> = pids_below.map(|found| (found.inode, found.number)).collect();
        let pids_below = pids_below.as_slice();
        for of_kind in self.found.chunk_by(|one, next| one.kind == next.kind) {
            let dumped = |found: &Found| {
                let Found { pid, number, is_first, .. } = *found;
                Dumped { pid, number, is_first, tasks, ids, pids_below, options }
            };
            let all: Vec<Dumped<'_>> = of_kind.iter().map(dumped).collect();
            act(of_kind[0].kind(), &all)?;
        }
        Ok(())
    }

    /// Refuses a namespace beside that of the first process that a restore could not make, or from
    /// which the first process could not return.
    fn check_other(&self, found: &Found) -> Result<()> {
        if found.is_first {
            return Ok(());
        }
        let (kind, pid) = (found.kind(), found.pid);
        let refused = |what: String, help| Err(ResError::Refused { pid, what, help });
        let users = proc::namespace(pid, user::FILE)?;
        let owner = namespace::owner(Path::new(&format!("/proc/{pid}/ns/{}", kind.file)));
        if owner.is_ok_and(|owner| owner != users) {
            let what =
                format!("has {} that belongs to another user namespace than its own", kind.name);
            return refused(what, "dump the part of the tree in that user namespace");
        }
        // No process has to return from a namespace that begins with its first process.
        let has_home =
            kind.own.begins_with_process() || self.of_kind(kind.file).any(|other| other.is_first);
        if !has_home && self.number_of(user::FILE).is_some() {
            let what = format!(
                "has {} of its own, while the first process of the tree has a user namespace, but no \
                 such namespace of its own",
                kind.name
            );
            return refused(what, "dump the process with its descendants alone");
        }
        Ok(())
    }

    /// Returns the number of the namespace of a kind that the first process of the tree has of its own.
    /// `file` is the name of the kind in `/proc/PID/ns`.
    pub fn number_of(&self, file: &str) -> Option<u32> {
        let is_wanted = |found: &&Found| found.is_first && found.kind().file == file;
        self.found.iter().find(is_wanted).map(|found| found.number)
    }

    /// Writes the images of what rcriu sees of the namespaces itself. `ids` are the users and groups of
    /// the tree.
    ///
    /// # Errors
    /// The state cannot be read or dumped.
    pub fn dump(
        &self,
        tasks: &[Task],
        ids: &IdMap,
        options: &Options,
        images: &SnapshotWriter,
    ) -> Result<()> {
        let Some(first) = living(tasks).next().map(Task::witness) else { return Ok(()) };
        if self.number_of(time::FILE).is_none() {
            time::dump_dumpers(first, images)?;
        }
        let each = |kind: &'static Kind, all: &[Dumped<'_>]| kind.own.dump_all(all, images);
        self.for_each_kind((tasks, ids, options), each)
    }

    /// Returns the root directories in which the paths of the tree are looked up.
    ///
    /// # Errors
    /// A process is gone, or rcriu may not enter its mount namespace.
    pub fn roots(&self, tasks: &[Task], pids: &PidMap) -> Result<Roots> {
        let found: Vec<&Found> = self.of_kind(mnt::FILE).collect();
        let mut roots = Roots::default();
        match found.first() {
            None => return Ok(roots),
            Some(found) if found.is_first => {
                roots.set_home(found.pid, pids.ids())?;
                roots.add_to_home(mnt::ids(mnt::table(found.pid)?));
            }
            Some(_) => roots.add_to_home(mnt::ids(proc::mounts()?)),
        }
        for found in found.into_iter().filter(|found| !found.is_first) {
            let is_in = |pid: &HostPid| {
                proc::namespace(*pid, mnt::FILE).is_ok_and(|inode| inode == found.inode)
            };
            let processes = living(tasks).map(Task::witness).filter(is_in);
            let processes = processes.map(|pid| pids.ns(pid));
            let root = mnt::root_of(found.pid, pids.ids())?;
            roots.add(&root, mnt::ids(mnt::table(found.pid)?), processes);
        }
        Ok(roots)
    }

    fn of_kind(&self, file: &'static str) -> impl Iterator<Item = &Found> {
        self.found.iter().filter(move |found| found.kind().file == file)
    }

    /// Refuses processes and threads in other namespaces than the first process of their tree, where a
    /// restore could not put them.
    fn check_places(&self, tasks: &[Task]) -> Result<()> {
        let mut of_first = None;
        for task in living(tasks) {
            let (pid, witness) = (task.pid, task.witness());
            let own = places_of(pid, witness);
            let (first, wanted) = *of_first.get_or_insert((witness, own));
            for (kind, (found, wanted)) in KINDS.iter().zip(own.iter().zip(&wanted)) {
                if let (Some(found), Some(wanted)) = (found, wanted)
                    && found != wanted
                    && !kind.has_others
                {
                    let (file, name) = (kind.file, kind.name);
                    return Err(ResError::Refused {
                        pid,
                        what: format!(
                            "has {name} ({file}:[{found}]) that is not that of process {first}"
                        ),
                        help: "dump the part of the tree in that namespace: a tree can have only one",
                    });
                }
            }
            self.check_for_children(task)?;
            for thread in task.threads.iter().skip(1) {
                let others = places_of(pid, thread.tid);
                for (kind, (found, wanted)) in KINDS.iter().zip(others.iter().zip(&own)) {
                    if wanted.is_some() && found != wanted {
                        return Err(ResError::own_of_thread(pid, thread.tid, kind.name));
                    }
                }
            }
        }
        Ok(())
    }

    /// Checks that the children of a process will be in its own namespaces.
    fn check_for_children(&self, task: &Task) -> Result<()> {
        for (file, own, name) in FOR_CHILDREN {
            let pair = [file, own].map(|file| proc::namespace(task.witness(), file).ok());
            // The file of a pid namespace without processes cannot be read.
            let differs = match pair {
                [Some(found), Some(own)] => found != own,
                [None, Some(_)] => own == pid::FILE,
                _ => false,
            };
            // A pid namespace of the tree has its first process there.
            let is_in_tree = own == pid::FILE
                && pair[0].is_some_and(|found| self.by_inode(own, found).is_some())
                && task.threads.len() == 1;
            if differs && !is_in_tree {
                return Err(ResError::Refused {
                    pid: task.pid,
                    what: format!("has {name} that is not its own ({file})"),
                    help: "dump the children, or the tree once the process has set it back (setns(2)); a process \
                           with one thread may have a pid namespace for its children whose first process is in \
                           the tree",
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_numbers_beside_those_of_the_dumper() {
        let own = HostPid::own();
        let at = |file: &str| KINDS.iter().position(|kind| kind.file == file).unwrap();
        let inode = proc::namespace(own, "uts").unwrap();
        let number = number_of_first(at("uts"));
        let found = |inode| Found { kind: at("uts"), inode, number, pid: own, is_first: true };
        let tree = OfTree { found: vec![found(inode)], ..OfTree::default() };
        let dumper = own_ids();
        assert_eq!((dumper.pid_ns_id, dumper.uts_ns_id), (Some(1), Some(4)));
        assert_eq!(tree.ids(own), TaskKobjIdsEntry { uts_ns_id: Some(12), ..dumper });
        assert_eq!(OfTree::default().ids(own), dumper);
        assert_eq!(tree.look_up("uts", inode), Some((12, own)));
        let other = OfTree { found: vec![found(inode + 1)], ..OfTree::default() };
        assert_eq!(other.look_up("uts", inode), Some((4, own)));
        assert_eq!(other.look_up("uts", inode + 2), None);
    }
}
