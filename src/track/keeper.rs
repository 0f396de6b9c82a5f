//! Who keeps the tracking of a process between two dumps: a process of its own.
//!
//! `rcriu-keep PID TRACKER` has three descriptors: a socket on which it is asked, the
//! userfaultfd of the process PID, and a pidfd of it. It ends when that process ends.
//! It knows one thing more: since which snapshot changes are tracked. Whoever
//! restarts the tracking makes it forget that first and tells it the new snapshot
//! when this is complete, so that a dump that fails, or is overtaken by another one,
//! leaves no tracking that would be believed.
//!
//! If the process has shared memory that is tracked, the keeper also has counters of
//! what its threads do ([`crate::sys::tracepoint`]), and a `Guard`.
//!
//! The socket has an abstract name made of pid namespace, pid and time of birth, so
//! that nobody takes a process for another one that had its pid; the name ends with
//! the keeper, and with the machine. Both sides look at each other's user.

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

/// What the program is called when it keeps tracking.
pub const NAME: &str = "rcriu-keep";

/// How long one side waits for the other.
const PATIENCE: Duration = Duration::from_secs(2);

/// Bytes that a question or an answer has at most.
const MESSAGE_BYTES: usize = 256;

/// Descriptors that are handed over at a time (`SCM_MAX_FD`, `net/scm.h`, is 253).
const FDS_AT_A_TIME: usize = 128;

/// How the program calls itself while it starts the keeper.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// What a keeper answers.
#[derive(Debug)]
pub(super) struct Kept {
    /// How changes are tracked.
    pub(super) tracker: Tracker,
    /// The snapshot since which they are; `None` if there is none.
    pub(super) since: Option<String>,
    /// The userfaultfd.
    pub(super) fd: OwnedFd,
    /// What the counters have counted, all together; `None` without any.
    pub(super) count: Option<u64>,
    /// What shared memory needs; `None` if none is tracked.
    pub(super) guard: Option<Guard>,
}

/// What tells whether all writers of shared memory are known. All keepers of a tree
/// have the same.
#[derive(Debug)]
pub(super) struct Guard {
    /// Which memory it is and who has it ([`super::record`]).
    pub(super) record: OwnedFd,
    /// Who opens it ([`crate::sys::fanotify`]).
    pub(super) openings: OwnedFd,
}

impl Guard {
    /// Takes one from the descriptors of a message.
    fn of(fds: impl IntoIterator<Item = OwnedFd>) -> Option<Self> {
        let mut fds = fds.into_iter();
        fds.next().zip(fds.next()).map(|(record, openings)| Self { record, openings })
    }
}

/// The keeper of a process, seen from outside.
#[derive(Debug)]
pub(super) struct Keeper {
    pid: HostPid,
    address: SocketAddr,
}

fn address(pid: HostPid) -> Result<SocketAddr, TrackError> {
    let own = HostPid(nix::unistd::getpid().as_raw());
    let namespace = proc::namespace(own, "pid")?;
    let start = proc::stat(pid)?.start_time;
    let name = format!("{NAME}/{namespace}/{pid}/{start}");
    SocketAddr::from_abstract_name(name).map_err(|source| TrackError::Keeper { pid, source })
}

/// Whether the process at the other end runs as root or as who we are.
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

    /// Starts one.
    pub(super) fn start(pid: HostPid, tracker: Tracker, fd: OwnedFd) -> Result<Self, TrackError> {
        let failed = |source| TrackError::Keeper { pid, source };
        let pidfd = process::pidfd_open(pid).map_err(|errno| failed(errno.into()))?;
        // After the pidfd: if the process has ended in between, the name is of no use.
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

    /// Asks for what is kept.
    pub(super) fn kept(&self) -> Result<Kept, TrackError> {
        let (answer, fds, _) = self.ask("kept", &[])?;
        let mut words = answer.split(' ');
        let mut next = || words.next().ok_or_else(|| self.nonsense());
        let (tracker, since) = (next()?, next()?);
        let mut fds = fds.into_iter();
        Ok(Kept {
            tracker: Tracker::from_name(tracker).ok_or_else(|| self.nonsense())?,
            since: Some(since.to_owned()).filter(|since| since != NOTHING),
            // One of an older program does not tell.
            count: words.next().and_then(|count| count.parse().ok()),
            fd: fds.next().ok_or_else(|| self.nonsense())?,
            guard: Guard::of(fds),
        })
    }

    /// Makes it forget the snapshot, since tracking begins anew. Returns the new
    /// epoch.
    pub(super) fn forget(&self) -> Result<u64, TrackError> {
        self.ask("forget", &[])?.0.parse().map_err(|_| self.nonsense())
    }

    /// Gives it counters to keep, in the place of those that it has.
    pub(super) fn count(&self, counters: &[OwnedFd]) -> Result<(), TrackError> {
        let mut given = 0;
        for some in counters.chunks(FDS_AT_A_TIME) {
            let how = if given == 0 { ANEW } else { MORE };
            let fds: Vec<_> = some.iter().map(AsFd::as_fd).collect();
            given += fds.len();
            // Descriptors that it has no room for are lost without a word.
            if self.ask(&format!("count {how}"), &fds)?.0 != given.to_string() {
                return Err(self.nonsense());
            }
        }
        Ok(())
    }

    /// Tells it the snapshot since which changes are tracked, if nobody has begun anew
    /// after `epoch`, and what shared memory needs.
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

    /// Makes it forget what shared memory needs, and only that.
    pub(super) fn unguard(&self) -> Result<(), TrackError> {
        self.done("unguard", &[])
    }

    /// Gives back what it was made to forget.
    pub(super) fn guard(&self, guard: &Guard) -> Result<(), TrackError> {
        self.done("guard", &[guard.record.as_fd(), guard.openings.as_fd()])
    }

    fn done(&self, question: &str, fds: &[BorrowedFd]) -> Result<(), TrackError> {
        if self.ask(question, fds)?.0 == DONE { Ok(()) } else { Err(self.nonsense()) }
    }

    /// Ends it and waits for that.
    pub(super) fn end(self) -> Result<(), TrackError> {
        let (_, _, mut stream) = self.ask("end", &[])?;
        let mut rest = Vec::new();
        stream
            .read_to_end(&mut rest)
            .map_err(|source| TrackError::Keeper { pid: self.pid, source })?;
        Ok(())
    }
}

/// The word for no snapshot, and for no count.
const NOTHING: &str = "-";

/// Counters come in the place of those that there are.
const ANEW: &str = "anew";

/// Counters come in addition to those that there are.
const MORE: &str = "more";

/// The answer when all went well.
const DONE: &str = "done";

/// Sends a question or an answer, with descriptors.
fn send(stream: &UnixStream, text: &str, fds: &[BorrowedFd]) -> io::Result<()> {
    let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let rights: &[ControlMessage] = if fds.is_empty() { &[] } else { &rights };
    let line = format!("{text}\n");
    let data = [IoSlice::new(line.as_bytes())];
    let sent = sendmsg::<()>(stream.as_raw_fd(), &data, rights, MsgFlags::MSG_NOSIGNAL, None)?;
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives what [`send`] has sent; empty if there is nothing more.
fn receive(stream: &UnixStream) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; MESSAGE_BYTES];
    let received = socket::receive(stream.as_fd(), &mut bytes, MsgFlags::empty())?;
    let text = String::from_utf8_lossy(&bytes[..received.len]);
    Ok((text.trim_end().to_owned(), received.fds))
}

/// The keeper itself.
struct State {
    tracker: Tracker,
    epoch: u64,
    since: Option<String>,
    counters: Vec<File>,
    guard: Option<Guard>,
}

/// Runs the keeper: what this program is when it is called [`NAME`].
pub fn main(arguments: &[String]) -> ExitCode {
    let [_, tracker] = arguments else { return ExitCode::FAILURE };
    let Some(tracker) = Tracker::from_name(tracker) else { return ExitCode::FAILURE };
    let state = State { tracker, epoch: 0, since: None, counters: Vec::new(), guard: None };
    match keep(state) {
        Ok(()) => ExitCode::SUCCESS,
        // There is nobody to be told.
        Err(_) => ExitCode::FAILURE,
    }
}

fn keep(mut state: State) -> io::Result<()> {
    daemon::close_inherited()?;
    // A group leader has no session of its own; then nobody can have sent it there.
    let _ = setsid();
    chdir("/")?;
    prctl::set_name(c"rcriu-keep")?;
    // What it has gives power over another process's memory.
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
                // Whatever is wrong with one client is not with the next.
                if is_trusted(&stream)
                    && matches!(state.serve(&stream, fd.as_fd()), Ok(Served::End))
                {
                    // At once: the client sees the end of the stream when all that
                    // was opened before it, the name too, is gone.
                    std::process::exit(0);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// What comes after a client.
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

    /// Returns the sum of all counters; `None` if there are none, or one of them has
    /// not counted all the time.
    fn count(&self) -> Option<u64> {
        if self.counters.is_empty() {
            return None;
        }
        self.counters.iter().map(|counter| tracepoint::read(counter).ok()).sum()
    }
}
