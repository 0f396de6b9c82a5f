//! Swap: finds pages of shared memory that are in swap, and moves pages back there.
#![expect(unsafe_code, reason = "mmap, madvise and cachestat")]

use std::{
    fs::{self, File},
    io,
    ops::Range,
    os::fd::AsRawFd,
    ptr,
};

use nix::{errno::Errno, libc};

use crate::units::PAGE_SIZE;

/// Returns the size of the machine's swap, and how much of it is free, in bytes.
pub fn bytes() -> (u64, u64) {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let bytes = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name))?.trim();
        Some(value.strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
    };
    (bytes("SwapTotal:").unwrap_or(0), bytes("SwapFree:").unwrap_or(0))
}

/// A mapping of shared memory in this process. Its pages are never touched.
struct View {
    start: *mut libc::c_void,
    bytes: usize,
}

impl View {
    fn new(object: &File, offset: u64, bytes: usize) -> Result<Self, Errno> {
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EFBIG)?;
        let (protection, share, fd) = (libc::PROT_READ, libc::MAP_SHARED, object.as_raw_fd());
        // SAFETY: a new mapping at a place of the kernel's choice touches no other.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, share, fd, offset) };
        if start == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(Self { start, bytes }) }
    }

    fn advise(&self, advice: libc::c_int) -> Result<(), Errno> {
        // SAFETY: the range is that of the mapping, whose bytes the advice does not change.
        Errno::result(unsafe { libc::madvise(self.start, self.bytes, advice) }).map(drop)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: this function's owner has made the mapping, and no other code has its address.
        unsafe { libc::munmap(self.start, self.bytes) };
    }
}

/// `cachestat(2)` (Linux 6.5).
const SYS_CACHESTAT: libc::c_long = 451;

/// The fields of `struct cachestat` (`linux/mman.h`).
#[derive(Default)]
#[repr(C)]
struct CacheStat {
    cached: u64,
    dirty: u64,
    written_back: u64,
    /// For shared memory: pages in swap.
    evicted: u64,
    recently_evicted: u64,
}

const _: () = assert!(size_of::<CacheStat>() == 40);

/// Returns what the kernel knows of these pages of shared memory.
fn cache_stat(object: &File, pages: &Range<u64>) -> Result<CacheStat, Errno> {
    let range = [pages.start * PAGE_SIZE, (pages.end - pages.start) * PAGE_SIZE];
    let mut found = CacheStat::default();
    // SAFETY: the range is two numbers that are read, the structure has the size that the
    // kernel writes, and both outlive the call.
    let result = unsafe {
        libc::syscall(SYS_CACHESTAT, object.as_raw_fd(), range.as_ptr(), &raw mut found, 0)
    };
    Errno::result(result).map(|_| found)
}

/// Returns the pages of shared memory that are in swap, in ascending order.
///
/// # Errors
/// `ENOSYS` before Linux 6.5; `EOPNOTSUPP` for huge pages, which are never swapped.
pub fn swapped_pages(object: &File) -> io::Result<Vec<Range<u64>>> {
    let pages = object.metadata()?.len().div_ceil(PAGE_SIZE);
    Ok(find(object, 0..pages, |stat| stat.evicted)?)
}

/// Returns those of `pages` that `count` counts, in ascending order.
fn find(
    object: &File,
    pages: Range<u64>,
    count: fn(&CacheStat) -> u64,
) -> Result<Vec<Range<u64>>, Errno> {
    let mut found: Vec<Range<u64>> = Vec::new();
    // Ranges to examine, in order; mixed ones are split in half.
    let mut left = Vec::from_iter((!pages.is_empty()).then_some(pages));
    while let Some(range) = left.pop() {
        match count(&cache_stat(object, &range)?) {
            0 => {}
            count if count >= range.end - range.start => match found.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => found.push(range),
            },
            _ => {
                let middle = range.start + (range.end - range.start) / 2;
                left.push(middle..range.end);
                left.push(range.start..middle);
            }
        }
    }
    Ok(found)
}

/// Moves those pages of unmapped shared memory to swap that are in memory.
///
/// # Errors
/// `ENOSYS` before Linux 6.5; what `mmap(2)` returns.
pub fn page_out(object: &File, pages: Range<u64>) -> Result<(), Errno> {
    for pages in find(object, pages, |stat| stat.cached)? {
        let bytes = (pages.end - pages.start) * PAGE_SIZE;
        let bytes = usize::try_from(bytes).map_err(|_| Errno::EFBIG)?;
        let view = View::new(object, pages.start * PAGE_SIZE, bytes)?;
        // The kernel swaps out only pages in a page table, so populate them first.
        view.advise(libc::MADV_POPULATE_READ)?;
        view.advise(libc::MADV_PAGEOUT)?;
    }
    Ok(())
}
