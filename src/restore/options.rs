//! What a restore is asked to do.

use std::{ffi::OsString, path::PathBuf};

use crate::{res::file::Validation, track::Tracker};

/// What a restore is asked to do.
///
/// Paths are as the user gave them, relative to the current directory unless it
/// says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where the images are.
    pub images_dir: PathBuf,
    /// Where statistics and other files that are no images go. It has been
    /// chosen already: it can be written as far as can be told.
    pub work_dir: PathBuf,
    /// Return when the tree runs, rather than to wait for its end.
    pub detached: bool,
    /// The root of the tree becomes a child of this program's parent.
    pub sibling: bool,
    /// Leave the tree stopped.
    pub leave_stopped: bool,
    /// The tree takes part in the session and the process group of this program.
    pub shell_job: bool,
    /// Where the pid of the root is written; relative to `work_dir`.
    pub pidfile: Option<PathBuf>,
    /// Open descriptors of this program that stand for resources of the images:
    /// number and key, such as `pipe:[4711]`.
    pub inherit_fds: Vec<(i32, String)>,
    /// The tree is put back into its cgroups.
    pub cgroups: bool,
    /// Programs to be run at certain stages, in this order.
    pub action_scripts: Vec<PathBuf>,
    /// What this process becomes when the tree runs, with its arguments; it is
    /// the parent of the tree then. Empty: it stays what it is.
    pub exec_cmd: Vec<OsString>,
    /// Unix sockets may have been connected to processes outside the tree.
    pub ext_unix_sk: bool,
    /// What tells a file from another one at the same path.
    pub file_validation: Validation,
    /// Free in the images what has been restored.
    pub auto_dedup: Option<AutoDedup>,
    /// Start the tracking of changes, for the next dump.
    pub track_mem: bool,
    /// How changes are tracked; `None` chooses what works.
    pub tracker: Option<Tracker>,
    /// Print the statistics afterwards.
    pub display_stats: bool,
}

/// When bytes that have been restored are freed in the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoDedup {
    /// When the whole restore has succeeded.
    Commit,
    /// As the restore goes; if it fails, the images are of no use any more.
    Now,
}
