//! Archives that are compressed as a whole.

use std::{
    io::{self, BufRead, BufReader, Read},
    sync::Arc,
};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::{
    ArchiveError,
    error::Result,
    members::{self, BLOCK_BYTES},
    slice::{Base, Sequential, read_full},
};
use crate::image::store::StoredFile;

/// The magic of zstd frames (RFC 8878, 3.1.1), as a little-endian number.
const ZSTD_MAGIC: u32 = 0xfd2f_b528;

/// The magic of skippable frames (RFC 8878, 3.1.2), without the lowest four bits.
const SKIPPABLE_MAGIC: u32 = 0x184d_2a50;
const SKIPPABLE_BITS: u32 = 0xf;

/// The magic of gzip files (RFC 1952, 2.3.1).
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];

/// Formats that a user may mistake for a tar archive, with their magic.
const OTHERS: [(&[u8], &str); 5] = [
    (b"\xfd7zXZ\0", "compressed with xz"),
    (b"BZh", "compressed with bzip2"),
    (b"\x04\x22\x4d\x18", "compressed with lz4"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x7fELF", "a program"),
];

/// Bytes read at a time.
const BUFFER_BYTES: usize = 1 << 18;

/// The compression of an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Tar,
    Gzip,
    Zstd,
}

impl Format {
    /// Recognizes the compression by the first bytes of a file.
    ///
    /// # Errors
    /// [`ArchiveError::Format`], [`ArchiveError::Read`].
    pub(super) fn of(file: &dyn StoredFile) -> Result<Self> {
        let mut head = [0; BLOCK_BYTES];
        let read = read_full(file, &mut head, 0);
        let read = read.map_err(|source| ArchiveError::Read { offset: 0, source })?;
        let head = &head[..read];
        if head.is_empty() {
            return Err(ArchiveError::Format { found: "empty" });
        }
        if members::may_begin(head) {
            return Ok(Self::Tar);
        }
        if head.starts_with(GZIP_MAGIC) {
            return Ok(Self::Gzip);
        }
        if let Some(magic) = head.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
            && (magic == ZSTD_MAGIC || is_skippable(magic))
        {
            return Ok(Self::Zstd);
        }
        let other = OTHERS.iter().find(|(magic, _)| head.starts_with(magic));
        Err(ArchiveError::Format { found: other.map_or("of another kind", |(_, name)| name) })
    }

    /// Returns a reader of the archive that `file` stores.
    pub(super) fn decoder(self, file: Base) -> Box<dyn Read> {
        let source = BufReader::with_capacity(BUFFER_BYTES, Sequential::new(file));
        match self {
            Self::Tar => Box::new(source),
            Self::Gzip => Box::new(MultiGzDecoder::new(source)),
            Self::Zstd => Box::new(Frames::new(source)),
        }
    }
}

fn is_skippable(magic: u32) -> bool {
    magic & !SKIPPABLE_BITS == SKIPPABLE_MAGIC
}

/// Reads the contents of consecutive zstd frames.
pub(super) struct Frames<R> {
    source: R,
    decoder: FrameDecoder,
    /// Whether the decoder is inside a frame.
    inside: bool,
}

impl<R: BufRead> Frames<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, decoder: FrameDecoder::new(), inside: false }
    }

    /// Starts the next frame; false at the end.
    fn begin(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            let mut magic = [0; 4];
            self.source.read_exact(&mut magic)?;
            if is_skippable(u32::from_le_bytes(magic)) {
                let mut len = [0; 4];
                self.source.read_exact(&mut len)?;
                let len = u64::from(u32::from_le_bytes(len));
                if io::copy(&mut self.source.by_ref().take(len), &mut io::sink())? < len {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                continue;
            }
            let head = (&magic[..]).chain(&mut self.source);
            self.decoder.reset(head).map_err(invalid)?;
            return Ok(true);
        }
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.inside {
                if !self.begin()? {
                    return Ok(0);
                }
                self.inside = true;
            }
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let step = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.source, step).map_err(invalid)?;
            }
            let read = self.decoder.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            self.inside = false;
            let expected = self.decoder.get_checksum_from_data();
            if expected.is_some() && expected != self.decoder.get_calculated_checksum() {
                return Err(invalid("the checksum of a zstd frame is wrong"));
            }
        }
    }
}

pub(super) fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// A stored file that counts the bytes read from it.
#[derive(Debug)]
pub(super) struct Counted {
    file: Base,
    read: std::sync::atomic::AtomicU64,
}

impl Counted {
    pub(super) fn new(file: Base) -> Arc<Self> {
        Arc::new(Self { file, read: 0.into() })
    }

    pub(super) fn count(&self) -> u64 {
        self.read.load(std::sync::atomic::Ordering::Relaxed)
    }
}

impl StoredFile for Counted {
    fn stat(&self) -> io::Result<crate::image::store::Stat> {
        self.file.stat()
    }

    fn read_vectored_at(
        &self,
        buffers: &mut [io::IoSliceMut<'_>],
        offset: u64,
    ) -> io::Result<usize> {
        let read = self.file.read_vectored_at(buffers, offset)?;
        self.read.store(offset + read as u64, std::sync::atomic::Ordering::Relaxed);
        Ok(read)
    }

    fn file(&self) -> Option<&std::fs::File> {
        None
    }
}
