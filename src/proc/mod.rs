//! What `/proc` says of processes.

use std::{io, path::PathBuf};

/// Why something in `/proc` could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ProcError {
    /// It cannot be read.
    #[error("read {path}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// `/proc/PID/fdinfo/N`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdInfo {
    /// The file offset.
    pub pos: u64,
    /// Status flags and `O_CLOEXEC`.
    pub flags: u32,
    /// The mount.
    pub mnt_id: i32,
}
