//! `rcriu show`: images as JSON.

use std::{
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::anyhow;
use clap::Args;

use super::exit;
use crate::image::{
    ImageError,
    json::{self, JsonError, Style},
};

/// Show image files as JSON
#[derive(Args, Clone, Debug)]
#[command(long_about = DESCRIPTION, after_help = EXAMPLES)]
pub struct Options {
    /// Indent, and write numbers as people read them
    ///
    /// Addresses and masks are hexadecimal, modes octal, flags and signals are
    /// spelled out, devices are MAJOR:MINOR. Without this option an entry is one
    /// line, and all numbers are plain JSON numbers, for scripts.
    #[arg(short, long)]
    pretty: bool,
    /// Image files, such as core-293.img or stats-dump; `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

const DESCRIPTION: &str = r#"Show image files as JSON

Prints one JSON document for each file, in the order given:

    {"magic":"PSTREE","entries":[
    {"pid":293,"ppid":0,"pgid":293,"sid":293,"threads":[293]}
    ]}

An entry has the fields that the file has, under the format's own names.
Bytes are in base64. What follows an entry, such as the data in a pipe, is in
its "payload"; fields that this program does not know are in "unknown_fields".
Of files without entries, such as pages-1.img, only the size is shown.

A file that cannot be read is reported on standard error; the others are
shown all the same, and the exit code is 1."#;

const EXAMPLES: &str = "\
Examples:
  rcriu show --pretty dump/mm-293.img
  rcriu show dump/pstree.img | jq '.entries[].pid'
  ssh host cat dump/files.img | rcriu show -

Exit codes:
  0  all files were shown
  1  some were not
  2  wrong command line";

/// Shows the files and returns the exit code.
pub fn run(options: &Options) -> ExitCode {
    let style = if options.pretty { Style::Pretty } else { Style::Compact };
    let mut out = BufWriter::new(io::stdout().lock());
    let mut code = exit::OK;
    for file in &options.files {
        let result = show(file, style, &mut out);
        let Err(error) = result else { continue };
        if super::is_broken_pipe(&error) {
            // The reader has seen enough, as with `head`.
            break;
        }
        super::report(&error);
        code = exit::FAILED;
    }
    ExitCode::from(code)
}

/// Adds what to do where only a regular file will do.
fn with_help(error: JsonError, file: &Path) -> anyhow::Error {
    let refused = matches!(&error, JsonError::Image(ImageError::Open { source, .. })
        if source.kind() == io::ErrorKind::InvalidInput);
    let error = anyhow::Error::from(error);
    if !refused || file.is_dir() {
        return error;
    }
    anyhow!("{error:#}\n  To show what it holds, give it as standard input: rcriu show - < FILE.")
}

fn show(file: &Path, style: Style, out: &mut impl Write) -> anyhow::Result<()> {
    if file == Path::new("-") {
        json::write_from(Path::new("(standard input)"), io::stdin().lock(), style, out)?;
    } else {
        json::write(file, style, out).map_err(|error| with_help(error, file))?;
    }
    Ok(())
}
