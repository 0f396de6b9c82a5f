//! `/proc/PID/maps` and `/proc/PID/smaps`: the mappings of a process.

use super::{
    VmFlags,
    text::{self, Defect, Parsed},
};
use crate::units::RemoteAddr;

/// Bytes in the unit in which `smaps` counts.
const KIB: u64 = 1024;

/// What the kernel appends to the path of a file that has no name any more.
const DELETED: &[u8] = b" (deleted)";

/// Bytes that `smaps` has of one mapping, at least: for the first guess of how
/// many there are.
const SMAPS_BYTES: usize = 512;

/// Bytes that `maps` has of one mapping, at least.
const MAPS_BYTES: usize = 48;

/// One mapping of a process (`show_map_vma` and `show_smap`,
/// `fs/proc/task_mmu.c`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The address of its first byte.
    pub start: RemoteAddr,
    /// The address after its last byte.
    pub end: RemoteAddr,
    /// Whether it may be read.
    pub read: bool,
    /// Whether it may be written.
    pub write: bool,
    /// Whether it may be executed.
    pub execute: bool,
    /// Whether writes are shared with all mappings of the object: `MAP_SHARED`.
    pub shared: bool,
    /// Where in the file it begins, in bytes; 0 for private anonymous memory.
    pub offset: u64,
    /// The major number of the device that has the file; 0 without a file.
    pub dev_major: u32,
    /// The minor number of that device.
    pub dev_minor: u32,
    /// The inode of the file; 0 without a file.
    pub inode: u64,
    /// The path or the name in brackets as the kernel gives it, the octal escapes
    /// of line feeds undone; empty if there is none.
    pub name: Vec<u8>,
    /// The flags; empty when read from `maps`.
    pub flags: VmFlags,
    /// The bytes that are in memory; 0 when read from `maps`.
    pub rss_bytes: u64,
    /// Of those, the bytes that other page tables may have, too, and those merged with
    /// their like (KSM); 0 when read from `maps`.
    pub shared_rss_bytes: u64,
    /// The bytes that are in swap; 0 when read from `maps`.
    pub swap_bytes: u64,
    /// The bytes in a page: above 4096 for hugetlbfs; 0 when read from `maps`.
    pub kernel_page_bytes: u64,
    /// The protection key (`pkeys(7)`); 0 where there is none.
    pub protection_key: u32,
}

impl Mapping {
    /// Returns the bytes in `[start, end)`.
    pub const fn len(&self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Returns whether there are no bytes in it; the kernel has no such mappings.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns whether the kernel says that the file was deleted, or the file's
    /// name ends as if it did.
    pub fn is_deleted(&self) -> bool {
        self.name.ends_with(DELETED)
    }

    /// Takes a line such as
    /// `561220355000-561220358000 r--p 00008000 fe:00 247282    /usr/bin/head`
    /// apart.
    fn parse(line: &[u8]) -> Parsed<Self> {
        let mut rest = line;
        let (start, end) = text::split_once(column(&mut rest), b'-')
            .ok_or_else(|| Defect::new("range of addresses", line))?;
        let start = text::unsigned(start, 16, "start of mapping")?;
        let end = text::unsigned(end, 16, "end of mapping")?;
        if end < start {
            return Err(Defect::new("end of mapping after its start", line));
        }
        let &[read, write, execute, shared] = column(&mut rest) else {
            return Err(Defect::new("permissions of mapping", line));
        };
        let offset = text::unsigned(column(&mut rest), 16, "offset of mapping")?;
        let (major, minor) = text::split_once(column(&mut rest), b':')
            .ok_or_else(|| Defect::new("device of mapping", line))?;
        Ok(Self {
            start: RemoteAddr(start),
            end: RemoteAddr(end),
            read: read == b'r',
            write: write == b'w',
            execute: execute == b'x',
            shared: shared == b's',
            offset,
            dev_major: text::unsigned(major, 16, "device of mapping")?,
            dev_minor: text::unsigned(minor, 16, "device of mapping")?,
            inode: text::unsigned(column(&mut rest), 10, "inode of mapping")?,
            // Only the blanks before it are padding.
            name: text::undo_octal(rest.trim_ascii_start()),
            flags: VmFlags::default(),
            rss_bytes: 0,
            shared_rss_bytes: 0,
            swap_bytes: 0,
            kernel_page_bytes: 0,
            protection_key: 0,
        })
    }

    /// Takes in a line such as `Rss:       8 kB`.
    fn add_field(&mut self, line: &[u8]) -> Parsed<()> {
        match text::split_once(line, b':') {
            Some((b"Rss", value)) => self.rss_bytes = bytes(value, "Rss")?,
            Some((b"Shared_Clean" | b"Shared_Dirty" | b"Shared_Hugetlb" | b"KSM", value)) => {
                self.shared_rss_bytes += bytes(value, "shared bytes")?
            }
            Some((b"Swap", value)) => self.swap_bytes = bytes(value, "Swap")?,
            Some((b"KernelPageSize", value)) => {
                self.kernel_page_bytes = bytes(value, "KernelPageSize")?;
            }
            Some((b"ProtectionKey", value)) => {
                self.protection_key = text::unsigned(value.trim_ascii(), 10, "ProtectionKey")?;
            }
            Some((b"VmFlags", codes)) => self.flags = VmFlags::parse(codes),
            _ => {}
        }
        Ok(())
    }
}

/// Takes the next column off the front of a line; empty at its end.
fn column<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let line = rest.trim_ascii_start();
    let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    let (column, after) = line.split_at(end);
    *rest = after;
    column
}

/// Reads a number of KiB with its unit and returns the bytes.
fn bytes(value: &[u8], what: &'static str) -> Parsed<u64> {
    let number = value.trim_ascii().strip_suffix(b"kB").ok_or_else(|| Defect::new(what, value))?;
    let kib: u64 = text::unsigned(number, 10, what)?;
    kib.checked_mul(KIB).ok_or_else(|| Defect::new(what, value))
}

/// Parses the text of `maps`.
pub(super) fn parse_maps(text: &[u8]) -> Parsed<Vec<Mapping>> {
    let mut mappings = Vec::with_capacity(text.len() / MAPS_BYTES);
    for line in text::lines(text) {
        mappings.push(Mapping::parse(line)?);
    }
    Ok(mappings)
}

/// Parses the text of `smaps`.
pub(super) fn parse_smaps(text: &[u8]) -> Parsed<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::with_capacity(text.len() / SMAPS_BYTES);
    for line in text::lines(text) {
        // Addresses have lowercase digits, the names of fields begin uppercase.
        if matches!(line.first(), Some(b'A'..=b'Z')) {
            let mapping = mappings
                .last_mut()
                .ok_or_else(|| Defect::new("mapping before its fields", line))?;
            mapping.add_field(line)?;
        } else {
            mappings.push(Mapping::parse(line)?);
        }
    }
    Ok(mappings)
}
