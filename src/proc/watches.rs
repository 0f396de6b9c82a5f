//! The lines of inotify instances and fanotify groups in `/proc/PID/fdinfo/FD`
//! (`fs/notify/fdinfo.c`).

use super::text::{self, Defect, Parsed};

/// The most bytes of a file handle (`MAX_HANDLE_SZ`, `linux/exportfs.h`).
const HANDLE_BYTES: usize = 128;

/// A file handle (`open_by_handle_at(2)`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct FileHandle {
    /// The type, which the file system understands.
    pub kind: u32,
    /// Its bytes, at most 128.
    pub bytes: Vec<u8>,
}

/// A watched file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WatchedInode {
    /// Its inode number.
    pub inode: u64,
    /// Its file system, as the kernel encodes it: major << 20 | minor.
    pub device: u32,
    /// Its handle; `None` if its file system has none.
    pub handle: Option<FileHandle>,
}

/// A watch of an inotify instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InotifyWatch {
    /// Its number.
    pub wd: i32,
    /// The file.
    pub file: WatchedInode,
    /// The `IN_*` events, `IN_ONESHOT` and `IN_EXCL_UNLINK`.
    pub mask: u32,
    /// 0 so far.
    pub ignored_mask: u32,
}

/// The object of a fanotify mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FanotifyObject {
    /// A file.
    Inode(WatchedInode),
    /// A mount, by its id in `mountinfo`.
    Mount(i32),
    /// A file system, by its device as in [`WatchedInode::device`].
    FileSystem(u32),
    /// Something newer, such as a mount namespace (Linux 6.14), with its line.
    Other(String),
}

/// A mark of a fanotify group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FanotifyMark {
    /// The watched object.
    pub object: FanotifyObject,
    /// `FAN_MARK_*` flags of the mark itself, such as `FAN_MARK_IGNORED_SURV_MODIFY`.
    pub flags: u32,
    /// The `FAN_*` events.
    pub mask: u32,
    /// The events that are ignored.
    pub ignored_mask: u32,
}

/// A fanotify group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FanotifyGroup {
    /// The flags of `fanotify_init(2)`.
    pub flags: u32,
    /// The flags of the descriptors in its events.
    pub event_flags: u32,
    /// Its marks.
    pub marks: Vec<FanotifyMark>,
}

/// The `key:value` pairs of a line, all numbers hexadecimal.
struct Numbers<'a> {
    line: &'a [u8],
}

impl Numbers<'_> {
    fn get(&self, key: &'static str) -> Option<&[u8]> {
        text::words(self.line)
            .filter_map(|word| text::split_once(word, b':'))
            .find(|(found, _)| *found == key.as_bytes())
            .map(|(_, value)| value)
    }

    fn number<T: TryFrom<u64>>(&self, key: &'static str) -> Parsed<T> {
        let value = self.get(key).ok_or_else(|| Defect::new(key, self.line))?;
        let number: u64 = text::unsigned(value, 16, key)?;
        T::try_from(number).map_err(|_| Defect::new(key, self.line))
    }

    fn inode(&self) -> Parsed<WatchedInode> {
        let handle = match self.get("f_handle") {
            None => None,
            Some(digits) => Some(FileHandle {
                kind: self.number("fhandle-type")?,
                bytes: bytes(digits).ok_or_else(|| Defect::new("f_handle", self.line))?,
            }),
        };
        Ok(WatchedInode { inode: self.number("ino")?, device: self.number("sdev")?, handle })
    }
}

fn bytes(digits: &[u8]) -> Option<Vec<u8>> {
    let (pairs, rest) = digits.as_chunks::<2>();
    if !rest.is_empty() || pairs.len() > HANDLE_BYTES {
        return None;
    }
    let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    pairs.iter().map(byte).collect()
}

/// Parses a line that begins with `inotify `.
pub(super) fn parse_inotify(line: &[u8]) -> Parsed<InotifyWatch> {
    let numbers = Numbers { line };
    Ok(InotifyWatch {
        wd: numbers.number("wd")?,
        file: numbers.inode()?,
        mask: numbers.number("mask")?,
        ignored_mask: numbers.number("ignored_mask")?,
    })
}

/// Parses a line that begins with `fanotify `, and adds it to a group.
pub(super) fn parse_fanotify(line: &[u8], group: &mut FanotifyGroup) -> Parsed<()> {
    let numbers = Numbers { line };
    if numbers.get("event-flags").is_some() {
        group.flags = numbers.number("flags")?;
        group.event_flags = numbers.number("event-flags")?;
        return Ok(());
    }
    let object = if numbers.get("ino").is_some() {
        FanotifyObject::Inode(numbers.inode()?)
    } else if numbers.get("mnt_id").is_some() {
        FanotifyObject::Mount(numbers.number("mnt_id")?)
    } else if numbers.get("sdev").is_some() {
        FanotifyObject::FileSystem(numbers.number("sdev")?)
    } else {
        FanotifyObject::Other(String::from_utf8_lossy(line).into_owned())
    };
    group.marks.push(FanotifyMark {
        object,
        flags: numbers.number("mflags")?,
        mask: numbers.number("mask")?,
        ignored_mask: numbers.number("ignored_mask")?,
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_has_its_number_its_file_and_its_events() {
        let line = b"inotify wd:1f ino:1241bd sdev:fe00000 mask:84000002 ignored_mask:0 \
                     fhandle-bytes:8 fhandle-type:1 f_handle:bd411200916e661f";
        let watch = parse_inotify(line).unwrap();
        assert_eq!((watch.wd, watch.mask), (31, 0x8400_0002));
        assert_eq!((watch.file.inode, watch.file.device), (0x0012_41bd, 0x0fe0_0000));
        let handle = watch.file.handle.unwrap();
        assert_eq!(handle.kind, 1);
        assert_eq!(handle.bytes, [0xbd, 0x41, 0x12, 0, 0x91, 0x6e, 0x66, 0x1f]);
        let without = parse_inotify(b"inotify wd:1 ino:1 sdev:5 mask:2 ignored_mask:0 ").unwrap();
        assert_eq!(without.file.handle, None);
        let digits = "0".repeat(258);
        let long = format!("inotify wd:1 ino:1 sdev:5 mask:2 ignored_mask:0 f_handle:{digits}");
        parse_inotify(long.as_bytes()).unwrap_err();
        parse_inotify(b"inotify wd:x ino:1 sdev:5 mask:2 ignored_mask:0").unwrap_err();
    }

    #[test]
    fn a_group_has_marks_of_all_kinds() {
        let mut group = FanotifyGroup::default();
        for line in [
            "fanotify flags:204 event-flags:8000",
            "fanotify ino:2 sdev:800001 mflags:40 mask:3b ignored_mask:4000000 fhandle-bytes:8 \
             fhandle-type:1 f_handle:0200000000000000",
            "fanotify mnt_id:1c mflags:0 mask:20 ignored_mask:0",
            "fanotify sdev:800001 mflags:0 mask:20 ignored_mask:1",
            "fanotify mnt_ns:f0000001 mflags:0 mask:20 ignored_mask:1",
        ] {
            parse_fanotify(line.as_bytes(), &mut group).unwrap();
        }
        assert_eq!((group.flags, group.event_flags), (0x204, 0x8000));
        assert!(matches!(&group.marks[0].object, FanotifyObject::Inode(file) if file.inode == 2));
        assert_eq!((group.marks[0].flags, group.marks[0].ignored_mask), (0x40, 0x0400_0000));
        assert_eq!(group.marks[1].object, FanotifyObject::Mount(28));
        assert_eq!(group.marks[2].object, FanotifyObject::FileSystem(0x0080_0001));
        assert!(matches!(&group.marks[3].object, FanotifyObject::Other(_)));
    }
}
