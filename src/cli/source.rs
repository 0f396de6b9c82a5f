//! Options that say where a command of `imgfs` finds its chain.

use std::{
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use super::task::size_bytes;
use crate::{
    chain::{Chain, SnapshotId},
    image::{
        Kind,
        store::{Cache, Opening, Progress},
    },
};

/// The place of a chain, and how to open it.
#[derive(Debug, clap::Args)]
pub struct Source {
    /// Image directory, directory of image directories, or archive
    ///
    /// An archive is a .tar, .tar.gz or .tar.zst file, as Podman and CRI-O export it. imgfs
    /// reads tar and seekable zstd (as `imgfs pack` writes it) in place. It unpacks other
    /// archives once, into a cache that only this user can read.
    chain: PathBuf,
    /// Archive with the parents of the snapshots in archive CHAIN, such as a pre-checkpoint;
    /// can be repeated
    #[arg(long, value_name = "ARCHIVE")]
    previous: Vec<PathBuf>,
    /// Unpack compressed archives into this directory [default: $XDG_CACHE_HOME/imgfs, for
    /// root /var/cache/imgfs]
    ///
    /// Only this user may have access to DIR. Its contents can be removed at any time.
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Largest size of all unpacked archives; SIZE may end in K, M or G [default: 32G]
    ///
    /// To make room, imgfs removes the archives that were not used for longest.
    #[arg(long, value_name = "SIZE", value_parser = size_bytes)]
    cache_limit: Option<u64>,
}

impl Source {
    /// Returns CHAIN as the user gave it.
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
        self.open_at(&self.chain)
    }

    /// Opens the chain at `path` instead of CHAIN, with the same options.
    ///
    /// # Errors
    /// Like [`open`](Self::open).
    pub(super) fn open_at(&self, path: &Path) -> anyhow::Result<Chain> {
        let mut cache = Cache { directory: self.cache_dir.clone(), ..Cache::default() };
        cache.limit = self.cache_limit.unwrap_or(cache.limit);
        let bar = super::bytes_bar();
        let told = bar.clone();
        let progress = Progress(Some(Box::new(move |done, total| {
            told.set_length(total);
            told.set_position(done);
        })));
        let opening = Opening { previous: self.previous.clone(), cache, progress };
        let chain = Chain::open_anywhere(path, &opening);
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

/// Chooses the snapshot called `name`, or the tip, whose images this user must be able to read.
///
/// # Errors
/// A name that no snapshot has; several tips; images of another user.
pub(super) fn choose(chain: &Chain, name: Option<&str>) -> anyhow::Result<SnapshotId> {
    let id = chain.choose(name)?;
    let images = chain.images(id);
    match images.open(&Kind::Inventory.file_name(0)) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let text = "help: run imgfs as root, or as the user who owns them";
            bail!("no permission to read the images in {}\n{text}", images.name().display());
        }
        _ => Ok(id),
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
