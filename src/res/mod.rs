//! Kinds of state that processes have, one file each, with both directions in it.

pub mod attribute;
pub mod calls;
mod error;
pub mod file;
pub mod mm;
pub mod ns;
pub mod signals;
pub mod task;
pub mod thread;
pub mod tree;

pub use error::{ResError, Result};
