//! Where the chain is that a command of `imgfs` is about.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::{chain::Chain, image::store::Opening};

/// Where a chain is.
#[derive(Debug, clap::Args)]
pub struct Source {
    /// An image directory, a directory of image directories, or an archive
    ///
    /// An archive is a tar file, such as Podman and CRI-O export. It is read in place.
    chain: PathBuf,
    /// An archive with the parents of the snapshots in archive CHAIN, such as a
    /// pre-checkpoint's; may be given several times
    #[arg(long, value_name = "ARCHIVE")]
    previous: Vec<PathBuf>,
}

impl Source {
    /// Returns the path as it was given.
    pub(super) fn path(&self) -> &Path {
        &self.chain
    }

    /// Adds an archive as `--previous` does.
    pub(super) fn add_previous(&mut self, archive: PathBuf) {
        self.previous.push(archive);
    }

    /// Opens the chain.
    ///
    /// # Errors
    /// A place without images; an archive that cannot be read.
    pub(super) fn open(&self) -> anyhow::Result<Chain> {
        let opening = Opening { previous: self.previous.clone() };
        Ok(Chain::open_anywhere(&self.chain, &opening)?)
    }

    /// Makes all paths absolute, for a process that leaves the working directory.
    ///
    /// # Errors
    /// A working directory that is gone.
    pub(super) fn make_absolute(&mut self) -> anyhow::Result<()> {
        std::iter::once(&mut self.chain).chain(&mut self.previous).try_for_each(absolute)
    }
}

/// Makes a path absolute.
///
/// # Errors
/// A working directory that is gone.
pub(super) fn absolute(path: &mut PathBuf) -> anyhow::Result<()> {
    *path = std::path::absolute(&*path)
        .with_context(|| format!("find {} from the root", path.display()))?;
    Ok(())
}
