//! The options of a restore: one group for each phase or kind that reads some of them.
//!
//! [`run`](super::run) takes the groups apart and hands each to its reader only.

use std::path::PathBuf;

use crate::{
    action, lazy,
    res::{file, ns, tree},
    step::stats,
    track,
};

/// The options of a restore.
///
/// Paths are as the user gave them, relative to the current directory.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    pub(crate) store: Store,
    pub(crate) relations: Relations,
    pub(crate) release: Release,
    pub(crate) common: tree::RestoreOptions,
    pub(crate) namespaces: ns::Options,
    pub(crate) files: file::RestoreOptions,
    /// Restore memory on demand (`--lazy`).
    pub(crate) lazy: Option<lazy::Options>,
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
    /// Free the restored pages in the images (`--auto-dedup`).
    pub(crate) free: Option<AutoDedup>,
}

/// How the tree relates to this program.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Relations {
    /// It joins the session and the process group of this program (`--shell-job`).
    pub(crate) shell_job: bool,
    /// Its root becomes a child of this program's parent (`--restore-sibling`).
    pub(crate) sibling: bool,
}

/// How the tree is released.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Release {
    /// It stays stopped (`--leave-stopped`).
    pub(crate) stopped: bool,
    /// What this program does next.
    pub(crate) then: Then,
    /// The file for the pid of its root.
    pub(crate) pidfile: Option<PathBuf>,
}

/// What this program does when the tree runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It waits until the root has ended.
    Wait,
    /// It exits.
    Exit,
    /// It executes another program.
    Execute,
}

/// When restored pages are freed in the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoDedup {
    /// After the whole restore has succeeded.
    Commit,
    /// During the restore; if that fails, the images are useless.
    Now,
}
