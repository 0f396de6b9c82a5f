//! What a restore is asked to do: a group of options for each phase or kind that reads some.
//!
//! [`run`](super::run) takes them apart and hands each group to its reader, and nothing else.

use std::path::PathBuf;

use crate::{
    action,
    res::{file, tree},
    step::stats,
    track,
};

/// What a restore is asked to do.
///
/// Paths are as the user gave them, relative to the current directory.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    pub(crate) store: Store,
    pub(crate) relations: Relations,
    pub(crate) release: Release,
    pub(crate) common: tree::Options,
    pub(crate) files: file::RestoreOptions,
    pub(crate) track: track::Options,
    pub(crate) actions: action::Options,
    pub(crate) stats: stats::Options,
}

/// Where the images are.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Store {
    /// The directory of the images.
    pub(crate) images_dir: PathBuf,
    /// Free in the images what has been restored (`--auto-dedup`).
    pub(crate) free: Option<AutoDedup>,
}

/// How the tree is related to this program.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Relations {
    /// It takes part in the session and the process group of this program (`--shell-job`).
    pub(crate) shell_job: bool,
    /// Its root becomes a child of this program's parent (`--restore-sibling`).
    pub(crate) sibling: bool,
}

/// How the tree is let go.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Release {
    /// It stays stopped (`--leave-stopped`).
    pub(crate) stopped: bool,
    /// Return when it has ended, and not as soon as it runs.
    pub(crate) wait: bool,
    /// The file for the pid of its root.
    pub(crate) pidfile: Option<PathBuf>,
}

/// When bytes that have been restored are freed in the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoDedup {
    /// When the whole restore has succeeded.
    Commit,
    /// As the restore goes; if it fails, the images are of no use any more.
    Now,
}
