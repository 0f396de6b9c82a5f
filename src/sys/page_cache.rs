//! What the kernel holds of a file in memory (`cachestat(2)`, Linux 6.5).
#![expect(unsafe_code, reason = "a system call that no crate of ours wraps")]

use std::{fs::File, os::fd::AsRawFd};

use nix::{errno::Errno, libc};

use crate::fault::{self, Novelty};

/// `cachestat` (`include/uapi/asm-generic/unistd.h`), the same on all machines; `libc` lacks
/// it for some.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` (`include/uapi/linux/mman.h`).
#[derive(Debug)]
#[repr(C)]
struct Range {
    off: u64,
    len: u64,
}
const _: () = assert!(size_of::<Range>() == 16);

/// `struct cachestat` (the same file): numbers of pages.
#[derive(Debug, Default)]
#[repr(C)]
struct Stat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}
const _: () = assert!(size_of::<Stat>() == 40);

/// Returns how many of the pages that `len` bytes from `offset` on are in are in memory.
///
/// # Errors
/// `ENOSYS` on older kernels, `EPERM` for a file that the caller could not write to,
/// `EOPNOTSUPP` for one whose pages are huge.
pub fn cached_pages(file: &File, offset: u64, len: u64) -> nix::Result<u64> {
    if fault::is_without(Novelty::CacheStat) {
        return Err(Errno::ENOSYS);
    }
    let range = Range { off: offset, len };
    let mut stat = Stat::default();
    // SAFETY: the kernel reads a `struct cachestat_range` and writes a `struct cachestat`,
    // whose sizes are asserted; it takes no flags.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0 as libc::c_uint,
        )
    };
    Errno::result(result)?;
    Ok(stat.cached)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_written_is_in_memory() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 3 * 4096]).unwrap();
        file.set_len(64 << 20).unwrap();
        match cached_pages(&file, 0, 64 << 20) {
            Ok(pages) => assert_eq!(pages, 3),
            Err(errno) => assert_eq!(errno, Errno::ENOSYS),
        }
    }
}
