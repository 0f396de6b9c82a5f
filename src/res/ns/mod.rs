//! Namespaces: the kinds, and which of them a tree may have of its own.
//!
//! The images number namespaces. The dumper's own come first, then those of the tree, both in
//! the order of the table `KINDS`. A tree that shares a namespace with the dumper gets that of the
//! restorer. A namespace of its own is created with its first process, and all other processes
//! inherit it; so all processes of a tree must be in the same one.
//!
//! The dump looks at a namespace in two ways: a process of the tree makes calls ([`Namespace::ask`]),
//! and rcriu looks from outside ([`Namespace::dump`]), as a rule by entering it with one thread
//! ([`crate::sys::visit`]). Likewise a restore ([`Restoring`]): the first process is made in the new
//! namespaces before the files of the tree are opened, so that rcriu can open them there.
//!
//! To support another kind, write a file with an [`Namespace`] and name it in the row of the kind.

mod cgroup;
mod ipc;
pub mod mnt;
pub mod net;
mod pid;
mod time;
mod user;
mod uts;

use std::{cell::RefCell, os::fd::OwnedFd, path::PathBuf};

use nix::libc;

use super::{ResError, Result};
use crate::{
    image::{
        ImageError, ImageStore, Kind as Image, SnapshotWriter, Store, proto::TaskKobjIdsEntry,
    },
    inject::{self, Answers, Script, Task, living},
    proc,
    sys::{
        root::Root,
        visit::{self, Place},
    },
    units::{HostPid, IdMap, NsPid, PidMap},
};

/// A kind of namespace.
#[derive(Debug)]
struct Kind {
    /// Its name in `/proc/PID/ns`.
    file: &'static str,
    /// Its name in messages, with the article.
    name: &'static str,
    /// Its field in the `ids` image of a process.
    id: fn(&mut TaskKobjIdsEntry) -> &mut Option<u32>,
    /// Dumps and restores a namespace of this kind that a tree has of its own.
    own: &'static dyn Namespace,
}

const fn row(
    file: &'static str,
    name: &'static str,
    id: fn(&mut TaskKobjIdsEntry) -> &mut Option<u32>,
    own: &'static dyn Namespace,
) -> Kind {
    Kind { file, name, id, own }
}

/// The namespaces that a thread is in.
static KINDS: [Kind; 8] = [
    row("pid", "a pid namespace", |ids| &mut ids.pid_ns_id, &pid::Pid),
    row("net", "a network namespace", |ids| &mut ids.net_ns_id, &net::Net),
    row("ipc", "an IPC namespace", |ids| &mut ids.ipc_ns_id, &ipc::Ipc),
    row("uts", "a UTS namespace", |ids| &mut ids.uts_ns_id, &uts::Uts),
    row(time::FILE, "a time namespace", |ids| &mut ids.time_ns_id, &time::Time),
    row(mnt::FILE, "a mount namespace", |ids| &mut ids.mnt_ns_id, &mnt::Mnt),
    row(user::FILE, "a user namespace", |ids| &mut ids.user_ns_id, &user::User),
    row("cgroup", "a cgroup namespace", |ids| &mut ids.cgroup_ns_id, &cgroup::Cgroup),
];

/// The namespaces that new children of a thread will be in, if they are others than those of the
/// thread: the name in `/proc/PID/ns`, that of the thread's own, and the name in messages.
static FOR_CHILDREN: [(&str, &str, &str); 2] = [
    ("pid_for_children", "pid", "a pid namespace for its children"),
    ("time_for_children", "time", "a time namespace for its children"),
];

/// The namespaces of a process, in the order of [`KINDS`]; `None` for a kind that the kernel lacks.
type Places = [Option<u64>; KINDS.len()];

fn places_of(pid: HostPid, tid: HostPid) -> Places {
    KINDS.each_ref().map(|kind| proc::thread_namespace(pid, tid, kind.file).ok())
}

/// Refuses processes and threads in other namespaces than the first process of their tree, where a
/// restore could not put them.
///
/// # Errors
/// [`ResError::Refused`].
pub fn check_common(tasks: &[Task]) -> Result<()> {
    let mut of_tree = None;
    for task in living(tasks) {
        let (pid, first) = (task.pid, task.witness());
        let own = places_of(pid, first);
        let (leader, wanted) = *of_tree.get_or_insert((first, own));
        for (kind, (found, wanted)) in KINDS.iter().zip(own.iter().zip(&wanted)) {
            if let (Some(found), Some(wanted)) = (found, wanted)
                && found != wanted
            {
                let (file, name) = (kind.file, kind.name);
                return Err(ResError::Refused {
                    pid,
                    what: format!(
                        "has {name} ({file}:[{found}]) that is not that of process {leader}"
                    ),
                    help: "dump the part of the tree in that namespace: a tree can have only one",
                });
            }
        }
        check_for_children(task)?;
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
fn check_for_children(task: &Task) -> Result<()> {
    for (file, own, name) in FOR_CHILDREN {
        let pair = [file, own].map(|file| proc::namespace(task.witness(), file).ok());
        // The file of a pid namespace without processes cannot be read.
        let differs = match pair {
            [Some(found), Some(own)] => found != own,
            [None, Some(_)] => own == "pid",
            _ => false,
        };
        if differs {
            return Err(ResError::Refused {
                pid: task.pid,
                what: format!("has {name} that is not its own ({file})"),
                help: "dump the children, or the tree once the process has set it back (setns(2))",
            });
        }
    }
    Ok(())
}

/// Dumps and restores one kind of namespace.
pub trait Namespace: Sync + std::fmt::Debug {
    /// Its flag of `clone(2)`.
    fn clone_flag(&self) -> u64;

    /// Dump: refuses a tree in such a namespace of its own that cannot be restored, before the dump
    /// changes anything.
    ///
    /// # Errors
    /// [`ResError::Refused`], or the errors of reading `/proc`.
    fn check(&self, _tasks: &[Task], _options: &Options) -> Result<()> {
        Ok(())
    }

    /// Dump: adds the calls for a process in the namespace to make, and returns the function that
    /// writes their results.
    fn ask(&self, _script: &mut Script) -> Option<Collect> {
        None
    }

    /// Dump: writes the images of what rcriu sees of the namespace itself.
    ///
    /// # Errors
    /// The state cannot be read or dumped.
    fn dump(&self, _of: &Dumped<'_>, _images: &SnapshotWriter) -> Result<()> {
        Ok(())
    }

    /// Restore: reads the images of the namespace with this number, and checks them.
    ///
    /// # Errors
    /// A malformed image; state that cannot be restored.
    fn restore(
        &self,
        images: &dyn ImageStore,
        number: u32,
        options: &Options,
    ) -> Result<Box<dyn Restoring>>;
}

/// The options of a dump or a restore about namespaces.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    /// Options about mounts.
    pub(crate) mounts: mnt::Options,
    /// Options about networks.
    pub(crate) network: net::Options,
}

/// A namespace of a stopped tree.
#[derive(Clone, Copy, Debug)]
pub struct Dumped<'a> {
    /// A process in it.
    pub pid: HostPid,
    /// Its number in the images.
    pub number: u32,
    /// The processes of the tree.
    pub tasks: &'a [Task],
    /// Its users and groups.
    pub ids: &'a IdMap,
    /// The options of the dump.
    pub options: &'a Options,
}

/// What the restore of a namespace works with.
#[derive(Clone, Copy)]
pub struct Building<'a> {
    /// The first process of the tree. It is in the namespace, which is new, and shares the
    /// descriptors of rcriu.
    pub first: HostPid,
    /// Has it make the calls of a script.
    pub run: &'a dyn Fn(&Script) -> inject::Result<Answers>,
    /// The images.
    pub images: &'a Store,
    /// Masters of pseudoterminals whose slaves are bound somewhere: they are opened before the
    /// terminals of the tree.
    pub masters: &'a RefCell<Vec<OwnedFd>>,
}

impl std::fmt::Debug for Building<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Building").field("first", &self.first).finish_non_exhaustive()
    }
}

/// A namespace during the restore.
pub trait Restoring: std::fmt::Debug {
    /// Tells the directories of the cgroups in which the namespace is to be made.
    fn set_root_cgroups(&self, _roots: Vec<PathBuf>) {}

    /// Returns the map of user and group ids, if the namespace has one.
    fn ids(&self) -> Option<IdMap> {
        None
    }

    /// Whether it is made with the first process; otherwise that process enters it
    /// ([`Self::first_script`]).
    fn is_made(&self) -> bool {
        true
    }

    /// Turns the users and groups of the images into those here.
    fn translate(&mut self, _ids: &IdMap) {}

    /// Returns the calls that the first process makes before [`Self::build`].
    fn first_script(&self) -> Script {
        Script::new()
    }

    /// Restores what rcriu can, in as many steps of its own and of the first process as it takes. The
    /// namespace is new, and no file of the tree is open yet.
    ///
    /// # Errors
    /// The first failure.
    fn build(&mut self, _on: &Building<'_>) -> Result<()> {
        Ok(())
    }

    /// Returns the calls of the first process that restore the rest. Runs after [`Self::build`].
    fn script(&self) -> Script {
        Script::new()
    }

    /// Finishes, once all processes have their memory and their files. Process `root` is in the
    /// namespace.
    ///
    /// # Errors
    /// The first failure.
    fn finish(&mut self, _root: HostPid) -> Result<()> {
        Ok(())
    }
}

/// Writes the images of the namespace with this number from the answers of a process.
pub type Collect = Box<dyn FnOnce(&Answers, u32, &SnapshotWriter) -> Result<(), ImageError>>;

/// Why rcriu cannot look at a namespace.
const NO_VISIT: &str = ", and this rcriu may not enter such a namespace and return (setns(2))";

/// What allows that.
const VISIT_HELP: &str = "run rcriu as root, or from a shell in a user namespace whose namespaces are its own: \
     unshare -Ur with the same options as the tree";

/// Whether rcriu may visit namespaces of a kind, if it has to.
fn may_visit(kind: &Kind) -> bool {
    let place = [Place::Net, Place::Ipc].into_iter().find(|place| place.file() == kind.file);
    place.is_none_or(|place| visit::may_return(place).is_ok())
}

/// Returns the number of the dumper's own namespace of a kind.
fn number(position: usize) -> u32 {
    u32::try_from(position).expect("a few") + 1
}

/// Returns the `ids` entry of a process that shares all namespaces with the dumper.
pub fn own_ids() -> TaskKobjIdsEntry {
    // The objects that are not namespaces are numbered per process.
    let mut ids =
        TaskKobjIdsEntry { vm_id: 1, files_id: 1, fs_id: 1, sighand_id: 1, ..Default::default() };
    for (position, kind) in KINDS.iter().enumerate() {
        *(kind.id)(&mut ids) = Some(number(position));
    }
    ids
}

/// Returns the number of a namespace in the `ids` entry of a process; `None` for an unknown kind.
/// `file` is its name in `/proc/PID/ns`.
pub fn number_in(ids: &TaskKobjIdsEntry, file: &str) -> Option<u32> {
    let mut ids = *ids;
    KINDS.iter().find(|kind| kind.file == file).and_then(|kind| *(kind.id)(&mut ids))
}

/// Returns the number of the namespace of a kind that the tree of a process has of its own, if it has
/// one. `file` is the name of the kind in `/proc/PID/ns`.
pub fn number_of_tree(pid: HostPid, file: &str) -> Option<u32> {
    let at = KINDS.iter().position(|kind| kind.file == file)?;
    proc::is_in_other_namespace(pid, file).then(|| OfTree::number(at))
}

/// The namespaces that a stopped tree has of its own.
#[derive(Debug, Default)]
pub struct OfTree {
    /// Indices in [`KINDS`].
    kinds: Vec<usize>,
    /// Whether a process makes the calls about them already.
    asked: bool,
}

impl OfTree {
    /// Finds them by comparing a process of the tree with the dumper.
    pub fn look(pid: HostPid) -> Self {
        let all = KINDS.iter().enumerate();
        let of_tree = all.filter(|(_, kind)| proc::is_in_other_namespace(pid, kind.file));
        Self { kinds: of_tree.map(|(at, _)| at).collect(), asked: false }
    }

    /// Finds those of a stopped tree.
    pub fn of(tasks: &[Task]) -> Self {
        living(tasks).next().map(|task| Self::look(task.witness())).unwrap_or_default()
    }

    /// Returns the `ids` entry of a process of the tree.
    pub fn ids(&self) -> TaskKobjIdsEntry {
        let mut ids = own_ids();
        for at in &self.kinds {
            *(KINDS[*at].id)(&mut ids) = Some(Self::number(*at));
        }
        ids
    }

    /// Returns the number of the tree's own namespace of a kind.
    fn number(position: usize) -> u32 {
        number(KINDS.len() + position)
    }

    /// Adds the calls about them for the first process that can make calls. Returns, with the
    /// number of each namespace, the function that writes its images.
    pub fn ask(&mut self, script: &mut Script) -> Vec<(u32, Collect)> {
        if std::mem::replace(&mut self.asked, true) {
            return Vec::new();
        }
        let ask = |at: &usize| Some((Self::number(*at), KINDS[*at].own.ask(script)?));
        self.kinds.iter().filter_map(ask).collect()
    }

    /// Refuses namespaces that cannot be restored.
    ///
    /// # Errors
    /// [`ResError::Refused`], or the errors of reading `/proc`.
    pub fn check(&self, tasks: &[Task], options: &Options) -> Result<()> {
        for at in &self.kinds {
            let kind = &KINDS[*at];
            if let Some(task) = tasks.first().filter(|_| !may_visit(kind)) {
                let (what, help) = (format!("has {} of its own{NO_VISIT}", kind.name), VISIT_HELP);
                return Err(ResError::Refused { pid: task.pid, what, help });
            }
            kind.own.check(tasks, options)?;
        }
        Ok(())
    }

    /// Returns the number of the tree's own namespace of a kind, if it has one. `file` is the name of
    /// the kind in `/proc/PID/ns`.
    pub fn number_of(&self, file: &str) -> Option<u32> {
        let at = self.kinds.iter().find(|at| KINDS[**at].file == file)?;
        Some(Self::number(*at))
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
        let Some(pid) = living(tasks).next().map(Task::witness) else { return Ok(()) };
        if self.number_of(time::FILE).is_none() {
            time::dump_dumpers(pid, images)?;
        }
        for at in &self.kinds {
            let number = Self::number(*at);
            KINDS[*at].own.dump(&Dumped { pid, number, tasks, options, ids }, images)?;
        }
        Ok(())
    }

    /// Returns the root directory in which the paths of the tree are looked up.
    ///
    /// # Errors
    /// The tree is gone, or rcriu may not enter its mount namespace.
    pub fn root(&self, tasks: &[Task]) -> Result<Root> {
        match living(tasks).next().filter(|_| self.number_of(mnt::FILE).is_some()) {
            Some(first) => mnt::root_of(first.witness()),
            None => Ok(Root::own()),
        }
    }
}

/// Returns the map of the pids and of the user and group ids of a stopped tree.
///
/// # Errors
/// The errors of reading `/proc`.
pub fn pids_of(tasks: &[Task]) -> Result<PidMap> {
    Ok(pid::map(tasks)?.with_ids(user::map(tasks)?))
}

/// The namespaces that the restore creates for a tree.
#[derive(Debug, Default)]
pub struct Wanted(Vec<(&'static Kind, u32, Box<dyn Restoring>)>);

impl Wanted {
    /// Reads them from the images. `pid` is a process that is alive, `dumper` has the numbers
    /// of the dumper's own namespaces.
    pub fn read(
        images: &dyn ImageStore,
        dumper: Option<&TaskKobjIdsEntry>,
        pid: NsPid,
        options: &Options,
    ) -> Result<Self> {
        let Some(mut dumper) = dumper.copied() else { return Ok(Self::default()) };
        let number = pid.image().into();
        // Older images have no `ids` image.
        let Some(mut ids) = images.message_if_any::<TaskKobjIdsEntry>(Image::Ids, number)? else {
            return Ok(Self::default());
        };
        let mut wanted = Vec::new();
        for kind in &KINDS {
            let (Some(number), Some(dumpers)) = (*(kind.id)(&mut ids), *(kind.id)(&mut dumper))
            else {
                continue;
            };
            if number == dumpers {
                if kind.file == time::FILE {
                    wanted.extend(time::if_behind(images)?.map(|clocks| (kind, number, clocks)));
                }
                continue;
            }
            if !may_visit(kind) {
                let problem = format!("it is {}{NO_VISIT}\nhelp: {VISIT_HELP}", kind.name);
                return Err(wrong(number, &problem));
            }
            let restoring = kind.own.restore(images, number, options)?;
            // The others belong to the user namespace, so it comes first.
            let at = if kind.file == user::FILE { 0 } else { wanted.len() };
            wanted.insert(at, (kind, number, restoring));
        }
        let mut wanted = Self(wanted);
        let ids = wanted.ids();
        wanted.0.iter_mut().for_each(|(_, _, namespace)| namespace.translate(&ids));
        Ok(wanted)
    }

    /// Returns the `clone(2)` flags for the first process.
    pub fn clone_flags(&self) -> u64 {
        let made = self.0.iter().filter(|(.., state)| state.is_made());
        made.fold(0, |flags, (kind, ..)| flags | kind.own.clone_flag())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the map of the user and group ids of the tree.
    pub fn ids(&self) -> IdMap {
        self.0.iter().find_map(|(_, _, namespace)| namespace.ids()).unwrap_or_default()
    }

    /// Whether the tree gets a time namespace of its own, in which clocks go on from the dump.
    pub fn has_clocks(&self) -> bool {
        self.0.iter().any(|(kind, ..)| kind.file == time::FILE)
    }

    /// Returns the root directory of the tree, whose first process exists.
    ///
    /// # Errors
    /// The process is gone, or rcriu may not enter its mount namespace.
    pub fn root(&self, first: HostPid) -> Result<Root> {
        let has_mounts = self.number_of(mnt::FILE).is_some();
        if has_mounts { mnt::root_of(first) } else { Ok(Root::own()) }
    }

    /// Whether the tree gets a pid namespace of its own.
    pub fn has_pids(&self) -> bool {
        self.clone_flags() & u64::from(libc::CLONE_NEWPID.cast_unsigned()) != 0
    }

    /// Restores their state. The first process is in all of them.
    ///
    /// # Errors
    /// The first failure.
    pub fn build(&mut self, on: &Building<'_>) -> Result<()> {
        let run = |script: Script| {
            if script.is_empty() { Ok(()) } else { (on.run)(&script).map(drop) }
        };
        for (_, _, namespace) in &mut self.0 {
            run(namespace.first_script())?;
            namespace.build(on)?;
            run(namespace.script())?;
        }
        Ok(())
    }

    /// Finishes, once all processes have their memory and their files. Process `root` is in all of
    /// the namespaces.
    ///
    /// # Errors
    /// The first failure.
    pub fn finish(&mut self, root: HostPid) -> Result<()> {
        self.0.iter_mut().try_for_each(|(_, _, namespace)| namespace.finish(root))
    }

    /// Tells the directories of the cgroups in which a cgroup namespace is to be made.
    pub fn set_root_cgroups(&self, roots: &[PathBuf]) {
        self.0.iter().for_each(|(_, _, namespace)| namespace.set_root_cgroups(roots.to_vec()));
    }

    /// Returns the number of the namespace of a kind, if it is among them. `file` is the name of the
    /// kind in `/proc/PID/ns`.
    pub fn number_of(&self, file: &str) -> Option<u32> {
        self.0.iter().find(|(kind, ..)| kind.file == file).map(|(_, number, _)| *number)
    }

    /// Lists the names of the kinds for messages; `None` if there are none.
    pub fn names(&self) -> Option<String> {
        let names: Vec<_> = self.0.iter().map(|(kind, ..)| kind.name).collect();
        (!names.is_empty()).then(|| names.join(" and "))
    }
}

/// Returns the error for an invalid image of a namespace.
fn wrong(number: u32, what: &str) -> ResError {
    ResError::Namespace { number, problem: what.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_numbers_beside_those_of_the_dumper() {
        let uts = KINDS.iter().position(|kind| kind.file == "uts").unwrap();
        let (dumper, tree) = (own_ids(), OfTree { kinds: vec![uts], asked: false }.ids());
        assert_eq!((dumper.pid_ns_id, dumper.uts_ns_id), (Some(1), Some(4)));
        assert_eq!(tree, TaskKobjIdsEntry { uts_ns_id: Some(12), ..dumper });
        assert_eq!(OfTree::default().ids(), dumper);
    }
}
