//! Watches of files: inotify instances and fanotify groups.

mod fanotify;
mod inotify;
mod irmap;
mod target;
mod unread;

pub(super) use self::{fanotify::KIND as FANOTIFY, inotify::KIND as INOTIFY};

use std::path::PathBuf;

/// The user's options for a dump of watches.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    always_scan: bool,
    scan: Vec<PathBuf>,
}

impl Options {
    /// `always_scan`: watched files are looked for in these directories first (`--force-irmap`), and
    /// by their handles only if they are not there. `scan` are directories to look into
    /// (`--irmap-scan-path`).
    pub fn new(always_scan: bool, scan: Vec<PathBuf>) -> Self {
        Self { always_scan, scan }
    }
}
