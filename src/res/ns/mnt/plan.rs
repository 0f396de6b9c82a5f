//! The mounts that images describe, checked, with where each comes from.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::{
    FROM_HOST, FileSystem, MINOR_BITS, NAMED, Options, below, later::Waiting, survey::visible,
};
use crate::{
    image::{ImageStore, Kind, proto::MntEntry},
    proc,
    res::{
        ResError, Result,
        ns::{Member, wrong},
    },
    sys::{mounts::attribute, root::Root},
    units::IdMap,
};

/// The most mounts of a namespace, as the kernel allows by default (`fs.mount-max`).
const MOST: usize = 100_000;

/// Flags of mounts in the images (`MS_*`, `linux/mount.h`).
const ATTRIBUTES: [(u32, u64); 7] = [
    (1, attribute::READ_ONLY),
    (2, attribute::NO_SUID),
    (4, attribute::NO_DEV),
    (8, attribute::NO_EXEC),
    (1 << 8, attribute::NO_LINKS),
    (1 << 10, attribute::NO_ATIME),
    (1 << 11, attribute::NO_DIR_ATIME),
];
const RELATIVE_ATIME: u32 = 1 << 21;
const NO_ATIME: u32 = 1 << 10;

/// The flags of mounts in images that do not tell those from flags of file systems.
const OF_MOUNTS: u32 = 2 | 4 | 8 | (1 << 8) | (1 << 10) | (1 << 11) | RELATIVE_ATIME | (0xf << 17);

/// Where a mount comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A path of the host.
    Path(PathBuf),
    /// The mount with this position, and a path below its root.
    Bind(usize, PathBuf),
    /// A new file system with this name.
    New(Vec<u8>),
}

#[derive(Debug)]
pub(super) struct Mount {
    /// The position of its namespace.
    pub(super) space: usize,
    pub(super) entry: MntEntry,
    pub(super) point: PathBuf,
    pub(super) root: PathBuf,
    /// The position of the mount on which it is; the root has none.
    pub(super) parent: Option<usize>,
    pub(super) source: Source,
}

impl Mount {
    pub(super) fn what(&self, step: &str) -> String {
        format!("{step} {}", self.point.display())
    }

    /// Returns its sharing group.
    pub(super) fn group(&self) -> Option<u32> {
        self.entry.shared_id.filter(|group| *group != 0)
    }

    /// Returns the group from which it receives events.
    pub(super) fn master(&self) -> Option<u32> {
        self.entry.master_id.filter(|group| *group != 0)
    }

    pub(super) fn sb_flags(&self) -> u32 {
        self.entry.sb_flags.unwrap_or(self.entry.flags & !OF_MOUNTS)
    }

    pub(super) fn attributes(&self) -> u64 {
        let flags = self.entry.flags;
        let set = ATTRIBUTES.iter().filter(|(flag, _)| flags & flag != 0);
        let set = set.fold(0, |set, (_, attribute)| set | attribute);
        // Without either, access times are updated always.
        if flags & (RELATIVE_ATIME | NO_ATIME) == 0 { set | attribute::STRICT_ATIME } else { set }
    }
}

/// A namespace to be restored.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) member: Member,
    /// Whether the first process of the tree is in it.
    pub(super) is_home: bool,
    /// The position of its root mount.
    pub(super) root: usize,
    /// Its root directory, when it is restored.
    pub(super) directory: Option<Root>,
}

/// The mounts of the namespaces to be restored.
#[derive(Debug)]
pub(super) struct Plan {
    /// The namespace of the first process, which may be that of the restorer.
    pub(super) home: Member,
    pub(super) spaces: Vec<Space>,
    /// Those of one namespace after those of another; in each the root first, every mount after the one
    /// on which it is.
    pub(super) mounts: Vec<Mount>,
    /// Whether mounts outside may be related to them.
    pub(super) related: bool,
    /// The users and groups of the tree.
    pub(super) ids: IdMap,
    /// What first processes of pid namespaces mount, in the order of the mounts, once the plan is built.
    pub(super) waiting: Vec<Waiting>,
}

impl Plan {
    /// Reads and checks the images.
    pub(super) fn read(
        images: &dyn ImageStore,
        home: &Member,
        members: &[Member],
        options: &Options,
    ) -> Result<Self> {
        let mut spaces = Vec::with_capacity(members.len());
        let mut mounts: Vec<Mount> = Vec::new();
        for (space, member) in members.iter().enumerate() {
            let number = member.number;
            let entries: Vec<MntEntry> = images.messages(Kind::Mnts, number.into())?;
            if entries.len() + mounts.len() > MOST {
                let count = entries.len() + mounts.len();
                return Err(wrong(number, &format!("{count} mounts, more than {MOST}")));
            }
            let root = mounts.len();
            for (entry, parent) in ordered(number, entries, options)? {
                let point = PathBuf::from(OsStr::from_bytes(&rooted(&entry.mountpoint)));
                let (parent, source) = (parent.map(|at| root + at), Source::New(Vec::new()));
                let below = PathBuf::from(OsStr::from_bytes(&entry.root));
                mounts.push(Mount { space, entry, point, root: below, parent, source });
            }
            let is_home = number == home.number;
            spaces.push(Space { member: member.clone(), is_home, root, directory: None });
        }
        let ids: HashSet<u32> = mounts.iter().map(|mount| mount.entry.mnt_id).collect();
        if ids.len() != mounts.len() {
            return Err(wrong(home.number, "two mounts have the same number"));
        }
        let packed: HashSet<String> = images
            .list()
            .map_err(|source| ResError::Read { path: images.name().to_owned(), source })?
            .into_iter()
            .collect();
        let reader = Reader { spaces: &spaces, options, packed: &packed };
        // Binds may come from any other mount.
        let given: Vec<Option<Source>> = mounts
            .iter()
            .enumerate()
            .map(|(at, mount)| reader.given(mount, reader.is_home_root(at, mount)))
            .collect::<Result<_>>()?;
        for (at, source) in given.into_iter().enumerate() {
            if let Some(source) = source {
                mounts[at].source = source;
            }
        }
        let mut whole: HashMap<u32, usize> = HashMap::new();
        // Mounts may be bound from the roots of their namespaces.
        let roots = spaces.iter().map(|space| space.root);
        for at in roots.chain(0..mounts.len()) {
            if mounts[at].source == Source::New(Vec::new()) {
                mounts[at].source = reader.derived(&mounts, at, &mut whole)?;
            }
        }
        let related = options.masters || options.sharing;
        let (home, ids) = (home.clone(), IdMap::default());
        Ok(Self { home, spaces, mounts, related, ids, waiting: Vec::new() })
    }
}

/// Decides where mounts come from.
struct Reader<'a> {
    spaces: &'a [Space],
    options: &'a Options,
    /// The names of all images.
    packed: &'a HashSet<String>,
}

impl Reader<'_> {
    fn wrong(&self, mount: &Mount, problem: &str) -> ResError {
        let number = self.spaces[mount.space].member.number;
        wrong(number, &format!("the mount at {} {problem}", mount.point.display()))
    }

    /// Whether a mount is the root of a namespace.
    fn is_root(&self, at: usize, mount: &Mount) -> bool {
        self.spaces[mount.space].root == at
    }

    /// Whether a mount is the root of the namespace of the first process.
    fn is_home_root(&self, at: usize, mount: &Mount) -> bool {
        self.spaces[mount.space].is_home && self.is_root(at, mount)
    }

    /// Returns the path of the host for a mount that has one. `is_root`: for the root of the namespace of
    /// the first process.
    fn given(&self, mount: &Mount, is_root: bool) -> Result<Option<Source>> {
        let entry = &mount.entry;
        if is_root {
            return self.root(mount, self.options.root.as_deref()).map(Some);
        }
        let key = match (&entry.ext_key, entry.ext_mount) {
            (Some(key), _) => key,
            (None, Some(true)) => &entry.root,
            _ => return Ok(None),
        };
        if key == FROM_HOST {
            return Ok(Some(Source::Path(PathBuf::from(OsStr::from_bytes(&entry.source)))));
        }
        let path = self.options.external(key);
        path.map(|path| Some(Source::Path(path.into()))).ok_or_else(|| {
            let key = String::from_utf8_lossy(key);
            let problem = format!(
                "is external\nhelp: say what to mount there with --external 'mnt[{key}]:PATH'"
            );
            self.wrong(mount, &problem)
        })
    }

    /// Decides for the root of a namespace, which the options may give.
    fn root(&self, mount: &Mount, given: Option<&Path>) -> Result<Source> {
        if let Some(root) = given {
            return Ok(Source::Path(root.to_owned()));
        }
        let entry = &mount.entry;
        let images = [
            Kind::TmpfsDev.file_name(entry.root_dev.into()),
            Kind::TmpfsImg.file_name(entry.mnt_id.into()),
        ];
        if images.iter().any(|name| self.packed.contains(name)) {
            return Ok(Source::New(b"tmpfs".to_vec()));
        }
        let device = (entry.root_dev >> MINOR_BITS, entry.root_dev & ((1 << MINOR_BITS) - 1));
        let host = proc::mounts()?;
        let same = host.iter().filter(|host| host.device == device);
        let found = same.filter_map(|host| visible(host, &mount.root)).next();
        found.map(Source::Path).ok_or_else(|| {
            let problem = format!(
                "shows {} of the device {}:{}, which is not mounted here\nhelp: name the root directory \
                 of the tree with --root DIR",
                mount.root.display(),
                device.0,
                device.1
            );
            self.wrong(mount, &problem)
        })
    }

    /// Decides for a mount that is not from the host. `whole` has the new mounts by device.
    fn derived(
        &self,
        mounts: &[Mount],
        at: usize,
        whole: &mut HashMap<u32, usize>,
    ) -> Result<Source> {
        let mount = &mounts[at];
        let device = mount.entry.root_dev;
        let of_device =
            |other: &&(usize, &Mount)| other.1.entry.root_dev == device && other.0 != at;
        let others = || mounts.iter().enumerate();
        let from = others().filter(|other| of_device(&other)).find_map(|(other, from)| {
            let is_made = matches!(&from.source, Source::New(name) if !name.is_empty());
            let is_there = matches!(from.source, Source::Path(_))
                || self.is_home_root(other, from)
                || is_made && self.is_root(other, from);
            let rest = below(&mount.root, &from.root)?;
            is_there.then(|| Source::Bind(other, rest.to_owned()))
        });
        if let Some(source) = from {
            return Ok(source);
        }
        let is_whole = |mount: &Mount| mount.root == Path::new("/");
        // It is the only mount of its file system.
        let is_alone =
            || !others().any(|(_, other)| other.entry.root_dev == device && is_whole(other));
        if self.is_root(at, mount) && (self.name(mount).is_err() || is_alone()) {
            return self.root(mount, None);
        }
        if let Some(other) = whole.get(&device) {
            let rest = mount.root.strip_prefix("/").unwrap_or(&mount.root);
            return Ok(Source::Bind(*other, rest.to_owned()));
        }
        if is_whole(mount) {
            let name = self.name(mount)?;
            whole.insert(device, at);
            return Ok(Source::New(name));
        }
        let later = others().find(|(_, other)| other.entry.root_dev == device && is_whole(other));
        match later {
            Some((other, from)) => {
                self.name(from)?;
                let rest = mount.root.strip_prefix("/").unwrap_or(&mount.root);
                Ok(Source::Bind(other, rest.to_owned()))
            }
            None => {
                let problem = format!(
                    "shows {}, but the whole file system is not mounted anywhere\nhelp: dump it as \
                     external: --external 'mnt[{}]:KEY'",
                    mount.root.display(),
                    mount.point.display()
                );
                Err(self.wrong(mount, &problem))
            }
        }
    }

    fn name(&self, mount: &Mount) -> Result<Vec<u8>> {
        let entry = &mount.entry;
        if entry.fstype == NAMED {
            return entry.fsname.clone().ok_or_else(|| self.wrong(mount, "has no file system"));
        }
        let known = FileSystem::by_code(entry.fstype);
        known.map(|known| known.name.as_bytes().to_vec()).ok_or_else(|| {
            let problem = format!(
                "is of a file system (number {}) that rcriu does not mount\nhelp: dump it as external: \
                 --external 'mnt[{}]:KEY'",
                entry.fstype,
                mount.point.display()
            );
            self.wrong(mount, &problem)
        })
    }
}

/// Orders the entries: the root first, each after the one on which it is mounted, with the position
/// of that.
fn ordered(
    number: u32,
    entries: Vec<MntEntry>,
    options: &Options,
) -> Result<Vec<(MntEntry, Option<usize>)>> {
    let ids: HashSet<u32> = entries.iter().map(|entry| entry.mnt_id).collect();
    if ids.len() != entries.len() {
        return Err(wrong(number, "two mounts have the same number"));
    }
    let is_root = |entry: &MntEntry| {
        !ids.contains(&entry.parent_mnt_id) || entry.parent_mnt_id == entry.mnt_id
    };
    let (roots, mut rest): (Vec<_>, Vec<_>) = entries.into_iter().partition(is_root);
    let Ok([root]) = <[MntEntry; 1]>::try_from(roots) else {
        return Err(wrong(number, "it does not have exactly one root mount"));
    };
    let is_skipped = |entry: &MntEntry| {
        let point = rooted(&entry.mountpoint);
        options.skipped.iter().any(|skipped| skipped.as_os_str().as_bytes() == point)
    };
    rest.retain(|entry| !is_skipped(entry));
    let mut position = HashMap::from([(root.mnt_id, 0)]);
    let mut ordered = vec![(root, None)];
    loop {
        let before = ordered.len();
        let mut later = Vec::new();
        let mut next = Vec::new();
        for entry in rest {
            match position.get(&entry.parent_mnt_id) {
                Some(parent) => next.push((entry, Some(*parent))),
                None => later.push(entry),
            }
        }
        for (entry, parent) in next {
            position.insert(entry.mnt_id, ordered.len());
            ordered.push((entry, parent));
        }
        if ordered.len() == before {
            // What is left is on mounts that were left out.
            return Ok(ordered);
        }
        rest = later;
    }
}

/// Returns a path that begins with a slash; images may store it relative to the root.
fn rooted(path: &[u8]) -> Vec<u8> {
    let path = path.strip_prefix(b".").unwrap_or(path);
    if path.starts_with(b"/") { path.to_vec() } else { [b"/", path].concat() }
}
