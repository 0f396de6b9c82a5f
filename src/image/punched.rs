//! The journal of the freed pages of a pages file.
//!
//! A hole in a pages file reads as zeros and looks like a page of zeros. So before pages
//! are freed, `punched-<pages_id>.img` beside the pages file names them. From then on they
//! are gone for every reader, freed or not. Other readers of the format ignore the file.
//!
//! # Layout
//!
//! All numbers are little endian.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `rcriuPUN` |
//! | 4 | the version, 1 |
//! | 4 | `pages_id` |
//! | 8 | the dump it belongs to: XXH3 of the pagemap and of the inventory |
//! | 8 | XXH3 of the 24 bytes before |
//!
//! The head is followed by records of 24 bytes: the first page in the *file*, the number of
//! pages, and a checksum. The checksum is XXH3 of these 16 bytes, seeded with the dump and
//! the number of the record. A record of no pages is a *seal*: all records before it are on
//! disk.
//!
//! The head names the dump because programs that do not know the journal write new dumps
//! into the same directory: the journal of the old dump must not apply to the new one. A
//! rewritten pagemap, too, makes the journal foreign, since pages of the file then mean
//! something else.
//!
//! Records are appended in batches. A batch is synced; only then is it sealed, and only
//! then are its pages freed. After a crash, records of a batch that was not synced may be
//! on disk in any order, but all of them are behind the last seal: from the first damaged
//! record on they are ignored, and the next append cuts them off. A damaged record before a
//! seal is an error, because it is unknown which pages are gone. The seal needs no
//! `fsync(2)` of its own: if it is lost, the only effect is that such damage may go
//! unnoticed.
//!
//! The file is created under a temporary name and renamed, so that its head is always
//! whole. The same way it is rewritten once it has many more records than ranges.

use std::{
    io::{self, BufReader, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use super::{Directory, Disk, ImageError, ImageStore, Kind, Result, disk::DiskFile};
use crate::units::{PageIndex, PageRanges};

const MAGIC: [u8; 8] = *b"rcriuPUN";

const VERSION: u32 = 1;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    version: U32,
    pages_id: U32,
    dump: U64,
    checksum: U64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Record {
    first: U64,
    pages: U64,
    checksum: U64,
}

const HEAD_BYTES: u64 = size_of::<Head>() as u64;
const RECORD_BYTES: u64 = size_of::<Record>() as u64;
const _: () = assert!(HEAD_BYTES == 32 && RECORD_BYTES == 24);

/// The bytes of the head that its checksum covers.
const SUMMED_HEAD_BYTES: usize = 24;
const SUMMED_RECORD_BYTES: usize = 16;

/// How many records a journal may have beyond twice its number of ranges before it is
/// rewritten: 24 KiB.
const SPARE_RECORDS: u64 = 1024;

/// How many records are written at a time: 96 KiB.
const BATCH_RECORDS: usize = 4096;

impl Head {
    fn new(pages_id: u32, dump: u64) -> Self {
        let mut head = Self {
            magic: MAGIC,
            version: VERSION.into(),
            pages_id: pages_id.into(),
            dump: dump.into(),
            checksum: 0.into(),
        };
        head.checksum = head.sum().into();
        head
    }

    fn sum(&self) -> u64 {
        xxh3_64(&self.as_bytes()[..SUMMED_HEAD_BYTES])
    }
}

impl Record {
    /// Returns record number `position`.
    fn new(pages: &Range<u64>, dump: u64, position: u64) -> Self {
        let mut record = Self {
            first: pages.start.into(),
            pages: (pages.end - pages.start).into(),
            checksum: 0.into(),
        };
        record.checksum = record.sum(dump, position).into();
        record
    }

    fn seal(dump: u64, position: u64) -> Self {
        Self::new(&(0..0), dump, position)
    }

    fn sum(&self, dump: u64, position: u64) -> u64 {
        xxh3_64_with_seed(&self.as_bytes()[..SUMMED_RECORD_BYTES], dump ^ position)
    }
}

/// Where a journal is, and which pages file it must belong to.
#[derive(Clone, Debug)]
struct Owner {
    /// The path that errors name.
    path: PathBuf,
    /// The name of the pagemap beside it.
    pagemap: String,
    pages_id: u32,
}

/// The contents of a journal.
#[derive(Debug, Default)]
struct Contents {
    pages: PageRanges,
    /// The number of valid records, seals included.
    records: u64,
}

/// Reads which pages of the file `pages-<pages_id>.img` of `images` are gone; `None` if
/// there is no journal. `pagemap` is the name of the pagemap that describes the file.
///
/// # Errors
/// [`ImageError::Foreign`]; [`ImageError::Journal`]; a file that cannot be read.
pub fn read(images: &dyn ImageStore, pagemap: &str, pages_id: u32) -> Result<Option<PageRanges>> {
    let Some(journal) = open(images, pages_id)? else { return Ok(None) };
    let owner = Owner::new(images, pagemap, pages_id);
    let dump = owner.dump(images)?;
    owner.contents(BufReader::new(journal), dump).map(|contents| Some(contents.pages))
}

fn open(images: &dyn ImageStore, pages_id: u32) -> Result<Option<impl Read + use<>>> {
    let name = Kind::Punched.file_name(pages_id.into());
    match images.open(&name) {
        Ok(input) => Ok(Some(input.bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ImageError::Open { path: images.path_of(&name), source }),
    }
}

impl Owner {
    fn new(images: &dyn ImageStore, pagemap: &str, pages_id: u32) -> Self {
        let path = images.path(Kind::Punched, pages_id.into());
        Self { path, pagemap: pagemap.to_owned(), pages_id }
    }

    fn dir(&self) -> &Path {
        self.path.parent().expect("it was joined to a directory")
    }

    /// Returns the dump that the journal must belong to.
    fn dump(&self, images: &dyn ImageStore) -> Result<u64> {
        let mut hash = Xxh3::new();
        for name in [&self.pagemap, &Kind::Inventory.file_name(0)] {
            let path = images.path_of(name);
            let mut file = match images.open(name) {
                Ok(input) => input.bytes,
                Err(source) => return Err(ImageError::Open { path, source }),
            };
            let mut buffer = [0; 16 << 10];
            let mut len = 0_u64;
            loop {
                match file.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => {
                        hash.update(&buffer[..count]);
                        len += count as u64;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(source) => {
                        return Err(ImageError::Read { path, offset: len, source });
                    }
                }
            }
            // The boundary between the two files.
            hash.update(&len.to_le_bytes());
        }
        Ok(hash.digest())
    }

    fn wrong(&self, offset: u64, problem: &'static str) -> ImageError {
        ImageError::Journal { path: self.path.clone(), offset, problem }
    }

    /// Reads a journal, which must belong to `dump`.
    fn contents(&self, mut input: impl Read, dump: u64) -> Result<Contents> {
        let mut bytes = [0; size_of::<Head>()];
        if self.fill(&mut input, &mut bytes, 0)? < bytes.len() {
            return Err(self.wrong(0, "its head is cut short"));
        }
        let head = Head::read_from_bytes(&bytes).expect("as many bytes");
        if head.magic != MAGIC {
            return Err(self.wrong(0, "it does not begin with rcriuPUN"));
        }
        if head.version.get() != VERSION {
            return Err(self.wrong(8, "its version is unknown to this program"));
        }
        if head.sum() != head.checksum.get() {
            return Err(self.wrong(24, "its head is damaged"));
        }
        if head.pages_id.get() != self.pages_id {
            return Err(self.wrong(12, "it belongs to another pages file than its name says"));
        }
        if head.dump.get() != dump {
            return Err(ImageError::Foreign { path: self.path.clone() });
        }
        self.records(input, dump)
    }

    fn records(&self, mut input: impl Read, dump: u64) -> Result<Contents> {
        let mut contents = Contents::default();
        let mut damaged = None;
        for position in 0.. {
            let offset = HEAD_BYTES + position * RECORD_BYTES;
            let mut bytes = [0; size_of::<Record>()];
            if self.fill(&mut input, &mut bytes, offset)? < bytes.len() {
                break;
            }
            let record = Record::read_from_bytes(&bytes).expect("as many bytes");
            let whole = record.sum(dump, position) == record.checksum.get();
            let pages = record.first.get()..record.first.get().wrapping_add(record.pages.get());
            match damaged {
                None if !whole => damaged = Some(offset),
                None if pages.start > pages.end || pages.end > PageIndex::END.0 => {
                    return Err(self.wrong(offset, "a record names pages that no file can have"));
                }
                None => {
                    contents.pages.insert(pages);
                    contents.records = position + 1;
                }
                Some(offset) if whole && record.pages.get() == 0 => {
                    let problem = "a record is damaged, so it is unknown which pages are \
                                   gone: take the directory from a copy";
                    return Err(self.wrong(offset, problem));
                }
                Some(_) => {}
            }
        }
        Ok(contents)
    }

    /// Reads until the buffer is full or the file ends.
    fn fill(&self, input: &mut impl Read, buffer: &mut [u8], offset: u64) -> Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match input.read(&mut buffer[done..]) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(ImageError::Read { path: self.path.clone(), offset, source });
                }
            }
        }
        Ok(done)
    }
}

/// A journal that is being written.
#[derive(Debug)]
pub struct JournalWriter {
    owner: Owner,
    dump: u64,
    /// Open during writes.
    file: Option<DiskFile>,
    exists: bool,
    contents: Contents,
    /// Whether some records may not be on disk yet.
    unsynced: bool,
}

impl JournalWriter {
    /// Opens the journal of the file `pages-<pages_id>.img` in `dir`, which the pagemap
    /// `pagemap` describes. Writes nothing yet.
    ///
    /// # Errors
    /// As [`read`].
    pub fn open(dir: &Path, pagemap: &str, pages_id: u32) -> Result<Self> {
        let images = Directory::at(dir);
        let owner = Owner::new(&images, pagemap, pages_id);
        let dump = owner.dump(&images)?;
        let found = open(&images, pages_id)?;
        let exists = found.is_some();
        let contents = match found {
            Some(file) => owner.contents(BufReader::new(file), dump)?,
            None => Contents::default(),
        };
        // Whether the existing records are on disk is unknown.
        Ok(Self { owner, dump, file: None, exists, contents, unsynced: exists })
    }

    /// Returns all pages that the journal names.
    pub fn pages(&self) -> &PageRanges {
        &self.contents.pages
    }

    /// Appends pages, except those that the journal names already. They are not on disk
    /// before [`Self::sync`].
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn append(&mut self, disk: &dyn Disk, pages: &PageRanges) -> Result<()> {
        let known = &self.contents.pages;
        let new = pages.iter().flat_map(|range| known.split(range).collect::<Vec<_>>());
        let new: PageRanges = new.filter(|(_, known)| !known).map(|(range, _)| range).collect();
        if new.is_empty() {
            return Ok(());
        }
        let spare = 2 * self.contents.pages.count() as u64 + SPARE_RECORDS;
        if !self.exists || self.contents.records > spare {
            self.rewrite(disk)?;
        }
        let file = self.opened(disk)?;
        let end = HEAD_BYTES + self.contents.records * RECORD_BYTES;
        // What a crash has left must not become valid.
        disk.set_len(&file, end).map_err(write_error(&self.owner.path))?;
        self.unsynced = true;
        write_records(disk, &file, &new, self.dump, self.contents.records)?;
        self.file = Some(file);
        self.contents.records += new.count() as u64;
        self.contents.pages.extend(&new);
        Ok(())
    }

    /// Waits until all appended records are on disk, seals them, and closes the file.
    ///
    /// # Errors
    /// [`ImageError::Write`]; then none of the pages may be freed.
    pub fn sync(&mut self, disk: &dyn Disk) -> Result<()> {
        if !self.unsynced {
            return Ok(());
        }
        let file = self.opened(disk)?;
        let failed = || write_error(&self.owner.path);
        disk.sync(&file).map_err(failed())?;
        let seal = Record::seal(self.dump, self.contents.records);
        let end = HEAD_BYTES + self.contents.records * RECORD_BYTES;
        disk.write_at(&file, seal.as_bytes(), end).map_err(failed())?;
        self.contents.records += 1;
        self.unsynced = false;
        Ok(())
    }

    /// Takes the open file, or opens it; the caller puts it back.
    fn opened(&mut self, disk: &dyn Disk) -> Result<DiskFile> {
        match self.file.take() {
            Some(file) => Ok(file),
            None => {
                let path = &self.owner.path;
                disk.open(path).map_err(|source| ImageError::Open { path: path.clone(), source })
            }
        }
    }

    /// Replaces the journal by one that names each page once.
    fn rewrite(&mut self, disk: &dyn Disk) -> Result<()> {
        let path = &self.owner.path;
        let dir = self.owner.dir();
        let name = format!(".{}.unfinished", Kind::Punched.file_name(self.owner.pages_id.into()));
        let unfinished = dir.join(name);
        let failed = || write_error(&unfinished);
        let file = disk.create(&unfinished).map_err(failed())?;
        let head = Head::new(self.owner.pages_id, self.dump);
        disk.write_at(&file, head.as_bytes(), 0).map_err(failed())?;
        write_records(disk, &file, &self.contents.pages, self.dump, 0)?;
        let records = self.contents.pages.count() as u64;
        let seal = Record::seal(self.dump, records);
        let end = HEAD_BYTES + records * RECORD_BYTES;
        disk.write_at(&file, seal.as_bytes(), end).map_err(failed())?;
        disk.sync(&file).map_err(failed())?;
        drop(file);
        disk.rename(&unfinished, path).map_err(write_error(path))?;
        disk.sync_dir(dir).map_err(write_error(dir))?;
        self.contents.records = records + 1;
        self.exists = true;
        // The next write opens the new file.
        self.file = None;
        Ok(())
    }
}

/// Writes a record for each range; the first has number `position`.
fn write_records(
    disk: &dyn Disk,
    file: &DiskFile,
    pages: &PageRanges,
    dump: u64,
    position: u64,
) -> Result<()> {
    let mut position = position;
    let mut batch = Vec::new();
    let mut ranges = pages.iter().peekable();
    while ranges.peek().is_some() {
        let offset = HEAD_BYTES + position * RECORD_BYTES;
        batch.clear();
        for range in ranges.by_ref().take(BATCH_RECORDS) {
            batch.extend_from_slice(Record::new(&range, dump, position).as_bytes());
            position += 1;
        }
        disk.write_at(file, &batch, offset).map_err(write_error(file.path()))?;
    }
    Ok(())
}

fn write_error(path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    |source| ImageError::Write { path, source }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "sets of ranges")]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;
    use crate::image::disk::Kernel;

    const PAGEMAP: &str = "pagemap-1.img";

    fn dump() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(PAGEMAP), "pagemap").unwrap();
        fs::write(dir.path().join("inventory.img"), "inventory").unwrap();
        dir
    }

    fn writer(dir: &Path) -> JournalWriter {
        JournalWriter::open(dir, PAGEMAP, 3).unwrap()
    }

    fn add(dir: &Path, ranges: &[Range<u64>]) {
        let mut journal = writer(dir);
        journal.append(&Kernel, &ranges.iter().cloned().collect()).unwrap();
        journal.sync(&Kernel).unwrap();
    }

    fn named(dir: &Path) -> Vec<Range<u64>> {
        read(&Directory::at(dir), PAGEMAP, 3)
            .unwrap()
            .map_or(Vec::new(), |pages| pages.iter().collect())
    }

    fn problem(dir: &Path) -> String {
        read(&Directory::at(dir), PAGEMAP, 3).unwrap_err().to_string()
    }

    #[test]
    fn a_journal_names_what_was_added_once() {
        let dir = dump();
        let dir = dir.path();
        let path = dir.join("punched-3.img");
        assert!(read(&Directory::at(dir), PAGEMAP, 3).unwrap().is_none());
        drop(writer(dir));
        assert!(!path.exists());
        add(dir, &[4..6, 9..10]);
        add(dir, &[5..8]);
        assert_eq!(named(dir), [4..8, 9..10]);
        let len = fs::metadata(&path).unwrap().len();
        add(dir, &[4..8]);
        // At most one more seal.
        assert!(fs::metadata(&path).unwrap().len() <= len + RECORD_BYTES);
        assert!(!dir.join(".punched-3.img.unfinished").exists());
    }

    #[test]
    fn a_journal_of_another_dump_is_told_from_ours() {
        let dir = dump();
        let dir = dir.path();
        add(dir, &[1..2]);
        for name in [PAGEMAP, "inventory.img"] {
            let old = fs::read(dir.join(name)).unwrap();
            fs::write(dir.join(name), "another").unwrap();
            let problem = problem(dir);
            assert!(problem.contains("punched-3.img") && problem.contains("remove"), "{problem}");
            JournalWriter::open(dir, PAGEMAP, 3).unwrap_err();
            fs::write(dir.join(name), old).unwrap();
        }
        assert_eq!(named(dir), [1..2]);
        fs::rename(dir.join("punched-3.img"), dir.join("punched-4.img")).unwrap();
        let error = read(&Directory::at(dir), PAGEMAP, 4).unwrap_err().to_string();
        assert!(error.contains("another pages file"), "{error}");
    }

    #[test]
    fn what_a_crash_leaves_of_a_batch_counts_for_nothing() {
        let dir = dump();
        let dir = dir.path();
        let path = dir.join("punched-3.img");
        add(dir, &[0..1]);
        let before = fs::metadata(&path).unwrap().len();
        let mut journal = writer(dir);
        journal.append(&Kernel, &[10..11, 20..21, 30..31].into_iter().collect()).unwrap();
        let whole = fs::read(&path).unwrap();
        let batch = usize::try_from(before).unwrap();
        assert_eq!(named(dir), [0..1, 10..11, 20..21, 30..31]);
        for end in batch..whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            let count = (end - batch) / 24;
            assert_eq!(named(dir), [0..1, 10..11, 20..21][..=count], "{end}");
        }
        // Blocks that reached the disk in another order; records behind the damage must not
        // become valid.
        let mut torn = whole.clone();
        torn[batch + 24..batch + 48].fill(0);
        fs::write(&path, torn).unwrap();
        assert_eq!(named(dir), [0..1, 10..11]);
        add(dir, &[50..51]);
        assert_eq!(named(dir), [0..1, 10..11, 50..51]);
    }

    #[test]
    fn damage_before_a_seal_is_an_error_whatever_it_hits() {
        let dir = dump();
        let dir = dir.path();
        let path = dir.join("punched-3.img");
        add(dir, &[0..1, 5..6]);
        let whole = fs::read(&path).unwrap();
        // The journal begins and ends with a seal.
        assert_eq!(whole.len(), 32 + 4 * 24);
        for at in 0..whole.len() - 24 {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            fs::write(&path, damaged).unwrap();
            assert!(problem(dir).contains("punched-3.img"), "{at}");
        }
        for len in 0..32 {
            fs::write(&path, &whole[..len]).unwrap();
            assert!(problem(dir).contains("its head is cut short"));
        }
    }

    #[test]
    fn a_journal_with_many_records_for_few_ranges_is_rewritten() {
        let dir = dump();
        let dir = dir.path();
        for page in 0..SPARE_RECORDS {
            add(dir, &[page..page + 1]);
        }
        let len = fs::metadata(dir.join("punched-3.img")).unwrap().len();
        assert!(len < HEAD_BYTES + RECORD_BYTES * (SPARE_RECORDS + 10), "{len}");
        assert_eq!(named(dir), [0..SPARE_RECORDS]);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_no_harm(tail: Vec<u8>, records: Vec<(u64, u64)>, head: bool) {
            let dir = dump();
            let path = dir.path().join("punched-3.img");
            let images = Directory::at(dir.path());
            let dump = Owner::new(&images, PAGEMAP, 3).dump(&images).unwrap();
            let mut bytes = Vec::new();
            if head {
                bytes.extend_from_slice(Head::new(3, dump).as_bytes());
                for (position, (first, pages)) in (0..).zip(records) {
                    let mut record = Record::seal(dump, position);
                    record.first = first.into();
                    record.pages = pages.into();
                    record.checksum = record.sum(dump, position).into();
                    bytes.extend_from_slice(record.as_bytes());
                }
            }
            bytes.extend(tail);
            fs::write(path, bytes).unwrap();
            let _ = read(&images, PAGEMAP, 3);
        }
    }
}
