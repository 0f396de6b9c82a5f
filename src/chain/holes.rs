//! Where files have holes.

use std::ops::Range;

use nix::{
    errno::Errno,
    unistd::{Whence as FileWhence, lseek},
};

use super::{BackingFile, ChainError, Result};

/// What is sought in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// The next byte that is stored.
    Data,
    /// The next byte that is not; the end of a file counts as one.
    Hole,
}

/// Returns the first offset at or after `offset` at which `file` has what is
/// sought; `None` if there is none up to the file's end.
///
/// A file system that does not know about holes has none.
///
/// # Errors
/// [`ChainError::Read`].
pub(crate) fn seek_file(file: &BackingFile, offset: u64, whence: Whence) -> Result<Option<u64>> {
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
        // There is no data up to the end, or the file has shrunk, which a read detects.
        Err(Errno::ENXIO) => Ok((whence == Whence::Hole).then_some(offset)),
        Err(Errno::EINVAL) => Ok((whence == Whence::Data).then_some(offset)),
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Returns the holes of `file` in the bytes `[start, end)`; what lies beyond the
/// file's end is none.
///
/// # Errors
/// [`ChainError::Read`].
pub(crate) fn in_file(file: &BackingFile, start: u64, end: u64) -> Result<Vec<Range<u64>>> {
    let end = end.min(file.metadata()?.len());
    let mut holes = Vec::new();
    let mut next = start;
    while next < end {
        let Some(hole) = seek_file(file, next, Whence::Hole)?.filter(|hole| *hole < end) else {
            break;
        };
        next = seek_file(file, hole, Whence::Data)?.unwrap_or(end).min(end);
        holes.push(hole..next);
    }
    Ok(holes)
}
