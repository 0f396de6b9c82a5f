//! Contents that are composed of parts of files.

use std::{fmt, io::IoSliceMut, sync::Arc};

use super::{BackingFile, ChainError, Result};

/// The most buffers that one `preadv(2)` takes (`UIO_MAXIOV`, `linux/uio.h`).
const MAX_BUFFERS: usize = 1024;

/// How many bytes are read at a time: at most one file for each page is open then.
const WINDOW_BYTES: usize = 1 << 20;

/// How many files are read in parallel: a run is added to one of this many newest batches
/// only, so that finding the batch stays cheap.
const OPEN_BATCHES: usize = 16;

/// Where a run's bytes come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A stored file, from this offset on.
    File(Arc<BackingFile>, u64),
    /// Memory, from this offset on.
    Bytes(Arc<[u8]>, u64),
    /// No source: the bytes are zero and take no space.
    Zero,
    /// No source: reading the bytes is this error.
    Lost(Arc<ChainError>),
}

/// Consecutive bytes from one source.
#[derive(Clone, Debug)]
pub struct Run {
    /// The number of bytes, at least 1.
    pub len: u64,
    /// The source.
    pub source: Source,
}

/// The content of a file, composed of runs.
pub trait Content: fmt::Debug + Send + Sync {
    /// Returns the content's length in bytes.
    fn len(&self) -> u64;

    /// Whether the content is empty.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the latest end of a read at `offset`: the end of the content, or an earlier
    /// offset if the bytes from there on can never be read.
    fn read_end(&self, _offset: u64) -> u64 {
        self.len()
    }

    /// Returns how many of the bytes are stored rather than holes.
    fn allocated(&self) -> u64;

    /// Returns the largest number of contiguous parts of stored files in the content, if it
    /// consists only of such parts and holes, all page-aligned in the content and in the
    /// files.
    fn stretches(&self) -> Option<usize> {
        None
    }

    /// Appends the runs of the bytes `[offset, offset + len)` to `runs`, in order and
    /// without gaps. The range is within the content.
    ///
    /// A run may be split at any page, so that `len` bounds the work.
    ///
    /// # Errors
    /// A source that cannot be opened.
    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> Result<()>;
}

/// Reads bytes of `content` from `offset` on into `buffer` and returns how many: fewer than
/// fit into the buffer only if [`Content::read_end`] says so.
///
/// Bytes that are contiguous in a file are read with one system call, even if they are
/// scattered over the buffer: alternating pages of two files take two calls.
///
/// # Errors
/// Errors of [`Content::runs`]; a lost run; a file that cannot be read or is too short.
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

/// Bytes that are contiguous in a file, with their destinations.
struct Batch<'a> {
    file: &'a Arc<BackingFile>,
    start: u64,
    end: u64,
    buffers: Vec<IoSliceMut<'a>>,
}

/// Fills `buffer` with the bytes of `runs`, which have the same total length.
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
