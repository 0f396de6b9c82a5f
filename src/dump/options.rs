//! What a dump is asked to do.

use std::path::PathBuf;

use crate::{res::file::Validation, track::Tracker, units::HostPid};

/// What a dump is asked to do.
///
/// Paths are as the user gave them, relative to the current directory unless it
/// says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The root of the tree.
    pub pid: HostPid,
    /// Where the images go.
    pub images_dir: PathBuf,
    /// Where statistics and other files that are no images go. It has been
    /// chosen already: it can be written as far as can be told.
    pub work_dir: PathBuf,
    /// Only read the memory, while the tree runs on.
    pub pre_dump: bool,
    /// Let the tree run on afterwards instead of killing it.
    pub leave_running: bool,
    /// Leave the tree stopped afterwards instead of killing it. Not together
    /// with `leave_running`.
    pub leave_stopped: bool,
    /// The session, the process group and the terminal may be those of processes
    /// outside the tree.
    pub shell_job: bool,
    /// Unix sockets may be connected to processes outside the tree.
    pub ext_unix_sk: bool,
    /// Give files that have no name left a name again.
    pub link_remap: bool,
    /// What tells a file from another one at the same path.
    pub file_validation: Validation,
    /// Deleted files larger than this are not copied into the images.
    pub ghost_limit_bytes: u64,
    /// Start the tracking of changes, for the next dump.
    pub track_mem: bool,
    /// Free in the parent what this dump supersedes.
    pub auto_dedup: bool,
    /// The parent, relative to `images_dir`.
    pub prev_images_dir: Option<PathBuf>,
    /// How changes are tracked; `None` chooses what works.
    pub tracker: Option<Tracker>,
    /// Resources that somebody else will provide at the restore, in CRIU's words:
    /// `TYPE[ID]` or `TYPE[ID]:VALUE`.
    pub external: Vec<String>,
    /// Programs to be run at certain stages, in this order.
    pub action_scripts: Vec<PathBuf>,
    /// The cgroups of the tree are recorded, if they are not those of this program.
    pub cgroups: bool,
    /// How long to try to stop the tree, in seconds.
    pub timeout_s: u32,
    /// Print the statistics afterwards.
    pub display_stats: bool,
}

impl Options {
    /// [`Options::ghost_limit_bytes`] unless told otherwise: 1 MiB, as CRIU has it.
    pub const GHOST_LIMIT_BYTES: u64 = 1 << 20;

    /// [`Options::timeout_s`] unless told otherwise, as CRIU has it.
    pub const TIMEOUT_S: u32 = 10;
}
