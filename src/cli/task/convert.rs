//! Converts the command line into the options of dump, restore and dedup.

use std::{
    io::Read,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags},
    unistd::{AccessFlags, faccessat},
};

use super::{
    log,
    options::{
        AutoDedupName, CpuCap, DedupArgs, FileValidation, ImageArgs, Inodes, ManageCgroups,
        NetworkLock, TaskArgs, TrackerName, TreeArgs, Verbosity,
    },
};
use crate::{
    action,
    cli::dedup::Work,
    dedup, dump,
    inject::{FreezeOptions, Outcome},
    lazy, page_server,
    pages::{ServerOptions, ServerPlace, tls::TlsOptions},
    res::{
        file::{
            Connections, ConnectionsToDump, ConnectionsToRestore, DumpOptions, External,
            GhostOptions, Inherited, LockOptions, Orphans, PacketLock, RestoreOptions,
            TerminalOptions, UnixOptions, Validation, WatchOptions,
        },
        ns::{self, join, mnt, net},
        thread::{self, ProfileError},
        tree::{
            self, cgroup,
            processor::{self, Aspects},
            session,
        },
    },
    restore,
    step::stats,
    track::{self, Tracker},
    units::HostPid,
};

/// The log of the pager of a detached tree, in the work directory.
const PAGER_LOG: &str = "pager.log";

/// Errors of a command line as a whole.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum UsageError {
    #[error("no process given\nhelp: use -t PID")]
    NoPid,
    #[error("--live needs --leave-running: the tree runs on while its memory is copied")]
    LiveEnding,
    #[error("too many words: {}", .0.to_string_lossy())]
    Operand(std::ffi::OsString),
    #[error("--exec-cmd is for restore")]
    ExecNotRestoring,
    #[error("--exec-cmd needs a command\nhelp: rcriu restore --exec-cmd -- COMMAND [ARGUMENT...]")]
    NoCommand,
    #[error("--exec-cmd cannot be used with --restore-detached: the command is the parent")]
    ExecDetached,
    #[error("--restore-sibling needs --restore-detached")]
    SiblingNotDetached,
    #[error("--inherit-fd is for restore")]
    InheritNotRestoring,
    #[error(
        "cpuinfo needs an action, dump or check{}",
        .0.as_ref().map_or(String::new(), |word| format!(", not {}", word.to_string_lossy()))
    )]
    CpuinfoAction(Option<std::ffi::OsString>),
    #[error("--lsm-profile")]
    Profile(#[from] ProfileError),
    #[error("--join-ns")]
    Join(#[from] join::JoinError),
    #[error("--empty-ns net cannot be used with --join-ns net: the namespace is not made")]
    EmptyJoined,
    #[error("{0}")]
    Properties(String, #[source] cgroup::SelectionError),
    #[error("read {path}: {problem}", path = .path.display())]
    PropertiesFile { path: PathBuf, problem: String },
    #[error(
        "--lazy cannot be used with --auto-dedup: the pager needs the pages until all are there\n\
         help: free them afterwards, with `rcriu dedup` or by removing the images"
    )]
    LazyFreeing,
    #[error("--record needs --lazy")]
    RecordNotLazy,
    #[error("--keep-originals is for --link")]
    KeepNotLinking,
    #[error("no page server given\nhelp: use --address ADDRESS and --port PORT, or --ps-socket FD")]
    NoServer,
    #[error(
        "--chain cannot be used with --page-server, which has the parent\nhelp: use --prev-images-dir here \
         and there"
    )]
    ChainAtServer,
    #[error("--ps-socket cannot be used with --daemon, which closes the socket")]
    SocketDetached,
}

/// The level of messages: 0 for none, 1 for errors, 2 for warnings, and so on.
pub(super) fn verbosity(args: &TaskArgs) -> u8 {
    /// Errors and warnings, as with CRIU.
    const DEFAULT: u8 = 2;
    args.output.verbosity.iter().fold(DEFAULT, |level, step| match step {
        Verbosity::More(levels) => level.saturating_add(*levels),
        Verbosity::Level(level) => *level,
    })
}

/// Returns the directory for log, statistics and pid file: the work directory if the user gave
/// one, otherwise the image directory, or the current one if rcriu cannot write there.
pub(super) fn work_dir(args: &ImageArgs) -> PathBuf {
    args.work_dir.clone().unwrap_or_else(|| default_work_dir(&args.images_dir))
}

fn default_work_dir(images_dir: &Path) -> PathBuf {
    let flags = AccessFlags::W_OK | AccessFlags::X_OK;
    match faccessat(AT_FDCWD, images_dir, flags, AtFlags::AT_EACCESS) {
        // Pages can be freed in such a mount, but files cannot be created.
        Ok(()) if frees_pages(images_dir) => PathBuf::from("."),
        Err(Errno::EROFS | Errno::EACCES | Errno::EPERM) => PathBuf::from("."),
        // The code that opens the directory reports other errors.
        Ok(()) | Err(_) => images_dir.to_owned(),
    }
}

/// Whether a directory is the root of a mount that frees pages.
fn frees_pages(dir: &Path) -> bool {
    crate::sys::xattr::get(dir, crate::chain::PUNCH_XATTR).is_ok()
}

/// Returns the options of a dump or pre-dump.
pub(super) fn dump_options(args: &TaskArgs, pre_dump: bool) -> Result<dump::Options, UsageError> {
    check_operands(args, false)?;
    if !args.around.inherit_fd.is_empty() {
        return Err(UsageError::InheritNotRestoring);
    }
    let goal = match args.tree {
        _ if pre_dump => dump::Goal::Memory,
        TreeArgs { leave_running: true, .. } => dump::Goal::Tree(Outcome::Run),
        TreeArgs { leave_stopped: true, .. } => dump::Goal::Tree(Outcome::Stop),
        _ => dump::Goal::Tree(Outcome::Kill),
    };
    let live = args.memory.live && !pre_dump;
    if live && goal != dump::Goal::Tree(Outcome::Run) {
        return Err(UsageError::LiveEnding);
    }
    Ok(dump::Options {
        root: HostPid(args.tree.tree.ok_or(UsageError::NoPid)?),
        goal,
        store: dump::Store {
            images_dir: args.images.images_dir.clone(),
            parent: args.images.prev_images_dir.clone(),
            chain: args.images.chain.clone(),
            free_parent: args.memory.auto_dedup.is_some(),
            server: server(args)?,
        },
        freeze: FreezeOptions::new(args.tree.timeout),
        common: tree::DumpOptions {
            sessions: session::Options::new(args.tree.shell_job),
            cgroups: cgroups(args)?,
            processor: processor(args),
        },
        namespaces: namespaces(args)?,
        files: DumpOptions {
            terminals: TerminalOptions::new(args.tree.shell_job),
            unix: unix(args),
            connections: connections(args, goal),
            ghosts: GhostOptions::new(args.files.link_remap, args.files.ghost_limit),
            locks: LockOptions::new(args.files.file_locks),
            watches: WatchOptions::new(args.files.force_irmap, args.files.irmap_scan_path.clone()),
            validation: validation(args),
            external: External::new(external(args)),
        },
        track: track(args),
        live: live.then(|| dump::LiveOptions::new(args.memory.live_stopped)),
        actions: actions(args),
        stats: stats(args),
    })
}

/// Returns where the page server is, if the user wants one.
fn server(args: &TaskArgs) -> Result<Option<ServerOptions>, UsageError> {
    let server = &args.server;
    if !server.page_server {
        return Ok(None);
    }
    if args.images.chain.is_some() {
        return Err(UsageError::ChainAtServer);
    }
    let place = match (server.ps_socket, &server.address, server.port) {
        (Some(fd), _, _) => ServerPlace::Socket(fd),
        (None, Some(address), Some(port)) => ServerPlace::Address(address.clone(), port),
        _ => return Err(UsageError::NoServer),
    };
    Ok(Some(ServerOptions { place, tls: tls(args) }))
}

/// Returns how to encrypt the connection between a dump and a page server, if that is wanted.
fn tls(args: &TaskArgs) -> Option<TlsOptions> {
    let server = &args.server;
    server.tls.then(|| TlsOptions {
        cacert: server.tls_cacert.clone(),
        cacrl: server.tls_cacrl.clone(),
        cert: server.tls_cert.clone(),
        key: server.tls_key.clone(),
        any_name: server.tls_no_cn_verify,
    })
}

/// Returns the options of a page server.
pub(super) fn page_server_options(args: &TaskArgs) -> Result<page_server::Options, UsageError> {
    check_operands(args, false)?;
    let server = &args.server;
    let client = match server.ps_socket {
        Some(_) if args.tree.restore_detached => return Err(UsageError::SocketDetached),
        Some(fd) => page_server::Place::Socket(fd),
        None => {
            let address = server.address.as_deref().unwrap_or(page_server::EVERYWHERE);
            page_server::Place::Address(address.to_owned(), server.port.unwrap_or(0))
        }
    };
    Ok(page_server::Options {
        images_dir: args.images.images_dir.clone(),
        parent: args.images.prev_images_dir.clone(),
        client,
        tls: tls(args),
    })
}

fn processor(args: &TaskArgs) -> processor::Options {
    processor::Options::new(args.machine.cpu_cap.and_then(|cap| cap.0))
}

/// Returns the properties of cgroups that the user chooses.
fn selection(args: &TaskArgs) -> Result<cgroup::Selection, UsageError> {
    let mut selection = cgroup::Selection::default();
    if let Some(text) = &args.cgroups.cgroup_props {
        let wrong = |error| UsageError::Properties("--cgroup-props".to_owned(), error);
        selection.add(text).map_err(wrong)?;
    }
    if let Some(path) = &args.cgroups.cgroup_props_file {
        let mut text = String::new();
        let file = std::fs::File::open(path);
        let read = file.and_then(|file| file.take(cgroup::MOST_BYTES).read_to_string(&mut text));
        let failed = |error: std::io::Error| UsageError::PropertiesFile {
            path: path.clone(),
            problem: error.to_string(),
        };
        read.map_err(failed)?;
        let wrong = |error| UsageError::Properties(path.display().to_string(), error);
        selection.add(&text).map_err(wrong)?;
    }
    Ok(selection)
}

fn cgroups(args: &TaskArgs) -> Result<cgroup::Options, UsageError> {
    let mode = match args.cgroups.manage_cgroups.unwrap_or(ManageCgroups::None) {
        ManageCgroups::Ignore => cgroup::Mode::Ignore,
        ManageCgroups::None => cgroup::Mode::None,
        ManageCgroups::Props => cgroup::Mode::Props,
        ManageCgroups::Soft => cgroup::Mode::Soft,
        ManageCgroups::Full => cgroup::Mode::Full,
        ManageCgroups::Strict => cgroup::Mode::Strict,
    };
    let root = |text: &String| match text.split_once(':') {
        Some((controller, path)) if !controller.contains('/') => {
            (Some(controller.to_owned()), path.to_owned())
        }
        _ => (None, text.clone()),
    };
    Ok(cgroup::Options::new(mode)
        .roots(args.cgroups.cgroup_root.iter().map(root).collect())
        .controllers(args.cgroups.cgroup_dump_controller.clone())
        .selection(selection(args)?)
        .yard(args.cgroups.cgroup_yard.clone()))
}

fn namespaces(args: &TaskArgs) -> Result<ns::Options, UsageError> {
    let given = &args.namespaces;
    let mounts = mnt::Options::new(&args.around.external, args.tree.root.clone())
        .map(&given.ext_mount_map)
        .select(given.skip_mnt.clone(), &given.enable_fs)
        .relate(given.enable_external_sharing, given.enable_external_masters);
    let inherited = Inherited::new(args.around.inherit_fd.clone());
    let network = net::Options::new(external(args), inherited).empty(!given.empty_ns.is_empty());
    let join = join::Options::new(&given.join_ns)?;
    if !given.empty_ns.is_empty() && join.has("net") {
        return Err(UsageError::EmptyJoined);
    }
    Ok(ns::Options { mounts, network, join })
}

fn unix(args: &TaskArgs) -> UnixOptions {
    UnixOptions::new(!args.network.ext_unix_sk.is_empty())
        .skip_in_flight(args.network.skip_in_flight)
}

fn connections(args: &TaskArgs, goal: dump::Goal) -> ConnectionsToDump {
    let ends = goal == dump::Goal::Tree(Outcome::Kill);
    let method = match args.network.network_lock {
        Some(NetworkLock::Skip) => None,
        Some(NetworkLock::Iptables) => Some(PacketLock::Iptables),
        Some(NetworkLock::Nftables) | None => Some(PacketLock::Nftables),
    };
    let wanted = wanted_connections(args);
    let method = method.filter(|_| wanted == Connections::Keep && ends);
    ConnectionsToDump::new(wanted, method, args.network.skip_in_flight)
}

/// Returns how to treat TCP connections. As with CRIU, `--tcp-close` wins over
/// `--tcp-established`.
fn wanted_connections(args: &TaskArgs) -> Connections {
    if args.network.tcp_close {
        Connections::Close
    } else if args.network.tcp_established {
        Connections::Keep
    } else {
        Connections::Refuse
    }
}

fn actions(args: &TaskArgs) -> action::Options {
    action::Options::new(args.tree.action_script.clone())
}

fn stats(args: &TaskArgs) -> stats::Options {
    stats::Options::new(work_dir(&args.images), args.output.display_stats)
}

fn track(args: &TaskArgs) -> track::Options {
    let tracker = args.memory.tracker.map(|tracker| match tracker {
        TrackerName::Wp => Tracker::Wp,
        TrackerName::SoftDirty => Tracker::SoftDirty,
        TrackerName::None => Tracker::None,
    });
    track::Options::new(args.memory.track_mem, tracker)
}

fn validation(args: &TaskArgs) -> Validation {
    match args.files.file_validation {
        Some(FileValidation::Filesize) => Validation::FileSize,
        Some(FileValidation::Buildid) | None => Validation::BuildId,
    }
}

/// Returns the options of a restore.
pub(super) fn restore_options(args: &TaskArgs) -> Result<restore::Options, UsageError> {
    check_operands(args, true)?;
    if args.tree.restore_sibling && !args.tree.restore_detached {
        return Err(UsageError::SiblingNotDetached);
    }
    if args.memory.record.is_some() && !args.memory.lazy {
        return Err(UsageError::RecordNotLazy);
    }
    if args.memory.lazy && args.memory.auto_dedup.is_some() {
        return Err(UsageError::LazyFreeing);
    }
    args.machine.lsm_profile.as_deref().map_or(Ok(()), thread::check_profile)?;
    let pidfile = args.tree.pidfile.as_ref();
    // A pager of a detached tree must not keep the caller's streams open.
    let is_watched = !args.tree.restore_detached && !args.tree.exec_cmd;
    let pager_log = (!is_watched).then(|| work_dir(&args.images).join(PAGER_LOG));
    let pager_log = lazy::Log { file: pager_log, level: log::level(verbosity(args)) };
    let record = args.memory.record.as_ref().map(|file| work_dir(&args.images).join(file));
    let lazy = args.memory.lazy.then_some(lazy::Options { log: pager_log, record });
    Ok(restore::Options {
        store: restore::Store {
            images_dir: args.images.images_dir.clone(),
            free: args.memory.auto_dedup.map(|when| match when {
                AutoDedupName::Commit => restore::AutoDedup::Commit,
                AutoDedupName::Now => restore::AutoDedup::Now,
            }),
        },
        relations: restore::Relations {
            shell_job: args.tree.shell_job,
            sibling: args.tree.restore_sibling,
        },
        release: restore::Release {
            stopped: args.tree.leave_stopped,
            then: match args.tree {
                TreeArgs { restore_detached: true, .. } => restore::Then::Exit,
                TreeArgs { exec_cmd: true, .. } => restore::Then::Execute,
                _ => restore::Then::Wait,
            },
            pidfile: pidfile.map(|file| work_dir(&args.images).join(file)),
        },
        common: tree::RestoreOptions { cgroups: cgroups(args)?, processor: processor(args) },
        namespaces: namespaces(args)?,
        files: RestoreOptions {
            terminals: TerminalOptions::new(args.tree.shell_job),
            orphans: Orphans::default(),
            unix: unix(args),
            connections: ConnectionsToRestore::new(wanted_connections(args)),
            validation: validation(args),
            inherited: Inherited::new(args.around.inherit_fd.clone()),
        },
        lazy,
        track: track(args),
        actions: actions(args),
        stats: stats(args),
    })
}

/// Returns the options of a deduplication.
pub(super) fn dedup_work(args: &TaskArgs) -> Result<Work, UsageError> {
    if args.tree.exec_cmd {
        return Err(UsageError::ExecNotRestoring);
    }
    let DedupArgs { link, keep_originals, rewrite, reflink, .. } = args.dedup;
    if link {
        let dirs = args.operands.iter().map(PathBuf::from).collect();
        return Ok(Work::Link(dedup::LinkOptions { dirs, keep_originals }));
    }
    if keep_originals {
        return Err(UsageError::KeepNotLinking);
    }
    check_operands(args, false)?;
    let dir = args.images.images_dir.clone();
    Ok(if reflink { Work::Reflink(dir) } else { Work::Free(dedup::FreeOptions { dir, rewrite }) })
}

/// What `cpuinfo` is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CpuinfoWork {
    /// Writes the image.
    Dump,
    /// Compares the processor with the image.
    Check(Aspects),
}

/// Returns what `cpuinfo` is to do. All aspects are compared, unless the user has said which.
pub(super) fn cpuinfo_work(args: &TaskArgs) -> Result<CpuinfoWork, UsageError> {
    const ALL: Aspects = Aspects { registers: true, instructions: true, everything: true };
    const USUAL: Aspects = Aspects { everything: false, ..ALL };
    if args.tree.exec_cmd {
        return Err(UsageError::ExecNotRestoring);
    }
    match args.operands.as_slice() {
        [word] if word == "dump" => Ok(CpuinfoWork::Dump),
        [word] if word == "check" => Ok(CpuinfoWork::Check(match args.machine.cpu_cap {
            None => USUAL,
            Some(CpuCap(None)) => ALL,
            Some(CpuCap(Some(aspects))) => aspects,
        })),
        [word] => Err(UsageError::CpuinfoAction(Some(word.clone()))),
        [] => Err(UsageError::CpuinfoAction(None)),
        [_, word, ..] => Err(UsageError::Operand(word.clone())),
    }
}

/// Checks the operands, and the option that takes them.
pub(super) fn check_operands(args: &TaskArgs, restoring: bool) -> Result<(), UsageError> {
    match (args.tree.exec_cmd, args.operands.first()) {
        (false, None) => Ok(()),
        (false, Some(word)) => Err(UsageError::Operand(word.clone())),
        (true, _) if !restoring => Err(UsageError::ExecNotRestoring),
        (true, None) => Err(UsageError::NoCommand),
        (true, Some(_)) if args.tree.restore_detached => Err(UsageError::ExecDetached),
        (true, Some(_)) => Ok(()),
    }
}

/// Returns the external resources, including the sockets of `--ext-unix-sk`.
fn external(args: &TaskArgs) -> Vec<String> {
    let sockets = args.network.ext_unix_sk.iter().flat_map(|Inodes(numbers)| numbers);
    let sockets = sockets.map(|number| format!("unix[{number}]"));
    // An older form of --external veth[IN]:OUT.
    let pairs = args.namespaces.veth_pair.iter().map(|pair| match pair.split_once('=') {
        Some((inside, outside)) => format!("veth[{inside}]:{outside}"),
        None => format!("veth[{pair}]"),
    });
    args.around.external.iter().cloned().chain(sockets).chain(pairs).collect()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use nix::unistd::geteuid;

    use super::*;

    #[test]
    fn what_cannot_be_written_is_replaced_by_the_current_directory() {
        let here = Path::new(".");
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(default_work_dir(dir.path()), dir.path());
        let absent = dir.path().join("absent");
        assert_eq!(default_work_dir(&absent), absent);
        // No process can write here.
        assert_eq!(default_work_dir(Path::new("/proc/self")), here);
        if !geteuid().is_root() {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o555)).unwrap();
            assert_eq!(default_work_dir(dir.path()), here);
        }
    }
}
