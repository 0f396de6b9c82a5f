//! The log of a mount's daemon.

use std::{
    io::{self, Write},
    os::unix::net::UnixDatagram,
    path::Path,
    process,
};

use anyhow::Context;
use env_logger::{Builder, Target};
use jiff::Timestamp;
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::{
    causes::{TOLD, indented, lines, one_line},
    fs::recent,
    sys::output::{self, Existing},
};

/// The socket of the system's log (syslog(3)).
const SYSLOG: &str = "/dev/log";

/// `LOG_DAEMON` (syslog.h), to be combined with a severity of 0 to 7.
const FACILITY_DAEMON: u8 = 3 << 3;

/// Sends messages to the given file; otherwise in the foreground to standard error, and in the
/// background to the system log if there is one. Returns the name of the place, for the user.
pub(super) fn start(
    foreground: bool,
    file: Option<&Path>,
    level: LevelFilter,
) -> anyhow::Result<String> {
    let mut builder = Builder::new();
    builder.filter_level(level);
    // At debug level, fuser logs every request.
    builder
        .filter_module("fuser", if level < LevelFilter::Trace { LevelFilter::Warn } else { level });
    let place;
    if let Some(path) = file {
        place = path.display().to_string();
        let file = output::create(path, Existing::Continued);
        let file = file.with_context(|| format!("open log file {}", path.display()))?;
        builder.target(Target::Pipe(Box::new(file))).format(|out, record| {
            write_message(out, "imgfs", record.level(), &record.args().to_string())
        });
    } else if foreground {
        place = "standard error".to_owned();
        builder.filter_module(TOLD, LevelFilter::Off);
        builder.target(Target::Stderr).format(|out, record| {
            let level = record.level().as_str().to_lowercase();
            writeln!(out, "imgfs: {level}: {}", indented(&record.args().to_string()))
        });
    } else if let Some(syslog) = Syslog::connect() {
        place = format!("the system log, as imgfs[{}]", process::id());
        builder.target(Target::Pipe(Box::new(syslog))).format(|out, record| {
            let priority = FACILITY_DAEMON | severity(record.level());
            write!(
                out,
                "<{priority}>imgfs[{}]: {}",
                process::id(),
                one_line(&record.args().to_string())
            )
        });
    } else {
        place = "none: this machine has no system log (use --log-file FILE)".to_owned();
        builder.filter_level(LevelFilter::Off);
    }
    let logger = builder.build();
    // The keeper gets warnings even if the logger drops them.
    log::set_max_level(logger.filter().max(LevelFilter::Warn));
    log::set_boxed_logger(Box::new(Keeper { logger })).context("start logging")?;
    recent::set_place(&place);
    Ok(place)
}

/// Writes a message to a log file: a line with its level, and a line for each remedy. A program
/// that searches for errors by level finds one line for each.
pub(super) fn write_message(
    out: &mut impl Write,
    program: &str,
    level: Level,
    message: &str,
) -> io::Result<()> {
    let (now, pid) = (Timestamp::now(), process::id());
    let (problem, remedies) = lines(message);
    writeln!(out, "{now:.3} {level:<5} {program}[{pid}]: {problem}")?;
    for remedy in remedies {
        writeln!(out, "{now:.3} HELP  {program}[{pid}]: {remedy}")?;
    }
    Ok(())
}

/// Passes messages on, and keeps the last of them for `imgfs log`.
struct Keeper {
    logger: env_logger::Logger,
}

impl Log for Keeper {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn || self.logger.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        recent::note(
            record.level(),
            || format!("{:.0}", Timestamp::now()),
            || one_line(&record.args().to_string()),
        );
        self.logger.log(record);
    }

    fn flush(&self) {
        self.logger.flush();
    }
}

/// Returns the severity of syslog(3).
fn severity(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// The system log; every write is one message.
struct Syslog(UnixDatagram);

impl Syslog {
    fn connect() -> Option<Self> {
        let socket = UnixDatagram::unbound().ok()?;
        socket.connect(SYSLOG).ok()?;
        // A log that does not read must not delay readers of the mount.
        socket.set_nonblocking(true).ok()?;
        Some(Self(socket))
    }
}

impl Write for Syslog {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        if self.0.send(message).is_err() {
            // The log may have been restarted: try once more, on a new connection.
            if let Some(new) = Self::connect() {
                *self = new;
                let _ = self.0.send(message);
            }
        }
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
