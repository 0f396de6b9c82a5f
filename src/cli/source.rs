//! Where the chain is that a command of `imgfs` is about.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::task::size_bytes;
use crate::{
    chain::Chain,
    image::store::{Cache, Opening, Progress},
};

/// Where a chain is.
#[derive(Debug, clap::Args)]
pub struct Source {
    /// An image directory, a directory of image directories, or an archive
    ///
    /// An archive is a file such as Podman and CRI-O export: tar, tar.gz or tar.zst. Tar and
    /// seekable zstd (as `imgfs pack` writes it) are read in place; others are unpacked once,
    /// into a cache for this user alone.
    chain: PathBuf,
    /// An archive with the parents of the snapshots in archive CHAIN, such as a
    /// pre-checkpoint's; may be given several times
    #[arg(long, value_name = "ARCHIVE")]
    previous: Vec<PathBuf>,
    /// Where compressed archives are unpacked [default: $XDG_CACHE_HOME/imgfs, for root
    /// /var/cache/imgfs]
    ///
    /// The directory must be accessible to this user alone. What is in it may be removed at
    /// any time.
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// How many bytes all unpacked archives may take, with K, M or G [default: 32G]
    ///
    /// Where room is needed, those are removed that were not used for longest.
    #[arg(long, value_name = "SIZE", value_parser = size_bytes)]
    cache_limit: Option<u64>,
}

impl Source {
    /// Returns the path as it was given.
    pub(super) fn path(&self) -> &Path {
        &self.chain
    }

    /// Applies an option of `mount -o`; false if it is none of these.
    ///
    /// # Errors
    /// A value that makes no sense.
    pub(super) fn apply(&mut self, name: &str, value: &str) -> anyhow::Result<bool> {
        match name {
            "previous" => self.previous.push(value.into()),
            "cache_dir" => self.cache_dir = Some(value.into()),
            "cache_limit" => {
                let limit = size_bytes(value).map_err(anyhow::Error::msg);
                self.cache_limit =
                    Some(limit.with_context(|| format!("mount option {name}={value}"))?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Opens the chain.
    ///
    /// # Errors
    /// A place without images; an archive that cannot be read.
    pub(super) fn open(&self) -> anyhow::Result<Chain> {
        let mut cache = Cache { directory: self.cache_dir.clone(), ..Cache::default() };
        cache.limit = self.cache_limit.unwrap_or(cache.limit);
        let bar = super::bytes_bar();
        let told = bar.clone();
        let progress = Progress(Some(Box::new(move |done, total| {
            told.set_length(total);
            told.set_position(done);
        })));
        let opening = Opening { previous: self.previous.clone(), cache, progress };
        let chain = Chain::open_anywhere(&self.chain, &opening);
        bar.finish_and_clear();
        Ok(chain?)
    }

    /// Makes all paths absolute, for a process that leaves the working directory.
    ///
    /// # Errors
    /// A working directory that is gone.
    pub(super) fn make_absolute(&mut self) -> anyhow::Result<()> {
        let paths = std::iter::once(&mut self.chain).chain(&mut self.previous);
        paths.chain(&mut self.cache_dir).try_for_each(absolute)
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
