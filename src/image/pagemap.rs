//! Pagemaps: which pages of one memory are in a directory, and where the others are.

use std::{
    fmt,
    io::{BufRead, Write},
    path::Path,
};

use super::{
    ImageError, ImageReader, ImageWriter, Kind, Result,
    framing::{Buffered, MESSAGE_LIMIT_BYTES},
    proto,
    wire::{self, Value},
};
use crate::units::PageIndex;

/// `flags`: the parent directory has the pages.
const PARENT: u16 = 1;
/// `flags`: a restore may load the pages later.
const LAZY: u16 = 2;
/// `flags`: the pages are in this directory's pages file.
const PRESENT: u16 = 4;

/// The fewest bytes of an entry in a file, including its length prefix; an entry at address
/// 0 may be shorter.
const ENTRY_BYTES: u64 = 10;

/// A memory: what one pagemap describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemoryId {
    /// The private memory of the process with this pid.
    Private(u64),
    /// The shared object with this shmid.
    Shared(u64),
}

impl MemoryId {
    /// Returns the kind and number of the pagemap of this memory.
    pub fn pagemap(self) -> (Kind, u64) {
        match self {
            Self::Private(pid) => (Kind::Pagemap, pid),
            Self::Shared(shmid) => (Kind::ShmemPagemap, shmid),
        }
    }

    /// Returns the kind and number of the image that records which pages of this memory a dump has
    /// sent to a page server.
    pub fn sent_pagemap(self) -> (Kind, u64) {
        match self {
            Self::Private(pid) => (Kind::SentPagemap, pid),
            Self::Shared(shmid) => (Kind::SentShmemPagemap, shmid),
        }
    }

    /// Returns the name of the pagemap of this memory.
    pub fn pagemap_name(self) -> String {
        let (kind, number) = self.pagemap();
        kind.file_name(number)
    }

    /// Returns the memory that the pagemap of this name describes.
    pub fn of_pagemap(file_name: &str) -> Option<Self> {
        let (desc, number) = super::desc::by_file_name(file_name)?;
        match desc.kind {
            Kind::Pagemap => Some(Self::Private(number)),
            Kind::ShmemPagemap => Some(Self::Shared(number)),
            _ => None,
        }
    }
}

impl fmt::Display for MemoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Private(pid) => write!(f, "pid {pid}"),
            Self::Shared(shmid) => write!(f, "shmem {shmid}"),
        }
    }
}

/// Where the pages of a pagemap entry are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Presence {
    /// In the pages file of the same directory.
    Present,
    /// Where the pagemap of the same memory in the parent directory says.
    Parent,
    /// Not in these images: a page server or the source had them.
    Absent,
}

/// A run of pages in the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagemapEntry {
    /// The first page.
    pub first: PageIndex,
    /// The number of pages, at least 1.
    pub pages: u64,
    /// Where they are.
    pub presence: Presence,
    /// Whether a restore may load them later.
    pub lazy: bool,
}

impl PagemapEntry {
    /// Returns the entry with these numbers, as files and page servers have them.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(crate) fn checked(vaddr: u64, pages: u64, flags: u64) -> Result<Self, &'static str> {
        let has = |flag: u16| flags & u64::from(flag) != 0;
        let presence = match (has(PRESENT), has(PARENT)) {
            (true, false) => Presence::Present,
            (false, true) => Presence::Parent,
            (false, false) => Presence::Absent,
            (true, true) => return Err("it is both present and in the parent"),
        };
        let first = PageIndex::at(vaddr).ok_or("the address is not page-aligned")?;
        if pages == 0 {
            return Err("it has no pages");
        }
        if pages > PageIndex::END.0.saturating_sub(first.0) {
            return Err("it ends beyond the address space");
        }
        Ok(Self { first, pages, presence, lazy: has(LAZY) })
    }

    /// Returns the field `flags`.
    pub(crate) fn flags(&self) -> u16 {
        let place = match self.presence {
            Presence::Present => PRESENT,
            Presence::Parent => PARENT,
            Presence::Absent => 0,
        };
        place | if self.lazy { LAZY } else { 0 }
    }

    /// Returns the page after the last one.
    pub fn end(&self) -> PageIndex {
        PageIndex(self.first.0 + self.pages)
    }

    /// Appends an entry to this one if both are in the same place. Returns whether it did so.
    pub fn join(&mut self, next: &Self) -> bool {
        let joins =
            self.end() == next.first && (self.presence, self.lazy) == (next.presence, next.lazy);
        if joins {
            self.pages += next.pages;
        }
        joins
    }

    /// Returns how many pages of the pages file beside it belong to the entry.
    pub fn pages_in_file(&self) -> u64 {
        if self.presence == Presence::Present { self.pages } else { 0 }
    }
}

/// A whole pagemap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pagemap {
    /// The number of the pages file.
    pub pages_id: u32,
    /// The entries, ascending and disjoint.
    pub entries: Vec<PagemapEntry>,
}

impl Pagemap {
    /// Reads a pagemap file.
    ///
    /// # Errors
    /// As [`PagemapReader::open`]; errors of the entries.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(PagemapReader::open(path)?)
    }

    /// Reads the rest of a pagemap.
    ///
    /// # Errors
    /// Errors of the entries.
    pub fn of<R: BufRead>(mut reader: PagemapReader<R>) -> Result<Self> {
        let entries = reader.by_ref().collect::<Result<_>>()?;
        Ok(Self { pages_id: reader.pages_id(), entries })
    }
}

/// Reads a pagemap entry by entry, and checks that the entries ascend.
#[derive(Debug)]
pub struct PagemapReader<R = Buffered> {
    image: ImageReader<R>,
    pages_id: u32,
    entries: u64,
    end: PageIndex,
    scratch: Vec<u8>,
    failed: bool,
}

impl PagemapReader {
    /// Opens a pagemap file and reads its head.
    ///
    /// # Errors
    /// As [`ImageReader::open_kind`]; [`ImageError::Count`] for a file without a head.
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(ImageReader::open_kind(path, Kind::Pagemap)?)
    }
}

impl<R: BufRead> PagemapReader<R> {
    /// Reads the head of an image that has just been opened.
    ///
    /// # Errors
    /// As [`PagemapReader::open`].
    pub fn new(mut image: ImageReader<R>) -> Result<Self> {
        image.require(Kind::Pagemap)?;
        let start = image.offset();
        let mut head = Vec::new();
        if !image.next_bytes(&mut head)? {
            return Err(ImageError::Count { path: image.path().to_owned(), found: 0 });
        }
        let pages_id = parse_head(&head).map_err(|problem| ImageError::Malformed {
            path: image.path().to_owned(),
            offset: start,
            message: "pagemap_head",
            problem: problem.to_owned(),
        })?;
        Ok(Self {
            image,
            pages_id,
            entries: 0,
            end: PageIndex(0),
            scratch: Vec::new(),
            failed: false,
        })
    }

    /// Returns the number of the pages file.
    pub fn pages_id(&self) -> u32 {
        self.pages_id
    }

    /// Returns the largest number of entries that can be left, by the size of the file on
    /// disk.
    pub fn entries_left(&self) -> usize {
        let bytes = self.image.stored_bytes_left();
        usize::try_from(bytes / ENTRY_BYTES).unwrap_or(0)
    }

    /// Returns the [`ImageError::Read`] for a pagemap that does not fit into memory.
    pub fn out_of_memory(&self) -> ImageError {
        self.image.out_of_memory()
    }

    fn read_entry(&mut self) -> Result<Option<PagemapEntry>> {
        let start = self.image.offset();
        // Usually the whole entry has been read ahead, and is parsed in place.
        let ahead = framed(self.image.peek()?).map(|message| (parse(message), message.len()));
        let fields = if let Some((fields, length)) = ahead {
            self.image.consume(size_of::<u32>() + length);
            fields
        } else if self.image.next_bytes(&mut self.scratch)? {
            parse(&self.scratch)
        } else {
            return Ok(None);
        };
        let fields = fields.map_err(|problem| ImageError::Malformed {
            path: self.image.path().to_owned(),
            offset: start,
            message: "pagemap_entry",
            problem: problem.to_owned(),
        })?;
        let entry = self.check(fields)?;
        self.entries += 1;
        self.end = entry.end();
        Ok(Some(entry))
    }

    fn check(&self, fields: Fields) -> Result<PagemapEntry> {
        let first = PageIndex::holding(fields.vaddr);
        let wrong = |problem| ImageError::Pagemap {
            path: self.image.path().to_owned(),
            entry: self.entries,
            first,
            problem,
        };
        let entry =
            PagemapEntry::checked(fields.vaddr, fields.pages, fields.flags).map_err(wrong)?;
        if first < self.end {
            return Err(wrong("it begins before the end of the entry before it"));
        }
        Ok(entry)
    }
}

impl<R: BufRead> Iterator for PagemapReader<R> {
    /// An entry, or the defect: as [`ImageReader::next_message`]; [`ImageError::Pagemap`]
    /// for an entry that is empty, ends beyond the address space, begins before the end of
    /// the one before it, or claims two places. An error ends the iteration.
    type Item = Result<PagemapEntry>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let entry = self.read_entry().transpose();
        self.failed = matches!(entry, Some(Err(_)));
        entry
    }
}

/// Returns the first message in `ahead` if all of it is there.
fn framed(ahead: &[u8]) -> Option<&[u8]> {
    let (length, rest) = ahead.split_first_chunk()?;
    let length = u32::from_le_bytes(*length);
    if length > MESSAGE_LIMIT_BYTES {
        return None; // the slow path has the error message
    }
    rest.get(..usize::try_from(length).ok()?)
}

/// The fields of a `pagemap_entry` of any format version.
#[derive(Default)]
struct Fields {
    vaddr: u64,
    pages: u64,
    flags: u64,
}

/// Parses a `pagemap_head`. A chain of a thousand layers has a thousand for each memory.
fn parse_head(mut bytes: &[u8]) -> Result<u32, &'static str> {
    let mut pages_id = None;
    while !bytes.is_empty() {
        match wire::field(&mut bytes).ok_or("it is not a sequence of fields")? {
            (1, Value::Varint(value)) => pages_id = Some(value),
            (1, _) => return Err("a field has the wrong type"),
            _ => {}
        }
    }
    // Like protobuf: of a number that is too long, the lower half counts.
    let pages_id = pages_id.ok_or("it lacks field pages_id")? & u64::from(u32::MAX);
    Ok(u32::try_from(pages_id).expect("the lower half"))
}

/// Parses a `pagemap_entry`. There may be millions.
fn parse(mut bytes: &[u8]) -> Result<Fields, &'static str> {
    const CUT: &str = "it is not a sequence of fields";
    let (mut vaddr, mut compat_pages, mut in_parent) = (None, None, false);
    let (mut flags, mut pages) = (None, None);
    while let [key, rest @ ..] = bytes {
        // Fields 1 to 5 are varints with one-byte keys.
        let value = if matches!(*key, 0x08 | 0x10 | 0x18 | 0x20 | 0x28) {
            bytes = rest;
            wire::varint(&mut bytes).ok_or(CUT)?
        } else {
            match wire::field(&mut bytes).ok_or(CUT)? {
                (1..=5, _) => return Err("a field has the wrong type"),
                _ => continue,
            }
        };
        match *key {
            0x08 => vaddr = Some(value),
            0x10 => compat_pages = Some(value),
            0x18 => in_parent = value != 0,
            0x20 => flags = Some(value),
            _ => pages = Some(value),
        }
    }
    // Images without `flags` have only `in_parent`; images without the 64-bit count have
    // only the 32-bit one.
    Ok(Fields {
        vaddr: vaddr.ok_or("it lacks field vaddr")?,
        pages: pages.or(compat_pages).ok_or("it lacks field nr_pages")?,
        flags: flags.unwrap_or((if in_parent { PARENT } else { PRESENT }).into()),
    })
}

/// Writes a pagemap entry by entry.
#[derive(Debug)]
pub struct PagemapWriter<W: Write> {
    image: ImageWriter<W>,
}

impl<W: Write> PagemapWriter<W> {
    /// Writes the head of a pagemap whose pages are in `pages-<pages_id>.img`.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn new(mut image: ImageWriter<W>, pages_id: u32) -> Result<Self> {
        image.message(&proto::PagemapHead { pages_id })?;
        Ok(Self { image })
    }

    /// Writes an entry, which must begin at or after the end of the previous one.
    ///
    /// The number of pages goes into both fields that can hold it, for older readers; only
    /// into the newer field if the older one is too narrow.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn entry(&mut self, entry: &PagemapEntry) -> Result<()> {
        self.image.message(&proto::PagemapEntry {
            vaddr: entry.first.address(),
            compat_nr_pages: u32::try_from(entry.pages).unwrap_or(0),
            in_parent: None,
            flags: Some(entry.flags().into()),
            nr_pages: Some(entry.pages),
        })
    }

    /// Returns the complete image.
    pub fn into_image(self) -> ImageWriter<W> {
        self.image
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8]) -> Result<Pagemap> {
        let image = ImageReader::new(&PathBuf::from("pagemap-1.img"), bytes)?;
        let mut reader = PagemapReader::new(image)?;
        let entries = reader.by_ref().collect::<Result<_>>()?;
        Ok(Pagemap { pages_id: reader.pages_id(), entries })
    }

    fn image(messages: &[&[u8]]) -> Vec<u8> {
        let path = PathBuf::from("pagemap-1.img");
        let mut writer = ImageWriter::new(&path, Vec::new(), Kind::Pagemap).unwrap();
        writer.message(&proto::PagemapHead { pages_id: 7 }).unwrap();
        for message in messages {
            writer.message_bytes(message).unwrap();
        }
        writer.into_output()
    }

    fn one(message: &[u8]) -> Result<PagemapEntry> {
        read(&image(&[message])).map(|pagemap| pagemap.entries[0])
    }

    #[test]
    fn every_encoding_of_an_entry_is_read() {
        let entry =
            |pages, presence, lazy| PagemapEntry { first: PageIndex(1), pages, presence, lazy };
        // vaddr 0x1000, compat count 2, no flags: an old image
        assert_eq!(one(&[8, 0x80, 0x20, 16, 2]).unwrap(), entry(2, Presence::Present, false));
        assert_eq!(one(&[8, 0x80, 0x20, 16, 2, 24, 1]).unwrap(), entry(2, Presence::Parent, false));
        assert_eq!(
            one(&[8, 0x80, 0x20, 16, 2, 24, 0]).unwrap(),
            entry(2, Presence::Present, false)
        );
        // compat count 0 and 64-bit count 3
        assert_eq!(
            one(&[8, 0x80, 0x20, 16, 0, 32, 4, 40, 3]).unwrap(),
            entry(3, Presence::Present, false)
        );
        assert_eq!(one(&[8, 0x80, 0x20, 16, 3, 32, 6]).unwrap(), entry(3, Presence::Present, true));
        assert_eq!(one(&[8, 0x80, 0x20, 16, 3, 32, 2]).unwrap(), entry(3, Presence::Absent, true));
    }

    #[test]
    fn contradictions_are_errors_that_say_which() {
        let problem = |message: &[u8]| one(message).unwrap_err().to_string();
        assert_eq!(
            problem(&[8, 0x80, 0x20, 16, 1, 32, 5]),
            "pagemap pagemap-1.img, entry 0 at address 0x1000: it is both present and in the parent"
        );
        assert!(problem(&[8, 1, 16, 1]).ends_with("the address is not page-aligned"));
        assert!(problem(&[8, 0x80, 0x20, 16, 0]).ends_with("it has no pages"));
        let mut far = vec![8, 0x80, 0x20, 16, 0, 40];
        far.extend([0xff; 9]);
        far.push(1);
        assert!(problem(&far).ends_with("it ends beyond the address space"));
        let first: &[u8] = &[8, 0x80, 0x20, 16, 2];
        let overlapping = read(&image(&[first, &[8, 0x80, 0x40, 16, 1]])).unwrap_err();
        assert_eq!(
            overlapping.to_string(),
            "pagemap pagemap-1.img, entry 1 at address 0x2000: it begins before the end of the entry before it"
        );
        assert!(problem(&[16, 2]).ends_with("it lacks field vaddr"));
    }

    #[test]
    fn cut_and_oversized_files_are_errors() {
        let whole = image(&[&[8, 0x80, 0x20, 16, 2]]);
        for length in 0..whole.len() {
            // A cut between two messages cannot be detected.
            let between = length == whole.len() - 9;
            assert_eq!(read(&whole[..length]).is_ok(), between, "{length}");
        }
        let mut huge = image(&[]);
        huge.extend(u32::MAX.to_le_bytes());
        assert!(matches!(read(&huge), Err(ImageError::Oversized { length: 0xffff_ffff, .. })));
    }

    fn entries() -> impl Strategy<Value = Vec<PagemapEntry>> {
        let presence =
            prop_oneof![Just(Presence::Present), Just(Presence::Parent), Just(Presence::Absent)];
        let entry = (0..1_u64 << 30, 1..1_u64 << 34, presence, any::<bool>());
        prop::collection::vec(entry, 0..40).prop_map(|parts| {
            let mut end = 0;
            parts
                .into_iter()
                .map(|(gap, pages, presence, lazy)| {
                    let first = PageIndex(end + gap);
                    end = first.0 + pages;
                    PagemapEntry { first, pages, presence, lazy }
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(entries in entries(), pages_id: u32) {
            let path = PathBuf::from("pagemap-1.img");
            let image = ImageWriter::new(&path, Vec::new(), Kind::Pagemap).unwrap();
            let mut writer = PagemapWriter::new(image, pages_id).unwrap();
            for entry in &entries {
                writer.entry(entry).unwrap();
            }
            let bytes = writer.into_image().into_output();
            prop_assert_eq!(read(&bytes).unwrap(), Pagemap { pages_id, entries });
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(tail: Vec<u8>, messages: Vec<Vec<u8>>) {
            let messages: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
            let mut bytes = image(&messages);
            bytes.extend(tail);
            let _ = read(&bytes);
        }
    }
}
