//! Namespaces: the kinds, and which of them a tree may have of its own.
//!
//! The images number namespaces. The dumper's own come first, then those of the first process of the
//! tree, both in the order of the table `KINDS`, then those of other processes. A tree that shares a
//! namespace with the dumper gets that of the restorer. A namespace of its own is created with its
//! first process, and all other processes inherit it, unless they are in another one; some kinds
//! allow that ([`OfTree`], [`Wanted`]).
//!
//! The dump looks at a namespace in two ways: a process of the tree makes calls ([`Namespace::ask`]),
//! and rcriu looks from outside ([`Namespace::dump`]), as a rule by entering it with one thread
//! ([`crate::sys::visit`]). Likewise a restore ([`Restoring`]): the first process is made in the new
//! namespaces before the files of the tree are opened, so that rcriu can open them there.
//!
//! To support another kind, write a file with an [`Namespace`] and name it in the row of the kind.

mod cgroup;
mod ipc;
pub mod join;
pub mod mnt;
pub mod net;
mod of_tree;
mod pid;
mod roots;
mod time;
mod user;
mod uts;
mod wanted;

use std::{cell::RefCell, os::fd::OwnedFd, path::PathBuf};

pub use of_tree::OfTree;
pub use roots::Roots;
use wanted::Entrances;
pub use wanted::Wanted;

use super::{ResError, Result};
use crate::{
    image::{ImageError, ImageStore, SnapshotWriter, Store, proto::TaskKobjIdsEntry},
    inject::{self, Answers, Script, Task},
    proc,
    sys::visit::{self, Place},
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
    /// Whether processes of a tree may be in other namespaces of this kind than the first one.
    has_others: bool,
}

impl Kind {
    const fn with_others(self) -> Self {
        Self { has_others: true, ..self }
    }
}

const fn row(
    file: &'static str,
    name: &'static str,
    id: fn(&mut TaskKobjIdsEntry) -> &mut Option<u32>,
    own: &'static dyn Namespace,
) -> Kind {
    Kind { file, name, id, own, has_others: false }
}

/// The namespaces that a thread is in.
static KINDS: [Kind; 8] = [
    row(pid::FILE, "a pid namespace", |ids| &mut ids.pid_ns_id, &pid::Pid).with_others(),
    row("net", "a network namespace", |ids| &mut ids.net_ns_id, &net::Net).with_others(),
    row("ipc", "an IPC namespace", |ids| &mut ids.ipc_ns_id, &ipc::Ipc).with_others(),
    row("uts", "a UTS namespace", |ids| &mut ids.uts_ns_id, &uts::Uts).with_others(),
    row(time::FILE, "a time namespace", |ids| &mut ids.time_ns_id, &time::Time),
    row(mnt::FILE, "a mount namespace", |ids| &mut ids.mnt_ns_id, &mnt::Mnt).with_others(),
    row(user::FILE, "a user namespace", |ids| &mut ids.user_ns_id, &user::User),
    row("cgroup", "a cgroup namespace", |ids| &mut ids.cgroup_ns_id, &cgroup::Cgroup),
];

/// Dumps and restores one kind of namespace.
pub trait Namespace: Sync + std::fmt::Debug {
    /// Its flag of `clone(2)`.
    fn clone_flag(&self) -> u64;

    /// Whether a namespace of the kind comes into being with its first process. Then no process enters one
    /// that exists.
    fn begins_with_process(&self) -> bool {
        false
    }

    /// Dump: refuses a tree in such a namespace of its own that cannot be restored, before the dump
    /// changes anything.
    ///
    /// # Errors
    /// [`ResError::Refused`], or the errors of reading `/proc`.
    fn check(&self, _of: &Dumped<'_>) -> Result<()> {
        Ok(())
    }

    /// Dump: checks all namespaces of the kind that the tree has, that of the first process first. A kind
    /// whose namespaces depend on each other looks at them together.
    ///
    /// # Errors
    /// As [`Self::check`].
    fn check_all(&self, all: &[Dumped<'_>]) -> Result<()> {
        all.iter().try_for_each(|of| self.check(of))
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

    /// Dump: writes the images of all namespaces of the kind, as [`Self::check_all`] checks them.
    ///
    /// # Errors
    /// As [`Self::dump`].
    fn dump_all(&self, all: &[Dumped<'_>], images: &SnapshotWriter) -> Result<()> {
        all.iter().try_for_each(|of| self.dump(of, images))
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

    /// Restore: reads the images of all namespaces of the kind; `home` is that of the first process, which
    /// is not among the `members` if it is the restorer's. A kind whose namespaces depend on each other
    /// returns one [`Restoring`] for all of them.
    ///
    /// # Errors
    /// As [`Self::restore`].
    fn restore_all(
        &self,
        images: &dyn ImageStore,
        _home: &Member,
        members: &[Member],
        options: &Options,
    ) -> Result<Vec<(Member, Box<dyn Restoring>)>> {
        let read =
            |member: &Member| Ok((member.clone(), self.restore(images, member.number, options)?));
        members.iter().map(read).collect()
    }
}

/// A namespace to be restored.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its number in the images.
    pub number: u32,
    /// A process in it.
    pub pid: NsPid,
    /// The numbers of all namespaces of that process.
    pub ids: TaskKobjIdsEntry,
}

/// The options of a dump or a restore about namespaces.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    /// Options about mounts.
    pub(crate) mounts: mnt::Options,
    /// Options about networks.
    pub(crate) network: net::Options,
    /// The namespaces that a restored tree joins.
    pub(crate) join: join::Options,
}

/// A namespace of a stopped tree.
#[derive(Clone, Copy, Debug)]
pub struct Dumped<'a> {
    /// A process in it.
    pub pid: HostPid,
    /// Its number in the images.
    pub number: u32,
    /// Whether the first process of the tree is in it.
    pub is_first: bool,
    /// The processes of the tree.
    pub tasks: &'a [Task],
    /// Its users and groups.
    pub ids: &'a IdMap,
    /// The pid namespaces below that of the tree: their inodes, and their numbers in the images.
    pub pids_below: &'a [(u64, u32)],
    /// The options of the dump.
    pub options: &'a Options,
}

/// What the restore of a namespace works with.
#[derive(Clone, Copy)]
pub struct Building<'a> {
    /// The first process of the tree. It is in the namespace, which is new, and in namespaces of the
    /// first process of all other kinds. It shares the descriptors of rcriu.
    pub first: HostPid,
    /// Has it make the calls of a script.
    pub run: &'a dyn Fn(&Script) -> inject::Result<Answers>,
    /// The images.
    pub images: &'a Store,
    /// Masters of pseudoterminals whose slaves are bound somewhere: they are opened before the
    /// terminals of the tree.
    pub masters: &'a RefCell<Vec<OwnedFd>>,
    /// The namespaces of the kinds of which the tree has several.
    entrances: &'a RefCell<Entrances>,
}

impl std::fmt::Debug for Building<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Building").field("first", &self.first).finish_non_exhaustive()
    }
}

/// A network device that is there only while a file is attached to it (`/dev/net/tun`).
#[derive(Debug)]
pub struct HeldDevice {
    /// Its name.
    pub name: Vec<u8>,
    /// A file that is attached to it.
    pub file: OwnedFd,
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

    /// Whether it makes the namespaces of other processes than the first one itself.
    fn makes_others(&self) -> bool {
        false
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

    /// Returns what the first process of a pid namespace below that of the tree mounts when it comes into being.
    fn mounts_of_first(&self, _pid_space: u64) -> Vec<(u32, mnt::Later<'_>)> {
        Vec::new()
    }

    /// Returns the pid namespaces below that of the tree that mounts of the images show.
    fn pid_spaces(&self) -> Vec<u32> {
        Vec::new()
    }

    /// Returns the numbers of the mounts that [`Self::mounts_of_first`] makes.
    fn later_mounts(&self) -> Vec<i32> {
        Vec::new()
    }

    /// Whether it is restored together with others of its kind, in several rounds ([`Self::go_on`]).
    fn has_rounds(&self) -> bool {
        false
    }

    /// Goes on after [`Self::build`] and [`Self::script`], when all namespaces of the kind are there. The first
    /// process is in the namespace again. Each round, counted from 0, ends for all namespaces of the kind before
    /// the next begins. Returns whether another round is needed.
    ///
    /// # Errors
    /// The first failure.
    fn go_on(&mut self, _on: &Building<'_>, _round: u32) -> Result<bool> {
        Ok(false)
    }

    /// Takes the descriptors by which this program holds devices of programs of the tree. Runs after
    /// [`Self::build`].
    fn take_devices(&mut self) -> Vec<HeldDevice> {
        Vec::new()
    }

    /// Adds the root directories of mount namespaces. `processes` returns the processes in the namespace
    /// with a number. Runs after [`Self::build`].
    fn add_roots(&self, _roots: &mut Roots, _processes: &dyn Fn(u32) -> Vec<NsPid>) {}

    /// Finishes, once all processes have their memory and their files. Process `member` is in the
    /// namespace.
    ///
    /// # Errors
    /// The first failure.
    fn finish(&mut self, _member: HostPid) -> Result<()> {
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

/// Returns the number of the namespace of a kind that the first process of a tree has of its own, if it
/// has one. `file` is the name of the kind in `/proc/PID/ns`.
pub fn number_of_first(pid: HostPid, file: &str) -> Option<u32> {
    let at = KINDS.iter().position(|kind| kind.file == file)?;
    proc::is_in_other_namespace(pid, file).then(|| of_tree::number_of_first(at))
}

/// Returns the map of the pids and of the user and group ids of a stopped tree.
///
/// # Errors
/// The errors of reading `/proc`.
pub fn pids_of(tasks: &[Task]) -> Result<PidMap> {
    Ok(pid::map(tasks)?.with_ids(user::map(tasks)?))
}

/// Returns the error for an invalid image of a namespace.
fn wrong(number: u32, what: &str) -> ResError {
    ResError::Namespace { number, problem: what.to_owned() }
}
