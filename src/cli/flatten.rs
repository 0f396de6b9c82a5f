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
/// The new directory holds everything that a restore needs. Its inventory
/// appears last, when all else is on disk. On file systems that share blocks
/// between files (btrfs, xfs), no memory is copied.
#[derive(Debug, clap::Args)]
pub struct FlattenArgs {
    #[command(flatten)]
    which: Which,
    /// The directory to write, which must not exist or be empty; with --archive, the
    /// archive: its name ends in .tar, .tar.gz or .tar.zst
    out: PathBuf,
    /// Write an archive instead, laid out as Podman exports it
    ///
    /// The images are in checkpoint/; what Podman or CRI-O exported beside the snapshot
    /// (config.dump and others) is kept.
    #[arg(long)]
    archive: bool,
    /// Replace an archive that exists
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

/// Keeps others from changing a snapshot and its ancestors while they are read.
///
/// # Errors
/// Who changes them now.
pub(super) fn lock(chain: &Chain, tip: SnapshotId) -> anyhow::Result<DirectoryLocks> {
    let mut locks = DirectoryLocks::default();
    for id in [tip, chain.base(tip)] {
        if let Some(dir) = chain.snapshot(id).directory() {
            locks.take(dir, Access::Shared)?;
        }
    }
    Ok(locks)
}
