//! Removes duplicates from existing images.
//!
//! Analysis is separate from changes: `plan`, `compare`, `objects` and `superseded` only
//! read; `stage` and [`free()`] change files. [`link()`] turns full dumps into a chain, and
//! [`reflink()`] makes the file system store equal pages once.

mod compare;
mod error;
mod free;
mod link;
mod objects;
mod plan;
mod progress;
mod reflink;
mod stage;
mod superseded;

pub use error::{DedupError, Result};
pub use free::{FreeOptions, Freed, check_freeing, free, free_locked, lock_ancestors};
pub use link::{LinkOptions, Linked, link};
pub use progress::Progress;
pub use reflink::{Reflinked, reflink};
