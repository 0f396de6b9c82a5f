//! Where the statistics of a dump or a restore go.

use std::path::PathBuf;

use crate::{
    image::{self, ImageError, ImageWriter, Kind, proto::StatsEntry},
    sys::output,
};

/// What the user says of statistics.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    work_dir: PathBuf,
    display: bool,
}

impl Options {
    /// `work_dir`: where the file goes; it can be written as far as can be told. `display`: they
    /// are printed as well (`--display-stats`).
    pub fn new(work_dir: PathBuf, display: bool) -> Self {
        Self { work_dir, display }
    }

    /// Writes statistics to a file of this name, and lets `print` print them if the user wants
    /// that. The work is done by then: what fails here is logged and does not undo it.
    pub(crate) fn publish(&self, name: &str, entry: &StatsEntry, print: impl FnOnce()) {
        if let Err(error) = self.write(name, entry) {
            log::warn!("no statistics: {error}");
        }
        if self.display {
            print();
        }
    }

    fn write(&self, name: &str, entry: &StatsEntry) -> image::Result<()> {
        let path = self.work_dir.join(name);
        let wrong = |source| ImageError::Write { path: path.clone(), source };
        output::check_directory(&self.work_dir).map_err(wrong)?;
        // Of an earlier run.
        let _ = std::fs::remove_file(&path);
        let mut image = ImageWriter::create(&path, Kind::Stats)?;
        image.message(entry)?;
        image.finish()?;
        Ok(())
    }
}
