//! The log of a command.

use std::{
    io::{self, Write},
    path::Path,
    time::Instant,
};

use anyhow::Context;
use env_logger::{Builder, Target};
use log::{Level, LevelFilter};

use crate::{
    causes::{TOLD, indented, one_line},
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

/// How messages look in a log file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// As in the logs of all our programs.
    Own,
    /// As in CRIU's, in which container runtimes look for errors.
    Criu,
}

/// Writes a message as CRIU does: the seconds since the start, the level, the place.
fn write_as_criu(
    out: &mut impl Write,
    started: Instant,
    level: Level,
    message: &str,
) -> io::Result<()> {
    let level = match level {
        Level::Error => "Error (rcriu): ",
        Level::Warn => "Warn  (rcriu): ",
        Level::Info | Level::Debug | Level::Trace => "",
    };
    let since = started.elapsed();
    let message = one_line(message);
    writeln!(out, "({:02}.{:06}) {level}{message}", since.as_secs(), since.subsec_micros())
}

/// Sends messages to `file`, or to standard output if that is `-`, and errors also to standard
/// error; without a file, sends all messages to standard error.
pub(super) fn start(file: Option<&Path>, level: LevelFilter, style: Style) -> anyhow::Result<()> {
    let started = Instant::now();
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
            builder.format(move |out, record| {
                let message = record.args().to_string();
                if record.level() == Level::Error && record.target() != TOLD {
                    // A failed write to standard error cannot be reported anywhere.
                    let _ = writeln!(io::stderr(), "rcriu: error: {}", indented(&message));
                }
                match style {
                    Style::Own => write_message(out, "rcriu", record.level(), &message),
                    Style::Criu => write_as_criu(out, started, record.level(), &message),
                }
            });
        }
    }
    match (builder.try_init(), style) {
        // A client may ask for several tasks: the first one's log has the messages of all.
        (Err(_), Style::Criu) => Ok(()),
        (started, _) => started.context("start logging"),
    }
}
