//! `imgfs map`: a picture of where the memory of a chain is stored.

mod html;
mod json;
mod picture;
mod svg;
#[cfg(test)]
mod tests;
mod text;

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};

use super::{
    color::{self, ColorWhen},
    source::Source,
};
use crate::{
    chain::{
        Chain, SnapshotId,
        map::{Survey, Twice, twice},
    },
    image::MemoryId,
    sys::output::{self, Existing},
};
use picture::Picture;

/// Draw where the memory of a chain is stored
///
/// The picture shows for each snapshot and memory (the private memory of a process, or a shared
/// object) which pages the dump stored, which it left to a parent, which are zero, and which
/// were freed. It also shows how much of each memory each dump stored anew. --twice marks stored
/// pages that have an equal page elsewhere in the chain. Long ranges without pages are
/// shortened. The picture uses colours on a terminal and characters in a pipe; -o writes it for
/// a browser. The exit status is 1 if imgfs could not read part of the chain.
#[derive(Debug, clap::Args)]
pub struct MapArgs {
    #[command(flatten)]
    source: Source,
    /// Draw this snapshot and its ancestors only
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    /// Draw the private memory of this process; can be repeated
    #[arg(long, value_name = "PID")]
    pid: Vec<u64>,
    /// Draw the shared object with this number in shmem/; can be repeated
    #[arg(long, value_name = "ID")]
    shmem: Vec<u64>,
    /// Draw all memories, not only those with the most stored pages
    #[arg(long)]
    all: bool,
    /// Mark stored pages that have an older copy
    ///
    /// Reads all stored pages of the selected memories, and ignores copies in other memories.
    /// Needs 16 bytes of memory for each page: 4 MiB for 1 GiB.
    #[arg(long)]
    twice: bool,
    /// Write the picture to FILE, as SVG or HTML according to its extension
    ///
    /// The file refers to no other file. imgfs replaces an existing file.
    #[arg(short, long, value_name = "FILE", conflicts_with = "json")]
    output: Option<PathBuf>,
    /// Print JSON instead of a picture
    #[arg(long)]
    json: bool,
    /// When to use colours
    #[arg(long, value_name = "WHEN", value_enum, default_value_t)]
    color: ColorWhen,
    /// Characters in a line [default: the width of the terminal, or 80]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(40..))]
    width: Option<u16>,
}

/// The format of a picture for a browser.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Svg,
    Html,
}

impl Format {
    fn of(path: &Path) -> anyhow::Result<Self> {
        let extension = path.extension().and_then(|extension| extension.to_str());
        match extension.map(str::to_ascii_lowercase).as_deref() {
            Some("svg") => Ok(Self::Svg),
            Some("html" | "htm") => Ok(Self::Html),
            _ => bail!("-o {}: the name must end in .svg or .html", path.display()),
        }
    }
}

/// The largest numbers of memories, columns and rows in a picture.
#[derive(Clone, Copy, Debug)]
struct Limits {
    memories: usize,
    columns: usize,
    rows: usize,
}

impl MapArgs {
    fn wants(&self, memory: MemoryId) -> bool {
        let all = self.pid.is_empty() && self.shmem.is_empty();
        all || match memory {
            MemoryId::Private(pid) => self.pid.contains(&pid),
            MemoryId::Shared(shmid) => self.shmem.contains(&shmid),
        }
    }

    /// Returns the snapshots to draw, each after its parent.
    fn snapshots(&self, chain: &Chain) -> anyhow::Result<Vec<SnapshotId>> {
        let Some(name) = &self.snapshot else { return Ok(chain.ids().collect()) };
        let mut path = vec![chain.choose(Some(name))?];
        while let Ok(Some(parent)) = &chain.snapshot(path[path.len() - 1]).parent
            && path.len() < chain.snapshots().len()
        {
            path.push(*parent);
        }
        path.reverse();
        Ok(path)
    }
}

/// Draws a chain; false if part of it could not be read.
///
/// # Errors
/// A place without images; memories that are not there; a failed write of the picture.
pub fn run(args: &MapArgs, out: &mut dyn Write) -> anyhow::Result<bool> {
    let format = args.output.as_deref().map(Format::of).transpose()?;
    let chain = Arc::new(args.source.open()?);
    let snapshots = args.snapshots(&chain)?;
    let copies = if args.twice { find_copies(args, &chain, &snapshots)? } else { Twice::default() };
    let survey = Survey::of(&chain, snapshots, &copies, |memory| args.wants(memory));
    for problem in &survey.problems {
        log::warn!("{problem}");
    }
    if survey.memories.is_empty() {
        bail!("no such memory in {}; imgfs ps lists processes", args.source.path().display());
    }
    let width = args.width.map_or_else(color::line_width, usize::from);
    let limits = match format {
        Some(_) => svg::limits(survey.memories.len(), survey.snapshots.len(), args.all),
        None if args.json => json::LIMITS,
        None => text::limits(width, args.all),
    };
    let picture = Picture::of(args.source.path(), &chain, &survey, limits, args.twice);
    match (&args.output, format) {
        (Some(path), Some(format)) => {
            let written = match format {
                Format::Svg => svg::page(&picture),
                Format::Html => html::page(&picture),
            };
            let failed = || format!("write {}", path.display());
            let mut file = output::create(path, Existing::Replaced).with_context(failed)?;
            file.write_all(written.as_bytes()).with_context(failed)?;
        }
        _ if args.json => super::look::print_json(&json::document(&picture), out)?,
        _ => text::print(&picture, width, args.color.on_stdout(), out)?,
    }
    Ok(survey.problems.is_empty())
}

fn find_copies(args: &MapArgs, chain: &Chain, snapshots: &[SnapshotId]) -> anyhow::Result<Twice> {
    let bar = super::bytes_bar();
    let wanted = |id, memory| snapshots.contains(&id) && args.wants(memory);
    let found = twice(chain, &wanted, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Ok(found?)
}
