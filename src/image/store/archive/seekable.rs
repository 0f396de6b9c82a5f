//! Archives in zstd's seekable format, which are read in place.
//!
//! Such a file consists of zstd frames, followed by a table of their sizes in a frame that other
//! decoders skip. All numbers are little endian:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | the magic of a skippable frame, `0x184d2a5e` |
//! | 4 | the length of what follows |
//! | 8 or 12 for each frame | its compressed and its whole length; XXH64 of its bytes if there are checksums |
//! | 4 | the number of frames |
//! | 1 | a descriptor: bit 7 says that there are checksums, bits 2 to 6 are 0 |
//! | 4 | the magic of the table, `0x8f92eab1` |
//!
//! The crates for this format are bindings to libzstd; with one of them, this program would need a
//! C compiler for each machine.

use std::{
    fs::File,
    io::{self, IoSliceMut, Read, Write},
    num::NonZeroUsize,
    sync::{Arc, Mutex, PoisonError},
};

use lru::LruCache;
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian::U32,
};

use super::{
    compressed::{Frames, invalid},
    slice::{Base, read_full},
};
use crate::image::store::{Stat, StoredFile};

const HEAD_MAGIC: u32 = 0x184d_2a5e;
const TABLE_MAGIC: u32 = 0x8f92_eab1;

/// Bits of the descriptor: checksums, and those that are not used.
const CHECKSUMS: u8 = 1 << 7;
const RESERVED: u8 = 0b0111_1100;

/// Bytes of a checksum in the table.
const CHECKSUM_BYTES: usize = 4;

/// The most frames in a file that is read in place: 1 TiB in frames of [`WRITTEN_FRAME_BYTES`].
const FRAMES: u32 = 1 << 22;

/// The longest frame in a file that is read in place: a decoded frame is in memory as a whole.
const FRAME_BYTES: u32 = 8 << 20;

/// The most bytes of frames in memory.
const KEPT_BYTES: u32 = 64 << 20;

/// The length of a frame: to read one page, the whole frame must be decoded.
pub(super) const WRITTEN_FRAME_BYTES: usize = 256 << 10;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    magic: U32,
    len: U32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Sizes {
    compressed: U32,
    whole: U32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Foot {
    frames: U32,
    descriptor: u8,
    magic: U32,
}

/// The start of a frame.
#[derive(Clone, Copy, Debug)]
struct Frame {
    /// The offset in the file.
    offset: u64,
    /// The offset in the uncompressed data.
    start: u64,
}

type Kept = LruCache<usize, Arc<[u8]>>;

/// The contents of a compressed file; only the frames that are read are decoded.
#[derive(Debug)]
pub(super) struct Seekable {
    file: Base,
    /// The last one is the end.
    frames: Vec<Frame>,
    stat: Stat,
    kept: Mutex<Kept>,
}

impl Seekable {
    /// Opens a file with a table; `None` without a usable table: the file must then be decoded
    /// from its first byte.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub(super) fn open(file: &Base) -> io::Result<Option<Self>> {
        let stat = file.stat()?;
        let exact = |offset: Option<u64>, bytes: &mut [u8]| -> io::Result<bool> {
            let Some(offset) = offset else { return Ok(false) };
            Ok(read_full(&**file, bytes, offset)? == bytes.len())
        };
        let mut foot = Foot::new_zeroed();
        let at = stat.len.checked_sub(size_of::<Foot>() as u64);
        let fits = exact(at, foot.as_mut_bytes())?;
        let frames = foot.frames.get();
        if !fits || foot.magic.get() != TABLE_MAGIC || foot.descriptor & RESERVED != 0 {
            return Ok(None);
        }
        if frames > FRAMES {
            return Ok(None);
        }
        let checksum = if foot.descriptor & CHECKSUMS != 0 { CHECKSUM_BYTES } else { 0 };
        let entry = size_of::<Sizes>() + checksum;
        let entries = entry * usize::try_from(frames).expect("limited above");
        let len = entries + size_of::<Foot>();
        let begin = stat.len.checked_sub((len + size_of::<Head>()) as u64);
        let mut head = Head::new_zeroed();
        if !exact(begin, head.as_mut_bytes())?
            || head.magic.get() != HEAD_MAGIC
            || usize::try_from(head.len.get()) != Ok(len)
        {
            return Ok(None);
        }
        let mut table = vec![0; entries];
        if !exact(begin.map(|begin| begin + size_of::<Head>() as u64), &mut table)? {
            return Ok(None);
        }
        let mut end = Frame { offset: 0, start: 0 };
        let (mut found, mut longest) = (vec![end], 1);
        for entry in table.chunks_exact(entry) {
            let (sizes, _) = Sizes::read_from_prefix(entry).expect("as long as an entry");
            let (compressed, whole) = (sizes.compressed.get(), sizes.whole.get());
            if compressed.max(whole) > FRAME_BYTES {
                return Ok(None);
            }
            longest = longest.max(whole);
            end.offset += u64::from(compressed);
            end.start += u64::from(whole);
            found.push(end);
        }
        if Some(end.offset) != begin {
            return Ok(None);
        }
        let kept = usize::try_from(KEPT_BYTES / longest).ok().and_then(NonZeroUsize::new);
        Ok(Some(Self {
            file: Arc::clone(file),
            frames: found,
            stat: Stat { len: end.start, allocated: end.start, ..stat },
            kept: Mutex::new(LruCache::new(kept.expect("more than one frame fits"))),
        }))
    }

    fn frame(&self, position: usize) -> io::Result<Arc<[u8]>> {
        if let Some(bytes) = self.kept().get(&position) {
            return Ok(Arc::clone(bytes));
        }
        // Decode without the lock, so that threads do not wait for each other.
        let bytes: Arc<[u8]> = self.decode(position)?.into();
        self.kept().put(position, Arc::clone(&bytes));
        Ok(bytes)
    }

    fn decode(&self, position: usize) -> io::Result<Vec<u8>> {
        let (frame, next) = (self.frames[position], self.frames[position + 1]);
        let len = |len: u64| usize::try_from(len).expect("limited when the table was read");
        let mut compressed = vec![0; len(next.offset - frame.offset)];
        if read_full(&*self.file, &mut compressed, frame.offset)? < compressed.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let whole = next.start - frame.start;
        let mut bytes = Vec::with_capacity(len(whole));
        let decoder = Frames::new(&compressed[..]);
        decoder.take(whole + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != whole {
            return Err(invalid("a zstd frame is not as long as the table of frames says"));
        }
        Ok(bytes)
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StoredFile for Seekable {
    fn stat(&self) -> io::Result<Stat> {
        Ok(self.stat)
    }

    fn read_vectored_at(&self, buffers: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        if offset >= self.stat.len {
            return Ok(0);
        }
        let position = self.frames.partition_point(|frame| frame.start <= offset) - 1;
        let bytes = self.frame(position)?;
        let inside = usize::try_from(offset - self.frames[position].start).expect("in the frame");
        Read::read_vectored(&mut &bytes[inside..], buffers)
    }

    fn file(&self) -> Option<&File> {
        None
    }
}

/// Writes the table of frames with these compressed and uncompressed lengths.
///
/// # Errors
/// What `output` returns.
pub(super) fn write_table(output: &mut dyn Write, frames: &[(u32, u32)]) -> io::Result<()> {
    let number = |number: usize| {
        u32::try_from(number).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))
    };
    let len = std::mem::size_of_val(frames) + size_of::<Foot>();
    let head = Head { magic: HEAD_MAGIC.into(), len: number(len)?.into() };
    output.write_all(head.as_bytes())?;
    for (compressed, whole) in frames {
        let sizes = Sizes { compressed: (*compressed).into(), whole: (*whole).into() };
        output.write_all(sizes.as_bytes())?;
    }
    let frames = number(frames.len())?.into();
    let foot = Foot { frames, descriptor: 0, magic: TABLE_MAGIC.into() };
    output.write_all(foot.as_bytes())
}
