//! What dumps and restores have in common: why a step failed, and where statistics go.

pub mod stats;

use std::path::PathBuf;

use nix::errno::Errno;

use crate::{
    action::ActionError,
    arch::NotBuilt,
    chain::ChainError,
    fault::Injected,
    image::ImageError,
    inject::InjectError,
    proc::ProcError,
    res::{ResError, file::FileError},
    sys::lock::LockError,
    track::TrackError,
    units::HostPid,
};

/// Why a step failed that dumps and restores have in common.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// A system call about a process failed.
    #[error("{step} process {pid}")]
    Process {
        /// The process.
        pid: HostPid,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The cause.
        source: Errno,
    },
    /// The directory for the images cannot be used.
    #[error("images directory {path}: {problem}", path = .path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong, and what would help.
        problem: String,
    },
    /// The parent chain cannot be used.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// An image could not be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An open file could not be dumped or restored.
    #[error(transparent)]
    OpenFile(#[from] FileError),
    /// State could not be dumped or restored.
    #[error(transparent)]
    State(#[from] ResError),
    /// A process could not be stopped or made to work for this program.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Changes could not be tracked in the way that was asked for.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// Something in `/proc` could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// A program of the user failed.
    #[error(transparent)]
    Action(#[from] ActionError),
    /// A directory is in use by another program.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Processes of this machine cannot be handled yet.
    #[error(transparent)]
    NotBuilt(#[from] NotBuilt),
    /// A test asked for it.
    #[error(transparent)]
    Fault(#[from] Injected),
}
