//! The command line of `imgfs`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use super::{Common, answer, check, diff, exit, flatten, list, mount};

/// Look into chains of image directories
///
/// A chain is an image directory and those that its parent links lead to, or a
/// directory of image directories, as CRIU and rcriu write them.
#[derive(Debug, Parser)]
#[command(name = "imgfs", version, arg_required_else_help = true)]
pub struct Imgfs {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(name = "ls")]
    List(list::ListArgs),
    Check(check::CheckArgs),
    Diff(diff::DiffArgs),
    Flatten(flatten::FlattenArgs),
    Mount(mount::MountArgs),
    Commit(mount::CommitArgs),
    Log(mount::LogArgs),
    #[command(name = "umount")]
    Unmount(mount::UnmountArgs),
}

/// Runs `imgfs` with the command line of this process.
pub fn main() -> ExitCode {
    match super::parse::<Imgfs>() {
        Ok(imgfs) => imgfs.run(),
        Err(code) => code,
    }
}

impl Imgfs {
    /// Does what the command line says and returns the exit code.
    pub fn run(self) -> ExitCode {
        if !matches!(self.command, Command::Mount(_)) {
            self.common.start_logging();
        }
        match self.command {
            // The daemon has a log of its own.
            Command::Mount(args) => mount::run(args, self.common),
            Command::List(args) => answer(|out| list::run(&args, out), exit::FAILED, exit::FAILED),
            Command::Check(args) => {
                answer(|out| check::run(&args, out), exit::FAILED, exit::FAILED)
            }
            Command::Diff(args) => {
                answer(|out| diff::run(&args, out), exit::DIFFERENT, exit::NOT_COMPARED)
            }
            Command::Flatten(args) => {
                answer(|_| flatten::run(&args).map(|()| true), exit::FAILED, exit::FAILED)
            }
            Command::Commit(args) => {
                answer(|out| mount::commit(&args, out).map(|()| true), exit::FAILED, exit::FAILED)
            }
            Command::Log(args) => {
                answer(|out| mount::log(&args, out).map(|()| true), exit::FAILED, exit::FAILED)
            }
            Command::Unmount(args) => {
                answer(|_| mount::unmount(&args).map(|()| true), exit::FAILED, exit::FAILED)
            }
        }
    }
}
