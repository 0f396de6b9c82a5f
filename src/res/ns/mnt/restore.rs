//! Restores mount namespaces.

use std::{
    collections::{HashMap, HashSet},
    ffi::{CString, OsStr},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    libc,
    sys::stat::{Mode, fstat},
};

use super::{
    Content, FILE, FROM_HOST, FileSystem, MINOR_BITS, NAMED, Options, below, calls, contents,
    deleted, root_of, survey::visible,
};
use crate::{
    image::{ImageStore, Kind, proto::MntEntry},
    proc,
    res::{
        ResError, Result,
        ns::{Building, Member, Roots, wrong},
    },
    sys::{
        mounts::{self, MountAttributes, attribute},
        root::{self, Root},
        tty::{self, Question},
    },
    units::{IdMap, NsPid},
};

/// The most mounts of a namespace, as the kernel allows by default (`fs.mount-max`).
const MOST: usize = 100_000;

/// The number of devpts in `mnt_entry.fstype`.
const DEVPTS: u32 = 6;

/// The highest number of a terminal that images can hold, plus one.
const MOST_TERMINALS: i32 = 1001;

/// The longest value that `fsconfig(2)` takes.
const VALUE_BYTES: usize = 255;

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
const UNBINDABLE: u32 = 1 << 17;

/// Flags of file systems by name.
const FILE_SYSTEM_FLAGS: [(u32, &[u8]); 4] =
    [(1 << 4, b"sync"), (1 << 6, b"mand"), (1 << 7, b"dirsync"), (1 << 25, b"lazytime")];
const READ_ONLY: u32 = 1;

/// The flags of mounts in images that do not tell those from flags of file systems.
const OF_MOUNTS: u32 = 2 | 4 | 8 | (1 << 8) | (1 << 10) | (1 << 11) | RELATIVE_ATIME | (0xf << 17);

/// Where a mount comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    /// A path of the host.
    Path(PathBuf),
    /// The mount with this position, and a path below its root.
    Bind(usize, PathBuf),
    /// A new file system with this name.
    New(Vec<u8>),
}

#[derive(Debug)]
struct Mount {
    /// The position of its namespace.
    space: usize,
    entry: MntEntry,
    point: PathBuf,
    root: PathBuf,
    /// The position of the mount on which it is; the root has none.
    parent: Option<usize>,
    source: Source,
}

impl Mount {
    fn what(&self, step: &str) -> String {
        format!("{step} {}", self.point.display())
    }

    /// Returns its sharing group.
    fn group(&self) -> Option<u32> {
        self.entry.shared_id.filter(|group| *group != 0)
    }

    /// Returns the group from which it receives events.
    fn master(&self) -> Option<u32> {
        self.entry.master_id.filter(|group| *group != 0)
    }

    fn sb_flags(&self) -> u32 {
        self.entry.sb_flags.unwrap_or(self.entry.flags & !OF_MOUNTS)
    }

    fn attributes(&self) -> u64 {
        let flags = self.entry.flags;
        let set = ATTRIBUTES.iter().filter(|(flag, _)| flags & flag != 0);
        let set = set.fold(0, |set, (_, attribute)| set | attribute);
        // Without either, access times are updated always.
        if flags & (RELATIVE_ATIME | NO_ATIME) == 0 { set | attribute::STRICT_ATIME } else { set }
    }
}

/// A namespace to be restored.
#[derive(Debug)]
struct Space {
    member: Member,
    /// Whether the first process of the tree is in it.
    is_home: bool,
    /// The position of its root mount.
    root: usize,
    /// Its root directory, when it is restored.
    directory: Option<Root>,
}

/// The mounts of the namespaces to be restored.
#[derive(Debug)]
pub(super) struct Plan {
    /// The namespace of the first process, which may be that of the restorer.
    home: Member,
    spaces: Vec<Space>,
    /// Those of one namespace after those of another; in each the root first, every mount after the one
    /// on which it is.
    mounts: Vec<Mount>,
    /// Whether mounts outside may be related to them.
    related: bool,
    /// The users and groups of the tree.
    pub(super) ids: IdMap,
}

/// The mounts of a plan, attached nowhere.
struct Made {
    mounts: Vec<OwnedFd>,
    /// Copies of mounts outside to which they are related.
    outside: HashMap<usize, OwnedFd>,
    /// Mounts with which sharing groups begin.
    wide: HashMap<u32, OwnedFd>,
    /// Deleted files that have names for now.
    named: Vec<deleted::Named>,
    /// How many mounts were attached to the root that the first namespace has so far.
    attached: usize,
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
        Ok(Self { home: home.clone(), spaces, mounts, related, ids: IdMap::default() })
    }

    /// Makes the namespaces and their mounts. That of the first process is a copy of that of rcriu, or
    /// is that of rcriu.
    pub(super) fn build(&mut self, on: &Building<'_>) -> Result<()> {
        let begin = |space: &Space| -> Result<()> {
            if !space.is_home {
                on.create(FILE, space.member.number)?;
            }
            calls::isolate(on)
        };
        // That of the first process, if it has one, is the first one.
        self.spaces.first().map_or(Ok(()), begin)?;
        let Made { mounts: made, outside, wide, named, mut attached } = self.make(on)?;
        for at in 0..self.spaces.len() {
            let Space { is_home, root, .. } = &self.spaces[at];
            if at > 0 {
                begin(&self.spaces[at])?;
            }
            calls::replace_root(on, made[*root].as_fd(), std::mem::take(&mut attached))?;
            self.attach(on, *root, &made)?;
            if !is_home {
                self.spaces[at].directory = Some(root_of(on.first, &self.ids)?);
            }
        }
        self.relate(on, &made, &wide, &outside)?;
        // Backwards, since each sets the times of its directory to what it has found.
        named.into_iter().rev().try_for_each(deleted::Named::remove)?;
        on.enter(FILE, self.home.number)
    }

    /// Whether there are namespaces that the first process is not in.
    fn has_others(&self) -> bool {
        self.spaces.iter().any(|space| !space.is_home)
    }

    /// Adds the root directories of the namespaces that the first process is not in.
    pub(super) fn add_roots(&self, roots: &mut Roots, processes: &dyn Fn(u32) -> Vec<NsPid>) {
        for (at, space) in self.spaces.iter().enumerate() {
            let Some(directory) = &space.directory else { continue };
            let mounts = self.mounts.iter().filter(|mount| mount.space == at);
            let mounts = mounts.map(|mount| mount.entry.mnt_id.cast_signed());
            roots.add(directory, mounts, processes(space.member.number));
        }
    }

    /// Returns the position of the mount that has to be attached for this one to be bound from it. A mount
    /// of the host, whole, can be copied again.
    fn original_of(&self, mount: &Mount) -> Option<usize> {
        let Source::Bind(from, rest) = &mount.source else { return None };
        let is_hosts = matches!(self.mounts[*from].source, Source::Path(_));
        (!is_hosts || !rest.as_os_str().is_empty()).then_some(*from)
    }

    /// Makes all mounts, attached nowhere, with their flags, in the first of the namespaces.
    fn make(&self, on: &Building<'_>) -> Result<Made> {
        let originals_wanted: HashSet<usize> =
            self.mounts.iter().filter_map(|mount| self.original_of(mount)).collect();
        let mut made: Vec<Option<OwnedFd>> = self.mounts.iter().map(|_| None).collect();
        // What other mounts are bound from.
        let mut originals = HashMap::new();
        // Copies of mounts outside, as long as their relations are needed.
        let mut outside = HashMap::new();
        let mut space = None;
        for (at, mount) in self.mounts.iter().enumerate() {
            if self.has_others() && space != Some(mount.space) {
                // A file system of the kernel shows the namespaces of the process that mounts it.
                on.enter_those_of(&self.spaces[mount.space].member.ids, FILE)?;
                space = Some(mount.space);
            }
            let is_bound = originals_wanted.contains(&at);
            // An original goes away with all mounts that the namespace has so far.
            let attach = |original: &OwnedFd| {
                let what = mount.what("attach the original of the mount at");
                calls::attach_to_root(on, original.as_fd(), &what)
            };
            match &mount.source {
                Source::Path(path) => {
                    made[at] = Some(from_host(on, mount, path)?);
                    if self.related {
                        outside.insert(at, from_host(on, mount, path)?);
                    }
                    if is_bound {
                        let original = from_host(on, mount, path)?;
                        attach(&original)?;
                        originals.insert(at, original);
                    }
                }
                Source::New(name) if is_bound => {
                    let original = self.make_anew(on, mount, name)?;
                    attach(&original)?;
                    made[at] = Some(calls::copy(on, original.as_fd(), &mount.what("copy"))?);
                    originals.insert(at, original);
                }
                Source::New(name) => made[at] = Some(self.make_anew(on, mount, name)?),
                Source::Bind(..) => {}
            }
        }
        on.enter_those_of(&self.home.ids, FILE)?;
        let missing = || wrong(self.home.number, "a mount is bound from one that does not exist");
        // Deleted files, by the number of their image, or else by file system and name.
        let mut named: Vec<((bool, u32, &Path), deleted::Named)> = Vec::new();
        for (at, mount) in self.mounts.iter().enumerate() {
            let Source::Bind(from, rest) = &mount.source else { continue };
            let source = &self.mounts[*from].source;
            if let (Source::Path(path), None) = (source, self.original_of(mount)) {
                made[at] = Some(from_host(on, mount, path)?);
                continue;
            }
            let from = originals.get(from).ok_or_else(missing)?;
            let mut name = rest.as_os_str().as_bytes();
            if mount.entry.deleted == Some(true) {
                let key = match mount.entry.rcriu_deleted {
                    Some(number) => (true, number, Path::new("")),
                    None => (false, mount.entry.root_dev, rest.as_path()),
                };
                if !named.iter().any(|(known, _)| *known == key) {
                    let point = self.mount_point(mount, |at| made[at].as_ref())?;
                    let former = deleted::Former {
                        point: &mount.point,
                        number: mount.entry.rcriu_deleted,
                        path: rest,
                        is_directory: is_directory(&point),
                    };
                    let users = self.ids.lowest().map(|ids| (on.first, ids));
                    named.push((key, deleted::Named::make(&**on.images, former, from, users)?));
                }
                let again = named.iter().find(|(known, _)| *known == key).map(|(_, again)| again);
                name = again.ok_or_else(missing)?.path.as_os_str().as_bytes();
            }
            let named = match root::name_on_mount(from.as_fd(), name) {
                // The slave of a terminal that is still to be opened, such as /dev/console.
                Err(Errno::ENOENT) if mount.entry.fstype == DEVPTS => {
                    let master = open_master(from.as_fd(), name);
                    on.masters.borrow_mut().push(
                        master.map_err(failed(mount, "make the terminal that is bound for"))?,
                    );
                    root::name_on_mount(from.as_fd(), name)
                }
                named => named,
            };
            let named = named.map_err(failed(mount, "find what to bind for"))?;
            made[at] = Some(calls::copy(on, named.as_fd(), &mount.what("bind"))?);
        }
        let made: Vec<OwnedFd> = made.into_iter().collect::<Option<_>>().ok_or_else(missing)?;
        for (mount, fd) in self.mounts.iter().zip(&made) {
            let attributes = MountAttributes {
                set: mount.attributes(),
                clear: attribute::ALL,
                propagation: libc::MS_PRIVATE,
                ..MountAttributes::default()
            };
            calls::set(on, fd.as_fd(), attributes, &mount.what("set the flags of the mount at"))?;
        }
        let wide = self.wide_mounts(on, &originals)?;
        let named = named.into_iter().map(|(_, named)| named).collect();
        Ok(Made { mounts: made, outside, wide, named, attached: originals.len() })
    }

    /// Returns the mount point of a mount, on the one on which it is.
    fn mount_point<'a>(
        &self,
        mount: &Mount,
        made: impl Fn(usize) -> Option<&'a OwnedFd>,
    ) -> Result<OwnedFd> {
        let missing = || wrong(self.home.number, "a mount has no mount point");
        let parent = mount.parent.ok_or_else(missing)?;
        let on = made(parent).ok_or_else(missing)?;
        let rest = below(&mount.point, &self.mounts[parent].point).unwrap_or(Path::new(""));
        let point = root::name_on_mount(on.as_fd(), rest.as_os_str().as_bytes());
        point.map_err(failed(mount, "find the mount point of"))
    }

    /// Returns a mount for each group of mounts of which none shows all that the others show. A mount can join the
    /// group only of one that shows more of the file system.
    fn wide_mounts(
        &self,
        on: &Building<'_>,
        originals: &HashMap<usize, OwnedFd>,
    ) -> Result<HashMap<u32, OwnedFd>> {
        let mut wide = HashMap::new();
        let groups: HashSet<u32> = self.mounts.iter().filter_map(Mount::group).collect();
        for group in groups {
            let members = || self.mounts.iter().filter(move |mount| mount.group() == Some(group));
            let slaves = self.mounts.iter().filter(|mount| mount.master() == Some(group));
            let mut all = members().chain(slaves);
            let widest = members().min_by_key(|mount| mount.root.components().count());
            let Some(widest) = widest else { continue };
            let is_enough = all.all(|mount| below(&mount.root, &widest.root).is_some());
            let original = match &widest.source {
                Source::Bind(from, _) if !is_enough => originals.get(from),
                _ => None,
            };
            if let Some(original) = original {
                let what = widest.what("copy the file system of the mount at");
                wide.insert(group, calls::copy(on, original.as_fd(), &what)?);
            }
        }
        Ok(wide)
    }

    /// Mounts a file system anew, with its contents.
    fn make_anew(&self, on: &Building<'_>, mount: &Mount, name: &[u8]) -> Result<OwnedFd> {
        let entry = &mount.entry;
        let sb_flags = mount.sb_flags();
        let mut parameters: Vec<calls::Parameter> = Vec::new();
        if !entry.source.is_empty() {
            parameters.push((b"source".to_vec(), Some(entry.source.clone())));
        }
        let flags = FILE_SYSTEM_FLAGS.iter().filter(|(flag, _)| sb_flags & flag != 0);
        parameters.extend(flags.map(|(_, name)| (name.to_vec(), None)));
        let is_overlay = name == b"overlay";
        for option in entry.options.split(|byte| *byte == b',').filter(|option| !option.is_empty())
        {
            let equals = option.iter().position(|byte| *byte == b'=');
            let (key, value) = match equals {
                Some(at) => (&option[..at], Some(&option[at + 1..])),
                None => (option, None),
            };
            match value {
                // Too long for one value: layer by layer, since Linux 6.7.
                Some(layers) if is_overlay && key == b"lowerdir" && layers.len() > VALUE_BYTES => {
                    let layers = layers.split(|byte| *byte == b':');
                    let layer = |layer: &[u8]| (b"lowerdir+".to_vec(), Some(layer.to_vec()));
                    parameters.extend(layers.map(layer));
                }
                value => parameters.push((key.to_vec(), value.map(<[u8]>::to_vec))),
            }
        }
        let is_kernels = FileSystem::by_name(name)
            .is_some_and(|known| matches!(known.content, Content::Kernel(_)));
        let is_read_only = sb_flags & READ_ONLY != 0;
        // Others may use the same file system: do not change it.
        if is_read_only && is_kernels {
            parameters.push((b"ro".to_vec(), None));
        }
        let shown = String::from_utf8_lossy(name);
        let what = mount.what(&format!("mount {shown} at"));
        let made = calls::make(on, name, &parameters, &what)?;
        if name == b"tmpfs" {
            let users = self.ids.lowest().map(|ids| (on.first, ids));
            let numbers = (entry.root_dev, entry.mnt_id);
            if !contents::unpack(&**on.images, numbers, &mount.point, made.as_fd(), users)? {
                log::warn!("the images have no contents of the tmpfs at {}", mount.point.display());
            }
        }
        if is_read_only && !is_kernels {
            calls::reconfigure(on, made.as_fd(), b"ro", &what)?;
        }
        Ok(made)
    }

    /// Attaches all mounts of a namespace to their mount points; `root` is the position of its root mount.
    fn attach(&self, on: &Building<'_>, root: usize, made: &[OwnedFd]) -> Result<()> {
        let depth = |mount: &Mount| mount.point.components().count();
        let mut children: HashMap<usize, Vec<usize>> = HashMap::new();
        for (at, mount) in self.mounts.iter().enumerate() {
            if let Some(parent) = mount.parent {
                children.entry(parent).or_default().push(at);
            }
        }
        let mut pending = vec![root];
        while let Some(parent) = pending.pop() {
            let mut on_it = children.remove(&parent).unwrap_or_default();
            // A mount hides the mount points below its own.
            on_it.sort_by_key(|at| std::cmp::Reverse(depth(&self.mounts[*at])));
            for at in &on_it {
                let mount = &self.mounts[*at];
                let point = self.mount_point(mount, |at| made.get(at))?;
                let what = mount.what("attach the mount at");
                calls::attach(on, made[*at].as_fd(), point.as_fd(), &what)?;
            }
            pending.extend(on_it);
        }
        Ok(())
    }

    /// Puts the mounts into their sharing groups. Some groups begin with a `wide` mount.
    fn relate(
        &self,
        on: &Building<'_>,
        made: &[OwnedFd],
        wide: &HashMap<u32, OwnedFd>,
        outside: &HashMap<usize, OwnedFd>,
    ) -> Result<()> {
        let groups: HashSet<u32> = self.mounts.iter().filter_map(Mount::group).collect();
        // The first of each group.
        let mut first: HashMap<u32, BorrowedFd> = HashMap::new();
        // A mount can join the group of one that shows more of the same file system only.
        let mut order: Vec<usize> = (0..self.mounts.len()).collect();
        order.sort_by_key(|at| self.mounts[*at].root.components().count());
        // The kernel changes only mounts of the namespace that the caller is in.
        let mut space = None;
        let mut propagate = |mount: &Mount, fd: BorrowedFd, propagation: u64| {
            let of_mount = mount.space;
            if self.has_others() && space != Some(of_mount) {
                on.enter(FILE, self.spaces[of_mount].member.number)?;
                space = Some(of_mount);
            }
            let attributes = MountAttributes { propagation, ..MountAttributes::default() };
            let what = mount.what("set the propagation of the mount at");
            calls::set(on, fd, attributes, &what)
        };
        loop {
            let before = order.len();
            let mut later = Vec::new();
            for at in order {
                let (mount, own) = (&self.mounts[at], made[at].as_fd());
                let what = mount.what("share the mount at");
                let of_master = mount
                    .master()
                    .map(|master| (groups.contains(&master), first.get(&master).copied()));
                // Its master must be there first.
                if let Some((true, None)) = of_master {
                    later.push(at);
                    continue;
                }
                if let Some(other) = mount.group().and_then(|group| first.get(&group)) {
                    calls::join(on, own, *other, &what)?;
                    continue;
                }
                let begins = mount.group().and_then(|group| wide.get(&group)).map(AsFd::as_fd);
                let head = begins.unwrap_or(own);
                match of_master {
                    Some((_, Some(other))) => {
                        calls::join(on, head, other, &what)?;
                        propagate(mount, head, libc::MS_SLAVE)?;
                    }
                    Some((_, None)) => match outside.get(&at) {
                        Some(other) => {
                            // The first process may have no power over mounts outside.
                            mounts::join(head, other.as_fd())
                                .map_err(failed(mount, "join the groups outside of"))?;
                            propagate(mount, head, libc::MS_SLAVE)?;
                        }
                        None => log::warn!(
                            "the mount at {} no longer receives events from mounts outside",
                            mount.point.display()
                        ),
                    },
                    None => {}
                }
                if let Some(group) = mount.group() {
                    propagate(mount, head, libc::MS_SHARED)?;
                    first.insert(group, head);
                }
                if begins.is_some() {
                    calls::join(on, own, head, &what)?;
                }
                if mount.entry.flags & UNBINDABLE != 0 {
                    propagate(mount, own, libc::MS_UNBINDABLE)?;
                }
            }
            if later.is_empty() {
                return Ok(());
            }
            if later.len() == before {
                return Err(wrong(
                    self.home.number,
                    "sharing groups of mounts are each other's masters",
                ));
            }
            order = later;
        }
    }
}

fn is_directory(file: &OwnedFd) -> bool {
    fstat(file).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

/// Opens the master of the slave with this name, on a mount of devpts.
fn open_master(devpts: BorrowedFd, name: &[u8]) -> nix::Result<OwnedFd> {
    let index = str::from_utf8(name).ok().and_then(|name| name.parse::<i32>().ok());
    let index = index.filter(|index| *index < MOST_TERMINALS).ok_or(Errno::ENOENT)?;
    let ptmx = root::name_on_mount(devpts, b"ptmx")?;
    let path = format!("/proc/self/fd/{}", ptmx.as_raw_fd());
    // The kernel gives the lowest free number.
    let mut lower = Vec::new();
    loop {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let master = open(path.as_str(), flags, Mode::empty())?;
        match tty::ask(master.as_fd(), Question::Index)? {
            found if found == index => return Ok(master),
            found if found > index => return Err(Errno::EEXIST),
            _ => lower.push(master),
        }
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

fn failed(mount: &Mount, step: &'static str) -> impl Fn(Errno) -> ResError {
    let point = mount.point.clone();
    move |errno| ResError::Mount { point: point.clone(), step, source: errno.into() }
}

/// Copies a mount of rcriu; without the power to do that, the one that the namespace of the first process
/// has inherited.
fn from_host(on: &Building<'_>, mount: &Mount, path: &Path) -> Result<OwnedFd> {
    let path = path.canonicalize().map_err(|source| ResError::Mount {
        point: mount.point.clone(),
        step: "find what to bind for",
        source: std::io::Error::new(source.kind(), format!("{}: {source}", path.display())),
    })?;
    let invalid = |_| failed(mount, "bind")(Errno::EINVAL);
    let path = CString::new(path.as_os_str().as_bytes()).map_err(invalid)?;
    match mounts::copy(&path) {
        Err(Errno::EPERM) => calls::copy_from_path(on, &path, &mount.what("bind the mount at")),
        copy => copy.map_err(failed(mount, "bind")),
    }
}
