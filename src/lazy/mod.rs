//! Memory on demand (`restore --lazy`): the tree runs at once, and a pager supplies its pages.
//!
//! A restore leaves out the pages of private memory without a file, and registers that memory with a
//! userfaultfd of each process ([`crate::sys::missing`]). A process of its own, the [`pager`], takes these
//! over. A thread that touches a missing page waits until the pager has read the page from the chain.
//! Meanwhile the pager reads all other pages, in parallel. When all are there, it ends.
//!
//! The kernel reports what else changes the memory: `fork`, `mremap`, `munmap`, `madvise`. The pager
//! notes that before the process goes on (`lazy/waiting.rs`, `lazy/space.rs`).
//!
//! # If the pager dies
//!
//! If the last descriptor of a userfaultfd is closed, the kernel lets the process go on, and pages that
//! are missing read as zeros. That must never happen, not even after `kill -9`. So the tree ends with its
//! pager, by three means:
//!
//! - The pager holds a dead man's handle ([`crate::sys::dead_man`]): the kernel sends `SIGKILL` to all
//!   processes of the tree before it closes the userfaultfds of the pager.
//! - The pager has a watcher, its parent, which holds duplicates of the userfaultfds. If the pager fails,
//!   the watcher kills the tree, and says why. While it lives, threads that wait for pages wait on. It
//!   covers the first process of a pid namespace, which no signal of the handle reaches.
//! - A pager that cannot read a page kills the tree itself.
//!
//! A descriptor inside the tree would survive the pager, but a program may close it, and would see it.
//! A tracer's death also kills its tracees, but the kernel closes the tracer's files first.

mod client;
mod error;
pub mod pager;
mod record;
mod recorder;
mod rendezvous;
mod space;
mod waiting;
mod wire;

use nix::libc;

pub use client::{Handed, Log, Options, Pager};
pub use error::{LazyError, Result};
pub use rendezvous::await_pagers;

use crate::{
    image::{proto::VmaEntry, vma},
    res::mm::mapping,
    units::PAGE_SIZE,
};

/// The name of the program when it runs as a pager.
pub const NAME: &str = "rcriu-pager";

/// Whether pages of a mapping can be supplied on demand. Others are restored before the tree runs:
///
/// - files, shared memory and AIO rings: the kernel does not report that their pages are missing, or
///   programs reach them by descriptors, too;
/// - stacks that grow, since the kernel places them; locked memory, since its pages must be there;
/// - huge pages that were asked for by name;
/// - memory that is zero in children (`MADV_WIPEONFORK`), since the kernel does not say which that is.
pub fn can_wait(entry: &VmaEntry) -> bool {
    let eager = libc::MAP_GROWSDOWN | libc::MAP_LOCKED | libc::MAP_HUGETLB;
    entry.status & vma::ANON_PRIVATE != 0
        && !mapping::is_vdso(entry)
        && !mapping::is_aio_ring(entry)
        && entry.flags & eager.cast_unsigned() == 0
        && entry.flags & DROPPABLE != DROPPABLE
        && mapping::page_bytes(entry) == PAGE_SIZE
        && !mapping::advice(entry).any(|advice| advice == libc::MADV_WIPEONFORK)
}

/// The type of memory that the kernel may drop (`linux/mman.h`, Linux 6.11).
const DROPPABLE: u32 = libc::MAP_DROPPABLE.cast_unsigned();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_private_memory_waits() {
        let plain = VmaEntry {
            start: 0x1000,
            end: 0x3000,
            flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).cast_unsigned(),
            status: vma::REGULAR | vma::ANON_PRIVATE,
            ..VmaEntry::default()
        };
        assert!(can_wait(&plain));
        for flag in [libc::MAP_GROWSDOWN, libc::MAP_LOCKED, libc::MAP_HUGETLB] {
            let flags = plain.flags | flag.cast_unsigned();
            assert!(!can_wait(&VmaEntry { flags, ..plain }), "{flag:#x}");
        }
        for status in [vma::FILE_PRIVATE, vma::ANON_SHARED, vma::VDSO | vma::ANON_PRIVATE] {
            assert!(!can_wait(&VmaEntry { status, ..plain }), "{status:#x}");
        }
        let madv = Some(1 << libc::MADV_WIPEONFORK);
        assert!(!can_wait(&VmaEntry { madv, ..plain }));
        let madv = Some(1 << libc::MADV_HUGEPAGE);
        assert!(can_wait(&VmaEntry { madv, ..plain }));
    }
}
