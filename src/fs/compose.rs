//! Composes files of blocks that they share with the images.
//!
//! On a file system that shares blocks (btrfs, XFS), a file that lies in several images can be
//! made of their blocks without copying a byte, with one system call for each contiguous part. The
//! new file has no name, so it disappears with the daemon, however that ends. The kernel reads the
//! file without asking the daemon.

use std::{
    fs::{File, OpenOptions},
    io,
    num::NonZeroUsize,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use log::{debug, warn};
use lru::LruCache;
use nix::{errno::Errno, libc};

use crate::{
    causes::with_sources,
    chain::{BackingFile, ChainError, Content, Run, Source},
    fault::{self, Point},
    sys::{page_cache, reflink},
    units::PAGE_SIZE,
    view::Ino,
};

/// The most contiguous parts that a file is composed of: at 10 to 20 us each, its first
/// open takes half a second.
const MAX_STRETCHES: usize = 32 << 10;

/// The longest file that is composed: even for an image with false lengths, the lookup of its
/// bytes takes at most a tenth of a second.
const MAX_BYTES: u64 = 1 << 40;

/// The most bytes that one call shares, so that a part that reaches beyond its file is found
/// early.
const CALL_BYTES: u64 = 1 << 30;

/// The number of files to remember, composed or not. This also limits the open descriptors; the
/// file system keeps a record of about 100 bytes for each part.
const FILES_KEPT: NonZeroUsize = NonZeroUsize::new(32).expect("not zero");

/// Bytes whose runs are looked up at a time: at most a file for each page is open then.
const WINDOW_BYTES: u64 = 1 << 20;

/// How many pages of a file are sampled to see whether they are in memory.
const SAMPLES: u64 = 64;

/// Errors that mean that files cannot be composed here: a file system that cannot share blocks, or
/// not blocks as small as pages (EINVAL; also from a file that was cut short); no permission to
/// create files, or no space; too many open files.
const EXPECTED: [Errno; 14] = [
    Errno::EOPNOTSUPP,
    Errno::ENOTTY,
    Errno::ENOSYS,
    Errno::EXDEV,
    Errno::EINVAL,
    Errno::EISDIR, // no O_TMPFILE (open(2))
    Errno::ENOENT,
    Errno::EROFS,
    Errno::EACCES,
    Errno::EPERM,
    Errno::ENOSPC,
    Errno::EDQUOT,
    Errno::EMFILE,
    Errno::ENFILE,
];

/// When files are composed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compose {
    /// At the first open; if most of the file is in memory, at the second.
    #[default]
    Auto,
    /// At the first open.
    Always,
    /// Never.
    Never,
}

/// The reason why a file was not composed.
#[derive(Debug, thiserror::Error)]
enum ComposeError {
    #[error("create a file without a name in {path}", path = .path.display())]
    Create { path: PathBuf, source: io::Error },
    #[error(
        "share blocks of {path}: {len:#x} bytes at {offset:#x}",
        path = .path.display()
    )]
    Share { path: PathBuf, offset: u64, len: u64, source: io::Error },
    #[error("set the length of the file")]
    Length { source: io::Error },
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("{len:#x} bytes at {offset:#x} are in no file of this machine, page by page")]
    NotInFiles { offset: u64, len: u64 },
    #[error(transparent)]
    Fault(#[from] fault::Injected),
}

impl ComposeError {
    /// Whether no message is needed: nothing is wrong, or the daemon will report it.
    fn is_expected(&self) -> bool {
        match self {
            Self::Create { source, .. } | Self::Share { source, .. } | Self::Length { source } => {
                let errno = source.raw_os_error().map(Errno::from_raw);
                errno.is_some_and(|errno| EXPECTED.contains(&errno))
            }
            // A read will fail for the same reason, with its own message.
            Self::Chain(_) | Self::NotInFiles { .. } => true,
            Self::Fault(_) => false,
        }
    }
}

/// The state of a file.
#[derive(Debug, Default)]
struct State {
    /// Whether it was opened before.
    opened: bool,
    /// The result of composing it: `None` if not tried yet, `Some(None)` if it is not composed.
    composed: Option<Option<Arc<File>>>,
}

/// Composes files when they are opened, and keeps them for the next time.
#[derive(Debug)]
pub(super) struct Composer {
    when: Compose,
    /// The directory in which the files are made.
    dir: PathBuf,
    /// The kernel has refused to read from such a file.
    refused: AtomicBool,
    files: Mutex<LruCache<Ino, Arc<Mutex<State>>>>,
}

impl Composer {
    /// Composes files in `dir`.
    pub(super) fn new(when: Compose, dir: PathBuf) -> Self {
        Self {
            when,
            dir,
            refused: AtomicBool::new(false),
            files: Mutex::new(LruCache::new(FILES_KEPT)),
        }
    }

    /// Returns a file with the bytes of `content`, which messages call `path`; `None` if
    /// the daemon should answer from the images.
    pub(super) fn file(
        &self,
        ino: Ino,
        content: &dyn Content,
        path: impl FnOnce() -> String,
    ) -> Option<Arc<File>> {
        let stretches = content.stretches()?;
        if self.when == Compose::Never
            || !(1..=MAX_STRETCHES).contains(&stretches)
            || content.len() > MAX_BYTES
            || self.refused.load(Ordering::Relaxed)
        {
            return None;
        }
        let state = {
            let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(files.get_or_insert(ino, Arc::default))
        };
        // Other readers that open the same file wait; all must read it in the same way.
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(composed) = &state.composed {
            return composed.clone();
        }
        let again = std::mem::replace(&mut state.opened, true);
        if self.when == Compose::Auto && !again && is_in_memory(content) {
            debug!("open {}: not composed, since most of it is in memory", path());
            return None;
        }
        let begin = Instant::now();
        let composed = match compose(&self.dir, content) {
            Ok((file, shared)) => {
                let took = begin.elapsed();
                debug!("open {}: composed of {shared} stretches in {took:?}", path());
                Some(Arc::new(file))
            }
            Err(error) => {
                let message = format!("open {}: not composed: {}", path(), with_sources(&error));
                if error.is_expected() {
                    debug!("{message}");
                } else {
                    warn!("{message}");
                }
                None
            }
        };
        state.composed = Some(composed.clone());
        composed
    }

    /// Stops composing files, because the kernel does not read from them.
    pub(super) fn give_up(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }
}

/// Whether more than half of some sampled pages are in memory. Through a composed file, the kernel
/// would read them from disk again, because it does not know that the blocks are the same.
fn is_in_memory(content: &dyn Content) -> bool {
    let pages = content.len() / PAGE_SIZE;
    let samples = pages.min(SAMPLES);
    let (mut stored, mut cached) = (0, 0);
    let mut runs = Vec::new();
    for sample in 0..samples {
        runs.clear();
        let at = pages / samples * sample * PAGE_SIZE;
        if content.runs(at, PAGE_SIZE, &mut runs).is_err() {
            return false;
        }
        let Some(Run { source: Source::File(backing, offset), .. }) = runs.first() else {
            continue;
        };
        let Some(file) = backing.file() else { return false };
        match page_cache::cached_pages(file, *offset, PAGE_SIZE) {
            Ok(pages) => cached += pages,
            Err(errno) => {
                debug!("{}: what is in memory is not known: {errno}", backing.path().display());
                return false;
            }
        }
        stored += 1;
    }
    cached * 2 > stored
}

/// Contiguous bytes of a file, and their offset `to` in the composed file.
#[derive(Debug)]
struct Stretch {
    file: Arc<BackingFile>,
    from: u64,
    to: u64,
    len: u64,
}

/// Makes a file without a name in `dir` whose bytes are those of `content`, and returns it
/// and the number of stretches.
fn compose(dir: &Path, content: &dyn Content) -> Result<(File, usize), ComposeError> {
    let target = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        // O_EXCL prevents giving it a name.
        .custom_flags(libc::O_TMPFILE | libc::O_EXCL)
        .open(dir)
        .map_err(|source| ComposeError::Create { path: dir.to_owned(), source })?;
    let end = content.len();
    let mut pending: Option<Stretch> = None;
    let mut shared = 0;
    let mut runs = Vec::new();
    let mut next = 0;
    while next < end {
        runs.clear();
        content.runs(next, WINDOW_BYTES.min(end - next), &mut runs)?;
        for run in &runs {
            match &run.source {
                Source::Zero => {}
                // The last page of an object counts as a whole page, as in its file.
                Source::File(file, from)
                    if from.is_multiple_of(PAGE_SIZE) && next.is_multiple_of(PAGE_SIZE) =>
                {
                    let len = run.len.next_multiple_of(PAGE_SIZE);
                    if let Some(before) = &mut pending
                        && before.from + before.len == *from
                        && before.to + before.len == next
                        && before.len < CALL_BYTES
                        && Arc::ptr_eq(&before.file, file)
                    {
                        before.len += len;
                    } else {
                        let file = Arc::clone(file);
                        let before = pending.replace(Stretch { file, from: *from, to: next, len });
                        shared += share(before, &target)?;
                    }
                }
                _ => return Err(ComposeError::NotInFiles { offset: next, len: run.len }),
            }
            next += run.len;
        }
    }
    shared += share(pending, &target)?;
    target.set_len(end).map_err(|source| ComposeError::Length { source })?;
    Ok((target, shared))
}

/// Lets `target` share the blocks of a stretch, and returns the number of calls.
fn share(stretch: Option<Stretch>, target: &File) -> Result<usize, ComposeError> {
    let Some(Stretch { file, from, to, len }) = stretch else { return Ok(0) };
    let Some(source) = file.file() else {
        return Err(ComposeError::NotInFiles { offset: to, len });
    };
    reflink::clone_range(source, from, target, to, len).map_err(|source| ComposeError::Share {
        path: file.path().to_owned(),
        offset: from,
        len,
        source,
    })?;
    fault::hit(Point::ComposeHalf)?;
    Ok(1)
}
