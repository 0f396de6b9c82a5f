//! Contents of files that images hold: deleted files, data queued in pipes, sockets and terminals, and
//! the files of a tmpfs.
//!
//! ```text
//! files/deleted/PATH        a ghost file
//! files/pipes/ID            bytes in a pipe; links of descriptors show the same number
//! files/sockets/INODE-N     the Nth packet or piece in the queue of a socket
//! files/terminals/ID        bytes in a terminal
//! files/tmpfs/PATH          a file of a tmpfs, by the path that the processes saw
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use nix::libc;

use super::{
    NodeType, Result, Tables,
    address_space::extent_runs,
    mapped::{FileExtent, ghost},
    shortened,
    tmpfs::Systems,
};
use crate::{
    chain::{self, Content, FileId, Run},
    image::{ImageError, Kind, proto, store::Inode},
};

/// The largest possible file size (`MAX_LFS_FILESIZE`).
const LONGEST: u64 = i64::MAX.cast_unsigned();

/// The files, by their paths below `files`.
#[derive(Debug, Default)]
pub(super) struct Held {
    files: BTreeMap<String, Place>,
    systems: Systems,
}

/// Where the contents of a file are.
#[derive(Clone, Debug)]
enum Place {
    /// In the ghost image with this number.
    Ghost(u32),
    /// In one piece in an image of this kind.
    Bytes { kind: Kind, offset: u64, len: u64 },
}

/// An entry of a directory below `files`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) kind: NodeType,
    /// The path of the same file under another name, which represents all its names.
    pub(super) first: Option<String>,
}

impl Entry {
    /// Returns an entry that is the only name of a file.
    pub(super) fn of(kind: NodeType) -> Self {
        Self { kind, first: None }
    }
}

/// The directory with the files of tmpfs.
pub(super) const TMPFS: &str = "tmpfs/";

impl Held {
    /// Finds the files in the images, without reading their contents.
    pub(super) fn load(tables: &Tables) -> Result<Self> {
        let mut held = Self { systems: Systems::load(tables)?, ..Self::default() };
        held.add_deleted(tables)?;
        for kind in [Kind::PipesData, Kind::FifoData] {
            held.add_pipes(tables, kind)?;
        }
        held.add_packets(tables)?;
        held.add_terminals(tables)?;
        Ok(held)
    }

    /// Returns the entries of the directory `path`, which is empty or ends with a slash.
    ///
    /// # Errors
    /// [`super::ViewError::Tmpfs`].
    pub(super) fn children(&self, tables: &Tables, path: &str) -> Result<BTreeMap<String, Entry>> {
        if let Some(path) = path.strip_prefix(TMPFS) {
            let mut children = self.systems.children(tables, path)?;
            for entry in children.values_mut() {
                entry.first = entry.first.take().map(|first| format!("{TMPFS}{first}"));
            }
            return Ok(children);
        }
        let inside = self.files.range(path.to_owned()..).map(|(name, _)| name);
        let inside = inside.map_while(|name| name.strip_prefix(path));
        let entry = |rest: &str| match rest.split_once('/') {
            Some((name, _)) => (name.to_owned(), Entry::of(NodeType::Directory)),
            None => (rest.to_owned(), Entry::of(NodeType::File)),
        };
        let mut children: BTreeMap<String, Entry> = inside.map(entry).collect();
        if path.is_empty() && !self.systems.is_empty() {
            let name = TMPFS.trim_end_matches('/').to_owned();
            children.insert(name, Entry::of(NodeType::Directory));
        }
        Ok(children)
    }

    /// Returns the contents of a file.
    pub(super) fn open(&self, tables: &Tables, path: &str) -> Result<Arc<dyn Content>> {
        if let Some(path) = path.strip_prefix(TMPFS) {
            return self.systems.open(tables, path);
        }
        let files = tables.chain().files();
        let (len, extents) = match self.files.get(path) {
            Some(Place::Ghost(number)) => {
                let extents = ghost(files, tables.images(), *number)?.unwrap_or_default();
                let end = extents.last().map_or(0, |extent| extent.end);
                let size = ghost_entry(tables, *number)?.and_then(|entry| entry.size);
                (size.unwrap_or(end).clamp(end, LONGEST.max(end)), extents)
            }
            Some(Place::Bytes { kind, offset, len }) => {
                let file = files.enter(tables.images(), &kind.file_name(0));
                let extent = FileExtent { start: 0, end: *len, file, at: *offset };
                (*len, vec![extent])
            }
            None => (0, Vec::new()),
        };
        // Open the images now, so that a failure is reported by open, not by a later read.
        let ids: BTreeSet<FileId> = extents.iter().map(|extent| extent.file).collect();
        for id in ids {
            files.get(id)?;
        }
        Ok(Arc::new(Pieces { chain: Arc::clone(tables.chain()), extents, len }))
    }

    /// Returns the target of a symbolic link.
    pub(super) fn target(&self, tables: &Tables, path: &str) -> Result<String> {
        self.systems.target(tables, path.strip_prefix(TMPFS).unwrap_or(path))
    }

    /// Calls `look` with what the images say about a file or directory of a tmpfs; `None` if they say
    /// nothing.
    pub(super) fn inode<T>(
        &self,
        tables: &Tables,
        path: &str,
        look: impl FnOnce(&Inode) -> T,
    ) -> Result<Option<T>> {
        match path.strip_prefix(TMPFS) {
            Some(path) => self.systems.inode(tables, path, look),
            None => Ok(None),
        }
    }

    /// Adds a file, under a different name if this one is taken.
    fn add(&mut self, path: String, place: Place) {
        let mut name = path.clone();
        let mut number = 2;
        while self.files.contains_key(&name) {
            name = format!("{path}.{number}");
            number += 1;
        }
        self.files.insert(name, place);
    }

    fn add_deleted(&mut self, tables: &Tables) -> Result<()> {
        let files = tables.files()?;
        let mut seen = BTreeSet::new();
        for (file, number) in files.ghosts() {
            let Some(entry) = ghost_entry(tables, number)? else { continue };
            // FIFOs, directories and others have no contents. Several names may share an image.
            let regular = entry.mode & libc::S_IFMT == libc::S_IFREG;
            let name = files.entry(file).and_then(|entry| entry.reg.as_ref());
            if let Some(reg) = name.filter(|_| regular)
                && seen.insert((number, reg.name.clone()))
            {
                self.add(format!("deleted{}", printable(&reg.name)), Place::Ghost(number));
            }
        }
        Ok(())
    }

    fn add_pipes(&mut self, tables: &Tables, kind: Kind) -> Result<()> {
        each(tables, kind, |entry: proto::PipeDataEntry, offset| {
            let len = entry.bytes.into();
            if len > 0 {
                let place = Place::Bytes { kind, offset, len };
                self.add(format!("pipes/{}", entry.pipe_id), place);
            }
            len
        })
    }

    fn add_packets(&mut self, tables: &Tables) -> Result<()> {
        let files = tables.files()?;
        let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
        let kind = Kind::SkQueues;
        each(tables, kind, |entry: proto::SkPacketEntry, offset| {
            let len = entry.length.into();
            let socket = files.entry(entry.id_for).and_then(|entry| entry.usk.as_ref());
            let socket = socket.map_or(entry.id_for, |socket| socket.ino);
            let number = counts.entry(socket).or_default();
            let place = Place::Bytes { kind, offset, len };
            self.add(format!("sockets/{socket}-{number}"), place);
            *number += 1;
            len
        })
    }

    fn add_terminals(&mut self, tables: &Tables) -> Result<()> {
        let kind = Kind::TtyData;
        each(tables, kind, |entry: proto::TtyDataEntry, end| {
            let len = entry.data.len() as u64;
            // The contents are the last field of the message.
            let place = Place::Bytes { kind, offset: end.saturating_sub(len), len };
            self.add(format!("terminals/{}", entry.tty_id), place);
            0
        })
    }
}

/// Calls `found` with each message of an image, and with the offset after it. `found` returns how many
/// bytes of payload follow there.
fn each<M: prost::Message + prost::Name + Default>(
    tables: &Tables,
    kind: Kind,
    mut found: impl FnMut(M, u64) -> u64,
) -> Result<()> {
    let mut reader = match tables.images().image(kind, 0) {
        Ok(reader) => reader,
        Err(error) if error.is_missing() => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let mut all = || -> std::result::Result<(), ImageError> {
        while let Some(message) = reader.next_message::<M>()? {
            let len = found(message, reader.offset());
            reader.skip(len, "queued data")?;
        }
        Ok(())
    };
    Ok(all()?)
}

fn ghost_entry(tables: &Tables, number: u32) -> Result<Option<proto::GhostFileEntry>> {
    let mut reader = match tables.images().image(Kind::GhostFile, number.into()) {
        Ok(reader) => reader,
        Err(error) if error.is_missing() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(reader.next_message()?)
}

/// Returns a path that a view can show: absolute, without `.` and `..`, in UTF-8, and without overlong
/// components.
pub(super) fn printable(path: &[u8]) -> String {
    /// `NAME_MAX`, minus room for a suffix.
    const LIMIT: usize = 240;
    let path = String::from_utf8_lossy(path);
    let parts = path.split('/').filter(|part| !["", ".", ".."].contains(part));
    let parts = parts.map(|part| {
        let part: String = part.chars().map(|c| if c == '\0' { '?' } else { c }).collect();
        format!("/{}", shortened(&part, LIMIT))
    });
    let path: String = parts.collect();
    if path.is_empty() { "/unnamed".to_owned() } else { path }
}

/// Ranges of files, with holes in between.
#[derive(Debug)]
struct Pieces {
    chain: Arc<chain::Chain>,
    extents: Vec<FileExtent>,
    len: u64,
}

impl Content for Pieces {
    fn len(&self) -> u64 {
        self.len
    }

    fn allocated(&self) -> u64 {
        self.extents.iter().map(|extent| extent.end - extent.start).sum()
    }

    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> chain::Result<()> {
        extent_runs(&self.extents, self.chain.files(), offset..offset + len, runs)
    }
}
