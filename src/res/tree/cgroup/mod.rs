//! Control groups: the dump records which ones the tree is in, and the restore puts it back.
//!
//! A *set* is one group in each hierarchy. The images number the sets. The first one is the
//! dumper's own; processes in it stay in the restorer's set. The images also hold the groups of the
//! tree with their properties; what the restore does with them is the user's choice ([`Mode`]).

mod collect;
mod freezing;
mod make;
mod properties;
mod selection;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use freezing::Freezing;
use make::Made;
use properties::When;
pub use selection::{MOST_BYTES, Selection, SelectionError};

use super::{Begun, Collector, Dumped, Plan, Restorer};
use crate::{
    image::{self, Kind, SnapshotWriter, proto},
    inject::{Freezable, Task, living},
    proc::{self, NoCgroup},
    res::{
        ResError, Result,
        cgroups::{Set, put, roots_of, set},
        thread,
    },
    units::HostPid,
};

/// The number of the dumper's own set.
const OWN_SET: u32 = 1;

/// Why a process cannot be put into a control group.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The group does not exist, or its hierarchy is not mounted.
    #[error(
        "the tree was in the cgroup {path} of {hierarchy}, which {problem}\nhelp: create it again, or \
         restore with --manage-cgroups=ignore"
    )]
    Absent {
        /// The path in the hierarchy.
        path: String,
        /// The hierarchy's name.
        hierarchy: String,
        /// The missing part.
        problem: String,
    },
    /// The group is frozen: a process put there would stop at once.
    #[error(
        "the tree was in the cgroup {path} of {hierarchy}, which is frozen\nhelp: thaw it ({thaw}), \
         or restore with --manage-cgroups=ignore"
    )]
    Frozen {
        /// The path in the hierarchy.
        path: String,
        /// The hierarchy's name.
        hierarchy: String,
        /// The command that thaws it.
        thaw: String,
    },
    /// The group was frozen, and freezing it now would freeze others.
    #[error(
        "the tree was in the frozen cgroup {path}, which now has another process ({pid})\nhelp: move that \
         out of it, or restore with --cgroup-root, or with --manage-cgroups=ignore, which does not \
         freeze the tree", path = .path.display()
    )]
    Shared {
        /// Its directory.
        path: PathBuf,
        /// A process or thread in it.
        pid: HostPid,
    },
    /// A group exists, and must not.
    #[error(
        "the cgroup {path} exists already\nhelp: remove it, or restore with --manage-cgroups=soft or \
         =full", path = .path.display()
    )]
    Exists {
        /// Its directory.
        path: PathBuf,
    },
    /// The user's directory of hierarchies is none.
    #[error("look for cgroups in {path} (--cgroup-yard)", path = .path.display())]
    Yard {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A group could not be made.
    #[error("{step} the cgroup {path}", path = .path.display())]
    Make {
        /// The attempted step, as a verb.
        step: &'static str,
        /// Its directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A property could not be set.
    #[error(
        "set the property {path} to {value:?}\nhelp: see that the cgroup above allows it (its limits, \
         cgroup.subtree_control), or restore with --manage-cgroups=none or =ignore", path = .path.display()
    )]
    Property {
        /// The file of the property.
        path: PathBuf,
        /// Its value.
        value: String,
        /// The cause.
        source: io::Error,
    },
    /// A name in the images leads elsewhere.
    #[error("cgroup.img names a cgroup outside of its root: {name:?}")]
    Name {
        /// The name.
        name: String,
    },
    /// A core names a set that `cgroup.img` does not have.
    #[error("cgroup.img has no set {id}")]
    NoSet {
        /// The number of the set.
        id: u32,
    },
    /// The kernel refuses to move a process.
    #[error(
        "move process {pid} into a cgroup: write {path}\nhelp: raise the limits of the cgroup if they \
         are reached, or restore with --manage-cgroups=ignore", path = .path.display()
    )]
    Move {
        /// The process or thread.
        pid: HostPid,
        /// The file that was written to.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// What a dump records of cgroups, and what a restore does with them (`--manage-cgroups`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Nothing: the tree stays in those of rcriu.
    Ignore,
    /// The tree returns into its groups, which must exist.
    #[default]
    None,
    /// The groups must exist, and get their properties.
    Props,
    /// The restore makes groups that are missing, with their properties.
    Soft,
    /// The restore makes groups that are missing; all get their properties.
    Full,
    /// The restore makes all groups; none may exist.
    Strict,
}

/// Options of the user that concern cgroups.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    mode: Mode,
    /// By the name of the hierarchy's controller; for all others without a name.
    roots: Vec<(Option<String>, String)>,
    /// All, if there are none.
    controllers: Vec<String>,
    selection: Selection,
    /// The directory below which the hierarchies are mounted.
    yard: Option<PathBuf>,
}

impl Options {
    /// `mode`: what is done with cgroups.
    pub fn new(mode: Mode) -> Self {
        Self { mode, ..Self::default() }
    }

    /// Sets the groups that take the place of the tree's, by controller (`--cgroup-root`).
    #[must_use]
    pub fn roots(self, roots: Vec<(Option<String>, String)>) -> Self {
        Self { roots, ..self }
    }

    /// Sets the controllers whose groups are dumped (`--cgroup-dump-controller`); all, if there are
    /// none.
    #[must_use]
    pub fn controllers(self, controllers: Vec<String>) -> Self {
        Self { controllers, ..self }
    }

    /// Sets which properties are kept (`--cgroup-props`).
    #[must_use]
    pub fn selection(self, selection: Selection) -> Self {
        Self { selection, ..self }
    }

    /// Sets the directory below which the hierarchies are mounted (`--cgroup-yard`).
    #[must_use]
    pub fn yard(self, yard: Option<PathBuf>) -> Self {
        Self { yard, ..self }
    }

    /// Returns the mounts in which cgroups are looked for.
    fn mounts(&self) -> Result<Vec<proc::Mount>> {
        let mut mounts = proc::mounts()?;
        let Some(given) = &self.yard else { return Ok(mounts) };
        let yard = given.canonicalize();
        let yard = yard.map_err(|source| CgroupError::Yard { path: given.clone(), source })?;
        let is_cgroup =
            |mount: &proc::Mount| matches!(mount.fs_type.as_slice(), b"cgroup" | b"cgroup2");
        mounts.retain(|mount| is_cgroup(mount) && mount.point.starts_with(&yard));
        if mounts.is_empty() {
            let source = io::Error::other("no cgroup file system is mounted there");
            return Err(CgroupError::Yard { path: yard, source }.into());
        }
        Ok(mounts)
    }

    /// Returns the root that the user has given for a hierarchy.
    fn root_of(&self, hierarchy: &[u8]) -> Option<&str> {
        let has =
            |name: &str| hierarchy.split(|byte| *byte == b',').any(|of| of == name.as_bytes());
        let of = |(name, _): &&(Option<String>, String)| name.as_deref().is_some_and(has);
        let found = self.roots.iter().find(of);
        found.or(self.roots.iter().find(|(name, _)| name.is_none())).map(|(_, root)| &**root)
    }

    /// Whether the user has given a root for a hierarchy by its name.
    fn names(&self, hierarchy: &[u8]) -> bool {
        let mut parts = hierarchy.split(|byte| *byte == b',');
        let named = self.roots.iter().filter_map(|(name, _)| name.as_deref());
        parts.any(|of| named.clone().any(|name| name.as_bytes() == of))
    }

    /// Whether the groups of a hierarchy are dumped.
    fn dumps(&self, hierarchy: &[u8]) -> bool {
        let mut parts = hierarchy.split(|byte| *byte == b',');
        self.controllers.is_empty()
            || parts.any(|of| self.controllers.iter().any(|name| name.as_bytes() == of))
    }
}

fn own() -> Result<Set> {
    Ok(set(proc::cgroups(HostPid::own())?))
}

/// Starts with the dumper's own set, or with none if the user ignores cgroups.
pub(super) fn collector(of: &Dumped<'_>, options: &Options) -> Begun<dyn Collector> {
    let known = if options.mode == Mode::Ignore { Vec::new() } else { vec![own()?] };
    if options.yard.is_some() {
        options.mounts()?;
    }
    let first = living(of.tasks).next().map(Task::witness);
    let own = first.filter(|pid| proc::is_in_other_namespace(*pid, "cgroup"));
    let mut roots = BTreeMap::new();
    if let Some(pid) = own {
        let found = roots_of(pid)?.into_iter();
        roots = found.filter_map(|(name, root)| Some((name, root.ok()?))).collect();
    }
    let frozen = of.frozen_cgroups.to_vec();
    Ok(Box::new(Sets { known, roots, frozen, options: options.clone() }))
}

/// Makes or finds the groups of the tree.
///
/// # Errors
/// [`CgroupError`] for a group that does not exist or is frozen.
pub(super) fn restorer(plan: &Plan<'_>, options: &Options) -> Begun<dyn Restorer> {
    if options.mode == Mode::Ignore {
        return Ok(Box::new(Places::default()));
    }
    let entry = plan.images.message_if_any::<proto::CgroupEntry>(Kind::Cgroup, 0)?;
    // Without this image, the whole tree was in the dumper's set, or the dump ignored cgroups.
    let Some(mut entry) = entry else { return Ok(Box::new(Places::default())) };
    let cores = plan.processes.iter().flatten().map(|(_, core)| *core);
    let wanted: Vec<u32> = cores.filter_map(set_of).collect();
    let (own, mounts) = (own()?, options.mounts()?);
    // Where the tree was in a cgroup that the restorer is in as well, and which it cannot reach.
    let stays = |name: &[u8], path: &[u8]| {
        own.get(name).is_some_and(|own| own == path)
            && matches!(proc::cgroup_directory(name, path, &mounts), Err(NoCgroup::NotMounted))
    };
    make::move_roots(&mut entry, options, wanted.first().copied(), stays);
    let mut freezing = Freezing::of(&entry, options.mode, &mounts)?;
    freezing.thaw()?;
    let made = Made::make(&entry, options, &mounts)?;
    let mut places =
        Places::find(&entry, plan.inventory.root_cg_set, wanted.iter().copied(), &mounts)?;
    *places.made.get_mut() = made;
    *places.freezing.get_mut() = freezing;
    if let Some(set) = entry.sets.iter().find(|set| Some(&set.id) == wanted.first()) {
        plan.namespaces.set_root_cgroups(&roots(set, &mounts)?);
    }
    Ok(Box::new(places))
}

/// Returns the directories of the roots of a cgroup namespace, other than the restorer's own cgroups.
fn roots(set: &proto::CgSetEntry, mounts: &[proc::Mount]) -> Result<Vec<PathBuf>> {
    let own = own()?;
    let mut found = Vec::new();
    for member in &set.ctls {
        let Some(len) = member.cgns_prefix.filter(|len| *len != 0) else { continue };
        let Some(path) = member.path.get(..len as usize) else {
            let name = String::from_utf8_lossy(&member.path).into_owned();
            return Err(CgroupError::Name { name }.into());
        };
        if own.get(&member.name).map(Vec::as_slice) != Some(path) {
            found.push(directory(&member.name, path, mounts)?);
        }
    }
    Ok(found)
}

/// Records the set of the dumper in the inventory.
pub(super) fn describe(inventory: &mut proto::InventoryEntry) {
    inventory.root_cg_set = Some(OWN_SET);
}

/// The sets that the tree is in.
#[derive(Debug)]
struct Sets {
    /// The dumper's own set first; empty if the user ignores cgroups.
    known: Vec<Set>,
    /// The roots of the tree's own cgroup namespace.
    roots: Set,
    /// The directories of groups that were frozen.
    frozen: Vec<PathBuf>,
    options: Options,
}

impl Sets {
    /// Returns the number of the set that a thread is in.
    fn enter(&mut self, pid: HostPid, tid: HostPid) -> Result<u32> {
        if self.known.is_empty() {
            return Ok(OWN_SET);
        }
        let its = set(proc::thread_cgroups(pid, tid)?);
        let position = self.known.iter().position(|known| *known == its).unwrap_or_else(|| {
            self.known.push(its);
            self.known.len() - 1
        });
        Ok(OWN_SET + u32::try_from(position).expect("fewer than threads"))
    }

    /// Returns how many bytes of a path lead to the root of the namespace; `None` if it is not there.
    fn prefix(&self, name: &[u8], path: &[u8]) -> Option<u32> {
        let root = self.roots.get(name).filter(|root| !matches!(root.as_slice(), b"" | b"/"))?;
        collect::is_below(path, root).then(|| u32::try_from(root.len()).ok()).flatten()
    }
}

impl Collector for Sets {
    fn thread(&mut self, of: thread::Thread, core: &mut proto::CoreEntry) -> Result<()> {
        thread::own(core).cg_set = Some(self.enter(of.pid, of.tid)?);
        Ok(())
    }

    /// Writes the image, unless all threads are in the dumper's own set.
    fn write(&self, images: &SnapshotWriter) -> image::Result<()> {
        if self.known.len() < 2 {
            return Ok(());
        }
        let sets = (OWN_SET..).zip(&self.known).map(|(id, set)| proto::CgSetEntry {
            id,
            ctls: set
                .iter()
                .map(|(name, path)| proto::CgMemberEntry {
                    name: name.clone(),
                    path: path.clone(),
                    cgns_prefix: if id == OWN_SET { None } else { self.prefix(name, path) },
                })
                .collect(),
        });
        let controllers = collect::controllers(&self.known, &self.options, &self.frozen);
        let entry = proto::CgroupEntry { sets: sets.collect(), controllers };
        images.write(Kind::Cgroup, 0, &[entry])
    }
}

/// Returns the number of the set in a core.
fn set_of(core: &proto::CoreEntry) -> Option<u32> {
    let of_thread = core.thread_core.as_ref().and_then(|thread| thread.cg_set);
    of_thread.or(core.tc.as_ref().and_then(|task| task.cg_set))
}

/// Where the groups of a tree are on this machine.
#[derive(Debug, Default)]
struct Places {
    /// The sets other than the dumper's own, by number.
    sets: BTreeMap<u32, Set>,
    /// The directories of the groups that the restorer is not in.
    directories: BTreeMap<(Vec<u8>, Vec<u8>), PathBuf>,
    /// The groups that the restore has made, or whose properties it sets.
    made: RefCell<Made>,
    /// The groups to freeze when the tree is in them.
    freezing: RefCell<Freezing>,
    /// Whether a process has moved.
    placed: Cell<bool>,
}

impl Places {
    /// Finds the groups of the sets with the numbers `wanted`. `dumper` is the number of the
    /// dumper's own set.
    ///
    /// # Errors
    /// [`CgroupError`] for a group that does not exist or is frozen.
    fn find(
        entry: &proto::CgroupEntry,
        dumper: Option<u32>,
        wanted: impl Iterator<Item = u32>,
        mounts: &[proc::Mount],
    ) -> Result<Self> {
        let own = own()?;
        let mut places = Self::default();
        for id in wanted.filter(|id| Some(*id) != dumper && *id != 0) {
            if places.sets.contains_key(&id) {
                continue;
            }
            let found = entry.sets.iter().find(|set| set.id == id);
            let found = found.ok_or(CgroupError::NoSet { id })?;
            let members = found.ctls.iter();
            let set: Set =
                members.map(|member| (member.name.clone(), member.path.clone())).collect();
            for (name, path) in &set {
                let key = (name.clone(), path.clone());
                if own.get(name) != Some(path) && !places.directories.contains_key(&key) {
                    let directory = directory(name, path, mounts)?;
                    check_thawed(name, path, &directory)?;
                    places.directories.insert(key, directory);
                }
            }
            places.sets.insert(id, set);
        }
        // A process in the dumper's set may have a parent that was moved: move it back.
        if !places.sets.is_empty() {
            for (name, path) in &own {
                if places.sets.values().any(|set| set.get(name) != Some(path)) {
                    let directory = directory(name, path, mounts)?;
                    places.directories.insert((name.clone(), path.clone()), directory);
                }
            }
            places.sets.entry(dumper.unwrap_or(OWN_SET)).or_insert(own);
        }
        Ok(places)
    }
}

impl Restorer for Places {
    /// Sets the properties that would have been in the way.
    fn finish(&self) -> Result<()> {
        Ok(self.made.borrow().set(When::Full)?)
    }

    fn about_to_run(&self) {
        self.freezing.borrow_mut().freeze();
    }

    fn keep(&self) {
        self.made.borrow_mut().keep();
    }

    /// Moves a new process or thread into its groups. A process moves before it gets memory,
    /// since the kernel charges memory to the group that the process is in at that time.
    fn born(&self, core: &proto::CoreEntry, pid: HostPid, tid: HostPid) -> Result<()> {
        self.place(core, pid, tid)?;
        if !self.placed.replace(true) {
            self.made.borrow().set(When::Placed)?;
        }
        Ok(())
    }
}

impl Places {
    fn place(&self, core: &proto::CoreEntry, pid: HostPid, tid: HostPid) -> Result<()> {
        let Some(wanted) = set_of(core).and_then(|id| self.sets.get(&id)) else { return Ok(()) };
        let now = set(proc::thread_cgroups(pid, tid)?);
        for (name, path) in wanted {
            if now.get(name) == Some(path) {
                continue;
            }
            let key = (name.clone(), path.clone());
            let directory = &self.directories[&key];
            let unified = name.is_empty();
            if pid == tid {
                let domain = domain(directory);
                put(tid, &domain.join("cgroup.procs"))?;
                if domain != directory {
                    put(tid, &directory.join("cgroup.threads"))?;
                }
            } else {
                put(tid, &directory.join(if unified { "cgroup.threads" } else { "tasks" }))?;
            }
        }
        Ok(())
    }
}

/// Returns the group to move a process to if its threads belong into `directory`: the nearest
/// ancestor that is not threaded.
fn domain(directory: &Path) -> &Path {
    let threaded = |directory: &Path| {
        fs::read(directory.join("cgroup.type")).is_ok_and(|kind| kind.trim_ascii() == b"threaded")
    };
    directory.ancestors().find(|directory| !threaded(directory)).unwrap_or(directory)
}

/// Returns the name of a hierarchy for messages.
fn hierarchy(name: &[u8]) -> String {
    match name {
        b"" => "version 2".into(),
        name => String::from_utf8_lossy(name).into_owned(),
    }
}

/// Returns the directory of a group, below one of the mounts.
fn directory(name: &[u8], path: &[u8], mounts: &[proc::Mount]) -> Result<PathBuf, CgroupError> {
    proc::cgroup_directory(name, path, mounts).map_err(|reason| CgroupError::Absent {
        path: String::from_utf8_lossy(path).into_owned(),
        hierarchy: hierarchy(name),
        problem: match reason {
            NoCgroup::NotMounted => "is not mounted",
            NoCgroup::Absent => "does not exist",
        }
        .into(),
    })
}

/// Checks that neither a group nor a group above it is frozen.
fn check_thawed(name: &[u8], path: &[u8], directory: &Path) -> Result<(), CgroupError> {
    let above = directory.ancestors().map(Path::to_owned);
    let mut groups = above.filter_map(|directory| Freezable::new(name, directory));
    match groups.find(Freezable::is_frozen) {
        None => Ok(()),
        Some(group) => Err(CgroupError::Frozen {
            path: String::from_utf8_lossy(path).into_owned(),
            hierarchy: hierarchy(name),
            thaw: group.how_to_thaw(),
        }),
    }
}

impl From<CgroupError> for ResError {
    fn from(error: CgroupError) -> Self {
        Self::Cgroup(error)
    }
}
