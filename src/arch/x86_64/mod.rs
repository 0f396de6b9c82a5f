//! x86-64.

#[cfg(target_arch = "x86_64")]
mod code;
#[cfg(target_arch = "x86_64")]
mod frame;
#[cfg(target_arch = "x86_64")]
pub mod native;
pub mod processor;
pub mod registers;
#[cfg(target_arch = "x86_64")]
mod xsave;
