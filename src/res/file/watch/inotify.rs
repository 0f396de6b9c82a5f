//! Inotify instances.
//!
//! The restore adds the watches last, so that they do not report its own work with files. Events
//! that occur while the tree does not exist are lost.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{errno::Errno, libc};

use super::{
    Options,
    target::{Finder, Reopener},
    unread,
};
use crate::{
    causes::{tell, with_sources},
    image::{
        Kind,
        proto::{FdTypes, FileEntry, InotifyFileEntry, InotifyWdEntry},
    },
    proc::FdDetail,
    res::file::{
        Collector, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage,
        descriptor, error::file_of,
    },
    sys::{fds, watch},
};

pub(in crate::res::file) const KIND: FileKind = FileKind {
    name: "inotify instance",
    types: &[FdTypes::Inotify],
    usage: Usage::Descriptor,
    collector: |options| Box::new(Instances::new(&options.watches)),
    opener: |_| Box::<Restored>::default(),
};

/// The bits in the mask of a watch that `inotify_add_watch(2)` accepts. Older kernels show more.
const MASK: u32 = libc::IN_ALL_EVENTS | libc::IN_ONESHOT | libc::IN_EXCL_UNLINK;

#[derive(Debug)]
struct Instances {
    finder: Finder,
    unread: unread::Reader,
}

impl Instances {
    fn new(options: &Options) -> Self {
        Self { finder: Finder::new(options), unread: unread::Reader::default() }
    }

    /// Warns about events that the program has not read yet, and returns whether there are any.
    fn warn_of_unread(&mut self, file: &Description, watches: &[InotifyWdEntry]) -> bool {
        let bytes = fds::readable_bytes(file.fd.as_fd()).unwrap_or(0);
        if bytes == 0 {
            return false;
        }
        let path = |wd: i32| {
            let found = watches.iter().find(|watch| watch.wd.cast_signed() == wd)?;
            let path = found.f_handle.path.as_deref().map(String::from_utf8_lossy);
            Some(path.map_or_else(|| format!("inode {}", found.i_ino), String::from))
        };
        let what = match self.unread.by_watch(file.fd.as_fd()) {
            Some(counts) => unread::describe(&counts, path),
            None => format!("{bytes} bytes of unread events"),
        };
        tell(
            log::Level::Warn,
            &format!(
                "{} is an inotify instance with {what}: in their place, the restored program is told \
                 that events are lost (IN_Q_OVERFLOW)",
                file_of(file.pid, file.number)
            ),
        );
        true
    }
}

impl Collector for Instances {
    fn claims(&self, file: &Description) -> bool {
        file.is_anonymous("inotify")
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<FileEntry> {
        let mut watches = match &file.info.detail {
            FdDetail::Inotify(watches) => watches.clone(),
            // It watches nothing.
            _ => Vec::new(),
        };
        // CRIU takes them in any order.
        watches.sort_by_key(|watch| watch.wd);
        let mut entries = Vec::with_capacity(watches.len());
        for watch in watches {
            let what = format!("an inotify instance whose watch {} is on a file", watch.wd);
            entries.push(InotifyWdEntry {
                id: file.id,
                i_ino: watch.file.inode,
                mask: watch.mask,
                ignored_mask: watch.ignored_mask,
                s_dev: watch.file.device,
                wd: watch.wd.cast_unsigned(),
                f_handle: self.finder.handle(file, &what, &watch.file, intake.root_of(file))?,
            });
        }
        let has_unread = self.warn_of_unread(file, &entries);
        Ok(FileEntry {
            r#type: FdTypes::Inotify.into(),
            id: file.id,
            ify: Some(InotifyFileEntry {
                id: file.id,
                flags: file.status(),
                fown: file.fown,
                wd: entries,
                rcriu_unread: has_unread.then_some(true),
            }),
            ..Default::default()
        })
    }

    fn after_collect(&mut self, intake: &mut dyn Intake) -> Result<()> {
        self.finder.deleted.iter().try_for_each(|deleted| deleted.check(intake))
    }
}

/// The instances of the images.
#[derive(Debug, Default)]
struct Restored {
    watches: Vec<(u32, Vec<InotifyWdEntry>)>,
    /// Instances that had unread events.
    had_unread: Vec<u32>,
}

impl Opener for Restored {
    fn open(&mut self, entries: &[FileEntry], opened: &mut Opened) -> Result<()> {
        // Older images store the watches in a separate image.
        let mut separate: HashMap<u32, Vec<InotifyWdEntry>> = HashMap::new();
        if !entries.is_empty() {
            let watches = opened.images.messages_if_any::<InotifyWdEntry>(Kind::InotifyWd, 0)?;
            for watch in watches.into_iter().flatten() {
                separate.entry(watch.id).or_default().push(watch);
            }
        }
        for entry in entries {
            let missing = || {
                FileError::image(entry.id, "it is an inotify instance, but its entry is missing")
            };
            let instance = entry.ify.as_ref().ok_or_else(missing)?;
            let fd = watch::inotify().map_err(|errno| match errno {
                Errno::EMFILE => FileError::image(
                    entry.id,
                    "the user has too many inotify instances\nhelp: raise \
                     /proc/sys/fs/inotify/max_user_instances",
                ),
                errno => FileError::restore(entry.id, "create", "an inotify instance")(errno),
            })?;
            let set = descriptor::set_status(fd.as_fd(), instance.flags);
            set.map_err(FileError::restore(entry.id, "set the flags of", "an inotify instance"))?;
            opened.insert(entry.id, fd);
            let mut watches = instance.wd.clone();
            watches.extend(separate.remove(&entry.id).unwrap_or_default());
            watches.sort_by_key(|watch| watch.wd);
            self.watches.push((entry.id, watches));
            self.had_unread.extend(instance.rcriu_unread.filter(|had| *had).map(|_| entry.id));
        }
        Ok(())
    }

    fn start(&mut self, opened: &Opened) -> Result<()> {
        let mut reopener = Reopener::default();
        for (id, watches) in &self.watches {
            let fd = opened.get(*id)?;
            if self.had_unread.contains(id) {
                replace_unread(*id, fd);
            }
            for watch in watches {
                let key = (watch.s_dev, watch.i_ino);
                let file = reopener.open(*id, key, &watch.f_handle, opened)?;
                add(*id, fd, watch, file.as_fd())?;
            }
        }
        Ok(())
    }
}

/// Tells the program that events are lost, or warns about it.
fn replace_unread(id: u32, inotify: BorrowedFd) {
    let why = match unread::overflow(inotify) {
        Ok(true) => return,
        Ok(false) => "fs.inotify.max_queued_events is too large".to_owned(),
        Err(errno) => with_sources(&FileError::restore(id, "fill", "an inotify instance")(errno)),
    };
    let what = format!(
        "file {id:#x} of the images: the inotify instance had unread events, and cannot tell the \
         program that they are lost: {why}"
    );
    tell(log::Level::Warn, &what);
}

/// Adds a watch under its old number.
fn add(id: u32, inotify: BorrowedFd, entry: &InotifyWdEntry, file: BorrowedFd) -> Result<()> {
    let path = entry.f_handle.path.as_deref().map(String::from_utf8_lossy);
    let path = path.map_or_else(|| format!("inode {}", entry.i_ino), String::from);
    let wd = entry.wd.cast_signed();
    let failed = |step| FileError::restore(id, step, &path);
    watch::set_next_watch(inotify, wd).map_err(failed("choose the number of the watch of"))?;
    let added =
        watch::add_watch(inotify, file, entry.mask & MASK).map_err(|errno| match errno {
            Errno::ENOSPC => FileError::image(
                id,
                format!(
                    "watch {path}: the user has too many inotify watches\nhelp: raise \
                 /proc/sys/fs/inotify/max_user_watches"
                ),
            ),
            errno => failed("watch")(errno),
        })?;
    if added == wd {
        return Ok(());
    }
    let problem = format!(
        "its watch {wd}, of {path}, is on the same file as another watch: the kernel has made it \
         {added}\nhelp: restore the files as they were"
    );
    Err(FileError::image(id, problem))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsRawFd};

    use super::*;
    use crate::{
        proc,
        res::file::testing::Tree,
        units::{HostPid, TargetFd},
    };

    fn watches(fd: BorrowedFd) -> Vec<(i32, u64, u32)> {
        let own = HostPid::own();
        let info = proc::fdinfo(own, TargetFd(fd.as_raw_fd())).unwrap();
        let FdDetail::Inotify(watches) = info.detail else { return Vec::new() };
        let mut found: Vec<_> =
            watches.iter().map(|watch| (watch.wd, watch.file.inode, watch.mask)).collect();
        found.sort_unstable();
        found
    }

    #[test]
    fn watches_have_their_numbers_and_masks_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut tree = Tree::new();
        let inotify = watch::inotify().unwrap();
        descriptor::set_status(inotify.as_fd(), libc::O_NONBLOCK.cast_unsigned()).unwrap();
        for (name, wd, mask) in [
            ("first", 3, libc::IN_ALL_EVENTS),
            ("second", 2, libc::IN_MODIFY | libc::IN_ONESHOT),
            ("third", 900, libc::IN_CREATE | libc::IN_EXCL_UNLINK),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, "").unwrap();
            let file = File::open(&path).unwrap();
            watch::set_next_watch(inotify.as_fd(), wd).unwrap();
            watch::add_watch(inotify.as_fd(), file.as_fd(), mask).unwrap();
            drop(file);
        }
        // Events of the test's own work with the files.
        let mut events = [0; 4096];
        nix::unistd::read(&inotify, &mut events).unwrap();
        let before = watches(inotify.as_fd());
        assert_eq!(before.len(), 3);
        tree.add(5, inotify);
        let restored = tree.restore();
        let fd = restored.take(5);
        assert_eq!(watches(fd.as_fd()), before);
        assert_eq!(restored.flags(5), restored.before(5).flags);
        let empty = nix::unistd::read(&fd, &mut events);
        assert_eq!(empty, Err(Errno::EAGAIN));
    }
}
