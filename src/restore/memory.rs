//! Address spaces: turns the one that a new process inherits into the one that it had, and
//! keeps as much as possible shared with the parent.
//!
//! A child is made when the memory of its parent is in place. Mappings that both have are
//! kept, and only pages that differ are written, so that the others stay shared
//! copy-on-write.

use std::{fs::File, ops::Range, os::unix::fs::FileExt, sync::Mutex};

use nix::libc;

use super::{RestoreError, Result, free::Free, plan::Body};
use crate::{
    arch::native::{ADDRESSES_END, MAP_VDSO},
    chain::{MemoryBytes, read_at},
    image::{proto::VmaEntry, vma},
    inject::Script,
    pages::{Chunk, Chunks},
    res::{mm::mapping, tree as common},
    sys::process,
    units::{
        HostPid, PAGE_LEN, PAGE_SHIFT, PAGE_SIZE, PageIndex, PageRanges, RemoteAddr, page_bytes,
    },
};

/// `MADV_GUARD_INSTALL` (`asm-generic/mman-common.h`, since Linux 6.13).
const MADV_GUARD_INSTALL: i32 = 102;

/// The flags of `mmap(2)` that are restored.
const MAP_FLAGS: u32 = (libc::MAP_SHARED
    | libc::MAP_PRIVATE
    | libc::MAP_DROPPABLE
    | libc::MAP_ANONYMOUS
    | libc::MAP_GROWSDOWN
    | libc::MAP_NORESERVE
    | libc::MAP_HUGETLB
    | 0x3f << 26)
    .cast_unsigned();

/// The status bits that say what a mapping maps.
const KINDS: u32 = vma::FILE_PRIVATE
    | vma::FILE_SHARED
    | vma::ANON_SHARED
    | vma::ANON_PRIVATE
    | vma::SYSVIPC
    | vma::MEMFD
    | vma::AIORING
    | vma::VDSO
    | vma::VVAR;

/// What a new process keeps of the address space that it inherits.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// Ascending.
    kept: Vec<Range<u64>>,
    /// Huge pages in kept mappings that the process has lost in part: they can only be
    /// dropped whole, and are written again.
    renewed: PageRanges,
    vdso_kept: bool,
}

impl Layout {
    /// Compares the inherited mappings with the wanted ones; `memory` is the stored memory
    /// of the parent.
    pub(super) fn new(inherited: &[VmaEntry], memory: Option<&MemoryBytes>, wanted: &Body) -> Self {
        let mut layout = Self::of_mappings(inherited, wanted);
        let Some(memory) = memory else { return layout };
        for entry in wanted.vmas.iter().filter(|entry| is_huge(entry)) {
            let huge = mapping::page_bytes(entry) >> PAGE_SHIFT;
            for part in layout.parts(entry.start, entry.end, true) {
                for lost in lost(memory, wanted, part) {
                    let first = lost.start / huge * huge;
                    layout.renewed.insert(first..lost.end.next_multiple_of(huge));
                }
            }
        }
        layout
    }

    fn of_mappings(inherited: &[VmaEntry], wanted: &Body) -> Self {
        let places = |vmas: &[VmaEntry]| -> Vec<(u64, u64, u32)> {
            vmas.iter()
                .filter(|entry| mapping::is_vdso(entry))
                .map(|entry| (entry.start, entry.end, entry.status & KINDS))
                .collect()
        };
        let vdso_kept = !inherited.is_empty() && places(inherited) == places(&wanted.vmas);
        let mut kept: Vec<Range<u64>> = Vec::new();
        let mut from = 0;
        // Pages that the process inherits would stand in the way of those that come later.
        let kept_of = |entry: &&VmaEntry| !mapping::is_vdso(entry) && !wanted.is_lazy(entry);
        for entry in wanted.vmas.iter().filter(kept_of) {
            while inherited.get(from).is_some_and(|other| other.end <= entry.start) {
                from += 1;
            }
            for other in inherited[from..].iter().take_while(|other| other.start < entry.end) {
                if is_same(entry, other) {
                    kept.push(entry.start.max(other.start)..entry.end.min(other.end));
                }
            }
        }
        Self { kept, renewed: PageRanges::new(), vdso_kept }
    }

    /// Returns the parts of `[start, end)` that are kept, or those that are not.
    fn parts(&self, start: u64, end: u64, kept: bool) -> Vec<Range<u64>> {
        let first = self.kept.partition_point(|range| range.end <= start);
        let mut parts = Vec::new();
        let mut next = start;
        for range in self.kept[first..].iter().take_while(|range| range.start < end) {
            let (from, to) = (range.start.max(start), range.end.min(end));
            if kept {
                parts.push(from..to);
            } else if from > next {
                parts.push(next..from);
            }
            next = to;
        }
        if !kept && next < end {
            parts.push(next..end);
        }
        parts
    }
}

/// Whether a mapping has private huge pages (`MAP_HUGETLB`).
fn is_huge(entry: &VmaEntry) -> bool {
    mapping::is_private(entry) && mapping::page_bytes(entry) > PAGE_SIZE
}

/// Returns the pages in a range of addresses that are stored for `parent`, but not for the
/// process.
fn lost(parent: &MemoryBytes, body: &Body, addresses: Range<u64>) -> Vec<Range<u64>> {
    let has = |page: u64| {
        body.memory.as_ref().is_some_and(|memory| memory.index().find(PageIndex(page)).is_some())
    };
    let range = pages(&addresses);
    let chunks = Chunks::new(parent, &[range]);
    let pages =
        chunks.as_slice().iter().flat_map(|chunk| chunk.first.0..chunk.first.0 + chunk.pages);
    let mut lost: Vec<Range<u64>> = Vec::new();
    for page in pages.filter(|page| !has(*page)) {
        match lost.last_mut() {
            Some(last) if last.end == page => last.end += 1,
            _ => lost.push(page..page + 1),
        }
    }
    lost
}

fn pages(addresses: &Range<u64>) -> Range<PageIndex> {
    PageIndex::holding(addresses.start)..PageIndex::holding(addresses.end)
}

/// Whether two mappings map the same where they overlap.
fn is_same(a: &VmaEntry, b: &VmaEntry) -> bool {
    let has_file = a.status & (vma::ANON_PRIVATE) == 0;
    a.status & KINDS == b.status & KINDS
        && a.flags & MAP_FLAGS == b.flags & MAP_FLAGS
        && (!has_file
            || a.shmid == b.shmid
                && a.fdflags == b.fdflags
                && a.pgoff.wrapping_sub(a.start) == b.pgoff.wrapping_sub(b.start))
}

/// The protection of a mapping while it is filled.
fn filling_protection(entry: &VmaEntry, body: &Body) -> u32 {
    let write = if body.is_filled(entry) && !body.is_lazy(entry) {
        libc::PROT_WRITE.cast_unsigned()
    } else {
        0
    };
    entry.prot | write
}

/// Where mappings come from.
#[derive(Clone, Copy)]
pub(super) struct Sources<'a> {
    /// Returns the descriptor for a mapping of a file.
    pub(super) file: &'a dyn Fn(&VmaEntry) -> Result<i32>,
    /// What the tree has in common.
    pub(super) common: &'a [Box<dyn common::Restorer>],
}

/// Adds the calls that turn the inherited address space of a process into the wanted one,
/// still without the contents. `inherited` is `None` for the root, which inherits that of
/// this program. `scratch` stays.
///
/// # Errors
/// Errors of [`Sources::file`].
pub(super) fn arrange(
    body: &Body,
    layout: &Layout,
    inherited: Option<&[VmaEntry]>,
    scratch: Range<u64>,
    script: &mut Script,
    sources: Sources<'_>,
) -> Result<()> {
    let mut unmap = |range: Range<u64>| {
        if range.start < range.end {
            let arguments = [range.start.into(), (range.end - range.start).into()];
            script.call("unmap what was inherited", libc::SYS_munmap, &arguments);
        }
    };
    match inherited {
        None => {
            unmap(0..scratch.start);
            unmap(scratch.end..ADDRESSES_END);
        }
        Some(inherited) => {
            for entry in inherited {
                if mapping::is_vdso(entry) {
                    if !layout.vdso_kept {
                        unmap(entry.start..entry.end);
                    }
                    continue;
                }
                for part in layout.parts(entry.start, entry.end, false) {
                    unmap(part);
                }
            }
        }
    }
    let vdso = body.vmas.iter().find(|entry| mapping::is_vdso(entry));
    if let Some(first) = vdso
        && !layout.vdso_kept
        && let Some((call, option)) = MAP_VDSO
    {
        script.call("map the vDSO", call, &[option.into(), first.start.into()]);
    }
    // A segment is attached as a whole; later mappings cover parts of it.
    let mut others = Vec::new();
    for entry in body.vmas.iter().filter(|entry| !mapping::is_vdso(entry)) {
        let parts = layout.parts(entry.start, entry.end, false);
        if !parts.is_empty() && !sources.common.iter().any(|kind| kind.map(entry, script)) {
            others.push((entry, parts));
        }
    }
    for (entry, parts) in others {
        let has_file =
            entry.status & (vma::FILE_PRIVATE | vma::FILE_SHARED | vma::ANON_SHARED) != 0;
        let fd = if has_file { (sources.file)(entry)? } else { -1 };
        let mut flags = entry.flags & MAP_FLAGS | libc::MAP_FIXED.cast_unsigned();
        if has_file {
            flags &= !libc::MAP_ANONYMOUS.cast_unsigned();
        }
        if mapping::is_aio_ring(entry) {
            // The context that replaces this memory takes its completions from it.
            flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED).cast_unsigned();
        }
        for part in parts {
            let offset = if has_file { entry.pgoff + (part.start - entry.start) } else { 0 };
            let huge = if mapping::page_bytes(entry) > PAGE_SIZE {
                " (huge pages; see vm.nr_hugepages)"
            } else {
                ""
            };
            let what = format!("map {:#x}-{:#x}{huge}", part.start, part.end);
            script.call(
                what,
                libc::SYS_mmap,
                &[
                    part.start.into(),
                    (part.end - part.start).into(),
                    filling_protection(entry, body).into(),
                    flags.into(),
                    fd.into(),
                    offset.into(),
                ],
            );
        }
    }
    // Kept mappings may have another protection.
    for entry in &body.vmas {
        if !body.is_filled(entry) {
            continue;
        }
        for part in layout.parts(entry.start, entry.end, true) {
            protect(script, part, filling_protection(entry, body));
        }
    }
    layout.renewed.iter().for_each(|pages| drop_range(pages, script));
    Ok(())
}

fn protect(script: &mut Script, range: Range<u64>, protection: u32) {
    let what = format!("protect {:#x}-{:#x}", range.start, range.end);
    let len = range.end - range.start;
    let arguments = [range.start.into(), len.into(), protection.into()];
    script.call(what, libc::SYS_mprotect, &arguments);
}

/// Fills the private memory of a process whose mappings are in place. `parent` is the
/// process that it was forked from, with the contents of its memory. Reports the pages to
/// `free`. Returns how many pages were compared, found equal, and written.
///
/// # Errors
/// [`RestoreError::WriteMemory`], [`RestoreError::ReadMemory`]; errors of the chain, and of
/// freeing pages in it.
pub(super) fn fill(
    pid: HostPid,
    body: &Body,
    layout: &Layout,
    parent: Option<(HostPid, &MemoryBytes)>,
    free: Option<&Free>,
) -> Result<Filled> {
    let Some(memory) = &body.memory else { return Ok(Filled::default()) };
    let is_eager = |entry: &&VmaEntry| {
        mapping::is_private(entry) && !mapping::is_vdso(entry) && !body.is_lazy(entry)
    };
    let private = || body.vmas.iter().filter(is_eager);
    let parts =
        |kept: bool| private().flat_map(move |entry| layout.parts(entry.start, entry.end, kept));
    let mut fresh: Vec<_> = parts(false).map(|part| pages(&part)).collect();
    let mut kept = Vec::new();
    for part in parts(true) {
        let part = pages(&part);
        for (part, renewed) in layout.renewed.split(part.start.0..part.end.0) {
            let into = if renewed { &mut fresh } else { &mut kept };
            into.push(PageIndex(part.start)..PageIndex(part.end));
        }
    }
    fresh.sort_unstable_by_key(|range| range.start);
    let filled = Mutex::new(Filled::default());
    let count = |add: Filled| {
        let mut filled = filled.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        filled.compared += add.compared;
        filled.equal += add.equal;
        filled.written += add.written;
    };
    let done = |chunk: Chunk| {
        free.map_or(Ok(()), |free| free.restored(memory.index(), chunk.first, chunk.pages))
    };
    Chunks::new(memory, &fresh).try_each(|chunk, buffer| {
        buffer.resize(bytes(chunk.pages), 0);
        read_at(memory, chunk.first.address(), buffer)?;
        write(pid, chunk.first, buffer)?;
        count(Filled { written: chunk.pages, ..Filled::default() });
        done(chunk)
    })?;
    let parent = parent.map(|(pid, memory)| Forked::open(pid, memory)).transpose()?;
    Chunks::new(memory, &kept).try_each(|chunk, buffer| {
        let len = bytes(chunk.pages);
        buffer.resize(2 * len, 0);
        let (own, theirs) = buffer.split_at_mut(len);
        read_at(memory, chunk.first.address(), own)?;
        match &parent {
            Some(parent) => parent.read(chunk, theirs)?,
            None => theirs.fill(0),
        }
        let differs = |number: usize| {
            let at = number * PAGE_LEN;
            own[at..at + PAGE_LEN] != theirs[at..at + PAGE_LEN]
                // A page of zeros in a file mapping is not a page that the parent has.
                || parent.as_ref().is_some_and(|parent| {
                    parent.memory.index().find(PageIndex(chunk.first.0 + number as u64)).is_none()
                })
        };
        let pages = usize::try_from(chunk.pages).expect("a chunk");
        let mut written = 0;
        let mut number = 0;
        while number < pages {
            let run = (number..pages).take_while(|number| differs(*number)).count();
            if run > 0 {
                let first = PageIndex(chunk.first.0 + number as u64);
                write(pid, first, &own[number * PAGE_LEN..(number + run) * PAGE_LEN])?;
                written += run as u64;
            }
            number += run.max(1);
        }
        count(Filled { compared: chunk.pages, equal: chunk.pages - written, written });
        done(chunk)
    })?;
    Ok(filled.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// The process from which another was forked. Its memory is read from the process: in the
/// images it may have been freed.
struct Forked<'a> {
    pid: HostPid,
    file: File,
    memory: &'a MemoryBytes,
}

impl<'a> Forked<'a> {
    fn open(pid: HostPid, memory: &'a MemoryBytes) -> Result<Self> {
        // The kernel ignores the protection of the memory for this file.
        let file = File::open(format!("/proc/{pid}/mem")).map_err(|source| {
            RestoreError::ReadMemory { pid, address: RemoteAddr(0), len: 0, source }
        })?;
        Ok(Self { pid, file, memory })
    }

    /// Reads the stored pages of a chunk; others are zero.
    fn read(&self, chunk: Chunk, target: &mut [u8]) -> Result<()> {
        target.fill(0);
        let range = chunk.first..PageIndex(chunk.first.0 + chunk.pages);
        for part in Chunks::new(self.memory, std::slice::from_ref(&range)).as_slice() {
            let at = bytes(part.first.0 - chunk.first.0);
            let target = &mut target[at..at + bytes(part.pages)];
            let address = part.first.address();
            self.file.read_exact_at(target, address).map_err(|source| {
                let (pid, address) = (self.pid, RemoteAddr(address));
                RestoreError::ReadMemory { pid, address, len: target.len() as u64, source }
            })?;
        }
        Ok(())
    }
}

/// Counts of pages when memory was filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Filled {
    /// Compared with those of the parent.
    pub(super) compared: u64,
    /// Equal, and still shared.
    pub(super) equal: u64,
    /// Written.
    pub(super) written: u64,
}

/// Adds the calls that drop inherited pages which the process does not have; huge pages
/// were dropped before the memory was filled.
pub(super) fn drop_pages(
    body: &Body,
    layout: &Layout,
    parent: Option<&MemoryBytes>,
    script: &mut Script,
) {
    let Some(parent) = parent else { return };
    for entry in &body.vmas {
        if !mapping::is_private(entry) || mapping::is_vdso(entry) || is_huge(entry) {
            continue;
        }
        for part in layout.parts(entry.start, entry.end, true) {
            lost(parent, body, part).into_iter().for_each(|pages| drop_range(pages, script));
        }
    }
}

fn drop_range(pages: Range<u64>, script: &mut Script) {
    let (address, len) = (page_bytes(pages.start), page_bytes(pages.end - pages.start));
    let arguments = [address.into(), len.into(), libc::MADV_DONTNEED.into()];
    script.call("drop inherited pages", libc::SYS_madvise, &arguments);
}

/// Adds the calls that give memory its final state, after all children were made: guard
/// pages, protection, advice, locks.
pub(super) fn finish(body: &Body, layout: &Layout, script: &mut Script) {
    for entry in &body.guards {
        script.call(
            "install guard pages",
            libc::SYS_madvise,
            &[entry.start.into(), (entry.end - entry.start).into(), MADV_GUARD_INSTALL.into()],
        );
    }
    for entry in body.vmas.iter().filter(|entry| !mapping::is_vdso(entry)) {
        let now = filling_protection(entry, body);
        let inherited = !layout.parts(entry.start, entry.end, true).is_empty();
        if now != entry.prot || inherited {
            protect(script, entry.start..entry.end, entry.prot);
        }
        for advice in mapping::advice(entry) {
            let what = format!("give advice {advice} on {:#x}-{:#x}", entry.start, entry.end);
            let len = entry.end - entry.start;
            let arguments = [entry.start.into(), len.into(), advice.into()];
            script.call(what, libc::SYS_madvise, &arguments);
        }
        if entry.flags & libc::MAP_LOCKED.cast_unsigned() != 0 {
            let what = format!("lock {:#x}-{:#x}", entry.start, entry.end);
            let on_fault = entry.flags & mapping::LOCKED_ON_FAULT != 0;
            let flags = if on_fault { libc::MLOCK_ONFAULT } else { 0 };
            let arguments = [entry.start.into(), (entry.end - entry.start).into(), flags.into()];
            script.call(what, libc::SYS_mlock2, &arguments);
        }
    }
}

fn bytes(pages: u64) -> usize {
    usize::try_from(page_bytes(pages)).expect("a chunk")
}

fn write(pid: HostPid, first: PageIndex, bytes: &[u8]) -> Result<()> {
    let address = RemoteAddr(first.address());
    process::write_memory(pid, address, bytes).map_err(|source| RestoreError::WriteMemory {
        pid,
        address,
        len: bytes.len() as u64,
        source,
    })
}

/// Returns an address at which `len` bytes are free in all address spaces of the tree.
pub(super) fn free_place<'a>(
    vmas: impl Iterator<Item = &'a VmaEntry>,
    own: impl Iterator<Item = Range<u64>>,
    len: u64,
) -> Option<u64> {
    /// Below are small programs, and addresses that must not be mapped, such as 0.
    const LOWEST: u64 = 1 << 20;
    /// Room for stacks to grow.
    const GAP: u64 = 16 << 20;
    let mut taken: Vec<Range<u64>> = vmas.map(|entry| entry.start..entry.end).chain(own).collect();
    taken.sort_unstable_by_key(|range| range.start);
    let mut next = LOWEST;
    for range in taken {
        if range.start.saturating_sub(GAP) >= next + len + GAP {
            return Some((next + GAP).next_multiple_of(PAGE_SIZE));
        }
        next = next.max(range.end);
    }
    (next + len + 2 * GAP < ADDRESSES_END).then(|| (next + GAP).next_multiple_of(PAGE_SIZE))
}
