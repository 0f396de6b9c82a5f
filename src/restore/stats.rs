//! How long a restore took and what it wrote.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use super::{Result, memory::Filled};
use crate::{
    image::{ImageError, ImageWriter, Kind, proto},
    sys::output,
};

/// The statistics of a restore.
#[derive(Debug)]
pub(super) struct Stats {
    begin: Instant,
    forking: Duration,
    restore: Duration,
    filled: Filled,
}

impl Stats {
    pub(super) fn begin() -> Self {
        Self {
            begin: Instant::now(),
            forking: Duration::ZERO,
            restore: Duration::ZERO,
            filled: Filled::default(),
        }
    }

    /// Notes that all processes exist, with their memory.
    pub(super) fn forked(&mut self, filled: Filled) {
        self.forking = self.begin.elapsed();
        self.filled = filled;
    }

    /// Notes that the tree runs.
    pub(super) fn restored(&mut self) {
        self.restore = self.begin.elapsed();
    }

    /// Writes `stats-restore` into `dir`.
    ///
    /// # Errors
    /// [`crate::image::ImageError::Write`].
    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        let path = dir.join("stats-restore");
        let wrong = |source| ImageError::Write { path: path.clone(), source };
        output::check_directory(dir).map_err(wrong)?;
        // Of an earlier restore.
        let _ = std::fs::remove_file(&path);
        let restore = proto::RestoreStatsEntry {
            pages_compared: self.filled.compared,
            pages_skipped_cow: self.filled.equal,
            forking_time: micros(self.forking),
            restore_time: micros(self.restore),
            pages_restored: Some(self.filled.written),
        };
        let mut image = ImageWriter::create(&path, Kind::Stats)?;
        image.message(&proto::StatsEntry { dump: None, restore: Some(restore) })?;
        image.finish()?;
        Ok(())
    }

    /// Prints the statistics.
    pub(super) fn display(&self) {
        println!("forking time: {} us", self.forking.as_micros());
        println!("restore time: {} us", self.restore.as_micros());
        println!("pages compared: {}", self.filled.compared);
        println!("pages still shared: {}", self.filled.equal);
        println!("pages written: {}", self.filled.written);
    }
}
