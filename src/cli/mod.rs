//! Command lines: what users type, what they are told, exit codes.
//!
//! Each program has a module with its command line, which runs commands that
//! have modules of their own.

pub mod check;
mod check_features;
mod dedup;
pub mod diff;
pub mod exit;
pub mod flatten;
pub mod imgfs;
pub mod list;
mod log_sink;
pub mod mount;
pub mod rcriu;
pub mod show;
mod task;

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use clap::{ArgAction, Args, Parser};
use indicatif::{ProgressBar, ProgressStyle};
use log::LevelFilter;

use crate::image::MemoryId;

/// Options of all programs.
#[derive(Args, Clone, Copy, Debug)]
pub struct Common {
    /// Say more of what is being done, on standard error
    ///
    /// Once: phases with their figures. Twice: every task and object. Three
    /// times: every page and system call. Warnings and errors are always said.
    #[arg(short, long, action = ArgAction::Count, global = true)]
    verbose: u8,
}

impl Common {
    /// Returns how much is said.
    fn log_level(self) -> LevelFilter {
        match self.verbose {
            0 => LevelFilter::Warn,
            1 => LevelFilter::Info,
            2 => LevelFilter::Debug,
            _ => LevelFilter::Trace,
        }
    }

    /// Sets up logging to standard error.
    pub fn start_logging(self) {
        let level = self.log_level();
        let mut logger = env_logger::Builder::new();
        // Tests and libraries may have been first.
        let _ = logger.filter_level(level).format_timestamp(None).try_init();
    }
}

/// Parses the command line of this process, or says what is wrong with it, or
/// what was asked about it, and returns the exit code.
///
/// # Errors
/// The exit code, if there is nothing more to do.
pub fn parse<T: Parser>() -> Result<T, ExitCode> {
    parsed(T::try_parse_from(env::args_os()))
}

/// Returns what was parsed, or says why it was not and returns the exit code.
fn parsed<T>(result: Result<T, clap::Error>) -> Result<T, ExitCode> {
    result.map_err(|error| {
        // A closed terminal is no reason to fail.
        let _ = error.print();
        ExitCode::from(if error.use_stderr() { exit::USAGE } else { exit::OK })
    })
}

/// Says on standard error what went wrong, and why, and why that.
pub fn report(error: &anyhow::Error) {
    let program = env::args_os().next().unwrap_or_default();
    let program = std::path::Path::new(&program).file_name().unwrap_or_default();
    // There is nobody left to tell if this fails.
    let _ = writeln!(io::stderr(), "{}: {error:#}", program.display());
}

/// Whether the error is that nobody reads the output any more.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Runs a command that prints and returns the exit code: `no` for a negative
/// answer, `failed` for none.
fn answer(
    command: impl FnOnce(&mut dyn Write) -> anyhow::Result<bool>,
    no: u8,
    failed: u8,
) -> ExitCode {
    let mut out = io::BufWriter::new(io::stdout().lock());
    match command(&mut out).and_then(|yes| Ok(out.flush().map(|()| yes)?)) {
        Ok(yes) => ExitCode::from(if yes { exit::OK } else { no }),
        // Like cat: who stops reading has read enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::from(exit::OK),
        Err(error) => {
            report(&error);
            ExitCode::from(failed)
        }
    }
}

/// Returns a bar that shows how many bytes are done, and of how many, where standard
/// error is a terminal.
fn bytes_bar() -> ProgressBar {
    ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{wide_bar} {binary_bytes}/{binary_total_bytes} {eta}")
            .expect("the template is valid"),
    )
}

/// Returns how JSON names a memory.
fn memory_document(memory: MemoryId) -> serde_json::Value {
    match memory {
        MemoryId::Private(pid) => serde_json::json!({ "kind": "private", "pid": pid }),
        MemoryId::Shared(shmid) => serde_json::json!({ "kind": "shared", "shmid": shmid }),
    }
}
