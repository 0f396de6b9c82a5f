//! The view as a mounted file system.
//!
//! [`ImageFs`] answers the requests of the kernel from a [`View`](crate::view::View),
//! [`Session`] mounts it and serves it until it is unmounted, and `errno` maps every
//! failure to an errno.

mod adapter;
mod buffer;
mod compose;
mod errno;
mod error;
mod follow;
mod handles;
mod image_fs;
mod mount;
mod punching;
pub mod recent;
mod reply;
mod session;

pub use compose::Compose;
pub use error::{MountError, Result};
pub use image_fs::ImageFs;
pub use mount::{FS_TYPE, MountedChain, commit, log, mounted_at, mounts, unmount};
pub use punching::Punch;
pub use session::{MountOptions, Session};
