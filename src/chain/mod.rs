//! Chains of image directories. They answer one question: which bytes hold page P of memory
//! M?
//!
//! [`Chain`] knows the directories and their parent links. [`Index`] resolves one memory of
//! one snapshot across its ancestors. [`Content`] presents the answer as runs of bytes in
//! [`Files`], which are opened when first needed.

mod bonds;
mod cache;
mod check;
mod content;
mod diff;
mod discovery;
mod duplicates;
mod error;
mod files;
pub mod freed;
mod glance;
mod gone;
mod held;
mod holes;
mod index;
mod links;
pub mod map;
mod memories;
mod memory;
mod overlay;
mod owner;
mod pack;
mod piece;
mod readable;
mod summary;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use bonds::dump_name;
pub use check::{Finding, Severity, check};
pub(crate) use content::read_runs;
pub use content::{Content, Run, Source, read_at};
pub use diff::{Difference, MemoryDiff, diff};
pub use duplicates::{DuplicateCounts, duplicates};
pub(crate) use duplicates::{StoredPages, zero_hash};
pub use error::{ChainError, LinkError, Result};
pub use files::{BackingFile, FileId, Files};
pub use freed::Freeing;
pub use glance::{Glance, glance};
pub use held::{Pagemaps, held_pages, parent_of};
pub use holes::Whence;
pub(crate) use holes::seek_file;
pub use index::{Extent, Index, Layer, Place};
pub use links::{Chain, Snapshot, SnapshotId, children};
pub(crate) use memory::Cursor;
pub use memory::{FlatPages, MemoryBytes};
pub use owner::Owner;
pub use pack::{CHECKPOINT, beside, copy_beside, pack};
pub use summary::{PageCounts, Summary, disk_bytes};

/// The extended attribute of a directory in a mount that shows a whole snapshot: the
/// absolute path of the image directory.
pub const DIRECTORY_XATTR: &str = "user.imgfs.directory";

/// The extended attribute of the root of a mount that frees pages: when it does
/// (`on-request`, `on-read` or `commit`).
pub const PUNCH_XATTR: &str = "user.imgfs.punch";

/// The value of [`PUNCH_XATTR`] if the mount only records punched pages, and frees them on
/// `imgfs commit`.
pub const PUNCH_ON_COMMIT: &str = "commit";

/// The extended attribute of the root of a mount in which pages were freed, so that the
/// snapshot cannot be restored: a message that says which pages.
pub const GONE_XATTR: &str = "user.imgfs.gone";
