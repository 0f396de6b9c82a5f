//! Kinds of process state.
//!
//! Each kind has one file, which both dumps and restores it. Folders group the kinds by what
//! owns the state: a namespace, the tree, an address space, a task, a thread, or a file.

pub mod attribute;
pub mod calls;
mod cgroups;
mod error;
pub mod file;
mod kernel;
pub mod mm;
mod mqueue;
mod netlink;
pub mod ns;
pub mod seccomp;
pub mod signals;
mod sysv;
pub mod task;
pub mod thread;
pub mod tree;

pub use error::{ResError, Result};
