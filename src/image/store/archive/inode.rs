//! Owners, modes, times and extended attributes of the files of a file system in an archive.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tar::{EntryType, Header};

use super::records::Records;

/// The longest name and the longest value of an extended attribute, and the most bytes in the names
/// of a file's attributes, each with a zero byte (`XATTR_NAME_MAX`, `XATTR_SIZE_MAX` and
/// `XATTR_LIST_MAX`, `linux/limits.h`).
const XATTR_NAME_BYTES: usize = 255;
const XATTR_VALUE_BYTES: usize = 1 << 16;
const XATTR_LIST_BYTES: usize = 1 << 16;

/// The most bytes in all extended attributes of an archive together.
pub(super) const XATTRS_BYTES: usize = 1 << 26;

/// A file, a directory or another object in a [`super::FileTree`], without its contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// The first of its names: a path from the root, without slashes at its ends.
    pub name: String,
    /// The number of its names.
    pub links: u32,
    /// Permission bits, without the type.
    pub mode: u16,
    /// The owner, as a number in the user namespace of the file system.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// The number of a device as `stat(2)` shows it in a FUSE file system; 0 for others.
    pub device: u32,
    /// When it was last read.
    pub accessed: SystemTime,
    /// When its contents last changed.
    pub modified: SystemTime,
    /// When its attributes last changed.
    pub changed: SystemTime,
    /// Extended attributes by name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Inode {
    /// Reads the fields of a member.
    pub(super) fn of(
        name: String,
        header: &Header,
        records: Records,
    ) -> Result<Self, &'static str> {
        let raw = header.as_old();
        let id = |recorded: Option<u64>, field: &[u8], value: &dyn Fn() -> Option<u64>| {
            // An empty field is 0, as for GNU tar.
            let empty = || is_empty(field).then_some(0);
            let number = recorded.or_else(empty).or_else(value);
            number
                .and_then(|number| u32::try_from(number).ok())
                .filter(|number| *number != u32::MAX)
        };
        let uid = id(records.uid, &raw.uid, &|| header.uid().ok());
        let gid = id(records.gid, &raw.gid, &|| header.gid().ok());
        let mode = if is_empty(&raw.mode) { Ok(0) } else { header.mode() };
        let mode = mode.map_err(|_| "its mode is no number")?;
        let device = match header.entry_type() {
            EntryType::Char | EntryType::Block => device(header)?,
            _ => 0,
        };
        let modified = records.modified.unwrap_or_else(|| modified(header));
        if records.xattrs.iter().any(|(name, value)| {
            !(1..=XATTR_NAME_BYTES).contains(&name.len())
                || name.contains(&0)
                || value.len() > XATTR_VALUE_BYTES
        }) || records.xattrs.keys().map(|name| name.len() + 1).sum::<usize>() > XATTR_LIST_BYTES
        {
            return Err("no file can have its extended attributes: a name or value is too long");
        }
        Ok(Self {
            name,
            links: 1,
            mode: u16::try_from(mode & 0o7777).expect("twelve bits"),
            uid: uid.ok_or("its owner is no user id")?,
            gid: gid.ok_or("its group is no group id")?,
            device,
            accessed: records.accessed.unwrap_or(modified),
            modified,
            changed: records.changed.unwrap_or(modified),
            xattrs: records.xattrs,
        })
    }

    fn xattrs_bytes(&self) -> usize {
        self.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum()
    }
}

/// Returns the time in a member's own header; 1970 if there is none. A time before 1970 is negative.
pub(super) fn modified(header: &Header) -> SystemTime {
    let seconds = header.mtime().unwrap_or(0).cast_signed();
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 {
        UNIX_EPOCH.checked_sub(distance)
    } else {
        UNIX_EPOCH.checked_add(distance)
    };
    time.unwrap_or(UNIX_EPOCH)
}

/// Returns the number of a device (`new_encode_dev`, `linux/kdev_t.h`).
fn device(header: &Header) -> Result<u32, &'static str> {
    const MAJORS: u32 = 1 << 12;
    const MINORS: u32 = 1 << 20;
    let fields = match (header.as_ustar(), header.as_gnu()) {
        (Some(ustar), _) => Some((&ustar.dev_major, &ustar.dev_minor)),
        (_, Some(gnu)) => Some((&gnu.dev_major, &gnu.dev_minor)),
        _ => None,
    };
    let (major_field, minor_field) = fields.ok_or("it is of a device, and has no number of one")?;
    let number = |field: &[u8], value: std::io::Result<Option<u32>>, end: u32| {
        let value = if is_empty(field) { Some(0) } else { value.ok().flatten() };
        value.filter(|value| *value < end).ok_or("Linux has no device of its number")
    };
    let major = number(major_field, header.device_major(), MAJORS)?;
    let minor = number(minor_field, header.device_minor(), MINORS)?;
    Ok(minor & 0xff | major << 8 | (minor & !0xff) << 12)
}

fn is_empty(field: &[u8]) -> bool {
    field.iter().all(|byte| matches!(byte, 0 | b' '))
}

/// The inodes of a file system by path.
#[derive(Debug, Default)]
pub(super) struct Inodes {
    all: Vec<Inode>,
    by_path: HashMap<String, usize>,
    xattrs_bytes: usize,
}

impl Inodes {
    pub(super) fn get(&self, path: &str) -> Option<&Inode> {
        self.by_path.get(path).map(|number| &self.all[*number])
    }

    /// Adds an inode under its name. A directory may be there already; the last one counts, as for
    /// GNU tar. Returns the bytes in all extended attributes so far.
    pub(super) fn add(&mut self, inode: Inode) -> usize {
        self.xattrs_bytes += inode.xattrs_bytes();
        let number = *self.by_path.entry(inode.name.clone()).or_insert(self.all.len());
        match self.all.get_mut(number) {
            Some(earlier) => *earlier = inode,
            None => self.all.push(inode),
        }
        self.xattrs_bytes
    }

    /// Adds another name of an inode.
    pub(super) fn link(&mut self, path: String, target: &str) {
        if let Some(number) = self.by_path.get(target).copied() {
            self.all[number].links = self.all[number].links.saturating_add(1);
            self.by_path.insert(path, number);
        }
    }
}
