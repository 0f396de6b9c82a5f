//! Fanotify groups that only receive notifications.
//!
//! A group with permission events decides whether other programs may open files. While its program
//! is stopped, they would wait for it; once it is gone, the kernel would let them open the files.
//! So the dump refuses such a group before it opens any file itself
//! ([`permissions`](crate::res::tree::permissions)).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, fcntl},
    libc,
};

use super::{
    Options,
    target::{Finder, Reopener},
};
use crate::{
    causes::tell,
    image::proto::{
        FanotifyFileEntry, FanotifyInodeMarkEntry, FanotifyMarkEntry, FanotifyMountMarkEntry,
        FdTypes, FileEntry, MarkType,
    },
    proc::{self, FanotifyMark, FanotifyObject, FdDetail, Mount},
    res::file::{
        Collector, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage,
        descriptor, error::file_of,
    },
    sys::{fds, root::Root, watch},
};

pub(in crate::res::file) const KIND: FileKind = FileKind {
    name: "fanotify group",
    types: &[FdTypes::Fanotify],
    usage: Usage::Descriptor,
    collector: |options| Box::new(Groups::new(&options.watches)),
    opener: |_| Box::<Restored>::default(),
};

/// The most marked files that a message names.
const PATHS_SHOWN: usize = 3;

/// The bits of a minor number in the kernel's device numbers (`linux/kdev_t.h`).
const MINOR_BITS: u32 = 20;

/// `FAN_MARK_EVICTABLE`, `FAN_MARK_IGNORE` (`include/uapi/linux/fanotify.h`, Linux 5.19 and 6.0).
const MARK_EVICTABLE: u32 = 0x200;
const MARK_IGNORE: u32 = 0x400;

#[derive(Debug)]
struct Groups {
    finder: Finder,
}

impl Groups {
    fn new(options: &Options) -> Self {
        Self { finder: Finder::new(options) }
    }

    /// Builds the entry of a mark. The second value says whether it is on a file system.
    fn mark(
        &mut self,
        of: &Description,
        mark: &FanotifyMark,
        root: &Root,
    ) -> Result<(FanotifyMarkEntry, bool)> {
        let entry = FanotifyMarkEntry {
            id: of.id,
            r#type: MarkType::Mount.into(),
            mflags: mark.flags,
            mask: mark.mask,
            ignored_mask: mark.ignored_mask,
            ..Default::default()
        };
        let on_mount = |mount: &Mount, mnt_id: u32| FanotifyMarkEntry {
            s_dev: mount.device.0 << MINOR_BITS | mount.device.1,
            me: Some(FanotifyMountMarkEntry {
                mnt_id,
                path: Some(relative(mount.point.as_os_str().as_encoded_bytes())),
            }),
            ..entry.clone()
        };
        let unknown = |what: String| {
            let what = format!("a fanotify group that marks {what}");
            of.unsupported(what, "run rcriu in the mount namespace of the program")
        };
        let mounts = || Ok::<_, FileError>(proc::mounts_of(of.pid)?);
        match &mark.object {
            FanotifyObject::Inode(file) => {
                let what = "a fanotify group that marks a file";
                let handle = self.finder.handle(of, what, file, root)?;
                let inode = FanotifyInodeMarkEntry { i_ino: file.inode, f_handle: handle };
                let entry = FanotifyMarkEntry {
                    r#type: MarkType::Inode.into(),
                    s_dev: file.device,
                    ie: Some(inode),
                    ..entry
                };
                Ok((entry, false))
            }
            FanotifyObject::Mount(id) => {
                let found = mounts()?.into_iter().find(|mount| mount.id == *id);
                let mount = found.ok_or_else(|| unknown(format!("the mount {id}")))?;
                Ok((on_mount(&mount, id.cast_unsigned()), false))
            }
            FanotifyObject::FileSystem(device) => {
                let numbers = (device >> MINOR_BITS, device & ((1 << MINOR_BITS) - 1));
                let found = mounts()?.into_iter().find(|mount| mount.device == numbers);
                let mount = found.ok_or_else(|| {
                    unknown(format!("the file system {}:{}", numbers.0, numbers.1))
                })?;
                Ok((on_mount(&mount, mount.id.cast_unsigned()), true))
            }
            FanotifyObject::Other(line) => Err(of.unsupported(
                format!("a fanotify group with a mark that rcriu does not know ({line})"),
                "have the program remove the mark",
            )),
        }
    }
}

/// Warns about events that the program has not read yet: no call can put them into the queue of the
/// restored group.
fn warn_of_unread(file: &Description, group: &FanotifyFileEntry) {
    // The kernel counts this much for each event (`FAN_EVENT_METADATA_LEN`).
    const EVENT_BYTES: u32 = 24;
    let count = fds::readable_bytes(file.fd.as_fd()).unwrap_or(0).div_ceil(EVENT_BYTES);
    if count == 0 {
        return;
    }
    let handles = group.mark.iter().filter_map(|mark| mark.ie.as_ref()?.f_handle.path.as_deref());
    let all = group.mark.iter().chain(&group.rcriu_filesystem_mark);
    let mounts = all.filter_map(|mark| mark.me.as_ref()?.path.as_deref());
    let slash = |path: &[u8]| if path.starts_with(b"/") { "" } else { "/" };
    let path = |path: &[u8]| format!("{}{}", slash(path), String::from_utf8_lossy(path));
    let mut paths: Vec<String> = handles.chain(mounts).map(path).collect();
    let more = if paths.len() > PATHS_SHOWN { ", ..." } else { "" };
    paths.truncate(PATHS_SHOWN);
    let events = if count == 1 { "event" } else { "events" };
    tell(
        log::Level::Warn,
        &format!(
            "{} is a fanotify group that marks {}{more}, with {count} unread {events}: the restored \
             program does not get them\nhelp: dump the program when it has read them, or have it \
             look at its files again",
            file_of(file.pid, file.number),
            paths.join(", ")
        ),
    );
}

/// Returns a path in the form of these images, without the slash at its beginning.
fn relative(path: &[u8]) -> Vec<u8> {
    match path.strip_prefix(b"/") {
        Some(b"") => b".".to_vec(),
        Some(rest) => rest.to_vec(),
        None => path.to_vec(),
    }
}

impl Collector for Groups {
    fn claims(&self, file: &Description) -> bool {
        file.is_anonymous("[fanotify]")
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<FileEntry> {
        let FdDetail::Fanotify(group) = &file.info.detail else {
            return Err(file.failed("read the marks of")(Errno::ENODATA));
        };
        let mut entry = FanotifyFileEntry {
            id: file.id,
            flags: file.status(),
            fown: file.fown,
            faflags: group.flags,
            evflags: group.event_flags,
            ..Default::default()
        };
        for mark in &group.marks {
            let (mark, is_on_file_system) = self.mark(file, mark, intake.root_of(file))?;
            let marks =
                if is_on_file_system { &mut entry.rcriu_filesystem_mark } else { &mut entry.mark };
            marks.push(mark);
        }
        warn_of_unread(file, &entry);
        Ok(FileEntry {
            r#type: FdTypes::Fanotify.into(),
            id: file.id,
            ffy: Some(entry),
            ..Default::default()
        })
    }

    fn after_collect(&mut self, intake: &mut dyn Intake) -> Result<()> {
        self.finder.deleted.iter().try_for_each(|deleted| deleted.check(intake))
    }
}

/// The groups of the images.
#[derive(Debug, Default)]
struct Restored {
    groups: Vec<FanotifyFileEntry>,
}

impl Opener for Restored {
    fn open(&mut self, entries: &[FileEntry], opened: &mut Opened) -> Result<()> {
        for entry in entries {
            let missing =
                || FileError::image(entry.id, "it is a fanotify group, but its entry is missing");
            let group = entry.ffy.as_ref().ok_or_else(missing)?;
            let fd =
                open(group).map_err(FileError::restore(entry.id, "create", "a fanotify group"))?;
            opened.insert(entry.id, fd);
            self.groups.push(group.clone());
        }
        Ok(())
    }

    fn start(&mut self, opened: &Opened) -> Result<()> {
        let mut reopener = Reopener::default();
        for group in &self.groups {
            let fd = opened.get(group.id)?;
            let plain = group.mark.iter().map(|mark| (mark, libc::FAN_MARK_MOUNT));
            let of_file_systems = group.rcriu_filesystem_mark.iter();
            let of_file_systems = of_file_systems.map(|mark| (mark, libc::FAN_MARK_FILESYSTEM));
            for (mark, on_mount) in plain.chain(of_file_systems) {
                let id = group.id;
                let (file, scope) = match (&mark.ie, &mark.me) {
                    (Some(inode), _) => {
                        let key = (mark.s_dev, inode.i_ino);
                        (reopener.open(id, key, &inode.f_handle, opened)?, libc::FAN_MARK_INODE)
                    }
                    (None, Some(mount)) => (mount_point(id, mount, opened.root_for(id))?, on_mount),
                    (None, None) => {
                        return Err(FileError::image(id, "one of its marks is on nothing"));
                    }
                };
                add(id, fd, mark, scope, file.as_fd())?;
            }
        }
        Ok(())
    }
}

fn open(group: &FanotifyFileEntry) -> nix::Result<OwnedFd> {
    // The flags include those of the descriptor when it was created, which `fdinfo` shows.
    let fd = watch::fanotify(group.faflags, group.evflags)?;
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    descriptor::set_status(fd.as_fd(), group.flags)?;
    Ok(fd)
}

fn mount_point(id: u32, mount: &FanotifyMountMarkEntry, root: &Root) -> Result<OwnedFd> {
    let path = mount.path.as_deref().ok_or_else(|| {
        let problem = format!("it marks the mount {} of a mount namespace", mount.mnt_id);
        FileError::image(id, problem)
    })?;
    let path = [b"/", path.strip_prefix(b"/").unwrap_or(path)].concat();
    descriptor::name(root, &path, 0).map_err(FileError::restore(id, "mark", &path))
}

/// Adds a mark with the events that it reports, and those that it ignores.
fn add(
    id: u32,
    group: BorrowedFd,
    mark: &FanotifyMarkEntry,
    scope: u32,
    file: BorrowedFd,
) -> Result<()> {
    let evictable = mark.mflags & MARK_EVICTABLE;
    let ignores = mark.mflags & (MARK_IGNORE | libc::FAN_MARK_IGNORED_SURV_MODIFY);
    let ignores =
        if ignores & MARK_IGNORE == 0 { ignores | libc::FAN_MARK_IGNORED_MASK } else { ignores };
    for (mask, flags) in [(mark.mask, 0), (mark.ignored_mask, ignores)] {
        if mask != 0 {
            let flags = libc::FAN_MARK_ADD | scope | evictable | flags;
            watch::mark(group, flags, mask.into(), file).map_err(FileError::restore(
                id,
                "mark",
                "a file or a mount",
            ))?;
        }
    }
    Ok(())
}
