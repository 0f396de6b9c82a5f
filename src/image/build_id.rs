//! Build-ids, which distinguish builds of a program or library (`reg_file_entry.build_id`).
//!
//! The search is that of CRIU 4.2 (`get_build_id`, `criu/files-reg.c`), so that each
//! program finds the build-id that the other has recorded: the first note of the right
//! type, whatever its owner field says, within the first MiB of the file.

use std::{fs::File, io, os::unix::fs::FileExt};

use object::{
    Endianness,
    elf::{ELFMAG, FileHeader32, FileHeader64, NT_GNU_BUILD_ID, PT_NOTE},
    read::elf::{FileHeader, ProgramHeader},
};

/// How much of a file is searched (`BUILD_ID_MAP_SIZE`).
const SEARCH_BYTES: usize = 1 << 20;

/// How much is read first; that is enough for most files.
const FIRST_BYTES: usize = 4096;

/// The longest build-id that is recorded (`get_build_id_64`).
const LIMIT_BYTES: usize = 512;

/// The most note segments that are searched; real files have two or three.
const SEGMENT_LIMIT: usize = 64;

/// Returns the build-id of an open file; `None` if the file is not ELF or has no build-id.
///
/// # Errors
/// What `pread(2)` returns.
pub fn read(file: &File) -> io::Result<Option<Vec<u8>>> {
    let (mut bytes, mut wanted) = (Vec::new(), FIRST_BYTES);
    loop {
        let start = bytes.len();
        bytes.resize(wanted, 0);
        let more = fill(file, &mut bytes[start..], start as u64)?;
        bytes.truncate(start + more);
        match search(&bytes) {
            Search::Found(id) => return Ok(Some(id)),
            Search::Beyond(needed) if bytes.len() == wanted => wanted = needed,
            Search::Nothing | Search::Beyond(_) => return Ok(None),
        }
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// The result of a search in the beginning of a file.
enum Search {
    Found(Vec<u8>),
    Nothing,
    /// The search needs this many bytes.
    Beyond(usize),
}

fn search(bytes: &[u8]) -> Search {
    if !bytes.starts_with(&ELFMAG) {
        return Search::Nothing;
    }
    search_class::<FileHeader64<Endianness>>(bytes)
        .or_else(|| search_class::<FileHeader32<Endianness>>(bytes))
        .unwrap_or(Search::Nothing)
}

/// Searches an ELF file of one class; `None` if the file is of the other class, or not
/// valid.
fn search_class<E: FileHeader<Endian = Endianness>>(bytes: &[u8]) -> Option<Search> {
    let header = E::parse(bytes).ok()?;
    let endian = header.endian().ok()?;
    let end = |start: u64, len: u64| usize::try_from(start.checked_add(len)?).ok();
    let count = u64::from(header.e_phnum(endian));
    let table = end(header.e_phoff(endian).into(), count * size_of::<E::ProgramHeader>() as u64);
    let table = table.filter(|end| *end <= SEARCH_BYTES)?;
    if table > bytes.len() {
        return Some(Search::Beyond(table));
    }
    let segments = header.program_headers(endian, bytes).ok()?;
    let notes = segments.iter().filter(|segment| segment.p_type(endian) == PT_NOTE);
    for segment in notes.take(SEGMENT_LIMIT) {
        let range = end(segment.p_offset(endian).into(), segment.p_filesz(endian).into());
        // A segment behind the searched part is not an error.
        let Some(range) = range.filter(|end| *end <= SEARCH_BYTES) else { continue };
        if range > bytes.len() {
            return Some(Search::Beyond(range));
        }
        let Ok(Some(mut notes)) = segment.notes(endian, bytes) else { continue };
        while let Ok(Some(note)) = notes.next() {
            let id = note.desc();
            if note.n_type(endian) == NT_GNU_BUILD_ID {
                let usable = (1..=LIMIT_BYTES).contains(&id.len());
                return Some(if usable { Search::Found(id.to_vec()) } else { Search::Nothing });
            }
        }
    }
    Some(Search::Nothing)
}

/// Converts a build-id to the form in images: 32-bit words, the last padded with zeros.
pub fn to_words(id: &[u8]) -> Vec<u32> {
    let word = |bytes: &[u8]| {
        let mut word = [0; size_of::<u32>()];
        word[..bytes.len()].copy_from_slice(bytes);
        u32::from_le_bytes(word)
    };
    id.chunks(size_of::<u32>()).map(word).collect()
}

/// Whether a build-id equals the one that images have as `words`.
pub fn is_same(id: Option<&[u8]>, words: &[u32]) -> bool {
    id.is_some_and(|id| to_words(id) == words)
}

/// Converts a time to the form in images (`rcriu_mtime_ns`).
pub fn time_ns(seconds: i64, nanoseconds: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

/// Returns a recorded build-id in hexadecimal. If its length was not a multiple of 4, it
/// ends with zeros.
pub fn show(words: &[u32]) -> String {
    words.iter().flat_map(|word| word.to_le_bytes()).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A 64-bit ELF file with one note segment at `at`, which holds a note of another type
    /// and a build-id.
    fn elf(at: u64, id: &[u8]) -> Vec<u8> {
        let mut notes = Vec::new();
        for (kind, desc) in [(1_u32, &b"abc"[..]), (NT_GNU_BUILD_ID.0, id)] {
            for number in [4, u32::try_from(desc.len()).unwrap(), kind] {
                notes.extend(number.to_le_bytes());
            }
            notes.extend(b"GNU\0");
            notes.extend(desc);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
        bytes.resize(16, 0);
        bytes.extend(3_u16.to_le_bytes());
        bytes.extend(62_u16.to_le_bytes());
        bytes.extend(1_u32.to_le_bytes());
        for offset in [0_u64, 64, 0] {
            bytes.extend(offset.to_le_bytes());
        }
        bytes.extend(0_u32.to_le_bytes());
        for number in [64_u16, 56, 1, 64, 0, 0] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(PT_NOTE.0.to_le_bytes());
        bytes.extend(4_u32.to_le_bytes());
        let len = notes.len() as u64;
        for number in [at, 0, 0, len, len, 4] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.resize(usize::try_from(at).unwrap().max(bytes.len()), 0);
        bytes.extend(notes);
        bytes
    }

    #[test]
    fn the_build_id_is_found_within_the_first_mebibyte() {
        let id: Vec<u8> = (1..=20).collect();
        for at in [120, 3000, 4090, 100_000, (1 << 20) - 60] {
            assert_eq!(read(&file(&elf(at, &id))).unwrap().as_ref(), Some(&id), "{at}");
        }
        assert_eq!(read(&file(&elf(1 << 20, &id))).unwrap(), None);
        assert_eq!(read(&file(&elf(120, &[]))).unwrap(), None);
        assert_eq!(read(&file(&elf(120, &[1; 513]))).unwrap(), None);
        for other in [&b""[..], b"\x7fELF", b"#!/bin/sh\n", &elf(120, &id)[..70]] {
            assert_eq!(read(&file(other)).unwrap(), None);
        }
    }

    #[test]
    fn words_are_filled_with_zeros() {
        let words = to_words(&[1, 2, 3, 4, 5]);
        assert_eq!(words, [0x0403_0201, 5]);
        assert_eq!(show(&words), "0102030405000000");
        assert!(is_same(Some(&[1, 2, 3, 4, 5]), &words));
        assert!(!is_same(Some(&[1, 2, 3, 4]), &words) && !is_same(None, &words));
    }

    proptest! {
        #[test]
        fn hostile_files_do_no_harm(
            at in 0_u64..5000,
            damage in prop::collection::vec((0_usize..200, any::<u8>()), 0..12),
        ) {
            let mut bytes = elf(at, &[7; 20]);
            for (position, byte) in damage {
                if let Some(place) = bytes.get_mut(position) {
                    *place = byte;
                }
            }
            let _ = read(&file(&bytes));
        }
    }
}
