//! `rcriu service`: waits for clients at a socket with a name.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::Path,
    process::ExitCode,
};

use anyhow::{Context, bail};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen,
        socket,
    },
    unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid},
};

use super::{answer::Answerer, channel::Channel};
use crate::{
    cli::{
        background::{self, Begun, take, write_pidfile},
        exit, report,
        task::ServiceOptions,
    },
    sys::supervise,
};

/// Where the service is, as with CRIU.
const ADDRESS: &str = "/var/run/criu_service.socket";

/// Waits for clients, until it is killed. Starts its log by `start_log`, in the directory in which the user
/// has called it.
pub(in crate::cli) fn service(
    args: &ServiceOptions,
    start_log: impl FnOnce() -> anyhow::Result<()>,
) -> ExitCode {
    match start(args, start_log) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            report(&error);
            ExitCode::from(exit::FAILED)
        }
    }
}

fn start(
    args: &ServiceOptions,
    start_log: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<u8> {
    let starting = match background::begin(args.daemon, args.status_fd, "the service")? {
        Begun::Caller(code) => return Ok(code),
        Begun::Server(starting) => starting,
    };
    start_log()?;
    nix::unistd::chdir(&args.work_dir)
        .with_context(|| format!("enter the directory {}", args.work_dir.display()))?;
    let address = args.address.as_deref().unwrap_or(Path::new(ADDRESS));
    let listener = open(address)?;
    write_pidfile(args.pidfile.as_deref())?;
    log::info!("waiting for clients at {}", address.display());
    starting.ready()?;
    loop {
        match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(fd) => {
                // Other clients are served meanwhile, and also if this one cannot be.
                let served = take(fd).and_then(serve);
                if let Err(error) = served {
                    report(&error);
                }
            }
            Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(errno) => return Err(anyhow::Error::new(errno).context("wait for clients")),
        }
    }
}

/// Opens the socket of the service. The name of a service that has ended is taken over.
fn open(address: &Path) -> anyhow::Result<OwnedFd> {
    let what = || format!("listen on {}", address.display());
    let name = UnixAddr::new(address).with_context(what)?;
    let make = || {
        let flags = SockFlag::SOCK_CLOEXEC;
        socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).with_context(what)
    };
    let found = fs::symlink_metadata(address);
    if found.is_ok_and(|found| found.file_type().is_socket() && found.uid() == geteuid().as_raw()) {
        match connect(make()?.as_raw_fd(), &name) {
            Err(Errno::ECONNREFUSED) => fs::remove_file(address).with_context(what)?,
            _ => bail!(
                "{} is in use by another service\nhelp: use --address PATH, or end that service",
                address.display()
            ),
        }
    }
    let listener = make()?;
    bind(listener.as_raw_fd(), &name).with_context(what)?;
    // Anyone may ask: the service does for a user what the user could do himself.
    fs::set_permissions(address, fs::Permissions::from_mode(0o666)).with_context(what)?;
    listen(&listener, Backlog::MAXCONN).with_context(what)?;
    Ok(listener)
}

/// Serves a client in a process of its own.
fn serve(client: OwnedFd) -> anyhow::Result<()> {
    supervise::apart(|| {
        let served = Channel::new(client).and_then(|channel| {
            become_client(&channel).context("take the client's user and groups")?;
            Ok(Answerer::new(channel).serve())
        });
        served.unwrap_or_else(|error| {
            report(&error);
            exit::FAILED
        })
    })
    .context("start a process for a client")
    .map(drop)
}

/// Gives up the privileges that the client does not have.
fn become_client(channel: &Channel) -> io::Result<()> {
    if channel.uid == geteuid().as_raw() {
        return Ok(());
    }
    let groups: Vec<Gid> = channel.groups()?.into_iter().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(channel.uid), Gid::from_raw(channel.gid));
    setgroups(&groups)?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    // The change of ids has made this process undumpable, and files of /proc root's.
    nix::sys::prctl::set_dumpable(true)?;
    Ok(())
}
