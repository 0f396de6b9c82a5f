//! Work inside other processes: lists of system calls that they execute.

mod arch;
mod error;
mod freeze;
mod helper;
mod script;
mod session;
#[cfg(test)]
mod tests;
mod tracee;

pub use error::{InjectError, Result};
pub use freeze::{Frozen, Outcome, Task};
pub use helper::Helper;
pub use script::{Answers, Arg, Buffer, CallId, Script};
pub use session::{Scratch, TABLE_BYTES, with_scratch};
pub use tracee::{Tracee, registers_to_resume};
