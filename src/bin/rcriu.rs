//! Checkpoints and restores trees of processes; see `rcriu --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    rcriu::cli::rcriu::main()
}
