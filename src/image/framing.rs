//! Reading images: magics before, and length prefixes around, messages and payloads.

use std::{
    ffi::OsStr,
    io::{self, BufRead, BufReader, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use prost::{Message, Name};

use super::{
    Desc, ImageError, Kind, Result,
    desc::{self, Body, IMAGE_MAGIC, SERVICE_MAGIC},
    store::{self, Input, Stream},
    wire::{self, Shape},
};
use crate::units::PAGE_SIZE;

/// How many bytes of an image are read at a time.
const BUFFER_BYTES: usize = 64 << 10;

/// Returns how many bytes to read at a time from a file of `len` bytes. Small files are
/// read at once: a deep chain has thousands of them.
fn buffer_bytes(len: u64) -> usize {
    usize::try_from(len).unwrap_or(BUFFER_BYTES).clamp(1, BUFFER_BYTES)
}

/// The longest accepted message. The longest real ones are address spaces: about 60 bytes
/// for each mapping, and the kernel allows 65,530 mappings by default.
pub(super) const MESSAGE_LIMIT_BYTES: u32 = 64 << 20;

/// How many empty messages of an image are accepted. No kind has many, but a file that is
/// one large hole would consist of them.
const EMPTY_LIMIT: u32 = 1 << 16;

/// What stands before the kind's own magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prologue {
    /// Nothing: the inventory, and images of the oldest format.
    Bare,
    /// The magic common to images.
    Image,
    /// The magic common to service files.
    Service,
}

/// An image of a store, read through a buffer.
pub type Buffered = BufReader<Box<dyn Stream>>;

/// Reads one image, message by message.
#[derive(Debug)]
pub struct ImageReader<R = Buffered> {
    input: R,
    path: PathBuf,
    offset: u64,
    desc: &'static Desc,
    prologue: Prologue,
    size: Option<u64>,
    /// How many bytes the file occupies on disk, as far as known.
    stored: u64,
    /// How many empty messages have been read.
    empty: u32,
}

impl ImageReader {
    /// Opens an image and reads its magics.
    ///
    /// The magic says which kind the image is; among kinds that share a magic, the file
    /// name does.
    ///
    /// # Errors
    /// [`ImageError::Open`], [`ImageError::Read`], [`ImageError::Truncated`], [`ImageError::Magic`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_input(path, open_input(path)?)
    }

    /// Reads the magics of an image that its store has just opened; errors name `path`.
    ///
    /// # Errors
    /// As [`ImageReader::open`].
    pub(super) fn from_input(path: &Path, input: Input) -> Result<Self> {
        let Input { bytes, len, allocated } = input;
        let reader = Self::new(path, BufReader::with_capacity(buffer_bytes(len), bytes))?;
        Ok(Self { size: Some(len), stored: allocated, ..reader })
    }

    /// Opens a file of any kind, also one without magics, and returns its size as well.
    ///
    /// # Errors
    /// As [`ImageReader::open`].
    pub fn open_any(path: &Path) -> Result<(Self, u64)> {
        let Input { bytes, len, .. } = open_input(path)?;
        let input = BufReader::with_capacity(buffer_bytes(len), bytes);
        Ok((Self::of_any_kind(path, input, Some(len))?, len))
    }

    /// Opens an image that must be of kind `kind`.
    ///
    /// # Errors
    /// As [`ImageReader::open`]; another kind is [`ImageError::Magic`].
    pub fn open_kind(path: &Path, kind: Kind) -> Result<Self> {
        let reader = Self::open(path)?;
        reader.require(kind)?;
        Ok(reader)
    }
}

impl<'a> ImageReader<Lent<'a>> {
    /// Like [`ImageReader::from_input`], but reads through `buffer`, which may have served
    /// another image and grows if necessary.
    ///
    /// # Errors
    /// As [`ImageReader::open`].
    pub(super) fn through(path: &Path, input: Input, buffer: &'a mut Vec<u8>) -> Result<Self> {
        let Input { bytes, len, allocated } = input;
        let wanted = buffer_bytes(len);
        if buffer.len() < wanted {
            buffer.resize(wanted, 0);
        }
        let reader = Self::new(path, Lent { bytes, left: len, buffer, unread: 0..0 })?;
        Ok(Self { size: Some(len), stored: allocated, ..reader })
    }
}

/// Opens a file of the file system.
fn open_input(path: &Path) -> Result<Input> {
    store::open_file(path).map_err(|source| ImageError::Open { path: path.to_owned(), source })
}

/// A reader whose buffer outlives it: a caller that opens thousands of files need not
/// allocate a buffer for each.
#[derive(Debug)]
pub struct Lent<'a> {
    bytes: Box<dyn Stream>,
    /// How many bytes are left, by the size of the file when it was opened.
    left: u64,
    buffer: &'a mut [u8],
    unread: Range<usize>,
}

impl Read for Lent<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(bytes)?;
        self.consume(read);
        Ok(read)
    }
}

impl BufRead for Lent<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.unread.is_empty() && self.left > 0 {
            let read = self.bytes.read(self.buffer)?;
            self.left = self.left.saturating_sub(read as u64);
            self.unread = 0..read;
        }
        Ok(&self.buffer[self.unread.clone()])
    }

    fn consume(&mut self, bytes: usize) {
        self.unread.start = self.unread.end.min(self.unread.start + bytes);
    }
}

impl<R: BufRead> ImageReader<R> {
    /// Reads the magics of `input`; errors name `path`.
    ///
    /// # Errors
    /// As [`ImageReader::open`].
    pub fn new(path: &Path, input: R) -> Result<Self> {
        // The magic will say which kind it is.
        let mut reader = Self::at_start(path, input, Kind::Inventory.desc());
        let mut magic = reader.magic()?;
        reader.prologue = match magic {
            IMAGE_MAGIC => Prologue::Image,
            SERVICE_MAGIC => Prologue::Service,
            _ => Prologue::Bare,
        };
        if reader.prologue != Prologue::Bare {
            magic = reader.magic()?;
        }
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        reader.desc = desc::by_magic(magic, name).ok_or_else(|| ImageError::Magic {
            path: path.to_owned(),
            found: magic,
            expected: "the magic of an image".to_owned(),
        })?;
        Ok(reader)
    }

    /// Reads `input`, which may also be of a kind without magics. `size` is its length, if
    /// known.
    ///
    /// Only the file name says whether a file has magics: the first bytes of a page may
    /// look like a magic.
    ///
    /// # Errors
    /// As [`ImageReader::open`].
    pub fn of_any_kind(path: &Path, mut input: R, size: Option<u64>) -> Result<Self> {
        let raw = path
            .file_name()
            .and_then(|name| desc::by_file_name(name.to_str()?))
            .map(|(desc, _)| desc)
            .filter(|desc| desc.body == Body::Raw);
        let Some(desc) = raw else { return Self::new(path, input) };
        // In the oldest format, files of pages have the same name as now, but begin with a
        // magic and have an address before each page, so their size is never a multiple of
        // the page size.
        if desc.kind == Kind::Pages && size.is_some_and(|size| !size.is_multiple_of(PAGE_SIZE)) {
            let start = input.fill_buf().map_err(|source| ImageError::Read {
                path: path.to_owned(),
                offset: 0,
                source,
            })?;
            let after_common = start.strip_prefix(&IMAGE_MAGIC.to_le_bytes()).unwrap_or(start);
            if after_common.starts_with(&Kind::PagesOld.desc().magic.to_le_bytes()) {
                return Self::new(path, input);
            }
        }
        Ok(Self::at_start(path, input, desc))
    }

    /// Returns a reader at the start of `input`.
    fn at_start(path: &Path, input: R, desc: &'static Desc) -> Self {
        let path = path.to_owned();
        Self {
            input,
            path,
            offset: 0,
            desc,
            prologue: Prologue::Bare,
            size: None,
            stored: 0,
            empty: 0,
        }
    }

    /// Checks that the image is of kind `kind`, or of a kind with the same magic.
    ///
    /// # Errors
    /// [`ImageError::Magic`].
    pub fn require(&self, kind: Kind) -> Result<()> {
        let wanted = kind.desc();
        if self.desc.magic == wanted.magic {
            return Ok(());
        }
        Err(ImageError::Magic {
            path: self.path.clone(),
            found: self.desc.magic,
            expected: format!("{:#010x} ({})", wanted.magic, wanted.name),
        })
    }

    /// Returns the row of the kind.
    pub fn desc(&self) -> &'static Desc {
        self.desc
    }

    /// Returns what stood before the kind's own magic.
    pub fn prologue(&self) -> Prologue {
        self.prologue
    }

    /// Returns how many bytes have been read.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns how many bytes are left, if known.
    pub fn bytes_left(&self) -> Option<u64> {
        self.size.map(|size| size.saturating_sub(self.offset))
    }

    /// Returns an estimate of how many of the bytes left are stored, rather than holes;
    /// only good for reserving memory.
    pub(super) fn stored_bytes_left(&self) -> u64 {
        self.bytes_left().unwrap_or(0).min(self.stored.max(BUFFER_BYTES as u64))
    }

    /// Returns the [`ImageError::Read`] for an image that does not fit into memory.
    pub fn out_of_memory(&self) -> ImageError {
        ImageError::Read {
            path: self.path.clone(),
            offset: self.offset,
            source: io::ErrorKind::OutOfMemory.into(),
        }
    }

    /// Returns the path that errors name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn magic(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.fill(&mut bytes, "magic")?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Reads the next message into `message`, replacing its contents; false at the end of
    /// the file.
    ///
    /// # Errors
    /// [`ImageError::Read`], [`ImageError::Truncated`], [`ImageError::Oversized`].
    pub fn next_bytes(&mut self, message: &mut Vec<u8>) -> Result<bool> {
        message.clear();
        if self.at_end()? {
            return Ok(false);
        }
        let length = self.length()?;
        self.append(u64::from(length), "message", message)?;
        Ok(true)
    }

    /// Reads and decodes the next message; `None` at the end of the file.
    ///
    /// # Errors
    /// As [`ImageReader::next_bytes`], and [`ImageError::Malformed`].
    pub fn next_message<M: Message + Name + Default>(&mut self) -> Result<Option<M>> {
        let start = self.offset;
        let mut bytes = Vec::new();
        if !self.next_bytes(&mut bytes)? {
            return Ok(None);
        }
        self.decode(start, &bytes).map(Some)
    }

    /// Decodes `bytes`, a message at offset `start`.
    ///
    /// # Errors
    /// [`ImageError::Malformed`].
    pub fn decode<M: Message + Name + Default>(&self, start: u64, bytes: &[u8]) -> Result<M> {
        let malformed = |problem| ImageError::Malformed {
            path: self.path.clone(),
            offset: start,
            message: M::NAME,
            problem,
        };
        let shape =
            Shape::by_full_name(&M::full_name()).expect("every generated message has a shape");
        wire::check_required(bytes, shape).map_err(malformed)?;
        M::decode(bytes).map_err(|error| malformed(error.to_string()))
    }

    /// Reads a length prefix.
    ///
    /// # Errors
    /// [`ImageError::Read`], [`ImageError::Truncated`], [`ImageError::Oversized`].
    pub fn length(&mut self) -> Result<u32> {
        let offset = self.offset;
        let mut bytes = [0; 4];
        self.fill(&mut bytes, "length")?;
        let length = u32::from_le_bytes(bytes);
        if length > MESSAGE_LIMIT_BYTES {
            return Err(ImageError::Oversized {
                path: self.path.clone(),
                offset,
                length: length.into(),
                limit: MESSAGE_LIMIT_BYTES.into(),
            });
        }
        self.empty += u32::from(length == 0);
        if self.empty > EMPTY_LIMIT {
            return Err(ImageError::Malformed {
                path: self.path.clone(),
                offset,
                message: "message",
                problem: format!(
                    "more than {EMPTY_LIMIT} messages are empty, as if read from a hole"
                ),
            });
        }
        Ok(length)
    }

    /// Whether the whole file has been read.
    ///
    /// # Errors
    /// [`ImageError::Read`].
    pub fn at_end(&mut self) -> Result<bool> {
        let Self { input, path, offset, .. } = self;
        input.fill_buf().map(<[u8]>::is_empty).map_err(|source| ImageError::Read {
            path: path.clone(),
            offset: *offset,
            source,
        })
    }

    /// Appends exactly `wanted` bytes of the file to `bytes`. Memory grows with the bytes
    /// that the file has, not with `wanted`.
    ///
    /// # Errors
    /// [`ImageError::Read`], [`ImageError::Truncated`].
    pub fn append(&mut self, wanted: u64, what: &'static str, bytes: &mut Vec<u8>) -> Result<()> {
        self.copy(wanted, what, |input| input.read_to_end(bytes).map(|read| read as u64))
    }

    /// Skips exactly `wanted` bytes.
    ///
    /// # Errors
    /// [`ImageError::Read`], [`ImageError::Truncated`].
    pub fn skip(&mut self, wanted: u64, what: &'static str) -> Result<()> {
        self.copy(wanted, what, |input| io::copy(input, &mut io::sink()))
    }

    /// Returns the bytes that have been read ahead, and reads more if there are none; empty
    /// at the end of the file.
    pub(super) fn peek(&mut self) -> Result<&[u8]> {
        let Self { input, path, offset, .. } = self;
        input.fill_buf().map_err(|source| ImageError::Read {
            path: path.clone(),
            offset: *offset,
            source,
        })
    }

    /// Consumes `bytes` of what [`ImageReader::peek`] returned.
    pub(super) fn consume(&mut self, bytes: usize) {
        self.input.consume(bytes);
        self.offset += bytes as u64;
    }

    fn fill(&mut self, bytes: &mut [u8], what: &'static str) -> Result<()> {
        let wanted = bytes.len() as u64;
        self.copy(wanted, what, |input| {
            let mut read = 0;
            while read < bytes.len() {
                match input.read(&mut bytes[read..]) {
                    Ok(0) => break,
                    Ok(more) => read += more,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(read as u64)
        })
    }

    fn copy(
        &mut self,
        wanted: u64,
        what: &'static str,
        read: impl FnOnce(&mut io::Take<&mut R>) -> io::Result<u64>,
    ) -> Result<()> {
        let offset = self.offset;
        let found = read(&mut (&mut self.input).take(wanted))
            .map_err(|source| ImageError::Read { path: self.path.clone(), offset, source })?;
        self.offset += found;
        if found == wanted {
            return Ok(());
        }
        Err(ImageError::Truncated { path: self.path.clone(), offset, what, wanted, found })
    }
}

impl<R: BufRead> ImageReader<R> {
    /// Reads all remaining messages.
    ///
    /// # Errors
    /// As [`ImageReader::next_message`].
    pub fn all<M: Message + Name + Default>(mut self) -> Result<Vec<M>> {
        let mut messages = Vec::new();
        while let Some(message) = self.next_message()? {
            messages.push(message);
        }
        Ok(messages)
    }

    /// Reads the message of an image that must hold exactly one.
    ///
    /// # Errors
    /// As [`ImageReader::next_message`]; another number of messages is
    /// [`ImageError::Count`].
    pub fn only<M: Message + Name + Default>(mut self) -> Result<M> {
        let first = self.next_message()?;
        let more = !self.at_end()?;
        match first {
            Some(message) if !more => Ok(message),
            first => {
                let found = usize::from(first.is_some()) + usize::from(more);
                Err(ImageError::Count { path: self.path, found })
            }
        }
    }
}

/// Reads all messages of an image file that has no payloads.
///
/// # Errors
/// As [`ImageReader::open_kind`] and [`ImageReader::next_message`].
pub fn read_all<M: Message + Name + Default>(path: &Path, kind: Kind) -> Result<Vec<M>> {
    ImageReader::open_kind(path, kind)?.all()
}

/// Reads the message of an image file that must hold exactly one.
///
/// # Errors
/// As [`read_all`]; another number of messages is [`ImageError::Count`].
pub fn read_one<M: Message + Name + Default>(path: &Path, kind: Kind) -> Result<M> {
    ImageReader::open_kind(path, kind)?.only()
}

#[cfg(test)]
mod tests {
    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::{super::ImageWriter, *};
    use crate::image::proto;

    #[test]
    fn a_fifo_under_an_images_name_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("core-1.img");
        mkfifo(&path, Mode::S_IRUSR).unwrap();
        let error = ImageReader::open(&path).unwrap_err();
        assert!(matches!(error, ImageError::Open { .. }), "{error}");
    }

    #[test]
    fn a_file_must_hold_as_many_messages_as_its_kind_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("inventory.img");
        let entry = proto::InventoryEntry { img_version: 2, ..Default::default() };
        for count in 0..3_usize {
            let mut writer = ImageWriter::new(&path, Vec::new(), Kind::Inventory).unwrap();
            for _ in 0..count {
                writer.message(&entry).unwrap();
            }
            std::fs::write(&path, writer.into_output()).unwrap();
            match read_one::<proto::InventoryEntry>(&path, Kind::Inventory) {
                Ok(read) => assert_eq!((count, read), (1, entry.clone())),
                Err(ImageError::Count { found, .. }) => assert_eq!(found, count),
                Err(error) => panic!("{error}"),
            }
        }
    }
}
