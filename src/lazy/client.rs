//! The restore's view of its pager.

use std::{
    ffi::OsString,
    io,
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use log::LevelFilter;
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair},
};

use super::{LazyError, NAME, Result, wire};
use crate::{sys::missing::MissingPages, units::HostPid};

/// The program that becomes the pager: rcriu itself.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// The name of the standard error stream as a log.
pub(super) const STANDARD_ERROR: &str = "-";

/// Where the pager logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// The file; `None` for standard error, which the pager then keeps open.
    pub file: Option<PathBuf>,
    /// What it logs.
    pub level: LevelFilter,
}

/// How memory is restored on demand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where the pager logs.
    pub log: Log,
    /// The file that names the pages to supply first, and to which the pager adds those that the tree
    /// touches (`--record`).
    pub record: Option<PathBuf>,
}

/// A process whose pages wait.
#[derive(Debug)]
pub struct Handed {
    /// Its number in the images.
    pub id: u64,
    /// Its pid.
    pub pid: HostPid,
    /// The descriptor, with the ranges registered.
    pub fd: MissingPages,
    /// The ranges, ascending.
    pub ranges: Vec<Range<u64>>,
}

/// A pager that has begun. If this is dropped before [`Self::release`], the pager ends: the restore has
/// failed.
#[derive(Debug)]
pub struct Pager {
    socket: OwnedFd,
}

impl Pager {
    /// Starts the pager of a tree whose images are in `dir`. `lock`: it locks the images.
    ///
    /// # Errors
    /// [`LazyError::Refused`], [`LazyError::Pager`].
    pub fn start(
        (dir, lock): (&Path, bool),
        Options { log, record }: &Options,
        processes: &[Handed],
    ) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(LazyError::pager("make sockets"))?;
        let file = log.file.as_deref().map_or(Path::new(STANDARD_ERROR), |file| file);
        let record = record.as_ref().map(std::path::absolute).transpose();
        let record = record.map_err(LazyError::pager("find the file of --record"))?;
        let stderr = if log.file.is_some() { Stdio::null() } else { Stdio::inherit() };
        Command::new(OWN_PROGRAM)
            .arg0(NAME)
            .arg(dir)
            .arg(if lock { LOCK } else { NO_LOCK })
            .arg(file)
            .arg(log.level.as_str())
            .args(record)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(LazyError::pager("start it"))?;
        let sent = (|| {
            for process in processes {
                let who = (process.id, process.pid);
                wire::send_process(ours.as_fd(), who, process.fd.as_fd(), &process.ranges)?;
            }
            wire::send_begin(ours.as_fd())
        })();
        let answer = wire::receive_answer(ours.as_fd());
        match answer.map_err(LazyError::pager("receive its answer"))?.as_str() {
            wire::READY => {}
            "" => {
                sent.map_err(LazyError::pager("send it the processes"))?;
                return Err(LazyError::pager("receive its answer")(Errno::ECONNRESET));
            }
            why => return Err(LazyError::Refused(why.to_owned())),
        }
        sent.map_err(LazyError::pager("send it the processes"))?;
        Ok(Self { socket: ours })
    }

    /// Checks that the pager is still there.
    ///
    /// # Errors
    /// [`LazyError::Pager`].
    pub fn check(&self) -> Result<()> {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match nix::sys::socket::recv(self.socket.as_raw_fd(), &mut [0], flags) {
            Err(Errno::EAGAIN) => Ok(()),
            _ => Err(LazyError::pager("it has ended; its log says why")(io::Error::from(
                Errno::EPIPE,
            ))),
        }
    }

    /// Tells the pager that the tree runs.
    ///
    /// # Errors
    /// [`LazyError::Pager`] if it has ended, and the tree with it.
    pub fn release(self) -> Result<()> {
        wire::send_released(self.socket.as_fd()).map_err(LazyError::pager("tell it of the tree"))
    }
}

const LOCK: &str = "lock";
const NO_LOCK: &str = "no-lock";

/// What the pager's command line says.
#[derive(Debug)]
pub(super) struct Arguments {
    pub(super) dir: PathBuf,
    pub(super) lock: bool,
    pub(super) log: Log,
    pub(super) record: Option<PathBuf>,
}

impl Arguments {
    /// Reads what [`Pager::start`] wrote.
    pub(super) fn of(arguments: &[OsString]) -> Option<Self> {
        let [dir, lock, file, level, record @ ..] = arguments else { return None };
        let file = Some(PathBuf::from(file)).filter(|file| *file != Path::new(STANDARD_ERROR));
        let log = Log { file, level: level.to_str()?.parse().ok()? };
        let record = record.first().map(PathBuf::from);
        Some(Self { dir: dir.into(), lock: lock == LOCK, log, record })
    }
}
