//! `rcriu dump`, `pre-dump`, `restore` and the other commands with CRIU's options.

mod arrange;
mod config;
mod convert;
mod log;
mod options;
mod run;
mod table;
#[cfg(test)]
mod tests;

use std::ffi::OsString;

use anyhow::anyhow;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

pub(super) use self::{
    arrange::Given,
    options::size_bytes,
    run::{
        PageServerOptions, Requested, ServiceOptions, page_server_for_client, page_server_options,
        pager, refuse_client, run, run_for_client, service_options, start_server_log,
    },
};
use self::{
    arrange::{Arranged, Specs},
    config::Sources,
    options::{ImageArgs, TaskArgs},
    table::{Commands, State},
};
use crate::{
    causes::{HELP, is_called_criu},
    cli::exit,
};

/// A command with CRIU's options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Dump,
    PreDump,
    Restore,
    Check,
    Dedup,
    Cpuinfo,
    Service,
    PageServer,
}

impl Task {
    const ALL: [Self; 8] = [
        Self::Dump,
        Self::PreDump,
        Self::Restore,
        Self::Check,
        Self::Dedup,
        Self::Cpuinfo,
        Self::Service,
        Self::PageServer,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Dump => "dump",
            Self::PreDump => "pre-dump",
            Self::Restore => "restore",
            Self::Check => "check",
            Self::Dedup => "dedup",
            Self::Cpuinfo => "cpuinfo",
            Self::Service => "service",
            Self::PageServer => "page-server",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }

    const fn as_set(self) -> Commands {
        match self {
            Self::Dump => table::DUMP,
            Self::PreDump => table::PRE_DUMP,
            Self::Restore => table::RESTORE,
            Self::Check => table::CHECK,
            Self::Dedup => table::DEDUP,
            Self::Cpuinfo => table::CPUINFO,
            Self::Service => table::SERVICE,
            Self::PageServer => table::PAGE_SERVER,
        }
    }
}

/// A command line in the order and spelling that clap reads.
#[derive(Debug)]
pub(super) struct Prepared {
    /// All words, with the program's name.
    pub words: Vec<OsString>,
    /// The options of a [`Task`], including those of configuration files.
    pub given: Vec<Given>,
    /// Whether the user asks for the version.
    pub asks_version: bool,
}

/// Why a command line is not prepared, and the exit code.
#[derive(Debug)]
pub(super) struct Unprepared {
    pub error: anyhow::Error,
    pub code: u8,
}

impl From<anyhow::Error> for Unprepared {
    fn from(error: anyhow::Error) -> Self {
        Self { error, code: exit::FAILED }
    }
}

/// Prepares a command line: if it is that of a [`Task`], brings it into the order and spelling
/// that clap reads, and adds the options of configuration files.
///
/// # Errors
/// A command that is refused; a configuration file that can't be read.
pub(super) fn prepare(words: Vec<OsString>) -> Result<Prepared, Unprepared> {
    let specs = Specs::of(&TaskArgs::augment_args(Command::new("task")));
    let line = words.get(1..).unwrap_or_default();
    let first = specs.arrange(line, Arranged::default());
    let command = first.operands.first().and_then(|word| word.to_str()).unwrap_or_default();
    if let Some((name, instead)) = table::REFUSED_COMMANDS.iter().find(|(name, _)| *name == command)
    {
        let is_right = first.for_clap.is_empty() && first.operands.len() == 1;
        let code =
            if *name == table::EXEC && is_right { exit::AS_CRIU_FAILS } else { exit::FAILED };
        return Err(Unprepared { error: anyhow!("the command {name} is {instead}"), code });
    }
    let asks_version = first.asks_version();
    let Some(task) = Task::named(command) else {
        let mut words = words;
        if first.operands.is_empty() && !first.for_clap.is_empty() {
            words.truncate(1);
            words.extend(first.for_clap);
        }
        return Ok(Prepared { words, given: Vec::new(), asks_version });
    };
    let mut all = if first.for_clap.is_empty() {
        specs.arrange(line, Sources::of(&first).read(&specs)?)
    } else {
        // Clap reports help, version or an error of the line itself.
        first
    };
    all.operands.remove(0);
    let mut prepared: Vec<OsString> = words.into_iter().take(1).collect();
    prepared.push(task.name().into());
    prepared.extend(all.words());
    Ok(Prepared { words: prepared, given: all.given, asks_version })
}

/// Returns why an option that was given is refused.
fn refusal(task: Task, given: &[Given]) -> Option<String> {
    given.iter().find_map(|Given { name, configured, .. }| {
        let Some(row) = table::row(name, task.as_set()) else {
            let said = format!("--{name} is not an option of {}\nhelp: leave it out", task.name());
            let ignored =
                *configured || is_called_criu() && !table::ONLY_RESTORES.contains(&&**name);
            return (!ignored).then_some(said);
        };
        match row.state {
            State::Built | State::Harmless(_) => None,
            State::Refused(instead) => {
                Some(format!("--{name} is not supported yet{HELP}{instead}"))
            }
        }
    })
}

/// Logs why options that were given have no effect.
fn without_effect(task: Task, given: &[Given]) -> impl Iterator<Item = String> {
    given.iter().filter_map(move |Given { name, .. }| {
        let Some(row) = table::row(name, task.as_set()) else {
            return Some(format!("--{name} has no effect: it is not for {}", task.name()));
        };
        match row.state {
            State::Harmless(why) => Some(format!("--{name} has no effect: {why}")),
            State::Built | State::Refused(_) => None,
        }
    })
}

/// The heading of options that rcriu accepts without effect.
const WITHOUT_EFFECT: &str = "Accepted, without effect";

/// The heading of options that rcriu refuses.
const REFUSED: &str = "Known, refused for now";

/// The options of a [`Task`]. The help of a command shows only its own options, and options
/// that are refused or have no effect only in the long help.
#[derive(Debug)]
pub(super) struct TaskWords(Box<TaskArgs>);

impl std::ops::Deref for TaskWords {
    type Target = TaskArgs;

    fn deref(&self) -> &TaskArgs {
        &self.0
    }
}

impl FromArgMatches for TaskWords {
    fn from_arg_matches(matches: &ArgMatches) -> clap::error::Result<Self> {
        TaskArgs::from_arg_matches(matches).map(|args| Self(Box::new(args)))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> clap::error::Result<()> {
        self.0.update_from_arg_matches(matches)
    }
}

impl Args for TaskWords {
    fn augment_args(command: Command) -> Command {
        let options = TaskArgs::augment_args(Command::new("task"));
        let task = Task::named(command.get_name());
        let mut args: Vec<Arg> =
            options.get_arguments().map(|arg| tidied(arg.clone(), task)).collect();
        // Clap prints groups in the order of their first options.
        args.sort_by_key(|arg| match arg.get_help_heading() {
            Some(WITHOUT_EFFECT) => 1,
            Some(REFUSED) => 2,
            _ => 0,
        });
        command.groups(options.get_groups().cloned()).args(args).args_override_self(true)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Returns an option as the help of a command shows it.
fn tidied(arg: Arg, task: Option<Task>) -> Arg {
    let Some(task) = task else { return arg };
    let Some(name) = arg.get_long() else {
        // Without this, it has the heading of the options before it.
        let arg = arg.help_heading(None::<&str>);
        return match task {
            _ if !arg.is_last_set() => arg,
            Task::Restore => arg,
            Task::Dedup => arg.value_name("DIR").help("Full dumps to link, the oldest first"),
            Task::Cpuinfo => arg.value_name("ACTION").help("dump or check"),
            Task::Dump | Task::PreDump | Task::Check | Task::Service | Task::PageServer => {
                arg.hide(true)
            }
        };
    };
    let Some(row) = table::row(name, task.as_set()) else {
        let is_known = table::ROWS.iter().any(|row| row.name == name);
        return arg.hide(is_known);
    };
    match row.state {
        State::Built => arg,
        State::Harmless(_) => arg.hide_short_help(true).help_heading(WITHOUT_EFFECT),
        State::Refused(_) => arg.hide_short_help(true).help_heading(REFUSED),
    }
}
