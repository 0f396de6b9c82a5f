//! The keeper: a process that keeps the tracking of another process between two dumps.
//!
//! `rcriu-keep PID TRACKER` has three descriptors: a socket on which it takes requests, the
//! userfaultfd of process PID, and a pidfd of it. It ends when that process ends. It also
//! knows since which snapshot changes are tracked. A dump that restarts the tracking makes
//! the keeper forget the snapshot first, and tells it the new one once that is complete. So
//! a dump that fails, or is overtaken by another, leaves no tracking that a later dump
//! would trust.
//!
//! If shared memory of the process is tracked, the keeper also holds counters of what the
//! threads of the process do ([`crate::sys::tracepoint`]), and a `Guard`.
//!
//! The socket has an abstract name made of pid namespace, pid and start time, so that no
//! dump confuses the process with an earlier one of the same pid. The name disappears with
//! the keeper. Both sides check the user of the other.

use std::{
    fs::File,
    io::{self, IoSlice, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::{
            net::{SocketAddr, UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt::PeerCredentials},
    },
    unistd::{chdir, geteuid, setsid},
};

use super::{TrackError, Tracker};
use crate::{
    proc,
    sys::{daemon, process, socket, tracepoint},
    units::HostPid,
};

/// The name of the program when it runs as a keeper.
pub const NAME: &str = "rcriu-keep";

/// How long each side waits for the other.
const PATIENCE: Duration = Duration::from_secs(2);

/// The longest request or answer, in bytes.
const MESSAGE_BYTES: usize = 256;

/// How many descriptors are passed at a time (`SCM_MAX_FD`, `net/scm.h`, is 253).
const FDS_AT_A_TIME: usize = 128;

/// The program that becomes the keeper: rcriu itself.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// The answer of a keeper.
#[derive(Debug)]
pub(super) struct Kept {
    /// How changes are tracked.
    pub(super) tracker: Tracker,
    /// The snapshot since which changes are tracked; `None` if there is none.
    pub(super) since: Option<String>,
    /// The userfaultfd.
    pub(super) fd: OwnedFd,
    /// The sum of all counters; `None` without counters.
    pub(super) count: Option<u64>,
    /// What tracking of shared memory needs; `None` if none is tracked.
    pub(super) guard: Option<Guard>,
}

/// What shows whether all writers of shared memory are known. All keepers of a tree hold
/// the same.
#[derive(Debug)]
pub(super) struct Guard {
    /// Which memory it is, and which processes map it ([`super::record`]).
    pub(super) record: OwnedFd,
    /// Reports which processes open the memory ([`crate::sys::fanotify`]).
    pub(super) openings: OwnedFd,
}

impl Guard {
    /// Takes a guard from the descriptors of a message.
    fn of(fds: impl IntoIterator<Item = OwnedFd>) -> Option<Self> {
        let mut fds = fds.into_iter();
        fds.next().zip(fds.next()).map(|(record, openings)| Self { record, openings })
    }
}

/// A client's view of the keeper of a process.
#[derive(Debug)]
pub(super) struct Keeper {
    pid: HostPid,
    address: SocketAddr,
}

fn address(pid: HostPid) -> Result<SocketAddr, TrackError> {
    let own = HostPid::own();
    let namespace = proc::namespace(own, "pid")?;
    let start = proc::stat(pid)?.start_time;
    let name = format!("{NAME}/{namespace}/{pid}/{start}");
    SocketAddr::from_abstract_name(name).map_err(|source| TrackError::Keeper { pid, source })
}

/// Whether the process at the other end runs as root or as the same user.
fn is_trusted(stream: &UnixStream) -> bool {
    let own = geteuid().as_raw();
    getsockopt(stream, PeerCredentials).is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

impl Keeper {
    /// Finds the keeper of a process, if it has one.
    pub(super) fn find(pid: HostPid) -> Result<Option<Self>, TrackError> {
        let keeper = Self { pid, address: address(pid)? };
        match keeper.connect() {
            Err(TrackError::Keeper { source, .. })
                if source.kind() == io::ErrorKind::ConnectionRefused =>
            {
                Ok(None)
            }
            connected => connected.map(|_| Some(keeper)),
        }
    }

    /// Starts a keeper.
    pub(super) fn start(pid: HostPid, tracker: Tracker, fd: OwnedFd) -> Result<Self, TrackError> {
        let failed = |source| TrackError::Keeper { pid, source };
        let pidfd = process::pidfd_open(pid).map_err(|errno| failed(errno.into()))?;
        // The pidfd is open: if the process has ended meanwhile, the name is useless.
        let keeper = Self { pid, address: address(pid)? };
        let listener = UnixListener::bind_addr(&keeper.address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Command::new(OWN_PROGRAM)
            .arg0(NAME)
            .arg(pid.to_string())
            .arg(tracker.name())
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::from(fd))
            .stderr(Stdio::from(pidfd))
            .spawn()
            .map_err(failed)?;
        Ok(keeper)
    }

    fn connect(&self) -> Result<UnixStream, TrackError> {
        let failed = |source| TrackError::Keeper { pid: self.pid, source };
        let stream = UnixStream::connect_addr(&self.address).map_err(failed)?;
        if !is_trusted(&stream) {
            return Err(failed(io::ErrorKind::PermissionDenied.into()));
        }
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        Ok(stream)
    }

    fn ask(
        &self,
        question: &str,
        fds: &[BorrowedFd],
    ) -> Result<(String, Vec<OwnedFd>, UnixStream), TrackError> {
        let failed = |source| TrackError::Keeper { pid: self.pid, source };
        let stream = self.connect()?;
        send(&stream, question, fds).map_err(failed)?;
        let (answer, fds) = receive(&stream).map_err(failed)?;
        Ok((answer, fds, stream))
    }

    fn nonsense(&self) -> TrackError {
        TrackError::Keeper { pid: self.pid, source: io::ErrorKind::InvalidData.into() }
    }

    /// Asks what the keeper holds.
    pub(super) fn kept(&self) -> Result<Kept, TrackError> {
        let (answer, fds, _) = self.ask("kept", &[])?;
        let mut words = answer.split(' ');
        let mut next = || words.next().ok_or_else(|| self.nonsense());
        let (tracker, since) = (next()?, next()?);
        let mut fds = fds.into_iter();
        Ok(Kept {
            tracker: Tracker::from_name(tracker).ok_or_else(|| self.nonsense())?,
            since: Some(since.to_owned()).filter(|since| since != NOTHING),
            // A keeper of an older version sends no count.
            count: words.next().and_then(|count| count.parse().ok()),
            fd: fds.next().ok_or_else(|| self.nonsense())?,
            guard: Guard::of(fds),
        })
    }

    /// Makes the keeper forget the snapshot, because tracking restarts. Returns the new
    /// epoch.
    pub(super) fn forget(&self) -> Result<u64, TrackError> {
        self.ask("forget", &[])?.0.parse().map_err(|_| self.nonsense())
    }

    /// Gives the keeper counters, which replace those that it has.
    pub(super) fn count(&self, counters: &[OwnedFd]) -> Result<(), TrackError> {
        let mut given = 0;
        for some in counters.chunks(FDS_AT_A_TIME) {
            let how = if given == 0 { ANEW } else { MORE };
            let fds: Vec<_> = some.iter().map(AsFd::as_fd).collect();
            given += fds.len();
            // The kernel silently drops descriptors that the keeper has no room for.
            if self.ask(&format!("count {how}"), &fds)?.0 != given.to_string() {
                return Err(self.nonsense());
            }
        }
        Ok(())
    }

    /// Tells the keeper the snapshot since which changes are tracked, unless another dump
    /// has restarted the tracking after `epoch`, and what tracking of shared memory needs.
    pub(super) fn remember(
        &self,
        epoch: u64,
        since: &str,
        guard: Option<&Guard>,
    ) -> Result<(), TrackError> {
        let fds = guard.map(|guard| [guard.record.as_fd(), guard.openings.as_fd()]);
        let fds = fds.as_ref().map_or(&[][..], |fds| fds);
        match self.ask(&format!("remember {epoch} {since}"), fds)?.0.as_str() {
            DONE => Ok(()),
            _ => Err(TrackError::Overtaken { pid: self.pid }),
        }
    }

    /// Makes the keeper forget only what tracking of shared memory needs.
    pub(super) fn unguard(&self) -> Result<(), TrackError> {
        self.done("unguard", &[])
    }

    /// Gives the guard back to the keeper.
    pub(super) fn guard(&self, guard: &Guard) -> Result<(), TrackError> {
        self.done("guard", &[guard.record.as_fd(), guard.openings.as_fd()])
    }

    fn done(&self, question: &str, fds: &[BorrowedFd]) -> Result<(), TrackError> {
        if self.ask(question, fds)?.0 == DONE { Ok(()) } else { Err(self.nonsense()) }
    }

    /// Ends the keeper and waits until it has ended.
    pub(super) fn end(self) -> Result<(), TrackError> {
        let (_, _, mut stream) = self.ask("end", &[])?;
        let mut rest = Vec::new();
        stream
            .read_to_end(&mut rest)
            .map_err(|source| TrackError::Keeper { pid: self.pid, source })?;
        Ok(())
    }
}

/// Stands for no snapshot, or no count.
const NOTHING: &str = "-";

/// The counters replace those that the keeper has.
const ANEW: &str = "anew";

/// The counters are added to those that the keeper has.
const MORE: &str = "more";

/// The answer to a successful request.
const DONE: &str = "done";

/// Sends a request or an answer, with descriptors.
fn send(stream: &UnixStream, text: &str, fds: &[BorrowedFd]) -> io::Result<()> {
    let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let rights: &[ControlMessage] = if fds.is_empty() { &[] } else { &rights };
    let line = format!("{text}\n");
    let data = [IoSlice::new(line.as_bytes())];
    let sent = sendmsg::<()>(stream.as_raw_fd(), &data, rights, MsgFlags::MSG_NOSIGNAL, None)?;
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives what [`send`] sent; empty at the end of the stream.
fn receive(stream: &UnixStream) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; MESSAGE_BYTES];
    let received = socket::receive(stream.as_fd(), &mut bytes, MsgFlags::empty())?;
    let text = String::from_utf8_lossy(&bytes[..received.len]);
    Ok((text.trim_end().to_owned(), received.fds))
}

/// The state of the keeper process.
struct State {
    tracker: Tracker,
    epoch: u64,
    since: Option<String>,
    counters: Vec<File>,
    guard: Option<Guard>,
}

/// Runs the keeper. The program calls this when its name is [`NAME`].
pub fn main(arguments: &[String]) -> ExitCode {
    let [_, tracker] = arguments else { return ExitCode::FAILURE };
    let Some(tracker) = Tracker::from_name(tracker) else { return ExitCode::FAILURE };
    let state = State { tracker, epoch: 0, since: None, counters: Vec::new(), guard: None };
    match keep(state) {
        Ok(()) => ExitCode::SUCCESS,
        // There is no one to report to.
        Err(_) => ExitCode::FAILURE,
    }
}

fn keep(mut state: State) -> io::Result<()> {
    daemon::close_inherited()?;
    // Fails only for a leader of a process group, which is harmless.
    let _ = setsid();
    chdir("/")?;
    prctl::set_name(c"rcriu-keep")?;
    // The descriptors give access to the memory of another process.
    prctl::set_dumpable(false)?;
    let (listener, fd, process) = (io::stdin(), io::stdout(), io::stderr());
    let listener = UnixListener::from(listener.as_fd().try_clone_to_owned()?);
    loop {
        let mut polled = [
            PollFd::new(process.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if polled[0].any() == Some(true) {
            return Ok(());
        }
        match listener.accept() {
            Ok((stream, _)) => {
                // A faulty client must not affect the next.
                if is_trusted(&stream)
                    && matches!(state.serve(&stream, fd.as_fd()), Ok(Served::End))
                {
                    // At once, so that the client sees the end of the stream only when
                    // everything that was opened before, the name included, is gone.
                    std::process::exit(0);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// What the keeper does after a client.
enum Served {
    Next,
    End,
}

impl State {
    fn serve(&mut self, stream: &UnixStream, fd: BorrowedFd) -> io::Result<Served> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        loop {
            let (line, given) = receive(stream)?;
            let words: Vec<_> = line.split_whitespace().collect();
            match words.as_slice() {
                [] => return Ok(Served::Next),
                ["kept"] => {
                    let since = self.since.as_deref().unwrap_or(NOTHING);
                    let count = self.count().map_or(NOTHING.to_owned(), |count| count.to_string());
                    let mut fds = vec![fd];
                    if let Some(guard) = &self.guard {
                        fds.extend([guard.record.as_fd(), guard.openings.as_fd()]);
                    }
                    send(stream, &format!("{} {since} {count}", self.tracker.name()), &fds)?;
                }
                ["forget"] => {
                    self.epoch += 1;
                    self.since = None;
                    self.guard = None;
                    send(stream, &self.epoch.to_string(), &[])?;
                }
                ["count", how] => {
                    if *how == ANEW {
                        self.counters.clear();
                    }
                    self.counters.extend(given.into_iter().map(File::from));
                    send(stream, &self.counters.len().to_string(), &[])?;
                }
                ["remember", epoch, since] if epoch.parse() == Ok(self.epoch) => {
                    self.since = Some((*since).to_owned());
                    self.guard = Guard::of(given);
                    send(stream, DONE, &[])?;
                }
                ["guard" | "unguard"] => {
                    self.guard = Guard::of(given);
                    send(stream, DONE, &[])?;
                }
                ["end"] => {
                    send(stream, DONE, &[])?;
                    return Ok(Served::End);
                }
                _ => send(stream, "no", &[])?,
            }
        }
    }

    /// Returns the sum of all counters; `None` without counters, or if one of them was not
    /// counting all the time.
    fn count(&self) -> Option<u64> {
        if self.counters.is_empty() {
            return None;
        }
        self.counters.iter().map(|counter| tracepoint::read(counter).ok()).sum()
    }
}
