//! `imgfs flatten`: a snapshot as an image directory of its own.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;

use super::look::Which;
use crate::{
    chain::{Chain, SnapshotId},
    sys::{
        lock::{Access, DirectoryLocks},
        output,
    },
    view::{View, flatten, flatten_to_archive},
};

/// Write a snapshot as a stand-alone image directory without parents.
///
/// The new directory holds everything that a restore needs. imgfs writes the inventory last,
/// when all other files are on disk. On file systems that share blocks between files (btrfs,
/// XFS), imgfs copies no memory.
#[derive(Debug, clap::Args)]
pub struct FlattenArgs {
    #[command(flatten)]
    which: Which,
    /// Directory to write, which must be empty or not exist; with --archive, the archive, whose
    /// name must end in .tar, .tar.gz or .tar.zst
    out: PathBuf,
    /// Write an archive with the layout of Podman's exports
    ///
    /// The images are in checkpoint/. imgfs keeps the other files of an archive from Podman or
    /// CRI-O, such as config.dump.
    #[arg(long)]
    archive: bool,
    /// Replace an existing archive
    #[arg(short, long, requires = "archive")]
    force: bool,
}

/// Writes a snapshot to a directory of its own.
///
/// # Errors
/// A path without images; a broken chain; a directory that cannot be written.
pub fn run(args: &FlattenArgs) -> anyhow::Result<()> {
    let above = args.out.parent().filter(|above| !above.as_os_str().is_empty());
    let out = if args.out.is_dir() && !args.archive { Some(args.out.as_path()) } else { above };
    output::check_directory(out.unwrap_or(Path::new(".")))
        .with_context(|| format!("write to {}", args.out.display()))?;
    let (chain, tip) = args.which.open()?;
    let _locks = lock(&chain, tip)?;
    let name = chain.snapshot(tip).name.clone();
    let view = View::new(Arc::new(chain), tip);
    let bar = super::bytes_bar();
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let result = if args.archive {
        flatten_to_archive(&view, &args.out, args.force, &mut progress)
    } else {
        flatten(&view, &args.out, &mut progress)
    };
    bar.finish_and_clear();
    result.with_context(|| format!("flatten snapshot {name} into {}", args.out.display()))
}

/// Locks a snapshot and its ancestors, so that no program changes them while they are read.
///
/// # Errors
/// A process that holds the lock, by name.
pub(super) fn lock(chain: &Chain, tip: SnapshotId) -> anyhow::Result<DirectoryLocks> {
    let mut locks = DirectoryLocks::default();
    for id in [tip, chain.base(tip)] {
        if let Some(dir) = chain.snapshot(id).directory() {
            locks.take(dir, Access::Shared)?;
        }
    }
    Ok(locks)
}
