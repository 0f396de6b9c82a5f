//! `/proc/PID/maps` and `/proc/PID/smaps`: the mappings of a process.

use super::{
    VmFlags,
    text::{self, Defect, Parsed},
};
use crate::units::RemoteAddr;

/// The unit of sizes in `smaps`.
const KIB: u64 = 1024;

/// The suffix that the kernel appends to the path of a deleted file.
const DELETED: &[u8] = b" (deleted)";

/// A lower bound for the size of a mapping's text in `smaps`, to estimate the number of mappings.
const SMAPS_BYTES: usize = 512;

/// The same for `maps`.
const MAPS_BYTES: usize = 48;

/// One mapping of a process (`show_map_vma` and `show_smap`,
/// `fs/proc/task_mmu.c`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The first address.
    pub start: RemoteAddr,
    /// The address after the last byte.
    pub end: RemoteAddr,
    /// Whether it may be read.
    pub read: bool,
    /// Whether it may be written.
    pub write: bool,
    /// Whether it may be executed.
    pub execute: bool,
    /// Whether all mappings of the object see writes: `MAP_SHARED`.
    pub shared: bool,
    /// The offset in the file, in bytes; 0 for private anonymous memory.
    pub offset: u64,
    /// The major number of the file's device; 0 without a file.
    pub dev_major: u32,
    /// The minor number of that device.
    pub dev_minor: u32,
    /// The inode number of the file; 0 without a file.
    pub inode: u64,
    /// The path, or the name in brackets; empty if there is none. Octal escapes of line feeds
    /// are decoded.
    pub name: Vec<u8>,
    /// The flags; empty when read from `maps`.
    pub flags: VmFlags,
    /// The bytes in memory; 0 when read from `maps`.
    pub rss_bytes: u64,
    /// The part of `rss_bytes` that other page tables may share or that KSM has merged; 0 when
    /// read from `maps`.
    pub shared_rss_bytes: u64,
    /// The bytes in swap; 0 when read from `maps`.
    pub swap_bytes: u64,
    /// The page size, above 4096 for hugetlbfs; 0 when read from `maps`.
    pub kernel_page_bytes: u64,
    /// The protection key (`pkeys(7)`); 0 without one.
    pub protection_key: u32,
}

impl Mapping {
    /// Returns the length in bytes.
    pub const fn len(&self) -> u64 {
        self.end.0.saturating_sub(self.start.0)
    }

    /// Whether the length is 0, which no mapping of the kernel has.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the file was deleted, or its name ends as if it had been.
    pub fn is_deleted(&self) -> bool {
        self.name.ends_with(DELETED)
    }

    /// Parses a line such as
    /// `561220355000-561220358000 r--p 00008000 fe:00 247282    /usr/bin/head`.
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
            // Blanks before the name are padding; others belong to it.
            name: text::undo_octal(rest.trim_ascii_start()),
            flags: VmFlags::default(),
            rss_bytes: 0,
            shared_rss_bytes: 0,
            swap_bytes: 0,
            kernel_page_bytes: 0,
            protection_key: 0,
        })
    }

    /// Parses a line such as `Rss:       8 kB`.
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

/// Removes the next column from the front of a line; returns an empty one at the end.
fn column<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let line = rest.trim_ascii_start();
    let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    let (column, after) = line.split_at(end);
    *rest = after;
    column
}

/// Parses a size in KiB with its unit, and returns the bytes.
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
        // Addresses begin with a digit or a lowercase letter, fields with an uppercase letter.
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
