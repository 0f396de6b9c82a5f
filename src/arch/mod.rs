//! Code and constants that differ between architectures.
//!
//! An image says on which kind its processes ran (`core_entry.mtype`): whatever reads
//! images asks that [`Machine`], whatever machine it runs on itself. Whatever runs
//! processes asks [`native`], which is the machine that this program is built for.
//!
//! The kinds of machines have a module each. What one of them knows of images is always
//! compiled; what it needs to run processes, only for that machine.

pub mod aarch64;
mod calls;
mod machine;
pub mod x86_64;

pub use calls::{ARGUMENTS, Entry, Return};
pub use machine::{Machine, Notes, UnknownMachine, told_page_size};
pub use x86_64::processor;

#[cfg(target_arch = "aarch64")]
pub use aarch64::native;
#[cfg(target_arch = "x86_64")]
pub use x86_64::native;

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("src/arch has no module for this machine");

/// Dump and restore are not built for this kind of machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "dump and restore do not support {} yet\nhelp: imgfs works on images of every machine",
    Machine::NATIVE.name()
)]
pub struct NotBuilt;

/// Checks that processes can be dumped and restored on this kind of machine.
///
/// # Errors
/// [`NotBuilt`].
pub const fn check_built() -> Result<(), NotBuilt> {
    if native::IS_BUILT { Ok(()) } else { Err(NotBuilt) }
}
