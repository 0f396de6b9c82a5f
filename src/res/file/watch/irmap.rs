//! Finds files by their inode numbers.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs,
    os::unix::{ffi::OsStringExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use nix::sys::stat::{major, minor};

use crate::{proc, sys::root::Root, units::HostPid};

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

/// The most files that are looked at below a directory that only the process names: it may be the
/// root directory.
const NEAR_MOST: usize = 50_000;

/// Files by device, as the kernel encodes it, and inode number. Directories are read once, when
/// the first file is looked for that was not found before.
#[derive(Debug, Default)]
pub(super) struct Irmap {
    /// Directories not read yet, the last one first, and how many files to look at, at most.
    unread: Vec<(PathBuf, usize)>,
    /// Processes whose surroundings are known.
    met: HashSet<HostPid>,
    known: HashMap<(u64, u64), PathBuf>,
}

impl Irmap {
    /// Returns a map of the files below `first`, and below the usual places of watched files.
    pub(super) fn new(first: &[PathBuf]) -> Self {
        let usual = USUAL.map(PathBuf::from);
        let all = first.iter().cloned().chain(usual).rev();
        Self { unread: all.map(|path| (path, usize::MAX)).collect(), ..Self::default() }
    }

    /// Returns a path that leads to a file now, preferably one that a process uses: most programs
    /// watch a file that they have open, that an argument names, or that is next to such a file.
    pub(super) fn find_near(
        &mut self,
        root: &Root,
        pid: HostPid,
        device: u32,
        inode: u64,
    ) -> Option<PathBuf> {
        if self.met.insert(pid) {
            let (files, directories) = surroundings(pid);
            for path in files {
                let above = path.parent().map(Path::to_owned);
                for path in [Some(path), above].into_iter().flatten() {
                    if let Ok(spelled) = root.spell(&path)
                        && let Ok(found) = fs::symlink_metadata(spelled)
                    {
                        self.known.entry(key(&found)).or_insert(path);
                    }
                }
            }
            self.unread.extend(directories.into_iter().map(|path| (path, NEAR_MOST)));
        }
        self.find(root, device, inode)
    }

    /// Returns a path that leads to a file now.
    pub(super) fn find(&mut self, root: &Root, device: u32, inode: u64) -> Option<PathBuf> {
        let key = (device.into(), inode);
        loop {
            if let Some(path) = self.known.get(&key) {
                return Some(path.clone());
            }
            let (first, most) = self.unread.pop()?;
            self.read(root, first, most);
        }
    }

    /// Enters the file at a path and all files below it, without following symbolic links. Looks at
    /// no more than `most` files.
    fn read(&mut self, root: &Root, first: PathBuf, mut most: usize) {
        let mut paths = vec![first];
        while let Some(path) = paths.pop().filter(|_| most > 0) {
            most -= 1;
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

/// Returns the files that a process uses: what it has open, its directories, and what its arguments
/// name; and the directories below which it may watch others, which are of the latter two kinds.
fn surroundings(pid: HostPid) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let path = |link: proc::Result<Vec<u8>>| {
        link.ok()
            .map(|bytes| PathBuf::from(OsString::from_vec(bytes)))
            .filter(|path| path.is_absolute())
    };
    let [cwd, top] = ["cwd", "root"].map(|name| path(proc::link(pid, name)));
    let arguments = proc::cmdline(pid).unwrap_or_default();
    let mut named: Vec<PathBuf> = cwd.iter().cloned().collect();
    for word in arguments.split(|byte| *byte == 0).filter(|word| !word.is_empty()) {
        let word = PathBuf::from(OsString::from_vec(word.to_vec()));
        let base = if word.is_absolute() { &top } else { &cwd };
        let relative = word.strip_prefix("/").unwrap_or(&word);
        named.extend(base.as_ref().map(|base| base.join(relative)));
    }
    let open = proc::fds(pid).unwrap_or_default().into_iter();
    let open = open.filter_map(|fd| path(proc::fd_link(pid, fd)));
    let files = open.chain(named.iter().cloned()).collect();
    // The last one is read first.
    (files, named)
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
        let mut map =
            Irmap { unread: vec![(dir.path().to_owned(), usize::MAX)], ..Irmap::default() };
        for name in ["file", "link", "."] {
            let found = fs::symlink_metadata(deep.join(name)).unwrap();
            let (device, inode) = key(&found);
            let root = Root::own();
            let path = map.find(&root, device.try_into().unwrap(), inode).unwrap();
            assert!(leads_to(&root, &path, found.dev(), inode), "{path:?}");
        }
        assert_eq!(map.find(&Root::own(), 0, 1), None);
    }

    #[test]
    fn no_more_files_are_looked_at_than_allowed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
        for (most, found) in [(0, 0), (1, 1), (3, 3), (9, 4)] {
            let mut map = Irmap::default();
            map.read(&Root::own(), dir.path().to_owned(), most);
            assert_eq!(map.known.len(), found, "{most}");
        }
    }

    #[test]
    fn what_a_process_has_open_is_found_with_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let _file = fs::File::create(dir.path().join("file")).unwrap();
        let mut map = Irmap::default();
        for name in ["file", "."] {
            let found = fs::symlink_metadata(dir.path().join(name)).unwrap();
            let device = key(&found).0.try_into().unwrap();
            let path = map.find_near(&Root::own(), HostPid::own(), device, found.ino()).unwrap();
            assert!(leads_to(&Root::own(), &path, found.dev(), found.ino()), "{path:?}");
        }
    }
}
