//! Servers in the background.

use std::{io::Write, os::fd::OwnedFd, path::Path};

use anyhow::{Context, bail};

use super::exit;
use crate::sys::{
    daemon::{self, Background, Detached, Start},
    fds,
    output::{self, Existing},
};

/// The process that goes on after [`begin`].
pub(super) enum Begun {
    /// The one that the user has started; the server runs in the background. With its exit code.
    Caller(u8),
    /// The server.
    Server(Starting),
}

/// A server that is not ready yet.
pub(super) struct Starting {
    background: Option<Background>,
    status_fd: Option<i32>,
}

/// Moves the program to the background if `daemon`; it stays in its directory. `what` is the server in
/// messages.
///
/// # Errors
/// The server has not become ready.
pub(super) fn begin(daemon: bool, status_fd: Option<i32>, what: &str) -> anyhow::Result<Begun> {
    if let Some(fd) = status_fd {
        fds::duplicate(fd).with_context(|| format!("use descriptor {fd} (--status-fd)"))?;
    }
    if !daemon {
        return Ok(Begun::Server(Starting { background: None, status_fd }));
    }
    let here = std::env::current_dir().context("find the current directory")?;
    match daemon::detach().context("go to the background")? {
        Detached::Foreground(foreground) => {
            let code = match foreground.wait().with_context(|| format!("wait for {what}"))? {
                Start::Ready => {
                    tell(status_fd);
                    exit::OK
                }
                Start::Exited(code) => u8::try_from(code).unwrap_or(exit::FAILED),
                Start::Killed(signal) => bail!("{what} was killed by {signal}"),
            };
            Ok(Begun::Caller(code))
        }
        Detached::Background(background) => {
            nix::unistd::chdir(&here)
                .with_context(|| format!("enter the directory {}", here.display()))?;
            Ok(Begun::Server(Starting { background: Some(background), status_fd: None }))
        }
    }
}

impl Starting {
    /// Tells the caller that the server is ready.
    ///
    /// # Errors
    /// The caller has gone.
    pub(super) fn ready(self) -> anyhow::Result<()> {
        match self.background {
            Some(background) => background.ready().context("go to the background"),
            None => {
                tell(self.status_fd);
                Ok(())
            }
        }
    }
}

/// Tells the caller that the server waits for clients, and that nothing else comes.
fn tell(fd: Option<i32>) {
    if let Some(Ok(status)) = fd.map(take) {
        // The caller may have closed its end: the server goes on.
        let _ = nix::unistd::write(&status, &[0]);
    }
}

/// Takes over a descriptor, under a number that programs do not inherit.
pub(super) fn take(fd: i32) -> anyhow::Result<OwnedFd> {
    let taken = fds::duplicate(fd)?;
    nix::unistd::close(fd)?;
    Ok(taken)
}

/// Writes the pid of this process to a file, if there is one.
pub(super) fn write_pidfile(path: Option<&Path>) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let mut file = output::create(path, Existing::Replaced)
        .with_context(|| format!("create the pid file {}", path.display()))?;
    write!(file, "{}", std::process::id())
        .with_context(|| format!("write the pid file {}", path.display()))
}
