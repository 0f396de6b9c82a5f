//! Command lines: options, output and exit codes.
//!
//! Each program has a module for its command line; each command has a module of its own.

mod background;
pub mod check;
mod check_features;
mod color;
mod dedup;
pub mod diff;
pub mod exit;
pub mod flatten;
pub mod imgfs;
pub mod list;
mod log_sink;
mod look;
mod map;
pub mod mount;
mod pack;
mod page_server;
pub mod rcriu;
mod service;
pub mod show;
mod source;
mod table;
mod task;
mod times;

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use clap::{ArgAction, Args, Parser};
use indicatif::{ProgressBar, ProgressStyle};
use log::LevelFilter;

use crate::{
    causes::{TOLD, indented, program, told},
    chain::{Chain, SnapshotId},
    image::MemoryId,
};

/// Options of all programs.
#[derive(Args, Clone, Copy, Debug)]
pub struct Common {
    /// Print more messages to standard error
    ///
    /// -v prints phases and their counts, -vv every process and object, -vvv every page and
    /// system call. Warnings and errors are always printed.
    #[arg(short, long, action = ArgAction::Count, global = true)]
    verbose: u8,
}

impl Common {
    fn log_level(self) -> LevelFilter {
        match self.verbose {
            0 => LevelFilter::Warn,
            1 => LevelFilter::Info,
            2 => LevelFilter::Debug,
            _ => LevelFilter::Trace,
        }
    }

    /// Returns these options with `--verbose`, if it was not given.
    fn at_least_verbose(self) -> Self {
        Self { verbose: self.verbose.max(1) }
    }

    /// Starts logging to standard error.
    pub fn start_logging(self) {
        let level = self.log_level();
        let mut logger = env_logger::Builder::new();
        // A test or a library may have started it already.
        let _ = logger
            .filter_level(level)
            .filter_module(TOLD, LevelFilter::Off)
            .format_timestamp(None)
            .try_init();
    }
}

/// Parses the command line of this process. Prints help and usage errors.
///
/// # Errors
/// The exit code, if clap has printed help or a usage error.
pub fn parse<T: Parser>() -> Result<T, ExitCode> {
    parsed(T::try_parse_from(env::args_os()))
}

/// Returns the parsed command line, or prints the usage error and returns the exit code.
fn parsed<T>(result: Result<T, clap::Error>) -> Result<T, ExitCode> {
    result.map_err(|error| {
        // A closed terminal is no reason to fail.
        let _ = error.print();
        ExitCode::from(if error.use_stderr() { exit::usage() } else { exit::OK })
    })
}

/// Prints an error with its causes on standard error, and each remedy on a line of its own.
/// Logs the same, unless the log goes to standard error, too.
pub fn report(error: &anyhow::Error) {
    let message = told(error.as_ref());
    // A failed write to standard error cannot be reported anywhere.
    let _ = writeln!(io::stderr(), "{}: {}", program(), indented(&message));
    log::error!(target: TOLD, "{message}");
}

/// Whether the reader of the output has closed the pipe.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Runs a command that prints, and returns its exit code: `no` for a negative answer, `failed`
/// for an error.
fn answer(
    command: impl FnOnce(&mut dyn Write) -> anyhow::Result<bool>,
    no: u8,
    failed: u8,
) -> ExitCode {
    let mut out = io::BufWriter::new(io::stdout().lock());
    match command(&mut out).and_then(|yes| Ok(out.flush().map(|()| yes)?)) {
        Ok(yes) => ExitCode::from(if yes { exit::OK } else { no }),
        // As with cat, a reader that closes the pipe is no error.
        Err(error) if is_broken_pipe(&error) => ExitCode::from(exit::OK),
        Err(error) => {
            report(&error);
            ExitCode::from(failed)
        }
    }
}

/// Returns a progress bar in bytes, which is hidden unless standard error is a terminal.
fn bytes_bar() -> ProgressBar {
    ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{wide_bar} {binary_bytes}/{binary_total_bytes} {eta}")
            .expect("the template is valid"),
    )
}

/// Returns a progress bar that counts `what`, which is hidden unless standard error is a terminal.
fn count_bar(what: &str) -> ProgressBar {
    let template = format!("{{wide_bar}} {{pos}}/{{len}} {what} {{eta}}");
    ProgressBar::new(0)
        .with_style(ProgressStyle::with_template(&template).expect("the template is valid"))
}

/// Calls `act` with each snapshot of a chain, and shows a bar meanwhile.
///
/// # Errors
/// The first error of `act`.
fn for_each_snapshot(
    chain: &Chain,
    mut act: impl FnMut(SnapshotId, &ProgressBar) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let bar = count_bar("snapshots");
    bar.set_length(chain.snapshots().len() as u64);
    let result = chain.ids().try_for_each(|id| {
        act(id, &bar)?;
        bar.inc(1);
        Ok(())
    });
    bar.finish_and_clear();
    result
}

/// Returns the object that stands for a memory in JSON.
fn memory_document(memory: MemoryId) -> serde_json::Value {
    match memory {
        MemoryId::Private(pid) => serde_json::json!({ "kind": "private", "pid": pid }),
        MemoryId::Shared(shmid) => serde_json::json!({ "kind": "shared", "shmid": shmid }),
    }
}
