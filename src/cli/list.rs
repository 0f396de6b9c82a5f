//! `imgfs ls`: the snapshots of a chain.

use std::io::Write;

use indicatif::{BinaryBytes, ProgressBar};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    source::Source,
    table::{Align, Table},
    times,
};
use crate::{
    causes::with_sources,
    chain::{Chain, DuplicateCounts, PageCounts, Snapshot, SnapshotId, Summary, duplicates},
    units::page_bytes,
};

/// List the snapshots of a chain, each after its parent.
///
/// Prints for each snapshot: the number of pages that it holds itself, that it leaves to its
/// parent, and that were freed in its own files; the size of its directory on disk; and the
/// size of the same memory in images without parents.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    #[command(flatten)]
    source: Source,
    /// Count the pages that are stored more than once instead
    ///
    /// Prints for each snapshot: the number of pages in its files; how many of these are zero;
    /// how many are stored again in the same memory, in another memory of the snapshot (such
    /// as that of a forked process), or in an older snapshot; and the size of all duplicates.
    /// Reads all stored pages, and needs 16 bytes of memory for each: 4 MiB for 1 GiB.
    #[arg(long)]
    duplicates: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

const HEADINGS: [&str; 9] =
    ["NAME", "PARENT", "DATE", "PROCESSES", "PRESENT", "IN-PARENT", "PUNCHED", "ON-DISK", "FLAT"];

/// Columns of the table that hold text; the others hold numbers.
const TEXT_COLUMNS: usize = 3;

/// Lists a chain; false if a snapshot could not be read or its parent not found.
///
/// # Errors
/// A place without images; a failed write of the output.
pub fn run(args: &ListArgs, out: &mut dyn Write) -> anyhow::Result<bool> {
    let chain = args.source.open()?;
    if args.duplicates {
        return list_duplicates(&chain, args.json, out).map(|()| true);
    }
    let mut complete = true;
    let mut listed = Vec::new();
    let mut fail = |bar: &ProgressBar, error| {
        bar.suspend(|| super::report(&error));
        complete = false;
    };
    super::for_each_snapshot(&chain, |id, bar| {
        if let Err(link) = &chain.snapshot(id).parent {
            fail(bar, link.clone().into());
        }
        match Summary::of(&chain, id) {
            Ok(summary) => listed.push((id, summary)),
            Err(error) => {
                let name = &chain.snapshot(id).name;
                fail(bar, anyhow::Error::new(error).context(format!("list snapshot {name}")));
            }
        }
        Ok(())
    })?;
    if args.json {
        let snapshots = listed.iter().map(|(id, summary)| document(&chain, *id, summary));
        let document = json!({ "snapshots": snapshots.collect::<Result<Vec<_>, _>>()? });
        serde_json::to_writer_pretty(&mut *out, &document)?;
        writeln!(out)?;
        return Ok(complete);
    }
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    for (id, summary) in &listed {
        rows.push(row(&chain, chain.snapshot(*id), summary)?);
    }
    print_table(&rows, TEXT_COLUMNS, out)?;
    Ok(complete)
}

/// Prints rows whose first columns are text and whose other ones are numbers.
fn print_table<const N: usize>(
    rows: &[[String; N]],
    text_columns: usize,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let align = |column| if column < text_columns { Align::Left } else { Align::Right };
    let mut rows = rows.iter();
    let headings = rows.next().into_iter().flatten().enumerate();
    let columns: Vec<_> = headings.map(|(at, name)| (name.as_str(), align(at))).collect();
    let mut table = Table::new(&columns);
    rows.for_each(|row| table.row(row.to_vec()));
    table.print(out)
}

const DUPLICATE_HEADINGS: [&str; 7] =
    ["NAME", "STORED", "ZERO", "SAME-MEMORY", "SAME-SNAPSHOT", "OLDER-SNAPSHOT", "DUPLICATES"];

/// Counts the pages that are stored more than once.
fn list_duplicates(chain: &Chain, as_json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let bar = super::bytes_bar();
    let result = duplicates(chain, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let counts = result?;
    let mut total = DuplicateCounts::default();
    counts.iter().for_each(|one| total += *one);
    let named = chain.snapshots().iter().map(|snapshot| snapshot.name.as_str()).zip(&counts);
    if as_json {
        let snapshots: Vec<Value> = named
            .map(|(name, counts)| json!({ "name": name, "pages": duplicates_document(counts) }))
            .collect();
        let document = json!({ "snapshots": snapshots, "total": duplicates_document(&total) });
        serde_json::to_writer_pretty(&mut *out, &document)?;
        writeln!(out)?;
        return Ok(());
    }
    let mut rows = vec![DUPLICATE_HEADINGS.map(str::to_owned)];
    for (name, counts) in named.chain([("(all)", &total)]) {
        rows.push([
            name.to_owned(),
            counts.stored.to_string(),
            counts.zero.to_string(),
            counts.within_memory.to_string(),
            counts.between_memories.to_string(),
            counts.between_snapshots.to_string(),
            BinaryBytes(page_bytes(counts.duplicates())).to_string(),
        ]);
    }
    print_table(&rows, 1, out)
}

fn duplicates_document(counts: &DuplicateCounts) -> Value {
    json!({
        "stored": counts.stored,
        "zero": counts.zero,
        "same_memory": counts.within_memory,
        "same_snapshot": counts.between_memories,
        "older_snapshot": counts.between_snapshots,
        "duplicate_bytes": page_bytes(counts.duplicates()),
    })
}

fn row(chain: &Chain, snapshot: &Snapshot, summary: &Summary) -> anyhow::Result<[String; 9]> {
    let total = summary.total();
    let processes = summary.processes.len();
    Ok([
        snapshot.name.clone(),
        match parent(chain, snapshot) {
            Ok(parent) => parent.unwrap_or("-").to_owned(),
            Err(_) => "(broken)".to_owned(),
        },
        times::shown(summary.date)?,
        if summary.pre_dump { format!("{processes} (pre-dump)") } else { processes.to_string() },
        total.present.to_string(),
        total.in_parent.to_string(),
        total.punched.to_string(),
        BinaryBytes(summary.disk_bytes).to_string(),
        BinaryBytes(total.flat_bytes()).to_string(),
    ])
}

fn parent<'a>(chain: &'a Chain, snapshot: &Snapshot) -> anyhow::Result<Option<&'a str>> {
    let parent = snapshot.parent.clone()?;
    Ok(parent.map(|parent| chain.snapshot(parent).name.as_str()))
}

fn document(chain: &Chain, id: SnapshotId, summary: &Summary) -> anyhow::Result<Value> {
    let snapshot = chain.snapshot(id);
    let parent = parent(chain, snapshot);
    let counts = |counts: &PageCounts| {
        json!({
            "present": counts.present,
            "in_parent": counts.in_parent,
            "absent": counts.absent,
            "punched": counts.punched,
        })
    };
    Ok(json!({
        "name": snapshot.name,
        "directory": snapshot.path().to_string_lossy(),
        "parent": parent.as_ref().ok(),
        "parent_error": parent.as_ref().err().map(|error| with_sources(error.as_ref())),
        "date": Timestamp::try_from(summary.date)?.to_string(),
        "pre_dump": summary.pre_dump,
        "processes": summary.processes,
        "pages": { "private": counts(&summary.private), "shared": counts(&summary.shared) },
        "disk_bytes": summary.disk_bytes,
        "flat_bytes": summary.total().flat_bytes(),
    }))
}
