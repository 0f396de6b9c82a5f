//! Watches of files: inotify instances and fanotify groups.

mod fanotify;
mod inotify;
mod irmap;
mod target;

pub(super) use self::{fanotify::KIND as FANOTIFY, inotify::KIND as INOTIFY};

use std::{os::fd::AsFd, path::PathBuf};

use super::{Description, error::file_of};
use crate::{causes::tell, sys::fds};

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

/// Warns about events that the program has not read yet: no call can put them into the queue of the
/// restored instance.
fn warn_about_events(file: &Description, what: &str) {
    if let Ok(bytes @ 1..) = fds::readable_bytes(file.fd.as_fd()) {
        tell(
            log::Level::Warn,
            &format!(
                "{} is {what} with {bytes} bytes of events that the program has not read: the restored \
                 program does not get them\nhelp: dump the program when it has read them, or have it \
                 look at its files again",
                file_of(file.pid, file.number)
            ),
        );
    }
}
