//! `rcriu dedup`: what was done, for people and programs.

use std::io::Write;

use indicatif::{BinaryBytes, ProgressBar};
use serde_json::{Value, json};

use super::bytes_bar;
use crate::dedup::{self, LinkOptions, Linked, Progress};

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Make a chain of full dumps.
    Link(LinkOptions),
}

/// A bar, where standard error is a terminal.
struct Bar(ProgressBar);

impl Progress for Bar {
    fn more(&self, bytes: u64) {
        self.0.inc_length(bytes);
    }

    fn done(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

/// Does the work and says what was done.
///
/// # Errors
/// What the work returns, and what keeps the output from being written.
pub(super) fn run(work: &Work, as_json: bool, out: &mut dyn Write) -> anyhow::Result<bool> {
    let bar = Bar(bytes_bar());
    let result = match work {
        Work::Link(options) => dedup::link(options, &bar),
    };
    bar.0.finish_and_clear();
    let linked = result?;
    if as_json {
        let document = json!({ "linked": linked.iter().map(document).collect::<Vec<_>>() });
        serde_json::to_writer_pretty(&mut *out, &document)?;
        writeln!(out)?;
    } else {
        linked.iter().try_for_each(|one| print(one, out))?;
    }
    Ok(true)
}

fn print(linked: &Linked, out: &mut dyn Write) -> anyhow::Result<()> {
    let dir = linked.dir.display();
    let Some(parent) = &linked.parent else {
        writeln!(out, "{dir}: nothing in common with the dump before it; left as it is")?;
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
