//! The command line of `rcriu`.

use std::{env, process::ExitCode};

use clap::{Parser, Subcommand};

use super::{
    Common, exit, report, show,
    task::{self, Task, TaskWords},
};
use crate::{sys::heap, track::keeper};

/// Checkpoint and restore of process trees
///
/// An image directory holds the state of a tree of processes, in the format of CRIU. The
/// commands take the options of CRIU.
#[derive(Debug, Parser)]
#[command(
    name = "rcriu",
    version,
    arg_required_else_help = true,
    propagate_version = true,
    after_help = NOT_YET
)]
pub struct Rcriu {
    #[command(subcommand)]
    command: Command,
}

const NOT_YET: &str = "\
Of CRIU's commands cpuinfo, lazy-pages, page-server, service and swrk are
known and refused for now.";

// Deferred: a command has a hundred options, and most runs need one command.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Command {
    /// Write the state of a tree of processes to images
    ///
    /// The dump kills the tree when it has succeeded, unless -R or -s is given. If the dump
    /// fails or is interrupted, the tree runs on.
    #[command(after_help = DUMP_EXAMPLE)]
    Dump(TaskWords),
    /// Write the memory of a tree while it runs, as the parent of a later dump
    #[command(after_help = PRE_DUMP_EXAMPLE)]
    PreDump(TaskWords),
    /// Restore a tree of processes from images
    #[command(after_help = RESTORE_EXAMPLE)]
    Restore(TaskWords),
    /// Check the features of this kernel, and print the cost of each that is missing
    ///
    /// Prints a line per feature: `ok`; `missing`, if a dump or restore needs it; or
    /// `optional`, if rcriu does without it, at the cost in the line. The exit status is 1
    /// if a feature is missing. --extra, --experimental and --all make optional features
    /// required, and --feature the named ones.
    #[command(after_help = CHECK_EXAMPLE)]
    Check(TaskWords),
    /// Remove duplicate memory from images
    ///
    /// Pages that the snapshot in -D holds are freed in its ancestors. Ancestors that can
    /// no longer be restored are listed first. Pages that snapshots of other branches need
    /// are kept.
    ///
    /// --link turns full dumps of a tree into a chain: each dump leaves the pages that it
    /// has in common with the previous dump to that one. Every snapshot can still be
    /// restored. Processes are matched by pid, shared objects by kind, name and place, and
    /// pages by comparing all bytes.
    ///
    /// --reflink makes equal pages anywhere in a chain share blocks of the file system; -D
    /// is an image directory, or a directory of image directories.
    #[command(after_help = DEDUP_EXAMPLE)]
    Dedup(TaskWords),
    /// Show image files as JSON
    Show {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        options: show::Options,
    },
}

const DUMP_EXAMPLE: &str = "\
Examples:
  rcriu dump -t 4711 -D chain/1 --track-mem -R
  rcriu dump -t 4711 -D chain/2 --prev-images-dir ../1 -o dump.log -v4

Options without a value can be taken back: --no-display-stats.";

const PRE_DUMP_EXAMPLE: &str = "\
Examples:
  rcriu pre-dump -t 4711 -D chain/1 --track-mem
  rcriu dump -t 4711 -D chain/2 --prev-images-dir ../1";

const RESTORE_EXAMPLE: &str = "\
Examples:
  rcriu restore -D chain/2 -d --pidfile pid
  rcriu restore -D /mnt/img -W . -o restore.log -v4 --shell-job";

const CHECK_EXAMPLE: &str = "\
Examples:
  rcriu check --all
  rcriu check --feature mem_dirty_track && echo changes can be tracked

Exit codes:
  0  everything is there that was asked for
  1  something is missing; the last line says what";

const DEDUP_EXAMPLE: &str = "\
Examples:
  rcriu dedup -D chain/3
  rcriu dedup --link monday tuesday wednesday
  rcriu dedup --link --keep-originals monday tuesday
  rcriu dedup --reflink -D chain";

/// Runs `rcriu` with the command line of this process.
pub fn main() -> ExitCode {
    if env::args_os().next().is_some_and(|name| name == keeper::NAME) {
        return keeper::main(&env::args().skip(1).collect::<Vec<_>>());
    }
    heap::grow_in_few_steps();
    let prepared = match task::prepare(env::args_os().collect()) {
        Ok(prepared) => prepared,
        Err(error) => {
            report(&error);
            return ExitCode::from(exit::FAILED);
        }
    };
    match super::parsed(Rcriu::try_parse_from(prepared.words)) {
        Ok(rcriu) => rcriu.run(&prepared.given),
        Err(code) => code,
    }
}

impl Rcriu {
    /// Does what the command line says and returns the exit code.
    fn run(self, given: &[task::Given]) -> ExitCode {
        match self.command {
            Command::Dump(args) => task::run(Task::Dump, &args, given),
            Command::PreDump(args) => task::run(Task::PreDump, &args, given),
            Command::Restore(args) => task::run(Task::Restore, &args, given),
            Command::Check(args) => task::run(Task::Check, &args, given),
            Command::Dedup(args) => task::run(Task::Dedup, &args, given),
            Command::Show { common, options } => {
                common.start_logging();
                show::run(&options)
            }
        }
    }
}
