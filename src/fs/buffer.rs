//! Buffers for the answers to reads.

use std::{cell::RefCell, sync::LazyLock};

use memmap2::{Advice, Mmap, MmapMut};

/// The longest read that the kernel requests: `fs.fuse.max_pages_limit`, 256 pages unless
/// root raises it. A longer read gets a buffer of its own.
const BUFFER_BYTES: usize = 1 << 20;

/// Reads up to this length have a separate buffer: the kernel zeroes a whole huge page before its
/// first use, which takes longer than many such reads.
const SMALL_BYTES: usize = 64 << 10;

/// Length of the mapping: an anonymous mapping of this length begins at a multiple of a huge page,
/// so that the kernel can back it with huge pages.
const MAPPING_BYTES: usize = 2 << 20;

thread_local! {
    static BUFFER: RefCell<Option<MmapMut>> = const { RefCell::new(None) };
    static SMALL: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Calls `use_buffer` with `len` bytes whose content is arbitrary.
///
/// Every thread reuses its own buffer, which stays in the processor's cache and needs no page
/// faults.
pub(super) fn with<T>(len: usize, use_buffer: impl FnOnce(&mut [u8]) -> T) -> T {
    if len <= SMALL_BYTES {
        return SMALL.with_borrow_mut(|buffer| {
            buffer.resize(buffer.len().max(len), 0);
            use_buffer(&mut buffer[..len])
        });
    }
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.is_none() && len <= BUFFER_BYTES {
            *buffer = allocate();
        }
        match buffer {
            Some(mapping) if len <= BUFFER_BYTES => use_buffer(&mut mapping[..len]),
            _ => use_buffer(&mut vec![0; len]),
        }
    })
}

/// Calls `use_zeroes` with `len` bytes that are zero.
pub(super) fn with_zeroes<T>(len: usize, use_zeroes: impl FnOnce(&[u8]) -> T) -> T {
    // All threads share it; no thread writes to its pages.
    static ZEROES: LazyLock<Option<Mmap>> =
        LazyLock::new(|| MmapMut::map_anon(BUFFER_BYTES).and_then(MmapMut::make_read_only).ok());
    match &*ZEROES {
        Some(zeroes) if len <= BUFFER_BYTES => use_zeroes(&zeroes[..len]),
        _ => use_zeroes(&vec![0; len]),
    }
}

fn allocate() -> Option<MmapMut> {
    let mapping = MmapMut::map_anon(MAPPING_BYTES).ok()?;
    // This is only an optimization: kernels without huge pages refuse.
    let _ = mapping.advise(Advice::HugePage);
    Some(mapping)
}
