//! The options of `criu` and our own, as clap sees them.
//!
//! As with CRIU, every command knows all options: the commands share a configuration file, and
//! each ignores the options there that it does not use. [`super::table`] has a row for each
//! option.

use std::{ffi::OsString, path::PathBuf, str::FromStr};

use clap::{Args, ValueEnum};

use crate::{inject::FreezeOptions, res::tree::processor::Aspects};

/// The value of an option that was given without one.
pub(super) const NO_VALUE: &str = "+";

/// The options and operands of all commands that have CRIU's options.
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
    /// Command for --exec-cmd, with its arguments
    #[arg(last = true, value_name = "COMMAND")]
    pub(super) operands: Vec<OsString>,
}

/// The tree of processes.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Processes")]
pub(super) struct TreeArgs {
    /// Dump the process PID and all of its descendants
    #[arg(short = 't', long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub tree: Option<i32>,
    /// Leave the tree running after the dump instead of killing it
    #[arg(short = 'R', long, overrides_with = "leave_stopped")]
    pub leave_running: bool,
    /// Leave the tree stopped after the dump or restore
    #[arg(short = 's', long, overrides_with = "leave_running")]
    pub leave_stopped: bool,
    /// Return as soon as the tree runs, or the service waits for clients
    #[arg(short = 'd', long, alias = "daemon")]
    pub restore_detached: bool,
    /// Make the root of the tree a child of rcriu's parent; requires -d
    #[arg(short = 'S', long)]
    pub restore_sibling: bool,
    /// Allow a tree that shares its session and terminal with a shell
    #[arg(short = 'j', long)]
    pub shell_job: bool,
    /// After the restore, execute COMMAND in place of rcriu, as the parent of the tree:
    /// --exec-cmd -- COMMAND...
    #[arg(long)]
    pub exec_cmd: bool,
    /// Write the pid of the tree's root, or of the service, to FILE
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Fail if rcriu cannot stop the tree within this time
    #[arg(long, value_name = "SECONDS", default_value_t = FreezeOptions::TIMEOUT_S)]
    pub timeout: u32,
    /// Use DIR as the root directory of the tree
    #[arg(short = 'r', long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Run FILE at each stage; $CRTOOLS_SCRIPT_ACTION names the stage; can be repeated
    #[arg(long, value_name = "FILE")]
    pub action_script: Vec<PathBuf>,
}

/// Image directories.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Images")]
pub(super) struct ImageArgs {
    /// Read or write the images in this directory
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    pub images_dir: PathBuf,
    /// Leave unchanged memory to the previous dump in DIR; relative to --images-dir
    #[arg(long, value_name = "DIR")]
    pub prev_images_dir: Option<PathBuf>,
    /// Find the previous dump of the tree in DIR, a directory of dumps
    ///
    /// Without --images-dir, the dump goes into a new directory in DIR, whose name is the next
    /// number. A dump with --images-dir elsewhere is also copied into DIR.
    #[arg(long, value_name = "DIR")]
    pub chain: Option<PathBuf>,
    /// Write log, statistics and pid file to this directory [default: the image directory]
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
    /// How to track changes [default: the best method of this kernel]
    #[arg(long, value_enum, value_name = "HOW")]
    pub tracker: Option<TrackerName>,
    /// Free pages in the images that are no longer needed
    ///
    /// A dump frees the pages of its parent that it supersedes. A restore frees the pages
    /// that it restores.
    #[arg(long, value_enum, value_name = "WHEN", num_args = 0..=1, require_equals = true,
          default_missing_value = "commit")]
    pub auto_dedup: Option<AutoDedupName>,
    /// Let the tree run on while its memory is copied; needs --leave-running
    ///
    /// The tree is stopped only while its state is read. The images show the tree at that moment.
    #[arg(long)]
    pub live: bool,
    /// The most memory that --live copies while the tree is stopped; SIZE may end in K, M or G
    ///
    /// That is shared memory, and private memory that a fork leaves out.
    #[arg(long, value_name = "SIZE", value_parser = size_bytes, default_value = "128M")]
    pub live_stopped: u64,
    /// How a pre-dump reads memory; rcriu does the same in both modes
    #[arg(long, value_enum, value_name = "MODE")]
    pub pre_dump_mode: Option<PreDumpMode>,
    /// Let the tree run at once, and restore its private memory when it is needed
    ///
    /// A process called rcriu-pager supplies the pages, and ends when all are there. If it fails
    /// before, it ends the tree.
    #[arg(long)]
    pub lazy: bool,
    /// Supply the memory first that FILE names, and add to FILE what the tree touches
    ///
    /// The file is made if it does not exist. For --lazy; relative to --work-dir.
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Restore memory on demand, from a lazy-pages server
    #[arg(long)]
    pub lazy_pages: bool,
}

/// Open files.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Files")]
pub(super) struct FileArgs {
    /// Dump file locks; a restore always takes those of the images
    #[arg(short = 'l', long)]
    pub file_locks: bool,
    /// Give open files whose name was deleted, but that have other links, a temporary name
    #[arg(long)]
    pub link_remap: bool,
    /// Store deleted files up to this size in the images; SIZE may end in K, M or G
    #[arg(long, value_name = "SIZE", value_parser = size_bytes, default_value = "1M")]
    pub ghost_limit: u64,
    /// Find the holes of deleted files with FIEMAP
    #[arg(long)]
    pub ghost_fiemap: bool,
    /// How a restore recognizes a file that has been replaced [default: buildid]
    #[arg(long, value_enum, value_name = "METHOD")]
    pub file_validation: Option<FileValidation>,
    /// Do not compare the permissions of files
    #[arg(long)]
    pub skip_file_rwx_check: bool,
    /// Accept any path to the same device
    #[arg(long)]
    pub evasive_devices: bool,
    /// Look for the paths of watched files (inotify, fanotify) in directories first
    #[arg(long)]
    pub force_irmap: bool,
    /// Also look for watched files below this directory; can be repeated
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
    /// Do not keep established TCP connections; restore their sockets as closed ones
    #[arg(long)]
    pub tcp_close: bool,
    /// Leave out connections that a program of the tree has not accepted: TCP ones, and UNIX ones
    /// of other programs
    #[arg(long)]
    pub skip_in_flight: bool,
    /// Allow UNIX sockets that are connected to other processes; INODE,... names such sockets
    #[arg(short = 'x', long, value_name = "INODE,...", num_args = 0..=1, require_equals = true,
          default_missing_value = NO_VALUE)]
    pub ext_unix_sk: Vec<Inodes>,
    /// How to hold back packets of TCP connections until the restore [default: nftables]
    #[arg(long, value_enum, value_name = "METHOD")]
    pub network_lock: Option<NetworkLock>,
}

/// Resources that are not dumped.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "External resources")]
pub(super) struct AroundArgs {
    /// Leave an external resource out of the dump: TYPE[ID]:VALUE; can be repeated
    #[arg(long, value_name = "RESOURCE")]
    pub external: Vec<String>,
    /// Use descriptor N of the caller for the external resource KEY; can be repeated
    #[arg(long, value_name = "fd[N]:KEY", value_parser = inherit_fd)]
    pub inherit_fd: Vec<(i32, String)>,
    /// Close this descriptor before opening any file; can be repeated
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(0..))]
    pub close: Vec<i32>,
    /// Load plugins from this directory
    #[arg(short = 'L', long, value_name = "DIR")]
    pub libdir: Option<PathBuf>,
}

/// Processor and security.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Machine")]
pub(super) struct MachineArgs {
    /// Record the processor in the dump, and compare it at the restore [default: none]
    ///
    /// ins: the instructions; fpu: the registers; cpu: all features; all; none. A ^ before a
    /// name leaves it out. ins and fpu are compared unless they are left out.
    #[arg(long, value_name = "ASPECT,...", num_args = 0..=1, require_equals = true,
          default_missing_value = "all")]
    pub cpu_cap: Option<CpuCap>,
    /// The security profile of the restored tree, which must be that of rcriu: rcriu sets none
    #[arg(long, value_name = "TYPE:NAME")]
    pub lsm_profile: Option<String>,
    /// Restore mounts with this security context
    #[arg(long, value_name = "CONTEXT")]
    pub lsm_mount_context: Option<String>,
    /// Allow trees with memory that uprobes have changed
    #[arg(long)]
    pub allow_uprobes: bool,
    /// Do what is possible without root privileges
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
    /// How to restore the cgroups of the tree [default: none]
    #[arg(long, value_enum, value_name = "MODE", num_args = 0..=1, require_equals = true,
          default_missing_value = "soft")]
    pub manage_cgroups: Option<ManageCgroups>,
    /// Stop the tree by freezing this cgroup
    #[arg(long, value_name = "DIR")]
    pub freeze_cgroup: Option<PathBuf>,
    /// Restore the tree into this cgroup; can be repeated
    #[arg(long, value_name = "[CONTROLLER:]/DIR")]
    pub cgroup_root: Vec<String>,
    /// Keep these properties of cgroups, too, or instead; a restore sets them only if it is told, too
    #[arg(long, value_name = "YAML")]
    pub cgroup_props: Option<String>,
    /// Read --cgroup-props from a file
    #[arg(long, value_name = "FILE")]
    pub cgroup_props_file: Option<PathBuf>,
    /// Keep only this controller; can be repeated
    #[arg(long, value_name = "NAME")]
    pub cgroup_dump_controller: Vec<String>,
    /// Use only the cgroup file systems that are mounted in this directory
    #[arg(long, value_name = "DIR")]
    pub cgroup_yard: Option<PathBuf>,
}

/// Namespaces.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Namespaces")]
pub(super) struct NamespaceArgs {
    /// Restore the tree into an existing namespace; can be repeated
    #[arg(short = 'J', long, value_name = "NS:{PID|FILE}")]
    pub join_ns: Vec<String>,
    /// Restore this namespace without its contents
    #[arg(long, value_name = "net", value_parser = ["net"])]
    pub empty_ns: Vec<String>,
    /// Leave out this mount; can be repeated
    #[arg(long, value_name = "PATH")]
    pub skip_mnt: Vec<PathBuf>,
    /// Dump mounts of these file systems as if they were supported
    #[arg(long, value_name = "NAME,...")]
    pub enable_fs: Vec<String>,
    /// Treat a mount as external; can be repeated
    #[arg(short = 'M', long, value_name = "KEY:VALUE")]
    pub ext_mount_map: Vec<String>,
    /// Allow mounts that are shared with mounts outside the tree
    #[arg(long)]
    pub enable_external_sharing: bool,
    /// Allow mounts that are slaves of mounts outside the tree
    #[arg(long)]
    pub enable_external_masters: bool,
    /// Restore mounts with CRIU's older method
    #[arg(long)]
    pub mntns_compat_mode: bool,
    /// Name the outer end of a pair of virtual network devices; can be repeated
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
    /// Send memory to a page server
    #[arg(long)]
    pub page_server: bool,
    /// Address of the page server (to listen on: any), or path of the service's socket
    #[arg(long, value_name = "ADDRESS")]
    pub address: Option<String>,
    /// Port of the page server (to listen on: any free one)
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// Descriptor of a connected socket to the page server
    #[arg(long, value_name = "FD")]
    pub ps_socket: Option<i32>,
    /// Write a zero byte to this descriptor, and close it, when the server is ready
    #[arg(long, value_name = "FD")]
    pub status_fd: Option<i32>,
    /// Encrypt the connection to the page server
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
    /// Do not compare the name in the server's certificate
    #[arg(long)]
    pub tls_no_cn_verify: bool,
}

/// Feature checks.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Check")]
pub(super) struct CheckArgs {
    /// Also require the features that only some trees need
    #[arg(long)]
    pub extra: bool,
    /// Also require the features that make rcriu faster
    #[arg(long)]
    pub experimental: bool,
    /// Require all features
    #[arg(long)]
    pub all: bool,
    /// Check only this feature, and require it; `list` prints all names; can be repeated
    #[arg(long, value_name = "NAME")]
    pub feature: Vec<String>,
    /// Skip features that no released kernel has
    #[arg(long)]
    pub ms: bool,
}

/// Deduplication.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Deduplication")]
pub(super) struct DedupArgs {
    /// Link full dumps of one tree into a chain, the oldest first: --link DIR DIR...
    #[arg(long)]
    pub link: bool,
    /// Write the linked dumps to new directories, DIR.linked, and keep the originals
    #[arg(long)]
    pub keep_originals: bool,
    /// Rewrite the files on a file system that cannot punch holes
    #[arg(long)]
    pub rewrite: bool,
    /// Let equal pages of the chain share blocks (btrfs, XFS); the contents stay the same
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
    /// Write the log to FILE in the work directory; `-` is standard output
    #[arg(short = 'o', long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Print more messages, one level for each v; -vN sets level N
    ///
    /// 0: nothing; 1: errors; 2: warnings too (the default); 3: phases with their
    /// figures; 4: every process and object; 5: every page and system call.
    #[arg(short = 'v', long, value_name = "N", num_args = 0..=1, require_equals = true,
          default_missing_value = NO_VALUE)]
    pub verbosity: Vec<Verbosity>,
    /// Write a log for each process
    #[arg(long)]
    pub log_pid: bool,
    /// Print the statistics at the end
    #[arg(long)]
    pub display_stats: bool,
}

/// Configuration files.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Configuration")]
pub(super) struct ConfigArgs {
    /// Read options from FILE, one per line, without dashes; the command line overrides them
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Do not read /etc/rcriu/default.conf and ~/.rcriu/default.conf (as criu: /etc/criu and
    /// ~/.criu)
    #[arg(long)]
    pub no_default_config: bool,
}

/// `--tracker`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum TrackerName {
    /// Write-protect memory with userfaultfd
    Wp,
    /// Use the kernel's soft-dirty bits
    SoftDirty,
    /// Track nothing; the next dump compares every page
    None,
}

/// `--auto-dedup`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum AutoDedupName {
    /// When the whole restore has succeeded
    Commit,
    /// As soon as the restore has read a page
    Now,
}

/// `--pre-dump-mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum PreDumpMode {
    /// Read the memory from outside
    Read,
    /// Splice the memory into pipes
    Splice,
}

/// `--file-validation`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum FileValidation {
    /// Compare sizes
    Filesize,
    /// Compare sizes and build-ids; for a file without a build-id, the modification time
    Buildid,
}

/// `--network-lock`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum NetworkLock {
    /// The same as nftables
    Iptables,
    /// Drop the packets by a table of nftables
    Nftables,
    /// Let the packets pass
    #[value(alias = "none")]
    Skip,
}

/// `--manage-cgroups`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ManageCgroups {
    /// Restore the tree into its cgroups, which must exist
    None,
    /// Set the properties of the existing cgroups
    Props,
    /// Make missing cgroups, and set their properties
    Soft,
    /// Make missing cgroups, and set the properties of all
    Full,
    /// Make all cgroups; fail if one exists
    Strict,
    /// Leave the tree in the cgroup of rcriu
    Ignore,
}

/// `--cpu-cap`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CpuCap(pub Option<Aspects>);

impl FromStr for CpuCap {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut aspects = Aspects { registers: true, instructions: true, everything: false };
        for word in text.split(',').filter(|word| !word.is_empty()) {
            let name = word.trim_start_matches('^');
            let wanted = (word.len() - name.len()).is_multiple_of(2);
            match name {
                "fpu" => aspects.registers = wanted,
                "ins" => aspects.instructions = wanted,
                "cpu" => aspects.everything = wanted,
                "all" | "none" => {
                    let all = wanted == (name == "all");
                    aspects = Aspects { registers: all, instructions: all, everything: all };
                }
                _ => return Err("not a list of cpu, fpu, ins, all and none, each maybe after a ^"),
            }
        }
        Ok(Self((aspects != Aspects::default()).then_some(aspects)))
    }
}

/// The value of one `-v`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verbosity {
    /// Raises the level by this number.
    More(u8),
    /// Sets this level.
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

/// Inode numbers of sockets, from `--ext-unix-sk`.
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
    const WRONG: &str = "not a number of bytes, optionally followed by K, M or G";
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
    fn aspects_of_the_processor_are_added_and_left_out() {
        let aspects = |registers, instructions, everything| {
            Ok(CpuCap(Some(Aspects { registers, instructions, everything })))
        };
        for (text, expected) in [
            ("all", aspects(true, true, true)),
            ("", aspects(true, true, false)),
            ("cpu", aspects(true, true, true)),
            ("ins", aspects(true, true, false)),
            ("^ins", aspects(true, false, false)),
            ("none,ins", aspects(false, true, false)),
            ("^none", aspects(true, true, true)),
            ("all,^cpu,^fpu", aspects(false, true, false)),
            ("none", Ok(CpuCap(None))),
            ("^fpu,^ins", Ok(CpuCap(None))),
        ] {
            assert_eq!(text.parse(), expected, "{text}");
        }
        assert!("avx".parse::<CpuCap>().is_err() && "ins cpu".parse::<CpuCap>().is_err());
    }

    #[test]
    fn inherited_descriptors_have_number_and_key() {
        assert_eq!(inherit_fd("fd[7]:pipe:[12]"), Ok((7, "pipe:[12]".to_owned())));
        for text in ["", "7:x", "fd[]:x", "fd[-1]:x", "fd[7]", "fd[7]:", "fd[7:x"] {
            assert!(inherit_fd(text).is_err(), "{text}");
        }
    }
}
