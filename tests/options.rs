//! Every option of every command is run once for real, and its effect looked at.
//!
//! clap lists the options. One that works and has no row here is an error, so that no
//! option is added without a test. Options that are refused, have no effect, or are not for
//! a command have to say so when they are given.
//!
//! A row is run in a process tree, or on a chain, of its own.

mod common;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{FileExt, FileTypeExt},
            net::{UnixDatagram, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use clap::{Arg, CommandFactory};
use common::{
    Cap,
    chain::TestChain,
    dumps::three,
    is_mounted,
    live::{Live, Shell, directory, state_of, wait_for},
    mounted::IMGFS,
    page_server::Server,
    require, stored_bytes,
};
use nix::{
    fcntl::{FcntlArg, FdFlag},
    sys::{
        signal::{Signal, kill},
        wait::WaitPidFlag,
    },
    unistd::Pid,
};
use rcriu::{
    cli::{imgfs::Imgfs, rcriu::Rcriu},
    image::{self, MemoryId, Presence, proto, read_all},
    pages::wire::Command as Message,
};

/// The program under test.
const RCRIU: &str = env!("CARGO_BIN_EXE_rcriu");

/// Commands with CRIU's options.
const TASKS: [&str; 8] =
    ["dump", "pre-dump", "restore", "check", "dedup", "cpuinfo", "service", "page-server"];

/// What a command is run with, and what its option is to do there.
type Check = fn(command: &str);

/// Commands, their options, and what is looked at.
type Row = (&'static [&'static str], &'static [(&'static str, Check)]);

const ROWS: &[Row] = &[
    (
        &["dump", "pre-dump"],
        &[
            ("tree", tree),
            ("shell-job", shell_job),
            ("timeout", timeout),
            ("action-script", action_script),
            ("prev-images-dir", prev_images_dir),
            ("chain", chain),
            ("cgroup-dump-controller", cgroup_dump_controller),
            ("track-mem", track_mem),
            ("tracker", tracker),
            ("auto-dedup", auto_dedup),
            ("page-server", to_page_server),
            ("address", to_page_server),
            ("port", to_page_server),
            ("ps-socket", to_socket),
            ("tls", encrypted),
            ("tls-cacert", encrypted),
            ("tls-cacrl", encrypted),
            ("tls-cert", encrypted),
            ("tls-key", encrypted),
            ("tls-no-cn-verify", encrypted),
        ],
    ),
    (
        &["dump"],
        &[
            ("leave-running", leave_running),
            ("leave-stopped", leave_stopped),
            ("live", live),
            ("live-stopped", live_stopped),
            ("link-remap", link_remap),
            ("ghost-limit", ghost_limit),
            ("file-locks", file_locks),
            ("force-irmap", force_irmap),
            ("irmap-scan-path", irmap_scan_path),
            ("ext-unix-sk", ext_unix_sk),
            ("skip-in-flight", skip_in_flight),
            ("tcp-established", tcp_established),
            ("tcp-close", tcp_close),
            ("network-lock", network_lock),
            ("external", external),
            ("empty-ns", empty_ns),
            ("file-validation", file_validation),
            ("skip-mnt", skip_mnt),
            ("enable-fs", enable_fs),
            ("ext-mount-map", ext_mount_map),
            ("enable-external-sharing", enable_external_relations),
            ("enable-external-masters", enable_external_relations),
        ],
    ),
    (
        &["dump", "restore"],
        &[
            ("cgroup-props", cgroup_props),
            ("cgroup-props-file", cgroup_props_file),
            ("cgroup-yard", cgroup_yard),
        ],
    ),
    (
        &["restore"],
        &[
            ("restore-detached", restore_detached),
            ("restore-sibling", restore_sibling),
            ("leave-stopped", restored_stopped),
            ("shell-job", restored_shell_job),
            ("exec-cmd", exec_cmd),
            ("pidfile", pidfile),
            ("action-script", restored_action_script),
            ("track-mem", restored_track_mem),
            ("tracker", restored_tracker),
            ("auto-dedup", restored_auto_dedup),
            ("lazy", restored_lazy),
            ("record", restored_record),
            ("ext-unix-sk", ext_unix_sk),
            ("tcp-established", tcp_established),
            ("tcp-close", tcp_close),
            ("inherit-fd", inherit_fd),
            ("empty-ns", empty_ns),
            ("file-validation", restored_file_validation),
            ("root", root),
            ("join-ns", join_ns),
            ("lsm-profile", lsm_profile),
            ("veth-pair", veth_pair),
            ("external", restored_external),
            ("skip-mnt", restored_skip_mnt),
            ("ext-mount-map", ext_mount_map),
            ("enable-external-sharing", enable_external_relations),
            ("enable-external-masters", enable_external_relations),
        ],
    ),
    (
        &["dump", "pre-dump", "restore"],
        &[
            ("display-stats", display_stats),
            ("manage-cgroups", manage_cgroups),
            ("cgroup-root", cgroup_root),
        ],
    ),
    (&["dump", "restore"], &[("cpu-cap", cpu_cap)]),
    (&["cpuinfo"], &[("cpu-cap", compared)]),
    (
        &["dump", "pre-dump", "restore", "check", "dedup", "cpuinfo", "service", "page-server"],
        &[
            ("images-dir", images_dir),
            ("work-dir", work_dir),
            ("log-file", log_file),
            ("verbosity", verbosity),
            ("close", close),
            ("config", config),
            ("no-default-config", no_default_config),
        ],
    ),
    (
        &["check"],
        &[
            ("extra", feature_sets),
            ("experimental", feature_sets),
            ("all", feature_sets),
            ("feature", feature),
        ],
    ),
    (
        &["dedup"],
        &[
            ("link", link),
            ("keep-originals", keep_originals),
            ("rewrite", rewrite),
            ("reflink", reflink),
            ("json", dedup_json),
        ],
    ),
    (&["show"], &[("pretty", pretty), ("verbose", says_no_less)]),
    (
        &["service"],
        &[
            ("address", service),
            ("pidfile", service),
            ("restore-detached", service),
            ("status-fd", service_status),
        ],
    ),
    (
        &["page-server"],
        &[
            ("address", page_server_listens),
            ("port", page_server_listens),
            ("ps-socket", page_server_socket),
            ("prev-images-dir", page_server_parent),
            ("pidfile", page_server_status),
            ("restore-detached", page_server_status),
            ("status-fd", page_server_status),
            ("tls", encrypted),
            ("tls-cacert", encrypted),
            ("tls-cacrl", encrypted),
            ("tls-cert", encrypted),
            ("tls-key", encrypted),
        ],
    ),
    (&["ls"], &[("duplicates", duplicates), ("json", json)]),
    (&["imgfs check"], &[("json", json)]),
    (&["diff"], &[("json", json), ("quiet", quiet)]),
    (&["flatten"], &[("snapshot", flatten_snapshot), ("archive", flatten_archive)]),
    (&["flatten", "pack"], &[("force", force)]),
    (&["pack"], &[("snapshot", pack_snapshot)]),
    (&["ps", "fds", "maps", "info"], &[("json", json), ("snapshot", look_snapshot)]),
    (
        &[
            "ls",
            "imgfs check",
            "diff",
            "flatten",
            "pack",
            "ps",
            "fds",
            "maps",
            "info",
            "cat",
            "get",
            "map",
            "mount",
        ],
        &[("previous", previous), ("cache-dir", cache_dir), ("cache-limit", cache_limit)],
    ),
    (&["mounts"], &[("json", json)]),
    (
        &["map"],
        &[
            ("json", json),
            ("snapshot", map_parts),
            ("pid", map_parts),
            ("shmem", map_parts),
            ("all", map_all),
            ("twice", map_twice),
            ("output", map_output),
            ("color", map_color),
            ("width", map_width),
        ],
    ),
    (&["cat", "get"], &[("snapshot", look_snapshot)]),
    (
        &["mount"],
        &[
            ("snapshot", mount_snapshot),
            ("punch", mount_punch),
            ("foreground", mount_foreground),
            ("allow-other", mount_allow_other),
            ("mapped-files", mount_mapped_files),
            ("threads", mount_threads),
            ("compose", mount_compose),
            ("compose-dir", mount_compose_dir),
            ("log-file", mount_log_file),
            ("quiet", mount_quiet),
            ("without", mount_without),
            ("o", mount_options),
        ],
    ),
    (&["umount"], &[("lazy", lazy)]),
    (&["imgfs"], &[("verbose", says_no_less)]),
];

// What clap knows.

/// What is said of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Built,
    WithoutEffect,
    Refused,
    /// Another command's.
    Foreign,
}

impl Kind {
    fn of(arg: &Arg) -> Self {
        match arg.get_help_heading() {
            _ if arg.is_hide_set() => Self::Foreign,
            Some("Accepted, without effect") => Self::WithoutEffect,
            Some("Known, refused for now") => Self::Refused,
            _ => Self::Built,
        }
    }
}

/// An option of a command.
#[derive(Debug)]
struct Opt {
    command: String,
    name: String,
    kind: Kind,
    /// As it is given, with a value if it takes one.
    words: Vec<String>,
}

fn opt(command: &str, arg: &Arg) -> Option<Opt> {
    let name = arg.get_long().map(str::to_owned);
    let name = name.or_else(|| arg.get_short().map(String::from))?;
    if ["help", "version"].contains(&name.as_str()) {
        return None;
    }
    let values = arg.get_possible_values();
    let value = match name.as_str() {
        "inherit-fd" => "fd[0]:key",
        "empty-ns" => "net",
        "cpu-cap" => "ins",
        "cgroup-props" => PROPERTIES,
        "cgroup-props-file" => "/dev/null",
        "ext-unix-sk" => "7",
        // The first ones that mean something are refused.
        _ if !values.is_empty() => values[0].get_name(),
        _ => "1",
    };
    let dashed = if name.len() == 1 { format!("-{name}") } else { format!("--{name}") };
    let words = if !arg.get_action().takes_values() {
        vec![dashed]
    } else if arg.is_require_equals_set() {
        vec![format!("{dashed}={value}")]
    } else {
        vec![dashed, value.to_owned()]
    };
    Some(Opt { command: command.to_owned(), name, kind: Kind::of(arg), words })
}

/// All options of both programs. `check` of imgfs is told from that of rcriu by its
/// program's name.
fn all() -> Vec<Opt> {
    let mut found = Vec::new();
    for (program, mut command) in [("rcriu", Rcriu::command()), ("imgfs", Imgfs::command())] {
        command.build();
        found.extend(command.get_arguments().filter_map(|arg| opt(program, arg)));
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
            let name = match (program, sub.get_name()) {
                ("imgfs", "check") => "imgfs check",
                (_, name) => name,
            };
            let args = sub.get_arguments().filter(|arg| !arg.is_positional());
            // Options of the program as a whole were seen.
            let own = args.filter(|arg| program == "rcriu" || !arg.is_global_set());
            found.extend(own.filter_map(|arg| opt(name, arg)));
        }
    }
    found
}

fn row(command: &str, name: &str) -> Option<Check> {
    let rows = ROWS.iter().filter(|(commands, _)| commands.contains(&command));
    rows.flat_map(|(_, options)| *options).find(|(option, _)| *option == name).map(|(_, run)| *run)
}

#[test]
fn every_option_that_is_built_has_a_row() {
    let missing: Vec<_> = all()
        .into_iter()
        .filter(|opt| opt.kind == Kind::Built && row(&opt.command, &opt.name).is_none())
        .map(|opt| format!("{} --{}", opt.command, opt.name))
        .collect();
    assert!(missing.is_empty(), "no test looks at what these do: {}", missing.join(", "));
    let names: BTreeSet<_> = all().into_iter().map(|opt| (opt.command, opt.name)).collect();
    for (commands, options) in ROWS {
        for (command, (name, _)) in
            commands.iter().flat_map(|command| options.iter().map(move |option| (command, option)))
        {
            assert!(
                names.contains(&((*command).to_owned(), (*name).to_owned())),
                "{command} {name}"
            );
        }
    }
}

/// What is refused is refused by name before anything is looked at, and so is what is
/// another command's.
#[test]
fn what_a_command_does_not_do_is_refused_by_name() {
    let dir = directory();
    for opt in all().iter().filter(|opt| TASKS.contains(&&*opt.command)) {
        let why = match opt.kind {
            Kind::Foreign => {
                format!("--{} is not an option of {}\n  help: ", opt.name, opt.command)
            }
            Kind::Refused => "is not supported yet\n  help: ".to_owned(),
            Kind::Built | Kind::WithoutEffect => continue,
        };
        let mut command = Command::new(RCRIU);
        command.args([opt.command.as_str(), "--no-default-config"]).args(&opt.words);
        let output = command.current_dir(dir.path()).output().unwrap();
        let text = said(&output);
        assert!(!output.status.success(), "{command:?}");
        assert!(
            text.contains(&why) && text.contains(&format!("--{}", opt.name)),
            "{command:?}: {text}"
        );
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was written");
}

/// What has no effect does no harm and says why.
#[test]
fn privileged_what_has_no_effect_says_so() {
    let mut run = Run::new();
    for opt in all().iter().filter(|opt| opt.kind == Kind::WithoutEffect) {
        let words: Vec<_> = opt.words.iter().map(String::as_str).collect();
        let output = match opt.command.as_str() {
            "dump" | "pre-dump" => {
                run.dump(&opt.command, &[&["-v3", "-o", "-"], &words[..]].concat())
            }
            "restore" => {
                let mut run = Run::new();
                run.restorable();
                run.restore(&[&["-v3", "-o", "-"], &words[..]].concat())
            }
            command => {
                let dir = directory();
                let (dirs, _) = three(dir.path());
                fine(rcriu(&["dedup", "--link", text(&dirs[0]), text(&dirs[2])]));
                let last = dir.path().join("3");
                let images = dir.path().join("images");
                let of_server = [&["-v3"], &words[..]].concat();
                let words = [&["-v3", "-D", text(&last)], &words[..]].concat();
                match command {
                    "page-server" => page_server_once(&images, &of_server),
                    "service" => service_once(&words),
                    "cpuinfo" => rcriu(&[&["cpuinfo", "dump"], &words[..]].concat()),
                    _ => rcriu(&[&[command], &words[..]].concat()),
                }
            }
        };
        let text = said(&output);
        assert!(
            text.contains(&format!("--{} has no effect: ", opt.name)),
            "{}: {text}",
            opt.command
        );
    }
}

macro_rules! groups {
    ($($name:ident $commands:expr;)*) => {
        $(#[test]
        fn $name() {
            let commands: &[&str] = &$commands;
            for opt in all().iter().filter(|opt| commands.contains(&&*opt.command)) {
                if let Some(run) = row(&opt.command, &opt.name) {
                    println!("{} --{}", opt.command, opt.name);
                    run(&opt.command);
                }
            }
        })*
    };
}

groups! {
    privileged_options_of_dump ["dump"];
    privileged_options_of_pre_dump ["pre-dump"];
    privileged_options_of_restore ["restore"];
    options_of_check_and_show ["check", "show"];
    options_of_servers ["service", "page-server"];
    options_of_cpuinfo ["cpuinfo"];
    options_of_dedup ["dedup"];
    options_of_imgfs [
        "imgfs", "ls", "imgfs check", "diff", "flatten", "pack", "ps", "fds", "maps", "info", "cat", "get",
        "map", "mounts",
    ];
    privileged_options_of_mounts ["mount", "umount"];
}

// How commands are run.

/// A process tree and what is done to it.
struct Run {
    live: Live,
    dumps: u32,
}

/// What a dump had for an image directory.
fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}

fn rcriu(words: &[&str]) -> Output {
    Command::new(RCRIU).args(words).stdin(Stdio::null()).output().unwrap()
}

fn imgfs(words: &[&str]) -> Output {
    Command::new(IMGFS).args(words).stdin(Stdio::null()).output().unwrap()
}

#[track_caller]
fn fine(output: Output) -> String {
    assert!(output.status.success(), "{}", said(&output));
    said(&output)
}

#[track_caller]
fn refused(output: &Output, what: &str) {
    let text = said(output);
    assert!(!output.status.success() && text.contains(what), "{what} in: {text}");
}

impl Run {
    fn new() -> Self {
        Self::of("private_anon")
    }

    fn of(workload: &str) -> Self {
        require(Cap::Ptrace);
        Self { live: Live::workload(workload), dumps: 0 }
    }

    /// Runs a program, which says that it is ready by a file of that name.
    fn program(program: &str, arguments: &[&str]) -> Self {
        require(Cap::Ptrace);
        let live = Live::program(program, arguments, directory());
        let ready = live.path("ready");
        wait_for("the program", || ready.exists());
        Self { live, dumps: 0 }
    }

    /// The last image directory.
    fn images(&self) -> PathBuf {
        self.live.path(&self.dumps.to_string())
    }

    fn pid(&self) -> String {
        self.live.root.to_string()
    }

    /// Dumps into the next directory, or pre-dumps; the tree runs on.
    fn dump(&mut self, command: &str, words: &[&str]) -> Output {
        let stays = words.iter().any(|word| ["-R", "-s"].contains(word));
        let running = if command == "dump" && !stays { &["-R"][..] } else { &[] };
        self.dump_as(&[&[command], running, words].concat())
    }

    fn dump_as(&mut self, words: &[&str]) -> Output {
        self.live.tree();
        self.dumps += 1;
        fs::create_dir(self.images()).unwrap();
        let mut command = Command::new(RCRIU);
        command.args(words).args(["-t", &self.pid(), "-D"]).arg(self.images());
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// Dumps and ends the tree, so that it can be restored.
    fn restorable(&mut self) {
        fine(self.dump_as(&["dump"]));
        self.live.wait_gone();
    }

    /// Restores from the last directory. What is restored has no pipe of ours.
    fn restore(&self, words: &[&str]) -> Output {
        let images = self.images();
        let mut command = Command::new(RCRIU);
        command.args(["restore", "-d", "-D", text(&images)]).args(words);
        self.bounded(command)
    }

    fn bounded(&self, command: Command) -> Output {
        common::live::bounded(command, &self.live.path("said"))
    }

    fn state(&self) -> Option<char> {
        state_of(self.live.root.as_raw())
    }

    fn is_running(&self) -> bool {
        self.state().is_some_and(|state| !"TtZX".contains(state))
    }

    /// The process that keeps the tracking of the root.
    fn has_keeper(&self) -> bool {
        let wanted = format!("rcriu-keep\0{}\0", self.pid());
        fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| line.starts_with(wanted.as_bytes()))
        })
    }
}

/// Runs a command in one of its usual ways with these words added; `-D` is given besides.
fn usual(command: &str, words: &[&str]) -> (Output, PathBuf, Box<dyn std::any::Any>) {
    match command {
        "dump" | "pre-dump" => {
            let mut run = Run::new();
            let output = run.dump(command, words);
            (output, run.images(), Box::new(run.live))
        }
        "restore" => {
            let mut run = Run::new();
            run.restorable();
            let output = run.restore(words);
            (output, run.images(), Box::new(run.live))
        }
        "page-server" => {
            let dir = directory();
            let images = dir.path().join("images");
            (page_server_once(&images, words), images, Box::new(dir))
        }
        _ => {
            let dir = directory();
            let (dirs, _) = three(dir.path());
            fine(rcriu(&["dedup", "--link", text(&dirs[0]), text(&dirs[1]), text(&dirs[2])]));
            let words = &[&["-D", text(&dirs[2])], words].concat();
            let output = match command {
                "service" => service_once(words),
                "cpuinfo" => rcriu(&[&["cpuinfo", "dump"], &words[..]].concat()),
                _ => rcriu(&[&[command], &words[..]].concat()),
            };
            (output, dirs[2].clone(), Box::new(dir))
        }
    }
}

fn tracking() {
    require(Cap::Kernel("a tracker of changes", |features| {
        features.write_protect_private && features.pagemap_scan || features.soft_dirty
    }));
}

// Dumps.

fn tree(command: &str) {
    let mut run = Run::new();
    fine(run.dump(command, &[]));
    assert!(run.images().join(format!("pagemap-{}.img", run.pid())).exists());
    refused(&rcriu(&[command, "-D", text(&run.images())]), "-t PID");
}

/// The parent is the newest dump of the same process in the directory, and none of another process.
fn chain(command: &str) {
    let mut run = Run::new();
    let other = Run::new();
    let dir = directory();
    let dumps = dir.path().join("dumps");
    run.live.tree();
    let numbered = |number: &str| dumps.join(number).join("inventory.img").exists();
    let dump = |pid: &str, words: &[&str]| {
        let running = if command == "dump" { &["-R"][..] } else { &[] };
        rcriu(&[&[command, "-t", pid, "--chain", text(&dumps)], running, words].concat())
    };
    fine(dump(&run.pid(), &[]));
    assert!(numbered("1") && !dumps.join("1/parent").exists());
    fine(dump(&other.pid(), &[]));
    assert!(numbered("2") && !dumps.join("2/parent").exists());
    fine(dump(&run.pid(), &[]));
    assert_eq!(fs::read_link(dumps.join("3/parent")).unwrap(), Path::new("../1"));
    // Where the user wants it, and in the directory.
    fine(run.dump(command, &["--chain", text(&dumps)]));
    let parent = fs::read_link(run.images().join("parent")).unwrap();
    assert_eq!(parent, dumps.join("3").canonicalize().unwrap());
    assert_eq!(fs::read_link(dumps.join("4/parent")).unwrap(), Path::new("../3"));
    fine(imgfs(&["check", text(&dumps.join("4"))]));
    // A damaged one is passed over; a failed dump leaves nothing.
    fs::remove_file(dumps.join("1/inventory.img")).unwrap();
    let output = dump(&run.pid(), &[]);
    assert!(said(&output).contains("cannot be the parent of this dump"), "{}", said(&output));
    fine(output);
    assert!(numbered("5") && !dumps.join("5/parent").exists());
    refused(&dump("2147483647", &[]), "there is no process");
    assert!(!dumps.join("6").exists());
}

fn leave_running(_: &str) {
    let mut run = Run::new();
    fine(run.dump("dump", &["--leave-running"]));
    assert!(run.is_running());
    run.restorable();
}

fn live(_: &str) {
    let mut run = Run::new();
    refused(&run.dump_as(&["dump", "--live"]), "--live needs --leave-running");
    fine(run.dump("dump", &["--live"]));
    assert!(run.is_running());
    run.restorable();
}

fn live_stopped(_: &str) {
    let mut run = Run::of("shared_anon");
    refused(&run.dump("dump", &["--live", "--live-stopped", "4K"]), "more than 4096");
    fine(run.dump("dump", &["--live", "--live-stopped", "1G"]));
    assert!(run.is_running());
}

fn leave_stopped(_: &str) {
    let mut run = Run::new();
    fine(run.dump("dump", &["--leave-stopped"]));
    wait_for("the stop", || run.state() == Some('T'));
    kill(run.live.root, Signal::SIGCONT).unwrap();
}

fn shell_job(command: &str) {
    let shell = Shell::new("terminal");
    let images = shell.path("job-images");
    fs::create_dir(&images).unwrap();
    let pid = shell.job.root.to_string();
    let dump = |words: &[&str]| {
        let running = if command == "dump" { &["-R"][..] } else { &[] };
        rcriu(&[&[command, "-t", &pid, "-D", text(&images)], running, words].concat())
    };
    refused(&dump(&[]), "--shell-job");
    fine(dump(&["--shell-job"]));
}

/// A process in the middle of vfork(2) can't be stopped.
/// The service returns once it waits at its name, in the directory that it was given.
fn service(_: &str) {
    let dir = directory();
    let mut command = Command::new(RCRIU);
    command.args(["service", "--daemon", "--address", "socket", "--pidfile", "pid"]);
    assert!(command.arg("--work-dir").arg(dir.path()).status().unwrap().success());
    let pid = fs::read_to_string(dir.path().join("pid")).unwrap();
    let pid = Pid::from_raw(pid.parse().unwrap());
    let cwd = fs::read_link(format!("/proc/{pid}/fd/0")).unwrap();
    let is_socket = fs::metadata(dir.path().join("socket")).unwrap().file_type().is_socket();
    kill(pid, Signal::SIGKILL).unwrap();
    assert!(is_socket && cwd == Path::new("/dev/null"));
}

/// Runs the service with these words until it waits for clients.
fn service_once(words: &[&str]) -> Output {
    let dir = directory();
    let pidfile = dir.path().join("pid");
    let mut command = Command::new(RCRIU);
    command.args(["service", "-d", "--address"]).arg(dir.path().join("socket"));
    command.arg("--pidfile").arg(&pidfile).args(words);
    let output = common::live::bounded(command, &dir.path().join("said"));
    if let Ok(pid) = fs::read_to_string(&pidfile) {
        let pid = Pid::from_raw(pid.parse().unwrap());
        kill(pid, Signal::SIGKILL).unwrap();
        // It is a child of the first process, or of the harness if that adopts orphans.
        let _ = nix::sys::wait::waitpid(pid, None);
    }
    output
}

/// Runs a page server with these words, and a client that sends no memory.
fn page_server_once(images: &Path, words: &[&str]) -> Output {
    fs::create_dir_all(images).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = Command::new(RCRIU);
    command.args(["page-server", "--address", "127.0.0.1", "--port", &port.to_string(), "-D"]);
    command.arg(images).args(words).stdin(Stdio::null());
    let mut server = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut client = None;
    wait_for("the page server", || {
        client = TcpStream::connect(("127.0.0.1", port)).ok();
        client.is_some() || server.try_wait().unwrap().is_some()
    });
    if let Some(mut client) = client {
        client.write_all(&Message::Close { forced: false }.encode()).unwrap();
        let mut status = [1; 4];
        client.read_exact(&mut status).unwrap();
        assert_eq!(status, [0; 4]);
    }
    server.wait_with_output().unwrap()
}

fn page_server_listens(command: &str) {
    let (output, ..) = usual(command, &[]);
    fine(output);
}

fn page_server_parent(command: &str) {
    let (output, images, _keep) = usual(command, &["--prev-images-dir", ".."]);
    fine(output);
    assert_eq!(fs::read_link(images.join("parent")).unwrap(), Path::new(".."));
}

fn page_server_socket(_: &str) {
    let dir = directory();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(RCRIU);
    command.args(["page-server", "--ps-socket", "0", "-D"]).arg(dir.path());
    let server = command.stdin(OwnedFd::from(theirs)).stderr(Stdio::piped()).spawn().unwrap();
    ours.write_all(&Message::Close { forced: true }.encode()).unwrap();
    fine(server.wait_with_output().unwrap());
}

fn page_server_status(_: &str) {
    let dir = directory();
    let said = dir.path().join("status");
    let script = "exec 7>\"$2\"; exec \"$1\" page-server --daemon --address 127.0.0.1 --pidfile pid \
                  --status-fd 7";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", RCRIU]).arg(&said).current_dir(dir.path());
    let port = fine(common::live::bounded(command, &dir.path().join("output")));
    assert_eq!(fs::read(&said).unwrap(), [0]);
    let pid: i32 = fs::read_to_string(dir.path().join("pid")).unwrap().parse().unwrap();
    let port: u16 = port.trim().parse().unwrap();
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client.write_all(&Message::Close { forced: false }.encode()).unwrap();
    client.read_exact(&mut [0; 4]).unwrap();
    drop(client);
    wait_for("the end of the page server", || {
        let _ = nix::sys::wait::waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
        state_of(pid).is_none_or(|state| state == 'Z')
    });
}

/// The pages are at the server, and nowhere else.
fn to_page_server(command: &str) {
    let mut run = Run::new();
    let received = run.live.path("received");
    let server = Server::start(&received, &[]);
    let arguments = server.arguments();
    fine(run.dump(command, &arguments.each_ref().map(String::as_str)));
    server.succeed();
    assert!(received.join("pages-1.img").exists() && !run.images().join("pages-1.img").exists());
}

/// tests/page_server.rs encrypts connections. Here the files are looked for.
fn encrypted(command: &str) {
    let dir = directory();
    let absent = dir.path().join("absent");
    let image = dir.path().to_str().unwrap();
    for (options, problem) in [
        (&["--tls", "--tls-cacert", text(&absent)][..], "absent (--tls-cacert)"),
        (&["--tls", "--tls-cacert", "/dev/null"], "/dev/null (--tls-cacert) has no certificate"),
        (&["--tls-cacert", text(&absent), "--tls-no-cn-verify"], ""),
    ] {
        let options: Vec<&str> = match command {
            "page-server" => options.iter().copied().filter(|it| !it.ends_with("verify")).collect(),
            _ => options.to_vec(),
        };
        if problem.is_empty() {
            fine(usual(command, &options).0);
        } else if command == "page-server" {
            refused(&rcriu(&[&[command, "-D", image], &options[..]].concat()), problem);
        } else {
            let server = Server::start(&dir.path().join("received"), &[]);
            let to_server = server.arguments();
            let to_server = to_server.iter().map(String::as_str);
            let words: Vec<&str> = to_server.chain(options).collect();
            refused(&Run::new().dump(command, &words), problem);
            assert!(!server.end().status.success());
        }
    }
}

fn to_socket(command: &str) {
    let mut run = Run::new();
    let received = run.live.path("received");
    fs::create_dir(&received).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut server = Command::new(RCRIU);
    server.args(["page-server", "--ps-socket", "0", "-D"]).arg(&received);
    let server = server.stdin(OwnedFd::from(theirs)).stderr(Stdio::piped()).spawn().unwrap();
    // The dump inherits it.
    nix::fcntl::fcntl(&ours, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let number = ours.as_raw_fd().to_string();
    fine(run.dump(command, &["--page-server", "--ps-socket", &number]));
    fine(server.wait_with_output().unwrap());
    assert!(received.join("pages-1.img").exists());
}

/// A zero byte says that the service waits, and the end that nothing else comes.
fn service_status(_: &str) {
    let dir = directory();
    let said = dir.path().join("status");
    let script =
        "exec 7>\"$2\"; exec \"$1\" service -d --address socket --pidfile pid --status-fd 7";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", RCRIU]).arg(&said).current_dir(dir.path());
    fine(common::live::bounded(command, &dir.path().join("output")));
    assert_eq!(fs::read(&said).unwrap(), [0]);
    let pid = Pid::from_raw(fs::read_to_string(dir.path().join("pid")).unwrap().parse().unwrap());
    let open = fs::read_link(format!("/proc/{pid}/fd/7"));
    kill(pid, Signal::SIGKILL).unwrap();
    let _ = nix::sys::wait::waitpid(pid, None);
    assert!(open.is_err(), "{open:?}");
}

fn timeout(command: &str) {
    // The child waits for a writer, so its parent stays in vfork(2).
    let script = "import ctypes, os, signal\n\
        os.mkfifo('gate')\n\
        libc = ctypes.CDLL(None)\n\
        open('ready', 'w').close()\n\
        libc.syscall.argtypes = None\n\
        code = bytes([0xb8, 58, 0, 0, 0, 0x0f, 5, 0x85, 0xc0, 0x75, 9,\n\
                      0xb8, 34, 0, 0, 0, 0x0f, 5, 0xeb, 0xf7, 0xc3])\n\
        import mmap\n\
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n\
        page.write(code)\n\
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))\n\
        ctypes.CFUNCTYPE(ctypes.c_long)(address)()\n";
    let mut run = Run::program("/usr/bin/python3", &["-c", script]);
    let children = format!("/proc/{0}/task/{0}/children", run.pid());
    wait_for("a child", || !fs::read_to_string(&children).unwrap().is_empty());
    run.live.tree();
    let begin = Instant::now();
    let output = run.dump(command, &["--timeout", "1"]);
    let took = begin.elapsed();
    assert!(!output.status.success(), "{}", said(&output));
    let bounds = Duration::from_secs(1)..Duration::from_secs(8) * common::slowness();
    assert!(bounds.contains(&took), "{took:?}: {}", said(&output));
}

/// A script that notes the stages at which it is run, and what its caller has open.
fn script(live: &Live) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = live.path("script");
    let dir = live.path("");
    let dir = text(&dir);
    let lines = format!(
        "#!/bin/sh\necho $CRTOOLS_SCRIPT_ACTION >>{dir}/stages\nls -l /proc/$PPID/fd >{dir}/open\n"
    );
    fs::write(&path, lines).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn action_script(command: &str) {
    let mut run = Run::new();
    let script = script(&run.live);
    fine(run.dump(command, &["--action-script", text(&script)]));
    let stages = fs::read_to_string(run.live.path("stages")).unwrap();
    assert!(stages.starts_with("pre-dump\n"), "{stages}");
}

fn prev_images_dir(command: &str) {
    let mut run = Run::new();
    fine(run.dump(command, &[]));
    fine(run.dump(command, &["--prev-images-dir", "../1"]));
    assert_eq!(fs::read_link(run.images().join("parent")).unwrap(), Path::new("../1"));
    let pages = |dir: PathBuf| -> u64 {
        let entries = fs::read_dir(dir).unwrap().flatten();
        let pages =
            entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"));
        pages.map(|entry| entry.metadata().unwrap().len()).sum()
    };
    let (first, second) = (pages(run.live.path("1")), pages(run.live.path("2")));
    assert!(second < first / 2, "{first} {second}");
}

fn track_mem(command: &str) {
    tracking();
    let mut run = Run::new();
    fine(run.dump(command, &[]));
    assert!(!run.has_keeper());
    fine(run.dump(command, &["--track-mem"]));
    assert!(run.has_keeper());
}

fn tracker(command: &str) {
    tracking();
    let mut run = Run::new();
    fine(run.dump(command, &["--track-mem", "--tracker", "none"]));
    assert!(!run.has_keeper());
}

fn auto_dedup(command: &str) {
    let mut run = Run::new();
    fine(run.dump(command, &[]));
    let sum = |run: &Run| -> u64 {
        let dir = run.live.path("1");
        let pages = fs::read_dir(dir).unwrap().flatten();
        let pages = pages.filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"));
        pages.map(|entry| stored_bytes(&entry.path())).sum()
    };
    // Pages that have changed are superseded, and all of these differ.
    let pages = fs::read_dir(run.images()).unwrap().flatten();
    for entry in pages.filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-")) {
        let file = File::options().write(true).open(entry.path()).unwrap();
        let len = file.metadata().unwrap().len();
        file.write_all_at(&vec![0x5a; usize::try_from(len).unwrap()], 0).unwrap();
    }
    let before = sum(&run);
    fine(run.dump(command, &["--prev-images-dir", "../1", "--auto-dedup"]));
    assert!(sum(&run) < before / 2, "{before} {}", sum(&run));
}

fn link_remap(_: &str) {
    let mut run = Run::of("deleted_linked_file");
    refused(&run.dump("dump", &[]), "--link-remap");
    fine(run.dump("dump", &["--link-remap"]));
}

fn ghost_limit(_: &str) {
    let mut run = Run::of("deleted_file");
    refused(&run.dump("dump", &["--ghost-limit", "1"]), "--ghost-limit");
    fine(run.dump("dump", &["--ghost-limit", "1G"]));
}

fn file_locks(_: &str) {
    let mut run = Run::of("locks_posix");
    let output = run.dump("dump", &[]);
    refused(&output, "--file-locks");
    assert!(said(&output).contains("a POSIX write lock"), "{}", said(&output));
    fine(run.dump("dump", &["--file-locks"]));
}

/// A program that watches a file.
fn watcher(path: &str) -> Run {
    let script = "import ctypes, os, sys, time\n\
        c = ctypes.CDLL(None, use_errno=True)\n\
        fd = c.inotify_init1(0)\n\
        os.makedirs('a'); os.makedirs('b')\n\
        open('a/one', 'w').close(); os.link('a/one', 'b/two')\n\
        assert c.inotify_add_watch(fd, sys.argv[1][::-1].encode(), 2) == 1\n\
        open('ready', 'w').close()\n\
        while True: time.sleep(1)\n";
    // A dump would look for the file where the arguments lead.
    let backwards: String = path.chars().rev().collect();
    Run::program("python3", &["-c", script, &backwards])
}

/// The path of the watched file in the images.
fn watched(run: &Run) -> String {
    let files: Vec<proto::FileEntry> =
        read_all(&run.images().join("files.img"), image::Kind::Files).unwrap();
    let instance = files.into_iter().find_map(|file| file.ify).unwrap();
    String::from_utf8(instance.wd[0].f_handle.path.clone().unwrap()).unwrap()
}

fn force_irmap(_: &str) {
    let mut run = watcher("a/one");
    fine(run.dump("dump", &["-R"]));
    // The file has two names, and the kernel knows it by one of them.
    let [one, two] = ["a/one", "b/two"].map(|name| run.live.path(name));
    let found = watched(&run);
    let other = if found == text(&one) { two } else { one };
    let below = other.parent().unwrap();
    fine(run.dump("dump", &["-R", "--force-irmap", "--irmap-scan-path", text(below)]));
    assert_eq!(watched(&run), text(&other));
}

fn irmap_scan_path(_: &str) {
    // Files in /proc have no handles to open them by.
    let mut run = watcher("/proc/version");
    refused(&run.dump("dump", &[]), "--irmap-scan-path");
    fine(run.dump("dump", &["--irmap-scan-path", "/proc/version"]));
    assert_eq!(watched(&run), "/proc/version");
}

/// A process that sends datagrams to a socket of ours.
fn sender() -> (Run, UnixDatagram, u64) {
    require(Cap::Ptrace);
    let dir = directory();
    let path = dir.path().join("socket");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20) * common::slowness())).unwrap();
    let script = "import os, socket, sys, time\n\
        s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n\
        s.connect('socket')\n\
        open('inode', 'w').write(str(os.fstat(s.fileno()).st_ino))\n\
        os.rename('inode', 'ready')\n\
        while True:\n\
        \ttime.sleep(0.01)\n\
        \ttry: s.send(b'x')\n\
        \texcept OSError: pass\n";
    let live = Live::program("/usr/bin/python3", &["-c", script], dir);
    let ready = live.path("ready");
    wait_for("the sender", || ready.exists());
    let inode = fs::read_to_string(ready).unwrap().parse().unwrap();
    (Run { live, dumps: 0 }, socket, inode)
}

fn tcp_established(command: &str) {
    let mut run = Run::of("tcp_connections");
    refused(&run.dump("dump", &[]), "--tcp-established");
    if command == "dump" {
        fine(run.dump("dump", &["--tcp-established"]));
        return;
    }
    fine(run.dump_as(&["dump", "--tcp-established"]));
    run.live.wait_gone();
    refused(&run.restore(&[]), "--tcp-established");
    fine(run.restore(&["--tcp-established"]));
    run.live.verdict();
}

/// What the program then sees is for tests/connections.rs.
fn tcp_close(command: &str) {
    let mut run = Run::of("tcp_connections");
    if command == "dump" {
        fine(run.dump("dump", &["--tcp-close"]));
        let entries = fs::read_dir(run.images()).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        assert_eq!(names.filter(|name| name.starts_with("tcp-stream")).count(), 0);
        return;
    }
    fine(run.dump_as(&["dump", "--tcp-established"]));
    run.live.wait_gone();
    fine(run.restore(&["--tcp-close"]));
    assert!(run.is_running());
}

/// What holds back packets is in the images, for the restore.
fn network_lock(_: &str) {
    let method = |words: &[&str]| {
        let mut run = Run::of("tcp_connections");
        fine(run.dump_as(&[&["dump", "--tcp-established"], words].concat()));
        run.live.wait_gone();
        let inventory: Vec<proto::InventoryEntry> =
            read_all(&run.images().join("inventory.img"), image::Kind::Inventory).unwrap();
        fine(run.restore(&["--tcp-established"]));
        run.live.verdict();
        inventory[0].network_lock_method
    };
    assert_eq!(method(&[]), Some(2));
    assert_eq!(method(&["--network-lock", "nftables"]), Some(2));
    assert_eq!(method(&["--network-lock", "iptables"]), Some(1));
    assert_eq!(method(&["--network-lock", "skip"]), Some(3));
}

/// tests/cgroups.rs looks at the effect of each mode.
fn manage_cgroups(command: &str) {
    let modes = ["none", "ignore", "props", "soft", "full", "strict"];
    some_values(command, "--manage-cgroups", &modes);
}

/// Takes the root of a tree that has no cgroup of its own, and changes nothing.
fn cgroup_root(command: &str) {
    let mut run = Run::new();
    let words = ["--cgroup-root", "pids:/rcriu-none"];
    if command == "restore" {
        run.restorable();
        fine(run.restore(&words));
    } else {
        fine(run.dump_as(&[&[command][..], &words].concat()));
    }
}

/// The UTS namespace that it is in already; tests/containers.rs joins others.
fn join_ns(_: &str) {
    let mut run = Run::new();
    run.restorable();
    let wrong = said(&run.restore(&["--join-ns", "uts:/proc/self/ns/net"]));
    assert!(wrong.contains("is no namespace of the kind uts"), "{wrong}");
    for kind in ["pid", "user", "cgroup"] {
        let wrong = said(&run.restore(&["--join-ns", &format!("{kind}:1")]));
        assert!(wrong.contains("nsenter"), "{wrong}");
    }
    let wrong = said(&run.restore(&["--join-ns", "net:1", "--empty-ns", "net"]));
    assert!(wrong.contains("cannot be used with --join-ns net"), "{wrong}");
    fine(run.restore(&["--join-ns", "uts:/proc/self/ns/uts"]));
}

/// Only the profile that the tree inherits from rcriu.
fn lsm_profile(_: &str) {
    let mut run = Run::new();
    run.restorable();
    refused(&run.restore(&["--lsm-profile", "selinux:no_such_label"]), "start rcriu itself under");
    fine(run.restore(&["--lsm-profile", "none"]));
}

/// The same as --external veth[IN]:OUT: a tree without such a device does not need it.
fn veth_pair(_: &str) {
    let mut run = Run::new();
    run.restorable();
    fine(run.restore(&["--veth-pair", "eth0=v0"]));
}

const PROPERTIES: &str = "\"pids\":\n - \"strategy\": \"replace\"\n - \"properties\": []\n";

/// Runs a command that fails before it looks at a process.
fn chosen(command: &str, words: &[&str]) -> Output {
    let tree: &[&str] = if command == "restore" { &[] } else { &["-t", "1"] };
    rcriu(&[&[command], tree, words].concat())
}

/// tests/cgroups.rs looks at the effect.
fn cgroup_props(command: &str) {
    some_values(command, "--cgroup-props", &[PROPERTIES, ""]);
    let wrong = said(&chosen(command, &["--cgroup-props", "\"pids\":\n"]));
    assert!(wrong.contains("--cgroup-props: line 2: expected a dash, found the end"), "{wrong}");
}

fn cgroup_props_file(command: &str) {
    let dir = directory();
    let file = dir.path().join("properties");
    fs::write(&file, PROPERTIES).unwrap();
    some_values(command, "--cgroup-props-file", &[text(&file)]);
    let absent = dir.path().join("absent");
    let wrong = said(&chosen(command, &["--cgroup-props-file", text(&absent)]));
    assert!(wrong.contains("absent: No such file"), "{wrong}");
}

/// tests/cgroups.rs has a tree in cgroups.
fn cgroup_yard(command: &str) {
    let mut run = Run::new();
    let words = ["--cgroup-yard", "/proc/self"];
    if command == "restore" {
        run.restorable();
        fine(run.restore(&words));
    } else {
        let output = run.dump_as(&[&[command][..], &words].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("no cgroup file system"), "{said}");
    }
}

fn cgroup_dump_controller(command: &str) {
    let mut run = Run::new();
    fine(run.dump_as(&[command, "--cgroup-dump-controller", "pids"]));
}

/// The image of another processor: this one lacks a feature, and has one more.
fn other_processor(images: &Path) {
    let path = images.join("cpuinfo.img");
    let mut found: Vec<proto::CpuinfoEntry> = read_all(&path, image::Kind::Cpuinfo).unwrap();
    let entry = &mut found[0];
    // fma4 and tbm, which few processors have, and vme, which programs do not use.
    entry.x86_entry[0].capability[6] |= 1 << 16 | 1 << 21;
    entry.x86_entry[0].capability[0] &= !2;
    fs::remove_file(&path).unwrap();
    let mut image = image::ImageWriter::create(&path, image::Kind::Cpuinfo).unwrap();
    image.message(entry).unwrap();
    image.finish().unwrap();
}

/// The processor is recorded and compared if that is asked for.
fn cpu_cap(command: &str) {
    let mut run = Run::new();
    if command == "dump" {
        fine(run.dump("dump", &[]));
        assert!(!run.images().join("cpuinfo.img").exists());
        fine(run.dump("dump", &["--cpu-cap=none"]));
        assert!(!run.images().join("cpuinfo.img").exists());
        fine(run.dump("dump", &["--cpu-cap"]));
        assert!(run.images().join("cpuinfo.img").exists());
        return;
    }
    fine(run.dump_as(&["dump", "--cpu-cap=ins"]));
    run.live.wait_gone();
    other_processor(&run.images());
    refused(&run.restore(&["--cpu-cap=ins"]), "it lacks fma4, tbm");
    fine(run.restore(&["--cpu-cap=none"]));
}

/// What `cpuinfo` compares is what was named.
fn compared(command: &str) {
    let dir = directory();
    let run = |action: &str, words: &[&str]| {
        rcriu(&[&[command, action, "-D", text(dir.path())], words].concat())
    };
    refused(&run("check", &[]), "there is no cpuinfo.img");
    fine(run("dump", &[]));
    fine(run("check", &[]));
    fine(run("check", &["--cpu-cap"]));
    other_processor(dir.path());
    refused(&run("check", &[]), "it lacks fma4, tbm");
    refused(&run("check", &["--cpu-cap=none,cpu"]), "words of its features differ: 0 (");
    fine(run("check", &["--cpu-cap=fpu,^ins"]));
    refused(&run("look", &[]), "dump or check, not look");
    refused(&rcriu(&[command]), "dump or check");
}

/// Runs a command with values of an option that it accepts.
fn some_values(command: &str, option: &str, accepted: &[&str]) {
    for value in accepted {
        let word = format!("{option}={value}");
        let mut run = Run::new();
        if command == "restore" {
            run.restorable();
            fine(run.restore(&[&word]));
        } else {
            fine(run.dump(command, &[&word]));
        }
    }
}

/// Of TCP.
fn tcp_in_flight() {
    let mut run = Run::of("tcp_unaccepted");
    refused(&run.dump("dump", &["--tcp-established"]), "--skip-in-flight");
    fine(run.dump_as(&["dump", "--tcp-established", "--skip-in-flight"]));
    run.live.wait_gone();
    fine(run.restore(&["--tcp-established"]));
    run.live.verdict();
    assert!(run.live.path("status.left_out").exists());
}

fn ext_unix_sk(command: &str) {
    let (mut run, socket, _) = sender();
    refused(&run.dump("dump", &[]), "--ext-unix-sk");
    if command == "dump" {
        fine(run.dump("dump", &["--ext-unix-sk"]));
        return;
    }
    fine(run.dump_as(&["dump", "-x"]));
    run.live.wait_gone();
    refused(&run.restore(&[]), "--ext-unix-sk");
    fine(run.restore(&["--ext-unix-sk"]));
    let mut buffer = [0; 8];
    // What was sent before it was dumped, and what comes after that.
    socket.set_nonblocking(true).unwrap();
    while socket.recv(&mut buffer).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    assert_eq!(socket.recv(&mut buffer).unwrap(), 1);
}

/// A client outside the tree that its server has not accepted.
fn skip_in_flight(_: &str) {
    require(Cap::Ptrace);
    let script = "import socket, time\n\
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)\n\
        s.bind('socket'); s.listen(3)\n\
        open('ready', 'w').close()\n\
        time.sleep(1000)\n";
    let live = Live::program("/usr/bin/python3", &["-c", script], directory());
    let ready = live.path("ready");
    wait_for("the server", || ready.exists());
    let mut run = Run { live, dumps: 0 };
    let _client = std::os::unix::net::UnixStream::connect(run.live.path("socket")).unwrap();
    refused(&run.dump("dump", &[]), "--skip-in-flight");
    fine(run.dump("dump", &["--skip-in-flight"]));
    tcp_in_flight();
}

fn external(_: &str) {
    let (mut run, _socket, inode) = sender();
    refused(&run.dump("dump", &["--external", "unix[1]"]), "is not open in the tree");
    fine(run.dump("dump", &["--external", &format!("unix[{inode}]")]));
}

/// A tree with a mount namespace of its own, in which a file system is mounted at the second value.
fn with_mount(fs_type: &str) -> (Run, String) {
    let script = format!(
        "mkdir mounted && mount -t {fs_type} test mounted && touch ready && exec sleep 1000"
    );
    let run = Run::program("unshare", &["-m", "--propagation", "private", "sh", "-c", &script]);
    let point = text(&run.live.path("mounted")).to_owned();
    (run, point)
}

/// Whether the restored tree has a mount at this point.
fn has_mount(run: &Run, point: &str) -> bool {
    let table = fs::read_to_string(format!("/proc/{}/mountinfo", run.pid())).unwrap();
    table.contains(&format!(" {point} "))
}

fn skip_mnt(_: &str) {
    let (mut run, point) = with_mount("ramfs");
    refused(&run.dump("dump", &[]), "of a file system that rcriu cannot mount again");
    fine(run.dump("dump", &["--skip-mnt", &point]));
}

fn enable_fs(_: &str) {
    let (mut run, point) = with_mount("ramfs");
    fine(run.dump_as(&["dump", "--enable-fs", "ramfs"]));
    run.live.wait_gone();
    fine(run.restore(&[]));
    assert!(run.is_running() && has_mount(&run, &point));
}

/// A mount that the caller of the restore names, by either option.
fn external_mount(dump: [&str; 2], restore: [&str; 2]) {
    let (mut run, point) = with_mount("ramfs");
    let key = dump[1].replace("POINT", &point);
    fine(run.dump_as(&["dump", dump[0], &key]));
    run.live.wait_gone();
    refused(&run.restore(&[]), "is external");
    let source = run.live.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "given").unwrap();
    let value = restore[1].replace("SOURCE", text(&source));
    fine(run.restore(&[restore[0], &value]));
    let found = fs::read_to_string(format!("/proc/{}/root{point}/file", run.pid()));
    assert_eq!(found.unwrap(), "given");
}

fn ext_mount_map(_: &str) {
    let option = "--ext-mount-map";
    external_mount([option, "POINT:the key"], [option, "the key:SOURCE"]);
}

fn restored_external(_: &str) {
    let option = "--external";
    external_mount([option, "mnt[POINT]:the key"], [option, "mnt[the key]:SOURCE"]);
}

fn restored_skip_mnt(_: &str) {
    let (mut run, point) = with_mount("tmpfs");
    run.restorable();
    fine(run.restore(&["--skip-mnt", &point]));
    assert!(run.is_running() && !has_mount(&run, &point));
}

fn root(_: &str) {
    let (mut run, _) = with_mount("tmpfs");
    run.restorable();
    refused(&run.restore(&["--root", "/there/is/none"]), "/there/is/none");
    fine(run.restore(&["--root", "/"]));
    assert!(run.is_running());
}

/// A tree whose mounts have no relations outside is dumped and restored with these options, too; those
/// that have some depend on the machine.
fn enable_external_relations(_: &str) {
    let (mut run, point) = with_mount("tmpfs");
    let options = ["--enable-external-sharing", "--enable-external-masters"];
    fine(run.dump_as(&[&["dump"][..], &options].concat()));
    run.live.wait_gone();
    fine(run.restore(&options));
    assert!(run.is_running() && has_mount(&run, &point));
}

/// The JSON of an image.
fn shown(image: &Path) -> String {
    fine(rcriu(&["show", text(image)]))
}

fn file_validation(_: &str) {
    let mut run = Run::new();
    fine(run.dump("dump", &["--file-validation=buildid"]));
    assert!(shown(&run.images().join("files.img")).contains("\"build_id\""));
    fine(run.dump("dump", &["--file-validation=filesize"]));
    assert!(!shown(&run.images().join("files.img")).contains("\"build_id\""));
}

// Restores.

fn restore_detached(_: &str) {
    let mut run = Run::new();
    run.restorable();
    let mut command = Command::new(RCRIU);
    command.args(["restore", "-D"]).arg(run.images());
    let (out, log) = (Stdio::null(), File::create(run.live.path("said")).unwrap());
    let mut waiting = command.stdin(Stdio::null()).stdout(out).stderr(log).spawn().unwrap();
    wait_for("the restored tree", || run.state().is_some());
    thread::sleep(Duration::from_millis(100));
    assert!(waiting.try_wait().unwrap().is_none(), "it has not waited for the tree");
    run.live.kill();
    waiting.wait().unwrap();

    let mut run = Run::new();
    run.restorable();
    fine(run.restore(&["--restore-detached"]));
    assert!(run.is_running());
}

fn parent(pid: Pid) -> i32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn restore_sibling(_: &str) {
    let mut run = Run::new();
    run.restorable();
    fine(run.restore(&["--restore-sibling"]));
    assert_eq!(parent(run.live.root), Pid::this().as_raw());
    refused(&rcriu(&["restore", "-S", "-D", text(&run.images())]), "--restore-sibling needs");
}

fn restored_stopped(_: &str) {
    let mut run = Run::new();
    run.restorable();
    fine(run.restore(&["--leave-stopped"]));
    assert_eq!(run.state(), Some('T'));
    kill(run.live.root, Signal::SIGCONT).unwrap();
    wait_for("the tree", || run.is_running());
}

fn restored_shell_job(_: &str) {
    let mut shell = Shell::new("terminal");
    shell.job.dump(&["--shell-job"]);
    let images = shell.job.images();
    refused(&rcriu(&["restore", "-d", "-D", text(&images)]), "--shell-job");
    // With --shell-job.
    shell.restore();
    shell.job.verdict();
}

fn exec_cmd(_: &str) {
    let mut run = Run::new();
    run.restorable();
    let found = run.live.path("found");
    let script = format!("cat /proc/{}/stat >{}; kill -9 {0}", run.pid(), text(&found));
    let script = script.replace("{0}", &run.pid());
    let mut command = Command::new(RCRIU);
    command.args(["restore", "-D"]).arg(run.images());
    command.args(["--exec-cmd", "--", "sh", "-c", &script]);
    fine(run.bounded(command));
    assert!(fs::read_to_string(found).unwrap().starts_with(&run.pid()));
}

fn pidfile(_: &str) {
    let mut run = Run::new();
    run.restorable();
    let path = run.live.path("the-pid");
    fine(run.restore(&["--pidfile", text(&path)]));
    assert_eq!(fs::read_to_string(path).unwrap(), run.pid());
}

fn restored_action_script(_: &str) {
    let mut run = Run::new();
    run.restorable();
    let script = script(&run.live);
    fine(run.restore(&["--action-script", text(&script)]));
    let stages = fs::read_to_string(run.live.path("stages")).unwrap();
    assert!(stages.starts_with("pre-restore\n"), "{stages}");
}

fn restored_track_mem(_: &str) {
    tracking();
    let mut run = Run::new();
    run.restorable();
    fine(run.restore(&["--track-mem"]));
    assert!(run.has_keeper());
}

fn restored_tracker(_: &str) {
    tracking();
    let mut run = Run::new();
    run.restorable();
    fine(run.restore(&["--track-mem", "--tracker=none"]));
    assert!(!run.has_keeper());
}

fn restored_auto_dedup(_: &str) {
    let mut run = Run::new();
    run.restorable();
    let sum = || -> u64 {
        let pages = fs::read_dir(run.images()).unwrap().flatten();
        let pages = pages.filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"));
        pages.map(|entry| stored_bytes(&entry.path())).sum()
    };
    let before = sum();
    fine(run.restore(&["--auto-dedup"]));
    assert!(sum() < before / 2, "{before} {}", sum());
}

fn restored_record(_: &str) {
    let mut run = Run::new();
    run.restorable();
    fine(run.restore(&["--lazy", "--record", "touched"]));
    let record = run.images().join("touched");
    wait_for("the record", || {
        fs::read_to_string(&record).is_ok_and(|text| text.starts_with("rcriu-record 1\n"))
    });
    let said = said(&run.restore(&["--record", "touched"]));
    assert!(said.contains("--record needs --lazy"), "{said}");
}

fn restored_lazy(_: &str) {
    let mut run = Run::new();
    run.restorable();
    fine(run.restore(&["--lazy"]));
    let log = run.images().join("pager.log");
    // It says nothing at the usual level.
    wait_for("the log of the pager", || log.exists());
    let output = run.restore(&["--lazy", "--auto-dedup"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("--lazy cannot be used with --auto-dedup"), "{said}");
}

/// A network namespace whose loopback device is up before and after, but has its own addresses only.
fn empty_ns(command: &str) {
    const ADDRESS: &str = "192.0.2.7";
    let script = "ip link set lo up; ip addr add 192.0.2.7/32 dev lo; echo >ready; exec sleep 1000";
    let mut run = Run::program("unshare", &["-n", "bash", "-c", script]);
    let given = |on: &str| if on == command { &["--empty-ns", "net"][..] } else { &[] };
    fine(run.dump_as(&[&["dump"], given("dump")].concat()));
    run.live.wait_gone();
    fine(run.restore(given("restore")));
    let routes = fs::read_to_string(format!("/proc/{}/net/fib_trie", run.live.root)).unwrap();
    // An address is there only while the device is up.
    assert!(routes.contains("127.0.0.1") && !routes.contains(ADDRESS), "{routes}");
}

fn inherit_fd(_: &str) {
    let mut run = Run::program(
        "bash",
        &["-c", "echo one >one; echo two >two; exec 7<one; echo >ready; exec 8<&7; sleep 1000"],
    );
    run.restorable();
    let one = run.live.path("one").canonicalize().unwrap();
    let key = format!("fd[9]:{}", text(&one).trim_start_matches('/'));
    let two = run.live.path("two");
    let mut command = Command::new("bash");
    command.args([
        "-c",
        r#"exec 9<"$1"; shift; exec "$@""#,
        "-",
        text(&two),
        RCRIU,
        "restore",
        "-d",
    ]);
    command.arg("-D").arg(run.images()).args(["--inherit-fd", &key]);
    fine(run.bounded(command));
    let link = fs::read_link(format!("/proc/{}/fd/7", run.pid())).unwrap();
    assert_eq!(link, two.canonicalize().unwrap());
}

/// A library is replaced by one of the same size.
fn restored_file_validation(_: &str) {
    let dir = directory();
    let copy = dir.path().join("sleep");
    fs::copy("/bin/sleep", &copy).unwrap();
    require(Cap::Ptrace);
    let live = Live::program(text(&copy), &["1000"], directory());
    wait_for("the program", || {
        fs::read_link(format!("/proc/{}/exe", live.root)).is_ok_and(|exe| exe == copy)
    });
    thread::sleep(Duration::from_millis(50));
    let mut run = Run { live, dumps: 0 };
    fine(run.dump_as(&["dump", "--file-validation=buildid"]));
    run.live.wait_gone();
    // The build-id is a note; its last bytes are changed.
    let mut bytes = fs::read(&copy).unwrap();
    let note = bytes.windows(4).position(|window| window == b"GNU\0").unwrap();
    let found: Vec<usize> = (note..note + 4096)
        .filter(|at| bytes[*at - 12..*at] == [4, 0, 0, 0, 20, 0, 0, 0, 3, 0, 0, 0])
        .collect();
    let at = found.first().expect("a build-id") + 4;
    bytes[at] ^= 0xff;
    let times = fs::metadata(&copy).unwrap().modified().unwrap();
    fs::write(&copy, bytes).unwrap();
    File::options().write(true).open(&copy).unwrap().set_modified(times).unwrap();
    refused(&run.restore(&[]), "build");
    fine(run.restore(&["--file-validation=filesize"]));
}

// Of all commands.

fn display_stats(command: &str) {
    let (output, ..) = usual(command, &[]);
    assert!(!fine(output).contains("time: "));
    let (output, ..) = usual(command, &["--display-stats"]);
    assert!(fine(output).contains("time: "), "{command}");
}

fn images_dir(command: &str) {
    // -D of the usual run, and nothing is where it was run.
    let (output, images, _keep) = usual(command, &["-o", "the-log"]);
    fine(output);
    assert!(images.join("the-log").exists());
    let absent = images.join("absent");
    let output = match command {
        "check" => rcriu(&[command, "-o", "the-log", "--images-dir", text(&absent)]),
        "dedup" => rcriu(&[command, "--images-dir", text(&absent)]),
        "cpuinfo" => rcriu(&[command, "dump", "--images-dir", text(&absent)]),
        "service" => service_once(&["--images-dir", text(&absent)]),
        "page-server" => rcriu(&[command, "--images-dir", text(&absent)]),
        _ => rcriu(
            &[command, "-t1", "-D", text(&absent)][..if command == "restore" { 1 } else { 2 }]
                .iter()
                .copied()
                .chain(["--images-dir", text(&absent)])
                .collect::<Vec<_>>(),
        ),
    };
    refused(&output, "absent");
}

fn work_dir(command: &str) {
    let dir = directory();
    let words = ["--work-dir", text(dir.path()), "-o", "the-log"];
    let (output, images, _keep) = usual(command, &words);
    fine(output);
    assert!(dir.path().join("the-log").exists() && !images.join("the-log").exists());
    let stats = match command {
        "dump" | "pre-dump" => "stats-dump",
        "restore" => "stats-restore",
        _ => return,
    };
    assert!(dir.path().join(stats).exists());
}

fn log_file(command: &str) {
    let (output, images, _keep) = usual(command, &["--log-file", "the-log", "-v4"]);
    fine(output);
    assert!(fs::metadata(images.join("the-log")).unwrap().len() > 0, "{command}");
}

fn verbosity(command: &str) {
    let mut lines = Vec::new();
    for level in ["-v0", "-v2", "--verbosity=4"] {
        let (output, images, _keep) = usual(command, &["--log-file", "the-log", level]);
        fine(output);
        lines.push(fs::read_to_string(images.join("the-log")).unwrap().lines().count());
    }
    assert!(lines[0] == 0 && lines[1] < lines[2], "{command}: {lines:?}");
}

/// Descriptor 1 is closed: what would be printed is not, and is not in an image either.
fn close(command: &str) {
    // What is said goes to standard output, except by commands that print nothing.
    let (fd, words): (_, &[&str]) = match command {
        "dump" | "pre-dump" | "restore" => ("1", &["--display-stats"]),
        "cpuinfo" | "service" | "page-server" => ("2", &["-v4"]),
        _ => ("1", &[]),
    };
    let (output, _, _keep) = usual(command, words);
    assert!(output.status.success());
    assert!(!said(&output).is_empty(), "{command}");
    let (output, images, _keep) = usual(command, &[words, &["--close", fd]].concat());
    assert_eq!(fine(output), "", "{command}");
    if !matches!(command, "check" | "service" | "page-server") {
        fine(imgfs(&["check", text(&images)]));
    }
}

fn config(command: &str) {
    let dir = directory();
    let file = dir.path().join("options");
    fs::write(&file, "log-file from-file # as it says\nverbosity 4\n").unwrap();
    let (output, images, _keep) = usual(command, &["--config", text(&file)]);
    fine(output);
    assert!(images.join("from-file").exists());
    fs::write(&file, "no-such-option\n").unwrap();
    let (output, ..) = usual(command, &["--config", text(&file)]);
    refused(&output, "line 1: there is no such option");
}

fn no_default_config(command: &str) {
    let home = directory();
    fs::create_dir(home.path().join(".rcriu")).unwrap();
    fs::write(home.path().join(".rcriu/default.conf"), "no-such-option\n").unwrap();
    let run = |words: &[&str]| {
        let mut rcriu = Command::new(RCRIU);
        // What is refused comes after the files were read.
        rcriu.args([command, "--ms"]).args(words).env("HOME", home.path()).output().unwrap()
    };
    refused(&run(&[]), "default.conf line 1");
    refused(&run(&["--no-default-config"]), "--ms is not supported yet");
}

// Check.

fn feature_sets(command: &str) {
    let names = |words: &[&str]| {
        let mut rcriu = Command::new(RCRIU);
        rcriu.arg(command).args(words).env("RCRIU_WITHOUT", "timer_cr_ids,tracefs");
        let output = rcriu.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let last = text.lines().last().unwrap().to_owned();
        (output.status.success(), last)
    };
    if !names(&[]).0 {
        // Every answer is no: not root.
        return;
    }
    for (option, timers, tracepoints) in
        [("--extra", true, false), ("--experimental", false, true), ("--all", true, true)]
    {
        let (yes, last) = names(&[option]);
        assert!(!yes, "{option}: {last}");
        assert!(last.starts_with("Does not look good: "), "{last}");
        assert_eq!(last.contains("timer_cr_ids"), timers, "{option}: {last}");
        assert_eq!(last.contains("tracepoints"), tracepoints, "{option}: {last}");
    }
}

fn feature(command: &str) {
    assert_eq!(fine(rcriu(&[command, "--feature", "memfd"])), "ok       memfd\nLooks good.\n");
    assert!(fine(rcriu(&[command, "--feature", "list"])).contains(" memfd "));
    refused(&rcriu(&[command, "--feature", "bogus"]), "bogus is not a feature");
}

// Deduplication.

fn link(command: &str) {
    let dir = directory();
    let (dirs, _) = three(dir.path());
    assert!(!dirs[1].join("parent").exists());
    fine(rcriu(&[command, "--link", text(&dirs[0]), text(&dirs[1]), text(&dirs[2])]));
    assert!(dirs[1].join("parent").exists() && dirs[2].join("parent").exists());
}

fn keep_originals(command: &str) {
    let dir = directory();
    let (dirs, _) = three(dir.path());
    fine(rcriu(&[command, "--link", "--keep-originals", text(&dirs[0]), text(&dirs[1])]));
    assert!(!dirs[1].join("parent").exists());
    assert!(dir.path().join("2.linked/parent").exists());
}

fn rewrite(command: &str) {
    let dir = directory();
    let (dirs, _) = three(dir.path());
    fine(rcriu(&[command, "--link", text(&dirs[0]), text(&dirs[1])]));
    // Of a file system that frees nothing, files are made anew; here, it is no worse.
    let inode = |dir: &Path| {
        use std::os::unix::fs::MetadataExt;
        let pages = fs::read_dir(dir).unwrap().flatten();
        let pages = pages.filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"));
        pages
            .map(|entry| (entry.metadata().unwrap().ino(), stored_bytes(&entry.path())))
            .collect::<Vec<_>>()
    };
    let before = inode(&dirs[0]);
    fine(rcriu(&[command, "--rewrite", "-D", text(&dirs[1])]));
    assert_ne!(before, inode(&dirs[0]));
}

fn reflink(command: &str) {
    let dir = directory();
    let (dirs, _) = three(dir.path());
    let output = rcriu(&[command, "--reflink", "-D", text(&dirs[0])]);
    let text = said(&output);
    // It shares blocks, or says that this file system cannot.
    assert!(text.contains("share") || text.contains("reflink"), "{text}");
}

fn dedup_json(command: &str) {
    let dir = directory();
    let (dirs, _) = three(dir.path());
    let output = fine(rcriu(&[command, "--json", "--link", text(&dirs[0]), text(&dirs[1])]));
    assert!(serde_json::from_str::<serde_json::Value>(&output).is_ok(), "{output}");
}

// Show and imgfs.

fn pretty(command: &str) {
    let dir = directory();
    let (dirs, _) = three(dir.path());
    let image = dirs[0].join("inventory.img");
    let (plain, pretty) =
        (fine(rcriu(&[command, text(&image)])), fine(rcriu(&[command, "--pretty", text(&image)])));
    assert!(pretty.lines().count() > plain.lines().count());
    let read = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    assert_eq!(read(&plain), read(&pretty));
}

/// What is said on standard error becomes more, where there is more to say.
fn says_no_less(command: &str) {
    let dir = directory();
    let (dirs, _) = three(dir.path());
    let (program, words) = match command {
        "show" => (RCRIU, vec!["show".to_owned(), text(&dirs[0].join("inventory.img")).to_owned()]),
        _ => {
            let out = dir.path().join("out");
            (IMGFS, vec!["flatten".to_owned(), text(&dirs[2]).to_owned(), text(&out).to_owned()])
        }
    };
    let mut counts = Vec::new();
    for verbose in ["-v", "-vvv"] {
        let _ = fs::remove_dir_all(dir.path().join("out"));
        let output = Command::new(program).args(&words).arg(verbose).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        counts.push(output.stderr.len());
    }
    assert!(
        counts[0] <= counts[1] && (command == "show" || counts[1] > 0),
        "{command}: {counts:?}"
    );
}

fn read_only(command: &str, dirs: &[PathBuf], root: &Path) -> Vec<String> {
    let root = text(root).to_owned();
    let name = |at: usize| dirs[at].file_name().unwrap().to_str().unwrap().to_owned();
    match command {
        "ls" => vec!["ls".to_owned(), root],
        "imgfs check" => vec!["check".to_owned(), root],
        "mounts" => vec![command.to_owned()],
        "ps" | "fds" | "info" | "map" => vec![command.to_owned(), peers_chain()],
        "maps" => vec![command.to_owned(), peers_chain(), "293".to_owned()],
        _ => vec!["diff".to_owned(), root, name(0), name(1)],
    }
}

fn json(command: &str) {
    let dir = directory();
    let (dirs, _) = three(dir.path());
    let words = read_only(command, &dirs, dir.path());
    let parsed = |json: bool| {
        let mut imgfs = Command::new(IMGFS);
        imgfs.args(&words).args(json.then_some("--json"));
        serde_json::from_slice::<serde_json::Value>(&imgfs.output().unwrap().stdout).is_ok()
    };
    assert!(parsed(true) && !parsed(false), "{command}");
}

fn duplicates(command: &str) {
    let dir = directory();
    three(dir.path());
    let plain = fine(imgfs(&[command, text(dir.path())]));
    let counted = fine(imgfs(&[command, "--duplicates", text(dir.path())]));
    assert_ne!(plain.lines().next(), counted.lines().next());
}

fn quiet(command: &str) {
    let dir = directory();
    three(dir.path());
    let output = imgfs(&[command, "--quiet", text(dir.path()), "1", "2"]);
    assert_eq!((output.status.code(), said(&output).as_str()), (Some(1), ""));
    assert_ne!(said(&imgfs(&[command, text(dir.path()), "1", "2"])), "");
}

/// Two snapshots of a chain differ in what is flattened, or seen through a mount.
fn flatten_snapshot(command: &str) {
    let dir = directory();
    let (dirs, _) = three(dir.path());
    fine(rcriu(&["dedup", "--link", text(&dirs[0]), text(&dirs[1])]));
    let outs = ["1", "2"].map(|name| {
        let out = dir.path().join(format!("out-{name}"));
        fine(imgfs(&[command, text(&dirs[1]), text(&out), "--snapshot", name]));
        out.join("pagemap-12.img").exists()
    });
    assert_eq!(outs, [false, true]);
}

/// A chain of three snapshots that CRIU wrote, of processes 293 and 295.
fn peers_chain() -> String {
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/criu42-chain/chain").to_owned()
}

/// What a process had mapped by the first snapshot, and by the last, is not the same.
fn look_snapshot(command: &str) {
    let dir = directory();
    let chain = peers_chain();
    let looks = ["1", "3"].map(|name| {
        let copy = dir.path().join(name);
        let mut words = vec![command, &chain, "--snapshot", name];
        match command {
            "maps" => words.push("293"),
            "cat" => words.push("json/inventory.img.json"),
            "get" => words.extend(["json/inventory.img.json", text(&copy)]),
            _ => {}
        }
        let printed = fine(imgfs(&words));
        if command == "get" { fs::read_to_string(copy).unwrap() } else { printed }
    });
    match command {
        // Neither program nor files changed in between.
        "fds" => assert_eq!(looks[0], looks[1]),
        _ => assert_ne!(looks[0], looks[1]),
    }
    let output = imgfs(&[command, &chain, "--snapshot", "7", "293", "x"]);
    assert!(!output.status.success());
}

/// Makes an archive of some snapshots of [`peers_chain`].
fn archive_of(dir: &Path, name: &str, snapshots: &[&str]) -> PathBuf {
    let archive = dir.join(name);
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(peers_chain()).arg("-caf").arg(&archive).args(snapshots);
    assert!(tar.status().unwrap().success());
    archive
}

/// Runs a command on an archive that has snapshot 2, and returns whether it did what it
/// does, and what it said.
fn on_archive(command: &str, dir: &Path, archive: &Path, options: &[&str]) -> (bool, String) {
    let name = command.trim_start_matches("imgfs ");
    let point = dir.join("new");
    let new = dir.join("new.tar");
    let mut words = vec![name, text(archive)];
    match name {
        "diff" => words.extend(["1", "2"]),
        "maps" => words.push("293"),
        "cat" => words.push("pages-2.img"),
        "get" => words.extend(["pages-2.img", text(&point)]),
        "flatten" | "mount" => words.push(text(&point)),
        "pack" => words.push(text(&new)),
        _ => {}
    }
    let _ = fs::remove_dir_all(&point).or_else(|_| fs::remove_file(&point));
    let _ = fs::remove_file(&new);
    if name == "mount" {
        require(Cap::Fuse);
        fs::create_dir_all(&point).unwrap();
    }
    let output = imgfs(&[&words[..], options].concat());
    let read = || fs::read(point.join("pages-2.img")).is_ok();
    // As diff(1), which says 2 when it fails.
    let expected = if name == "diff" { 1 } else { 0 };
    let good = output.status.code() == Some(expected) && (name != "mount" || read());
    if is_mounted(&point) {
        fine(imgfs(&["umount", text(&point)]));
    }
    (good, said(&output))
}

/// The parents of an archive's snapshot are in the archive that is named.
fn previous(command: &str) {
    let dir = directory();
    let base = archive_of(dir.path(), "base.tar", &["1"]);
    let tip = archive_of(dir.path(), "tip.tar", &["2"]);
    let (good, said) = on_archive(command, dir.path(), &tip, &["--previous", text(&base)]);
    assert!(good, "{command}: {said}");
    let (alone, without) = on_archive(command, dir.path(), &tip, &[]);
    // What processes are is in the snapshot itself.
    assert!(!alone || without != said || ["ps", "fds"].contains(&command), "{command}: {without}");
}

/// A compressed archive is unpacked into the directory.
fn cache_dir(command: &str) {
    let dir = directory();
    let archive = archive_of(dir.path(), "a.tar.gz", &["1", "2"]);
    let cache = dir.path().join("cache");
    let options = ["--cache-dir", text(&cache)];
    let (good, said) = on_archive(command, dir.path(), &archive, &options);
    assert!(good && fs::read_dir(&cache).unwrap().count() == 1, "{command}: {said}");
}

/// A larger archive is refused.
fn cache_limit(command: &str) {
    let dir = directory();
    let archive = archive_of(dir.path(), "a.tar.gz", &["1", "2"]);
    let cache = dir.path().join("cache");
    for (limit, fits) in [("10K", false), ("10M", true)] {
        let options = ["--cache-dir", text(&cache), "--cache-limit", limit];
        let (good, said) = on_archive(command, dir.path(), &archive, &options);
        assert!(good == fits && said.contains("--cache-limit") != fits, "{command}: {said}");
    }
}

/// What is written is an archive, and no directory.
fn flatten_archive(command: &str) {
    let dir = directory();
    let out = dir.path().join("out.tar");
    fine(imgfs(&[command, &peers_chain(), text(&out), "--archive"]));
    assert!(fine(imgfs(&["ls", text(&out)])).contains("checkpoint"));
}

/// An archive that exists is replaced.
fn force(command: &str) {
    let dir = directory();
    let out = dir.path().join("out.tar");
    fs::write(&out, "").unwrap();
    let archive: &[&str] = if command == "flatten" { &["--archive"] } else { &[] };
    let chain = peers_chain();
    let words = [&[command, &chain, text(&out)][..], archive].concat();
    refused(&imgfs(&words), "-f replaces it");
    fine(imgfs(&[&words[..], &["--force"]].concat()));
    assert_ne!(fs::read(&out).unwrap(), b"");
}

/// What is newer than the snapshot is not packed.
fn pack_snapshot(command: &str) {
    let dir = directory();
    let counts = ["1", "2"].map(|name| {
        let out = dir.path().join(format!("{name}.tar"));
        fine(imgfs(&[command, &peers_chain(), text(&out), "--snapshot", name]));
        fine(imgfs(&["ls", text(&out)])).lines().count()
    });
    assert_eq!(counts, [2, 3]);
}

/// Draws the chain of CRIU's.
fn mapped(words: &[&str]) -> String {
    fine(imgfs(&[&["map", &peers_chain()], words].concat()))
}

/// Each choice of what is drawn leaves something out.
fn map_parts(_: &str) {
    let all = mapped(&[]);
    for (words, gone) in [
        (["--snapshot", "2"], "\n3  "),
        (["--pid", "293"], "pid 295"),
        (["--shmem", "1024"], "pid 293"),
    ] {
        let part = mapped(&words);
        assert!(all.contains(gone) && !part.contains(gone), "{words:?}: {part}");
    }
    refused(&imgfs(&["map", &peers_chain(), "--pid", "7"]), "no such memory");
    refused(&imgfs(&["map", &peers_chain(), "--snapshot", "7"]), "no snapshot is called");
}

/// More processes than are drawn usually.
fn map_all(command: &str) {
    const PROCESSES: u64 = 40;
    let dir = directory();
    let mut chain = TestChain::new(dir.path());
    let layer = chain.layer("1");
    for pid in 1..=PROCESSES {
        let pages_id = u32::try_from(pid).unwrap();
        chain.memory(layer, MemoryId::Private(pid), pages_id, &[(16, 2, Presence::Present)]);
    }
    let some = fine(imgfs(&[command, text(dir.path())]));
    let all = fine(imgfs(&[command, text(dir.path()), "--all"]));
    assert!(some.contains("more are not drawn") && !all.contains("more are not drawn"));
    assert_eq!(all.matches(" in the last snapshot").count() as u64, PROCESSES);
}

fn map_twice(command: &str) {
    let dir = directory();
    three(dir.path());
    let [plain, twice] = [&[][..], &["--twice"]]
        .map(|words| fine(imgfs(&[&[command, text(dir.path())], words].concat())));
    assert!(twice.contains('%') && twice.contains("an older copy is too"), "{twice}");
    assert!(!plain.contains("an older copy is too"), "{plain}");
}

fn map_output(command: &str) {
    let dir = directory();
    for (name, begin) in [("map.svg", "<?xml"), ("map.html", "<!doctype html>")] {
        let path = dir.path().join(name);
        assert_eq!(mapped(&["-o", text(&path)]), "");
        let written = fs::read_to_string(&path).unwrap();
        assert!(written.starts_with(begin) && written.contains("<title>Memory of "), "{written}");
        // Nothing is fetched from elsewhere.
        assert!(!written.replace("http://www.w3.org/2000/svg", "").contains("http"), "{name}");
    }
    let path = dir.path().join("map.png");
    refused(&imgfs(&[command, &peers_chain(), "-o", text(&path)]), "end in .svg or .html");
    assert!(!path.exists());
}

/// In a pipe there are no colours, unless they are asked for.
fn map_color(_: &str) {
    assert!(!mapped(&[]).contains('\x1b'));
    assert!(mapped(&["--color", "always"]).contains("\x1b[38;5;"));
    let terminal = |environment: &str| {
        let line = format!("{environment} {IMGFS} map {}", peers_chain());
        let output = Command::new("script").args(["-qec", &line, "/dev/null"]).output().unwrap();
        fine(output)
    };
    assert!(terminal("NO_COLOR= TERM=xterm").contains("\x1b[38;5;"));
    assert!(!terminal("NO_COLOR=1 TERM=xterm").contains('\x1b'));
}

fn map_width(_: &str) {
    let longest = |words: &[&str]| {
        let text = mapped(words);
        let rows =
            text.lines().filter(|line| line.starts_with(['1', '2', '3']) && !line.contains(','));
        rows.map(str::len).max().unwrap()
    };
    assert!(longest(&["--width", "50"]) <= 50);
    assert!(longest(&["--width", "120"]) > 50);
}

/// A mount that is gone at the end.
struct Mount {
    dir: tempfile::TempDir,
    dirs: Vec<PathBuf>,
    point: PathBuf,
}

impl Mount {
    fn new() -> Self {
        require(Cap::Fuse);
        let dir = directory();
        let (dirs, _) = three(dir.path());
        fine(rcriu(&["dedup", "--link", text(&dirs[0]), text(&dirs[1])]));
        let point = dir.path().join("mnt");
        fs::create_dir(&point).unwrap();
        Self { dir, dirs, point }
    }

    fn mount(&self, words: &[&str]) -> Output {
        let begin = Instant::now();
        loop {
            // The daemon keeps what it has for standard error.
            let mut command = Command::new(IMGFS);
            command.args(["mount", text(&self.dirs[1]), text(&self.point)]).args(words);
            let output = common::live::bounded(command, &self.dir.path().join("said"));
            // The one before may have a moment to live after its mount is gone.
            let ends = said(&output).contains("is in use by ");
            if !ends || begin.elapsed() > Duration::from_secs(20) * common::slowness() {
                return output;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The options of the mount, as the kernel has them.
    fn kernel_options(&self) -> String {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let point = text(&self.point);
        mounts.lines().find(|line| line.contains(point)).unwrap_or_default().to_owned()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if is_mounted(&self.point) {
            let _ = imgfs(&["umount", text(&self.point)]);
        }
    }
}

fn mount_snapshot(_: &str) {
    let mount = Mount::new();
    fine(mount.mount(&["--snapshot", "1"]));
    assert!(!mount.point.join("pagemap-12.img").exists());
    fine(imgfs(&["umount", text(&mount.point)]));
    fine(mount.mount(&[]));
    assert!(mount.point.join("pagemap-12.img").exists());
}

fn mount_punch(_: &str) {
    let mount = Mount::new();
    fine(mount.mount(&["--punch"]));
    assert!(!mount.kernel_options().contains(" ro,"), "{}", mount.kernel_options());
    fine(imgfs(&["umount", text(&mount.point)]));
    fine(mount.mount(&[]));
    assert!(mount.kernel_options().contains(" ro,"), "{}", mount.kernel_options());
}

fn mount_foreground(_: &str) {
    let mount = Mount::new();
    let mut command = Command::new(IMGFS);
    command.args(["mount", text(&mount.dirs[1]), text(&mount.point), "--foreground"]);
    let log = File::create(mount.dir.path().join("said")).unwrap();
    let mut daemon = command.stdin(Stdio::null()).stderr(log).spawn().unwrap();
    wait_for("the mount", || is_mounted(&mount.point));
    assert!(daemon.try_wait().unwrap().is_none());
    fine(imgfs(&["umount", text(&mount.point)]));
    assert!(daemon.wait().unwrap().success());
}

fn mount_allow_other(_: &str) {
    let mount = Mount::new();
    fine(mount.mount(&["--allow-other"]));
    assert!(mount.kernel_options().contains("allow_other"), "{}", mount.kernel_options());
    fine(imgfs(&["umount", text(&mount.point)]));
    fine(mount.mount(&[]));
    assert!(!mount.kernel_options().contains("allow_other"), "{}", mount.kernel_options());
}

/// The first bytes of a program that a process runs are those of its file.
fn mount_mapped_files(_: &str) {
    let mut mount = Mount::new();
    let mut run = Run::new();
    fine(run.dump("dump", &[]));
    mount.dirs[1] = run.images();
    let maps = fs::read_to_string(format!("/proc/{}/maps", run.pid())).unwrap();
    let line = maps.lines().find(|line| line.ends_with("/workload")).unwrap();
    let start = u64::from_str_radix(line.split_once('-').unwrap().0, 16).unwrap();
    let memory = mount.point.join(format!("proc/{}/mem", run.pid()));
    for (who, shown) in [("own", true), ("never", false)] {
        fine(mount.mount(&["--mapped-files", who]));
        let mut bytes = [0; 4];
        let read = File::open(&memory).unwrap().read_exact_at(&mut bytes, start);
        assert_eq!(read.is_ok() && bytes == *b"\x7fELF", shown, "{who}: {read:?} {bytes:?}");
        fine(imgfs(&["umount", text(&mount.point)]));
    }
}

fn mount_threads(_: &str) {
    let mount = Mount::new();
    let count = |number: &str| {
        let mut command = Command::new(IMGFS);
        command.args([
            "mount",
            text(&mount.dirs[1]),
            text(&mount.point),
            "-f",
            "--threads",
            number,
        ]);
        let log = File::create(mount.dir.path().join("said")).unwrap();
        let mut daemon = command.stdin(Stdio::null()).stderr(log).spawn().unwrap();
        wait_for("the mount", || is_mounted(&mount.point));
        let task = format!("/proc/{}/task", daemon.id());
        let threads = || fs::read_dir(&task).unwrap().count();
        // They begin one after the other.
        wait_for("the threads", || threads() >= number.parse().unwrap());
        let threads = threads();
        fine(imgfs(&["umount", text(&mount.point)]));
        daemon.wait().unwrap();
        threads
    };
    let most = 8;
    assert!(count("2") < most);
    assert!(count("9") > most);
}

/// What a mount says of composing `pages-11.img`, on a file system that shares no blocks.
fn said_of_composing(words: &[&str]) -> String {
    let mount = Mount::new();
    let log = mount.dir.path().join("the-log");
    let words: Vec<_> = words.iter().copied().chain(["-vv", "--log-file", text(&log)]).collect();
    fine(mount.mount(&words));
    for entry in fs::read_dir(&mount.point).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::read(path).unwrap();
        }
    }
    fine(imgfs(&["umount", text(&mount.point)]));
    fs::read_to_string(log).unwrap()
}

fn mount_compose(_: &str) {
    assert!(said_of_composing(&["--compose", "always"]).contains("not composed: share blocks"));
    assert!(!said_of_composing(&["--compose", "never"]).contains("composed"));
    refused(&Mount::new().mount(&["--compose", "often"]), "often");
}

fn mount_compose_dir(_: &str) {
    let words = ["--compose", "always", "--compose-dir", "/dev/shm"];
    assert!(said_of_composing(&words).contains("Invalid cross-device link"));
    refused(&Mount::new().mount(&["--compose-dir", "/nowhere"]), "/nowhere");
}

fn mount_log_file(_: &str) {
    let mount = Mount::new();
    let log = mount.dir.path().join("the-log");
    fine(mount.mount(&["-vv", "--log-file", text(&log)]));
    wait_for("the log", || fs::metadata(&log).is_ok_and(|log| log.len() > 0));
}

/// A mount says what it shows and where it logs, unless it is to be quiet.
fn mount_quiet(_: &str) {
    let mount = Mount::new();
    assert!(!fine(mount.mount(&["--quiet"])).contains("Snapshot: "));
    fine(imgfs(&["umount", text(&mount.point)]));
    let log = mount.dir.path().join("the-log");
    let said = fine(mount.mount(&["--log-file", text(&log)]));
    for wanted in ["mounted ", "Snapshot:   2, one of 2, ", "Processes: ", "Memory: ", text(&log)] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
}

fn mount_without(_: &str) {
    let mount = Mount::new();
    fine(mount.mount(&["--without", "mem,core", "-o", "without=shmem:json"]));
    let there = |name: &str| mount.point.join(name).exists();
    for name in ["mem", "core", "shmem", "shmem-by-name", "json", "snapshots/1/mem"] {
        assert!(!there(name), "{name}");
    }
    assert!(there("proc") && there("snapshots/1/proc") && there("README"));
}

fn mount_options(_: &str) {
    let mount = Mount::new();
    fine(mount.mount(&["-o", "snapshot=1"]));
    assert!(!mount.point.join("pagemap-12.img").exists());
    fine(imgfs(&["umount", text(&mount.point)]));
    refused(&mount.mount(&["-o", "bogus"]), "bogus");
}

fn lazy(command: &str) {
    let mount = Mount::new();
    fine(mount.mount(&[]));
    let _open = File::open(mount.point.join("inventory.img")).unwrap();
    refused(&imgfs(&[command, text(&mount.point)]), "");
    assert!(is_mounted(&mount.point));
    fine(imgfs(&[command, "--lazy", text(&mount.point)]));
    assert!(!is_mounted(&mount.point));
}

/// Whatever the program, an error is one line, and what the user can do is another.
#[test]
fn a_remedy_is_a_line_of_its_own_on_standard_error_and_in_the_log() {
    let dir = directory();
    let output = rcriu(&[
        "dedup",
        "--no-default-config",
        "--link",
        "-W",
        text(dir.path()),
        "-o",
        "the-log",
        text(dir.path()),
    ]);
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "rcriu: there is nothing to link\n  help: name two image directories or more, the oldest \
         first\n"
    );
    let log = fs::read_to_string(dir.path().join("the-log")).unwrap();
    let lines: Vec<_> = log.lines().map(|line| line.split_once(' ').unwrap().1).collect();
    let [.., problem, remedy] = lines.as_slice() else { panic!("{log}") };
    assert!(problem.starts_with("ERROR rcriu["), "{log}");
    assert!(problem.ends_with("]: there is nothing to link"), "{log}");
    assert!(remedy.starts_with("HELP  rcriu["), "{log}");
    assert!(remedy.ends_with("]: name two image directories or more, the oldest first"), "{log}");
    // Without a file, the log goes to standard error, and repeats nothing.
    let output = rcriu(&["dump", "--no-default-config", "-D", text(dir.path())]);
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "rcriu: no process given\n  help: use -t PID\n"
    );
    let output = imgfs(&["commit", "-v", text(dir.path())]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(said.lines().count(), 1, "{said}");
}
