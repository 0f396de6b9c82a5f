//! What needs `unsafe`: system calls that no crate makes safe for us.

pub mod daemon;
mod descriptors;
pub mod gather;
pub mod pagemap;
pub mod process;
pub mod ptrace;
pub mod socket;

pub use descriptors::receive_fd;
