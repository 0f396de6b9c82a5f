//! `imgfs diff`: which pages differ between two snapshots.

use std::io::Write;

use anyhow::bail;
use serde_json::json;

use super::source::Source;
use crate::{
    chain::{MemoryDiff, diff},
    units::PageIndex,
};

/// Show which pages differ between two snapshots.
///
/// Pages that both snapshots have from the same place of the chain are equal; imgfs compares
/// all other pages byte by byte. A page that one snapshot does not hold counts as zero. As with
/// diff(1), the exit status is 0 if no page differs, 1 if a page differs, and 2 on failure.
#[derive(Debug, clap::Args)]
pub struct DiffArgs {
    #[command(flatten)]
    source: Source,
    /// Name of one snapshot [default: the parent of B]
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
    let b = chain.choose(args.b.as_deref())?;
    let a = match (&args.a, &chain.snapshot(b).parent) {
        (Some(name), _) => chain.choose(Some(name))?,
        (None, Ok(Some(parent))) => *parent,
        (None, Ok(None)) => {
            bail!("snapshot {} has no parent\nhelp: imgfs diff CHAIN A B", chain.snapshot(b).name)
        }
        (None, Err(broken)) => return Err(broken.clone().into()),
    };
    let names = [a, b].map(|id| chain.snapshot(id).name.as_str());
    let bar = super::bytes_bar();
    let diffs = diff(&chain, a, b, &mut |done, total| {
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

fn print([a, b]: [&str; 2], diff: &MemoryDiff, out: &mut dyn Write) -> anyhow::Result<()> {
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
