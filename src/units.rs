//! Units that would otherwise be mixed up as plain integers.

mod ids;
mod pids;
mod ranges;

use std::fmt;

pub use ids::{HostId, IdMap, IdRange, NO_ID, NsId};
pub use pids::{Below, HostPid, LocalPid, NsPid, PidMap};
pub use ranges::PageRanges;

/// Bytes in the unit in which memory is counted: the smallest page of all machines.
pub const PAGE_SIZE: u64 = 4096;

/// [`PAGE_SIZE`], for slices.
pub const PAGE_LEN: usize = 4096;

const _: () = assert!(PAGE_LEN as u64 == PAGE_SIZE);

/// `log2` of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// Bytes in the unit in which the room that a file takes is counted, whatever
/// the file system's own block size is (`stat(2)`, `st_blocks`).
pub const BLOCK_BYTES: u64 = 512;

/// The size of huge pages as `mmap(2)`, `memfd_create(2)` and `shmget(2)` have it in their
/// flags (`asm-generic/hugetlb_encode.h`): its logarithm, 0 for the machine's usual size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugeSize(u32);

impl HugeSize {
    const SHIFT: u32 = 26;
    const MASK: u32 = 0x3f << Self::SHIFT;
    /// The usual size where pages have 4 KiB, unless the kernel was started with another
    /// (`default_hugepagesz`).
    const USUAL_BYTES: u64 = 2 << 20;

    /// Returns the size of huge pages of so many bytes.
    pub const fn of(bytes: u64) -> Self {
        Self(bytes.trailing_zeros() << Self::SHIFT & Self::MASK)
    }

    /// Returns the size that is in flags.
    pub const fn in_flags(flags: u32) -> Self {
        Self(flags & Self::MASK)
    }

    /// Returns the bits that say so in flags.
    pub const fn flags(self) -> u32 {
        self.0
    }

    /// Returns the bytes in a page.
    pub const fn bytes(self) -> u64 {
        match self.0 >> Self::SHIFT {
            0 => Self::USUAL_BYTES,
            shift => 1 << shift,
        }
    }
}

/// Returns the bytes in so many pages, at most `u64::MAX`: images may claim more
/// pages than bytes can be counted.
pub const fn page_bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_SIZE)
}

/// The number of a page: an address, or an offset in an object, divided by
/// [`PAGE_SIZE`]. Below 2^52.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// Where pages must end: one short of the last page of a 64-bit address
    /// space, which the kernel has for itself, so that counts are below 2^52 too.
    pub const END: Self = Self((1 << (64 - PAGE_SHIFT)) - 1);

    /// Returns the page that begins at `address`, or `None` between two pages.
    pub const fn at(address: u64) -> Option<Self> {
        if address.is_multiple_of(PAGE_SIZE) { Some(Self(address >> PAGE_SHIFT)) } else { None }
    }

    /// Returns the page that holds the byte at `address`.
    pub const fn holding(address: u64) -> Self {
        Self(address >> PAGE_SHIFT)
    }

    /// Returns the address of the page's first byte; 2^64 wraps to 0.
    pub const fn address(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

impl fmt::Display for PageIndex {
    /// Writes the address of the page, in hexadecimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.address())
    }
}

/// An address in another process. Never a pointer: nothing here may follow it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RemoteAddr(pub u64);

impl RemoteAddr {
    /// Returns the address so many bytes on; wraps at 2^64 as the processor does.
    #[must_use]
    pub const fn plus(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

impl fmt::Display for RemoteAddr {
    /// Writes the address in hexadecimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The number of a descriptor in another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetFd(pub i32);

impl fmt::Display for TargetFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
