//! The files that processes of a snapshot map, if their contents are available: in unchanged files on
//! this machine, or in ghost images.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{SystemTime, UNIX_EPOCH},
};

use super::Result;
use crate::{
    chain::{self, FileId, Files},
    image::{ImageError, Kind, Remap, Store, build_id, proto, read_files},
};

/// The device that private anonymous memory may be mapped from.
const DEV_ZERO: &[u8] = b"/dev/zero";

/// The object behind a mapping.
#[derive(Clone, Debug)]
pub(super) enum Mapped {
    /// Zeros.
    Zero,
    /// The shared object with this shmid.
    Shared(u64),
    /// A file.
    File(Arc<MappedFile>),
}

/// The mapped files of a snapshot, by number.
#[derive(Debug)]
pub(super) struct MappedFiles {
    files: HashMap<u32, Mapped>,
    memfds: HashMap<u32, u64>,
}

impl MappedFiles {
    /// Reads the files of a snapshot from the images, without examining the files themselves. Unless
    /// `named` is set, leaves out files whose contents the images do not hold.
    pub(super) fn load(images: &Store, named: bool) -> Result<Self> {
        let entries = read_files(&**images)?.unwrap_or_default();
        let inodes: Vec<proto::MemfdInodeEntry> =
            images.messages_if_any(Kind::MemfdInode, 0)?.unwrap_or_default();
        let remaps: Vec<proto::RemapFilePathEntry> =
            images.messages_if_any(Kind::RemapFpath, 0)?.unwrap_or_default();

        let shmids: HashMap<u64, u64> =
            inodes.iter().map(|inode| (inode.inode_id, inode.shmid.into())).collect();
        let mut tables = Self { files: HashMap::new(), memfds: HashMap::new() };
        let mut names = HashMap::new();
        for entry in &entries {
            if let Some(memfd) = &entry.memfd
                && let Some(shmid) = shmids.get(&memfd.inode_id.into())
            {
                tables.memfds.insert(memfd.id, *shmid);
            }
            if let Some(reg) = &entry.reg {
                names.insert(reg.id, reg.name.as_slice());
            }
        }
        let remaps: HashMap<u32, &proto::RemapFilePathEntry> =
            remaps.iter().map(|remap| (remap.orig_id, remap)).collect();
        for reg in entries.iter().filter_map(|entry| entry.reg.as_ref()) {
            let mapped = if reg.name == DEV_ZERO {
                Mapped::Zero
            } else {
                let origin = match origin(images, reg, remaps.get(&reg.id).copied(), &names) {
                    Origin::Path { .. } if !named => Origin::Nowhere,
                    origin => origin,
                };
                let name = String::from_utf8_lossy(&reg.name).into_owned();
                Mapped::File(Arc::new(MappedFile { name, origin, extents: OnceLock::new() }))
            };
            tables.files.insert(reg.id, mapped);
        }
        Ok(tables)
    }

    /// Returns the object behind a mapping of the file `id`.
    pub(super) fn file(&self, id: u64) -> Option<Mapped> {
        self.files.get(&u32::try_from(id).ok()?).cloned()
    }

    /// Returns the object behind a mapping of the memfd `id`.
    pub(super) fn memfd(&self, id: u64) -> Option<Mapped> {
        self.memfds.get(&u32::try_from(id).ok()?).copied().map(Mapped::Shared)
    }
}

/// Returns where the contents of a file should be.
fn origin(
    images: &Store,
    reg: &proto::RegFileEntry,
    remap: Option<&proto::RemapFilePathEntry>,
    names: &HashMap<u32, &[u8]>,
) -> Origin {
    let mut name = reg.name.as_slice();
    if let Some(remap) = remap {
        match Remap::of(remap) {
            Ok(Remap::Ghost(id)) => return Origin::Ghost(Arc::clone(images), id),
            Ok(Remap::Linked(id)) => match names.get(&id) {
                Some(linked) => name = linked,
                None => return Origin::Nowhere,
            },
            _ => return Origin::Nowhere,
        }
    }
    match reg.size {
        Some(size) if name.starts_with(b"/") => Origin::Path {
            path: PathBuf::from(OsStr::from_bytes(name)),
            size,
            build_id: reg.build_id.clone(),
            mtime_ns: reg.rcriu_mtime_ns,
        },
        _ => Origin::Nowhere,
    }
}

/// Where the contents of a file should be.
#[derive(Debug)]
enum Origin {
    /// In the file at this path, if it is still the one that was dumped.
    Path { path: PathBuf, size: u64, build_id: Vec<u32>, mtime_ns: Option<i64> },
    /// In the ghost image with this number.
    Ghost(Store, u32),
    /// At no known place.
    Nowhere,
}

/// A range of a mapped file that is contiguous in another file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileExtent {
    /// The offset of the first byte in the mapped file.
    pub(super) start: u64,
    /// The offset after the last byte.
    pub(super) end: u64,
    /// The file that holds the range.
    pub(super) file: FileId,
    /// The offset of the first byte there.
    pub(super) at: u64,
}

/// A file that processes map.
#[derive(Debug)]
pub(super) struct MappedFile {
    name: String,
    origin: Origin,
    extents: OnceLock<Option<Vec<FileExtent>>>,
}

impl MappedFile {
    /// Returns the path of the file, as the process has mapped it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Returns where the contents of the file are, in ascending order with holes in between; `None`
    /// if they are not available.
    ///
    /// A file on this machine is examined once, on first use. It counts as the one that was dumped if
    /// it has the recorded size, and the recorded build ID or, without one, the recorded time of the
    /// last write. A restore uses the same rules. A recorded checksum is not verified, since that
    /// would mean reading the whole file.
    pub(super) fn extents(&self, files: &Files) -> Option<&[FileExtent]> {
        self.extents.get_or_init(|| self.find(files)).as_deref()
    }

    fn find(&self, files: &Files) -> Option<Vec<FileExtent>> {
        let found = match &self.origin {
            Origin::Path { path, size, build_id, mtime_ns } => {
                let found = same_file(files, path, *size, build_id, *mtime_ns);
                found.map_err(|error| error.to_string())
            }
            Origin::Ghost(images, id) => {
                ghost(files, images, *id).map_err(|error| error.to_string())
            }
            Origin::Nowhere => Ok(None),
        };
        found.unwrap_or_else(|error| {
            log::debug!("the contents of {} are not available: {error}", self.name);
            None
        })
    }
}

/// Returns the contents of the file at `path`, if it is the one that was recorded.
fn same_file(
    files: &Files,
    path: &Path,
    size: u64,
    build_id: &[u32],
    mtime_ns: Option<i64>,
) -> chain::Result<Option<Vec<FileExtent>>> {
    // Check the type first: opening a device may have side effects.
    if !fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == size) {
        return Ok(None);
    }
    let id = files.enter_path(path);
    let file = files.get(id)?;
    let found = file.stat()?;
    let same = if build_id.is_empty() {
        mtime_ns.is_none_or(|time| time == since_epoch_ns(found.modified))
    } else {
        let id = file.file().map(build_id::read);
        id.is_some_and(|id| id.is_ok_and(|id| build_id::is_same(id.as_deref(), build_id)))
    };
    let same = same && found.len == size;
    Ok(same.then(|| vec![FileExtent { start: 0, end: size, file: id, at: 0 }]))
}

/// Returns a time in nanoseconds since 1970, as images record it.
fn since_epoch_ns(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |ns| -ns),
    }
}

/// Returns the contents of a ghost file from its image.
pub(super) fn ghost(
    files: &Files,
    images: &Store,
    id: u32,
) -> Result<Option<Vec<FileExtent>>, ImageError> {
    let mut reader = images.image(Kind::GhostFile, id.into())?;
    let Some(entry) = reader.next_message::<proto::GhostFileEntry>()? else {
        return Ok(None);
    };
    let id = files.enter(images, &Kind::GhostFile.file_name(id.into()));
    let mut extents: Vec<FileExtent> = Vec::new();
    if entry.chunks() {
        while let Some(chunk) = reader.next_message::<proto::GhostChunkEntry>()? {
            let at = reader.offset();
            reader.skip(chunk.len, "a chunk of the file")?;
            let before = extents.last().map_or(0, |last| last.end);
            match chunk.off.checked_add(chunk.len) {
                Some(end) if chunk.off >= before => {
                    extents.push(FileExtent { start: chunk.off, end, file: id, at });
                }
                _ => return Ok(None), // Overlapping chunks are ambiguous.
            }
        }
    } else {
        let at = reader.offset();
        let len = reader.bytes_left().unwrap_or(0);
        extents.push(FileExtent { start: 0, end: len, file: id, at });
    }
    extents.retain(|extent| extent.start < extent.end);
    Ok(Some(extents))
}
