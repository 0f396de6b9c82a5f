//! The command line of `rcriu`.

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

use super::{
    Common, page_server, report, service, show,
    task::{self, Task, TaskWords},
};
use crate::{causes::is_called_criu, lazy, sys::heap, track::keeper};

/// Checkpoint and restore process trees
///
/// rcriu writes the state of a process tree to an image directory, and restores the tree from
/// it. It uses the image format and the options of CRIU.
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
rcriu refuses this command of CRIU for now: lazy-pages. Called as criu, it prints its version as
CRIU does, and reads CRIU's configuration files.";

// Deferred: a command has a hundred options, and most runs need one command.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Command {
    /// Write the state of a process tree to images
    ///
    /// After a successful dump, rcriu kills the tree, unless -R or -s is given. If the dump
    /// fails or is interrupted, the tree runs on.
    #[command(after_help = DUMP_EXAMPLE)]
    Dump(TaskWords),
    /// Write the memory of a running tree, as the parent of a later dump
    #[command(after_help = PRE_DUMP_EXAMPLE)]
    PreDump(TaskWords),
    /// Restore a process tree from images
    #[command(after_help = RESTORE_EXAMPLE)]
    Restore(TaskWords),
    /// Check which features this kernel offers to rcriu
    ///
    /// Prints one line for each feature: `ok`; `missing`, if a dump or restore needs it; or
    /// `optional`, if rcriu works without it. The line names the cost of a feature that the
    /// kernel lacks. The exit status is 1 if any feature is `missing`. --extra, --experimental,
    /// --all and --feature make optional features required.
    #[command(after_help = CHECK_EXAMPLE)]
    Check(TaskWords),
    /// Remove duplicate memory from images
    ///
    /// rcriu frees the pages of ancestors that the snapshot in -D supersedes. It first lists
    /// the ancestors that can then no longer be restored. It keeps pages that snapshots of
    /// other branches need.
    ///
    /// --link turns full dumps of a tree into a chain: each dump leaves to the previous dump
    /// the pages that both have in common. Every snapshot can still be restored. rcriu matches
    /// processes by pid, shared objects by kind, name and place, and pages by comparing all
    /// of their bytes.
    ///
    /// --reflink lets equal pages anywhere in a chain share blocks of the file system. -D is
    /// an image directory, or a directory of image directories.
    #[command(after_help = DEDUP_EXAMPLE)]
    Dedup(TaskWords),
    /// Describe the processor in an image, or compare it with that of an image
    ///
    /// `rcriu cpuinfo dump` writes cpuinfo.img to the image directory. `rcriu cpuinfo check`
    /// compares: the exit status is 1 if this processor lacks what that of the image has.
    #[command(after_help = CPUINFO_EXAMPLE)]
    Cpuinfo(TaskWords),
    /// Receive the memory of a dump on another machine
    ///
    /// Waits for one `rcriu dump --page-server` or `criu dump --page-server`, and writes the
    /// pages that it sends to the image directory. They appear there when all are on disk. The
    /// other images stay where the dump runs; copy them into the same directory. --tls encrypts
    /// the connection.
    #[command(after_help = PAGE_SERVER_EXAMPLE)]
    PageServer(TaskWords),
    /// Serve clients of CRIU's protocol at a socket
    Service(TaskWords),
    /// Serve the client behind a descriptor, as container runtimes and libcriu start it
    Swrk {
        /// Descriptor of a connected socket (AF_UNIX, SOCK_SEQPACKET)
        #[arg(value_name = "FD", value_parser = clap::value_parser!(i32).range(0..))]
        fd: i32,
    },
    /// Show image files as JSON
    Show {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        options: show::Options,
    },
}

/// The version of CRIU whose place rcriu takes, in the line in which scripts look for it.
const VERSION: &str = "Version: 4.2\n";

const DUMP_EXAMPLE: &str = "\
Examples:
  rcriu dump -t 4711 -D chain/1 --track-mem -R
  rcriu dump -t 4711 -D chain/2 --prev-images-dir ../1 -o dump.log -v4
  rcriu dump -t 4711 -D images -R --live

The prefix no- cancels an option that needs no value, such as one from a
configuration file: --no-display-stats.";

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
  0  all required features are present
  1  a required feature is missing; the last line names it";

const CPUINFO_EXAMPLE: &str = "\
Examples:
  rcriu cpuinfo dump -D images
  rcriu cpuinfo check -D images --cpu-cap=ins";

const PAGE_SERVER_EXAMPLE: &str = "\
Examples:
  rcriu page-server -D images --address 10.0.0.2 --port 1234
  rcriu dump -t 4711 -D images --page-server --address 10.0.0.2 --port 1234";

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
    if env::args_os().next().is_some_and(|name| name == lazy::NAME) {
        return task::pager(&env::args_os().skip(1).collect::<Vec<_>>());
    }
    heap::grow_in_few_steps();
    let prepared = match task::prepare(env::args_os().collect()) {
        Ok(prepared) => prepared,
        Err(task::Unprepared { error, code }) => {
            report(&error);
            return ExitCode::from(code);
        }
    };
    if prepared.asks_version {
        let of_criu = if is_called_criu() { VERSION } else { "" };
        // A closed pipe is no reason to fail.
        let _ = writeln!(io::stdout(), "{of_criu}rcriu {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    match super::parsed(Rcriu::try_parse_from(prepared.words)) {
        Ok(rcriu) => rcriu.run(&prepared.given),
        Err(code) => code,
    }
}

impl Rcriu {
    /// Runs the command and returns the exit code.
    fn run(self, given: &[task::Given]) -> ExitCode {
        match self.command {
            Command::Dump(args) => task::run(Task::Dump, &args, given),
            Command::PreDump(args) => task::run(Task::PreDump, &args, given),
            Command::Restore(args) => task::run(Task::Restore, &args, given),
            Command::Check(args) => task::run(Task::Check, &args, given),
            Command::Dedup(args) => task::run(Task::Dedup, &args, given),
            Command::Cpuinfo(args) => task::run(Task::Cpuinfo, &args, given),
            Command::Service(args) => match task::service_options(&args, given) {
                Ok(options) => service::service(&options, || {
                    task::start_server_log(Task::Service, &args, given)
                }),
                Err(code) => code,
            },
            Command::PageServer(args) => match task::page_server_options(&args, given) {
                Ok(options) => page_server::run(&options, || {
                    task::start_server_log(Task::PageServer, &args, given)
                }),
                Err(code) => code,
            },
            Command::Swrk { fd } => service::swrk(fd),
            Command::Show { common, options } => {
                common.start_logging();
                show::run(&options)
            }
        }
    }
}
