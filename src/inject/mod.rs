//! Injects lists of system calls, called scripts, into other processes.

mod birth;
mod cgroup;
mod child;
mod error;
mod freeze;
mod helper;
mod hold;
mod home;
mod repair;
mod scratch;
mod script;
mod session;
mod shadow;
#[cfg(test)]
mod tests;
mod tracee;
mod userfault;

pub use birth::Wanted;
pub use cgroup::Freezable;
pub use child::{adopt_sleeper, await_end, await_ends, await_stop};
pub use error::{InjectError, Result};
pub use freeze::{Frozen, Options as FreezeOptions, Outcome, Task, living};
pub use helper::{First, Helper, Helpers, Lender};
pub use home::registers_to_exit;
pub use repair::{Repair, repair};
pub use scratch::{Scratch, TABLE_BYTES};
pub use script::{Answers, Arg, Buffer, CallId, Script};
pub use session::{Session, with_session};
pub use shadow::{Shadows, reap_shadows};
pub use tracee::{Tracee, registers_to_resume, try_to_suspend_filters};
pub use userfault::{RunPaused, make_userfault};
