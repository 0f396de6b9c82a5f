//! `imgfs diff`: which pages differ between two snapshots.

use std::{io::Write, path::Path};

use anyhow::bail;
use serde_json::json;

use super::source::Source;
use crate::{
    chain::{Chain, MemoryDiff, SnapshotId, diff},
    units::PageIndex,
};

/// Show which pages differ between two snapshots.
///
/// `imgfs diff CHAIN A B` compares two snapshots of a chain, `imgfs diff PATH PATH` those in two
/// places, such as the directories of two dumps, or two archives.
///
/// Pages that both snapshots have from the same place of the chain are equal; imgfs compares
/// all other pages byte by byte. A page that one snapshot does not hold counts as zero. As with
/// diff(1), the exit status is 0 if no page differs, 1 if a page differs, and 2 on failure.
#[derive(Debug, clap::Args)]
pub struct DiffArgs {
    #[command(flatten)]
    source: Source,
    /// Name of one snapshot, or path of another chain [default: the parent of B]
    a: Option<String>,
    /// Name of the other snapshot [default: the only one without children]
    b: Option<String>,
    /// Print JSON instead of lines
    #[arg(long)]
    json: bool,
    /// Print nothing; only set the exit status
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
}

/// Compares two snapshots; true if nothing differs.
///
/// # Errors
/// A path without images; missing snapshots; broken chains; a failed write of the output.
pub fn run(args: &DiffArgs, out: &mut dyn Write) -> anyhow::Result<bool> {
    let chain = args.source.open()?;
    match (&args.a, &args.b) {
        (Some(path), None) if chain.find(path).is_none() && Path::new(path).exists() => {
            let other = args.source.open_at(Path::new(path))?;
            let (a, b) = (chain.choose(None)?, other.choose(None)?);
            let paths = [args.source.path().display().to_string(), path.clone()];
            // In one chain, pages in the same place need not be read.
            if let Some(a) = other.at(chain.snapshot(a).path()) {
                compare(args, [(&other, a), (&other, b)], &paths, out)
            } else if let Some(b) = chain.at(other.snapshot(b).path()) {
                compare(args, [(&chain, a), (&chain, b)], &paths, out)
            } else {
                compare(args, [(&chain, a), (&other, b)], &paths, out)
            }
        }
        _ => {
            let b = chain.choose(args.b.as_deref())?;
            let a = match &args.a {
                Some(name) => chain.choose(Some(name))?,
                None => parent(&chain, b)?,
            };
            let names = [a, b].map(|id| chain.snapshot(id).name.clone());
            compare(args, [(&chain, a), (&chain, b)], &names, out)
        }
    }
}

/// Returns the parent of a snapshot.
fn parent(chain: &Chain, id: SnapshotId) -> anyhow::Result<SnapshotId> {
    match &chain.snapshot(id).parent {
        Ok(Some(parent)) => Ok(*parent),
        Ok(None) => {
            bail!("snapshot {} has no parent\nhelp: imgfs diff CHAIN A B", chain.snapshot(id).name)
        }
        Err(broken) => Err(broken.clone().into()),
    }
}

/// Prints what differs between two snapshots; true if nothing does.
fn compare(
    args: &DiffArgs,
    [a, b]: [(&Chain, SnapshotId); 2],
    names: &[String; 2],
    out: &mut dyn Write,
) -> anyhow::Result<bool> {
    let bar = super::bytes_bar();
    let diffs = diff(a, b, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let diffs = diffs?;
    let pages: u64 = diffs.iter().map(MemoryDiff::pages).sum();
    if args.json {
        let document = json!({
            "a": names[0],
            "b": names[1],
            "pages": pages,
            "memories": diffs.iter().map(document).collect::<Vec<_>>(),
        });
        serde_json::to_writer_pretty(&mut *out, &document)?;
        writeln!(out)?;
    } else if !args.quiet {
        for diff in &diffs {
            print(names, diff, out)?;
        }
        let compared: u64 = diffs.iter().map(|diff| diff.compared).sum();
        let same_place: u64 = diffs.iter().map(|diff| diff.same_place).sum();
        writeln!(
            out,
            "{pages} pages differ ({same_place} are in the same place, {compared} were compared)"
        )?;
    }
    Ok(pages == 0)
}

fn print([a, b]: &[String; 2], diff: &MemoryDiff, out: &mut dyn Write) -> anyhow::Result<()> {
    let only = match (diff.only_in_first, diff.only_in_second) {
        (true, _) => format!(", only in {a}"),
        (_, true) => format!(", only in {b}"),
        _ => String::new(),
    };
    if diff.differences.is_empty() && only.is_empty() {
        return Ok(());
    }
    writeln!(out, "{}{only}: {} pages differ", diff.memory, diff.pages())?;
    for difference in &diff.differences {
        let end = PageIndex(difference.first.0 + difference.pages);
        writeln!(out, "  {}-{end}  {}", difference.first, difference.pages)?;
    }
    Ok(())
}

fn document(diff: &MemoryDiff) -> serde_json::Value {
    let ranges = diff.differences.iter().map(
        |difference| json!({ "address": difference.first.to_string(), "pages": difference.pages }),
    );
    json!({
        "memory": super::memory_document(diff.memory),
        "only_in_a": diff.only_in_first,
        "only_in_b": diff.only_in_second,
        "pages": diff.pages(),
        "pages_in_same_place": diff.same_place,
        "pages_compared": diff.compared,
        "ranges": ranges.collect::<Vec<_>>(),
    })
}
