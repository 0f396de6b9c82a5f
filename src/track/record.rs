//! What a dump leaves for the next one about tracked shared memory: text in a sealed memfd,
//! which the keepers hold.
//!
//! ```text
//! rcriu shared memory 1
//! process PID BORN COUNT
//! object MAJOR MINOR INODE BYTES
//! map PID START END OFFSET
//! ```
//!
//! Processes come first. Each object is followed by the mappings through which the tree can
//! write to it. All numbers are decimal; `BORN` is in kernel clock ticks.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt},
    },
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    libc,
    sys::stat::{major, minor},
};

use crate::{proc::Mapping, sys::fds, units::HostPid};

/// The first line; the number is the version of the format.
const HEAD: &str = "rcriu shared memory 1";

/// The longest accepted record, in bytes: far more than the mappings of a tree need.
const RECORD_BYTES: u64 = 64 << 20;

/// The identity of an object of shared memory. System V segments have ids of their own,
/// which may equal inode numbers of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    major: u64,
    minor: u64,
    inode: u64,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shared memory {}", self.inode)
    }
}

impl Key {
    /// Returns the object of a mapping.
    pub fn of_mapping(mapping: &Mapping) -> Self {
        let (major, minor) = (mapping.dev_major.into(), mapping.dev_minor.into());
        Self { major, minor, inode: mapping.inode }
    }

    /// Returns the object of an open file.
    pub fn of_file(metadata: &std::fs::Metadata) -> Self {
        let device = metadata.dev();
        Self { major: major(device), minor: minor(device), inode: metadata.ino() }
    }
}

/// A process that can write to some of the objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Writer {
    /// When it started, which identifies it among processes of this pid.
    pub(super) born: u64,
    /// The sum of the keeper's counters at the snapshot.
    pub(super) count: u64,
}

/// A mapping of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) pid: HostPid,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) offset: u64,
}

impl Place {
    pub(super) fn of(pid: HostPid, mapping: &Mapping) -> Self {
        Self { pid, start: mapping.start.0, end: mapping.end.0, offset: mapping.offset }
    }
}

/// A tracked object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tracked {
    /// Its length.
    pub(super) bytes: u64,
    pub(super) places: Vec<Place>,
}

/// All tracked objects and their writers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) writers: BTreeMap<HostPid, Writer>,
    pub(super) objects: BTreeMap<Key, Tracked>,
}

impl Record {
    fn text(&self) -> String {
        let mut text = format!("{HEAD}\n");
        let mut line = |line: std::fmt::Arguments| {
            text.write_fmt(line).expect("strings can be written to");
            text.push('\n');
        };
        for (pid, Writer { born, count }) in &self.writers {
            line(format_args!("process {pid} {born} {count}"));
        }
        for (Key { major, minor, inode }, Tracked { bytes, places }) in &self.objects {
            line(format_args!("object {major} {minor} {inode} {bytes}"));
            for Place { pid, start, end, offset } in places {
                line(format_args!("map {pid} {start} {end} {offset}"));
            }
        }
        text
    }

    /// Parses a record; `None` if the text is not of this format.
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        if lines.next() != Some(HEAD) {
            return None;
        }
        let mut record = Self::default();
        let mut object = None;
        for line in lines {
            let mut words = line.split(' ');
            let kind = words.next()?;
            let numbers: Option<Vec<u64>> = words.map(|word| word.parse().ok()).collect();
            let pid = |pid: u64| i32::try_from(pid).ok().map(HostPid);
            match (kind, numbers?.as_slice()) {
                ("process", &[number, born, count]) => {
                    record.writers.insert(pid(number)?, Writer { born, count });
                }
                ("object", &[major, minor, inode, bytes]) => {
                    let key = Key { major, minor, inode };
                    record.objects.insert(key, Tracked { bytes, places: Vec::new() });
                    object = Some(key);
                }
                ("map", &[number, start, end, offset]) => {
                    let place = Place { pid: pid(number)?, start, end, offset };
                    record.objects.get_mut(&object?)?.places.push(place);
                }
                _ => return None,
            }
        }
        Some(record)
    }

    /// Writes the record to a new memfd that no process can change.
    ///
    /// # Errors
    /// What making, writing and sealing the memfd returns.
    pub(super) fn seal(&self) -> io::Result<OwnedFd> {
        let mut file = File::from(fds::memfd(c"rcriu-keep", libc::MFD_ALLOW_SEALING)?);
        file.write_all(self.text().as_bytes())?;
        let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
        fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
        Ok(file.into())
    }

    /// Reads a record.
    ///
    /// # Errors
    /// What reading returns; `InvalidData` for another format, such as that of another
    /// version of this program.
    pub(super) fn read(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let len = file.metadata()?.len();
        if len > RECORD_BYTES {
            return Err(invalid());
        }
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| invalid())?];
        file.read_exact_at(&mut bytes, 0)?;
        let text = String::from_utf8(bytes).map_err(|_| invalid())?;
        Self::parse(&text).ok_or_else(invalid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Record {
        let place =
            |pid, start| Place { pid: HostPid(pid), start, end: start + 8192, offset: 4096 };
        let object = |bytes, places| Tracked { bytes, places };
        Record {
            writers: [7, 9].map(|pid| (HostPid(pid), Writer { born: 100, count: 3 })).into(),
            objects: [
                (Key { major: 0, minor: 1, inode: 20 }, object(8192, vec![place(7, 1 << 40)])),
                (Key { major: 0, minor: 1, inode: 30 }, object(0, vec![place(7, 0), place(9, 0)])),
            ]
            .into(),
        }
    }

    #[test]
    fn a_record_comes_back() {
        let record = example();
        assert_eq!(Record::read(record.seal().unwrap()).unwrap(), record);
        assert_eq!(Record::parse(&Record::default().text()), Some(Record::default()));
    }

    #[test]
    fn what_is_no_record_is_not_taken_for_one() {
        let text = example().text();
        for (good, bad) in [
            ("memory 1", "memory 2"),
            ("process 7", "process 4294967303"),
            ("process 7", "process x"),
            ("map", "mop"),
            ("map 7", "map 7 7"),
            ("object 0 1 20 8192\n", ""),
            ("object 0 1 20 8192\n", "object 0 1 20\n"),
        ] {
            assert!(text.contains(good), "{good}");
            assert_eq!(Record::parse(&text.replacen(good, bad, 1)), None, "{bad}");
        }
    }

    #[test]
    fn nobody_changes_a_record() {
        let file = File::from(example().seal().unwrap());
        assert!(file.write_at(b"x", 0).is_err());
        assert!(file.set_len(3).is_err());
    }
}
