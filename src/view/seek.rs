//! Where a file's data and holes are.

use crate::chain::{Content, Result, Run, Source, Whence, seek_file};

/// Bytes looked at first; what lies further is looked at in growing steps.
const FIRST_WINDOW_BYTES: u64 = 1 << 20;

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
            // What is missing at the end of a file that was cut short is lost,
            // no hole.
            let end = file.stat()?.len;
            let lost = (start + run.len > end).then(|| end.max(*start));
            let found = seek_file(file, *start, whence)?.filter(|found| *found < end);
            let found = if whence == Whence::Data { found.or(lost) } else { found };
            Ok(found.map(|found| found - start).filter(|skipped| *skipped < run.len))
        }
    }
}
