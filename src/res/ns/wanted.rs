//! The namespaces of a tree, during a restore.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
};

use nix::libc;

use super::{
    Building, HeldDevice, KINDS, Kind, Member, NO_VISIT, Options, Restoring, Roots, VISIT_HELP,
    may_visit, mnt, time, user, wrong,
};
use crate::{
    image::{ImageStore, Store, proto::TaskKobjIdsEntry},
    inject::{Answers, Script},
    res::{ResError, Result},
    units::{HostPid, IdMap, NsPid},
};

/// The namespaces that a restore creates for a tree.
#[derive(Debug, Default)]
pub struct Wanted {
    /// In the order in which they are made.
    kinds: Vec<OfKind>,
    /// The numbers of the namespaces of all processes.
    processes: BTreeMap<NsPid, TaskKobjIdsEntry>,
    entrances: RefCell<Entrances>,
}

/// The new namespaces of a kind.
#[derive(Debug)]
struct OfKind {
    kind: &'static Kind,
    /// The number of the namespace that the first process of the tree is in.
    home: u32,
    /// That of the first process comes first.
    states: Vec<State>,
    /// Whether processes are in others than the first process.
    has_others: bool,
}

/// A namespace, or several of a kind that are restored together.
#[derive(Debug)]
struct State {
    member: Member,
    /// Whether the first process of the tree is in it.
    is_home: bool,
    restoring: Box<dyn Restoring>,
}

/// Descriptors of the namespaces of those kinds of which the tree has several.
#[derive(Debug, Default)]
pub struct Entrances(Vec<Entrance>);

#[derive(Debug)]
struct Entrance {
    kind: &'static Kind,
    number: u32,
    file: File,
}

impl Entrances {
    fn find(&self, file: &str, number: u32) -> Option<&Entrance> {
        let mut all = self.0.iter();
        all.find(|entrance| entrance.kind.file == file && entrance.number == number)
    }

    fn script(&self, entrances: impl Iterator<Item = (&'static Kind, u32)>) -> Script {
        let mut script = Script::new();
        entrances.for_each(|(kind, number)| self.enter(kind, number, &mut script));
        script
    }

    /// Adds the call by which a process enters a namespace, if the tree has several of the kind.
    fn enter(&self, kind: &Kind, number: u32, script: &mut Script) {
        if let Some(entrance) = self.find(kind.file, number) {
            let arguments = [entrance.file.as_raw_fd().into(), kind.own.clone_flag().into()];
            script.call(format!("enter {}", kind.name), libc::SYS_setns, &arguments);
        }
    }
}

/// How the first process of a tree moves between the namespaces of the tree while they are built. It
/// shares the descriptors of rcriu.
impl Building<'_> {
    fn run(&self, script: &Script) -> Result<()> {
        if script.is_empty() {
            return Ok(());
        }
        (self.run)(script).map(drop)?;
        Ok(())
    }

    /// Keeps a way to the namespace of a kind that the first process is in.
    fn keep_entrance(&self, kind: &'static Kind, number: u32) -> Result<()> {
        let path = PathBuf::from(format!("/proc/{}/ns/{}", self.first, kind.file));
        let failed = |source| ResError::Read { path: path.clone(), source };
        let file = File::open(&path).map_err(failed)?;
        self.entrances.borrow_mut().0.push(Entrance { kind, number, file });
        Ok(())
    }

    /// Has the first process create a namespace with this number, and enter it. `file` is the name of
    /// the kind in `/proc/PID/ns`.
    pub(super) fn create(&self, file: &str, number: u32) -> Result<()> {
        let kind = kind(file);
        self.run(&create_script(kind))?;
        self.keep_entrance(kind, number)
    }

    /// Has the first process enter the namespace with this number, if the tree has several of the kind.
    pub(super) fn enter(&self, file: &str, number: u32) -> Result<()> {
        let script = self.entrances.borrow().script([(kind(file), number)].into_iter());
        self.run(&script)
    }

    /// Returns a descriptor of the namespace with this number, if the tree has several of the kind.
    pub(super) fn entrance(&self, file: &str, number: u32) -> Option<io::Result<OwnedFd>> {
        let entrances = self.entrances.borrow();
        let found = entrances.find(file, number);
        found.map(|entrance| Ok(entrance.file.try_clone()?.into()))
    }

    /// Has the first process enter the namespaces of a process, except those of the kind `file`.
    pub(super) fn enter_those_of(&self, ids: &TaskKobjIdsEntry, file: &str) -> Result<()> {
        let kinds = KINDS.iter().filter(|kind| kind.file != file);
        let script = self.entrances.borrow().script(numbers(ids, kinds));
        self.run(&script)
    }
}

fn kind(file: &str) -> &'static Kind {
    KINDS.iter().find(|kind| kind.file == file).expect("a name of the table")
}

fn create_script(kind: &Kind) -> Script {
    let mut script = Script::new();
    let what = format!("make {}", kind.name);
    script.call(what, libc::SYS_unshare, &[kind.own.clone_flag().into()]);
    script
}

/// Returns the numbers of the namespaces of these kinds in the `ids` entry of a process.
fn numbers(
    ids: &TaskKobjIdsEntry,
    kinds: impl Iterator<Item = &'static Kind>,
) -> impl Iterator<Item = (&'static Kind, u32)> {
    let mut ids = *ids;
    kinds.filter_map(move |kind| Some((kind, (*(kind.id)(&mut ids))?)))
}

impl Wanted {
    /// Reads them from the images. `processes` are those that are alive, the first one of the tree
    /// first, with their numbers; `dumper` has the numbers of the dumper's own namespaces.
    pub fn read(
        images: &dyn ImageStore,
        dumper: Option<&TaskKobjIdsEntry>,
        processes: impl IntoIterator<Item = (NsPid, TaskKobjIdsEntry)>,
        options: &Options,
    ) -> Result<Self> {
        let Some(mut dumper) = dumper.copied() else { return Ok(Self::default()) };
        let member = |(pid, ids)| Member { number: 0, pid, ids };
        let members: Vec<Member> = processes.into_iter().map(member).collect();
        let Some(first) = members.first() else { return Ok(Self::default()) };
        let mut kinds = Vec::new();
        for kind in &KINDS {
            let (Some(home), Some(dumpers)) = (number_of(kind, first), *(kind.id)(&mut dumper))
            else {
                continue;
            };
            let of_kind = OfKind::read(images, kind, (home, dumpers), &members, options)?;
            // The others belong to the user namespace, so it comes first.
            let at = if kind.file == user::FILE { 0 } else { kinds.len() };
            if !of_kind.states.is_empty() {
                kinds.insert(at, of_kind);
            }
        }
        let home = first.ids.pid_ns_id;
        let processes = members.into_iter().map(|member| (member.pid, member.ids)).collect();
        let mut wanted = Self { kinds, processes, entrances: RefCell::default() };
        wanted.check_later(home)?;
        let ids = wanted.ids();
        wanted.states_mut().for_each(|state| state.restoring.translate(&ids));
        Ok(wanted)
    }

    fn states(&self) -> impl Iterator<Item = (&'static Kind, &State)> {
        self.kinds.iter().flat_map(|of| of.states.iter().map(|state| (of.kind, state)))
    }

    fn states_mut(&mut self) -> impl Iterator<Item = &mut State> {
        self.kinds.iter_mut().flat_map(|of| &mut of.states)
    }

    /// Returns the `clone(2)` flags for the first process.
    pub fn clone_flags(&self) -> u64 {
        let made = self.states().filter(|(_, state)| state.is_home && state.restoring.is_made());
        made.fold(0, |flags, (kind, _)| flags | kind.own.clone_flag())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// Returns the map of the user and group ids of the tree.
    pub fn ids(&self) -> IdMap {
        self.states().find_map(|(_, state)| state.restoring.ids()).unwrap_or_default()
    }

    /// Whether the tree gets a time namespace of its own, in which clocks go on from the dump.
    pub fn has_clocks(&self) -> bool {
        self.kinds.iter().any(|of| of.kind.file == time::FILE)
    }

    /// Returns the root directories of the tree, whose first process exists.
    ///
    /// # Errors
    /// The process is gone, or rcriu may not enter its mount namespace.
    pub fn roots(&self, first: HostPid) -> Result<Roots> {
        let mut roots = Roots::default();
        if self.number_of(mnt::FILE).is_some() {
            roots.set_home(first, &self.ids())?;
        }
        for of in self.kinds.iter().filter(|of| of.has_others) {
            let processes = |number: u32| {
                let is_in = |pair: &(&NsPid, &TaskKobjIdsEntry)| {
                    numbers(pair.1, [of.kind].into_iter()).any(|(_, found)| found == number)
                };
                self.processes.iter().filter(is_in).map(|(pid, _)| *pid).collect()
            };
            of.states.iter().for_each(|state| state.restoring.add_roots(&mut roots, &processes));
        }
        Ok(roots)
    }

    /// Whether the tree gets a pid namespace of its own.
    pub fn has_pids(&self) -> bool {
        self.clone_flags() & u64::from(libc::CLONE_NEWPID.cast_unsigned()) != 0
    }

    /// Restores their state, in the order of the kinds. The first process is in its own namespaces of
    /// all of them, and is so again when this returns.
    ///
    /// # Errors
    /// The first failure.
    pub fn build(
        &mut self,
        first: HostPid,
        run: &dyn Fn(&Script) -> crate::inject::Result<Answers>,
        images: &Store,
        masters: &RefCell<Vec<OwnedFd>>,
    ) -> Result<()> {
        let Self { kinds, entrances, .. } = self;
        let on = Building { first, run, images, masters, entrances };
        kinds.iter_mut().try_for_each(|of| of.build(&on))
    }

    /// Returns the calls by which a process enters those of its namespaces of which the tree has
    /// several. A process that shares its working directory (`CLONE_FS`) with its maker is in the same
    /// mount namespace, and cannot enter one.
    pub fn enter(&self, pid: NsPid, shares_fs: bool) -> Script {
        let Some(ids) = self.processes.get(&pid) else { return Script::new() };
        let kinds = KINDS.iter().filter(|kind| !shares_fs || kind.file != mnt::FILE);
        self.entrances.borrow().script(numbers(ids, kinds))
    }

    /// Returns the calls of the first process of a pid namespace below that of the tree, which is in its other
    /// namespaces: it makes the mounts that show this one.
    ///
    /// # Errors
    /// The images name a mount that is not there.
    pub fn begin_pids(&self, pid: NsPid, pid_space: u64) -> Result<Script> {
        let mut script = Script::new();
        let kind = kind(mnt::FILE);
        let own = self.processes.get(&pid);
        let own = own.and_then(|ids| numbers(ids, [kind].into_iter()).next());
        let own = own.map(|(_, number)| number);
        let mut here = own;
        let entrances = self.entrances.borrow();
        for (_, state) in self.states() {
            for (space, mounts) in state.restoring.mounts_of_first(pid_space) {
                if here.replace(space) != Some(space) {
                    entrances.enter(kind, space, &mut script);
                }
                mounts.script(&mut script)?;
            }
        }
        if let Some(own) = own.filter(|own| here != Some(*own)) {
            entrances.enter(kind, own, &mut script);
        }
        Ok(script)
    }

    /// Returns the numbers of the mounts that [`Self::begin_pids`] makes.
    pub fn later_mounts(&self) -> Vec<i32> {
        self.states().flat_map(|(_, state)| state.restoring.later_mounts()).collect()
    }

    /// Checks that each pid namespace that a mount shows will be there.
    fn check_later(&self, home: Option<u32>) -> Result<()> {
        let mut shown = self.states().flat_map(|(_, state)| state.restoring.pid_spaces());
        let is_there = |space: u32| {
            let mut all = self.processes.values();
            Some(space) != home && all.any(|ids| ids.pid_ns_id == Some(space))
        };
        shown.find(|space| !is_there(*space)).map_or(Ok(()), |space| {
            Err(wrong(
                space,
                "a mount shows this pid namespace, but no process of the tree is in it",
            ))
        })
    }

    /// Finishes, once all processes have their memory and their files. `host` returns the pid here of a
    /// process.
    ///
    /// # Errors
    /// The first failure.
    pub fn finish(&mut self, host: &dyn Fn(NsPid) -> HostPid) -> Result<()> {
        self.states_mut().try_for_each(|state| state.restoring.finish(host(state.member.pid)))
    }

    /// Takes the descriptors of devices of programs ([`Restoring::take_devices`]), by the numbers of their
    /// namespaces.
    pub fn take_devices(&mut self) -> Vec<(u32, Vec<HeldDevice>)> {
        let take = |state: &mut State| (state.member.number, state.restoring.take_devices());
        self.states_mut().map(take).collect()
    }

    /// Tells the directories of the cgroups in which a cgroup namespace is to be made.
    pub fn set_root_cgroups(&self, roots: &[PathBuf]) {
        self.states().for_each(|(_, state)| state.restoring.set_root_cgroups(roots.to_vec()));
    }

    /// Returns the number of the namespace of a kind that the first process gets, if it gets one of its
    /// own. `file` is the name of the kind in `/proc/PID/ns`.
    pub fn number_of(&self, file: &str) -> Option<u32> {
        let of = self.kinds.iter().find(|of| of.kind.file == file)?;
        of.states.first().filter(|state| state.is_home).map(|_| of.home)
    }

    /// Returns the numbers of the namespaces of a kind that the tree gets, and the first process is not in.
    pub fn other_numbers(&self, file: &str) -> Vec<u32> {
        let others = self.kinds.iter().filter(|of| of.kind.file == file);
        let others = others.flat_map(|of| of.states.iter().filter(|state| !state.is_home));
        others.map(|state| state.member.number).collect()
    }

    /// Returns the numbers and files of the namespaces of a kind that the first process is not in.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn others(&self, file: &str) -> io::Result<Vec<(u32, File)>> {
        let entrances = self.entrances.borrow();
        let others = self.kinds.iter().filter(|of| of.kind.file == file);
        let others = others.flat_map(|of| of.states.iter().filter(|state| !state.is_home));
        let found = others.filter_map(|state| entrances.find(file, state.member.number));
        found.map(|entrance| Ok((entrance.number, entrance.file.try_clone()?))).collect()
    }

    /// Lists the names of the kinds of which the first process gets a namespace, for messages; `None`
    /// if there are none.
    pub fn names(&self) -> Option<String> {
        let at_home = self.states().filter(|(_, state)| state.is_home);
        let names: Vec<_> = at_home.map(|(kind, _)| kind.name).collect();
        (!names.is_empty()).then(|| names.join(" and "))
    }
}

fn number_of(kind: &Kind, member: &Member) -> Option<u32> {
    let mut ids = member.ids;
    *(kind.id)(&mut ids)
}

impl OfKind {
    /// Reads the namespaces of a kind: `home` is the number of that of the first process.
    fn read(
        images: &dyn ImageStore,
        kind: &'static Kind,
        (home, dumpers): (u32, u32),
        processes: &[Member],
        options: &Options,
    ) -> Result<Self> {
        let mut members: Vec<Member> = Vec::new();
        let mut known = HashMap::new();
        for process in processes {
            let number = number_of(kind, process).unwrap_or(home);
            if known.insert(number, ()).is_none() && number != dumpers {
                members.push(Member { number, ..process.clone() });
            }
        }
        let has_others = known.len() > 1;
        if has_others && !kind.has_others {
            let problem = format!(
                "process {} is in {} that is not that of the first process, which rcriu does not restore",
                members.last().map_or(NsPid::of_image(0), |member| member.pid),
                kind.name
            );
            return Err(wrong(members.last().map_or(home, |member| member.number), &problem));
        }
        if options.join.has(kind.file) {
            if has_others {
                let what = format!(
                    "the tree has several namespaces of the kind {}, so it cannot join one (--join-ns)",
                    kind.file
                );
                return Err(wrong(home, &what));
            }
            let is_own = home != dumpers;
            let of_images = || is_own.then(|| kind.own.restore(images, home, options)).transpose();
            let joined = options.join.of(kind.file, home, of_images)?;
            let member = Member { number: home, ..processes[0].clone() };
            let state = |restoring| State { member, is_home: true, restoring };
            return Ok(Self {
                kind,
                home,
                states: joined.map(state).into_iter().collect(),
                has_others,
            });
        }
        let has_others = has_others && !kind.own.begins_with_process();
        let mut states = Vec::new();
        if kind.file == time::FILE && home == dumpers {
            let member = Member { number: home, ..processes[0].clone() };
            let clocks = time::if_behind(images)?;
            states.extend(clocks.map(|restoring| State { member, is_home: true, restoring }));
        }
        if let Some(member) = members.first()
            && !may_visit(kind)
        {
            let problem = format!("it is {}{NO_VISIT}\nhelp: {VISIT_HELP}", kind.name);
            return Err(wrong(member.number, &problem));
        }
        let first = Member { number: home, ..processes[0].clone() };
        for (member, restoring) in kind.own.restore_all(images, &first, &members, options)? {
            let is_home = member.number == home;
            states.push(State { member, is_home, restoring });
        }
        Ok(Self { kind, home, states, has_others })
    }

    fn build(&mut self, on: &Building<'_>) -> Result<()> {
        let Self { kind, home, states, has_others } = self;
        let has_home = states.first().is_some_and(|state| state.is_home);
        if !has_home && *has_others {
            on.keep_entrance(kind, *home)?;
        }
        for State { member, is_home, restoring } in states.iter_mut() {
            let makes_others = restoring.makes_others();
            if !*is_home && restoring.is_made() && !makes_others {
                on.run(&create_script(kind))?;
            }
            on.run(&restoring.first_script())?;
            if *has_others && (*is_home || !makes_others) {
                on.keep_entrance(kind, member.number)?;
            }
            restoring.build(on)?;
            on.run(&restoring.script())?;
        }
        for round in 0.. {
            let mut has_more = false;
            for State { member, restoring, .. } in states.iter_mut() {
                if *has_others && restoring.has_rounds() {
                    on.enter(kind.file, member.number)?;
                }
                has_more |= restoring.go_on(on, round)?;
            }
            if !has_more {
                break;
            }
        }
        if *has_others { on.enter(kind.file, *home) } else { Ok(()) }
    }
}
