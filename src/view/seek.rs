//! Where a file's data and holes are.

use nix::{
    errno::Errno,
    unistd::{Whence as FileWhence, lseek},
};

use crate::chain::{BackingFile, ChainError, Content, Result, Run, Source};

/// Bytes looked at first; what lies further is looked at in growing steps.
const FIRST_WINDOW_BYTES: u64 = 1 << 20;

/// What is sought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// The next byte that is stored.
    Data,
    /// The next byte that is not; the end of the file counts as one.
    Hole,
}

/// Returns the first offset at or after `offset` at which `content` has what is
/// sought; `None` beyond the end, and for data when none is left.
///
/// Holes of the backing files are holes of the content.
///
/// # Errors
/// What [`Content::runs`] returns.
pub fn seek(content: &dyn Content, offset: u64, whence: Whence) -> Result<Option<u64>> {
    let end = content.len();
    if offset >= end {
        return Ok(None);
    }
    let mut runs = Vec::new();
    let mut next = offset;
    let mut window = FIRST_WINDOW_BYTES;
    while next < end {
        runs.clear();
        content.runs(next, window.min(end - next), &mut runs)?;
        for run in &runs {
            if let Some(found) = seek_run(run, whence)? {
                return Ok(Some(next + found));
            }
            next += run.len;
        }
        window = window.saturating_mul(2);
    }
    Ok((whence == Whence::Hole).then_some(end))
}

/// Returns the first offset in `run` that has what is sought.
fn seek_run(run: &Run, whence: Whence) -> Result<Option<u64>> {
    match (&run.source, whence) {
        (Source::Zero, Whence::Hole) => Ok(Some(0)),
        // Lost bytes count as data: a reader must meet their error.
        (Source::Bytes(..) | Source::Lost(_), Whence::Data) => Ok(Some(0)),
        (Source::Zero, Whence::Data) | (Source::Bytes(..) | Source::Lost(_), Whence::Hole) => {
            Ok(None)
        }
        (Source::File(file, start), _) => {
            let found = seek_file(file, *start, whence)?;
            Ok(found.map(|found| found - start).filter(|skipped| *skipped < run.len))
        }
    }
}

/// Asks the file system; one that does not know about holes has none.
fn seek_file(file: &BackingFile, offset: u64, whence: Whence) -> Result<Option<u64>> {
    let failed =
        |source| ChainError::Read { path: file.path().to_owned(), offset, length: 0, source };
    let from =
        i64::try_from(offset).map_err(|_| failed(std::io::ErrorKind::InvalidInput.into()))?;
    let file_whence = match whence {
        Whence::Data => FileWhence::SeekData,
        Whence::Hole => FileWhence::SeekHole,
    };
    match lseek(file.file(), from, file_whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        // No data up to the end; or the file has shrunk, which reading tells.
        Err(Errno::ENXIO) => Ok((whence == Whence::Hole).then_some(offset)),
        Err(Errno::EINVAL) => Ok((whence == Whence::Data).then_some(offset)),
        Err(errno) => Err(failed(errno.into())),
    }
}
