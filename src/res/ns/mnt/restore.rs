//! Restores mount namespaces.

use std::{
    collections::{HashMap, HashSet},
    ffi::CString,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    libc,
    sys::stat::{Mode, fstat},
};

use super::{
    Content, FILE, FileSystem, below, calls, contents, deleted,
    plan::{Mount, Plan, Source, Space},
    root_of,
};
use crate::{
    causes::tell,
    res::{
        ResError, Result,
        ns::{Building, Roots, wrong},
    },
    sys::{
        mounts::{self, MountAttributes, attribute},
        root,
        tty::{self, Question},
    },
    units::NsPid,
};

/// The number of devpts in `mnt_entry.fstype`.
const DEVPTS: u32 = 6;

/// The highest number of a terminal that images can hold, plus one.
const MOST_TERMINALS: i32 = 1001;

/// How many mounts a warning names.
const MOST_NAMED: usize = 20;

/// The longest value that `fsconfig(2)` takes.
const VALUE_BYTES: usize = 255;

/// `MS_UNBINDABLE` (`linux/mount.h`).
const UNBINDABLE: u32 = 1 << 17;

/// Flags of file systems by name.
const FILE_SYSTEM_FLAGS: [(u32, &[u8]); 4] =
    [(1 << 4, b"sync"), (1 << 6, b"mand"), (1 << 7, b"dirsync"), (1 << 25, b"lazytime")];
const READ_ONLY: u32 = 1;

/// The mounts of a plan, attached nowhere.
struct Made {
    /// Without those that the first processes of pid namespaces make.
    mounts: Vec<Option<OwnedFd>>,
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
            let root_mount = made[*root].as_ref().ok_or_else(|| self.missing())?;
            calls::replace_root(on, root_mount.as_fd(), std::mem::take(&mut attached))?;
            self.attach(on, *root, &made)?;
            if !is_home {
                self.spaces[at].directory = Some(root_of(on.first, &self.ids)?);
            }
        }
        self.relate(on, &made, &wide, &outside)?;
        self.keep_for_later(made)?;
        self.warn_of_locks();
        // Backwards, since each sets the times of its directory to what it has found.
        named.into_iter().rev().try_for_each(deleted::Named::remove)?;
        on.enter(FILE, self.home.number)
    }

    /// Warns of mounts that the tree could not unmount, and now can.
    fn warn_of_locks(&self) {
        let locked = self.mounts.iter().filter(|mount| mount.entry.rcriu_locked == Some(true));
        let mut points: Vec<String> =
            locked.map(|mount| mount.point.display().to_string()).collect();
        if points.is_empty() {
            return;
        }
        let others = points.len().saturating_sub(MOST_NAMED);
        points.truncate(MOST_NAMED);
        let others = if others > 0 { format!(" and {others} others") } else { String::new() };
        let message = format!(
            "these mounts came from a more privileged namespace and were locked \
             (mount_namespaces(7)); the tree can now unmount them and change their flags: {}{others}",
            points.join(", ")
        );
        tell(log::Level::Warn, &message);
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

    /// Whether a mount receives events from mounts that are not in the images.
    fn has_master_outside(&self, mount: &Mount) -> bool {
        let is_group = |group| self.mounts.iter().any(|mount| mount.group() == Some(group));
        mount.master().is_some_and(|master| !is_group(master))
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
            if self.shows(mount).is_some() {
                continue;
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
                    if self.related || self.has_master_outside(mount) {
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
        let missing = || self.missing();
        // Deleted files, by the number of their image, or else by file system and name.
        let mut named: Vec<((bool, u32, &Path), deleted::Named)> = Vec::new();
        for (at, mount) in self.mounts.iter().enumerate() {
            let Source::Bind(from, rest) = &mount.source else { continue };
            if self.shows(mount).is_some() {
                continue;
            }
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
        for (mount, fd) in self.mounts.iter().zip(&made) {
            let Some(fd) = fd else {
                self.shows(mount).ok_or_else(missing)?;
                continue;
            };
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

    fn missing(&self) -> ResError {
        wrong(self.home.number, "a mount is bound from one that does not exist")
    }

    /// Keeps what the first processes of pid namespaces attach, and the mount points.
    fn keep_for_later(&mut self, made: Vec<Option<OwnedFd>>) -> Result<()> {
        let mut points = Vec::new();
        for (at, mount) in self.mounts.iter().enumerate() {
            if self.waits_for(at).is_none() {
                continue;
            }
            let is_there = mount.parent.is_some_and(|parent| self.waits_for(parent).is_none());
            let point = is_there.then(|| self.mount_point(mount, |at| made[at].as_ref()));
            points.push((at, point.transpose()?));
        }
        let mut made = made;
        for (at, point) in points {
            let mount = made[at].take();
            self.keep(at, mount, point);
        }
        Ok(())
    }

    /// Mounts a file system anew, with its contents.
    fn make_anew(&self, on: &Building<'_>, mount: &Mount, name: &[u8]) -> Result<OwnedFd> {
        let entry = &mount.entry;
        let parameters = parameters(mount, name);
        let is_kernels = is_kernels(name);
        let is_read_only = mount.sb_flags() & READ_ONLY != 0;
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
    fn attach(&self, on: &Building<'_>, root: usize, made: &[Option<OwnedFd>]) -> Result<()> {
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
                let (None, Some(made_mount)) = (self.waits_for(*at), &made[*at]) else { continue };
                let point = self.mount_point(mount, |at| made[at].as_ref())?;
                let what = mount.what("attach the mount at");
                calls::attach(on, made_mount.as_fd(), point.as_fd(), &what)?;
            }
            on_it.retain(|at| self.waits_for(*at).is_none());
            pending.extend(on_it);
        }
        Ok(())
    }

    /// Puts the mounts into their sharing groups. Some groups begin with a `wide` mount.
    fn relate(
        &self,
        on: &Building<'_>,
        made: &[Option<OwnedFd>],
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
                let mount = &self.mounts[at];
                let (None, Some(own)) = (self.waits_for(at), &made[at]) else { continue };
                let own = own.as_fd();
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

/// Returns the parameters with which a file system is mounted anew.
pub(super) fn parameters(mount: &Mount, name: &[u8]) -> Vec<calls::Parameter> {
    let entry = &mount.entry;
    let sb_flags = mount.sb_flags();
    let mut parameters: Vec<calls::Parameter> = Vec::new();
    if !entry.source.is_empty() {
        parameters.push((b"source".to_vec(), Some(entry.source.clone())));
    }
    let flags = FILE_SYSTEM_FLAGS.iter().filter(|(flag, _)| sb_flags & flag != 0);
    parameters.extend(flags.map(|(_, name)| (name.to_vec(), None)));
    let is_overlay = name == b"overlay";
    for option in entry.options.split(|byte| *byte == b',').filter(|option| !option.is_empty()) {
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
    // Others may use the same file system: do not change it.
    if sb_flags & READ_ONLY != 0 && is_kernels(name) {
        parameters.push((b"ro".to_vec(), None));
    }
    parameters
}

/// Whether the kernel fills a file system.
fn is_kernels(name: &[u8]) -> bool {
    let known = FileSystem::by_name(name);
    known.is_some_and(|known| matches!(known.content, Content::Kernel(_)))
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
