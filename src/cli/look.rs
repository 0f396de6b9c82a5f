//! `imgfs ps`, `fds`, `maps`, `cat`, `get` and `info`: look into a snapshot without a mount.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use indicatif::BinaryBytes;
use serde_json::{Value, json};

use super::{
    source::{Source, choose},
    table::{Align, Table},
    times,
};
use crate::{
    causes::{tell, told},
    chain::{Chain, Content, SnapshotId, Summary, read_at},
    view::{Incomplete, NodeType, View, extract},
};

/// Options that choose a snapshot.
#[derive(Debug, clap::Args)]
pub struct Which {
    #[command(flatten)]
    source: Source,
    /// Name of the snapshot [default: the only one without children]
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
}

impl Which {
    /// Opens the chain, and chooses the snapshot.
    ///
    /// # Errors
    /// A place without images; a name that no snapshot has.
    pub(super) fn open(&self) -> anyhow::Result<(Chain, SnapshotId)> {
        let chain = self.source.open()?;
        let tip = choose(&chain, self.snapshot.as_deref())?;
        Ok((chain, tip))
    }

    fn view(&self) -> anyhow::Result<View> {
        let (chain, tip) = self.open()?;
        Ok(View::new(Arc::new(chain), tip))
    }
}

/// List the processes of a snapshot.
///
/// STORED is how much of a process's private memory the chain holds, SHARED how much of the
/// shared objects that the process maps. A mount shows the same in proc/, for ps(1) and similar
/// programs.
#[derive(Debug, clap::Args)]
pub struct ProcessesArgs {
    #[command(flatten)]
    which: Which,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Lists processes.
///
/// # Errors
/// Images that cannot be read; a failed write of the output.
pub fn processes(args: &ProcessesArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let view = args.which.view()?;
    let rows = view.processes()?;
    tell_of_gap(&view);
    if args.json {
        let document = rows.iter().map(|row| {
            json!({
                "pid": row.pid,
                "ppid": row.ppid,
                "uid": row.uid,
                "state": row.state.to_string(),
                "threads": row.threads,
                "mapped_bytes": row.mapped,
                "private_bytes": row.private,
                "shared_bytes": row.shared,
                "command": row.command,
            })
        });
        return print_json(&json!({ "processes": document.collect::<Vec<Value>>() }), out);
    }
    let mut table = Table::new(&[
        ("PID", Align::Right),
        ("PPID", Align::Right),
        ("UID", Align::Right),
        ("S", Align::Left),
        ("THREADS", Align::Right),
        ("MAPPED", Align::Right),
        ("STORED", Align::Right),
        ("SHARED", Align::Right),
        ("COMMAND", Align::Left),
    ]);
    for row in rows {
        table.row(vec![
            row.pid.to_string(),
            row.ppid.to_string(),
            row.uid.map_or_else(|| "?".to_owned(), |uid| uid.to_string()),
            row.state.to_string(),
            row.threads.to_string(),
            BinaryBytes(row.mapped).to_string(),
            BinaryBytes(row.private).to_string(),
            BinaryBytes(row.shared).to_string(),
            row.command,
        ]);
    }
    table.print(out)
}

/// List the open files of a snapshot's processes.
///
/// ACCESS is r, w or u (both), as in lsof(8). POSITION is the file offset in bytes.
#[derive(Debug, clap::Args)]
pub struct DescriptorsArgs {
    #[command(flatten)]
    which: Which,
    /// Process whose files are listed [default: all processes]
    pid: Option<u32>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Lists open files.
///
/// # Errors
/// As [`processes`]; a process that is not there.
pub fn descriptors(args: &DescriptorsArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let view = args.which.view()?;
    let rows = view.descriptors(args.pid)?;
    if args.json {
        let document = rows.iter().map(|row| {
            json!({
                "pid": row.pid,
                "fd": row.fd,
                "access": row.access.to_string(),
                "close_on_exec": row.close_on_exec,
                "position": row.position,
                "target": row.target,
            })
        });
        return print_json(&json!({ "descriptors": document.collect::<Vec<Value>>() }), out);
    }
    let mut table = Table::new(&[
        ("PID", Align::Right),
        ("FD", Align::Right),
        ("ACCESS", Align::Left),
        ("POSITION", Align::Right),
        ("TARGET", Align::Left),
    ]);
    for row in rows {
        table.row(vec![
            row.pid.to_string(),
            row.fd.to_string(),
            row.access.to_string(),
            row.position.to_string(),
            row.target,
        ]);
    }
    table.print(out)
}

/// List the mappings of a process.
///
/// STORED is how much of the process's own pages the chain holds, SHARED how much of the shared
/// object at these addresses.
#[derive(Debug, clap::Args)]
pub struct MappingsArgs {
    #[command(flatten)]
    which: Which,
    /// Process whose mappings are listed
    pid: u32,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Lists mappings.
///
/// # Errors
/// As [`descriptors`].
pub fn mappings(args: &MappingsArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let view = args.which.view()?;
    let rows = view.mappings(args.pid)?;
    tell_of_gap(&view);
    if args.json {
        let document = rows.iter().map(|row| {
            json!({
                "start": row.start,
                "end": row.end,
                "protection": row.protection,
                "private_bytes": row.private,
                "shared_bytes": row.shared,
                "name": row.name,
            })
        });
        return print_json(&json!({ "mappings": document.collect::<Vec<Value>>() }), out);
    }
    let mut table = Table::new(&[
        ("ADDRESSES", Align::Left),
        ("PROT", Align::Left),
        ("SIZE", Align::Right),
        ("STORED", Align::Right),
        ("SHARED", Align::Right),
        ("NAME", Align::Left),
    ]);
    for row in rows {
        table.row(vec![
            format!("{:012x}-{:012x}", row.start, row.end),
            row.protection,
            BinaryBytes(row.end - row.start).to_string(),
            BinaryBytes(row.private).to_string(),
            BinaryBytes(row.shared).to_string(),
            row.name,
        ]);
    }
    table.print(out)
}

/// Print a file that a mount would show.
///
/// For example proc/PID/cmdline, shmem/ID, or snapshots/NAME/json/core-PID.img.json.
#[derive(Debug, clap::Args)]
pub struct CatArgs {
    #[command(flatten)]
    which: Which,
    /// Path of the file, from the root of the mount
    path: String,
}

/// Prints a file.
///
/// # Errors
/// A path that leads to no file; a file that cannot be read; a failed write.
pub fn cat(args: &CatArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    /// Bytes of one read.
    const PIECE_BYTES: usize = 1 << 20;
    let view = args.which.view()?;
    let mut found = view.find(&args.path)?;
    // The target of a link to a shared object, but not that of a link to a file of the machine.
    if found.kind == NodeType::Link
        && let Ok(target) = view.follow(&args.path)
    {
        found = target;
    }
    match found.kind {
        NodeType::File => {}
        NodeType::Directory => bail!("{} is a directory; imgfs get copies it", args.path),
        NodeType::Link => {
            let target = view.link(found.ino)?;
            bail!("{} is a link to {}", args.path, String::from_utf8_lossy(&target));
        }
        NodeType::Pipe | NodeType::Socket | NodeType::CharDevice | NodeType::BlockDevice => {
            bail!("{} is a pipe, a socket or a device, and has no contents", args.path)
        }
    }
    let content: Arc<dyn Content> = view.open(found.ino)?.content;
    let mut buffer = vec![0; PIECE_BYTES];
    let mut offset = 0;
    loop {
        let read = read_at(&*content, offset, &mut buffer)?;
        if read == 0 {
            tell_of_gap(&view);
            return Ok(());
        }
        out.write_all(&buffer[..read])?;
        offset += read as u64;
    }
}

/// Copy a file or directory that a mount would show.
///
/// Files keep their holes. Without DEST, imgfs copies to the same name in the working
/// directory. imgfs overwrites no file. If part of a file cannot be read, for example because
/// the parent of the snapshot is missing, the copy has a hole there; imgfs names the file and
/// exits with 1.
#[derive(Debug, clap::Args)]
pub struct GetArgs {
    #[command(flatten)]
    which: Which,
    /// Path of the file or directory, from the root of the mount
    path: String,
    /// Path of the copy, which must not exist
    dest: Option<PathBuf>,
}

/// Copies a file or directory.
///
/// # Errors
/// As [`cat`]; a destination that exists; a copy that is not complete.
pub fn get(args: &GetArgs) -> anyhow::Result<()> {
    let view = args.which.view()?;
    let found = view.find(&args.path)?;
    let name = Path::new(&args.path).file_name();
    let Some(dest) = args.dest.as_deref().or(name.map(Path::new)) else {
        bail!("the copy needs a name\nhelp: imgfs get CHAIN {} DEST", args.path);
    };
    if dest.symlink_metadata().is_ok() {
        bail!("{} exists already; nothing was copied", dest.display());
    }
    let mut incomplete = Vec::new();
    let copied = extract(&view, &found, dest, &mut |file| incomplete.push(file));
    copied.with_context(|| format!("copy {}", args.path))?;
    if found.kind == NodeType::File && incomplete.iter().any(|file| file.lost_bytes.is_none()) {
        let only = incomplete.remove(0);
        return Err(only.error).with_context(|| format!("copy {}", args.path));
    }
    for Incomplete { copy, lost_bytes, error } in &incomplete {
        let path = copy.display();
        let text = match lost_bytes {
            Some(lost) => format!("{path} has a hole for {} that is missing", BinaryBytes(*lost)),
            None => format!("{path} was not copied: {}", told(error)),
        };
        tell(log::Level::Error, &text);
    }
    match incomplete.into_iter().next() {
        Some(first) => {
            Err(first.error).with_context(|| format!("the copy {} is incomplete", dest.display()))
        }
        None => Ok(()),
    }
}

/// Warns that the numbers and texts of a view lack memory that cannot be read.
fn tell_of_gap(view: &View) {
    if let Some(error) = view.chain().first_gap() {
        tell(log::Level::Warn, &format!("memory of ancestors is missing: {}", told(&*error)));
    }
}

/// Print a summary of a snapshot and its chain.
#[derive(Debug, clap::Args)]
pub struct InfoArgs {
    #[command(flatten)]
    which: Which,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

/// Prints a summary.
///
/// # Errors
/// As [`processes`].
pub fn info(args: &InfoArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let view = args.which.view()?;
    let chain = view.chain();
    let (mut disk, mut flat) = (0, 0);
    super::for_each_snapshot(chain, |id, _| {
        let summary = Summary::of(chain, id)?;
        disk += summary.disk_bytes;
        flat += summary.total().flat_bytes();
        Ok(())
    })?;
    let shown = Summary::of(chain, view.tip())?;
    let rows = view.processes()?;
    tell_of_gap(&view);
    let mut commands: Vec<&str> = Vec::new();
    for row in &rows {
        let first = row.command.split(' ').next().unwrap_or_default();
        let name = first.rsplit('/').next().unwrap_or(first);
        if !commands.contains(&name) {
            commands.push(name);
        }
    }
    let snapshot = chain.snapshot(view.tip());
    let date = times::shown(shown.date)?;
    let threads: usize = rows.iter().map(|row| row.threads).sum();
    let (private, shared) = (shown.private.flat_bytes(), shown.shared.flat_bytes());
    if args.json {
        let document = json!({
            "snapshots": chain.ids().count(),
            "snapshot": snapshot.name,
            "directory": snapshot.images.name().to_string_lossy(),
            "date": date,
            "host": view.host()?,
            "uptime_seconds": view.uptime()?.map(|uptime| uptime.as_secs()),
            "processes": rows.len(),
            "threads": threads,
            "programs": commands,
            "private_bytes": private,
            "shared_bytes": shared,
            "disk_bytes": disk,
            "flat_bytes": flat,
        });
        return print_json(&document, out);
    }
    let several = chain.ids().count();
    writeln!(out, "Snapshot:   {}, one of {several}", snapshot.name)?;
    writeln!(out, "Directory:  {}", snapshot.images.name().display())?;
    writeln!(out, "Date:       {date} ({})", times::zone())?;
    if let Some(host) = view.host()? {
        writeln!(out, "Host:       {host}")?;
    }
    if let Some(uptime) = view.uptime()? {
        writeln!(out, "Uptime:     {}", indicatif::HumanDuration(uptime))?;
    }
    writeln!(out, "Processes:  {}, with {threads} threads", rows.len())?;
    writeln!(out, "Programs:   {}", commands.join(", "))?;
    writeln!(out, "Memory:     {} private, {} shared", BinaryBytes(private), BinaryBytes(shared))?;
    writeln!(
        out,
        "On disk:    {}; without a chain, {} of memory would be stored",
        BinaryBytes(disk),
        BinaryBytes(flat)
    )?;
    Ok(())
}

pub(super) fn print_json(document: &Value, out: &mut dyn Write) -> anyhow::Result<()> {
    serde_json::to_writer_pretty(&mut *out, document)?;
    writeln!(out)?;
    Ok(())
}
