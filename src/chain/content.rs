//! Content that is composed of stretches of files.

use std::{fmt, io::IoSliceMut, sync::Arc};

use super::{BackingFile, ChainError, Result};

/// The most buffers that one `preadv(2)` takes (`UIO_MAXIOV`, `linux/uio.h`).
const MAX_BUFFERS: usize = 1024;

/// Bytes that are read in one go: at most a file for each page is open then.
const WINDOW_BYTES: usize = 1 << 20;

/// How many files are read side by side: a run is joined to a batch only among
/// this many of the newest, so that looking for one stays cheap.
const OPEN_BATCHES: usize = 16;

/// Where a run's bytes come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A file that is stored somewhere, from this offset on.
    File(Arc<BackingFile>, u64),
    /// Memory, from this offset on.
    Bytes(Arc<[u8]>, u64),
    /// Nowhere: the bytes are zero and take no space.
    Zero,
    /// Nowhere: reading them is this error.
    Lost(Arc<ChainError>),
}

/// A stretch of bytes from one source.
#[derive(Clone, Debug)]
pub struct Run {
    /// Bytes in the run, at least 1.
    pub len: u64,
    /// Where they come from.
    pub source: Source,
}

/// The content of a file, composed of runs.
pub trait Content: fmt::Debug + Send + Sync {
    /// Returns the content's length in bytes.
    fn len(&self) -> u64;

    /// Whether the content has no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns where a read that begins at `offset` ends at the latest: at the content's
    /// end, or before that if the bytes there cannot be read at all.
    fn read_end(&self, _offset: u64) -> u64 {
        self.len()
    }

    /// Returns how many of the bytes are stored rather than holes.
    fn allocated(&self) -> u64;

    /// Returns in how many stretches of stored files the content lies at most, if it has
    /// nothing but these and holes, each at the beginning of a page here and there.
    fn stretches(&self) -> Option<usize> {
        None
    }

    /// Appends the runs that make up the bytes `[offset, offset + len)` to
    /// `runs`, in order and without gaps. The range lies within the content.
    ///
    /// A run may be split at any page, so that `len` bounds the work.
    ///
    /// # Errors
    /// Whatever keeps a source from being opened.
    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> Result<()>;
}

/// Reads bytes of `content` from `offset` on into `buffer` and returns how many:
/// fewer than the buffer holds only where [`Content::read_end`] says so.
///
/// Stretches that lie in a row in one file are read by one system call, however
/// they are scattered over the buffer: alternating pages of two files cost two.
///
/// # Errors
/// What [`Content::runs`] returns, a run that is lost, and files that cannot be
/// read or are too short.
pub fn read_at(content: &dyn Content, offset: u64, buffer: &mut [u8]) -> Result<usize> {
    let rest = content.read_end(offset).saturating_sub(offset);
    let wanted = usize::try_from(rest).unwrap_or(usize::MAX).min(buffer.len());
    if wanted == 0 {
        return Ok(0);
    }
    let mut runs = Vec::new();
    let mut next = offset;
    for window in buffer[..wanted].chunks_mut(WINDOW_BYTES) {
        runs.clear();
        content.runs(next, window.len() as u64, &mut runs)?;
        read_runs(&runs, window)?;
        next += window.len() as u64;
    }
    Ok(wanted)
}

/// Bytes that lie in a row in one file, wherever they go.
struct Batch<'a> {
    file: &'a Arc<BackingFile>,
    start: u64,
    end: u64,
    buffers: Vec<IoSliceMut<'a>>,
}

/// Fills `buffer` with the bytes of `runs`, which together are as long.
pub(crate) fn read_runs(runs: &[Run], buffer: &mut [u8]) -> Result<()> {
    let mut batches: Vec<Batch> = Vec::new();
    let mut rest = buffer;
    for run in runs {
        let len = usize::try_from(run.len).expect("runs are no longer than the buffer");
        let target;
        (target, rest) = rest.split_at_mut(len);
        match &run.source {
            Source::Zero => target.fill(0),
            Source::Bytes(bytes, offset) => {
                let offset = usize::try_from(*offset).expect("memory is addressable");
                target.copy_from_slice(&bytes[offset..offset + len]);
            }
            Source::Lost(error) => return Err(ChainError::Lost(Arc::clone(error))),
            Source::File(file, offset) => {
                let joined = batches.iter_mut().rev().take(OPEN_BATCHES).find(|batch| {
                    batch.end == *offset
                        && Arc::ptr_eq(batch.file, file)
                        && batch.buffers.len() < MAX_BUFFERS
                });
                let end = offset + run.len;
                let buffer = IoSliceMut::new(target);
                if let Some(batch) = joined {
                    batch.end = end;
                    batch.buffers.push(buffer);
                } else {
                    batches.push(Batch { file, start: *offset, end, buffers: vec![buffer] });
                }
            }
        }
    }
    debug_assert!(rest.is_empty(), "runs cover the buffer");
    for mut batch in batches {
        batch.file.read_exact_at(&mut batch.buffers, batch.start)?;
    }
    Ok(())
}
