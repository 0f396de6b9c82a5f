//! The cache of unpacked archives.
//!
//! The cache holds tar archives, not their members, so that no name in an archive becomes a path.
//! Only its owner can access the directory, because memory is secret. The name of a file
//! identifies its archive and the archive's state, so that a replaced or changed archive is
//! unpacked again. While a process unpacks a file, the file has another name, and a lock beside it
//! (`flock(2)`) for which other processes wait that need the same archive. So a process that is
//! killed leaves no file that others consider complete, and no lock. Each process that reads an
//! unpacked file holds a shared lock on it. To make room, a process removes unlocked files, the
//! least recently used first.

use std::{
    env,
    fs::{self, DirBuilder, File},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
    unistd::geteuid,
};

use super::{ArchiveError, compressed::invalid, members};
use crate::{
    image::{regular, store::Stat},
    units::BLOCK_BYTES,
};

/// The largest size of all unpacked archives, unless the user sets another.
const LIMIT_BYTES: u64 = 32 << 30;

/// The cache of root, which may have no home directory.
const SYSTEM_DIRECTORY: &str = "/var/cache";

const NAME: &str = "imgfs";

/// Permissions of the directory.
const DIRECTORY_MODE: u32 = 0o700;

/// Permission bits of other users, which the directory must not have.
const OTHERS: u32 = 0o077;

/// Permissions of the files.
const FILE_MODE: u32 = 0o600;

/// Extensions of unpacked archives, of incomplete ones, and of the lock of the process that
/// unpacks.
const WHOLE: &str = "tar";
const UNFINISHED: &str = "part";
const TURN: &str = "lock";

/// Bytes unpacked at a time.
const STEP_BYTES: usize = 1 << 18;

/// The smallest run of zeros that becomes a hole: a block of most file systems.
const HOLE_BYTES: usize = 4096;

/// The place of unpacked archives, and its limit.
#[derive(Clone, Debug)]
pub struct Cache {
    /// The directory, if not the user's usual one.
    pub directory: Option<PathBuf>,
    /// The largest size of all unpacked archives.
    pub limit: u64,
}

impl Default for Cache {
    fn default() -> Self {
        Self { directory: None, limit: LIMIT_BYTES }
    }
}

/// Returns the name of the archive that is stored in a file, or in a part of it.
pub(super) fn key(stat: &Stat, part: Option<(u64, u64)>) -> String {
    let time = |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    let (device, inode) = stat.identity;
    let (modified, changed) = (time(stat.modified), time(stat.changed));
    let (offset, len) = part.unwrap_or((0, stat.len));
    format!("{device:x}-{inode:x}-{:x}-{modified:x}-{changed:x}-{offset:x}-{len:x}", stat.len)
}

/// A file that stays in the cache until this is dropped.
pub(super) type Held = Flock<File>;

impl Cache {
    /// Returns the unpacked archive called `key`; unpacks it with `decoder` if necessary.
    ///
    /// # Errors
    /// A directory that other users can access; an archive that is damaged, or larger than the
    /// limit; a failed write.
    pub(super) fn unpacked(
        &self,
        key: &str,
        decoder: impl Fn() -> io::Result<Box<dyn Read>>,
        progress: &mut dyn FnMut(),
    ) -> io::Result<Held> {
        let dir = self.open_directory()?;
        let whole = dir.join(key).with_extension(WHOLE);
        let part = dir.join(key).with_extension(UNFINISHED);
        let turn_path = dir.join(key).with_extension(TURN);
        loop {
            match regular::open(&whole) {
                Ok((file, _)) => {
                    let held = lock(file, FlockArg::LockShared)?;
                    if is_there(&held) {
                        // The time of the last use: access times may be off.
                        let _ = held.set_modified(SystemTime::now());
                        return Ok(held);
                    }
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(at(&whole, error)),
            }
            let turn = lock(open_file(&turn_path)?, FlockArg::LockExclusive)?;
            if !is_there(&turn) || whole.exists() {
                // The process that we waited for has finished.
                continue;
            }
            let unpacked = open_file(&part).and_then(|file| {
                let file = lock(file, FlockArg::LockExclusive)?;
                let others = others(&dir, &file)?;
                self.unpack(others, &file, decoder()?, progress)?;
                file.sync_all()?;
                fs::rename(&part, &whole)?;
                File::open(&dir)?.sync_all()
            });
            if unpacked.is_err() {
                let _ = fs::remove_file(&part);
            }
            let _ = fs::remove_file(&turn_path);
            drop(turn);
            unpacked?;
        }
    }

    fn open_directory(&self) -> io::Result<PathBuf> {
        let dir = match &self.directory {
            Some(dir) => dir.clone(),
            None => usual_directory()?,
        };
        let made = DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(&dir);
        made.map_err(|error| at(&dir, error))?;
        let found = fs::symlink_metadata(&dir).map_err(|error| at(&dir, error))?;
        let mine = found.uid() == geteuid().as_raw() && found.mode() & OTHERS == 0;
        if found.is_dir() && mine {
            return Ok(dir);
        }
        let problem = format!(
            "the cache {} is not a directory of this user alone (mode 0700)\nhelp: name another \
             one with --cache-dir",
            dir.display()
        );
        Err(io::Error::new(io::ErrorKind::PermissionDenied, problem))
    }

    /// Unpacks an archive into a file without a name, for a program that reads with the rights of
    /// another user, who must not have access to this user's cache.
    ///
    /// # Errors
    /// An archive that is damaged, or larger than the limit; a failed write.
    pub(super) fn unnamed(&self, decoder: Box<dyn Read>) -> io::Result<Held> {
        let dir = env::temp_dir();
        let mut options = File::options();
        options.read(true).write(true).mode(FILE_MODE).custom_flags(OFlag::O_TMPFILE.bits());
        let file = options.open(&dir).map_err(|error| at(&dir, error))?;
        self.unpack(Vec::new(), &file, decoder, &mut || ())?;
        lock(file, FlockArg::LockShared)
    }

    /// Unpacks an archive into `file`. To make room, removes other files of the cache, the last
    /// ones first.
    fn unpack(
        &self,
        mut others: Vec<Other>,
        file: &File,
        mut decoder: Box<dyn Read>,
        progress: &mut dyn FnMut(),
    ) -> io::Result<()> {
        file.set_len(0)?;
        let mut used: u64 = others.iter().map(|other| other.allocated).sum();
        let mut buffer = vec![0; STEP_BYTES];
        let mut len = 0;
        loop {
            let read = fill(&mut *decoder, &mut buffer).map_err(|error| {
                invalid(format!("unpack the archive at offset {len:#x}: {error}"))
            })?;
            if len == 0 && !members::may_begin(&buffer[..read]) {
                return Err(
                    ArchiveError::Format { found: "a compressed file, and no archive" }.into()
                );
            }
            while used + len + read as u64 > self.limit {
                let Some(oldest) = others.pop() else {
                    return Err(ArchiveError::TooLarge { limit: self.limit }.into());
                };
                if oldest.remove() {
                    used -= oldest.allocated;
                }
            }
            let mut at = len;
            for piece in buffer[..read].chunks(HOLE_BYTES) {
                if piece.iter().any(|byte| *byte != 0) {
                    file.write_all_at(piece, at)?;
                }
                at += piece.len() as u64;
            }
            len = at;
            progress();
            if read < buffer.len() {
                return file.set_len(len);
            }
        }
    }
}

/// Returns the user's cache directory, according to the XDG Base Directory Specification.
fn usual_directory() -> io::Result<PathBuf> {
    let absolute =
        |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(dir) = absolute("XDG_CACHE_HOME") {
        return Ok(dir.join(NAME));
    }
    if geteuid().is_root() {
        return Ok(Path::new(SYSTEM_DIRECTORY).join(NAME));
    }
    let home = absolute("HOME").map(|home| home.join(".cache").join(NAME));
    home.ok_or_else(|| {
        let problem = "no place to unpack the archive: HOME is not set\nhelp: name a directory \
                       with --cache-dir";
        io::Error::new(io::ErrorKind::NotFound, problem)
    })
}

/// Another file of the cache.
struct Other {
    path: PathBuf,
    allocated: u64,
    used: SystemTime,
}

impl Other {
    /// Removes it unless it is in use.
    fn remove(&self) -> bool {
        let Ok((file, _)) = regular::open(&self.path) else { return false };
        Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok()
            && fs::remove_file(&self.path).is_ok()
    }
}

/// Returns the other files of the cache, the least recently used last.
fn others(dir: &Path, this: &File) -> io::Result<Vec<Other>> {
    let this = this.metadata()?.ino();
    let mut others = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let found = entry.metadata()?;
        let path = entry.path();
        let ours = path.extension().is_some_and(|end| end == WHOLE || end == UNFINISHED);
        if ours && found.is_file() && found.ino() != this {
            let allocated = found.blocks() * BLOCK_BYTES;
            others.push(Other { path, allocated, used: found.modified()? });
        }
    }
    others.sort_by_key(|other| std::cmp::Reverse(other.used));
    Ok(others)
}

fn open_file(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(FILE_MODE);
    let opened = options.custom_flags(OFlag::O_NOFOLLOW.bits()).open(path);
    opened.map_err(|error| at(path, error))
}

fn lock(file: File, how: FlockArg) -> io::Result<Held> {
    let mut file = file;
    loop {
        match Flock::lock(file, how) {
            Ok(held) => return Ok(held),
            Err((back, Errno::EINTR)) => file = back,
            Err((_, errno)) => {
                let error = io::Error::from(errno);
                return Err(io::Error::new(error.kind(), format!("lock the cache: {error}")));
            }
        }
    }
}

/// Whether an open file still has a name.
fn is_there(file: &File) -> bool {
    file.metadata().is_ok_and(|found| found.nlink() > 0)
}

/// Fills `buffer`, and returns the number of bytes: fewer only at the end.
fn fill(decoder: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match decoder.read(&mut buffer[done..]) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn at(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
