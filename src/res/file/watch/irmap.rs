//! Finds files by their inode numbers.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::sys::stat::{major, minor};

use crate::sys::root::Root;

/// Where CRIU also looks, in its order (`criu/irmap.c`).
const USUAL: [&str; 8] = [
    "/etc",
    "/var/spool",
    "/var/log",
    "/usr/share/dbus-1/services",
    "/usr/share/dbus-1/system-services",
    "/var/lib/polkit-1/localauthority",
    "/usr/share/polkit-1/actions",
    "/lib/udev",
];

/// The bits of a minor number in the kernel's device numbers (`linux/kdev_t.h`).
const MINOR_BITS: u32 = 20;

/// Files by device, as the kernel encodes it, and inode number. Directories are read once, when
/// the first file is looked for that was not found before.
#[derive(Debug, Default)]
pub(super) struct Irmap {
    /// Directories not read yet, the last one first.
    unread: Vec<PathBuf>,
    known: HashMap<(u64, u64), PathBuf>,
}

impl Irmap {
    /// Returns a map of the files below `first`, and below the usual places of watched files.
    pub(super) fn new(first: &[PathBuf]) -> Self {
        let usual = USUAL.map(PathBuf::from);
        Self { unread: first.iter().cloned().chain(usual).rev().collect(), known: HashMap::new() }
    }

    /// Returns a path that leads to a file now.
    pub(super) fn find(&mut self, root: &Root, device: u32, inode: u64) -> Option<PathBuf> {
        let key = (device.into(), inode);
        loop {
            if let Some(path) = self.known.get(&key) {
                return Some(path.clone());
            }
            let first = self.unread.pop()?;
            self.read(root, first);
        }
    }

    /// Enters the file at a path and all files below it, without following symbolic links.
    fn read(&mut self, root: &Root, first: PathBuf) {
        let mut paths = vec![first];
        while let Some(path) = paths.pop() {
            let Ok(spelled) = root.spell(&path) else { continue };
            let Ok(found) = fs::symlink_metadata(&spelled) else { continue };
            if found.is_dir() {
                let entries = fs::read_dir(&spelled).into_iter().flatten().flatten();
                paths.extend(entries.map(|entry| path.join(entry.file_name())));
            }
            self.known.entry(key(&found)).or_insert(path);
        }
    }
}

fn key(found: &fs::Metadata) -> (u64, u64) {
    (major(found.dev()) << MINOR_BITS | minor(found.dev()), found.ino())
}

/// Whether a path leads to this file, by the file's inode number and the device that `stat(2)`
/// returns.
pub(super) fn leads_to(root: &Root, path: &Path, device: u64, inode: u64) -> bool {
    root.lstat(path).is_ok_and(|found| (found.st_dev, found.st_ino) == (device, inode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_directories_are_found_below_a_path() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("file"), "").unwrap();
        std::os::unix::fs::symlink("file", deep.join("link")).unwrap();
        let mut map = Irmap { unread: vec![dir.path().to_owned()], ..Irmap::default() };
        for name in ["file", "link", "."] {
            let found = fs::symlink_metadata(deep.join(name)).unwrap();
            let (device, inode) = key(&found);
            let root = Root::own();
            let path = map.find(&root, device.try_into().unwrap(), inode).unwrap();
            assert!(leads_to(&root, &path, found.dev(), inode), "{path:?}");
        }
        assert_eq!(map.find(&Root::own(), 0, 1), None);
    }
}
