//! The members of a tar archive by directory, from one pass over its headers.
//!
//! The crate `tar`, which reads archives as streams, decodes the headers. This module reads only
//! headers, at any offset, so that members can be read in place later. It trusts no length and no
//! name.

use std::{borrow::Cow, collections::BTreeMap, str, time::SystemTime};

use tar::{EntryType, Header};

use super::{
    ArchiveError,
    error::Result,
    inode::{self, Inode, Inodes},
    records::Records,
    slice::{Body, read_full},
    sparse::{Map, Numbers},
};
use crate::image::{PARENT_LINK, desc, store::StoredFile};

/// Bytes in a block of a tar archive.
pub(super) const BLOCK: u64 = 512;

/// [`BLOCK`], for slices.
pub(super) const BLOCK_BYTES: usize = 512;

/// The longest name that is read: as long as a path can be (`PATH_MAX`, `linux/limits.h`).
const NAME_BYTES: u64 = 4096;

/// The longest component of a name (`NAME_MAX`, `linux/limits.h`).
const COMPONENT_BYTES: usize = 255;

/// The longest block of pax records that is read. Extended attributes are in them, too.
const PAX_BYTES: u64 = 1 << 20;

/// The most members and directories in an archive; chains of 10,000 snapshots have fewer.
const MEMBERS: usize = 1 << 20;

/// The most bytes in all paths of members and directories and all targets of links together.
const PATHS_BYTES: usize = 1 << 26;

/// The most extents in all sparse members of an archive together.
const EXTENTS: usize = 1 << 22;

/// A file in an archive.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) body: Body,
    pub(super) modified: SystemTime,
}

/// An entry of a directory in an archive.
#[derive(Clone, Debug)]
pub(super) enum Node {
    File(Member),
    Folder,
    /// A symbolic link, and where it leads.
    Link(String),
    Pipe,
    CharDevice,
    BlockDevice,
}

/// A directory of an archive.
pub(super) type Folder = BTreeMap<String, Node>;

/// All directories of an archive by their paths; the root has an empty one.
#[derive(Debug)]
pub(super) struct Members {
    folders: BTreeMap<String, Folder>,
    members: usize,
    paths_bytes: usize,
    extents: usize,
    rules: Rules,
    /// Those of a file system; otherwise empty.
    inodes: Inodes,
}

/// The members that an archive may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rules {
    /// Those of a checkpoint: only files, directories and symbolic links, with names and targets
    /// that stay inside.
    Checkpoint,
    /// Those of any file system. Links may lead anywhere, because they are only shown.
    FileSystem,
}

impl Members {
    /// Reads all headers of an archive.
    ///
    /// # Errors
    /// A member that the rules do not allow.
    pub(super) fn read(archive: &dyn StoredFile, rules: Rules) -> Result<Self> {
        let failed = |source| ArchiveError::Read { offset: 0, source };
        let end = archive.stat().map_err(failed)?.len;
        let mut members = Self {
            folders: BTreeMap::from([(String::new(), Folder::new())]),
            members: 0,
            paths_bytes: 0,
            extents: 0,
            rules,
            inodes: Inodes::default(),
        };
        let mut records = Records::default();
        let mut at = 0;
        loop {
            let Some(header) = header(archive, at, end)? else { return Ok(members) };
            let bad = |problem| ArchiveError::Header { offset: at, problem };
            let kind = header.entry_type();
            let is_meta = kind.is_gnu_longname()
                || kind.is_gnu_longlink()
                || kind.is_pax_local_extensions()
                || kind.is_pax_global_extensions();
            let mut size = header.entry_size().map_err(|_| bad("its size is no number"))?;
            if let Some(larger) = records.size.filter(|_| !is_meta) {
                size = larger;
            }
            // The header of a link or directory may have a length without data that follow.
            if kind.is_hard_link() || kind.is_symlink() || kind.is_dir() {
                size = 0;
            }
            let data = at + BLOCK;
            let next = size
                .checked_next_multiple_of(BLOCK)
                .and_then(|padded| data.checked_add(padded))
                .ok_or_else(|| bad("its size is beyond all files"))?;
            if is_meta {
                let limit = if kind.is_gnu_longname() || kind.is_gnu_longlink() {
                    NAME_BYTES + 1
                } else {
                    PAX_BYTES
                };
                if size > limit {
                    return Err(bad("a name or the records before a member are too long"));
                }
                let bytes = bytes_at(archive, data, size, end)?;
                records.take(kind, bytes).map_err(bad)?;
                at = next;
                continue;
            }
            let entry = Entry { header: &header, at, data, size, archive, end };
            at = members.enter(&entry, std::mem::take(&mut records))?.unwrap_or(next);
        }
    }

    /// Returns a directory.
    pub(super) fn folder(&self, path: &str) -> Option<&Folder> {
        self.folders.get(path)
    }

    /// Returns a file or directory of a file system, if the archive describes it: not all archives
    /// have members for all their directories.
    pub(super) fn inode(&self, path: &str) -> Option<&Inode> {
        self.inodes.get(path)
    }

    /// Returns all directories by their paths.
    pub(super) fn folders(&self) -> impl Iterator<Item = (&str, &Folder)> {
        self.folders.iter().map(|(path, folder)| (path.as_str(), folder))
    }

    /// Adds a member; returns the offset of the next header if the member's size does not
    /// determine it.
    fn enter(&mut self, entry: &Entry, records: Records) -> Result<Option<u64>> {
        let name = records.sparse_name.as_deref().or(records.path.as_deref());
        let name = name.map_or_else(|| entry.header.path_bytes().into_owned(), <[u8]>::to_owned);
        let kind = entry.header.entry_type();
        let is_folder = kind.is_dir() || is_file(kind) && name.ends_with(b"/");
        let shown = || String::from_utf8_lossy(&name).into_owned();
        let bad = |problem| ArchiveError::Name { member: shown(), offset: entry.at, problem };
        let path = self.text(&name).ok_or_else(|| bad("its name is not UTF-8"))?;
        let path = &*path;
        let parts = parts(path).map_err(bad)?;
        self.count_path(path.len())?;
        if is_folder {
            self.make_folders(&parts, entry.at)?;
            self.describe(parts.join("/"), entry, records)?;
            return Ok(None);
        }
        let Some((last, above)) = parts.split_last() else {
            return Err(bad("it has no name"));
        };
        let (node, next) = self.node(entry, &records, &shown(), above, last)?;
        self.make_folders(above, entry.at)?;
        let folder = self.folders.entry(above.join("/")).or_default();
        if folder.insert((*last).to_owned(), node).is_some() {
            return Err(ArchiveError::Twice { member: shown(), offset: entry.at });
        }
        self.describe(parts.join("/"), entry, records)?;
        Ok(next)
    }

    /// Keeps what the archive of a file system says about a member.
    fn describe(&mut self, path: String, entry: &Entry, records: Records) -> Result<()> {
        if self.rules != Rules::FileSystem {
            return Ok(());
        }
        if entry.header.entry_type().is_hard_link() {
            let target = entry.target(&records);
            let target = self.text(&target).map(Cow::into_owned).unwrap_or_default();
            let target = parts(&target).unwrap_or_default().join("/");
            self.inodes.link(path, &target);
            return Ok(());
        }
        let bad = |problem| ArchiveError::Header { offset: entry.at, problem };
        let inode = Inode::of(path, entry.header, records).map_err(bad)?;
        if self.inodes.add(inode) > inode::XATTRS_BYTES {
            let what = "bytes in extended attributes";
            return Err(ArchiveError::TooMany { what, limit: inode::XATTRS_BYTES });
        }
        Ok(())
    }

    fn make_folders(&mut self, parts: &[&str], offset: u64) -> Result<()> {
        let mut above = String::new();
        for part in parts {
            let folder = self.folders.entry(above.clone()).or_default();
            let node = folder.entry((*part).to_owned()).or_insert(Node::Folder);
            if !above.is_empty() {
                above.push('/');
            }
            above.push_str(part);
            if !matches!(node, Node::Folder) {
                return Err(ArchiveError::Twice { member: above, offset });
            }
            if !self.folders.contains_key(&above) {
                self.count_path(above.len())?;
                self.folders.insert(above.clone(), Folder::new());
            }
        }
        Ok(())
    }

    fn node(
        &mut self,
        entry: &Entry,
        records: &Records,
        name: &str,
        above: &[&str],
        last: &str,
    ) -> Result<(Node, Option<u64>)> {
        let kind = entry.header.entry_type();
        let odd = |what: &str| ArchiveError::Type {
            member: name.to_owned(),
            offset: entry.at,
            what: what.to_owned(),
        };
        let modified = records.modified.unwrap_or_else(|| inode::modified(entry.header));
        if is_file(kind) {
            if records.sparse_inline {
                let problem = "its map is of an old format\nhelp: make the archive with GNU tar";
                return Err(ArchiveError::Sparse { member: name.to_owned(), problem });
            }
            let body = if records.sparse_major.is_some() {
                self.pax_map(entry, records, name)?
            } else {
                entry.require(name, entry.data, entry.size)?;
                Body::Dense { offset: entry.data, len: entry.size }
            };
            return Ok((Node::File(Member { body, modified }), None));
        }
        if kind.is_gnu_sparse() {
            let (body, next) = self.gnu_map(entry, name)?;
            return Ok((Node::File(Member { body, modified }), Some(next)));
        }
        if kind.is_symlink() {
            let target = entry.target(records);
            if target.len() as u64 > NAME_BYTES {
                return Err(odd("a symbolic link whose target is too long"));
            }
            self.paths_bytes += target.len();
            let target = self.text(&target).map(Cow::into_owned);
            let target = target.ok_or_else(|| odd("a symbolic link whose target is not UTF-8"))?;
            if self.rules == Rules::FileSystem {
                return Ok((Node::Link(target), None));
            }
            // The target of `parent` may be in another archive.
            if last != PARENT_LINK && resolve(above, &target).is_none() {
                let what = format!("a symbolic link that leads out of the archive, to {target:?}");
                return Err(odd(&what));
            }
            if last != PARENT_LINK && desc::by_file_name(last).is_some() {
                return Err(odd("a symbolic link, and not an image"));
            }
            return Ok((Node::Link(target), None));
        }
        if self.rules == Rules::FileSystem {
            return match kind {
                EntryType::Link => {
                    let found = self.linked(&entry.target(records));
                    let found = found.ok_or_else(|| odd("a hard link to no member before it"))?;
                    Ok((found, None))
                }
                EntryType::Fifo => Ok((Node::Pipe, None)),
                EntryType::Char => Ok((Node::CharDevice, None)),
                EntryType::Block => Ok((Node::BlockDevice, None)),
                _ => Err(odd("of a type that is not read")),
            };
        }
        Err(match kind {
            EntryType::Link => {
                odd("a hard link, which is not followed\nhelp: make the archive with tar \
                 --hard-dereference")
            }
            EntryType::Char | EntryType::Block => odd("a device, which is no part of a checkpoint"),
            EntryType::Fifo => odd("a FIFO, which is no part of a checkpoint"),
            _ => odd("of a type that is not read"),
        })
    }

    /// Returns a name as text; `None` if it is none. In names of a file system, bytes that are not
    /// UTF-8 are shown as `\\xff`.
    fn text<'a>(&self, name: &'a [u8]) -> Option<Cow<'a, str>> {
        match str::from_utf8(name) {
            Ok(text) => Some(text.into()),
            Err(_) if self.rules == Rules::Checkpoint => None,
            Err(_) => {
                let mut text = String::new();
                for chunk in name.utf8_chunks() {
                    text.push_str(chunk.valid());
                    text.extend(chunk.invalid().escape_ascii().map(char::from));
                }
                Some(text.into())
            }
        }
    }

    /// Returns the target of a hard link: an earlier member that is no directory.
    fn linked(&self, target: &[u8]) -> Option<Node> {
        let path = self.text(target)?;
        let parts = parts(&path).ok()?;
        let (last, above) = parts.split_last()?;
        let node = self.folders.get(&above.join("/"))?.get(*last)?;
        (!matches!(node, Node::Folder)).then(|| node.clone())
    }

    /// Reads the map of a sparse member as GNU tar writes it by itself.
    fn gnu_map(&mut self, entry: &Entry, name: &str) -> Result<(Body, u64)> {
        let bad = |problem| ArchiveError::Sparse { member: name.to_owned(), problem };
        let header = entry.header.as_gnu().ok_or_else(|| bad("its header is not GNU tar's"))?;
        let len = header.real_size().map_err(|_| bad("its length is no number"))?;
        let mut map = Map::new(len, entry.size);
        map.take(&header.sparse, name)?;
        let (mut more, mut data) = (header.is_extended(), entry.data);
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            let bytes = bytes_at(entry.archive, data, BLOCK, entry.end)?;
            block.as_mut_bytes().copy_from_slice(&bytes);
            self.count_extents(block.sparse.len())?;
            map.take(&block.sparse, name)?;
            more = block.is_extended();
            data += BLOCK;
        }
        let padded = entry.size.checked_next_multiple_of(BLOCK);
        let next = padded.and_then(|padded| data.checked_add(padded));
        let next = next.ok_or_else(|| bad("its size is beyond all files"))?;
        entry.require(name, data, entry.size)?;
        Ok((map.body(data, name)?, next))
    }

    /// Reads the map of a sparse member from its data (GNU sparse format 1.0).
    fn pax_map(&mut self, entry: &Entry, records: &Records, name: &str) -> Result<Body> {
        let bad = |problem| ArchiveError::Sparse { member: name.to_owned(), problem };
        if (records.sparse_major, records.sparse_minor) != (Some(1), Some(0)) {
            return Err(bad("its map is of an unknown version; expected 1.0"));
        }
        let len = records.sparse_size.ok_or_else(|| bad("its length is missing"))?;
        entry.require(name, entry.data, entry.size)?;
        let mut numbers = Numbers::new(entry);
        let count = numbers.next().map_err(bad)?;
        let mut found = Vec::new();
        for _ in 0..count {
            self.count_extents(1)?;
            found.push((numbers.next().map_err(bad)?, numbers.next().map_err(bad)?));
        }
        let head = numbers.at.next_multiple_of(BLOCK);
        let stored = entry.size.checked_sub(head).ok_or_else(|| bad("its map has no end"))?;
        let mut map = Map::new(len, stored);
        for (start, len) in found {
            map.push(start, len, name)?;
        }
        map.body(entry.data + head, name)
    }

    /// Counts a member or a directory. A member may make as many directories as its name has
    /// components.
    fn count_path(&mut self, len: usize) -> Result<()> {
        self.members += 1;
        self.paths_bytes += len;
        if self.members > MEMBERS {
            return Err(ArchiveError::TooMany { what: "members and directories", limit: MEMBERS });
        }
        if self.paths_bytes > PATHS_BYTES {
            return Err(ArchiveError::TooMany { what: "bytes in paths", limit: PATHS_BYTES });
        }
        Ok(())
    }

    fn count_extents(&mut self, count: usize) -> Result<()> {
        self.extents += count;
        if self.extents > EXTENTS {
            return Err(ArchiveError::TooMany { what: "extents of sparse files", limit: EXTENTS });
        }
        Ok(())
    }
}

fn is_file(kind: EntryType) -> bool {
    matches!(kind, EntryType::Regular | EntryType::Continuous)
}

/// A member's header, and where it is.
pub(super) struct Entry<'a> {
    header: &'a Header,
    at: u64,
    /// The offset and length of its data.
    pub(super) data: u64,
    pub(super) size: u64,
    pub(super) archive: &'a dyn StoredFile,
    /// The length of the archive.
    pub(super) end: u64,
}

impl Entry<'_> {
    /// Returns where a link leads; the records before its header have longer targets.
    fn target(&self, records: &Records) -> Vec<u8> {
        let recorded = records.link.clone();
        let target = recorded.or_else(|| self.header.link_name_bytes().map(Cow::into_owned));
        target.unwrap_or_default()
    }

    /// Checks that the archive has `len` bytes at `offset`.
    fn require(&self, member: &str, offset: u64, len: u64) -> Result<()> {
        let wanted = offset.saturating_add(len);
        if wanted <= self.end {
            return Ok(());
        }
        Err(ArchiveError::CutShort { member: member.to_owned(), wanted, end: self.end })
    }
}

/// Reads the header at `at`; none is the end of the archive.
fn header(archive: &dyn StoredFile, at: u64, end: u64) -> Result<Option<Header>> {
    let whole = at.checked_add(BLOCK).is_some_and(|next| next <= end);
    if !whole {
        return Err(ArchiveError::NoEnd { offset: at });
    }
    let mut header = Header::new_old();
    let bytes = bytes_at(archive, at, BLOCK, end)?;
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    header.as_mut_bytes().copy_from_slice(&bytes);
    if !has_checksum(&header) {
        let problem = "its checksum is wrong";
        return Err(ArchiveError::Header { offset: at, problem });
    }
    Ok(Some(header))
}

/// Whether an archive may begin with these bytes: a header, or an empty archive's end.
pub(super) fn may_begin(bytes: &[u8]) -> bool {
    let Some(first) = bytes.first_chunk::<BLOCK_BYTES>() else { return false };
    let mut header = Header::new_old();
    header.as_mut_bytes().copy_from_slice(first);
    first.iter().all(|byte| *byte == 0) || has_checksum(&header)
}

/// Whether a header has the checksum that it claims: the sum of its bytes, where those of
/// the checksum itself count as spaces.
fn has_checksum(header: &Header) -> bool {
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    let byte =
        |(at, byte): (usize, &u8)| u32::from(if CHECKSUM.contains(&at) { b' ' } else { *byte });
    let sum = header.as_bytes().iter().enumerate().map(byte).sum::<u32>();
    header.cksum().is_ok_and(|claimed| claimed == sum)
}

pub(super) fn bytes_at(
    archive: &dyn StoredFile,
    offset: u64,
    len: u64,
    end: u64,
) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).expect("limited by the caller")];
    let read = read_full(archive, &mut bytes, offset)
        .map_err(|source| ArchiveError::Read { offset, source })?;
    if read < bytes.len() {
        let member = "a header".to_owned();
        return Err(ArchiveError::CutShort { member, wanted: offset.saturating_add(len), end });
    }
    Ok(bytes)
}

/// Splits a name of an archive into components.
fn parts(name: &str) -> Result<Vec<&str>, &'static str> {
    if name.starts_with('/') {
        return Err("its name is absolute");
    }
    if name.len() as u64 > NAME_BYTES {
        return Err("its name is too long");
    }
    if name.contains('\0') {
        return Err("its name has a zero byte");
    }
    let parts = name.split('/').filter(|part| !part.is_empty() && *part != ".");
    let parts: Vec<&str> = parts.collect();
    if parts.contains(&"..") {
        return Err("its name has \"..\" in it");
    }
    if parts.iter().any(|part| part.len() > COMPONENT_BYTES) {
        return Err("a component of its name is too long");
    }
    Ok(parts)
}

/// Returns the path in the archive to which a link in the directory `above` leads; `None` if it
/// leads out of the archive.
pub(super) fn resolve(above: &[&str], target: &str) -> Option<String> {
    if target.starts_with('/') || target.is_empty() {
        return None;
    }
    let mut path = above.to_vec();
    for part in target.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." {
            path.pop()?;
        } else {
            path.push(part);
        }
    }
    Some(path.join("/"))
}
