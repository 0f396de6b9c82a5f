//! The table of all options: which commands take them, and how.

/// A set of commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Commands(u16);

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
/// `cpuinfo`
pub(super) const CPUINFO: Commands = Commands(32);
/// `service`
pub(super) const SERVICE: Commands = Commands(64);

/// `page-server`
pub(super) const PAGE_SERVER: Commands = Commands(128);

const DUMPS: Commands = DUMP.or(PRE_DUMP);
const BOTH: Commands = DUMPS.or(RESTORE);
const ALL: Commands = BOTH.or(CHECK).or(DEDUP).or(CPUINFO).or(SERVICE).or(PAGE_SERVER);

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
    /// rcriu accepts it without effect, for this reason.
    Harmless(&'static str),
    /// rcriu refuses it; the text is the remedy.
    Refused(&'static str),
}

/// An option.
#[derive(Debug)]
pub(super) struct Row {
    /// Its long name.
    pub name: &'static str,
    /// The commands of this row. A command without a row refuses the option on its command line,
    /// and ignores it in configuration files, which all commands share.
    pub on: Commands,
    /// How these commands treat it.
    pub state: State,
}

/// Returns the row of an option by its long name, for one of these commands.
pub(super) fn row(name: &str, on: Commands) -> Option<&'static Row> {
    ROWS.iter().find(|row| row.name == name && row.on.has(on))
}

use State::{Built, Harmless, Refused};

const NO_FILES: &str = "a pre-dump writes only memory";
const NOT_LAZY: &str = "restore from a directory that has all pages";
const AFTERWARDS: &str = "rcriu dedup frees superseded pages when all images are in one place";

/// Every option except `help` and `version`.
pub(super) const ROWS: &[Row] = &[
    // Processes
    built("tree", DUMPS),
    built("leave-running", DUMP),
    harmless("leave-running", PRE_DUMP, "the tree always runs on after a pre-dump"),
    built("leave-stopped", DUMP.or(RESTORE)),
    built("restore-detached", RESTORE.or(SERVICE).or(PAGE_SERVER)),
    built("restore-sibling", RESTORE),
    built("shell-job", BOTH),
    built("exec-cmd", RESTORE),
    built("pidfile", RESTORE.or(SERVICE).or(PAGE_SERVER)),
    built("timeout", DUMPS),
    built("root", RESTORE),
    harmless("root", DUMPS, "a dump finds the root mount by itself"),
    built("action-script", BOTH),
    // Images
    built("images-dir", ALL),
    built("prev-images-dir", DUMPS.or(PAGE_SERVER)),
    built("chain", DUMPS),
    built("work-dir", ALL),
    refused("stream", BOTH, "dump into a directory, on tmpfs to spare the disk"),
    // Memory
    built("track-mem", BOTH),
    built("tracker", BOTH),
    built("auto-dedup", BOTH),
    refused("auto-dedup", PAGE_SERVER, AFTERWARDS),
    built("live", DUMP),
    built("live-stopped", DUMP),
    harmless("pre-dump-mode", PRE_DUMP, "a pre-dump always reads memory while the tree runs"),
    built("lazy", RESTORE),
    built("record", RESTORE),
    refused("lazy-pages", BOTH.or(PAGE_SERVER), "restore without it"),
    // Files
    built("file-locks", DUMP),
    harmless("file-locks", RESTORE, "a restore always takes the locks that are in the images"),
    harmless("file-locks", PRE_DUMP, NO_FILES),
    built("link-remap", DUMP),
    harmless("link-remap", PRE_DUMP, NO_FILES),
    harmless("link-remap", RESTORE, "a restore always finds link remaps"),
    built("ghost-limit", DUMP),
    harmless("ghost-fiemap", DUMP, "holes are found by SEEK_DATA, at the same cost"),
    built("file-validation", DUMP.or(RESTORE)),
    harmless("file-validation", PRE_DUMP, NO_FILES),
    harmless("skip-file-rwx-check", RESTORE, "a restore does not compare the permissions of files"),
    refused("evasive-devices", DUMP, "leave it out: a device without its path is not dumped"),
    built("force-irmap", DUMP),
    harmless("force-irmap", PRE_DUMP, NO_FILES),
    built("irmap-scan-path", DUMP),
    harmless("irmap-scan-path", PRE_DUMP, NO_FILES),
    // Sockets
    built("tcp-established", DUMP.or(RESTORE)),
    harmless("tcp-established", PRE_DUMP, NO_FILES),
    built("tcp-close", DUMP.or(RESTORE)),
    harmless("tcp-close", PRE_DUMP, NO_FILES),
    built("skip-in-flight", DUMP),
    harmless("skip-in-flight", PRE_DUMP, NO_FILES),
    harmless("skip-in-flight", RESTORE, "connections not in the images are left out anyway"),
    built("ext-unix-sk", DUMP.or(RESTORE)),
    harmless("ext-unix-sk", PRE_DUMP, NO_FILES),
    built("network-lock", DUMP),
    harmless("network-lock", RESTORE, "the images record how packets are held back"),
    // External resources
    built("external", DUMP),
    built("external", RESTORE),
    harmless("external", PRE_DUMP, NO_FILES),
    built("inherit-fd", RESTORE),
    built("close", ALL),
    refused("libdir", BOTH, "leave it out if the tree needs no plugin: rcriu has none"),
    // Machine
    built("cpu-cap", DUMP.or(RESTORE).or(CPUINFO)),
    harmless("cpu-cap", PRE_DUMP, NO_FILES),
    built("lsm-profile", RESTORE),
    refused("lsm-mount-context", RESTORE, "leave it out: mounts are not restored"),
    refused("allow-uprobes", BOTH, "dump a tree that has never had uprobes"),
    harmless("unprivileged", BOTH, "each step that lacks a privilege reports it"),
    harmless("deprecated", ALL, "no feature needs it"),
    // Cgroups
    built("manage-cgroups", BOTH),
    harmless("freeze-cgroup", DUMPS, "ptrace stops the tree, also a tree that is frozen already"),
    built("cgroup-root", BOTH),
    built("cgroup-props", DUMP.or(RESTORE)),
    harmless("cgroup-props", PRE_DUMP, NO_FILES),
    built("cgroup-props-file", DUMP.or(RESTORE)),
    harmless("cgroup-props-file", PRE_DUMP, NO_FILES),
    built("cgroup-dump-controller", DUMPS),
    built("cgroup-yard", DUMP.or(RESTORE)),
    harmless("cgroup-yard", PRE_DUMP, NO_FILES),
    // Namespaces
    built("join-ns", RESTORE),
    built("empty-ns", DUMP.or(RESTORE)),
    harmless("empty-ns", PRE_DUMP, NO_FILES),
    built("skip-mnt", DUMP.or(RESTORE)),
    built("enable-fs", DUMP),
    harmless("enable-fs", RESTORE, "the images have the names of the file systems"),
    built("ext-mount-map", DUMP.or(RESTORE)),
    built("enable-external-sharing", DUMP.or(RESTORE)),
    built("enable-external-masters", DUMP.or(RESTORE)),
    harmless("skip-mnt", PRE_DUMP, NO_FILES),
    harmless("enable-fs", PRE_DUMP, NO_FILES),
    harmless("ext-mount-map", PRE_DUMP, NO_FILES),
    harmless("enable-external-sharing", PRE_DUMP, NO_FILES),
    harmless("enable-external-masters", PRE_DUMP, NO_FILES),
    harmless("mntns-compat-mode", RESTORE, "the result is the same"),
    built("veth-pair", RESTORE),
    harmless("weak-sysctls", RESTORE, "sysctls are not restored"),
    // Page server
    built("page-server", DUMPS),
    built("address", DUMPS.or(SERVICE).or(PAGE_SERVER)),
    refused("address", RESTORE, NOT_LAZY),
    built("port", DUMPS.or(PAGE_SERVER)),
    refused("port", RESTORE, NOT_LAZY),
    built("ps-socket", DUMPS.or(PAGE_SERVER)),
    refused("ps-socket", RESTORE, NOT_LAZY),
    refused("status-fd", BOTH, "wait for the exit code"),
    built("status-fd", SERVICE.or(PAGE_SERVER)),
    built("tls", DUMPS.or(PAGE_SERVER)),
    refused("tls", RESTORE, NOT_LAZY),
    built("tls-cacert", DUMPS.or(PAGE_SERVER)),
    refused("tls-cacert", RESTORE, NOT_LAZY),
    built("tls-cacrl", DUMPS.or(PAGE_SERVER)),
    refused("tls-cacrl", RESTORE, NOT_LAZY),
    built("tls-cert", DUMPS.or(PAGE_SERVER)),
    refused("tls-cert", RESTORE, NOT_LAZY),
    built("tls-key", DUMPS.or(PAGE_SERVER)),
    refused("tls-key", RESTORE, NOT_LAZY),
    built("tls-no-cn-verify", DUMPS),
    harmless("tls-no-cn-verify", PAGE_SERVER, "the name of the client is never compared"),
    refused("tls-no-cn-verify", RESTORE, NOT_LAZY),
    // Check
    built("extra", CHECK),
    built("experimental", CHECK),
    built("all", CHECK),
    built("feature", CHECK),
    refused("ms", ALL, "use --feature: CRIU has dropped it, too"),
    // Deduplication
    built("link", DEDUP),
    built("keep-originals", DEDUP),
    built("rewrite", DEDUP),
    built("reflink", DEDUP),
    built("json", DEDUP),
    // Messages
    built("log-file", ALL),
    built("verbosity", ALL),
    harmless("log-pid", ALL, "only one process logs, and each line has its pid"),
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

/// Options that CRIU, too, refuses for other commands than restore. It ignores all others.
pub(super) const ONLY_RESTORES: [&str; 2] = ["exec-cmd", "inherit-fd"];

/// A command that CRIU has dropped.
pub(super) const EXEC: &str = "exec";

/// Commands of CRIU that rcriu lacks: what they are, with the remedy.
pub(super) const REFUSED_COMMANDS: &[(&str, &str)] = &[
    (EXEC, "deprecated\nhelp: compel, a part of CRIU, has taken its place"),
    ("lazy-pages", "not supported yet\nhelp: restore without --lazy-pages"),
];
