//! Files whose reads the tree is notified of (inotify, fanotify).
//!
//! A dump opens some files to examine them. The kernel would notify a process that watches such a
//! file, its directory or its mount. So the dump opens none of these files.

use std::{collections::HashSet, ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};

use super::{Description, Result};
use crate::{
    proc::{self, FanotifyObject, FdDetail},
    sys::root::Root,
    units::HostPid,
};

/// Events of reading a file: `IN_ACCESS`, `IN_CLOSE_NOWRITE`, `IN_OPEN`, and the `FAN_*` events
/// with the same numbers.
const READING: u32 = 0x1 | 0x10 | 0x20;

/// The files, mounts and file systems whose reads the tree is notified of.
#[derive(Clone, Debug, Default)]
pub struct Listeners {
    /// Inode numbers of files and directories. Those of other file systems may be the same, which
    /// does no harm.
    inodes: HashSet<u64>,
    /// Ids of mounts.
    mounts: HashSet<i32>,
    /// Whether whole file systems are watched.
    everywhere: bool,
}

impl Listeners {
    /// Adds the watches of a process.
    ///
    /// # Errors
    /// The errors of reading `/proc`.
    pub fn add(&mut self, pid: HostPid) -> Result<()> {
        let descriptors = proc::Descriptors::open(pid)?;
        for fd in descriptors.numbers()? {
            let link = descriptors.link(fd)?;
            if !matches!(&*link, b"anon_inode:inotify" | b"anon_inode:[fanotify]") {
                continue;
            }
            match descriptors.info(fd)?.detail {
                FdDetail::Inotify(watches) => {
                    let heard = watches.iter().filter(|watch| watch.mask & READING != 0);
                    self.inodes.extend(heard.map(|watch| watch.file.inode));
                }
                FdDetail::Fanotify(group) => {
                    for mark in group.marks.iter().filter(|mark| mark.mask & READING != 0) {
                        match &mark.object {
                            FanotifyObject::Inode(file) => drop(self.inodes.insert(file.inode)),
                            FanotifyObject::Mount(id) => drop(self.mounts.insert(*id)),
                            _ => self.everywhere = true,
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether a process of the tree would be notified if the dump read the file.
    pub(super) fn hear_of(&self, file: &Description, root: &Root) -> bool {
        let is_in_watched = || {
            let path = Path::new(OsStr::from_bytes(&file.link));
            let parent = path.parent().and_then(|parent| root.lstat(parent).ok());
            parent.is_some_and(|parent| self.inodes.contains(&parent.st_ino))
        };
        self.everywhere
            || self.mounts.contains(&file.info.mnt_id)
            || !self.inodes.is_empty()
                && (self.inodes.contains(&file.stat.st_ino) || is_in_watched())
    }
}
