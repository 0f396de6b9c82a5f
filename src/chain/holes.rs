//! Where files have holes.

use std::ops::Range;

use super::{BackingFile, ChainError, Result};
pub use crate::image::store::Whence;

/// Returns the first offset at or after `offset` at which `file` has what is
/// sought; `None` if there is none up to the file's end.
///
/// A file system that does not know about holes has none.
///
/// # Errors
/// [`ChainError::Read`].
pub(crate) fn seek_file(file: &BackingFile, offset: u64, whence: Whence) -> Result<Option<u64>> {
    file.stored().seek(offset, whence).map_err(|source| ChainError::Read {
        path: file.path().to_owned(),
        offset,
        length: 0,
        source,
    })
}

/// Returns the holes of `file` in the bytes `[start, end)`; what lies beyond the
/// file's end is none.
///
/// # Errors
/// [`ChainError::Read`].
pub(crate) fn in_file(file: &BackingFile, start: u64, end: u64) -> Result<Vec<Range<u64>>> {
    let end = end.min(file.stat()?.len);
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
