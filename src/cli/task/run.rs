//! Running the commands.

use std::{
    ffi::OsString,
    fs::File,
    io::BufWriter,
    os::{fd::IntoRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, bail};
use clap::{Args, Command, FromArgMatches};
use log::{LevelFilter, info};
use nix::libc;

use super::{
    Given, ImageArgs, Task, TaskArgs, TaskWords,
    arrange::Specs,
    config::Sources,
    convert::{self, CpuinfoWork, UsageError},
    log::{self as task_log, Style},
    refusal, without_effect,
};
use crate::{
    action::Client,
    causes::tell,
    cli::{answer, check_features, dedup, exit, report},
    dump, fault,
    image::{Directory, ImageWriter, Kind},
    inject::{self, Repair},
    lazy, page_server,
    res::{file, tree::processor},
    restore,
    sys::{
        output::{self, Existing},
        supervise::{self, Ended, Side, Supervisor},
    },
    units::HostPid,
};

/// A task that a client of the service asks for.
pub(in crate::cli) struct Requested {
    /// Its options by their long names.
    pub options: Vec<(&'static str, Option<OsString>)>,
    /// A configuration file, which wins over the options.
    pub config: Option<PathBuf>,
    /// The command of `--exec-cmd`.
    pub operands: Vec<OsString>,
    /// The log for the case that the options are wrong.
    pub log: Option<PathBuf>,
    /// The client, if it is to be notified of stages.
    pub client: Option<Arc<dyn Client>>,
    /// The client, if it takes masters of pseudoterminals.
    pub taker: Option<Arc<dyn file::TakeMaster>>,
    /// The inode of our end of the connection, if the client dumps itself.
    pub own_end: Option<u32>,
}

/// Runs a task for a client, and returns the exit code. Calls `reply` once, maybe in a child, with the
/// root of a restored tree.
pub(in crate::cli) fn run_for_client(
    task: Task,
    requested: Requested,
    reply: &mut dyn FnMut(anyhow::Result<Option<HostPid>>),
) -> u8 {
    let (client, taker) = (requested.client.clone(), requested.taker.clone());
    let (log, own_end) = (requested.log.clone(), requested.own_end);
    let prepared = prepare_request(task, requested).and_then(|(args, given)| {
        let work = Work::of(task, &args).expect("a client cannot ask for another task")?;
        Ok((work.with_client(client, taker, own_end), args, given))
    });
    let (work, args, given) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return refuse_client(log.as_deref(), error, reply),
    };
    match work.carry_out(|| perform(task, &work, (&args, &given), Style::Criu, &mut *reply)) {
        Ok(code) => code,
        Err(error) => {
            report(&error);
            reply(Err(error));
            exit::FAILED
        }
    }
}

/// Tells a client why its request is wrong, also in the log that it has asked for: runtimes show their
/// users that. Returns the exit code.
pub(in crate::cli) fn refuse_client(
    log: Option<&Path>,
    error: anyhow::Error,
    reply: &mut dyn FnMut(anyhow::Result<Option<HostPid>>),
) -> u8 {
    if let Err(problem) = task_log::start(log, LevelFilter::Warn, Style::Criu) {
        report(&problem);
    }
    report(&error);
    reply(Err(error));
    exit::FAILED
}

/// Returns the parsed options of a request, with those of configuration files: the default ones come
/// before the request, and the one that it names after it.
fn prepare_request(task: Task, requested: Requested) -> anyhow::Result<(TaskWords, Vec<Given>)> {
    let Requested { options, config, operands, .. } = requested;
    let specs = Specs::of(&TaskArgs::augment_args(Command::new("task")));
    let mut all = Sources::of_clients().read(&specs)?;
    for (name, value) in options {
        specs
            .configured(name, value, &mut all)
            .map_err(|why| anyhow::anyhow!("the request's option {name}: {why}"))?;
    }
    if let Some(config) = config {
        Sources::only(config).add(&specs, &mut all)?;
    }
    all.operands = operands;
    if let Some(refusal) = refusal(task, &all.given) {
        bail!(refusal);
    }
    let words = std::iter::once(OsString::from("rcriu")).chain(all.words());
    let command = TaskWords::augment_args(Command::new(task.name()));
    let matches = command.try_get_matches_from(words)?;
    Ok((TaskWords::from_arg_matches(&matches)?, all.given))
}

/// The parsed command.
enum Work {
    Dump(Box<dump::Options>),
    Restore(Box<restore::Options>),
    /// With the directory of the image.
    Cpuinfo(CpuinfoWork, PathBuf),
}

/// Reports an option that is refused.
///
/// # Errors
/// The exit code, if there is one.
fn require_supported(task: Task, given: &[Given]) -> Result<(), ExitCode> {
    let Some(refusal) = refusal(task, given) else { return Ok(()) };
    report(&anyhow::Error::msg(refusal));
    Err(ExitCode::from(exit::FAILED))
}

/// Runs a command and returns the exit code.
pub(in crate::cli) fn run(task: Task, args: &TaskArgs, given: &[Given]) -> ExitCode {
    if let Err(code) = require_supported(task, given) {
        return code;
    }
    let (placed, made) = match place_in_chain(task, args, given) {
        Ok(placed) => placed.map_or((None, None), |(args, made)| (Some(args), Some(made))),
        Err(error) => {
            report(&error);
            return ExitCode::from(exit::FAILED);
        }
    };
    let code = run_placed(task, placed.as_ref().unwrap_or(args), given);
    if let Some(dir) = made {
        // It is empty only if the dump has failed and has no log there.
        let _ = std::fs::remove_dir(dir);
    }
    code
}

/// Makes a directory for the images in that of `--chain`, unless the user names one. Returns the options
/// with it, and the directory.
fn place_in_chain(
    task: Task,
    args: &TaskArgs,
    given: &[Given],
) -> anyhow::Result<Option<(TaskArgs, PathBuf)>> {
    let is_dump = matches!(task, Task::Dump | Task::PreDump);
    let is_named = given.iter().any(|given| given.name == "images-dir");
    let Some(chain) = args.images.chain.as_ref().filter(|_| is_dump && !is_named) else {
        return Ok(None);
    };
    let failed = || format!("make a directory in {} (--chain)", chain.display());
    match std::fs::create_dir(chain) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(failed);
        }
        _ => {}
    }
    let made = dump::new_directory(chain).with_context(failed)?;
    let mut args = args.clone();
    args.images.images_dir = made.clone();
    Ok(Some((args, made)))
}

fn run_placed(task: Task, args: &TaskArgs, given: &[Given]) -> ExitCode {
    let work = match (Work::of(task, args), task) {
        (Some(Ok(work)), _) => work,
        (Some(Err(error)), _) => return usage(error.into()),
        (None, Task::Dedup) => return dedup(args, given),
        (None, _) => return check(args, given),
    };
    close(args);
    match work.carry_out(|| perform(task, &work, (args, given), Style::Own, &mut drop)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            report(&error);
            ExitCode::from(exit::FAILED)
        }
    }
}

fn usage(error: anyhow::Error) -> ExitCode {
    report(&error);
    ExitCode::from(exit::usage())
}

/// Closes the descriptors of `--close`.
fn close(args: &TaskArgs) {
    for fd in &args.around.close {
        // rcriu has opened no files yet, and a number that is not open counts as closed. A file
        // that took the number of a standard stream would receive our messages.
        let _ = nix::unistd::close(*fd);
        if (0..=libc::STDERR_FILENO).contains(fd) {
            let _ = File::options().read(true).write(true).open("/dev/null").map(File::into_raw_fd);
        }
    }
}

/// Freezes the cgroups again that a killed worker has thawed for the dump.
fn freeze_again(supervisor: &Supervisor) {
    for (file, done) in supervisor.freeze_again() {
        let message = match done {
            Ok(()) => {
                let path = file.display();
                format!(
                    "the processes of a frozen cgroup ran for a moment, until {path} froze it again"
                )
            }
            Err(error) => format!("{}: freeze the cgroup again: {error}", file.display()),
        };
        tell(log::Level::Warn, &message);
    }
}

/// Does the work in a process of its own, and returns the exit code.
fn supervised(root: HostPid, work: impl FnOnce() -> u8) -> anyhow::Result<u8> {
    let supervisor = match supervise::split().context("start a process that does the work")? {
        Side::Worker => return Ok(work()),
        Side::Supervisor(supervisor) => supervisor,
    };
    match supervisor.wait().context("wait for the process that does the work")? {
        // The worker has printed the error.
        Ended::Exited(code) => Ok(u8::try_from(code).unwrap_or(exit::FAILED)),
        Ended::Killed(signal) => {
            let what = format!("the process that does the work was killed by {signal}");
            fault::disarm();
            if supervisor.has_doomed() {
                freeze_again(&supervisor);
                bail!("{what}; the snapshot is complete, and the tree has ended");
            }
            file::return_terminal_bytes();
            if let Some(left) = supervisor.leftover_repairs() {
                file::end_repairs(root, &left);
            }
            let repaired = supervisor.leftover().map(inject::repair);
            inject::reap_shadows(supervisor.leftover_shadows());
            // Only now: no thread comes home while it is frozen.
            freeze_again(&supervisor);
            match repaired {
                None => bail!("{what}; the tree runs on unchanged"),
                Some(Ok(Repair::Nothing(_))) => {
                    bail!("{what}; its threads run on unchanged")
                }
                Some(Ok(Repair::Unmapped(pid))) => {
                    bail!("{what}; its scratch memory in process {pid} has been unmapped")
                }
                Some(Ok(Repair::Later(pid))) => bail!(
                    "{what}; process {pid} is stopped, and unmaps its scratch memory when it runs \
                     again\nhelp: kill -CONT {pid}"
                ),
                Some(Err(error)) => Err(anyhow::Error::from(error)
                    .context(format!("{what}; its scratch memory could not be unmapped"))),
            }
        }
    }
}

/// Does the work, calls `reply` with its result, and returns the exit code.
fn perform(
    task: Task,
    work: &Work,
    (args, given): (&TaskArgs, &[Given]),
    style: Style,
    reply: &mut dyn FnMut(anyhow::Result<Option<HostPid>>),
) -> u8 {
    let done = start_log(task, args, given, style).and_then(|()| work.run(&args.operands));
    let code = match &done {
        Ok(_) => exit::OK,
        Err(failure) => {
            report(failure);
            exit::FAILED
        }
    };
    reply(done);
    code
}

/// Starts the log, and logs which options have no effect.
fn start_log(task: Task, args: &TaskArgs, given: &[Given], style: Style) -> anyhow::Result<()> {
    let file = args.output.log_file.as_deref();
    let file = file.map(|file| match file.to_str() {
        Some("-") => file.to_owned(),
        _ => convert::work_dir(&args.images).join(file),
    });
    task_log::start(file.as_deref(), task_log::level(convert::verbosity(args)), style)?;
    for line in without_effect(task, given) {
        info!("{line}");
    }
    Ok(())
}

impl Work {
    /// Returns what a command line asks for; `None` for a task that no client of the service asks for.
    fn of(task: Task, args: &TaskArgs) -> Option<Result<Self, UsageError>> {
        Some(match task {
            Task::Dump => convert::dump_options(args, false).map(Box::new).map(Self::Dump),
            Task::PreDump => convert::dump_options(args, true).map(Box::new).map(Self::Dump),
            Task::Restore => convert::restore_options(args).map(Box::new).map(Self::Restore),
            Task::Cpuinfo => {
                let dir = args.images.images_dir.clone();
                convert::cpuinfo_work(args).map(|work| Self::Cpuinfo(work, dir))
            }
            Task::Check | Task::Dedup | Task::Service | Task::PageServer => return None,
        })
    }

    /// Has `perform` do the work: for a dump in a process of its own.
    fn carry_out(&self, perform: impl FnOnce() -> u8) -> anyhow::Result<u8> {
        match self {
            Self::Dump(options) => supervised(options.root, perform),
            Self::Restore(_) | Self::Cpuinfo(..) => Ok(perform()),
        }
    }

    /// Has a client notified of the stages, has it take the masters of pseudoterminals, and lets it have
    /// dumped the connection to us, of which `own_end` is our end.
    fn with_client(
        mut self,
        client: Option<Arc<dyn Client>>,
        taker: Option<Arc<dyn file::TakeMaster>>,
        own_end: Option<u32>,
    ) -> Self {
        match &mut self {
            Self::Dump(options) => {
                options.actions = options.actions.clone().with_client(client);
                options.files.terminals = options.files.terminals.orphans(taker.is_some());
                options.namespaces.mounts.leave_masters(taker.is_some());
                options.files.unix = options.files.unix.service(own_end);
            }
            Self::Restore(options) => {
                options.actions = options.actions.clone().with_client(client);
                options.files.orphans = file::Orphans::new(taker);
            }
            Self::Cpuinfo(..) => {}
        }
        self
    }

    /// Does the work, and returns the root of a restored tree.
    fn run(&self, command: &[OsString]) -> anyhow::Result<Option<HostPid>> {
        match self {
            Self::Dump(options) => {
                dump::run(options)?;
                Ok(None)
            }
            Self::Cpuinfo(CpuinfoWork::Dump, dir) => {
                let path = dir.join(Kind::Cpuinfo.file_name(0));
                let entry = processor::entry()?;
                let file = output::create(&path, Existing::Replaced)
                    .with_context(|| format!("create {}", path.display()))?;
                let mut image = ImageWriter::new(&path, BufWriter::new(file), Kind::Cpuinfo)?;
                image.message(&entry)?;
                image.finish()?;
                info!("wrote {}", path.display());
                Ok(None)
            }
            Self::Cpuinfo(CpuinfoWork::Check(aspects), dir) => {
                processor::compare(&Directory::at(dir), *aspects)?;
                Ok(None)
            }
            Self::Restore(options) => {
                let root = restore::run(options)?;
                let Some((program, arguments)) = command.split_first() else {
                    return Ok(Some(root));
                };
                let error = std::process::Command::new(program).args(arguments).exec();
                let program = Path::new(program).display();
                Err(error).with_context(|| format!("execute {program}; the tree is restored"))
            }
        }
    }
}

fn dedup(args: &TaskArgs, given: &[Given]) -> ExitCode {
    let work = match convert::dedup_work(args) {
        Ok(work) => work,
        Err(error) => return usage(error.into()),
    };
    close(args);
    if let Err(error) = start_log(Task::Dedup, args, given, Style::Own) {
        report(&error);
        return ExitCode::from(exit::FAILED);
    }
    answer(|out| dedup::run(&work, args.dedup.json, out), exit::FAILED, exit::FAILED)
}

/// Runs the pager of a lazy restore, which has these arguments, and returns its exit code.
pub(in crate::cli) fn pager(arguments: &[OsString]) -> ExitCode {
    lazy::pager::main(arguments, |log| {
        if let Err(error) = task_log::start_continued(log.file.as_deref(), log.level) {
            report(&error);
        }
    })
}

/// The options of the service.
#[derive(Clone, Debug)]
pub(in crate::cli) struct ServiceOptions {
    /// The name of its socket, unless it is the usual one.
    pub address: Option<PathBuf>,
    /// The file for its pid.
    pub pidfile: Option<PathBuf>,
    /// Whether it runs in the background.
    pub daemon: bool,
    /// The directory of relative paths.
    pub work_dir: PathBuf,
    /// The descriptor that is told when it waits for clients.
    pub status_fd: Option<i32>,
}

/// Returns the options of the service.
///
/// # Errors
/// The exit code, if the command line is wrong.
pub(in crate::cli) fn service_options(
    args: &TaskArgs,
    given: &[Given],
) -> Result<ServiceOptions, ExitCode> {
    require_supported(Task::Service, given)?;
    convert::check_operands(args, false).map_err(|error| usage(error.into()))?;
    close(args);
    Ok(ServiceOptions {
        address: args.server.address.as_ref().map(PathBuf::from),
        pidfile: args.tree.pidfile.clone(),
        daemon: args.tree.restore_detached,
        work_dir: convert::work_dir(&args.images),
        status_fd: args.server.status_fd,
    })
}

/// The options of the command `page-server`.
#[derive(Clone, Debug)]
pub(in crate::cli) struct PageServerOptions {
    /// Those of the server itself.
    pub server: page_server::Options,
    /// The file for its pid.
    pub pidfile: Option<PathBuf>,
    /// Whether it runs in the background.
    pub daemon: bool,
    /// The descriptor that is told when it waits for the client.
    pub status_fd: Option<i32>,
}

/// Returns the options of the command `page-server`.
///
/// # Errors
/// The exit code, if the command line is wrong.
pub(in crate::cli) fn page_server_options(
    args: &TaskArgs,
    given: &[Given],
) -> Result<PageServerOptions, ExitCode> {
    require_supported(Task::PageServer, given)?;
    let server = convert::page_server_options(args).map_err(|error| usage(error.into()))?;
    close(args);
    let pidfile = args.tree.pidfile.as_ref();
    Ok(PageServerOptions {
        server,
        pidfile: pidfile.map(|file| convert::work_dir(&args.images).join(file)),
        daemon: args.tree.restore_detached,
        status_fd: args.server.status_fd,
    })
}

/// Returns the options of a page server that a client of the service asks for, and starts its log.
pub(in crate::cli) fn page_server_for_client(
    requested: Requested,
) -> anyhow::Result<page_server::Options> {
    let (args, given) = prepare_request(Task::PageServer, requested)?;
    let options = convert::page_server_options(&args)?;
    start_log(Task::PageServer, &args, &given, Style::Criu)?;
    Ok(options)
}

/// Starts the log of a server.
pub(in crate::cli) fn start_server_log(
    task: Task,
    args: &TaskArgs,
    given: &[Given],
) -> anyhow::Result<()> {
    start_log(task, args, given, Style::Own)
}

fn check(args: &TaskArgs, given: &[Given]) -> ExitCode {
    if let Err(error) = convert::check_operands(args, false) {
        return usage(error.into());
    }
    close(args);
    let started = check_directories(&args.images)
        .and_then(|()| start_log(Task::Check, args, given, Style::Own));
    if let Err(error) = started {
        report(&error);
        return ExitCode::from(exit::FAILED);
    }
    let wanted = check_features::Wanted {
        extra: args.check.extra || args.check.all,
        experimental: args.check.experimental || args.check.all,
        names: args.check.feature.clone(),
    };
    answer(|out| check_features::run(&wanted, out), exit::FAILED, exit::FAILED)
}

/// Fails as a dump or restore would with these directories.
fn check_directories(images: &ImageArgs) -> anyhow::Result<()> {
    let work = images.work_dir.as_ref().map(|dir| ("work", dir));
    for (what, dir) in std::iter::once(("images", &images.images_dir)).chain(work) {
        let found = std::fs::metadata(dir).and_then(|found| {
            if found.is_dir() { Ok(()) } else { Err(std::io::ErrorKind::NotADirectory.into()) }
        });
        found.with_context(|| format!("{what} directory {}", dir.display()))?;
    }
    Ok(())
}
