//! `imgfs mount` and `imgfs umount`.

use std::{
    io::Write,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, anyhow, bail};
use clap::{Args, ValueEnum};
use indicatif::BinaryBytes;
use nix::unistd::{getegid, geteuid};
use serde_json::json;

use super::{
    Common, exit, log_sink,
    look::print_json,
    report,
    source::{Source, absolute},
    table::{Align, Table},
    times,
};
use crate::{
    causes::tell,
    chain::{Chain, Glance, Owner, SnapshotId, freed, glance},
    fs::{self, Compose, MountOptions, Punch, Session},
    image::Kind,
    sys::{
        daemon::{self, Background, Detached, Start},
        lock::{Access, DirectoryLocks},
        reader::Reader,
    },
    units::page_bytes,
    view::{Part, View},
};

/// Mount a chain as one flat image directory, read-only unless --punch is given
///
/// The command returns when the mount is ready. A daemon serves the mount until it is
/// unmounted.
#[derive(Args, Debug)]
pub struct MountArgs {
    #[command(flatten)]
    source: Source,
    /// Existing directory to mount on; it must not hold any of the images
    mountpoint: PathBuf,
    /// Name of the snapshot to show [default: the only one without children]
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
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
    punch: Option<PunchName>,
    /// Stay in the foreground and log to standard error
    #[arg(short, long)]
    foreground: bool,
    /// Allow other users to read the mount; memory images contain secrets
    #[arg(long)]
    allow_other: bool,
    /// Whether mem/ and core/ show the files that processes had mapped
    ///
    /// Images do not hold the unchanged parts of a mapped file; mem/ and core/ take these parts
    /// from the file itself.
    #[arg(long, value_name = "WHO", value_enum, default_value_t = MappedFiles::Own)]
    mapped_files: MappedFiles,
    /// Number of threads that serve reads [default: one for each processor, at least 2]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// When to compose files of the images' blocks, so that reads are as fast as of plain files
    ///
    /// A file of the mount can lie in several snapshots. On a file system that shares blocks
    /// (btrfs, XFS), imgfs can make an unnamed file of these blocks when a program opens the
    /// file, with one system call for each extent. The unnamed file takes space only for its
    /// list of extents. The kernel reads it from disk even if the images are in memory. imgfs
    /// serves the file from the images for users other than root, with --punch, and if the
    /// file has more than 32768 extents.
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = ComposeName::Auto)]
    compose: ComposeName,
    /// Compose files in DIR instead of the directory of the shown snapshot
    ///
    /// DIR must be on the file system of the images. Use it if the images are read-only.
    #[arg(long, value_name = "DIR")]
    compose_dir: Option<PathBuf>,
    /// Log to FILE instead of the system log
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Leave parts of the mount out
    ///
    /// shmem also leaves out shmem-by-name/ and shmem-by-process/. The images themselves always
    /// remain; so does the memory of a process in proc/PID/mem, even without mem.
    #[arg(long, value_name = "PART,...", value_enum, value_delimiter = ',')]
    without: Vec<PartName>,
    /// Print only warnings, and no summary of the mount
    #[arg(short, long)]
    quiet: bool,
    /// Mount options, as in mount(8) and fstab(5)
    ///
    /// There is one for each option above: allow_other, cache_dir=DIR, cache_limit=SIZE,
    /// compose=WHEN, compose_dir=DIR, foreground, log_file=FILE, mapped_files=WHO,
    /// previous=ARCHIVE, punch[=WHEN], quiet, snapshot=NAME, threads=N, verbose, and
    /// without=PART:... (separated by colons). ro is the default. imgfs ignores options for
    /// other programs, such as noauto or x-systemd.requires=....
    #[arg(short = 'o', value_name = "OPT,...")]
    options: Vec<String>,
    /// `-o verbose`
    #[arg(skip)]
    verbose: bool,
}

/// `--mapped-files`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MappedFiles {
    /// If the images belong to the user who mounts them
    Own,
    /// Also if root mounts the images of one other user; imgfs reads the files with that
    /// user's rights
    Owner,
    /// Never
    Never,
}

/// `--without`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PartName {
    Core,
    Files,
    Json,
    Mem,
    Proc,
    Shmem,
    Snapshots,
}

impl PartName {
    fn part(self) -> Part {
        match self {
            Self::Core => Part::Core,
            Self::Files => Part::Files,
            Self::Json => Part::Json,
            Self::Mem => Part::Mem,
            Self::Proc => Part::Proc,
            Self::Shmem => Part::Shmem,
            Self::Snapshots => Part::Snapshots,
        }
    }
}

/// `--compose`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ComposeName {
    /// At the first open if most of the file is not in memory, otherwise at the second
    Auto,
    /// At the first open
    Always,
    /// Never
    Never,
}

impl ComposeName {
    fn compose(self) -> Compose {
        match self {
            Self::Auto => Compose::Auto,
            Self::Always => Compose::Always,
            Self::Never => Compose::Never,
        }
    }
}

/// `--punch`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PunchName {
    #[value(hide = true)]
    OnRequest,
    /// Also free pages that were read, for restorers that do not punch; if the restore fails,
    /// the pages are lost
    OnRead,
    /// Free punched pages only on `imgfs commit`; forget them if the mount ends before
    Commit,
}

impl PunchName {
    fn punch(self) -> Punch {
        match self {
            Self::OnRequest => Punch::OnRequest,
            Self::OnRead => Punch::OnRead,
            Self::Commit => Punch::Commit,
        }
    }
}

/// Free the pages that were punched through a mount with --punch=commit
#[derive(Args, Debug)]
pub struct CommitArgs {
    /// Where the chain is mounted
    mountpoint: PathBuf,
}

/// Frees the punched pages and prints their number.
///
/// # Errors
/// What [`fs::commit`] returns.
pub fn commit(args: &CommitArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let pages = fs::commit(&args.mountpoint)?;
    writeln!(out, "freed {pages} pages, {}", BinaryBytes(page_bytes(pages)))?;
    Ok(())
}

/// Show the last warnings and errors of a mount
///
/// A failed read returns only `Input/output error`; the message names the missing page and its
/// image. The daemon keeps the messages until the mount ends.
#[derive(Args, Debug)]
pub struct LogArgs {
    /// Where the chain is mounted
    mountpoint: PathBuf,
}

/// Prints the last messages of a mount.
///
/// # Errors
/// What [`fs::log`] returns.
pub fn log(args: &LogArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    Ok(out.write_all(fs::log(&args.mountpoint)?.as_bytes())?)
}

/// List the chains that are mounted
///
/// DAEMON is the process that serves a mount. If a mount has none, its daemon has died;
/// `imgfs umount` removes the mount. Only root sees the daemons of other users.
#[derive(Args, Debug)]
pub struct MountsArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Lists mounts.
///
/// # Errors
/// What [`fs::mounts`] returns; a failed write of the output.
pub fn mounts(args: &MountsArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let mounts = fs::mounts()?;
    if args.json {
        let document = mounts.iter().map(|mount| {
            json!({
                "chain": mount.chain.to_string_lossy(),
                "mount_point": mount.mount_point.to_string_lossy(),
                "directory": mount.directory.as_ref().map(|dir| dir.to_string_lossy()),
                "punch": mount.punch,
                "daemon": mount.daemon,
                "log": mount.log,
            })
        });
        return print_json(&json!({ "mounts": document.collect::<Vec<_>>() }), out);
    }
    let mut table = Table::new(&[
        ("MOUNTPOINT", Align::Left),
        ("CHAIN", Align::Left),
        ("PUNCH", Align::Left),
        ("DAEMON", Align::Right),
        ("LOG", Align::Left),
    ]);
    for mount in mounts {
        table.row(vec![
            mount.mount_point.display().to_string(),
            mount.chain.display().to_string(),
            mount.punch.unwrap_or_else(|| "-".to_owned()),
            mount.daemon.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            mount.log.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table.print(out)
}

/// Unmount a chain
#[derive(Args, Debug)]
pub struct UnmountArgs {
    /// Where the chain is mounted
    mountpoint: PathBuf,
    /// Detach the mount even if it is in use; processes that use it can go on
    #[arg(short, long)]
    lazy: bool,
}

/// Unmounts a chain.
///
/// # Errors
/// What [`fs::unmount`] returns.
pub fn unmount(args: &UnmountArgs) -> anyhow::Result<()> {
    Ok(fs::unmount(&args.mountpoint, args.lazy)?)
}

/// Mounts a chain and returns the exit code: in the foreground at once, in the background when
/// the mount has ended.
pub fn run(mut args: MountArgs, common: Common) -> ExitCode {
    for options in std::mem::take(&mut args.options) {
        if let Err(error) = args.apply(&options) {
            report(&error);
            return ExitCode::from(exit::USAGE);
        }
    }
    let common = if args.verbose { common.at_least_verbose() } else { common };
    let result = if args.foreground {
        args.serve(None, common).map(|()| exit::OK)
    } else {
        args.detach(common)
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            report(&error);
            ExitCode::from(exit::FAILED)
        }
    }
}

impl MountArgs {
    /// Applies options of `mount -o`.
    fn apply(&mut self, options: &str) -> anyhow::Result<()> {
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
                        let part = PartName::from_str(part, false);
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

    /// Starts the daemon, and returns when it is ready or has failed.
    fn detach(mut self, common: Common) -> anyhow::Result<u8> {
        // The daemon changes its working directory.
        let optional = [self.log_file.as_mut(), self.compose_dir.as_mut()];
        self.source.make_absolute()?;
        std::iter::once(&mut self.mountpoint)
            .chain(optional.into_iter().flatten())
            .try_for_each(absolute)?;
        let foreground = match daemon::detach().context("start a process in the background")? {
            Detached::Background(background) => {
                return self.serve(Some(background), common).map(|()| exit::OK);
            }
            Detached::Foreground(foreground) => foreground,
        };
        match foreground.wait().context("wait for the process in the background")? {
            Start::Ready => Ok(exit::OK),
            // The daemon has printed the error.
            Start::Exited(_) => Ok(exit::FAILED),
            Start::Killed(signal) => bail!("the process in the background was killed by {signal}"),
        }
    }

    /// Mounts, tells the foreground process to return, and serves until the mount is gone.
    fn serve(self, background: Option<Background>, common: Common) -> anyhow::Result<()> {
        let log = log_sink::start(self.foreground, self.log_file.as_deref(), common.log_level())?;
        let chain = Arc::new(self.source.open()?);
        let tip = chain.choose(self.snapshot.as_deref())?;
        if self.punch.is_some() {
            // Fails for a chain in an archive.
            chain.directory(tip)?;
        }
        // The lock keeps other programs from freeing pages of the chain, which would
        // invalidate our indexes. A mount that frees pages locks the chain exclusively.
        let access = if self.punch.is_some() { Access::Exclusive } else { Access::Shared };
        let mut locks = DirectoryLocks::default();
        for base in chain.bases() {
            if let Some(dir) = chain.snapshot(base).directory() {
                locks.take(dir, access)?;
            }
        }
        let trust = Trust::of(&chain, self.mapped_files);
        if let Some(warning) = &trust.warning {
            tell(log::Level::Warn, warning);
        }
        if let Some(reader) = trust.reader {
            reader.assume().context("read the images with the rights of their owner")?;
        }
        if self.punch.is_some()
            && let Some(warning) = freed::warning(&chain, tip)?
        {
            tell(log::Level::Warn, &warning);
        }
        let glance = glance(&chain, tip);
        warn_of_damage(&glance, &chain.snapshot(tip).name, self.source.path(), &self.mountpoint);
        let summary = summary(&chain, tip, &glance)?;
        let parts = self.without.iter().map(|part| part.part());
        let view = Arc::new(trust.apply(View::new(chain, tip)).without(parts));
        let mut options = MountOptions {
            allow_other: self.allow_other,
            compose: self.compose.compose(),
            compose_dir: self.compose_dir,
            reader: trust.reader,
            ..Default::default()
        };
        options.punch = self.punch.map(PunchName::punch);
        if let Some(threads) = self.threads {
            options.threads = threads;
        }
        if let Some(dir) = &options.compose_dir
            && !std::fs::metadata(dir)
                .with_context(|| format!("--compose-dir {}", dir.display()))?
                .is_dir()
        {
            bail!("--compose-dir {}: not a directory", dir.display());
        }
        let session = Session::mount(view, self.source.path(), &self.mountpoint, &options)?;
        if !self.quiet {
            let point = self.mountpoint.display();
            let mut out = std::io::stdout().lock();
            // The mount stays if standard output is closed.
            let _ = writeln!(
                out,
                "mounted {} at {point}\n{summary}Log:        {log}; `imgfs log {point}` shows the \
                 last warnings\nTo begin:   {point}/README",
                self.source.path().display(),
            );
        }
        if let Some(background) = background {
            background.ready().context("let go of the terminal")?;
        }
        Ok(session.run()?)
    }
}

/// How images that may belong to another user are read.
///
/// A user who can write to an image directory can make it name any file of this machine: by
/// links, by its parent, or as a file that a process had mapped. So files are read with the
/// rights of the images' owner, if that is one user and we may assume them; otherwise only
/// the user who mounts sees the result, and that user could have read the files anyway.
struct Trust {
    reader: Option<Reader>,
    shown_to: Option<(u32, u32)>,
    mapped_files: bool,
    warning: Option<String>,
}

impl Trust {
    fn of(chain: &Chain, mapped_files: MappedFiles) -> Self {
        let me = geteuid();
        let own = (me.as_raw(), getegid().as_raw());
        match Owner::of(chain) {
            Owner::One(owner) if owner == own.0 => Self {
                reader: None,
                shown_to: None,
                mapped_files: mapped_files != MappedFiles::Never,
                warning: None,
            },
            Owner::One(owner) if me.is_root() => {
                let left_out = format!(
                    "the images belong to user {owner} and are read with that user's rights; mem/ and \
                     core/ have holes for the files that processes had mapped\nhelp: \
                     --mapped-files=owner reads these files with the same rights"
                );
                Self {
                    reader: Some(Reader(owner)),
                    shown_to: None,
                    mapped_files: mapped_files == MappedFiles::Owner,
                    warning: (mapped_files == MappedFiles::Own).then_some(left_out),
                }
            }
            other => {
                let why = match other {
                    Owner::One(owner) => format!("the images belong to user {owner}"),
                    Owner::Several { dir } => {
                        format!("more than one user could have put images into {}", dir.display())
                    }
                };
                let warning = format!(
                    "{why}; the mount is for user {} alone, and mem/ and core/ have holes for the \
                     files that processes had mapped\nhelp: give the directories and all files in them \
                     to one user (chown -R), and let only that user write there",
                    own.0
                );
                Self {
                    reader: None,
                    shown_to: Some(own),
                    mapped_files: false,
                    warning: Some(warning),
                }
            }
        }
    }

    fn apply(&self, mut view: View) -> View {
        if !self.mapped_files {
            view = view.without_mapped_files();
        }
        if let Some((uid, gid)) = self.shown_to {
            view = view.shown_to(uid, gid);
        }
        view
    }
}

/// Returns the lines that describe the snapshot.
fn summary(chain: &Chain, tip: SnapshotId, glance: &Glance) -> anyhow::Result<String> {
    /// Names of programs that are printed.
    const NAMES: usize = 5;
    let snapshot = chain.snapshot(tip);
    let inventory = snapshot.images.stat(&Kind::Inventory.file_name(0));
    let date = match inventory {
        Ok(stat) => format!(", {} ({})", times::shown(stat.modified)?, times::zone()),
        Err(_) => String::new(),
    };
    let mut names: Vec<&str> = Vec::new();
    for name in &glance.processes {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let more = if names.len() > NAMES { ", ..." } else { "" };
    names.truncate(NAMES);
    let processes = match glance.processes.len() {
        0 => "none; a pre-dump holds memory only".to_owned(),
        count => format!("{count} ({}{more})", names.join(", ")),
    };
    Ok(format!(
        "Snapshot:   {}, one of {}{date}\nProcesses:  {}\nMemory:     {} private, {} shared\n",
        snapshot.name,
        chain.snapshots().len(),
        processes.replace(|c: char| c.is_control(), "?"),
        BinaryBytes(page_bytes(glance.private)),
        BinaryBytes(page_bytes(glance.shared)),
    ))
}

/// Warns of the defects of the chain that a quick look finds, and of the reads that they make
/// fail.
fn warn_of_damage(glance: &Glance, snapshot: &str, path: &Path, mountpoint: &Path) {
    /// How many messages are printed; the others are counted.
    const TOLD: usize = 4;
    let problems = &glance.problems;
    for problem in problems.iter().take(TOLD) {
        tell(log::Level::Warn, problem);
    }
    if problems.is_empty() {
        return;
    }
    let more = match problems.len().saturating_sub(TOLD) {
        0 => String::new(),
        more => format!(" ({more} more defects are not shown)"),
    };
    let message = format!(
        "reading a missing page fails with an input/output error in the pages, mem/, core/ and \
         shmem/ of {}{more}\nhelp: `imgfs check {}` lists all defects, and `imgfs log {}` says why \
         a read failed",
        snapshot,
        path.display(),
        mountpoint.display()
    );
    tell(log::Level::Warn, &message);
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
        assert_eq!(without.without, [PartName::Mem, PartName::Core]);
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
