//! What needs `unsafe`: system calls that no crate makes safe for us.

pub mod daemon;
mod descriptors;
pub mod gather;

pub use descriptors::receive_fd;
