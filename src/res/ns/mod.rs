//! Namespaces: which kinds there are, and which of them a tree may have for itself.
//!
//! The dumper's own have the first numbers in images, those of a tree the next ones, in
//! the order of [`KINDS`]. What a tree has in common with the dumper is that of the
//! restorer afterwards; what it has for itself is made with its first process, which all
//! others inherit it from. So all processes of a tree have to be in the same one.
//!
//! To build another kind, write a file with an [`Own`] and name it in the row of the kind.

mod uts;

use super::{ResError, Result};
use crate::{
    causes::tell,
    image::{ImageError, ImageStore, Kind as Image, SnapshotWriter, proto::TaskKobjIdsEntry},
    inject::{Answers, Script},
    proc,
    units::{HostPid, NsPid},
};

/// A kind of namespace.
#[derive(Debug)]
pub struct Kind {
    /// Its name in `/proc/PID/ns`.
    pub file: &'static str,
    /// What it is called, with its article.
    pub name: &'static str,
    /// The option of nsenter(1) that enters it.
    pub flag: &'static str,
    /// Its number among the ids of a process.
    id: fn(&mut TaskKobjIdsEntry) -> &mut Option<u32>,
    /// How one of a tree is dumped and restored; `None` if it is not yet.
    own: Option<&'static dyn Own>,
}

/// A row.
const fn row(
    file: &'static str,
    name: &'static str,
    flag: &'static str,
    id: fn(&mut TaskKobjIdsEntry) -> &mut Option<u32>,
    own: Option<&'static dyn Own>,
) -> Kind {
    Kind { file, name, flag, id, own }
}

/// The kinds of namespaces that a thread lives in.
pub static KINDS: [Kind; 8] = [
    row("pid", "a pid namespace", "-p", |ids| &mut ids.pid_ns_id, None),
    row("net", "a network namespace", "-n", |ids| &mut ids.net_ns_id, None),
    row("ipc", "an IPC namespace", "-i", |ids| &mut ids.ipc_ns_id, None),
    row("uts", "a UTS namespace", "-u", |ids| &mut ids.uts_ns_id, Some(&uts::Uts)),
    row("time", "a time namespace", "-T", |ids| &mut ids.time_ns_id, None),
    row("mnt", "a mount namespace", "-m", |ids| &mut ids.mnt_ns_id, None),
    row("user", "a user namespace", "-U", |ids| &mut ids.user_ns_id, None),
    row("cgroup", "a cgroup namespace", "-C", |ids| &mut ids.cgroup_ns_id, None),
];

/// The kinds of those that the children of a thread are to live in.
pub static FOR_CHILDREN: [Kind; 2] = [
    row(
        "pid_for_children",
        "a pid namespace for its children",
        "-p",
        |ids| &mut ids.pid_ns_id,
        None,
    ),
    row(
        "time_for_children",
        "a time namespace for its children",
        "-T",
        |ids| &mut ids.time_ns_id,
        None,
    ),
];

impl Kind {
    /// Whether a tree can have one for itself.
    pub fn is_dumped(&self) -> bool {
        self.own.is_some()
    }
}

/// How a namespace of a tree is dumped and restored.
pub trait Own: Sync + std::fmt::Debug {
    /// Its flag of `clone(2)`.
    fn clone_flag(&self) -> u64;

    /// Adds the questions to a process that is in it.
    fn ask(&self, script: &mut Script) -> Collect;

    /// Reads the images of the namespace with this number, and returns the calls by which
    /// a process that was made in a new one gives it what it had.
    ///
    /// # Errors
    /// What is wrong with the images.
    fn restore(&self, images: &dyn ImageStore, number: u32) -> Result<Script>;
}

/// Writes the images of a namespace with this number, as a process has answered.
pub type Collect = Box<dyn FnOnce(&Answers, u32, &SnapshotWriter) -> Result<(), ImageError>>;

/// Returns the number of a kind of the dumper's own.
fn number(position: usize) -> u32 {
    u32::try_from(position).expect("a few") + 1
}

/// Returns the numbers of the dumper's own.
pub fn own_ids() -> TaskKobjIdsEntry {
    // What is no namespace is numbered for each process.
    let mut ids =
        TaskKobjIdsEntry { vm_id: 1, files_id: 1, fs_id: 1, sighand_id: 1, ..Default::default() };
    for (position, kind) in KINDS.iter().enumerate() {
        *(kind.id)(&mut ids) = Some(number(position));
    }
    ids
}

/// The namespaces that a stopped tree has for itself.
#[derive(Debug, Default)]
pub struct OfTree {
    /// Their positions among all kinds.
    kinds: Vec<usize>,
    /// Whether a process was asked about them.
    asked: bool,
}

impl OfTree {
    /// Looks at a process of the tree.
    pub fn look(pid: HostPid) -> Self {
        let own = HostPid(nix::unistd::getpid().as_raw());
        let differs = |kind: &Kind| {
            // Kernels without a kind of namespace have nothing to differ in.
            let pair = [own, pid].map(|pid| proc::namespace(pid, kind.file).ok());
            matches!(pair, [Some(ours), Some(theirs)] if ours != theirs)
        };
        let all = KINDS.iter().enumerate();
        let of_tree = all.filter(|(_, kind)| kind.is_dumped() && differs(kind));
        Self { kinds: of_tree.map(|(at, _)| at).collect(), asked: false }
    }

    /// Returns the numbers of a process's namespaces.
    pub fn ids(&self) -> TaskKobjIdsEntry {
        let mut ids = own_ids();
        for at in &self.kinds {
            *(KINDS[*at].id)(&mut ids) = Some(Self::number(*at));
        }
        ids
    }

    /// Returns the number of a kind of the tree's own.
    fn number(position: usize) -> u32 {
        number(KINDS.len() + position)
    }

    /// Adds the questions about them to the first process that can answer, and returns
    /// what writes their images, with their numbers.
    pub fn ask(&mut self, script: &mut Script) -> Vec<(u32, Collect)> {
        if std::mem::replace(&mut self.asked, true) {
            return Vec::new();
        }
        let ask = |at: &usize| Some((Self::number(*at), KINDS[*at].own?.ask(script)));
        self.kinds.iter().filter_map(ask).collect()
    }
}

/// The namespaces that a tree is to have for itself.
#[derive(Debug, Default)]
pub struct Wanted(Vec<(&'static Kind, Script)>);

impl Wanted {
    /// Reads what the images say of them; `pid` is a process that has not ended, and
    /// `dumper` has the numbers of the dumper's own.
    ///
    /// # Errors
    /// What is wrong with the images.
    pub fn read(
        images: &dyn ImageStore,
        dumper: Option<&TaskKobjIdsEntry>,
        pid: NsPid,
    ) -> Result<Self> {
        let Some(mut dumper) = dumper.copied() else { return Ok(Self::default()) };
        let number = pid.image().into();
        // Images of before have none.
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
                continue;
            }
            if let Some(own) = kind.own {
                wanted.push((kind, own.restore(images, number)?));
            } else {
                let message = format!(
                    "the tree had {} of its own, which is not restored: it will be in that of \
                     rcriu restore",
                    kind.name
                );
                tell(log::Level::Warn, &message);
            }
        }
        Ok(Self(wanted))
    }

    /// Returns the flags of `clone(2)` for the first process.
    pub fn clone_flags(&self) -> u64 {
        let own = self.0.iter().filter_map(|(kind, _)| kind.own);
        own.fold(0, |flags, own| flags | own.clone_flag())
    }

    /// Returns the calls of the first process.
    pub fn scripts(&self) -> impl Iterator<Item = &Script> {
        self.0.iter().map(|(_, script)| script)
    }

    /// Says which they are, for people; `None` if there are none.
    pub fn names(&self) -> Option<String> {
        let names: Vec<_> = self.0.iter().map(|(kind, _)| kind.name).collect();
        (!names.is_empty()).then(|| names.join(" and "))
    }
}

/// Returns an error about what an image says of a namespace.
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
