//! Processes and threads by their numbers, which are others in each pid namespace.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::IdMap;

/// A process, thread, group or session by its number in the pid namespace of this program:
/// what the kernel tells this program, and takes from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct HostPid(pub i32);

impl HostPid {
    /// No process: a number beyond all that the kernel gives (`PID_MAX_LIMIT`), with which calls fail
    /// with `ESRCH`. 0 and negative numbers stand for groups in many calls.
    pub const NONE: Self = Self(i32::MAX);

    /// Returns that of this program.
    pub fn own() -> Self {
        Self(std::process::id().cast_signed())
    }
}

impl fmt::Display for HostPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A process, thread, group or session by its number in the pid namespace of its tree: what
/// images say, and what the processes of the tree pass to system calls.
///
/// Only a [`PidMap`] tells which [`HostPid`] it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NsPid(i32);

impl NsPid {
    /// What the kernel shows of a process that is outside of the namespace, and images of
    /// one that there is not.
    pub const NONE: Self = Self(0);

    /// Returns the process of a number in an image, where some fields are signed. A number
    /// that no process can have is -1.
    pub fn of_image(number: impl TryInto<i32>) -> Self {
        Self(number.try_into().unwrap_or(-1))
    }

    /// Returns the number as images have it. A process that there is not is 0.
    pub const fn image(self) -> u32 {
        if self.0 < 0 { 0 } else { self.0.cast_unsigned() }
    }

    /// Returns the number as the kernel takes it from a process of the tree.
    pub const fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Display for NsPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A process, thread, group or session by its number in the pid namespace of one process of the tree:
/// what this process passes to system calls.
///
/// [`PidMap::local`] tells which one that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalPid(i32);

impl LocalPid {
    /// Returns the number for a caller in the pid namespace of the tree itself.
    pub const fn in_tree(pid: NsPid) -> Self {
        Self(pid.0)
    }

    /// Returns the number as the kernel takes it.
    pub const fn raw(self) -> i32 {
        self.0
    }
}

/// The numbers of processes, threads, groups and sessions in the pid namespaces below that of their
/// tree. A process has a number in its own namespace, and in each one above.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Below(BTreeMap<NsPid, Vec<(u64, i32)>>);

impl Below {
    /// Records the numbers of a process, thread, group or session, the outermost namespace first. Any
    /// numbers tell the namespaces apart.
    pub fn add(&mut self, pid: NsPid, numbers: Vec<(u64, i32)>) {
        let known = self.0.entry(pid).or_default();
        if known.len() < numbers.len() {
            *known = numbers;
        }
    }

    /// Whether there are such namespaces.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the numbers of a process, thread, group or session, the outermost namespace first.
    pub fn numbers(&self, pid: NsPid) -> &[(u64, i32)] {
        self.0.get(&pid).map_or(&[], Vec::as_slice)
    }

    /// Returns the first process of a namespace.
    pub fn first_of(&self, namespace: u64) -> Option<NsPid> {
        let first = Some(&(namespace, FIRST));
        self.0.iter().find(|(_, numbers)| numbers.last() == first).map(|(pid, _)| *pid)
    }

    /// Returns the namespace of which this is the first process.
    pub fn begun_by(&self, pid: NsPid) -> Option<u64> {
        let last = self.numbers(pid).last();
        last.filter(|(_, number)| *number == FIRST).map(|(namespace, _)| *namespace)
    }
}

/// The number of the first process of a pid namespace.
const FIRST: i32 = 1;

/// Which numbers in the images of a tree are which processes here.
///
/// Copies share what they know. A tree in the pid namespace of this program has the same numbers
/// there and here. For a tree in another one, the map knows only the numbers that it was told.
///
/// Code that translates the pids of a process also translates its user and group ids, so the map has
/// these as well.
#[derive(Clone, Debug)]
pub struct PidMap {
    known: Option<Arc<Mutex<Known>>>,
    ids: IdMap,
    below: Option<Arc<Below>>,
}

/// The known numbers of another pid namespace.
#[derive(Debug, Default)]
struct Known {
    host: BTreeMap<NsPid, HostPid>,
    ns: BTreeMap<HostPid, NsPid>,
}

impl PidMap {
    /// Returns the map of a tree in the pid namespace of this program.
    pub const fn of_own_namespace() -> Self {
        Self { known: None, ids: IdMap::of_own_namespace(), below: None }
    }

    /// Returns the map of a tree in another pid namespace, which knows nothing yet.
    pub fn of_other_namespace() -> Self {
        Self { known: Some(Arc::default()), ..Self::of_own_namespace() }
    }

    /// Returns the map for a tree with this map of user and group ids.
    pub fn with_ids(self, ids: IdMap) -> Self {
        Self { ids, ..self }
    }

    /// Returns the map for a tree with these pid namespaces below its own.
    pub fn with_below(self, below: Below) -> Self {
        Self { below: Some(below).filter(|below| !below.is_empty()).map(Arc::new), ..self }
    }

    /// Returns the pid namespaces below that of the tree, if there are any.
    pub fn below(&self) -> Option<&Below> {
        self.below.as_deref()
    }

    /// Returns the number of a process, thread, group or session for calls of the process `caller`; `None`
    /// if it has no number in the pid namespace of that process.
    pub fn local(&self, pid: NsPid, caller: NsPid) -> Option<LocalPid> {
        let space = self.below().and_then(|below| below.numbers(caller).last());
        let Some((space, _)) = space else { return Some(LocalPid(pid.0)) };
        let mut numbers = self.below()?.numbers(pid).iter();
        numbers.find(|(found, _)| found == space).map(|(_, number)| LocalPid(*number))
    }

    /// Returns the numbers with which a process or thread is made, as `clone3(2)` takes them: that in the
    /// innermost namespace first, that in the pid namespace of the tree last.
    pub fn chosen(&self, pid: NsPid) -> Vec<i32> {
        let below = self.below().map_or(&[][..], |below| below.numbers(pid));
        below.iter().rev().map(|(_, number)| *number).chain([pid.0]).collect()
    }

    /// Returns the map of the user and group ids of the tree.
    pub const fn ids(&self) -> &IdMap {
        &self.ids
    }

    /// Whether the tree is in the pid namespace of this program.
    pub const fn is_own_namespace(&self) -> bool {
        self.known.is_none()
    }

    /// Records the numbers of a process, in place of those of an earlier process with one of them.
    pub fn learn(&self, ns: NsPid, host: HostPid) {
        if let Some(mut known) = self.known() {
            known.host.insert(ns, host);
            known.ns.insert(host, ns);
        }
    }

    /// Returns the known numbers; `None` for a tree in the pid namespace of this program.
    fn known(&self) -> Option<MutexGuard<'_, Known>> {
        self.known.as_ref().map(|known| known.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns the number in the images for a number that the kernel told this program;
    /// [`NsPid::NONE`] for a process outside the namespace.
    pub fn ns(&self, pid: HostPid) -> NsPid {
        let Some(known) = self.known() else { return NsPid(pid.0) };
        known.ns.get(&pid).copied().unwrap_or(NsPid::NONE)
    }

    /// Returns the number here for a number of the images; [`HostPid::NONE`] for a process that
    /// does not exist.
    pub fn host(&self, pid: NsPid) -> HostPid {
        let Some(known) = self.known() else { return HostPid(pid.0) };
        known.host.get(&pid).copied().unwrap_or(HostPid::NONE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_images_are_read_from_signed_and_unsigned_fields() {
        assert_eq!(NsPid::of_image(7_u32), NsPid::of_image(7_i32));
        assert_eq!(NsPid::of_image(u32::MAX).raw(), -1);
        assert_eq!(NsPid::of_image(u32::MAX).image(), 0);
        let pids = PidMap::of_own_namespace();
        assert_eq!(pids.host(pids.ns(HostPid(7))), HostPid(7));
    }

    #[test]
    fn a_map_of_another_namespace_knows_what_it_was_told() {
        let pids = PidMap::of_other_namespace();
        let copy = pids.clone();
        pids.learn(NsPid(1), HostPid(700));
        assert_eq!((copy.ns(HostPid(700)), copy.host(NsPid(1))), (NsPid(1), HostPid(700)));
        assert_eq!((copy.ns(HostPid(1)), copy.host(NsPid(700))), (NsPid::NONE, HostPid::NONE));
    }

    #[test]
    fn a_process_has_a_number_in_each_namespace_above_it() {
        let [root, outer, inner, group] = [7, 20, 21, 22].map(NsPid);
        let mut below = Below::default();
        below.add(outer, vec![(30, 1)]);
        below.add(inner, vec![(30, 5), (31, 1)]);
        below.add(group, vec![(30, 6)]);
        below.add(group, Vec::new());
        assert_eq!([root, outer, inner].map(|pid| below.begun_by(pid)), [None, Some(30), Some(31)]);
        assert_eq!((below.first_of(31), below.first_of(32)), (Some(inner), None));
        let pids = PidMap::of_own_namespace().with_below(below);
        let local = |pid, caller| pids.local(pid, caller).map(LocalPid::raw);
        assert_eq!([root, outer, inner].map(|pid| local(pid, root)), [Some(7), Some(20), Some(21)]);
        assert_eq!([root, outer, inner].map(|pid| local(pid, outer)), [None, Some(1), Some(5)]);
        assert_eq!([outer, inner, group].map(|pid| local(pid, inner)), [None, Some(1), None]);
        assert_eq!(
            [root, group, inner].map(|pid| pids.chosen(pid)),
            [vec![7], vec![6, 22], vec![1, 5, 21]]
        );
        assert!(PidMap::of_own_namespace().with_below(Below::default()).below().is_none());
    }
}
