//! The log of a command.

use std::{
    io::{self, Write},
    path::Path,
    sync::{PoisonError, RwLock},
    time::Instant,
};

use anyhow::Context;
use env_logger::{Builder, Target};
use log::{Level, LevelFilter, Log, Metadata, Record};

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
    start_with(file, Existing::Replaced, level, style)
}

/// Like [`start`], but continues a file.
pub(super) fn start_continued(file: Option<&Path>, level: LevelFilter) -> anyhow::Result<()> {
    start_with(file, Existing::Continued, level, Style::Own)
}

fn start_with(
    file: Option<&Path>,
    existing: Existing,
    level: LevelFilter,
    style: Style,
) -> anyhow::Result<()> {
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
                let file = output::create(path, existing);
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
    CURRENT.switch_to(builder.build());
    // It is the current one already if this is not the first log: a service has its own, and so has each
    // task that a client asks for.
    let _ = log::set_logger(&CURRENT);
    Ok(())
}

static CURRENT: Switch = Switch(RwLock::new(None));

/// The logger of the task that is being done.
struct Switch(RwLock<Option<env_logger::Logger>>);

impl Switch {
    fn switch_to(&self, logger: env_logger::Logger) {
        log::set_max_level(logger.filter());
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(logger);
    }

    fn with(&self, run: impl FnOnce(&env_logger::Logger)) {
        if let Some(logger) = &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            run(logger);
        }
    }
}

impl Log for Switch {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let mut enabled = false;
        self.with(|logger| enabled = logger.enabled(metadata));
        enabled
    }

    fn log(&self, record: &Record<'_>) {
        self.with(|logger| logger.log(record));
    }

    fn flush(&self) {
        self.with(Log::flush);
    }
}
