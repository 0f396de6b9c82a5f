//! Finds data and holes in a file.

use crate::chain::{Content, Result, Run, Source, Whence, seek_file};

/// How many bytes are searched first; later steps grow.
const FIRST_WINDOW_BYTES: u64 = 1 << 20;

/// Returns the first offset at or after `offset` where `content` has data, or a hole. Returns `None`
/// at or after the end, and if no data is left.
///
/// Holes of stored files are holes of the content.
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

/// Returns the first offset in `run` with data, or a hole.
fn seek_run(run: &Run, whence: Whence) -> Result<Option<u64>> {
    match (&run.source, whence) {
        (Source::Zero, Whence::Hole) => Ok(Some(0)),
        // Lost bytes count as data, so that a reader gets their error.
        (Source::Bytes(..) | Source::Lost(_), Whence::Data) => Ok(Some(0)),
        (Source::Zero, Whence::Data) | (Source::Bytes(..) | Source::Lost(_), Whence::Hole) => {
            Ok(None)
        }
        (Source::File(file, start), _) => {
            // Bytes after the end of a truncated file are lost; they are not a hole.
            let end = file.stat()?.len;
            let lost = (start + run.len > end).then(|| end.max(*start));
            let found = seek_file(file, *start, whence)?.filter(|found| *found < end);
            let found = if whence == Whence::Data { found.or(lost) } else { found };
            Ok(found.map(|found| found - start).filter(|skipped| *skipped < run.len))
        }
    }
}
