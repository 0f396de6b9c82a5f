//! How long a dump took and what it copied.

use std::time::{Duration, Instant};

use super::tracking::Untracked;
use crate::{image::proto, pages::Copied, step::stats::Options};

/// The statistics of a dump.
#[derive(Debug, Default)]
pub(super) struct Stats {
    freezing: Duration,
    since: Option<Instant>,
    frozen: Duration,
    collecting: Duration,
    copying: Duration,
    syncing: Duration,
    pub(super) copied: Copied,
    /// Pages that would not have been looked at if they had been tracked.
    pub(super) untracked: Untracked,
}

impl Stats {
    /// Measures how long it takes to stop the tree.
    pub(super) fn freezing<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        self.since = Some(begin);
        let result = work();
        self.freezing = begin.elapsed();
        result
    }

    /// Notes that the tree has stopped.
    pub(super) fn frozen(&mut self) {
        self.since = Some(Instant::now());
    }

    /// Notes that the tree goes on or is gone.
    pub(super) fn thawed(&mut self) {
        if let Some(since) = self.since.take() {
            self.frozen = since.elapsed();
        }
    }

    /// Notes that all is known of the tree, but for the bytes of its memory.
    pub(super) fn collected(&mut self) {
        self.collecting = self.since.map_or(Duration::ZERO, |since| since.elapsed());
    }

    /// Measures how long it takes to bring the images to the disk.
    pub(super) fn syncing<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = work();
        self.syncing = begin.elapsed();
        result
    }

    /// Measures how long it takes to copy memory.
    pub(super) fn copying<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = work();
        self.copying += begin.elapsed();
        result
    }

    fn entry(&self) -> proto::DumpStatsEntry {
        let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        let Copied { private, shared } = self.copied;
        proto::DumpStatsEntry {
            freezing_time: micros(self.freezing),
            frozen_time: micros(self.frozen),
            memdump_time: micros(self.copying),
            memwrite_time: 0,
            pages_scanned: private.scanned,
            pages_skipped_parent: private.in_parent,
            pages_written: private.stored,
            irmap_resolve: Some(0),
            pages_lazy: 0,
            page_pipes: Some(0),
            page_pipe_bufs: Some(0),
            shpages_scanned: Some(shared.scanned),
            shpages_skipped_parent: Some(shared.in_parent),
            shpages_written: Some(shared.stored),
            rcriu_pages_untracked: Some(self.untracked.private),
            rcriu_shpages_untracked: Some(self.untracked.shared),
        }
    }

    /// Writes the statistics, and prints them if the user wants that.
    pub(super) fn finish(&self, options: &Options) {
        let entry = proto::StatsEntry { dump: Some(self.entry()), restore: None };
        options.publish("stats-dump", &entry, || self.display());
    }

    /// Prints the statistics.
    fn display(&self) {
        let Copied { private, shared } = self.copied;
        println!("freezing time: {} us", self.freezing.as_micros());
        println!("frozen time: {} us", self.frozen.as_micros());
        println!("collecting time: {} us", self.collecting.as_micros());
        println!("memory dump time: {} us", self.copying.as_micros());
        println!("sync time: {} us", self.syncing.as_micros());
        let Untracked { private: of_private, shared: of_shared } = self.untracked;
        for (name, counts, untracked) in
            [("private", private, of_private), ("shared", shared, of_shared)]
        {
            println!(
                "{name} pages: {} scanned, {} compared, {} in parent, {} zero, {} stored, \
                 {untracked} not tracked",
                counts.scanned, counts.compared, counts.in_parent, counts.zero, counts.stored,
            );
        }
    }
}
