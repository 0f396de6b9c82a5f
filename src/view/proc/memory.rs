//! `maps`, `smaps`, and texts in the memory of a process, such as its command line.

use std::fmt::Write;

use super::{Node, Proc};
use crate::{
    chain,
    image::{proto, vma},
    units::PAGE_SIZE,
    view::{
        Process, Result,
        process::{PROT_EXEC, PROT_READ, PROT_WRITE},
    },
};

/// The column of names in `maps`, counted from 0.
const NAME_COLUMN: usize = 73;

/// `MAP_*` and other flags of mappings in images (`asm-generic/mman.h`).
const MAP_SHARED: u32 = 0x01;
const MAP_GROWSDOWN: u32 = 0x0100;
const MAP_LOCKED: u32 = 0x2000;
const MAP_NORESERVE: u32 = 0x4000;
const MAP_HUGETLB: u32 = 0x4_0000;

/// Advice of `madvise(2)`: the bits of `vma_entry.madv`, and the codes of `VmFlags`.
const ADVICE: [(u32, &str); 8] = [
    (1, "rr"),  // MADV_RANDOM
    (2, "sr"),  // MADV_SEQUENTIAL
    (10, "dc"), // MADV_DONTFORK
    (12, "mg"), // MADV_MERGEABLE
    (14, "hg"), // MADV_HUGEPAGE
    (15, "nh"), // MADV_NOHUGEPAGE
    (16, "dd"), // MADV_DONTDUMP
    (18, "wf"), // MADV_WIPEONFORK
];

/// A text in the memory of a process.
#[derive(Clone, Copy, Debug)]
pub(super) enum Text {
    Arguments,
    Environment,
}

/// The most bytes read of a text. The kernel limits it to a quarter of the stack's limit; images may
/// claim any size.
const TEXT_LIMIT: u64 = 8 << 20;

/// Sizes of a process's memory in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sizes {
    /// All mappings.
    pub(super) mapped: u64,
    /// Private pages in images.
    pub(super) own: u64,
    /// Pages of shared objects in images.
    pub(super) shared: u64,
    /// The code of its program.
    pub(super) code: u64,
    /// Writable private mappings.
    pub(super) data: u64,
    /// The stack.
    pub(super) stack: u64,
    /// The code of libraries.
    pub(super) libraries: u64,
    /// Locked mappings.
    pub(super) locked: u64,
}

impl Sizes {
    /// Returns the bytes in images. Pages of files do not count: images do not tell which of them
    /// were in memory.
    pub(super) fn resident(&self) -> u64 {
        self.own.saturating_add(self.shared)
    }

    /// Writes the lines of `status`.
    pub(super) fn write(&self, text: &mut String) {
        for (name, bytes) in [
            ("VmPeak", self.mapped),
            ("VmSize", self.mapped),
            ("VmLck", self.locked),
            ("VmPin", 0),
            ("VmHWM", self.resident()),
            ("VmRSS", self.resident()),
            ("RssAnon", self.own),
            ("RssFile", 0),
            ("RssShmem", self.shared),
            ("VmData", self.data),
            ("VmStk", self.stack),
            ("VmExe", self.code),
            ("VmLib", self.libraries),
            ("VmPTE", 0),
            ("VmSwap", 0),
        ] {
            let _ = writeln!(text, "{name}:\t{:8} kB", bytes >> 10);
        }
    }
}

/// A mapping, and how much of it images hold.
pub(super) struct Shown {
    pub(super) entry: proto::VmaEntry,
    pub(super) own: u64,
    pub(super) shared: u64,
}

impl Proc<'_> {
    /// Returns the mappings of a process in ascending order.
    fn vmas(&self, pid: u32) -> Result<Vec<proto::VmaEntry>> {
        let mm = self.tables.mm(pid)?.unwrap_or_default();
        let mut vmas = mm.vmas.clone();
        vmas.retain(|entry| entry.status & vma::GUARD == 0 && entry.start < entry.end);
        vmas.sort_by_key(|entry| entry.start);
        Ok(vmas)
    }

    /// Returns the name of a mapping in `maps`.
    pub(super) fn mapping_name(
        &self,
        mm: &proto::MmEntry,
        entry: &proto::VmaEntry,
    ) -> Result<Vec<u8>> {
        let is = |bits| entry.status & bits != 0;
        let fixed: &[u8] = if is(vma::VDSO) {
            b"[vdso]"
        } else if is(vma::VVAR) {
            b"[vvar]"
        } else if is(vma::VSYSCALL) {
            b"[vsyscall]"
        } else if is(vma::FILE_PRIVATE | vma::FILE_SHARED) {
            let id = u32::try_from(entry.shmid).unwrap_or(u32::MAX);
            return Ok(self.tables.files()?.path(id).unwrap_or_default());
        } else if is(vma::SYSVIPC) {
            let key = self.tables.segment_key(entry.shmid)?.unwrap_or(0);
            return Ok(format!("/SYSV{key:08x} (deleted)").into_bytes());
        } else if is(vma::ANON_SHARED) {
            b"/dev/zero (deleted)"
        } else if is(vma::AIORING) {
            b"/[aio] (deleted)"
        } else if (entry.start..entry.end).contains(&mm.mm_start_stack) {
            b"[stack]"
        } else if entry.start < mm.mm_brk.max(mm.mm_start_brk.saturating_add(1))
            && entry.end > mm.mm_start_brk
            && mm.mm_start_brk != 0
        {
            b"[heap]"
        } else {
            b""
        };
        Ok(fixed.to_vec())
    }

    fn line(entry: &proto::VmaEntry, name: &[u8]) -> Vec<u8> {
        let placed = entry.status & (vma::FILE_PRIVATE | vma::FILE_SHARED | vma::ANON_SHARED) != 0;
        let offset = if placed { entry.pgoff } else { 0 };
        let (start, end, protection) = (entry.start, entry.end, protection(entry));
        let mut line =
            format!("{start:08x}-{end:08x} {protection} {offset:08x} 00:00 0 ").into_bytes();
        if !name.is_empty() {
            line.resize(line.len().max(NAME_COLUMN), b' ');
            line.extend(super::escaped(name, b"\n"));
        }
        line.push(b'\n');
        line
    }

    /// Returns `maps`. Images do not have the device and the inode of a file.
    pub(super) fn maps(&self, pid: u32) -> Result<Vec<u8>> {
        let mm = self.tables.mm(pid)?.unwrap_or_default();
        let mut text = Vec::new();
        for entry in self.vmas(pid)? {
            let name = self.mapping_name(&mm, &entry)?;
            text.extend(Self::line(&entry, &name));
        }
        Ok(text)
    }

    /// Returns the mappings, with how much of each images hold.
    pub(super) fn shown(&self, pid: u32) -> Result<Vec<Shown>> {
        let Some(space) = self.space(pid)? else { return Ok(Vec::new()) };
        let mut shown = Vec::new();
        for entry in self.vmas(pid)? {
            let areas = space.process().areas();
            let position = areas.partition_point(|area| area.end <= entry.start);
            let area = areas.get(position).filter(|area| area.start == entry.start);
            let (own, shared) = match area {
                Some(area) => space.resident(area)?,
                None => (0, 0),
            };
            shown.push(Shown { entry, own, shared });
        }
        Ok(shown)
    }

    pub(super) fn smaps(&self, pid: u32) -> Result<Vec<u8>> {
        let mut text = Vec::new();
        let mm = self.tables.mm(pid)?.unwrap_or_default();
        for mapping in self.shown(pid)? {
            let entry = &mapping.entry;
            text.extend(Self::line(entry, &self.mapping_name(&mm, entry)?));
            let mut rest = String::new();
            let bytes = entry.end - entry.start;
            let locked =
                if entry.flags & MAP_LOCKED != 0 { mapping.own + mapping.shared } else { 0 };
            size_lines(&mut rest, &[("Size", bytes), ("KernelPageSize", PAGE_SIZE)]);
            size_lines(&mut rest, &[("MMUPageSize", PAGE_SIZE)]);
            page_lines(&mut rest, mapping.own, mapping.shared, locked);
            let _ = writeln!(rest, "VmFlags: {}", flags(entry));
            text.extend(rest.into_bytes());
        }
        Ok(text)
    }

    pub(super) fn smaps_rollup(&self, pid: u32) -> Result<Vec<u8>> {
        let mappings = self.shown(pid)?;
        let (Some(first), Some(last)) = (mappings.first(), mappings.last()) else {
            return Ok(Vec::new());
        };
        let all = proto::VmaEntry {
            start: first.entry.start,
            end: last.entry.end,
            ..proto::VmaEntry::default()
        };
        let mut text = Self::line(&all, b"[rollup]");
        let mut rest = String::new();
        let (mut own, mut shared) = (0, 0);
        for mapping in &mappings {
            add(&mut own, mapping.own);
            add(&mut shared, mapping.shared);
        }
        page_lines(&mut rest, own, shared, 0);
        text.extend(rest.into_bytes());
        Ok(text)
    }

    /// Returns the sizes of a process's memory; `None` for a zombie.
    pub(super) fn sizes(&self, pid: u32) -> Result<Option<Sizes>> {
        let Some(mm) = self.tables.mm(pid)? else { return Ok(None) };
        let mut sizes = Sizes::default();
        for Shown { entry, own, shared } in self.shown(pid)? {
            if entry.status & vma::VSYSCALL != 0 {
                continue;
            }
            let bytes = entry.end - entry.start;
            let is = |bits| entry.prot & bits == bits;
            add(&mut sizes.mapped, bytes);
            add(&mut sizes.own, own);
            add(&mut sizes.shared, shared);
            if entry.flags & MAP_LOCKED != 0 {
                add(&mut sizes.locked, bytes);
            }
            let private = entry.flags & MAP_SHARED == 0;
            if (entry.start..entry.end).contains(&mm.mm_start_stack) {
                add(&mut sizes.stack, bytes);
            } else if private && is(PROT_WRITE) {
                add(&mut sizes.data, bytes);
            } else if is(PROT_EXEC) && !is(PROT_WRITE) {
                let program = (entry.start..entry.end).contains(&mm.mm_start_code);
                add(if program { &mut sizes.code } else { &mut sizes.libraries }, bytes);
            }
        }
        Ok(Some(sizes))
    }

    /// Returns the auxiliary vector.
    pub(super) fn auxv(&self, pid: u32) -> Result<Vec<u8>> {
        let space = self.space(pid)?;
        Ok(space.map_or_else(Vec::new, |space| space.process().auxiliary_vector()))
    }

    /// Returns the command line or the environment from the process's memory; empty if that is lost.
    pub(super) fn memory_text(&self, pid: u32, what: Text) -> Result<Vec<u8>> {
        let Some(space) = self.space(pid)? else { return Ok(Vec::new()) };
        let mm = space.process().mm();
        let (start, end) = match what {
            Text::Arguments => (mm.mm_arg_start, mm.mm_arg_end),
            Text::Environment => (mm.mm_env_start, mm.mm_env_end),
        };
        let len = end.saturating_sub(start).min(TEXT_LIMIT);
        let mut text = vec![0; usize::try_from(len).expect("bounded")];
        let read = chain::read_at(&*space, start, &mut text).unwrap_or_else(|error| {
            log::debug!("process {pid}: cannot read the text at {start:#x}: {error}");
            0
        });
        text.truncate(read);
        Ok(text)
    }

    /// Returns an entry for each mapping of a file.
    pub(super) fn mapped_children(&self, pid: u32) -> Result<Vec<(String, Node)>> {
        let vmas = self.vmas(pid)?.into_iter();
        let placed = vmas.filter(|entry| {
            entry.status & (vma::FILE_PRIVATE | vma::FILE_SHARED | vma::ANON_SHARED) != 0
        });
        let child = |entry: proto::VmaEntry| {
            let (start, end) = (entry.start, entry.end);
            (format!("{start:x}-{end:x}"), Node::MappedFile(pid, start, end))
        };
        Ok(placed.map(child).collect())
    }

    /// Returns the target of the mapping at these addresses.
    pub(super) fn mapped_target(&self, pid: u32, start: u64, end: u64) -> Result<Option<Vec<u8>>> {
        let mm = self.tables.mm(pid)?.unwrap_or_default();
        let found = mm.vmas.iter().find(|entry| entry.start == start && entry.end == end);
        found.map(|entry| self.mapping_name(&mm, entry)).transpose()
    }

    /// Returns the name of each mapping, with its addresses.
    pub(in crate::view) fn names(&self, process: &Process) -> Result<Vec<(u64, u64, Vec<u8>)>> {
        let mm = process.mm();
        let vmas = self.vmas(process.pid())?.into_iter();
        vmas.map(|entry| Ok((entry.start, entry.end, self.mapping_name(mm, &entry)?))).collect()
    }
}

/// Returns the permissions of a mapping as in `maps`: `rwxp`.
pub(super) fn protection(entry: &proto::VmaEntry) -> String {
    let bit = |bits, letter| if entry.prot & bits != 0 { letter } else { '-' };
    let sharing = if entry.flags & MAP_SHARED != 0 { 's' } else { 'p' };
    [bit(PROT_READ, 'r'), bit(PROT_WRITE, 'w'), bit(PROT_EXEC, 'x'), sharing].iter().collect()
}

/// Adds to a count of bytes. Images may claim overlapping mappings of any size.
fn add(count: &mut u64, bytes: u64) {
    *count = count.saturating_add(bytes);
}

fn size_lines(text: &mut String, lines: &[(&str, u64)]) {
    for (name, bytes) in lines {
        let _ = writeln!(text, "{:15} {:8} kB", format!("{name}:"), bytes >> 10);
    }
}

/// Writes how many bytes of private pages and of shared objects images hold. Images do not tell how
/// many processes share a page.
fn page_lines(text: &mut String, own: u64, shared: u64, locked: u64) {
    size_lines(
        text,
        &[
            ("Rss", own.saturating_add(shared)),
            ("Shared_Clean", 0),
            ("Shared_Dirty", shared),
            ("Private_Clean", 0),
            ("Private_Dirty", own),
            ("Referenced", own.saturating_add(shared)),
            ("Anonymous", own),
            ("AnonHugePages", 0),
            ("Swap", 0),
            ("Locked", locked),
        ],
    );
}

/// Returns the codes of `VmFlags` (`proc_pid_smaps(5)`) that the images tell.
fn flags(entry: &proto::VmaEntry) -> String {
    let bits = [
        (entry.prot & PROT_READ, "rd"),
        (entry.prot & PROT_WRITE, "wr"),
        (entry.prot & PROT_EXEC, "ex"),
        (entry.flags & MAP_SHARED, "sh"),
        (entry.flags & MAP_GROWSDOWN, "gd"),
        (entry.flags & MAP_LOCKED, "lo"),
        (entry.flags & MAP_NORESERVE, "nr"),
        (entry.flags & MAP_HUGETLB, "ht"),
    ];
    let set = bits.iter().filter(|(bit, _)| *bit != 0).map(|(_, code)| *code);
    let advice = entry.madv.unwrap_or(0);
    let advised = ADVICE.iter().filter(|(number, _)| advice >> number & 1 != 0);
    let codes = set.chain(advised.map(|(_, code)| *code));
    codes.map(|code| format!("{code} ")).collect()
}
