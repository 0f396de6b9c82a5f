//! `imgfs mount`, `mounts`, `commit`, `log` and `umount`.

mod args;
mod daemon;
mod trust;

use std::{io::Write, path::PathBuf, process::ExitCode};

use clap::Args;
use indicatif::BinaryBytes;
use serde_json::json;

use super::{
    Common, exit,
    look::print_json,
    report,
    table::{Align, Table},
};
use crate::{fs, units::page_bytes};

pub use args::MountArgs;

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
