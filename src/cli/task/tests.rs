//! Whole command lines.

use std::collections::BTreeSet;

use clap::{CommandFactory, FromArgMatches, Parser};

use ::log::LevelFilter;

use super::*;
use crate::{
    action,
    dump::{self, Goal},
    inject::{FreezeOptions, Outcome},
    lazy, page_server,
    pages::{ServerOptions, ServerPlace},
    res::{
        file::{
            Connections, ConnectionsToDump, ConnectionsToRestore, DumpOptions, External,
            GhostOptions, Inherited, LockOptions, Orphans, PacketLock, RestoreOptions,
            TerminalOptions, UnixOptions, Validation, WatchOptions,
        },
        ns,
        tree::{self, cgroup, processor, session},
    },
    restore,
    step::stats,
    track::{self, Tracker},
    units::HostPid,
};

/// Every long option of CRIU 4.2 with a value that it accepts, as `crtools.c` and
/// `config.c` have them, but help and version.
const OF_CRIU: &str = "
    --tree=1 --leave-stopped --leave-running --restore-detached --restore-sibling --daemon
    --images-dir=d --work-dir=d --log-file=f --join-ns=net:1 --root=/r --ext-unix-sk
    --ext-unix-sk=1,2 --tcp-established --close=9 --log-pid --evasive-devices --pidfile=f
    --veth-pair=a=b --action-script=f --link-remap --shell-job --file-locks --page-server
    --address=a --port=1 --prev-images-dir=d --ms --track-mem --auto-dedup --libdir=d --cpu-cap
    --cpu-cap=none --force-irmap --ext-mount-map=a:b --exec-cmd --manage-cgroups
    --manage-cgroups=full --cgroup-root=c:/d --inherit-fd=fd[1]:k --feature=uffd --skip-mnt=p
    --enable-fs=a,b --enable-external-sharing --enable-external-masters --freeze-cgroup=d
    --ghost-limit=1M --irmap-scan-path=p --lsm-profile=selinux:a --timeout=1 --external=tty[1:2]
    --empty-ns=net --lazy-pages --extra --experimental --all --cgroup-props=p
    --cgroup-props-file=f --cgroup-dump-controller=c --skip-in-flight --deprecated
    --display-stats --weak-sysctls --status-fd=1 --tcp-close --verbosity --verbosity=4
    --ps-socket=1 --stream --config=f --no-default-config --tls-cacert=f --tls-cacrl=f
    --tls-cert=f --tls-key=f --tls --tls-no-cn-verify --cgroup-yard=p --pre-dump-mode=read
    --file-validation=filesize --skip-file-rwx-check --lsm-mount-context=c --network-lock=skip
    --mntns-compat-mode --unprivileged --ghost-fiemap --allow-uprobes";

/// Those that CRIU allows to be taken back.
const TAKEN_BACK: &str = "
    restore-detached restore-sibling daemon tcp-established log-pid evasive-devices link-remap
    shell-job file-locks page-server track-mem auto-dedup force-irmap extra experimental
    skip-in-flight deprecated display-stats weak-sysctls tcp-close stream tls
    skip-file-rwx-check mntns-compat-mode unprivileged ghost-fiemap allow-uprobes";

/// Our own.
const OURS: [&str; 11] = [
    "tracker",
    "chain",
    "lazy",
    "record",
    "live",
    "live-stopped",
    "link",
    "keep-originals",
    "rewrite",
    "reflink",
    "json",
];

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: TaskArgs,
}

/// Reads a command line without the program's name; files of the system have no
/// part in it.
fn read(line: &str) -> Result<(TaskArgs, Vec<Given>), String> {
    let words = ["rcriu", "--no-default-config"].into_iter().chain(line.split_whitespace());
    let prepared = prepare(words.map(OsString::from).collect());
    let prepared = prepared.map_err(|unprepared| unprepared.error.to_string())?;
    let parsed = Line::command().try_get_matches_from(
        // The command is a subcommand in the program.
        prepared.words.iter().enumerate().filter(|(at, _)| *at != 1).map(|(_, word)| word),
    );
    let parsed = parsed.and_then(|matches| Line::from_arg_matches(&matches));
    let args = parsed.map_err(|error| error.to_string())?.args;
    Ok((args, prepared.given))
}

fn args(line: &str) -> TaskArgs {
    read(line).unwrap_or_else(|error| panic!("{line}: {error}")).0
}

fn dumped(line: &str) -> dump::Options {
    convert::dump_options(&args(line), false).unwrap_or_else(|error| panic!("{line}: {error}"))
}

fn restored(line: &str) -> restore::Options {
    convert::restore_options(&args(line)).unwrap_or_else(|error| panic!("{line}: {error}"))
}

#[test]
fn every_option_of_criu_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("f");
    std::fs::write(&config, "").unwrap();
    for option in OF_CRIU.split_whitespace() {
        let option = option.replace("--config=f", &format!("--config={}", config.display()));
        for task in Task::ALL {
            let line = format!("{} {option}", task.name());
            read(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }
    for option in TAKEN_BACK.split_whitespace() {
        let (_, given) = read(&format!("dump --{option} --no-{option}")).unwrap();
        assert_eq!(given.len(), 1, "--no-{option} leaves --no-default-config: {given:?}");
    }
}

#[test]
fn the_table_has_every_option_and_no_other() {
    let command = TaskArgs::augment_args(Command::new("task"));
    let known: BTreeSet<&str> = command.get_arguments().filter_map(|arg| arg.get_long()).collect();
    let unique: BTreeSet<&str> = table::ROWS.iter().map(|row| row.name).collect();
    for task in Task::ALL {
        let rows = table::ROWS.iter().filter(|row| row.on.has(task.as_set()));
        let rows: Vec<&str> = rows.map(|row| row.name).collect();
        assert_eq!(rows.len(), rows.iter().collect::<BTreeSet<_>>().len(), "{task:?}");
    }
    assert_eq!(unique, known);
    let of_criu = OF_CRIU.split_whitespace().map(|option| {
        let name = option.trim_start_matches("--").split('=').next().unwrap();
        if name == "daemon" { "restore-detached" } else { name }
    });
    let expected: BTreeSet<&str> = of_criu.chain(OURS).collect();
    assert_eq!(unique, expected);
}

#[test]
fn short_letters_are_those_of_criu() {
    let command = TaskArgs::augment_args(Command::new("task"));
    let letters: BTreeSet<(char, &str)> = command
        .get_arguments()
        .filter_map(|arg| Some((arg.get_short()?, arg.get_long()?)))
        .collect();
    let expected = [
        ('D', "images-dir"),
        ('J', "join-ns"),
        ('L', "libdir"),
        ('M', "ext-mount-map"),
        ('R', "leave-running"),
        ('S', "restore-sibling"),
        ('W', "work-dir"),
        ('d', "restore-detached"),
        ('j', "shell-job"),
        ('l', "file-locks"),
        ('o', "log-file"),
        ('r', "root"),
        ('s', "leave-stopped"),
        ('t', "tree"),
        ('v', "verbosity"),
        ('x', "ext-unix-sk"),
    ];
    assert_eq!(letters, BTreeSet::from(expected));
}

fn default_dump() -> dump::Options {
    dump::Options {
        root: HostPid(7),
        goal: Goal::Tree(Outcome::Kill),
        store: dump::Store {
            images_dir: ".".into(),
            parent: None,
            chain: None,
            free_parent: false,
            server: None,
        },
        freeze: FreezeOptions::new(10),
        common: tree::DumpOptions {
            sessions: session::Options::new(false),
            cgroups: cgroup::Options::new(cgroup::Mode::None),
            processor: processor::Options::default(),
        },
        namespaces: ns::Options::default(),
        files: DumpOptions {
            terminals: TerminalOptions::new(false),
            unix: UnixOptions::new(false),
            connections: ConnectionsToDump::default(),
            ghosts: GhostOptions::new(false, 1 << 20),
            locks: LockOptions::new(false),
            watches: WatchOptions::new(false, Vec::new()),
            validation: Validation::BuildId,
            external: External::new(Vec::new()),
        },
        track: track::Options::new(false, None),
        live: None,
        actions: action::Options::new(Vec::new()),
        stats: stats::Options::new(".".into(), false),
    }
}

fn default_restore() -> restore::Options {
    restore::Options {
        store: restore::Store { images_dir: ".".into(), free: None },
        relations: restore::Relations { shell_job: false, sibling: false },
        release: restore::Release { stopped: false, then: restore::Then::Wait, pidfile: None },
        common: tree::RestoreOptions {
            cgroups: cgroup::Options::new(cgroup::Mode::None),
            processor: processor::Options::default(),
        },
        namespaces: ns::Options::default(),
        files: RestoreOptions {
            terminals: TerminalOptions::new(false),
            orphans: Orphans::default(),
            unix: UnixOptions::new(false),
            connections: ConnectionsToRestore::default(),
            validation: Validation::BuildId,
            inherited: Inherited::new(Vec::new()),
        },
        lazy: None,
        track: track::Options::new(false, None),
        actions: action::Options::new(Vec::new()),
        stats: stats::Options::new(".".into(), false),
    }
}

/// A command line, and in what its options differ from the defaults.
type Row<T> = (&'static str, fn(&mut T));

#[test]
fn lines_of_dump_become_options() {
    let rows: &[Row<dump::Options>] = &[
        ("dump -t 7", |_| {}),
        ("dump -t 7 --tcp-established --network-lock skip", |dump| {
            dump.files.connections = ConnectionsToDump::new(Connections::Keep, None, false);
        }),
        ("dump -t 7 -l --force-irmap --irmap-scan-path a --irmap-scan-path b", |dump| {
            dump.files.locks = LockOptions::new(true);
            dump.files.watches = WatchOptions::new(true, vec!["a".into(), "b".into()]);
        }),
        ("dump -t 7 --tcp-established", |dump| {
            dump.files.connections =
                ConnectionsToDump::new(Connections::Keep, Some(PacketLock::Nftables), false);
        }),
        ("dump -t 7 --tcp-established --network-lock iptables --skip-in-flight", |dump| {
            let method = Some(PacketLock::Iptables);
            dump.files.connections = ConnectionsToDump::new(Connections::Keep, method, true);
            dump.files.unix = UnixOptions::new(false).skip_in_flight(true);
        }),
        ("dump --tree=3 -t7 -Dd -W w", |dump| {
            dump.store.images_dir = "d".into();
            dump.stats = stats::Options::new("w".into(), false);
        }),
        ("-D d -W w dump -t 7 -R", |dump| {
            dump.store.images_dir = "d".into();
            dump.stats = stats::Options::new("w".into(), false);
            dump.goal = Goal::Tree(Outcome::Run);
        }),
        // Of what cannot be together, the last one counts.
        ("dump -t 7 -R -s", |dump| dump.goal = Goal::Tree(Outcome::Stop)),
        ("dump -t 7 -sR", |dump| dump.goal = Goal::Tree(Outcome::Run)),
        ("dump -t 7 -j --link-remap --display-stats --file-validation=filesize", |dump| {
            dump.common.sessions = session::Options::new(true);
            dump.files.terminals = TerminalOptions::new(true);
            dump.files.ghosts = GhostOptions::new(true, 1 << 20);
            dump.files.validation = Validation::FileSize;
            dump.stats = stats::Options::new(".".into(), true);
        }),
        ("dump -t 7 --ghost-limit 64k --timeout 3", |dump| {
            dump.files.ghosts = GhostOptions::new(false, 64 << 10);
            dump.freeze = FreezeOptions::new(3);
        }),
        (
            "dump -t 7 --track-mem --prev-images-dir ../1 --tracker soft-dirty --auto-dedup",
            |dump| {
                dump.track = track::Options::new(true, Some(Tracker::SoftDirty));
                dump.store.parent = Some("../1".into());
                dump.store.free_parent = true;
            },
        ),
        ("dump -t 7 --page-server --address host --port 9", |dump| {
            let place = ServerPlace::Address("host".to_owned(), 9);
            dump.store.server = Some(ServerOptions { place, tls: None });
        }),
        ("dump -t 7 --page-server --ps-socket 5 --address host", |dump| {
            let place = ServerPlace::Socket(5);
            dump.store.server = Some(ServerOptions { place, tls: None });
        }),
        ("dump -t 7 --address host --port 9", |_| {}),
        ("dump -t 7 -R --live --live-stopped 1M", |dump| {
            dump.goal = Goal::Tree(Outcome::Run);
            dump.live = Some(dump::LiveOptions::new(1 << 20));
        }),
        ("dump -t 7 --external mnt[/a]:b -x5,6 --external tty[1:2]", |dump| {
            dump.files.unix = UnixOptions::new(true);
            let external = ["mnt[/a]:b", "tty[1:2]", "unix[5]", "unix[6]"];
            let external = external.map(str::to_owned).to_vec();
            dump.namespaces.mounts = ns::mnt::Options::new(&external, None);
            let inherited = Inherited::new(Vec::new());
            dump.namespaces.network = ns::net::Options::new(external.clone(), inherited);
            dump.files.external = External::new(external);
        }),
        ("dump -t 7 -x --no-ext-unix-sk --action-script a --action-script b", |dump| {
            dump.actions = action::Options::new(vec!["a".into(), "b".into()]);
        }),
        ("dump -t 7 --manage-cgroups=ignore", |dump| {
            dump.common.cgroups = cgroup::Options::new(cgroup::Mode::Ignore);
        }),
    ];
    for (line, change) in rows {
        let mut expected = default_dump();
        change(&mut expected);
        assert_eq!(dumped(line), expected, "{line}");
    }
    let pre_dump = convert::dump_options(&args("pre-dump -t 7 -s"), true).unwrap();
    assert_eq!(pre_dump, dump::Options { goal: Goal::Memory, ..default_dump() });
}

#[test]
fn lines_of_restore_become_options() {
    let rows: &[Row<restore::Options>] = &[
        ("restore", |_| {}),
        ("restore -dSs --pidfile p -D d -W w", |restore| {
            restore.store.images_dir = "d".into();
            restore.relations.sibling = true;
            restore.release = restore::Release {
                stopped: true,
                then: restore::Then::Exit,
                pidfile: Some("w/p".into()),
            };
            restore.stats = stats::Options::new("w".into(), false);
        }),
        ("restore --daemon", |restore| restore.release.then = restore::Then::Exit),
        ("restore --exec-cmd -- sh -c :", |restore| restore.release.then = restore::Then::Execute),
        ("restore --inherit-fd fd[3]:pipe:[1] --inherit-fd=fd[4]:a/b", |restore| {
            let list = [(3, "pipe:[1]".to_owned()), (4, "a/b".to_owned())];
            restore.files.inherited = Inherited::new(list.to_vec());
            restore.namespaces.network =
                ns::net::Options::new(Vec::new(), Inherited::new(list.to_vec()));
        }),
        ("restore --auto-dedup --track-mem", |restore| {
            restore.store.free = Some(restore::AutoDedup::Commit);
            restore.track = track::Options::new(true, None);
        }),
        ("restore --lazy", |restore| {
            let log = lazy::Log { file: None, level: LevelFilter::Warn };
            restore.lazy = Some(lazy::Options { log, record: None });
        }),
        ("restore --lazy -d -W w -v4 --record r", |restore| {
            let log = lazy::Log { file: Some("w/pager.log".into()), level: LevelFilter::Debug };
            restore.lazy = Some(lazy::Options { log, record: Some("w/r".into()) });
            restore.release.then = restore::Then::Exit;
            restore.stats = stats::Options::new("w".into(), false);
        }),
        ("restore --auto-dedup=now", |restore| {
            restore.store.free = Some(restore::AutoDedup::Now);
        }),
        ("restore -j -x --file-validation=filesize --manage-cgroups=ignore", |restore| {
            restore.relations.shell_job = true;
            restore.files.terminals = TerminalOptions::new(true);
            restore.files.unix = UnixOptions::new(true);
            restore.files.validation = Validation::FileSize;
            restore.common.cgroups = cgroup::Options::new(cgroup::Mode::Ignore);
        }),
    ];
    for (line, change) in rows {
        let mut expected = default_restore();
        change(&mut expected);
        assert_eq!(restored(line), expected, "{line}");
    }
}

#[test]
fn wrong_lines_are_usage_errors() {
    for (line, why) in [
        ("dump", "no process given\nhelp: use -t PID"),
        ("dump -t 7 x", "too many words: x"),
        (
            "dump -t 7 --live",
            "--live needs --leave-running: the tree runs on while its memory is copied",
        ),
        ("dump -t 7 --exec-cmd x", "--exec-cmd is for restore"),
        ("dump -t 7 --inherit-fd fd[1]:x", "--inherit-fd is for restore"),
    ] {
        let error = convert::dump_options(&args(line), false).unwrap_err();
        assert_eq!(error.to_string(), why, "{line}");
    }
    for (line, why) in [
        ("restore -S", "--restore-sibling needs --restore-detached"),
        (
            "restore --exec-cmd",
            "--exec-cmd needs a command\nhelp: rcriu restore --exec-cmd -- COMMAND [ARGUMENT...]",
        ),
        (
            "restore -d --exec-cmd x",
            "--exec-cmd cannot be used with --restore-detached: the command is the parent",
        ),
    ] {
        let error = convert::restore_options(&args(line)).unwrap_err();
        assert_eq!(error.to_string(), why, "{line}");
    }
    for line in [
        "dump -t 0",
        "dump -t -7",
        "dump -t x",
        "dump -t 7 --ghost-limit 1T",
        "dump -t 7 --bogus",
        "dump -t 7 -q",
        "dump -t 7 --leave-running=yes",
        "dump -t 7 --manage-cgroups=bogus",
        "dump -t 7 --empty-ns=user",
        "dump -t 7 -x0",
        "dump -t 7 -vx",
        "restore --inherit-fd 3:x",
    ] {
        assert!(read(line).is_err(), "{line}");
    }
}

#[test]
fn verbosity_is_that_of_criu() {
    for (line, level) in [
        ("dump", 2),
        ("dump -v", 3),
        ("dump -vv", 4),
        ("dump -vvvv", 6),
        ("dump -v -v", 4),
        ("dump -v0", 0),
        ("dump -v4", 4),
        ("dump -v4 -v", 5),
        ("dump -v4 -v1", 1),
        ("dump --verbosity --verbosity=1", 1),
        ("dump -jv3", 3),
    ] {
        assert_eq!(convert::verbosity(&args(line)), level, "{line}");
    }
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    let refused = |task: Task, line: &str| {
        let (_, given) = read(&format!("{} {line}", task.name())).unwrap();
        refusal(task, &given)
    };
    for (task, line, expected) in [
        (Task::Restore, "--lazy-pages", Some("--lazy-pages")),
        (Task::Restore, "--tls", Some("--tls")),
        (Task::PageServer, "--auto-dedup", Some("--auto-dedup")),
        (Task::Dump, "-t 7 --manage-cgroups", None),
        (Task::Dump, "-t 7 --cgroup-yard=y", None),
        (Task::Dump, "-t 7 --manage-cgroups=ignore", None),
        (Task::Restore, "--cpu-cap=none", None),
        (Task::Restore, "--cpu-cap", None),
        (Task::Restore, "-J net:1", None),
        (Task::Dump, "-t 7 --tcp-close", None),
        (Task::Dump, "-t 7 --tcp-established --network-lock=iptables", None),
        (Task::Restore, "--tcp-established", None),
        (Task::Dump, "--network-lock=skip --ghost-fiemap --log-pid", None),
        // Taken back.
        (Task::Dump, "--stream --no-stream", None),
    ] {
        let said = refused(task, line);
        match expected {
            None => assert_eq!(said, None, "{line}"),
            Some(name) => {
                let said = said.unwrap_or_else(|| panic!("{line} is accepted"));
                let start = format!("{name} is not supported yet{HELP}");
                assert!(said.starts_with(&start), "{said}");
                assert!(said.len() > start.len(), "{said}");
            }
        }
    }
    for (command, _) in table::REFUSED_COMMANDS {
        let error = read(&format!("{command} --port 1")).unwrap_err();
        let start = format!("the command {command} is ");
        assert!(error.starts_with(&start) && error.contains(HELP), "{error}");
    }
}

#[test]
fn what_has_no_effect_is_said_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("options");
    std::fs::write(&config, "restore-sibling\n").unwrap();
    let (_, given) =
        read(&format!("dump -t 7 --log-pid -R --config={}", config.display())).unwrap();
    let said: Vec<String> = without_effect(Task::Dump, &given).collect();
    assert_eq!(
        said,
        [
            "--restore-sibling has no effect: it is not for dump",
            "--log-pid has no effect: only one process logs, and each line has its pid",
        ]
    );
    assert_eq!(refusal(Task::Dump, &given), None);
    // On a command line it is a mistake.
    for (task, line, name) in [
        (Task::Dump, "-t 7 -S", "restore-sibling"),
        (Task::Check, "-t 7", "tree"),
        (Task::Check, "--json", "json"),
        (Task::Restore, "--timeout 1", "timeout"),
    ] {
        let (_, given) = read(&format!("{} {line}", task.name())).unwrap();
        let expected = format!("--{name} is not an option of {}{HELP}leave it out", task.name());
        assert_eq!(refusal(task, &given), Some(expected));
    }
}

#[test]
fn lines_of_other_commands_are_left_alone() {
    let prepared = prepare(["rcriu", "--vers"].map(OsString::from).into()).unwrap();
    assert_eq!(prepared.words, ["rcriu", "--version"]);
    for line in ["show -v dump", "show --pretty x", "--version", "help dump", "bogus -t 7", ""] {
        let words: Vec<OsString> =
            ["rcriu"].into_iter().chain(line.split_whitespace()).map(OsString::from).collect();
        assert_eq!(prepare(words.clone()).unwrap().words, words, "{line}");
    }
}

#[test]
fn page_servers_listen_as_they_are_told() {
    let options = |line: &str| convert::page_server_options(&args(line));
    let of =
        |client| page_server::Options { images_dir: "d".into(), parent: None, client, tls: None };
    for (line, expected) in [
        ("page-server -D d", page_server::Place::Address("0.0.0.0".to_owned(), 0)),
        (
            "page-server -D d --address ::1 --port 9",
            page_server::Place::Address("::1".to_owned(), 9),
        ),
        ("page-server -D d --ps-socket 5 --port 9", page_server::Place::Socket(5)),
    ] {
        assert_eq!(options(line), Ok(of(expected)), "{line}");
    }
    assert_eq!(options("page-server -d --ps-socket 5"), Err(convert::UsageError::SocketDetached));
    for (line, expected) in [
        ("dump -t 7 --page-server --address a", convert::UsageError::NoServer),
        (
            "dump -t 7 --page-server --address a --port 1 --chain c",
            convert::UsageError::ChainAtServer,
        ),
    ] {
        assert_eq!(convert::dump_options(&args(line), false), Err(expected), "{line}");
    }
}
