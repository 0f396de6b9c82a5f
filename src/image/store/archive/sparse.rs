//! The maps of sparse members.

use tar::GnuSparseHeader;

use super::{
    ArchiveError,
    error::Result,
    members::{BLOCK, Entry, bytes_at},
    slice::{Body, Extent},
};

/// The longest map of a sparse member in its data (GNU sparse format 1.0).
const MAP_BYTES: u64 = 64 << 20;

/// The map of a sparse member while it is read.
pub(super) struct Map {
    len: u64,
    stored: u64,
    extents: Vec<(u64, u64)>,
    end: u64,
    sum: u64,
}

impl Map {
    pub(super) fn new(len: u64, stored: u64) -> Self {
        Self { len, stored, extents: Vec::new(), end: 0, sum: 0 }
    }

    pub(super) fn take(&mut self, headers: &[GnuSparseHeader], name: &str) -> Result<()> {
        for header in headers.iter().take_while(|header| !header.is_empty()) {
            let bad = |problem| ArchiveError::Sparse { member: name.to_owned(), problem };
            let start = header.offset().map_err(|_| bad("an offset is no number"))?;
            let len = header.length().map_err(|_| bad("a length is no number"))?;
            self.push(start, len, name)?;
        }
        Ok(())
    }

    pub(super) fn push(&mut self, start: u64, len: u64, name: &str) -> Result<()> {
        let bad = |problem| ArchiveError::Sparse { member: name.to_owned(), problem };
        let end = start.checked_add(len).filter(|end| *end <= self.len);
        let end = end.ok_or_else(|| bad("data lies behind its end"))?;
        if start < self.end {
            return Err(bad("its data is not in order"));
        }
        self.end = end;
        // Both are bounded by the member's length.
        self.sum += len;
        if len > 0 {
            self.extents.push((start, len));
        }
        Ok(())
    }

    pub(super) fn body(self, mut offset: u64, name: &str) -> Result<Body> {
        let bad = |problem| ArchiveError::Sparse { member: name.to_owned(), problem };
        if i64::try_from(self.len).is_err() {
            return Err(bad("it is longer than files can be"));
        }
        if self.sum != self.stored {
            return Err(bad("its map names more or fewer bytes than are stored"));
        }
        let extent = |(start, len)| {
            let extent = Extent { start, len, offset };
            offset += len;
            extent
        };
        Ok(Body::Sparse { len: self.len, extents: self.extents.into_iter().map(extent).collect() })
    }
}

/// Decimal numbers, each on a line of its own, at the beginning of a member.
pub(super) struct Numbers<'a> {
    entry: &'a Entry<'a>,
    pub(super) at: u64,
    block: Vec<u8>,
}

impl<'a> Numbers<'a> {
    pub(super) fn new(entry: &'a Entry<'a>) -> Self {
        Self { entry, at: 0, block: Vec::new() }
    }

    pub(super) fn next(&mut self) -> Result<u64, &'static str> {
        let mut number: Option<u64> = None;
        loop {
            match self.byte()? {
                b'\n' => return number.ok_or("its map is no list of numbers"),
                digit @ b'0'..=b'9' => {
                    let value = number.unwrap_or(0).checked_mul(10);
                    let value = value.and_then(|value| value.checked_add(u64::from(digit - b'0')));
                    number = Some(value.ok_or("a number in its map is too large")?);
                }
                _ => return Err("its map is no list of numbers"),
            }
        }
    }

    fn byte(&mut self) -> Result<u8, &'static str> {
        let inside = usize::try_from(self.at % BLOCK).expect("below a block");
        if inside == 0 {
            if self.at >= MAP_BYTES.min(self.entry.size) {
                return Err("its map has no end");
            }
            let offset = self.entry.data + self.at;
            let block = bytes_at(self.entry.archive, offset, BLOCK, self.entry.end);
            self.block = block.map_err(|_| "its map cannot be read")?;
        }
        self.at += 1;
        Ok(self.block[inside])
    }
}
