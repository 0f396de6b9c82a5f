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
    /// Indent the output, and print numbers in their usual notation
    ///
    /// Addresses and masks are hexadecimal, modes are octal, flags and signals have their
    /// names, and devices are MAJOR:MINOR. Without this option, an entry is one line, and all
    /// numbers are plain JSON numbers, for scripts.
    #[arg(short, long)]
    pretty: bool,
    /// Image files, such as core-293.img or stats-dump; `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

const DESCRIPTION: &str = r#"Show image files as JSON

Prints one JSON document for each file, in the given order:

    {"magic":"PSTREE","entries":[
    {"pid":293,"ppid":0,"pgid":293,"sid":293,"threads":[293]}
    ]}

An entry has the fields that the file has, with the names of the image format.
Bytes are encoded in base64. "payload" holds data that follow an entry, such as
the contents of a pipe; "unknown_fields" holds fields that rcriu does not know.
For files without entries, such as pages-1.img, rcriu prints only the size.

If rcriu cannot read a file, it reports the file on standard error, shows the
other files, and exits with status 1."#;

const EXAMPLES: &str = "\
Examples:
  rcriu show --pretty dump/mm-293.img
  rcriu show dump/pstree.img | jq '.entries[].pid'
  ssh host cat dump/files.img | rcriu show -

Exit codes:
  0  all files were shown
  1  a file could not be shown
  2  the command line is wrong";

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

/// Adds a remedy to the error for a file that is not regular.
fn with_help(error: JsonError, file: &Path) -> anyhow::Error {
    let refused = matches!(&error, JsonError::Image(ImageError::Open { source, .. })
        if source.kind() == io::ErrorKind::InvalidInput);
    let error = anyhow::Error::from(error);
    if !refused || file.is_dir() {
        return error;
    }
    anyhow!("{error:#}\nhelp: pass it as standard input: rcriu show - < FILE")
}

fn show(file: &Path, style: Style, out: &mut impl Write) -> anyhow::Result<()> {
    if file == Path::new("-") {
        json::write_from(Path::new("(standard input)"), io::stdin().lock(), style, out)?;
    } else {
        json::write(file, style, out).map_err(|error| with_help(error, file))?;
    }
    Ok(())
}
