//! `rcriu service`: waits for clients at a socket with a name.

use std::{
    fs, io,
    io::Write,
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
    cli::{exit, report, task::ServiceOptions},
    sys::{
        daemon::{self, Detached, Start},
        fds,
        output::{self, Existing},
        supervise,
    },
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
    if let Some(fd) = args.status_fd {
        fds::duplicate(fd).with_context(|| format!("use descriptor {fd} (--status-fd)"))?;
    }
    let here = std::env::current_dir().context("find the current directory")?;
    let background = if args.daemon {
        match daemon::detach().context("go to the background")? {
            Detached::Foreground(foreground) => {
                return Ok(match foreground.wait().context("wait for the service")? {
                    Start::Ready => {
                        tell(args.status_fd);
                        exit::OK
                    }
                    Start::Exited(code) => u8::try_from(code).unwrap_or(exit::FAILED),
                    Start::Killed(signal) => bail!("the service was killed by {signal}"),
                });
            }
            Detached::Background(background) => Some(background),
        }
    } else {
        None
    };
    let enter = |dir: &Path| {
        nix::unistd::chdir(dir).with_context(|| format!("enter the directory {}", dir.display()))
    };
    enter(&here)?;
    start_log()?;
    enter(&args.work_dir)?;
    let address = args.address.as_deref().unwrap_or(Path::new(ADDRESS));
    let listener = open(address)?;
    if let Some(path) = &args.pidfile {
        let mut file = output::create(path, Existing::Replaced)
            .with_context(|| format!("create the pid file {}", path.display()))?;
        write!(file, "{}", std::process::id())
            .with_context(|| format!("write the pid file {}", path.display()))?;
    }
    log::info!("waiting for clients at {}", address.display());
    match background {
        Some(background) => background.ready().context("go to the background")?,
        None => tell(args.status_fd),
    }
    loop {
        match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(fd) => {
                // Other clients are served meanwhile, and also if this one cannot be.
                let served = super::take(fd).and_then(serve);
                if let Err(error) = served {
                    report(&error);
                }
            }
            Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(errno) => return Err(anyhow::Error::new(errno).context("wait for clients")),
        }
    }
}

/// Tells the caller that the service waits for clients, and that nothing else comes.
fn tell(fd: Option<i32>) {
    if let Some(Ok(status)) = fd.map(super::take) {
        // The caller may have closed its end: the service goes on.
        let _ = nix::unistd::write(&status, &[0]);
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
