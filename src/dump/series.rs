//! A directory of dumps (`--chain`): which of them is the parent of the next one.
//!
//! Each dump records of which tree it is ([`Series::describe`]): the cgroup of the root process, its pid in
//! its own namespace, and its program. A container keeps all of them when it is restored. The parent is the
//! newest dump in the directory that records the same. A wrong parent would only cost space: what a dump
//! leaves to its parent, it has compared with it.
//!
//! A dump whose images are elsewhere, as a container runtime wants them, is copied into the directory: the
//! runtime may delete its own.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use crate::{
    image::{Directory, ImageStore, Kind, proto::InventoryEntry},
    proc,
    units::HostPid,
};

use super::{DumpError, Result};

/// What runtimes keep beside the images, and need for a restore.
const OF_RUNTIMES: &str = "descriptors.json";

/// The name of the link to the parent in an image directory.
const PARENT: &str = "parent";

/// A directory of dumps of one tree, and maybe of others.
#[derive(Debug)]
pub(super) struct Series {
    dir: PathBuf,
    /// Of which tree the next dump is.
    tree: Vec<u8>,
}

impl Series {
    /// Opens a directory, or makes it, for the dumps of the tree of `root`.
    ///
    /// # Errors
    /// It cannot be made; the root process is gone.
    pub(super) fn open(dir: &Path, root: HostPid) -> Result<Self> {
        let failed = |source| DumpError::Series { path: dir.to_owned(), source };
        match fs::create_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(error));
            }
            _ => {}
        }
        let dir = dir.canonicalize().map_err(failed)?;
        Ok(Self { dir, tree: identity(root)? })
    }

    /// Records in the inventory of which tree the dump is.
    pub(super) fn describe(&self, inventory: &mut InventoryEntry) {
        inventory.rcriu_tree = Some(self.tree.clone());
    }

    /// Returns the dumps of the tree, the newest first, but not that in `images_dir`: as links of it.
    pub(super) fn parents(&self, images_dir: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut found: Vec<(SystemTime, PathBuf)> = entries
            .map(|entry| entry.path())
            .filter(|path| path != images_dir && self.has(path))
            .filter_map(|path| Some((written(&path)?, path)))
            .collect();
        found.sort();
        let is_beside = images_dir.parent() == Some(&self.dir);
        let link = |(_, path): (_, PathBuf)| match path.file_name() {
            // The directory as a whole may move.
            Some(name) if is_beside => Path::new("..").join(name),
            _ => path,
        };
        found.into_iter().rev().map(link).collect()
    }

    /// Whether a directory is a dump of the tree.
    fn has(&self, dir: &Path) -> bool {
        let inventory = (&Directory::at(dir) as &dyn ImageStore)
            .message_if_any::<InventoryEntry>(Kind::Inventory, 0);
        matches!(inventory, Ok(Some(InventoryEntry { rcriu_tree: Some(tree), .. })) if tree == self.tree)
    }

    /// Copies a complete dump into the directory, unless it is there, and returns where it is.
    ///
    /// # Errors
    /// What cannot be copied.
    pub(super) fn keep(&self, images_dir: &Path) -> io::Result<PathBuf> {
        if images_dir.parent() == Some(&self.dir) {
            return Ok(images_dir.to_owned());
        }
        let copy = new_directory(&self.dir)?;
        let copied = self.copy(images_dir, &copy);
        if copied.is_err() {
            // It was made here, and no one else knows it.
            let _ = fs::remove_dir_all(&copy);
        }
        copied.map(|()| copy)
    }

    fn copy(&self, images_dir: &Path, copy: &Path) -> io::Result<()> {
        let inventory = Kind::Inventory.file_name(0);
        for entry in fs::read_dir(images_dir)? {
            let (path, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
            let is_image = path.extension().is_some_and(|extension| extension == "img");
            let is_wanted = is_image && name != *inventory || name == OF_RUNTIMES;
            if is_wanted && fs::symlink_metadata(&path)?.is_file() {
                copy_file(&path, &copy.join(name))?;
            }
        }
        if let Ok(parent) = fs::canonicalize(images_dir.join(PARENT)) {
            let link = match (parent.parent(), parent.file_name()) {
                (Some(above), Some(name)) if above == self.dir => Path::new("..").join(name),
                _ => parent,
            };
            std::os::unix::fs::symlink(link, copy.join(PARENT))?;
        }
        // With it, the directory is a dump.
        copy_file(&images_dir.join(&inventory), &copy.join(&inventory))?;
        File::open(copy)?.sync_all()
    }
}

/// Copies a file, by sharing its blocks where the file system can, and syncs it.
fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    File::open(to)?.sync_all()
}

/// When a dump was completed.
fn written(dir: &Path) -> Option<SystemTime> {
    fs::metadata(dir.join(Kind::Inventory.file_name(0))).ok()?.modified().ok()
}

/// Makes a directory for the next dump in a directory of dumps: its name is the next number.
///
/// # Errors
/// It cannot be made.
pub fn new_directory(dir: &Path) -> io::Result<PathBuf> {
    loop {
        let names = fs::read_dir(dir)?.flatten().map(|entry| entry.file_name());
        let numbers = names.filter_map(|name| name.to_str()?.parse::<u32>().ok());
        let next = dir.join(numbers.max().map_or(1, |last| last.saturating_add(1)).to_string());
        match fs::create_dir(&next) {
            // Another dump has just made it.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| next),
        }
    }
}

/// Returns what tells the tree of a process from others, and is the same after a restore.
fn identity(root: HostPid) -> Result<Vec<u8>> {
    let own = proc::cgroups(HostPid::own())?;
    let its = proc::cgroups(root)?;
    let mut other: Vec<_> = its.into_iter().filter(|group| !own.contains(group)).collect();
    other.sort_by(|(_, a, _), (_, b, _)| a.cmp(b));
    let group = other.into_iter().next().map_or_else(Vec::new, |(_, _, path)| path);
    let pid = proc::status(root)?.ns_pid.last().copied().unwrap_or(root.0);
    let program = proc::link(root, "exe").unwrap_or_default();
    Ok([b"cgroup ", &*group, b" pid ", pid.to_string().as_bytes(), b" program ", &*program]
        .concat())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::image::ImageWriter;

    fn dump(dir: &Path, tree: &str, seconds: u64) {
        fs::create_dir_all(dir).unwrap();
        let inventory = InventoryEntry { rcriu_tree: Some(tree.into()), ..Default::default() };
        let path = dir.join("inventory.img");
        let mut image = ImageWriter::create(&path, Kind::Inventory).unwrap();
        image.message(&inventory).unwrap();
        let file = image.finish().unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
    }

    fn series(dir: &Path) -> Series {
        Series { dir: dir.canonicalize().unwrap(), tree: b"a".to_vec() }
    }

    #[test]
    fn the_newest_dump_of_the_same_tree_is_the_parent() {
        let dir = tempfile::tempdir().unwrap();
        let series = series(dir.path());
        let images = series.dir.join("next");
        assert_eq!(series.parents(&images), Vec::<PathBuf>::new());
        for (name, tree, seconds) in
            [("1", "a", 10), ("2", "a", 30), ("3", "b", 40), ("x", "a", 20)]
        {
            dump(&series.dir.join(name), tree, seconds);
        }
        fs::create_dir(series.dir.join("empty")).unwrap();
        fs::write(series.dir.join("file"), "").unwrap();
        let links = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(series.parents(&images), links(&["../2", "../x", "../1"]));
        assert_eq!(series.parents(&series.dir.join("2")), links(&["../x", "../1"]));
        let elsewhere = series.parents(Path::new("/elsewhere"));
        assert_eq!(elsewhere[0], series.dir.join("2"));
    }

    #[test]
    fn a_dump_that_is_elsewhere_is_copied_with_its_parent() {
        let dir = tempfile::tempdir().unwrap();
        let series = series(dir.path());
        dump(&series.dir.join("7"), "a", 10);
        let out = tempfile::tempdir().unwrap();
        let images = out.path().join("images");
        dump(&images, "a", 20);
        fs::write(images.join("pages-1.img"), "pages").unwrap();
        fs::write(images.join("dump.log"), "log").unwrap();
        std::os::unix::fs::symlink(series.dir.join("7"), images.join(PARENT)).unwrap();
        let copy = series.keep(&images).unwrap();
        assert_eq!(copy, series.dir.join("8"));
        assert_eq!(fs::read_link(copy.join(PARENT)).unwrap(), Path::new("../7"));
        assert_eq!(fs::read(copy.join("pages-1.img")).unwrap(), b"pages");
        assert!(!copy.join("dump.log").exists());
        assert_eq!(series.parents(&images)[0], copy);
        // One that is there already stays as it is.
        assert_eq!(series.keep(&copy).unwrap(), copy);
        // What cannot be copied leaves nothing.
        fs::remove_file(images.join("inventory.img")).unwrap();
        assert!(series.keep(&images).is_err());
        assert!(!series.dir.join("9").exists());
    }
}
