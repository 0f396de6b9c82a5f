//! The command line of `imgfs`.

use std::{io::Write, process::ExitCode};

use clap::{Parser, Subcommand};

use super::{Common, answer, check, diff, exit, flatten, list, look, map, mount, pack};

/// Inspect and mount chains of image directories
///
/// A chain is an image directory, as CRIU and rcriu write it, with all directories that its
/// parent links lead to. Commands also accept a directory of image directories, and an archive
/// of these, as Podman and CRI-O export it.
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
    Info(look::InfoArgs),
    #[command(name = "ps")]
    Processes(look::ProcessesArgs),
    #[command(name = "fds")]
    Descriptors(look::DescriptorsArgs),
    #[command(name = "maps")]
    Mappings(look::MappingsArgs),
    Cat(look::CatArgs),
    Get(look::GetArgs),
    Map(map::MapArgs),
    Pack(pack::PackArgs),
    Mount(mount::MountArgs),
    Mounts(mount::MountsArgs),
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
    /// Runs the command and returns the exit code.
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
            Command::Flatten(args) => plain(|_| flatten::run(&args)),
            Command::Pack(args) => plain(|_| pack::run(&args)),
            Command::Info(args) => plain(|out| look::info(&args, out)),
            Command::Processes(args) => plain(|out| look::processes(&args, out)),
            Command::Descriptors(args) => plain(|out| look::descriptors(&args, out)),
            Command::Mappings(args) => plain(|out| look::mappings(&args, out)),
            Command::Cat(args) => plain(|out| look::cat(&args, out)),
            Command::Get(args) => plain(|_| look::get(&args)),
            Command::Map(args) => answer(|out| map::run(&args, out), exit::FAILED, exit::FAILED),
            Command::Mounts(args) => plain(|out| mount::mounts(&args, out)),
            Command::Commit(args) => plain(|out| mount::commit(&args, out)),
            Command::Log(args) => plain(|out| mount::log(&args, out)),
            Command::Unmount(args) => plain(|_| mount::unmount(&args)),
        }
    }
}

/// Runs a command that has no negative answer.
fn plain(command: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>) -> ExitCode {
    answer(|out| command(out).map(|()| true), exit::FAILED, exit::FAILED)
}
