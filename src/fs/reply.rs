//! Answering large reads without a copy in the daemon.

use std::{
    mem,
    ops::RangeInclusive,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use fuser::{ReplyData, RequestId};
use log::{debug, error};
use nix::errno::Errno;

use super::buffer;
use crate::{
    chain::{BackingFile, Content, Run, Source},
    sys::gather::{MAX_PIECES, Piece, write_gathered},
};

/// The sizes of reads that are answered from mappings. Smaller reads are cheaper to copy;
/// larger ones may need more files than may be open.
pub(super) const SIZES: RangeInclusive<usize> = 64 << 10..=1 << 20;

/// With more files than this in one read, checking their lengths costs more than copying.
const MAX_FILES: usize = 32;

/// Bytes in the header of an answer (`struct fuse_out_header`, `linux/fuse.h`).
const HEADER_BYTES: usize = 16;

/// Answers to reads. The kernel copies the bytes from mappings of the backing files to the reader,
/// piece by piece.
///
/// `fuser` accepts an answer only as one buffer, so these answers bypass it.
#[derive(Debug)]
pub(super) struct MappedReply {
    device: OwnedFd,
}

impl MappedReply {
    /// Answers through `device`, which must be the open file from which the requests are
    /// read.
    pub(super) fn new(device: OwnedFd) -> Self {
        Self { device }
    }

    /// Answers a read of `size` bytes of `content` from `offset`; gives the reply back if it
    /// cannot. Returns the number of bytes that the reader got, if any. Messages call the file
    /// `path`.
    pub(super) fn answer(
        &self,
        request: RequestId,
        content: &dyn Content,
        offset: u64,
        size: usize,
        path: impl FnOnce() -> String,
        reply: ReplyData,
    ) -> Result<Option<u64>, ReplyData> {
        let len = content.read_end(offset).saturating_sub(offset).min(size as u64);
        let mut runs = Vec::new();
        if len == 0 || content.runs(offset, len, &mut runs).is_err() || !all_there(&runs) {
            return Err(reply);
        }
        let len = usize::try_from(len).expect("no more than the size");
        let header = header(request, HEADER_BYTES + len);
        let written = buffer::with_zeroes(len, |zeroes| {
            let pieces = pieces(&header, &runs, zeroes)?;
            Some(write_gathered(self.device.as_fd(), &pieces))
        });
        let mut read = None;
        match written {
            Some(Ok(_)) => read = Some(len as u64),
            // The kernel has answered the reader with an input/output error.
            Some(Err(Errno::EFAULT)) => error!(
                "read {}: {len:#x} bytes at {offset:#x}: a page of {} could not be read, or was \
                 cut off in this moment (EIO)",
                path(),
                file_names(&runs)
            ),
            // The reader was killed.
            Some(Err(Errno::ENOENT)) => debug!("no reader waits for request {request:?}"),
            // The kernel did not accept the answer.
            Some(Err(_)) | None => return Err(reply),
        }
        // Dropping it would answer a second time.
        mem::forget(reply);
        Ok(read)
    }
}

/// Returns the paths of the files that the bytes come from.
fn file_names(runs: &[Run]) -> String {
    let mut paths: Vec<String> = Vec::new();
    for run in runs {
        if let Source::File(file, _) = &run.source {
            paths.push(file.path().display().to_string());
        }
    }
    paths.sort_unstable();
    paths.dedup();
    paths.join(" or ")
}

/// Returns the header of a successful answer.
fn header(request: RequestId, len: usize) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    let len = u32::try_from(len).expect("a request is for less than 4 GiB");
    header[..4].copy_from_slice(&len.to_ne_bytes());
    header[8..].copy_from_slice(&request.0.to_ne_bytes());
    header
}

/// Whether every byte is still in its file: behind the end of a file, a mapping reads as zeros up
/// to the end of the page.
fn all_there(runs: &[Run]) -> bool {
    let mut ends: Vec<(&Arc<BackingFile>, u64)> = Vec::new();
    for run in runs {
        let Source::File(file, offset) = &run.source else { continue };
        let end = offset + run.len;
        if let Some((_, last)) = ends.iter_mut().find(|(known, _)| Arc::ptr_eq(known, file)) {
            *last = end.max(*last);
        } else if ends.len() < MAX_FILES {
            ends.push((file, end));
        } else {
            return false;
        }
    }
    ends.iter().all(|(file, end)| file.stat().is_ok_and(|stat| stat.len >= *end))
}

/// Returns the pieces of an answer; `None` if not all of them are in memory.
fn pieces<'a>(header: &'a [u8], runs: &'a [Run], zeroes: &'a [u8]) -> Option<Vec<Piece<'a>>> {
    if runs.len() >= MAX_PIECES {
        return None;
    }
    let mut pieces = Vec::with_capacity(1 + runs.len());
    pieces.push(Piece::Bytes(header));
    for run in runs {
        let len = usize::try_from(run.len).ok()?;
        pieces.push(match &run.source {
            Source::Zero => Piece::Bytes(&zeroes[..len]),
            Source::Lost(_) => return None,
            Source::Bytes(bytes, offset) => {
                Piece::Bytes(bytes.get(usize::try_from(*offset).ok()?..)?.get(..len)?)
            }
            Source::File(file, offset) => {
                let offset = usize::try_from(*offset).ok()?;
                let mapping = file.mapping()?;
                if mapping.len().checked_sub(offset)? < len {
                    return None; // it has grown since it was mapped
                }
                Piece::Mapped { mapping, offset, len }
            }
        });
    }
    Some(pieces)
}
