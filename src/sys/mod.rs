//! System calls: those without a safe wrapper in a crate, and those that several modules need.

pub mod cancel;
pub mod commit;
pub mod daemon;
pub mod dead_man;
mod descriptors;
pub mod fanotify;
pub mod fds;
pub mod features;
pub mod gather;
pub mod heap;
pub mod kernel_memory;
pub mod loan;
pub mod lock;
pub mod missing;
pub mod mounts;
pub mod mqueue;
pub mod namespace;
pub mod output;
pub mod page_cache;
pub mod pagemap;
pub mod process;
pub mod ptrace;
pub mod reader;
pub mod reflink;
pub mod root;
pub mod shm;
pub mod socket;
pub mod supervise;
pub mod swap;
pub mod sysv;
pub mod task;
pub mod tracepoint;
pub mod tty;
pub mod tun;
pub mod userfaultfd;
pub mod visit;
pub mod watch;
pub mod xattr;

pub use descriptors::receive_fd;
pub use features::Features;

use std::io;

use nix::errno::Errno;

/// Returns the error number of an error; `EIO` if it has none.
pub fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
