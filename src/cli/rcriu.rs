//! The command line of `rcriu`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use super::{Common, show};

/// Checkpoint and restore of process trees
///
/// Works on image directories: directories of files that hold the state of a
/// tree of processes, in the format of CRIU.
#[derive(Debug, Parser)]
#[command(name = "rcriu", version, arg_required_else_help = true)]
pub struct Rcriu {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Show(show::Options),
}

/// Runs `rcriu` with the command line of this process.
pub fn main() -> ExitCode {
    match super::parse::<Rcriu>() {
        Ok(rcriu) => rcriu.run(),
        Err(code) => code,
    }
}

impl Rcriu {
    /// Does what the command line says and returns the exit code.
    pub fn run(self) -> ExitCode {
        self.common.start_logging();
        match self.command {
            Command::Show(options) => show::run(&options),
        }
    }
}
