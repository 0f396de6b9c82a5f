//! A part of a stored file, as a stored file.

use std::{
    fs::File,
    io::{self, IoSliceMut, Read},
    sync::Arc,
};

use crate::image::store::{Input, Stat, StoredFile, Whence};

/// A file that contains others.
pub(super) type Base = Arc<dyn StoredFile>;

/// A contiguous run of a member's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// The offset in the member.
    pub(super) start: u64,
    pub(super) len: u64,
    /// The offset in the archive.
    pub(super) offset: u64,
}

impl Extent {
    pub(super) fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// The place of a member's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// Contiguous.
    Dense { offset: u64, len: u64 },
    /// Extents in order, with holes between them.
    Sparse { len: u64, extents: Arc<[Extent]> },
}

impl Body {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Dense { len, .. } | Self::Sparse { len, .. } => *len,
        }
    }

    pub(super) fn allocated(&self) -> u64 {
        match self {
            Self::Dense { len, .. } => *len,
            Self::Sparse { extents, .. } => extents.iter().map(|extent| extent.len).sum(),
        }
    }

    /// Returns the extent that holds the byte at `at`, or the first one behind it.
    fn extent(&self, at: u64) -> Option<Extent> {
        match self {
            Self::Dense { offset, len } => {
                (at < *len).then_some(Extent { start: 0, len: *len, offset: *offset })
            }
            Self::Sparse { extents, .. } => {
                let position = extents.partition_point(|extent| extent.end() <= at);
                extents.get(position).copied()
            }
        }
    }
}

/// A member of an archive.
#[derive(Clone, Debug)]
pub(super) struct Slice {
    base: Base,
    body: Body,
    stat: Stat,
}

impl Slice {
    pub(super) fn new(base: Base, body: Body, stat: Stat) -> Self {
        Self { base, body, stat }
    }

    /// Returns a reader from the first byte.
    pub(super) fn input(self) -> Input {
        let Stat { len, allocated, .. } = self.stat;
        Input { bytes: Box::new(Sequential::new(Arc::new(self))), len, allocated }
    }
}

impl StoredFile for Slice {
    fn stat(&self) -> io::Result<Stat> {
        Ok(self.stat)
    }

    fn read_vectored_at(&self, buffers: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        let len = self.body.len();
        if offset >= len {
            return Ok(0);
        }
        match self.body.extent(offset) {
            Some(extent) if extent.start <= offset => {
                let inside = offset - extent.start;
                let mut limited = first_bytes(buffers, extent.len - inside);
                self.base.read_vectored_at(&mut limited, extent.offset + inside)
            }
            next => {
                let hole_end = next.map_or(len, |extent| extent.start);
                let mut zeroed = 0;
                for buffer in &mut first_bytes(buffers, hole_end - offset) {
                    buffer.fill(0);
                    zeroed += buffer.len();
                }
                Ok(zeroed)
            }
        }
    }

    fn seek(&self, offset: u64, whence: Whence) -> io::Result<Option<u64>> {
        let len = self.body.len();
        if offset >= len {
            return Ok((whence == Whence::Hole).then_some(offset));
        }
        let mut at = offset;
        if whence == Whence::Data {
            return Ok(self.body.extent(at).map(|extent| at.max(extent.start)));
        }
        while let Some(extent) = self.body.extent(at).filter(|extent| extent.start <= at) {
            at = extent.end();
        }
        Ok(Some(at.min(len)))
    }

    fn file(&self) -> Option<&File> {
        None
    }

    fn within(&self) -> Option<(&File, u64)> {
        let Body::Dense { offset, .. } = &self.body else { return None };
        let (file, start) = self.base.within()?;
        Some((file, start.checked_add(*offset)?))
    }
}

/// Returns the buffers up to their first `limit` bytes.
fn first_bytes<'a>(buffers: &'a mut [IoSliceMut<'_>], limit: u64) -> Vec<IoSliceMut<'a>> {
    let mut rest = usize::try_from(limit).unwrap_or(usize::MAX);
    let mut limited = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        if rest == 0 {
            break;
        }
        let len = buffer.len().min(rest);
        limited.push(IoSliceMut::new(&mut buffer[..len]));
        rest -= len;
    }
    limited
}

/// Reads a stored file from its first byte.
#[derive(Debug)]
pub(super) struct Sequential {
    file: Base,
    at: u64,
}

impl Sequential {
    pub(super) fn new(file: Base) -> Self {
        Self { file, at: 0 }
    }
}

impl Read for Sequential {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_vectored_at(&mut [IoSliceMut::new(buffer)], self.at)?;
        self.at += read as u64;
        Ok(read)
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let read = self.file.read_vectored_at(buffers, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// Fills `buffer` from the bytes at `offset`, and returns their number: less than the length of
/// the buffer only at the end of the file.
pub(super) fn read_full(
    file: &dyn StoredFile,
    buffer: &mut [u8],
    offset: u64,
) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = IoSliceMut::new(&mut buffer[done..]);
        match file.read_vectored_at(&mut [rest], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
