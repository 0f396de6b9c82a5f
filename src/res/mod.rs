//! Kinds of state that processes have, one file each, with both directions in it.

pub mod attribute;
pub mod cgroup;
pub mod creds;
mod error;
pub mod file;
pub mod leader;
pub mod mapping;
pub mod signals;
pub mod stop;
pub mod sysv;
pub mod task;
pub mod thread;
pub mod timers;
pub mod track;

pub use error::{ResError, Result};
