//! The options of `imgfs mount`, and their equivalents of `mount -o`.

use std::{num::NonZeroUsize, path::PathBuf};

use anyhow::{Context, anyhow, bail};
use clap::{Args, ValueEnum, builder::PossibleValue};

use crate::{
    cli::source::Source,
    fs::{Compose, Punch},
    view::Part,
};

/// Mount a chain as one flat image directory, read-only unless --punch is given
///
/// The command returns when the mount is ready. A daemon serves the mount until it is
/// unmounted.
#[derive(Args, Debug)]
pub struct MountArgs {
    #[command(flatten)]
    pub(super) source: Source,
    /// Existing directory to mount on; it must not hold any of the images
    pub(super) mountpoint: PathBuf,
    /// Name of the snapshot to show [default: the only one without children]
    #[arg(long, value_name = "NAME")]
    pub(super) snapshot: Option<String>,
    /// Let restorers free pages that they have restored
    ///
    /// imgfs frees a page in the snapshot that holds it. From then on, reading the page fails
    /// with an input/output error in all snapshots that share it. Without WHEN, imgfs frees
    /// pages when a restorer punches them (fallocate(2)) in pages-*.img, as `criu restore
    /// --auto-dedup` does.
    #[arg(
        long,
        value_name = "WHEN",
        value_enum,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "on-request"
    )]
    pub(super) punch: Option<PunchName>,
    /// Stay in the foreground and log to standard error
    #[arg(short, long)]
    pub(super) foreground: bool,
    /// Allow other users to read the mount; memory images contain secrets
    #[arg(long)]
    pub(super) allow_other: bool,
    /// Whether mem/ and core/ show the files that processes had mapped
    ///
    /// Images do not hold the unchanged parts of a mapped file; mem/ and core/ take these parts
    /// from the file itself.
    #[arg(long, value_name = "WHO", value_enum, default_value_t = MappedFiles::Own)]
    pub(super) mapped_files: MappedFiles,
    /// Number of threads that serve reads [default: one for each processor, at least 2]
    #[arg(long, value_name = "N")]
    pub(super) threads: Option<NonZeroUsize>,
    /// When to compose files of the images' blocks, so that reads are as fast as of plain files
    ///
    /// A file of the mount can lie in several snapshots. On a file system that shares blocks
    /// (btrfs, XFS), imgfs can make an unnamed file of these blocks when a program opens the
    /// file, with one system call for each extent. The unnamed file takes space only for its
    /// list of extents. The kernel reads it from disk even if the images are in memory. imgfs
    /// serves the file from the images for users other than root, with --punch, and if the
    /// file has more than 32768 extents.
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = ComposeName::Auto)]
    pub(super) compose: ComposeName,
    /// Compose files in DIR instead of the directory of the shown snapshot
    ///
    /// DIR must be on the file system of the images. Use it if the images are read-only.
    #[arg(long, value_name = "DIR")]
    pub(super) compose_dir: Option<PathBuf>,
    /// Log to FILE instead of the system log
    #[arg(long, value_name = "FILE")]
    pub(super) log_file: Option<PathBuf>,
    /// Leave parts of the mount out
    ///
    /// shmem also leaves out shmem-by-name/ and shmem-by-process/. The images themselves always
    /// remain; so does the memory of a process in proc/PID/mem, even without mem.
    #[arg(long, value_name = "PART,...", value_enum, value_delimiter = ',')]
    pub(super) without: Vec<Part>,
    /// Print only warnings, and no summary of the mount
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// Mount options, as in mount(8) and fstab(5)
    ///
    /// There is one for each option above: allow_other, cache_dir=DIR, cache_limit=SIZE,
    /// compose=WHEN, compose_dir=DIR, foreground, log_file=FILE, mapped_files=WHO,
    /// previous=ARCHIVE, punch[=WHEN], quiet, snapshot=NAME, threads=N, verbose, and
    /// without=PART:... (separated by colons). ro is the default. imgfs ignores options for
    /// other programs, such as noauto or x-systemd.requires=....
    #[arg(short = 'o', value_name = "OPT,...")]
    pub(super) options: Vec<String>,
    /// `-o verbose`
    #[arg(skip)]
    pub(super) verbose: bool,
}

/// `--mapped-files`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum MappedFiles {
    /// If the images belong to the user who mounts them
    Own,
    /// Also if root mounts the images of one other user; imgfs reads the files with that
    /// user's rights
    Owner,
    /// Never
    Never,
}

/// `--without`
impl ValueEnum for Part {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

/// `--compose`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ComposeName {
    /// At the first open if most of the file is not in memory, otherwise at the second
    Auto,
    /// At the first open
    Always,
    /// Never
    Never,
}

impl ComposeName {
    pub(super) fn compose(self) -> Compose {
        match self {
            Self::Auto => Compose::Auto,
            Self::Always => Compose::Always,
            Self::Never => Compose::Never,
        }
    }
}

/// `--punch`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum PunchName {
    #[value(hide = true)]
    OnRequest,
    /// Also free pages that were read, for restorers that do not punch; if the restore fails,
    /// the pages are lost
    OnRead,
    /// Free punched pages only on `imgfs commit`; forget them if the mount ends before
    Commit,
}

impl PunchName {
    pub(super) fn punch(self) -> Punch {
        match self {
            Self::OnRequest => Punch::OnRequest,
            Self::OnRead => Punch::OnRead,
            Self::Commit => Punch::Commit,
        }
    }
}

impl MountArgs {
    /// Applies options of `mount -o`.
    pub(super) fn apply(&mut self, options: &str) -> anyhow::Result<()> {
        for option in options.split(',').filter(|option| !option.is_empty()) {
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (option, None),
            };
            match (name, value) {
                ("allow_other", None) => self.allow_other = true,
                ("foreground", None) => self.foreground = true,
                ("quiet", None) => self.quiet = true,
                ("verbose", None) => self.verbose = true,
                ("without", Some(parts)) => {
                    for part in parts.split(':') {
                        let part = Part::from_str(part, false);
                        let failed = |why| anyhow!("mount option {option}: {why}");
                        self.without.push(part.map_err(failed)?);
                    }
                }
                ("log_file", Some(value)) => self.log_file = Some(value.into()),
                ("compose", Some(when)) => {
                    let when = ComposeName::from_str(when, false);
                    let failed = |why| anyhow!("mount option {option}: {why}");
                    self.compose = when.map_err(failed)?;
                }
                ("compose_dir", Some(value)) => self.compose_dir = Some(value.into()),
                ("snapshot", Some(value)) => self.snapshot = Some(value.to_owned()),
                ("threads", Some(value)) => {
                    let threads = value.parse().with_context(|| format!("mount option {option}"));
                    self.threads = Some(threads?);
                }
                ("mapped_files", Some(who)) => {
                    let who = MappedFiles::from_str(who, false);
                    let failed = |why| anyhow!("mount option {option}: {why}");
                    self.mapped_files = who.map_err(failed)?;
                }
                ("punch", when) => {
                    let when = when.unwrap_or(Punch::OnRequest.name());
                    let name = PunchName::from_str(when, false);
                    self.punch = Some(name.map_err(|why| anyhow!("mount option {option}: {why}"))?);
                }
                ("rw", None) => bail!("mount option rw: only punch makes a chain writable"),
                (name, Some(value)) if self.source.apply(name, value)? => {}
                _ if is_for_others(name) => {}
                _ => bail!("unknown mount option {option}"),
            }
        }
        Ok(())
    }
}

/// Whether an option is a default, or is for mount(8), systemd or similar programs.
fn is_for_others(name: &str) -> bool {
    const KNOWN: [&str; 26] = [
        "_netdev",
        "async",
        "atime",
        "auto",
        "comment",
        "defaults",
        "dev",
        "diratime",
        "exec",
        "group",
        "loud",
        "noatime",
        "noauto",
        "nodev",
        "nodiratime",
        "noexec",
        "nofail",
        "norelatime",
        "nosuid",
        "nouser",
        "owner",
        "relatime",
        "ro",
        "silent",
        "user",
        "users",
    ];
    KNOWN.contains(&name) || name.starts_with("x-") || name.starts_with("X-")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        mount: MountArgs,
    }

    fn applied(options: &str) -> Result<MountArgs, String> {
        let mut args = Line::parse_from(["mount", "chain", "mnt"]).mount;
        args.apply(options).map(|()| args).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn options_of_mount_are_applied_ignored_or_refused() {
        let args = applied(
            "ro,nosuid,snapshot=2,,threads=3,log_file=/l=g,allow_other,x-a=b,punch=on-read",
        )
        .unwrap();
        assert_eq!(args.snapshot.as_deref(), Some("2"));
        assert_eq!(args.threads.map(NonZeroUsize::get), Some(3));
        assert_eq!(args.log_file, Some("/l=g".into()));
        assert!(args.allow_other && !args.foreground);
        assert_eq!(args.punch, Some(PunchName::OnRead));
        assert_eq!(applied("punch").unwrap().punch, Some(PunchName::OnRequest));
        let without = applied("without=mem:core,verbose,quiet").unwrap();
        assert_eq!(without.without, [Part::Mem, Part::Core]);
        assert!(without.verbose && without.quiet);
        assert_eq!(applied("punch=commit").unwrap().punch, Some(PunchName::Commit));

        let refused = |options| applied(options).unwrap_err();
        assert_eq!(refused("ro,rw"), "mount option rw: only punch makes a chain writable");
        assert!(refused("punch=later").starts_with("mount option punch=later: "));
        assert_eq!(refused("nosnapshot"), "unknown mount option nosnapshot");
        assert_eq!(refused("snapshot"), "unknown mount option snapshot");
        assert!(refused("without=memory").starts_with("mount option without=memory: "));
        assert!(refused("threads=0").starts_with("mount option threads=0: "));
    }
}
