//! The options of `criu` and our own, as clap sees them.
//!
//! All commands know all options, as with CRIU: a configuration file is shared by them, and
//! an option that a command does not use has no effect there. [`super::table`] says what is
//! done about each.

use std::{ffi::OsString, path::PathBuf, str::FromStr};

use clap::{Args, ValueEnum};

use crate::inject::FreezeOptions;

/// The value of an option that was given without one.
pub(super) const NO_VALUE: &str = "+";

/// The options and operands of `dump`, `pre-dump`, `restore`, `check` and `dedup`.
#[derive(Args, Clone, Debug)]
#[command(args_override_self = true)]
pub(in crate::cli) struct TaskArgs {
    #[command(flatten)]
    pub(super) tree: TreeArgs,
    #[command(flatten)]
    pub(super) images: ImageArgs,
    #[command(flatten)]
    pub(super) memory: MemoryArgs,
    #[command(flatten)]
    pub(super) files: FileArgs,
    #[command(flatten)]
    pub(super) network: NetworkArgs,
    #[command(flatten)]
    pub(super) around: AroundArgs,
    #[command(flatten)]
    pub(super) machine: MachineArgs,
    #[command(flatten)]
    pub(super) cgroups: CgroupArgs,
    #[command(flatten)]
    pub(super) namespaces: NamespaceArgs,
    #[command(flatten)]
    pub(super) server: ServerArgs,
    #[command(flatten)]
    pub(super) check: CheckArgs,
    #[command(flatten)]
    pub(super) dedup: DedupArgs,
    #[command(flatten)]
    pub(super) output: OutputArgs,
    #[command(flatten)]
    pub(super) config: ConfigArgs,
    /// The command of --exec-cmd, with its arguments
    #[arg(last = true, value_name = "COMMAND")]
    pub(super) operands: Vec<OsString>,
}

/// The tree of processes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Processes")]
pub(super) struct TreeArgs {
    /// The root of the tree to dump
    #[arg(short = 't', long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub tree: Option<i32>,
    /// Leave the tree running after the dump instead of killing it
    #[arg(short = 'R', long, overrides_with = "leave_stopped")]
    pub leave_running: bool,
    /// Leave the tree stopped after the dump or restore
    #[arg(short = 's', long, overrides_with = "leave_running")]
    pub leave_stopped: bool,
    /// Return as soon as the tree runs, instead of waiting for it to end
    #[arg(short = 'd', long, alias = "daemon")]
    pub restore_detached: bool,
    /// Make the tree a child of the calling process (with -d)
    #[arg(short = 'S', long)]
    pub restore_sibling: bool,
    /// Allow a tree that shares its session and terminal with a shell
    #[arg(short = 'j', long)]
    pub shell_job: bool,
    /// Execute this command as the parent of the restored tree: --exec-cmd -- COMMAND...
    #[arg(long)]
    pub exec_cmd: bool,
    /// Write the pid of the tree's root to this file
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Fail if the tree cannot be stopped within this time
    #[arg(long, value_name = "SECONDS", default_value_t = FreezeOptions::TIMEOUT_S)]
    pub timeout: u32,
    /// Root directory of the tree
    #[arg(short = 'r', long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Run this program at each stage; $CRTOOLS_SCRIPT_ACTION names the stage; repeatable
    #[arg(long, value_name = "FILE")]
    pub action_script: Vec<PathBuf>,
}

/// Image directories.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Images")]
pub(super) struct ImageArgs {
    /// Image directory
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    pub images_dir: PathBuf,
    /// Image directory of the previous dump, relative to this one
    #[arg(long, value_name = "DIR")]
    pub prev_images_dir: Option<PathBuf>,
    /// Directory for log, statistics and pid file [default: the image directory]
    #[arg(short = 'W', long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,
    /// Send the images to criu-image-streamer
    #[arg(long)]
    pub stream: bool,
}

/// How memory is stored.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Memory")]
pub(super) struct MemoryArgs {
    /// Track memory changes from now on, so that the next dump reads less memory
    #[arg(long)]
    pub track_mem: bool,
    /// How changes are tracked [default: the best that the kernel offers]
    #[arg(long, value_enum, value_name = "HOW")]
    pub tracker: Option<TrackerName>,
    /// Free pages in the images that are no longer needed
    ///
    /// A dump frees the pages of its parent that it supersedes. A restore frees the pages
    /// that it has restored: `commit` when the restore has succeeded, `now` as it reads
    /// them.
    #[arg(long, value_enum, value_name = "WHEN", num_args = 0..=1, require_equals = true,
          default_missing_value = "commit")]
    pub auto_dedup: Option<AutoDedupName>,
    /// How a pre-dump reads memory; both modes are the same here
    #[arg(long, value_enum, value_name = "MODE")]
    pub pre_dump_mode: Option<PreDumpMode>,
    /// Restore memory on demand, from a lazy-pages server
    #[arg(long)]
    pub lazy_pages: bool,
}

/// Open files.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Files")]
pub(super) struct FileArgs {
    /// Dump or restore file locks
    #[arg(short = 'l', long)]
    pub file_locks: bool,
    /// Link deleted files to a name again where that is possible
    #[arg(long)]
    pub link_remap: bool,
    /// Size limit of deleted files that are stored in the images; K, M or G may follow
    #[arg(long, value_name = "SIZE", value_parser = size_bytes, default_value = "1M")]
    pub ghost_limit: u64,
    /// Find the holes of deleted files by FIEMAP
    #[arg(long)]
    pub ghost_fiemap: bool,
    /// How a restore recognizes that a file was replaced [default: buildid]
    #[arg(long, value_enum, value_name = "METHOD")]
    pub file_validation: Option<FileValidation>,
    /// Don't compare the permissions of files
    #[arg(long)]
    pub skip_file_rwx_check: bool,
    /// Accept any path that leads to the same device
    #[arg(long)]
    pub evasive_devices: bool,
    /// Always look up the names of watched files
    #[arg(long)]
    pub force_irmap: bool,
    /// Also look for watched files below this directory; repeatable
    #[arg(long, value_name = "PATH")]
    pub irmap_scan_path: Vec<PathBuf>,
}

/// Sockets.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sockets")]
pub(super) struct NetworkArgs {
    /// Dump or restore established TCP connections
    #[arg(long)]
    pub tcp_established: bool,
    /// Drop established TCP connections; restore their sockets closed
    #[arg(long)]
    pub tcp_close: bool,
    /// Leave out TCP connections that are being established
    #[arg(long)]
    pub skip_in_flight: bool,
    /// Allow UNIX sockets that are connected to other processes; =INODE,... names them
    #[arg(short = 'x', long, value_name = "INODE,...", num_args = 0..=1, require_equals = true,
          default_missing_value = NO_VALUE)]
    pub ext_unix_sk: Vec<Inodes>,
    /// How packets of TCP connections are held back until the restore; iptables and nftables are
    /// the same here: a table of nftables
    #[arg(long, value_enum, value_name = "METHOD")]
    pub network_lock: Option<NetworkLock>,
}

/// Resources that are not dumped.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "External resources")]
pub(super) struct AroundArgs {
    /// External resource that is not dumped: TYPE[ID]:VALUE; repeatable
    #[arg(long, value_name = "RESOURCE")]
    pub external: Vec<String>,
    /// Use descriptor N of the caller for the resource KEY: fd[N]:KEY; repeatable
    #[arg(long, value_name = "fd[N]:KEY", value_parser = inherit_fd)]
    pub inherit_fd: Vec<(i32, String)>,
    /// Close this descriptor first; repeatable
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(0..))]
    pub close: Vec<i32>,
    /// Directory of plugins
    #[arg(short = 'L', long, value_name = "DIR")]
    pub libdir: Option<PathBuf>,
}

/// Processor and security.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Machine")]
pub(super) struct MachineArgs {
    /// Features that the processor must have
    #[arg(long, value_name = "FEATURE,...", num_args = 0..=1, require_equals = true,
          default_missing_value = "all")]
    pub cpu_cap: Option<String>,
    /// Restore with this security profile
    #[arg(long, value_name = "TYPE:NAME")]
    pub lsm_profile: Option<String>,
    /// Restore mounts with this security context
    #[arg(long, value_name = "CONTEXT")]
    pub lsm_mount_context: Option<String>,
    /// Allow trees that have been probed by uprobes
    #[arg(long)]
    pub allow_uprobes: bool,
    /// Do what is possible without root's privileges
    #[arg(long)]
    pub unprivileged: bool,
    /// Allow features that CRIU is going to drop
    #[arg(long)]
    pub deprecated: bool,
}

/// Cgroups.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Cgroups")]
pub(super) struct CgroupArgs {
    /// Restore the tree into its cgroups, which must exist (none, the default), or leave it
    /// in the cgroup of rcriu (ignore)
    #[arg(long, value_enum, value_name = "MODE", num_args = 0..=1, require_equals = true,
          default_missing_value = "soft")]
    pub manage_cgroups: Option<ManageCgroups>,
    /// Stop the tree by freezing this cgroup
    #[arg(long, value_name = "DIR")]
    pub freeze_cgroup: Option<PathBuf>,
    /// Restore the tree into this cgroup; repeatable
    #[arg(long, value_name = "[CONTROLLER:]/DIR")]
    pub cgroup_root: Vec<String>,
    /// Which properties of cgroups are kept
    #[arg(long, value_name = "YAML")]
    pub cgroup_props: Option<String>,
    /// Which properties of cgroups are kept, from a file
    #[arg(long, value_name = "FILE")]
    pub cgroup_props_file: Option<PathBuf>,
    /// Keep this controller only; repeatable
    #[arg(long, value_name = "NAME")]
    pub cgroup_dump_controller: Vec<String>,
    /// Directory where the cgroups are mounted
    #[arg(long, value_name = "DIR")]
    pub cgroup_yard: Option<PathBuf>,
}

/// Namespaces.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Namespaces")]
pub(super) struct NamespaceArgs {
    /// Restore into an existing namespace; repeatable
    #[arg(short = 'J', long, value_name = "NS:{PID|FILE}")]
    pub join_ns: Vec<String>,
    /// Restore this namespace without its contents
    #[arg(long, value_name = "net", value_parser = ["net"])]
    pub empty_ns: Vec<String>,
    /// Leave out this mount; repeatable
    #[arg(long, value_name = "PATH")]
    pub skip_mnt: Vec<PathBuf>,
    /// Dump mounts of these file systems as if they were supported
    #[arg(long, value_name = "NAME,...")]
    pub enable_fs: Vec<String>,
    /// External mount; repeatable
    #[arg(short = 'M', long, value_name = "KEY:VALUE")]
    pub ext_mount_map: Vec<String>,
    /// Allow mounts that are shared with mounts outside the tree
    #[arg(long)]
    pub enable_external_sharing: bool,
    /// Allow mounts that are slaves of mounts outside the tree
    #[arg(long)]
    pub enable_external_masters: bool,
    /// Restore mounts in CRIU's older way
    #[arg(long)]
    pub mntns_compat_mode: bool,
    /// The other end of a network device; repeatable
    #[arg(long, value_name = "IN=OUT")]
    pub veth_pair: Vec<String>,
    /// Skip sysctls that this kernel does not have
    #[arg(long)]
    pub weak_sysctls: bool,
}

/// Page servers.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Page server")]
pub(super) struct ServerArgs {
    /// Send pages to a page server
    #[arg(long)]
    pub page_server: bool,
    /// Address of the server
    #[arg(long, value_name = "ADDRESS")]
    pub address: Option<String>,
    /// Port of the server
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// Descriptor of an open socket to the server
    #[arg(long, value_name = "FD")]
    pub ps_socket: Option<i32>,
    /// Write to this descriptor when the server is ready
    #[arg(long, value_name = "FD")]
    pub status_fd: Option<i32>,
    /// Encrypt the connection to the server
    #[arg(long)]
    pub tls: bool,
    /// File of trusted certificate authorities
    #[arg(long, value_name = "FILE")]
    pub tls_cacert: Option<PathBuf>,
    /// File of revoked certificates
    #[arg(long, value_name = "FILE")]
    pub tls_cacrl: Option<PathBuf>,
    /// Certificate of this host
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of this host
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Don't compare the name in the server's certificate
    #[arg(long)]
    pub tls_no_cn_verify: bool,
}

/// Feature checks.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Check")]
pub(super) struct CheckArgs {
    /// Also check features that only some trees need
    #[arg(long)]
    pub extra: bool,
    /// Also check features that make rcriu faster
    #[arg(long)]
    pub experimental: bool,
    /// Check all features
    #[arg(long)]
    pub all: bool,
    /// Check only this feature; `list` lists all features; repeatable
    #[arg(long, value_name = "NAME")]
    pub feature: Vec<String>,
    /// Pretend that features are missing
    #[arg(long)]
    pub ms: bool,
}

/// Deduplication.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Deduplication")]
pub(super) struct DedupArgs {
    /// Link these full dumps of one tree into a chain, the oldest first: --link DIR DIR...
    #[arg(long)]
    pub link: bool,
    /// Write new directories, DIR.linked, instead of replacing the dumps
    #[arg(long)]
    pub keep_originals: bool,
    /// Rewrite files where the file system cannot punch holes
    #[arg(long)]
    pub rewrite: bool,
    /// Let equal pages of the chain share blocks (btrfs, xfs); the images stay the same
    #[arg(long, conflicts_with = "link")]
    pub reflink: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Log and output.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Messages")]
pub(super) struct OutputArgs {
    /// Write the log to this file in the work directory; `-` is standard output
    #[arg(short = 'o', long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Increase verbosity, once per v; or set it by -vN
    ///
    /// 0: nothing; 1: errors; 2: warnings too (the default); 3: phases with their
    /// figures; 4: every task and object; 5: every page and system call.
    #[arg(short = 'v', long, value_name = "N", num_args = 0..=1, require_equals = true,
          default_missing_value = NO_VALUE)]
    pub verbosity: Vec<Verbosity>,
    /// Write one log per process; rcriu has a single logging process
    #[arg(long)]
    pub log_pid: bool,
    /// Print the statistics afterwards
    #[arg(long)]
    pub display_stats: bool,
}

/// Configuration files.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Configuration")]
pub(super) struct ConfigArgs {
    /// Read options from this file, one per line without dashes; the command line overrides
    /// them
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Don't read /etc/rcriu/default.conf and ~/.rcriu/default.conf
    #[arg(long)]
    pub no_default_config: bool,
}

/// `--tracker`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum TrackerName {
    /// Write protection by userfaultfd
    Wp,
    /// Soft-dirty bits
    SoftDirty,
    /// Every page is compared
    None,
}

/// `--auto-dedup`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum AutoDedupName {
    /// When everything is restored
    Commit,
    /// As it goes
    Now,
}

/// `--pre-dump-mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum PreDumpMode {
    /// From outside
    Read,
    /// Through pipes
    Splice,
}

/// `--file-validation`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum FileValidation {
    /// The size alone
    Filesize,
    /// The size, and the build-id of programs and libraries; without one, the time
    Buildid,
}

/// `--network-lock`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum NetworkLock {
    /// By rules of iptables
    Iptables,
    /// By rules of nftables
    Nftables,
    /// Not at all
    #[value(alias = "none")]
    Skip,
}

/// `--manage-cgroups`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ManageCgroups {
    /// The cgroups exist
    None,
    /// The cgroups exist, set their properties
    Props,
    /// Set the properties of those that did not exist
    Soft,
    /// Set all properties
    Full,
    /// None of the cgroups exists
    Strict,
    /// As if there were no cgroups
    Ignore,
}

/// One `-v`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verbosity {
    /// So many levels more.
    More(u8),
    /// This level.
    Level(u8),
}

impl FromStr for Verbosity {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == NO_VALUE {
            return Ok(Self::More(1));
        }
        if text.bytes().all(|byte| byte == b'v') {
            // The first v is the option itself.
            return Ok(Self::More(u8::try_from(text.len() + 1).unwrap_or(u8::MAX)));
        }
        text.parse().map(Self::Level).map_err(|_| "not a level such as 0 to 5")
    }
}

/// What `--ext-unix-sk` names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Inodes(pub Vec<u32>);

impl FromStr for Inodes {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == NO_VALUE {
            return Ok(Self::default());
        }
        let numbers = text.split(',').map(|number| match number.parse() {
            Ok(0) | Err(_) => Err("not inode numbers with commas between them"),
            Ok(number) => Ok(number),
        });
        numbers.collect::<Result<_, _>>().map(Self)
    }
}

/// Parses a size: bytes, or a number with K, M or G.
pub fn size_bytes(text: &str) -> Result<u64, &'static str> {
    const WRONG: &str = "not a number of bytes, with K, M or G behind it or not";
    let (number, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = number.parse().map_err(|_| WRONG)?;
    number.checked_mul(1 << shift).ok_or("more than 64 bits can hold")
}

/// Parses `fd[N]:KEY`.
fn inherit_fd(text: &str) -> Result<(i32, String), &'static str> {
    let rest = text.strip_prefix("fd[").ok_or("does not begin with fd[")?;
    let (number, key) = rest.split_once("]:").ok_or("has no ]: after the number")?;
    let number = number.parse().ok().filter(|number: &i32| *number >= 0);
    let number = number.ok_or("has no descriptor between the brackets")?;
    if key.is_empty() {
        return Err("has no key after the colon");
    }
    Ok((number, key.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes() {
        for (text, bytes) in [
            ("0", Ok(0)),
            ("17", Ok(17)),
            ("3k", Ok(3 << 10)),
            ("3K", Ok(3 << 10)),
            ("64M", Ok(64 << 20)),
            ("2g", Ok(2 << 30)),
        ] {
            assert_eq!(size_bytes(text), bytes, "{text}");
        }
        for text in ["", "k", "1T", "-1", "1.5M", "99999999999999G", "1 M"] {
            assert!(size_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn inherited_descriptors_have_number_and_key() {
        assert_eq!(inherit_fd("fd[7]:pipe:[12]"), Ok((7, "pipe:[12]".to_owned())));
        for text in ["", "7:x", "fd[]:x", "fd[-1]:x", "fd[7]", "fd[7]:", "fd[7:x"] {
            assert!(inherit_fd(text).is_err(), "{text}");
        }
    }
}
