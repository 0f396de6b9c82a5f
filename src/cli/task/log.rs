//! The log of a command.

use std::{
    io::{self, Write},
    path::Path,
};

use anyhow::Context;
use env_logger::{Builder, Target};
use log::{Level, LevelFilter};

use crate::{
    causes::{TOLD, indented},
    cli::log_sink::write_message,
    sys::output::{self, Existing},
};

/// Returns the level for one of CRIU's numbers.
pub(super) fn level(verbosity: u8) -> LevelFilter {
    match verbosity {
        0 => LevelFilter::Off,
        1 => LevelFilter::Error,
        2 => LevelFilter::Warn,
        3 => LevelFilter::Info,
        4 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    }
}

/// Sends messages to `file`, or to standard output if that is `-`, and errors also to standard
/// error; without a file, sends all messages to standard error.
pub(super) fn start(file: Option<&Path>, level: LevelFilter) -> anyhow::Result<()> {
    let mut builder = Builder::new();
    builder.filter_level(level);
    match file {
        None => {
            builder.filter_module(TOLD, LevelFilter::Off);
            builder.target(Target::Stderr).format(|out, record| {
                let level = record.level().as_str().to_lowercase();
                writeln!(out, "rcriu: {level}: {}", indented(&record.args().to_string()))
            });
        }
        Some(path) => {
            if path == Path::new("-") {
                builder.target(Target::Stdout);
            } else {
                let file = output::create(path, Existing::Replaced);
                let file = file.with_context(|| format!("open log file {}", path.display()))?;
                builder.target(Target::Pipe(Box::new(file)));
            }
            builder.format(|out, record| {
                let message = record.args().to_string();
                if record.level() == Level::Error && record.target() != TOLD {
                    // A failed write to standard error cannot be reported anywhere.
                    let _ = writeln!(io::stderr(), "rcriu: error: {}", indented(&message));
                }
                write_message(out, "rcriu", record.level(), &message)
            });
        }
    }
    builder.try_init().context("start logging")
}
