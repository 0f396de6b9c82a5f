//! The command line of `rcriu`.

use std::{env, process::ExitCode};

use clap::{Parser, Subcommand};

use super::{
    Common, exit, report, show,
    task::{self, Task, TaskWords},
};
use crate::{res::track::keeper, sys::heap};

/// Checkpoint and restore of process trees
///
/// Works on image directories: directories of files that hold the state of a
/// tree of processes, in the format of CRIU, with the options of CRIU.
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
    /// The tree is killed afterwards, unless -R or -s say otherwise. If the dump
    /// fails or is interrupted, the tree runs on.
    #[command(after_help = DUMP_EXAMPLE)]
    Dump(TaskWords),
    /// Write the memory of a tree while it runs, for a dump that is to follow
    #[command(after_help = PRE_DUMP_EXAMPLE)]
    PreDump(TaskWords),
    /// Make a tree of processes from images
    #[command(after_help = RESTORE_EXAMPLE)]
    Restore(TaskWords),
    /// Say what this kernel can do, and what is lost by what it cannot
    #[command(after_help = CHECK_EXAMPLE)]
    Check(TaskWords),
    /// Remove memory from images that others hold as well
    ///
    /// What the snapshot in the directory of -D holds is freed in its ancestors, which
    /// may then no longer be restored; which of them is said first. What snapshots of
    /// other branches need is kept.
    ///
    /// --link makes one chain of full dumps of a tree: what a dump has in common with
    /// the one before it is left to that one. Every snapshot can be restored
    /// afterwards as before. Processes are matched by pid, shared objects by what
    /// they are, and what is the same is told by comparing all bytes.
    ///
    /// --reflink lets equal pages of a chain, wherever they are, share blocks of the file
    /// system; -D is an image directory, or a directory of such.
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
