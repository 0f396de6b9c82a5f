//! The view as a mounted file system.
//!
//! [`adapter`](ImageFs) answers the kernel out of a [`View`](crate::view::View),
//! [`Session`] mounts it and serves until it is unmounted, and every failure
//! becomes an errno in one place, `errno`.

mod adapter;
mod buffer;
mod errno;
mod error;
mod handles;
mod mount;
mod mounts;
mod reply;
mod session;

pub use adapter::ImageFs;
pub use error::{MountError, Result};
pub use mount::unmount;
pub use mounts::{FS_TYPE, Mounted};
pub use session::{MountOptions, Session};
