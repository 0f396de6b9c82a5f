//! Copies pages of memory into images and out of them.
//!
//! A dump takes these steps. [`scan`] finds the pages that may have contents. [`marked`] and
//! [`require_stored`] mark those that are known to be in the parent. [`copy`] reads the others, compares
//! them with the parent, and passes them to a [`PageSink`]. A restore reads pages from the chain in
//! [`Chunks`].

mod compare;
mod copy;
mod error;
mod memory;
mod process;
mod remote;
pub mod scan;
mod sink;
mod source;
mod stretch;
pub mod tls;
pub mod wire;

pub use copy::{Copied, Counts, copy};
pub use error::{PagesError, Result};
pub use memory::{Memory, Origin, parent_memory};
pub use process::ProcessMemory;
pub use remote::{PageServer, ServerOptions, ServerPlace};
pub use sink::{FileSink, PageSink};
pub use source::{Chunk, Chunks};
pub use stretch::{Stretch, marked, require_held, require_stored};

use crate::image::SnapshotWriter;

/// Copies memories into files of `images`, with pages files numbered from `first`.
///
/// If `early`, starts write-back while copying. The dump then ends sooner, but copying takes longer,
/// so use it for trees that do not resume, or that run during the copy.
///
/// # Errors
/// A memory cannot be read, or an image cannot be written.
pub fn write(
    memories: &[Memory],
    first: u32,
    images: &SnapshotWriter,
    early: bool,
) -> Result<Copied> {
    let mut work = Vec::with_capacity(memories.len());
    for (number, memory) in (first..).zip(memories) {
        work.push((memory, FileSink::create(images, memory.id, number, early)?));
    }
    copy(work)
}
