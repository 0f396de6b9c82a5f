//! Looks at the mounts of a tree, and decides for each how a restore gets it back.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    dir::Dir,
    fcntl::{OFlag, open},
    sys::stat::Mode,
};

use super::{
    Content, FileSystem, Options, below,
    reach::{Table, reach},
};
use crate::{
    causes::tell,
    proc::{self, Mount},
    res::{
        ResError, Result,
        ns::{Dumped, user},
    },
    sys::visit,
    units::{HostPid, TargetFd},
};

/// The end of the root of a mount whose file was deleted (`proc_pid_mountinfo(5)`).
const DELETED: &[u8] = b"//deleted";

/// What `mountinfo` shows of a mount that maps ids (`MOUNT_ATTR_IDMAP`, Linux 5.12), but not which.
const ID_MAPPED: &[u8] = b"idmapped";

/// File systems that are as new ones are while they are empty. Their contents are not in the images.
const IN_MEMORY: [&str; 2] = ["hugetlbfs", "bpf"];

/// The names in an empty one of these: of directories, and of files that each `bpf` has.
const OF_KERNEL: [&[u8]; 4] = [b".", b"..", b"maps.debug", b"progs.debug"];

/// How a restore gets a mount back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// It is the root of the namespace; rcriu sees the same directory at this path, if at any.
    Root(Option<PathBuf>),
    /// The user provides it under this key.
    External(String),
    /// It is bound from this path of the host.
    Host(PathBuf),
    /// It is mounted anew; `None`: a file system with a name that the user allows.
    New(Option<&'static FileSystem>),
    /// It is bound from another mount of the namespace.
    Bind,
    /// It shows a file or directory that was deleted, and that a restore makes anew in another mount of
    /// the tree, for as long as it needs the name.
    Deleted,
}

/// A mount with the decision.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// The position of its namespace among those of the tree.
    pub(super) space: usize,
    pub(super) mount: Mount,
    pub(super) source: Source,
    /// The number of the pid namespace below that of the tree that it shows, if it is a proc file system of one.
    pub(super) pid_space: Option<u32>,
}

/// Returns all mounts of the namespaces of a tree, one namespace after the other, in each the root first
/// and parents before the mounts on them.
///
/// # Errors
/// [`ResError::Refused`] for the first mount that cannot be restored.
pub(super) fn look(all: &[Dumped<'_>]) -> Result<Vec<Found>> {
    let Some(first) = all.first() else { return Ok(Vec::new()) };
    let options = &first.options.mounts;
    let mut mounts: Vec<(usize, Mount)> = Vec::new();
    for (space, of) in all.iter().enumerate() {
        let ordered = ordered(of.pid, table(of.pid)?, options)?;
        mounts.extend(ordered.into_iter().map(|mount| (space, mount)));
    }
    let host = proc::mounts()?;
    let spaces: Vec<Space> = all.iter().map(Space::of).collect();
    let pid_spaces = super::procs::pid_spaces(all, &mounts)?;
    let survey = Survey { options, host, mounts: &mounts, spaces, pid_spaces };
    let mut found: Vec<Found> = Vec::with_capacity(mounts.len());
    for (space, mount) in &mounts {
        let is_root = found.last().is_none_or(|last| last.space != *space);
        let source = survey.source((*space, mount), is_root, &found)?;
        let pid_space = survey.pid_spaces.get(&mount.device).copied();
        let pid_space = pid_space.filter(|_| matches!(source, Source::New(_)));
        found.push(Found { space: *space, mount: mount.clone(), source, pid_space });
    }
    survey.check_relations(&found)?;
    survey.check_later(&found)?;
    Ok(found)
}

/// Reads the table of mounts of the namespace of a process, as its root directory shows it.
pub(in crate::res::ns) fn table(pid: HostPid) -> Result<Vec<Mount>> {
    let failed = |source| ResError::Read { path: format!("/proc/{pid}/mountinfo").into(), source };
    let text = Table::open().and_then(|table| visit::in_mounts(pid, || table.read()));
    Ok(proc::mounts_in(&text.map_err(failed)?)?)
}

/// Returns the numbers of the mounts of a namespace, that of the root first.
pub(in crate::res::ns) fn ids(mounts: Vec<Mount>) -> impl Iterator<Item = i32> {
    let (roots, rest) = roots(mounts);
    roots.into_iter().chain(rest).map(|mount| mount.id)
}

/// Tells the roots of a table of mounts from the others.
fn roots(mounts: Vec<Mount>) -> (Vec<Mount>, Vec<Mount>) {
    let known: HashSet<i32> = mounts.iter().map(|mount| mount.id).collect();
    let is_root = |mount: &Mount| !known.contains(&mount.parent) || mount.parent == mount.id;
    mounts.into_iter().partition(is_root)
}

/// Orders mounts: the root first, each after the one on which it is mounted. Leaves out those that
/// the user does not want.
fn ordered(pid: HostPid, mounts: Vec<Mount>, options: &Options) -> Result<Vec<Mount>> {
    let (roots, mut rest) = roots(mounts);
    let [root] = roots.as_slice() else {
        return Err(ResError::Refused {
            pid,
            what: format!(
                "is in a mount namespace with {} root mounts, instead of one",
                roots.len()
            ),
            help: "dump a tree whose root directory is that of its mount namespace",
        });
    };
    rest.retain(|mount| !options.skipped.contains(&mount.point));
    let mut kept: HashSet<i32> = HashSet::from([root.id]);
    let mut ordered = vec![root.clone()];
    // Each round finds the mounts on those of the round before.
    loop {
        let (next, later): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|mount| kept.contains(&mount.parent));
        if next.is_empty() {
            return Ok(ordered);
        }
        kept.extend(next.iter().map(|mount| mount.id));
        ordered.extend(next);
        rest = later;
    }
}

/// Returns the kinds of namespaces, by their names in `/proc/PID/ns`, in which a process is without
/// rcriu.
fn own_namespaces(pid: HostPid) -> HashSet<&'static str> {
    let kinds = ["pid", "net", "ipc", "user", "cgroup"].into_iter();
    kinds.filter(|kind| proc::is_in_other_namespace(pid, kind)).collect()
}

/// Returns the path that the file or directory of a mount had, if it was deleted.
pub(super) fn former_root(mount: &Mount) -> Option<&Path> {
    let root = mount.root.as_os_str().as_bytes().strip_suffix(DELETED)?;
    Some(Path::new(OsStr::from_bytes(root)))
}

/// A mount namespace of the tree.
struct Space {
    /// A process in it.
    pid: HostPid,
    /// Whether the first process of the tree is in it.
    is_first: bool,
    /// The kinds of namespaces in which the process is without rcriu.
    own: HashSet<&'static str>,
}

impl Space {
    fn of(of: &Dumped<'_>) -> Self {
        Self { pid: of.pid, is_first: of.is_first, own: own_namespaces(of.pid) }
    }
}

struct Survey<'a> {
    options: &'a Options,
    /// The mounts of rcriu.
    host: Vec<Mount>,
    /// The mounts of the tree, with the positions of their namespaces.
    mounts: &'a [(usize, Mount)],
    spaces: Vec<Space>,
    /// The numbers of the pid namespaces below that of the tree, by the devices of their proc file systems.
    pid_spaces: HashMap<(u32, u32), u32>,
}

impl Survey<'_> {
    fn refused(&self, (space, mount): (usize, &Mount), what: &str, help: &'static str) -> ResError {
        let fs_type = String::from_utf8_lossy(&mount.fs_type);
        let what = format!("has a mount at {} ({fs_type}) {what}", mount.point.display());
        ResError::Refused { pid: self.spaces[space].pid, what, help }
    }

    fn source(&self, at: (usize, &Mount), is_root: bool, before: &[Found]) -> Result<Source> {
        let (space, mount) = at;
        let space = &self.spaces[space];
        let is_mapped = mount.flags.split(|byte| *byte == b',').any(|flag| flag == ID_MAPPED);
        if is_mapped && self.options.external(mount.point.as_os_str().as_encoded_bytes()).is_none()
        {
            let help = "mount it without a map of ids, or provide it at the restore (--external \
                        'mnt[POINT]:KEY')";
            return Err(self.refused(at, "with a map of ids of its own", help));
        }
        if is_root && space.is_first {
            return Ok(Source::Root(self.on_host(mount)));
        }
        let point = mount.point.as_os_str().as_encoded_bytes();
        if let Some(key) = self.options.external(point).filter(|_| !is_root) {
            return Ok(Source::External(key.to_owned()));
        }
        let help = "unmount it, leave it out (--skip-mnt), or provide it at the restore (--external \
                    'mnt[POINT]:KEY')";
        if let Some(root) = former_root(mount) {
            if self.can_have(mount, root) {
                return Ok(Source::Deleted);
            }
            return Err(self.refused(at, "of a file or directory that was deleted", help));
        }
        let known = FileSystem::by_name(&mount.fs_type);
        let is_whole = mount.root == Path::new("/");
        if self.pid_spaces.contains_key(&mount.device) {
            return Ok(if is_whole { Source::New(known) } else { Source::Bind });
        }
        let from_host = self.on_host(mount);
        if let Some(known) = known
            && let Content::Kernel(namespace) = known.content
            && is_whole
        {
            // In a namespace of the tree, a new mount shows that namespace.
            let is_own = namespace.is_some_and(|kind| space.own.contains(kind));
            let is_powerless = space.own.contains(user::FILE) && !is_own;
            match (&from_host, is_own, is_powerless) {
                (None, _, true) => {
                    let what = "that the user namespace of the tree has no power to mount again";
                    return Err(self.refused(at, what, help));
                }
                (None, ..) | (Some(_), false, false) => return Ok(Source::New(Some(known))),
                (Some(_), ..) => {}
            }
        }
        // Files that the tree shares with its root or with an external mount stay the same files.
        let is_of = |found: &Found| {
            found.mount.device == mount.device && below(&mount.root, &found.mount.root).is_some()
        };
        let is_given =
            |found: &&Found| matches!(found.source, Source::Root(_) | Source::External(_));
        // A copy of the mount on the host is in the groups outside, too.
        let in_namespace = |group| self.mounts.iter().any(|(_, other)| other.shared == group);
        let has_outside = mount.master != 0 && !in_namespace(mount.master)
            || mount.shared != 0 && self.host.iter().any(|host| host.shared == mount.shared);
        if let Some(path) = from_host.clone().filter(|_| has_outside) {
            return Ok(Source::Host(path));
        }
        if before.iter().filter(is_given).any(is_of) {
            return Ok(Source::Bind);
        }
        if let Some(path) = from_host {
            return Ok(Source::Host(path));
        }
        let first = before.iter().find(|found| {
            found.mount.device == mount.device && matches!(found.source, Source::New(_))
        });
        if first.is_some() {
            return Ok(Source::Bind);
        }
        let name = String::from_utf8_lossy(&mount.fs_type);
        if is_whole {
            if let Some(known) = known {
                return Ok(Source::New(Some(known)));
            }
            if self.options.enabled.iter().any(|known| *known == name || known == "all") {
                return Ok(Source::New(None));
            }
            if IN_MEMORY.contains(&&*name) {
                if is_empty(space.pid, mount)? {
                    return Ok(Source::New(None));
                }
                let what = "with files, whose contents are in memory only";
                return Err(self.refused(at, what, help));
            }
            return Err(self.refused(at, "of a file system that rcriu cannot mount again", help));
        }
        // The whole file system may be mounted later in the table.
        let is_mounted = known.is_some()
            && self.mounts.iter().any(|(_, other)| {
                other.device == mount.device && other.root == Path::new("/") && other.id != mount.id
            });
        if is_mounted {
            return Ok(Source::Bind);
        }
        // As bubblewrap makes it: the images have what the root shows.
        if is_root && mount.fs_type == b"tmpfs" {
            return Ok(Source::Root(None));
        }
        let what =
            format!("of {}, while no mount shows the whole file system", mount.root.display());
        Err(self.refused(at, &what, help))
    }

    /// Whether another mount can have the deleted file of a mount while a restore needs it.
    fn can_have(&self, mount: &Mount, former: &Path) -> bool {
        let is_writable = |other: &Mount| {
            let mut flags = other.options.split(|byte| *byte == b',');
            !flags.any(|flag| flag == b"ro")
        };
        self.mounts.iter().enumerate().any(|(at, (_, other))| {
            let is_stored = other.fs_type == b"tmpfs" && other.root == Path::new("/");
            let point = other.point.as_os_str().as_encoded_bytes();
            other.device == mount.device
                && below(former, &other.root).is_some()
                && is_writable(other)
                && (at == 0
                    || is_stored
                    || self.options.external(point).is_some()
                    || self.on_host(other).is_some())
        })
    }

    /// Returns the path at which rcriu sees the root of a mount.
    fn on_host(&self, mount: &Mount) -> Option<PathBuf> {
        let candidates = self.host.iter().filter(|host| host.device == mount.device);
        candidates.filter_map(|host| visible(host, &mount.root)).next()
    }

    /// Checks the mounts that a restore makes only when the first process of a pid namespace exists: proc file
    /// systems of such, and what is on them.
    fn check_later(&self, found: &[Found]) -> Result<()> {
        let mut later: HashMap<i32, bool> = HashMap::new();
        for Found { space, mount, .. } in found {
            let is_proc = self.pid_spaces.contains_key(&mount.device);
            let is_on_one = later.get(&mount.parent).copied() == Some(true);
            later.insert(mount.id, is_proc || is_on_one);
            if (is_proc || is_on_one) && (mount.shared != 0 || mount.master != 0) {
                let what = "that shows a pid namespace below that of the tree, or is on such a mount, and \
                            shares events with other mounts";
                let help = "make it private (mount --make-private)";
                return Err(self.refused((*space, mount), what, help));
            }
        }
        Ok(())
    }

    /// Checks the sharing groups.
    fn check_relations(&self, found: &[Found]) -> Result<()> {
        let mut groups: HashMap<u32, Vec<&Mount>> = HashMap::new();
        for Found { mount, .. } in found.iter().filter(|found| found.mount.shared != 0) {
            groups.entry(mount.shared).or_default().push(mount);
        }
        let outside: HashSet<u32> = self.host.iter().map(|mount| mount.shared).collect();
        for Found { space, mount, .. } in found {
            let at = (*space, mount);
            if mount.shared != 0 && outside.contains(&mount.shared) && !self.options.sharing {
                let what =
                    format!("that shares events with mounts outside (group {})", mount.shared);
                let help = "allow that with --enable-external-sharing, or make it private (mount \
                            --make-private)";
                return Err(self.refused(at, &what, help));
            }
            if mount.shared != 0 && outside.contains(&mount.shared) {
                let message = format!(
                    "mount {} shares events with mounts outside (group {}); after a restore it shares \
                     them only with the mounts of the tree",
                    mount.point.display(),
                    mount.shared
                );
                tell(log::Level::Warn, &message);
            }
            let has_master = mount.master != 0 && !groups.contains_key(&mount.master);
            // As with CRIU: a restore receives what brings the master. runc makes its root such a slave.
            let is_given = |given: &Found| {
                matches!(given.source, Source::Root(_) | Source::External(_))
                    && given.mount.master == mount.master
                    && given.mount.device == mount.device
                    && below(&mount.root, &given.mount.root).is_some()
            };
            if has_master && !self.options.masters && !found.iter().any(is_given) {
                let what =
                    format!("that receives events from mounts outside (group {})", mount.master);
                let help = "allow that with --enable-external-masters, or make it private (mount \
                            --make-private)";
                return Err(self.refused(at, &what, help));
            }
        }
        Ok(())
    }
}

/// Whether a mounted file system has no files but those of the kernel.
fn is_empty(pid: HostPid, mount: &Mount) -> Result<bool> {
    let Some(tree) = reach(pid, mount)? else { return Ok(false) };
    let is_empty = || -> nix::Result<bool> {
        let mut directory =
            Dir::openat(&tree, ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        for entry in directory.iter() {
            if !OF_KERNEL.contains(&entry?.file_name().to_bytes()) {
                return Ok(false);
            }
        }
        Ok(true)
    };
    is_empty().map_err(|errno| ResError::Mount {
        point: mount.point.clone(),
        step: "look into",
        source: errno.into(),
    })
}

/// Returns the path at which a mount of rcriu shows the directory or file `root` of its file system,
/// unless another mount hides it.
pub(super) fn visible(host: &Mount, root: &Path) -> Option<PathBuf> {
    let rest = below(root, &host.root)?;
    let path = if rest.as_os_str().is_empty() { host.point.clone() } else { host.point.join(rest) };
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file: OwnedFd = open(&path, flags, Mode::empty()).ok()?;
    let own = HostPid::own();
    let info = proc::fdinfo(own, TargetFd(file.as_raw_fd())).ok()?;
    (info.mnt_id == host.id).then_some(path)
}
