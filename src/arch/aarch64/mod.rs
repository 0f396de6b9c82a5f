//! 64-bit Arm: its images can be read; dump and restore are not built for it yet.

#[cfg(target_arch = "aarch64")]
pub mod native;
pub mod registers;
