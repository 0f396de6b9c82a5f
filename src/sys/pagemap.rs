//! `/proc/PID/pagemap`: which pages a process has, and their properties.
#![expect(unsafe_code, reason = "the ioctl PAGEMAP_SCAN")]

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{errno::Errno, libc};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::{
    fault::{self, Novelty},
    units::{PAGE_SIZE, PageIndex, RemoteAddr},
};

/// Properties of pages (`PAGE_IS_*`, `linux/fs.h`, since Linux 6.7).
pub mod category {
    /// The mapping has asynchronous write protection by userfaultfd.
    pub const WPALLOWED: u64 = 1 << 0;
    /// Written since it was write-protected.
    pub const WRITTEN: u64 = 1 << 1;
    /// Belongs to a file or to shared memory.
    pub const FILE: u64 = 1 << 2;
    /// In memory.
    pub const PRESENT: u64 = 1 << 3;
    /// In swap; also set for other kinds of non-present entries, such as guard pages.
    pub const SWAPPED: u64 = 1 << 4;
    /// The zero page that all processes share.
    pub const PFNZERO: u64 = 1 << 5;
    /// Part of a huge page.
    pub const HUGE: u64 = 1 << 6;
    /// Written since the soft-dirty bits were cleared.
    pub const SOFT_DIRTY: u64 = 1 << 7;
    /// A guard page (`MADV_GUARD_INSTALL`, Linux 6.13). The plain file reports it since Linux 6.15,
    /// `PAGEMAP_SCAN` since Linux 6.18; before that, the ioctl rejects this category.
    pub const GUARD: u64 = 1 << 8;
}

/// `struct page_region` (`linux/fs.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Region {
    start: u64,
    end: u64,
    /// Of the categories in [`Query::tell`], those that apply; see [`category`].
    pub categories: u64,
}

const _: () = assert!(size_of::<Region>() == 24);

impl Region {
    /// Returns the first page.
    pub fn first(&self) -> PageIndex {
        PageIndex::holding(self.start)
    }

    fn of_page(page: PageIndex, categories: u64) -> Self {
        Self { start: page.address(), end: page.address() + PAGE_SIZE, categories }
    }

    /// Returns the address after the last page.
    pub fn end(&self) -> RemoteAddr {
        RemoteAddr(self.end)
    }

    /// Returns the address of the first page.
    pub fn start(&self) -> RemoteAddr {
        RemoteAddr(self.start)
    }
}

/// Which pages to find: after inverting the categories in `inverted`, a page must have all categories
/// in `all`, and one of those in `any` unless that is 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct Query {
    /// Categories that a page must all have.
    pub all: u64,
    /// Categories of which a page must have at least one.
    pub any: u64,
    /// Categories that are inverted first.
    pub inverted: u64,
    /// Categories to report for each page found.
    pub tell: u64,
}

impl Query {
    /// Pages of a private mapping whose contents are not those of its file.
    pub const PRIVATE: Self = Self {
        all: category::FILE | category::PFNZERO,
        any: category::PRESENT | category::SWAPPED,
        inverted: category::FILE | category::PFNZERO,
        tell: 0,
    };

    /// Pages of a private mapping without a file. [`Self::PRIVATE`] finds the same pages there, but
    /// takes ten times as long, since the kernel has to examine each page to tell whether it
    /// belongs to a file.
    pub const ANONYMOUS: Self = Self {
        all: category::PFNZERO,
        any: category::PRESENT | category::SWAPPED,
        inverted: category::PFNZERO,
        tell: 0,
    };

    /// Returns the same query without guard pages, which count as swapped.
    #[must_use]
    pub fn without_guards(self) -> Self {
        Self { all: self.all | category::GUARD, inverted: self.inverted | category::GUARD, ..self }
    }

    /// Returns a query for kernels whose ioctl does not know guard pages. It finds the same pages
    /// plus guard pages, and reports which of them count as swapped.
    fn with_any_guards(self) -> Self {
        let guards_only = self.all & !self.inverted & category::GUARD != 0;
        let all = self.all & !category::GUARD;
        Self {
            all: if guards_only { all | category::SWAPPED } else { all },
            any: self.any & !category::GUARD,
            inverted: self.inverted & !category::GUARD,
            tell: self.tell & !category::GUARD | category::SWAPPED,
        }
    }

    /// Whether the query distinguishes guard pages.
    fn is_about_guards(self) -> bool {
        (self.all | self.any | self.tell) & category::GUARD != 0
    }
}

/// `struct pm_scan_arg` (`linux/fs.h`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `PM_SCAN_WP_MATCHING` (`linux/fs.h`): write-protect the returned pages.
const SCAN_WP_MATCHING: u64 = 1 << 0;

/// `PM_SCAN_CHECK_WPASYNC` (`linux/fs.h`): `EPERM` for mappings without asynchronous
/// write protection.
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;

const SCAN_BYTES: usize = size_of::<ScanArguments>();
const _: () = assert!(SCAN_BYTES == 96);

/// `PAGEMAP_SCAN`: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong =
    (3 << 30) | ((SCAN_BYTES as libc::c_ulong) << 16) | ((b'f' as libc::c_ulong) << 8) | 16;

/// Regions returned by one call: 24 bytes each, 48 KiB.
const SCAN_REGIONS: usize = 2048;

/// Entries of the plain file that are read at a time.
const ENTRY_BATCH: usize = 4096;

/// A bit of an entry: mapped by one process only (Linux 4.2).
const EXCLUSIVE: u64 = 1 << 56;

/// A bit of an entry: in swap.
const SWAPPED: u64 = 1 << 62;

/// `/proc/PID/pagemap` of one process.
#[derive(Debug)]
pub struct PagemapFile {
    file: File,
    scan: AtomicBool,
    /// Whether the ioctl knows guard pages.
    scan_guards: AtomicBool,
}

impl PagemapFile {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            file: File::open(path)?,
            scan: AtomicBool::new(true),
            scan_guards: AtomicBool::new(!fault::is_without(Novelty::ScanGuards)),
        })
    }

    /// Appends the regions in `[start, end)` that match `query` to `regions`, in ascending order. For
    /// kernels before 6.7 it omits the categories that they do not know. Returns whether the kernel
    /// knows all of them.
    pub fn scan(
        &self,
        start: RemoteAddr,
        end: RemoteAddr,
        query: Query,
        regions: &mut Vec<Region>,
    ) -> io::Result<bool> {
        if self.scan.load(Ordering::Relaxed) {
            match self.scan_by_ioctl(start, end, query, 0, regions) {
                Err(ScanError::Unknown) => self.scan.store(false, Ordering::Relaxed),
                Err(ScanError::Failed(error)) => return Err(error),
                Ok(()) => return Ok(true),
            }
        }
        self.scan_by_reading(start, end, query, regions)?;
        Ok(false)
    }

    /// Like [`Self::scan`], but write-protects each page when it is examined, so that no later write
    /// is missed. The mapping must be registered with a [`super::userfaultfd::WriteProtect`].
    ///
    /// # Errors
    /// `EPERM` if the mapping is not registered; `EINVAL` or `ENOTTY` before Linux 6.7.
    pub fn scan_and_protect(
        &self,
        start: RemoteAddr,
        end: RemoteAddr,
        query: Query,
        regions: &mut Vec<Region>,
    ) -> io::Result<()> {
        let flags = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC;
        self.scan_by_ioctl(start, end, query, flags, regions).map_err(|error| match error {
            ScanError::Unknown => Errno::ENOTTY.into(),
            ScanError::Failed(error) => error,
        })
    }

    /// Scans by the ioctl, even if that does not know guard pages.
    fn scan_by_ioctl(
        &self,
        start: RemoteAddr,
        end: RemoteAddr,
        query: Query,
        flags: u64,
        regions: &mut Vec<Region>,
    ) -> Result<(), ScanError> {
        if !query.is_about_guards() || self.scan_guards.load(Ordering::Relaxed) {
            match self.ioctl(start, end, query, flags, regions) {
                Err(Errno::EINVAL) if query.is_about_guards() => {
                    self.scan_guards.store(false, Ordering::Relaxed);
                }
                result => return Ok(result?),
            }
        }
        let mut found = Vec::new();
        self.ioctl(start, end, query.with_any_guards(), flags, &mut found)?;
        // Guard pages are among those that count as swapped: check these few one by one.
        for region in found {
            if region.categories & category::SWAPPED == 0 {
                push(regions, Region { categories: region.categories & query.tell, ..region });
                continue;
            }
            self.read(region.first(), PageIndex::holding(region.end), |page, entry| {
                let guard = categories(entry) & category::GUARD;
                let told = region.categories | guard;
                let wanted = guard ^ query.inverted & category::GUARD;
                if query.all & category::GUARD & !wanted == 0 {
                    push(regions, Region::of_page(page, told & query.tell));
                }
            })
            .map_err(ScanError::Failed)?;
        }
        Ok(())
    }

    fn ioctl(
        &self,
        start: RemoteAddr,
        end: RemoteAddr,
        query: Query,
        flags: u64,
        regions: &mut Vec<Region>,
    ) -> Result<(), Errno> {
        let mut next = start.0;
        let pages =
            usize::try_from(end.0.saturating_sub(start.0) / PAGE_SIZE).unwrap_or(usize::MAX);
        let mut batch = vec![Region::new_zeroed(); SCAN_REGIONS.min(pages)];
        while next < end.0 {
            let mut arguments = ScanArguments {
                size: SCAN_BYTES as u64,
                flags,
                start: next,
                end: end.0,
                walk_end: 0,
                vec: batch.as_mut_ptr().addr() as u64,
                vec_len: batch.len() as u64,
                max_pages: 0,
                category_inverted: query.inverted,
                category_mask: query.all,
                category_anyof_mask: query.any,
                return_mask: query.tell,
            };
            // SAFETY: the structure has the size that its number says, and outlives
            // the call together with the batch that it points to.
            let result =
                unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arguments) };
            let count = usize::try_from(Errno::result(result)?).expect("not negative");
            for region in &batch[..count] {
                push(regions, *region);
            }
            // The kernel sets `walk_end` usefully only if the batch is full. Otherwise it may be where
            // the kernel has paused in between, and the rest would be reported again.
            if count < batch.len() {
                break;
            }
            next = arguments.walk_end.max(batch[count - 1].end);
        }
        Ok(())
    }

    fn scan_by_reading(
        &self,
        start: RemoteAddr,
        end: RemoteAddr,
        query: Query,
        regions: &mut Vec<Region>,
    ) -> io::Result<()> {
        self.read(PageIndex::holding(start.0), PageIndex::holding(end.0), |page, entry| {
            let mut categories = categories(entry);
            // A zero page that replaced another page on a read is not dirty, and the plain file
            // does not show it. But it is never mapped exclusively, unlike pages of one process.
            if entry & (EXCLUSIVE | SWAPPED) == 0 {
                categories |= category::SOFT_DIRTY;
            }
            if matches(categories, query) {
                push(regions, Region::of_page(page, categories & query.tell));
            }
        })
    }

    /// Reads the entries of the pages `[page, last)`.
    fn read(
        &self,
        mut page: PageIndex,
        last: PageIndex,
        mut each: impl FnMut(PageIndex, u64),
    ) -> io::Result<()> {
        let mut entries = vec![0_u64; ENTRY_BATCH];
        while page < last {
            let count = usize::try_from(last.0 - page.0).unwrap_or(usize::MAX).min(ENTRY_BATCH);
            let bytes = entries[..count].as_mut_bytes();
            self.file.read_exact_at(bytes, page.0 * size_of::<u64>() as u64)?;
            for entry in &entries[..count] {
                each(page, *entry);
                page.0 += 1;
            }
        }
        Ok(())
    }
}

enum ScanError {
    /// The kernel does not have the ioctl, or not a category.
    Unknown,
    /// Another error.
    Failed(io::Error),
}

impl From<Errno> for ScanError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::ENOTTY | Errno::EINVAL => Self::Unknown,
            errno => Self::Failed(errno.into()),
        }
    }
}

/// Appends a region, or extends the last one by it.
fn push(regions: &mut Vec<Region>, region: Region) {
    match regions.last_mut() {
        Some(last) if last.end == region.start && last.categories == region.categories => {
            last.end = region.end;
        }
        _ => regions.push(region),
    }
}

/// Returns the categories in an entry of `/proc/PID/pagemap`
/// (`Documentation/admin-guide/mm/pagemap.rst`).
fn categories(entry: u64) -> u64 {
    const BITS: [(u32, u64); 5] = [
        (63, category::PRESENT),
        (62, category::SWAPPED),
        (61, category::FILE),
        (58, category::GUARD),
        (55, category::SOFT_DIRTY),
    ];
    BITS.iter().filter(|(bit, _)| entry >> bit & 1 == 1).map(|(_, category)| category).sum()
}

fn matches(categories: u64, query: Query) -> bool {
    let categories = categories ^ query.inverted;
    categories & query.all == query.all && (query.any == 0 || categories & query.any != 0)
}

#[cfg(test)]
mod tests {
    use memmap2::MmapMut;

    use super::*;

    /// The kernel collects 512 regions at a time.
    #[test]
    fn many_regions_are_told_once_each() {
        for pages in [1024, 1500, 4096, 4098, 10_000, 12_288] {
            let mut memory = MmapMut::map_anon(pages * 4096).unwrap();
            let _ = memory.advise(memmap2::Advice::NoHugePage);
            for page in (0..pages).step_by(2) {
                memory[page * 4096] = 1;
            }
            let start = RemoteAddr(memory.as_ptr().addr() as u64);
            let file = PagemapFile::open(Path::new("/proc/self/pagemap")).unwrap();
            let mut regions = Vec::new();
            let end = start.plus(pages as u64 * PAGE_SIZE);
            file.scan(start, end, Query::PRIVATE, &mut regions).unwrap();
            let found: Vec<_> = regions.iter().map(|region| region.first().0).collect();
            let first = PageIndex::holding(start.0).0;
            let expected: Vec<_> = (first..first + pages as u64).step_by(2).collect();
            assert_eq!(found, expected, "{pages} pages");
        }
    }

    #[test]
    fn both_ways_find_the_pages_that_were_written() {
        assert_eq!(PAGEMAP_SCAN, 0xc060_6610);
        let mut memory = MmapMut::map_anon(16 * 4096).unwrap();
        let start = RemoteAddr(memory.as_ptr().addr() as u64);
        for page in [1, 2, 7] {
            memory[page * 4096] = 1;
        }
        let file = PagemapFile::open(Path::new("/proc/self/pagemap")).unwrap();
        let end = start.plus(16 * PAGE_SIZE);
        let expected = [(1, 3), (7, 8)].map(|(first, last)| Region {
            start: start.0 + first * PAGE_SIZE,
            end: start.0 + last * PAGE_SIZE,
            categories: 0,
        });
        let mut regions = Vec::new();
        file.scan(start, end, Query::PRIVATE, &mut regions).unwrap();
        assert_eq!(regions, expected);
        regions.clear();
        file.scan_by_reading(start, end, Query::PRIVATE, &mut regions).unwrap();
        assert_eq!(regions, expected);
    }

    #[test]
    fn guard_pages_are_told_apart_by_an_ioctl_that_does_not_know_them() {
        /// `asm-generic/mman-common.h`, Linux 6.13
        const MADV_GUARD_INSTALL: libc::c_int = 102;
        let mut memory = MmapMut::map_anon(16 * 4096).unwrap();
        for page in [1, 2, 7] {
            memory[page * 4096] = 1;
        }
        let guarded = memory[4 * 4096..].as_mut_ptr();
        // SAFETY: these two pages lie within the mapping, and nothing reads them.
        let made = unsafe { libc::madvise(guarded.cast(), 2 * 4096, MADV_GUARD_INSTALL) };
        let start = RemoteAddr(memory.as_ptr().addr() as u64);
        let end = start.plus(16 * PAGE_SIZE);
        let pages = |first: u64, last: u64, categories| Region {
            start: start.0 + first * PAGE_SIZE,
            end: start.0 + last * PAGE_SIZE,
            categories,
        };
        let told = Query { tell: category::PRESENT | category::GUARD, ..Query::PRIVATE };
        let present = [pages(1, 3, category::PRESENT), pages(7, 8, category::PRESENT)];
        let guards = Query { all: category::GUARD, ..Query::default() };
        for knows_guards in [true, false] {
            let file = PagemapFile::open(Path::new("/proc/self/pagemap")).unwrap();
            if !knows_guards {
                file.scan_guards.store(false, Ordering::Relaxed);
            }
            let scan = |query| {
                let mut regions = Vec::new();
                file.scan(start, end, query, &mut regions).unwrap();
                regions
            };
            assert_eq!(scan(told.without_guards()), present);
            // Older kernels have no guard pages.
            if made == 0 {
                assert_eq!(scan(guards), [pages(4, 6, 0)]);
            }
        }
    }
}
