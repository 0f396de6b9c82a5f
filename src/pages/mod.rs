//! Pages of memory, on their way into images and out of them.
//!
//! A dump goes through these steps: [`scan`] finds pages that may hold something,
//! [`marked`] and [`settle`] take out those that are known to be in the parent, [`copy`]
//! reads the rest, compares it with the parent, and hands it to a [`PageSink`]. A restore
//! takes pages out of the chain in [`Chunks`].

mod compare;
mod copy;
mod error;
mod memory;
mod process;
pub mod scan;
mod sink;
mod source;
mod stretch;

pub use copy::{Copied, Counts, copy};
pub use error::{PagesError, Result};
pub use memory::{Memory, Origin, parent_memory};
pub use process::ProcessMemory;
pub use sink::{FileSink, PageSink};
pub use source::{Chunk, Chunks};
pub use stretch::{Stretch, marked, settle};

use crate::image::SnapshotWriter;

/// Copies all memories into files of `images`; their pages files are numbered from 1. The
/// disk begins with them at once if `early`, which is for trees that are not to run on, and
/// for those that run already: it ends sooner, but copying takes longer.
///
/// # Errors
/// What keeps a memory from being read or an image from being written.
pub fn write(memories: &[Memory], images: &SnapshotWriter, early: bool) -> Result<Copied> {
    let mut work = Vec::with_capacity(memories.len());
    for (number, memory) in (1..).zip(memories) {
        work.push((memory, FileSink::create(images, memory.id, number, early)?));
    }
    copy(work)
}
