//! Removing duplicates from images that exist.
//!
//! Looking and deciding is apart from changing: [`plan`] and [`compare`] read, and
//! [`stage`] changes files. [`link()`] makes a chain of full dumps.

mod compare;
mod error;
mod link;
mod objects;
mod plan;
mod stage;

pub use error::{DedupError, Result};
pub use link::{LinkOptions, Linked, Progress, link};
