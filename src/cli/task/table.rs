//! What is done about each option: one table.

/// A set of commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Commands(u8);

/// `dump`
pub(super) const DUMP: Commands = Commands(1);
/// `pre-dump`
pub(super) const PRE_DUMP: Commands = Commands(2);
/// `restore`
pub(super) const RESTORE: Commands = Commands(4);
/// `check`
pub(super) const CHECK: Commands = Commands(8);
/// `dedup`
pub(super) const DEDUP: Commands = Commands(16);

const DUMPS: Commands = DUMP.or(PRE_DUMP);
const BOTH: Commands = DUMPS.or(RESTORE);
const ALL: Commands = BOTH.or(CHECK).or(DEDUP);

impl Commands {
    const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether one of `other` is among these.
    pub(super) const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// How an option is treated.
#[derive(Clone, Copy, Debug)]
pub(super) enum State {
    /// It works.
    Built,
    /// It is accepted and has no effect, for this reason.
    Harmless(&'static str),
    /// It is refused, with what it would need or what to do instead.
    Refused(&'static str),
    /// It is refused unless it has one of these values, with which it is harmless.
    RefusedUnless(&'static [&'static str], &'static str),
}

/// An option.
#[derive(Debug)]
pub(super) struct Row {
    /// Its long name.
    pub name: &'static str,
    /// The commands of this row. A command without a row refuses the option on its command
    /// line, and ignores it in configuration files, which all commands share.
    pub on: Commands,
    /// What is done about it.
    pub state: State,
}

/// Returns the row of an option by its long name, for one of these commands.
pub(super) fn row(name: &str, on: Commands) -> Option<&'static Row> {
    ROWS.iter().find(|row| row.name == name && row.on.has(on))
}

use State::{Built, Harmless, Refused, RefusedUnless};

const NO_NAMESPACES: &str = "trees with namespaces of their own are not dumped; leave it out";
const NO_CONNECTIONS: &str =
    "established connections are not dumped; let the program close them, and leave it out";
const NO_WATCHES: &str =
    "watches (inotify, fanotify) are not dumped; let the program close them, and leave it out";
const NO_FILES: &str = "a pre-dump writes memory, and no files";
const CGROUPS: &str = "the tree can be restored into its existing cgroups (=none), or stay in those of rcriu (=ignore)";
const PAGE_SERVER: &str = "pages are written to local images only; copy the images";
const TLS: &str = "there is no page server; copy the images over ssh";

/// Every option but `help` and `version`.
pub(super) const ROWS: &[Row] = &[
    // Processes
    built("tree", DUMPS),
    built("leave-running", DUMP),
    harmless("leave-running", PRE_DUMP, "the tree always runs on after a pre-dump"),
    built("leave-stopped", DUMP.or(RESTORE)),
    built("restore-detached", RESTORE),
    built("restore-sibling", RESTORE),
    built("shell-job", BOTH),
    built("exec-cmd", RESTORE),
    built("pidfile", RESTORE),
    built("timeout", DUMPS),
    refused("root", BOTH, "trees with a mount namespace of their own are not dumped; leave it out"),
    built("action-script", BOTH),
    // Images
    built("images-dir", ALL),
    built("prev-images-dir", DUMPS),
    built("work-dir", ALL),
    refused("stream", BOTH, "dump into a directory, on tmpfs if it is not to touch a disk"),
    // Memory
    built("track-mem", BOTH),
    built("tracker", BOTH),
    built("auto-dedup", BOTH),
    harmless("pre-dump-mode", PRE_DUMP, "memory is read in one way, while the tree runs"),
    refused("lazy-pages", BOTH, "there is no server of pages; restore without it"),
    // Files
    refused("file-locks", BOTH, "a tree that holds locks can't be dumped; let it release them"),
    built("link-remap", DUMP),
    harmless("link-remap", PRE_DUMP, NO_FILES),
    harmless("link-remap", RESTORE, "files that a dump linked to another name are always found"),
    built("ghost-limit", DUMP),
    harmless("ghost-fiemap", DUMP, "holes are found by SEEK_DATA, at the same cost"),
    built("file-validation", DUMP.or(RESTORE)),
    harmless("file-validation", PRE_DUMP, NO_FILES),
    harmless("skip-file-rwx-check", RESTORE, "permissions of files are not compared"),
    refused("evasive-devices", DUMP, "a device without its path is not dumped; leave it out"),
    refused("force-irmap", DUMPS, NO_WATCHES),
    refused("irmap-scan-path", DUMPS, NO_WATCHES),
    // Sockets
    refused("tcp-established", BOTH, "close the connections, or let the peers connect again"),
    refused("tcp-close", BOTH, NO_CONNECTIONS),
    refused("skip-in-flight", DUMP, NO_CONNECTIONS),
    built("ext-unix-sk", DUMP.or(RESTORE)),
    harmless("ext-unix-sk", PRE_DUMP, NO_FILES),
    Row { name: "network-lock", on: DUMP, state: RefusedUnless(&["skip", "none"], NO_CONNECTIONS) },
    // External resources
    built("external", DUMP),
    harmless("external", RESTORE, "pass external resources by --inherit-fd"),
    harmless("external", PRE_DUMP, NO_FILES),
    built("inherit-fd", RESTORE),
    built("close", ALL),
    refused("libdir", BOTH, "there are no plugins; leave it out if the tree needs none"),
    // Machine
    Row {
        name: "cpu-cap",
        on: BOTH,
        state: RefusedUnless(
            &["none"],
            "restore on the same kind of processor, or use =none to try",
        ),
    },
    refused("lsm-profile", RESTORE, "start rcriu itself with the profile, it is inherited"),
    refused("lsm-mount-context", RESTORE, "mounts are not restored"),
    refused("allow-uprobes", BOTH, "dump a tree that has never been probed"),
    harmless("unprivileged", BOTH, "each step that lacks a privilege says so"),
    harmless("deprecated", ALL, "no feature needs it"),
    // Cgroups
    Row { name: "manage-cgroups", on: BOTH, state: RefusedUnless(&["ignore", "none"], CGROUPS) },
    refused("freeze-cgroup", DUMPS, "leave it out: the tree is stopped by ptrace"),
    refused("cgroup-root", BOTH, CGROUPS),
    refused("cgroup-props", BOTH, CGROUPS),
    refused("cgroup-props-file", BOTH, CGROUPS),
    refused("cgroup-dump-controller", DUMPS, CGROUPS),
    refused("cgroup-yard", BOTH, CGROUPS),
    // Namespaces
    refused("join-ns", RESTORE, "run rcriu in the namespace, by nsenter(1)"),
    refused("empty-ns", BOTH, NO_NAMESPACES),
    refused("skip-mnt", BOTH, NO_NAMESPACES),
    refused("enable-fs", BOTH, NO_NAMESPACES),
    refused("ext-mount-map", BOTH, NO_NAMESPACES),
    refused("enable-external-sharing", BOTH, NO_NAMESPACES),
    refused("enable-external-masters", BOTH, NO_NAMESPACES),
    refused("mntns-compat-mode", RESTORE, NO_NAMESPACES),
    refused("veth-pair", RESTORE, NO_NAMESPACES),
    harmless("weak-sysctls", RESTORE, "sysctls are not restored"),
    // Page server
    refused("page-server", DUMPS, PAGE_SERVER),
    refused("address", BOTH, PAGE_SERVER),
    refused("port", BOTH, PAGE_SERVER),
    refused("ps-socket", BOTH, PAGE_SERVER),
    refused("status-fd", BOTH, "wait for the exit code"),
    refused("tls", BOTH, TLS),
    refused("tls-cacert", BOTH, TLS),
    refused("tls-cacrl", BOTH, TLS),
    refused("tls-cert", BOTH, TLS),
    refused("tls-key", BOTH, TLS),
    refused("tls-no-cn-verify", BOTH, TLS),
    // Check
    built("extra", CHECK),
    built("experimental", CHECK),
    built("all", CHECK),
    built("feature", CHECK),
    refused("ms", ALL, "CRIU has dropped it, too; use --feature"),
    // Deduplication
    built("link", DEDUP),
    built("keep-originals", DEDUP),
    built("rewrite", DEDUP),
    built("reflink", DEDUP),
    built("json", DEDUP),
    // Messages
    built("log-file", ALL),
    built("verbosity", ALL),
    harmless("log-pid", ALL, "a single process logs, and each line has its pid"),
    built("display-stats", BOTH),
    // Configuration
    built("config", ALL),
    built("no-default-config", ALL),
];

const fn built(name: &'static str, on: Commands) -> Row {
    Row { name, on, state: Built }
}

const fn harmless(name: &'static str, on: Commands, why: &'static str) -> Row {
    Row { name, on, state: Harmless(why) }
}

const fn refused(name: &'static str, on: Commands, instead: &'static str) -> Row {
    Row { name, on, state: Refused(instead) }
}

/// Commands of CRIU that rcriu does not have, and what to do instead.
pub(super) const REFUSED_COMMANDS: &[(&str, &str)] = &[
    ("cpuinfo", "restore on the same kind of processor"),
    ("exec", "CRIU has dropped it as well"),
    ("lazy-pages", "restore without --lazy-pages"),
    ("page-server", PAGE_SERVER),
    ("service", "run rcriu by its command line"),
    ("swrk", "run rcriu by its command line"),
];
