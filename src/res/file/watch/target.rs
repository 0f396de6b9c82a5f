//! Watched files: how the dump finds their paths, and how the restore finds them again.
//!
//! The kernel shows a watched file by device, inode number and handle. The images have all of
//! these, and a path if there is one: handles and inode numbers are only good for the same file
//! system, and on tmpfs only until it is unmounted.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::OsStr,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        stat::fstat,
        statfs::{TMPFS_MAGIC, fstatfs},
    },
};

use super::{
    Options,
    irmap::{Irmap, leads_to},
};
use crate::{
    image::proto::FhEntry,
    proc::{self, FileHandle, WatchedInode},
    res::file::{Description, FileError, Intake, Opened, Result, descriptor},
    sys::{
        root::Root,
        watch::{self, HANDLE_BYTES},
    },
    units::{HostPid, TargetFd},
};

/// The bits of a minor number in the kernel's device numbers (`linux/kdev_t.h`).
const MINOR_BITS: u32 = 20;

/// How mount points are opened.
const DIRECTORY: u32 = libc::O_DIRECTORY.cast_unsigned();

/// Where watched files are looked for.
#[derive(Clone, Copy, Debug)]
struct Place<'a> {
    root: &'a Root,
    /// A process with these mounts; `None` for rcriu.
    process: Option<HostPid>,
}

/// The mount point of each mount of each file system, by device.
#[derive(Debug, Default)]
struct Mounts(HashMap<u32, Vec<OwnedFd>>);

impl Mounts {
    fn of(&mut self, device: u32, place: Place<'_>) -> &[OwnedFd] {
        match self.0.entry(device) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let (major, minor) = (device >> MINOR_BITS, device & ((1 << MINOR_BITS) - 1));
                let mounts = match place.process {
                    Some(pid) => proc::mounts_of(pid),
                    None => proc::mounts(),
                };
                let mounts = mounts.unwrap_or_default();
                let ours = mounts.iter().filter(|mount| mount.device == (major, minor));
                // The kernel takes no O_PATH descriptor with a handle.
                let open = |point: &PathBuf| {
                    let name =
                        descriptor::name(place.root, point.as_os_str().as_bytes(), DIRECTORY);
                    name.and_then(|name| descriptor::reopen(name.as_fd(), DIRECTORY)).ok()
                };
                new.insert(ours.filter_map(|mount| open(&mount.point)).collect())
            }
        }
    }

    /// Opens a file by its handle, in such a way that the link of the descriptor is its path if it
    /// has one.
    fn open(&mut self, file: &WatchedInode, place: Place<'_>) -> Option<ByHandle> {
        let handle = file.handle.as_ref()?;
        let mut fallback = None;
        for mount in self.of(file.device, place) {
            let opened = watch::open_by_handle(mount.as_fd(), handle.kind, &handle.bytes);
            let Ok(opened) = opened else { continue };
            let Ok(stat) = fstat(&opened) else { continue };
            if stat.st_ino != file.inode {
                continue;
            }
            let path = link(opened.as_fd())
                .filter(|path| leads_to(place.root, path, stat.st_dev, stat.st_ino));
            let has_path = path.is_some();
            let found = ByHandle { fd: opened, stat, path };
            if has_path {
                return Some(found);
            }
            fallback.get_or_insert(found);
        }
        fallback
    }
}

/// A file that was opened by its handle.
#[derive(Debug)]
struct ByHandle {
    fd: OwnedFd,
    stat: libc::stat,
    /// A path that leads to it, if it has one.
    path: Option<PathBuf>,
}

/// Returns what `/proc` shows as the path of a descriptor.
fn link(fd: BorrowedFd) -> Option<PathBuf> {
    let own = HostPid::own();
    let link = proc::fd_link(own, TargetFd(fd.as_raw_fd())).ok()?;
    Some(PathBuf::from(OsStr::from_bytes(&link)))
}

/// A watched file that was deleted. Its contents must be in the images.
#[derive(Clone, Debug)]
pub(super) struct Deleted {
    pid: HostPid,
    number: TargetFd,
    what: String,
    key: (u64, u64),
}

impl Deleted {
    /// Checks that the tree has the file open, so that the restore recreates it.
    pub(super) fn check(&self, intake: &mut dyn Intake) -> Result<()> {
        if intake.deleted_files().is_ghost(self.key) {
            return Ok(());
        }
        let what =
            format!("{}, which was deleted and which only other processes have open", self.what);
        let help = "have the program remove the watch";
        Err(FileError::Unsupported { pid: self.pid, fd: self.number, what, help })
    }
}

/// Finds the paths of watched files.
#[derive(Debug)]
pub(super) struct Finder {
    mounts: Mounts,
    scanned: Irmap,
    always_scan: bool,
    /// Watched files that were deleted.
    pub(super) deleted: Vec<Deleted>,
}

impl Finder {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            mounts: Mounts::default(),
            scanned: Irmap::new(&options.scan),
            always_scan: options.always_scan,
            deleted: Vec::new(),
        }
    }

    /// Builds the handle of a watched file for the images, with the path. `what` is the watch in
    /// words, for messages.
    ///
    /// # Errors
    /// [`FileError::Unsupported`] if the file is not found.
    pub(super) fn handle(
        &mut self,
        of: &Description,
        what: &str,
        file: &WatchedInode,
        root: &Root,
    ) -> Result<FhEntry> {
        let place = Place { root, process: (!root.is_own()).then_some(of.pid) };
        let handle = file.handle.clone().unwrap_or_default();
        let entry = FhEntry {
            bytes: u32::try_from(handle.bytes.len()).expect("at most 128"),
            r#type: handle.kind,
            handle: to_words(&handle.bytes),
            ..Default::default()
        };
        let with = |path: PathBuf| FhEntry {
            path: Some(path.into_os_string().into_encoded_bytes()),
            ..entry.clone()
        };
        if self.always_scan
            && let Some(path) = self.scanned.find(root, file.device, file.inode)
        {
            return Ok(with(path));
        }
        let found = self.mounts.open(file, place);
        if let Some(ByHandle { stat, path, .. }) = &found {
            if let Some(path) = path {
                return Ok(with(path.clone()));
            }
            if stat.st_nlink == 0 {
                let key = (stat.st_dev, stat.st_ino);
                let (pid, number) = (of.pid, of.number);
                self.deleted.push(Deleted { pid, number, what: what.to_owned(), key });
                return Ok(entry);
            }
        }
        let is_lasting = found.is_some_and(|found| {
            fstatfs(&found.fd).is_ok_and(|found| found.filesystem_type() != TMPFS_MAGIC)
        });
        match self.scanned.find_near(root, of.pid, file.device, file.inode) {
            Some(path) => Ok(with(path)),
            // The same file system still has the file at the restore.
            None if is_lasting => Ok(entry),
            None => {
                let (major, minor) =
                    (file.device >> MINOR_BITS, file.device & ((1 << MINOR_BITS) - 1));
                let what = format!(
                    "{what} (inode {} of the device {major}:{minor}), of which no path is known",
                    file.inode
                );
                Err(of.unsupported(what, "name a directory above the file with --irmap-scan-path"))
            }
        }
    }
}

/// Opens watched files again.
#[derive(Debug, Default)]
pub(super) struct Reopener(Mounts);

impl Reopener {
    /// Opens a watched file with `O_PATH`: a deleted one that was recreated, else by its path, else by
    /// its handle.
    pub(super) fn open(
        &mut self,
        id: u32,
        (device, inode): (u32, u64),
        handle: &FhEntry,
        opened: &Opened,
    ) -> Result<OwnedFd> {
        if let Some(ghost) = opened.recreated.ghost_of(device, inode) {
            let copy = ghost.try_clone_to_owned().map_err(|_| Errno::EMFILE);
            return copy.map_err(FileError::restore(id, "duplicate", "a deleted file"));
        }
        let root = opened.root_for(id);
        if let Some(path) = &handle.path {
            let flags = (libc::O_PATH | libc::O_NOFOLLOW).cast_unsigned();
            let fd = descriptor::open(root, path, flags);
            return fd.map_err(FileError::restore(id, "watch", path));
        }
        let file = WatchedInode { inode, device, handle: Some(to_handle(id, handle)?) };
        let process = opened.helpers.first().filter(|_| !root.is_own());
        let found = self.0.open(&file, Place { root, process });
        found.map(|found| found.fd).ok_or_else(|| {
            let (major, minor) = (device >> MINOR_BITS, device & ((1 << MINOR_BITS) - 1));
            let problem = format!(
                "it watches inode {inode} of the device {major}:{minor}, which is not there\nhelp: dump \
                 the program again with --force-irmap and --irmap-scan-path, which find a path for it"
            );
            FileError::image(id, problem)
        })
    }
}

/// Returns the bytes of a handle in the form of the images: always 16 words.
fn to_words(bytes: &[u8]) -> Vec<u64> {
    let mut padded = [0; HANDLE_BYTES];
    padded[..bytes.len()].copy_from_slice(bytes);
    let (words, _) = padded.as_chunks();
    words.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

fn to_handle(id: u32, entry: &FhEntry) -> Result<FileHandle> {
    let mut bytes: Vec<u8> = Vec::with_capacity(HANDLE_BYTES);
    for word in entry.handle.iter().take(HANDLE_BYTES / size_of::<u64>()) {
        bytes.extend(word.to_le_bytes());
    }
    let len = usize::try_from(entry.bytes).unwrap_or(usize::MAX);
    if len > bytes.len() {
        return Err(FileError::image(id, format!("a file handle has {len} bytes")));
    }
    bytes.truncate(len);
    Ok(FileHandle { kind: entry.r#type, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_are_padded_in_the_images() {
        let entry = |bytes: &[u8]| FhEntry {
            bytes: u32::try_from(bytes.len()).unwrap(),
            r#type: 0x81,
            handle: to_words(bytes),
            ..Default::default()
        };
        let bytes: Vec<u8> = (0..12).collect();
        let words = to_words(&bytes);
        assert_eq!((words.len(), words[0], words[1]), (16, 0x0706_0504_0302_0100, 0x0b0a_0908));
        assert_eq!(to_handle(1, &entry(&bytes)).unwrap(), FileHandle { kind: 0x81, bytes });
        let long = FhEntry { bytes: 129, ..entry(&[0; HANDLE_BYTES]) };
        to_handle(1, &long).unwrap_err();
        to_handle(1, &FhEntry { bytes: 9, handle: vec![1], ..long }).unwrap_err();
    }

    #[test]
    fn a_file_is_found_by_its_handle() {
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::open(dir.path()).unwrap();
        let inotify = watch::inotify().unwrap();
        watch::add_watch(inotify.as_fd(), file.as_fd(), libc::IN_CREATE).unwrap();
        let own = HostPid::own();
        let info = proc::fdinfo(own, TargetFd(inotify.as_raw_fd())).unwrap();
        let proc::FdDetail::Inotify(watches) = info.detail else { panic!("{info:?}") };
        let place = Place { root: &Root::own(), process: None };
        let found = Mounts::default().open(&watches[0].file, place).unwrap();
        let expected = dir.path().canonicalize().unwrap();
        assert_eq!(link(found.fd.as_fd()), Some(expected.clone()));
        assert_eq!(found.path, Some(expected));
        let gone = WatchedInode { inode: 1, ..watches[0].file.clone() };
        assert!(Mounts::default().open(&gone, place).is_none());
    }
}
