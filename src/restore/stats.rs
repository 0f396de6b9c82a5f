//! Statistics of a restore.

use std::time::{Duration, Instant};

use super::memory::Filled;
use crate::{image::proto, step::stats::Options};

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

    /// Records that all processes exist, with their memory.
    pub(super) fn forked(&mut self, filled: Filled) {
        self.forking = self.begin.elapsed();
        self.filled = filled;
    }

    /// Records that the tree runs.
    pub(super) fn restored(&mut self) {
        self.restore = self.begin.elapsed();
    }

    /// Writes the statistics, and prints them if requested.
    pub(super) fn finish(&self, options: &Options) {
        let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        let restore = proto::RestoreStatsEntry {
            pages_compared: self.filled.compared,
            pages_skipped_cow: self.filled.equal,
            forking_time: micros(self.forking),
            restore_time: micros(self.restore),
            pages_restored: Some(self.filled.written),
        };
        let entry = proto::StatsEntry { dump: None, restore: Some(restore) };
        options.publish("stats-restore", &entry, || self.display());
    }

    /// Prints the statistics.
    fn display(&self) {
        println!("forking time: {} us", self.forking.as_micros());
        println!("restore time: {} us", self.restore.as_micros());
        println!("pages compared: {}", self.filled.compared);
        println!("pages still shared: {}", self.filled.equal);
        println!("pages written: {}", self.filled.written);
    }
}
