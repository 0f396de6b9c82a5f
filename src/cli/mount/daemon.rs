//! The daemon that serves a mount.

use std::{io::Write, path::Path, sync::Arc};

use anyhow::{Context, bail};
use indicatif::BinaryBytes;

use super::{
    args::{MountArgs, PunchName},
    trust::Trust,
};
use crate::{
    causes::tell,
    chain::{Chain, Glance, SnapshotId, freed, glance},
    cli::{
        Common, exit, log_sink,
        source::{absolute, choose},
        times,
    },
    fs::{MountOptions, Session},
    image::Kind,
    sys::{
        daemon::{self, Background, Detached, Start},
        lock::{Access, DirectoryLocks},
    },
    units::page_bytes,
    view::View,
};

impl MountArgs {
    /// Starts the daemon, and returns when it is ready or has failed.
    pub(super) fn detach(mut self, common: Common) -> anyhow::Result<u8> {
        // The daemon changes its working directory.
        let optional = [self.log_file.as_mut(), self.compose_dir.as_mut()];
        self.source.make_absolute()?;
        std::iter::once(&mut self.mountpoint)
            .chain(optional.into_iter().flatten())
            .try_for_each(absolute)?;
        let foreground = match daemon::detach().context("start a process in the background")? {
            Detached::Background(background) => {
                return self.serve(Some(background), common).map(|()| exit::OK);
            }
            Detached::Foreground(foreground) => foreground,
        };
        match foreground.wait().context("wait for the process in the background")? {
            Start::Ready => Ok(exit::OK),
            // The daemon has printed the error.
            Start::Exited(_) => Ok(exit::FAILED),
            Start::Killed(signal) => bail!("the process in the background was killed by {signal}"),
        }
    }

    /// Mounts, tells the foreground process to return, and serves until the mount is gone.
    pub(super) fn serve(
        self,
        background: Option<Background>,
        common: Common,
    ) -> anyhow::Result<()> {
        let log = log_sink::start(self.foreground, self.log_file.as_deref(), common.log_level())?;
        let chain = Arc::new(self.source.open()?);
        let tip = choose(&chain, self.snapshot.as_deref())?;
        if self.punch.is_some() {
            // Fails for a chain in an archive.
            chain.directory(tip)?;
        }
        // The lock keeps other programs from freeing pages of the chain, which would
        // invalidate our indexes. A mount that frees pages locks the chain exclusively.
        let access = if self.punch.is_some() { Access::Exclusive } else { Access::Shared };
        let mut locks = DirectoryLocks::default();
        for base in chain.bases() {
            if let Some(dir) = chain.snapshot(base).directory() {
                locks.take(dir, access)?;
            }
        }
        let trust = Trust::of(&chain, self.mapped_files);
        if let Some(warning) = &trust.warning {
            tell(log::Level::Warn, warning);
        }
        if let Some(reader) = trust.reader {
            reader.assume().context("read the images with the rights of their owner")?;
        }
        if self.punch.is_some()
            && let Some(warning) = freed::warning(&chain, tip)?
        {
            tell(log::Level::Warn, &warning);
        }
        let glance = glance(&chain, tip);
        warn_of_damage(&glance, &chain.snapshot(tip).name, self.source.path(), &self.mountpoint);
        let summary = summary(&chain, tip, &glance)?;
        let parts = self.without.iter().copied();
        let view = Arc::new(trust.apply(View::new(chain, tip)).without(parts));
        let mut options = MountOptions {
            allow_other: self.allow_other,
            compose: self.compose.compose(),
            compose_dir: self.compose_dir,
            reader: trust.reader,
            ..Default::default()
        };
        options.punch = self.punch.map(PunchName::punch);
        if let Some(threads) = self.threads {
            options.threads = threads;
        }
        if let Some(dir) = &options.compose_dir
            && !std::fs::metadata(dir)
                .with_context(|| format!("--compose-dir {}", dir.display()))?
                .is_dir()
        {
            bail!("--compose-dir {}: not a directory", dir.display());
        }
        let session = Session::mount(view, self.source.path(), &self.mountpoint, &options)?;
        if !self.quiet {
            let point = self.mountpoint.display();
            let mut out = std::io::stdout().lock();
            // The mount stays if standard output is closed.
            let _ = writeln!(
                out,
                "mounted {} at {point}\n{summary}Log:        {log}; `imgfs log {point}` shows the \
                 last warnings\nTo begin:   {point}/README",
                self.source.path().display(),
            );
        }
        if let Some(background) = background {
            background.ready().context("let go of the terminal")?;
        }
        Ok(session.run()?)
    }
}

/// Returns the lines that describe the snapshot.
fn summary(chain: &Chain, tip: SnapshotId, glance: &Glance) -> anyhow::Result<String> {
    /// Names of programs that are printed.
    const NAMES: usize = 5;
    let snapshot = chain.snapshot(tip);
    let inventory = snapshot.images.stat(&Kind::Inventory.file_name(0));
    let date = match inventory {
        Ok(stat) => format!(", {} ({})", times::shown(stat.modified)?, times::zone()),
        Err(_) => String::new(),
    };
    let mut names: Vec<&str> = Vec::new();
    for name in &glance.processes {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let more = if names.len() > NAMES { ", ..." } else { "" };
    names.truncate(NAMES);
    let processes = match glance.processes.len() {
        0 => "none; a pre-dump holds memory only".to_owned(),
        count => format!("{count} ({}{more})", names.join(", ")),
    };
    Ok(format!(
        "Snapshot:   {}, one of {}{date}\nProcesses:  {}\nMemory:     {} private, {} shared\n",
        snapshot.name,
        chain.snapshots().len(),
        processes.replace(|c: char| c.is_control(), "?"),
        BinaryBytes(page_bytes(glance.private)),
        BinaryBytes(page_bytes(glance.shared)),
    ))
}

/// Warns of the defects of the chain that a quick look finds, and of the reads that they make
/// fail.
fn warn_of_damage(glance: &Glance, snapshot: &str, path: &Path, mountpoint: &Path) {
    /// How many messages are printed; the others are counted.
    const TOLD: usize = 4;
    let problems = &glance.problems;
    for problem in problems.iter().take(TOLD) {
        tell(log::Level::Warn, problem);
    }
    if problems.is_empty() {
        return;
    }
    let more = match problems.len().saturating_sub(TOLD) {
        0 => String::new(),
        more => format!(" ({more} more defects are not shown)"),
    };
    let message = format!(
        "reading a missing page fails with an input/output error in the pages, mem/, core/ and \
         shmem/ of {}{more}\nhelp: `imgfs check {}` lists all defects, and `imgfs log {}` says why \
         a read failed",
        snapshot,
        path.display(),
        mountpoint.display()
    );
    tell(log::Level::Warn, &message);
}
