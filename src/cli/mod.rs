//! Command lines: what users type, what they are told, exit codes.
//!
//! Each program has a module with its command line, which runs commands that
//! have modules of their own.

pub mod exit;
pub mod rcriu;
pub mod show;

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use clap::{ArgAction, Args, Parser};
use log::LevelFilter;

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
    /// Sets up logging to standard error.
    pub fn start_logging(self) {
        let level = match self.verbose {
            0 => LevelFilter::Warn,
            1 => LevelFilter::Info,
            2 => LevelFilter::Debug,
            _ => LevelFilter::Trace,
        };
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
    T::try_parse_from(env::args_os()).map_err(|error| {
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
