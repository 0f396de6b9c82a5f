//! Removing duplicates from images that exist.
//!
//! Looking and deciding is apart from changing: `plan`, `compare`, `objects` and
//! `superseded` read, `stage` and [`free()`] change files. [`link()`] makes a chain of full
//! dumps, and [`reflink()`] makes the file system store equal pages once.

mod compare;
mod error;
mod free;
mod link;
mod objects;
mod plan;
mod reflink;
mod stage;
mod superseded;

pub use error::{DedupError, Result};
pub use free::{FreeOptions, Freed, check_freeing, free, free_locked, lock_ancestors};
pub use link::{LinkOptions, Linked, Progress, link};
pub use reflink::{Reflinked, reflink};
