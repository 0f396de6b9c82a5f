//! `rcriu dedup`: runs a deduplication and prints its result as text or JSON.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use indicatif::{BinaryBytes, ProgressBar};
use serde_json::{Value, json};

use super::bytes_bar;
use crate::{
    dedup::{self, FreeOptions, Freed, LinkOptions, Linked, Progress},
    image::disk::Kernel,
    units::page_bytes,
};

/// A deduplication to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Make a chain of full dumps.
    Link(LinkOptions),
    /// Free the pages of ancestors that a snapshot supersedes.
    Free(FreeOptions),
    /// Let equal pages of this chain share blocks.
    Reflink(PathBuf),
}

/// A progress bar, shown if standard error is a terminal.
struct Bar(ProgressBar);

impl Progress for Bar {
    fn more(&self, bytes: u64) {
        self.0.inc_length(bytes);
    }

    fn done(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

/// Does the work and prints its result.
///
/// # Errors
/// What the work returns; a failed write of the output.
pub(super) fn run(work: &Work, as_json: bool, out: &mut dyn Write) -> anyhow::Result<bool> {
    let document = match work {
        Work::Link(options) => link(options, as_json, out)?,
        Work::Free(options) => free(options, as_json, out)?,
        Work::Reflink(path) => reflink(path, as_json, out)?,
    };
    if as_json {
        serde_json::to_writer_pretty(&mut *out, &document)?;
        writeln!(out)?;
    }
    Ok(true)
}

fn link(options: &LinkOptions, as_json: bool, out: &mut dyn Write) -> anyhow::Result<Value> {
    let bar = Bar(bytes_bar());
    let result = dedup::link(options, &bar);
    bar.0.finish_and_clear();
    let linked = result?;
    if !as_json {
        linked.iter().try_for_each(|one| print(one, out))?;
    }
    Ok(json!({ "linked": linked.iter().map(document).collect::<Vec<_>>() }))
}

fn free(options: &FreeOptions, as_json: bool, out: &mut dyn Write) -> anyhow::Result<Value> {
    let mut told = Ok(());
    let bar = Bar(bytes_bar());
    let mut tell = |freed: &Freed| {
        if !as_json {
            told = warn(freed, out);
        }
    };
    let result = dedup::free(options, Arc::new(Kernel), &mut tell, &bar);
    bar.0.finish_and_clear();
    let freed = result?;
    told?;
    if !as_json {
        writeln!(
            out,
            "freed {} pages: {} before, {} now",
            freed.pages,
            BinaryBytes(freed.bytes_before),
            BinaryBytes(freed.bytes_after)
        )?;
    }
    let path = |path: &PathBuf| path.to_string_lossy().into_owned();
    let kept = |(dir, pages): &(PathBuf, u64)| json!({ "directory": path(dir), "pages": pages });
    Ok(json!({
        "no_longer_restorable": freed.lost.iter().map(path).collect::<Vec<_>>(),
        "kept_for": freed.kept_for.iter().map(kept).collect::<Vec<_>>(),
        "freed_pages": freed.pages,
        "bytes_before": freed.bytes_before,
        "bytes_after": freed.bytes_after,
    }))
}

fn reflink(path: &Path, as_json: bool, out: &mut dyn Write) -> anyhow::Result<Value> {
    let bar = Bar(bytes_bar());
    let result = dedup::reflink(path, &bar);
    bar.0.finish_and_clear();
    let done = result?;
    if !as_json {
        let (shared, bytes) = (done.shared, BinaryBytes(page_bytes(done.shared)));
        writeln!(out, "{shared} of {} pages share blocks, {bytes}", done.stored)?;
        if done.unaligned > 0 {
            writeln!(out, "{} more are equal, but parts of larger blocks", done.unaligned)?;
        }
    }
    Ok(json!({
        "stored_pages": done.stored,
        "shared_pages": done.shared,
        "unaligned_pages": done.unaligned,
    }))
}

/// Prints which snapshots will be lost, and which pages will be kept.
fn warn(freed: &Freed, out: &mut dyn Write) -> anyhow::Result<()> {
    for dir in &freed.lost {
        writeln!(out, "{}: can no longer be restored; its descendants can", dir.display())?;
    }
    for (dir, pages) in &freed.kept_for {
        writeln!(out, "{}: needs {pages} pages, which are kept", dir.display())?;
    }
    Ok(out.flush()?)
}

fn print(linked: &Linked, out: &mut dyn Write) -> anyhow::Result<()> {
    let dir = linked.dir.display();
    let Some(parent) = &linked.parent else {
        writeln!(out, "{dir}: has no pages in common with the previous dump; not changed")?;
        return Ok(());
    };
    writeln!(
        out,
        "{dir}: {} pages left to {}, {} before, {} now",
        linked.shared_pages,
        parent.display(),
        BinaryBytes(linked.bytes_before),
        BinaryBytes(linked.bytes_after)
    )?;
    Ok(())
}

fn document(linked: &Linked) -> Value {
    json!({
        "directory": linked.dir.to_string_lossy(),
        "parent": linked.parent.as_ref().map(|parent| parent.to_string_lossy()),
        "shared_pages": linked.shared_pages,
        "renumbered_objects": linked.renumbered,
        "bytes_before": linked.bytes_before,
        "bytes_after": linked.bytes_after,
    })
}
