//! `imgfs check`: the defects of a chain.

use std::io::Write;

use serde_json::json;

use super::source::Source;
use crate::{
    chain::{Finding, Severity, check},
    res::file::is_restored,
};

/// Check a chain for defects.
///
/// imgfs decodes every image of every snapshot, looks up in the parent every page that a
/// snapshot leaves to it, and compares every pages file with its pagemap. Like `rcriu restore`,
/// it checks processes, their memory and their files against each other; state that rcriu does
/// not restore is a note. Each finding names the directory, the memory and the address. The
/// exit status is 1 if any finding is an error.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    #[command(flatten)]
    source: Source,
    /// Print JSON instead of lines
    #[arg(long)]
    json: bool,
}

/// Checks a chain; false if there is an error.
///
/// # Errors
/// A path without images; a failed write of the output.
pub fn run(args: &CheckArgs, out: &mut dyn Write) -> anyhow::Result<bool> {
    let chain = args.source.open()?;
    let bar = super::count_bar("files");
    let findings = check(&chain, is_restored, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let findings = findings?;
    let errors = findings.iter().filter(|finding| finding.severity == Severity::Error).count();
    if args.json {
        let document = json!({
            "snapshots": chain.snapshots().len(),
            "errors": errors,
            "findings": findings.iter().map(document).collect::<Vec<_>>(),
        });
        serde_json::to_writer_pretty(&mut *out, &document)?;
        writeln!(out)?;
    } else {
        for finding in &findings {
            writeln!(out, "{finding}")?;
        }
        let notes = findings.len() - errors;
        writeln!(
            out,
            "{}: {}, {}",
            counted(chain.snapshots().len(), "snapshot"),
            counted(errors, "error"),
            counted(notes, "note")
        )?;
    }
    Ok(errors == 0)
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn document(finding: &Finding) -> serde_json::Value {
    json!({
        "severity": match finding.severity {
            Severity::Note => "note",
            Severity::Error => "error",
        },
        "directory": finding.dir.to_string_lossy(),
        "memory": finding.memory.map(super::memory_document),
        "address": finding.first.map(|first| format!("{:#x}", first.address())),
        "problem": finding.problem,
    })
}
