//! `imgfs pack`: a chain as one archive.

use std::path::PathBuf;

use anyhow::Context as _;

use super::{flatten, look::Which};
use crate::chain::pack;

/// Write a snapshot and all of its ancestors to an archive.
///
/// The archive holds the image directories as they are, with their parent links; every command
/// of imgfs accepts it in place of the chain. imgfs keeps the other files of an archive from
/// Podman or CRI-O, such as config.dump. The same chain always gives the same bytes. imgfs
/// reads the .tar.zst archives that it writes without unpacking them.
#[derive(Debug, clap::Args)]
pub struct PackArgs {
    #[command(flatten)]
    which: Which,
    /// Archive to write; its name must end in .tar, .tar.gz or .tar.zst
    out: PathBuf,
    /// Replace an existing archive
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
