//! `imgfs pack`: a chain as one archive.

use std::path::PathBuf;

use anyhow::Context as _;

use super::{flatten, look::Which};
use crate::chain::pack;

/// Write a snapshot and all of its parents to an archive.
///
/// The archive holds the image directories as they are, with their parent links, so that
/// every command of imgfs takes it in place of the chain. What Podman or CRI-O exported
/// beside the snapshot (config.dump and others) is kept. The same chain gives the same
/// bytes. .tar.zst is written so that it can be read without being unpacked.
#[derive(Debug, clap::Args)]
pub struct PackArgs {
    #[command(flatten)]
    which: Which,
    /// The archive to write: its name ends in .tar, .tar.gz or .tar.zst
    out: PathBuf,
    /// Replace an archive that exists
    #[arg(short, long)]
    force: bool,
}

/// Writes a chain to an archive.
///
/// # Errors
/// A path without images; a broken chain; an archive that cannot be written.
pub fn run(args: &PackArgs) -> anyhow::Result<()> {
    let (chain, tip) = args.which.open()?;
    let _locks = flatten::lock(&chain, tip)?;
    let name = &chain.snapshot(tip).name;
    let bar = super::bytes_bar();
    let result = pack(&chain, tip, &args.out, args.force, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    result.with_context(|| format!("pack snapshot {name} into {}", args.out.display()))
}
