//! `/proc/PID/fdinfo/FD`: an open file, and the lines that its kind adds.

use super::{
    locks::{FileLock, parse_lock},
    text::{self, Defect, Parsed},
    watches::{FanotifyGroup, InotifyWatch, parse_fanotify, parse_inotify},
};

/// An open file as `/proc/PID/fdinfo/FD` shows it (`seq_show`, `fs/proc/fd.c`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdInfo {
    /// The position in the file, in bytes. A negative position, which a memory device has for
    /// high addresses, wraps.
    pub pos: u64,
    /// The `O_*` flags of the file (octal in the text), with `O_CLOEXEC`
    /// (0o2000000) if the descriptor has it.
    pub flags: u32,
    /// The id of the mount, as in `mountinfo`.
    pub mnt_id: i32,
    /// The inode number; since Linux 5.14.
    pub ino: Option<u64>,
    /// The lines that only its kind of file has.
    pub detail: FdDetail,
    /// The locks of the open file description, and those that the process has taken by it.
    pub locks: Vec<FileLock>,
}

/// The lines that only one kind of open file has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FdDetail {
    /// There are none, or none that this parser knows. Epoll and inotify instances that watch
    /// nothing also have none.
    None,
    /// An eventfd (`fs/eventfd.c`).
    EventFd {
        /// The counter.
        count: u64,
        /// The id of the eventfd, unique until reboot; since Linux 5.2.
        id: Option<u64>,
        /// Whether it is a semaphore; since Linux 6.5.
        semaphore: Option<bool>,
    },
    /// An epoll instance (`fs/eventpoll.c`).
    EventPoll {
        /// The files that it watches.
        targets: Vec<EpollTarget>,
    },
    /// A signalfd (`fs/signalfd.c`).
    SignalFd {
        /// The signals that it accepts: bit `N - 1` for signal `N`.
        mask: u64,
    },
    /// A timerfd (`fs/timerfd.c`).
    TimerFd {
        /// The clock: a `CLOCK_*` number.
        clockid: i32,
        /// The number of expirations since it was last read.
        ticks: u64,
        /// The `TFD_TIMER_*` flags it was last set with (octal in the text).
        settime_flags: u32,
        /// The whole seconds until it next expires; 0, with 0 nanoseconds, if it is disarmed.
        value_sec: u64,
        /// The nanoseconds of that time, below 10^9.
        value_nsec: u64,
        /// The whole seconds of the period; 0, with 0 nanoseconds, if it expires once.
        interval_sec: u64,
        /// The nanoseconds of the period, below 10^9.
        interval_nsec: u64,
    },
    /// An inotify instance: its watches.
    Inotify(Vec<InotifyWatch>),
    /// A fanotify group.
    Fanotify(FanotifyGroup),
    /// A pidfd (`kernel/fork.c`, `fs/pidfs.c`).
    PidFd {
        /// The pid; 0 if the process is not in the pid namespace of this `/proc`, -1 if it was
        /// reaped.
        pid: i32,
        /// Its pids in that namespace and in those nested inside.
        nspid: Vec<i32>,
    },
    /// The master of a pseudoterminal (`drivers/tty/pty.c`), since Linux 4.14.
    Master {
        /// The number of its slave in `/dev/pts`.
        index: u32,
    },
}

/// A file that an epoll instance watches (`ep_show_fdinfo`, `fs/eventpoll.c`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpollTarget {
    /// The descriptor that was added; it may refer to another file by now.
    pub tfd: i32,
    /// The `EPOLL*` events and flags.
    pub events: u32,
    /// The data that `epoll_wait(2)` returns with an event.
    pub data: u64,
    /// The position in the file.
    pub pos: i64,
    /// The inode of the file.
    pub ino: u64,
    /// The device of the inode, as the kernel encodes it: major << 20 | minor.
    pub dev: u64,
}

/// Parses the text of the file, ignoring unknown lines.
pub(crate) fn parse_fdinfo(text: &[u8]) -> Result<FdInfo, Defect> {
    let mut info = FdInfo {
        pos: 0,
        flags: 0,
        mnt_id: 0,
        ino: None,
        detail: FdDetail::None,
        locks: Vec::new(),
    };
    let mut parts = Parts::default();
    let (mut pos, mut flags, mut mnt_id) = (None, None, None);
    for line in text::lines(text) {
        if line.starts_with(b"inotify ") {
            parts.inotify.push(parse_inotify(line)?);
            continue;
        }
        if line.starts_with(b"fanotify ") {
            parse_fanotify(line, parts.fanotify.get_or_insert_default())?;
            continue;
        }
        let Some((key, value)) = text::field(line) else { continue };
        match key {
            b"pos" => pos = Some(text::signed::<i64>(value, "pos")?),
            b"flags" => flags = Some(text::unsigned(value, 8, "flags")?),
            b"mnt_id" => mnt_id = Some(text::signed(value, "mnt_id")?),
            b"ino" => info.ino = Some(text::unsigned(value, 10, "ino")?),
            b"lock" => info.locks.push(parse_lock(value)?),
            _ => parts.add(key, value)?,
        }
    }
    info.pos = pos.ok_or(Defect::missing("pos"))?.cast_unsigned();
    info.flags = flags.ok_or(Defect::missing("flags"))?;
    info.mnt_id = mnt_id.ok_or(Defect::missing("mnt_id"))?;
    info.detail = parts.detail()?;
    Ok(info)
}

/// The lines of all kinds, collected before the kind is known.
#[derive(Debug, Default)]
struct Parts {
    count: Option<u64>,
    id: Option<u64>,
    semaphore: Option<bool>,
    targets: Vec<EpollTarget>,
    mask: Option<u64>,
    clockid: Option<i32>,
    ticks: Option<u64>,
    settime_flags: Option<u32>,
    value: Option<(u64, u64)>,
    interval: Option<(u64, u64)>,
    inotify: Vec<InotifyWatch>,
    fanotify: Option<FanotifyGroup>,
    pid: Option<i32>,
    nspid: Vec<i32>,
    terminal: Option<u32>,
}

impl Parts {
    /// Parses one line.
    fn add(&mut self, key: &[u8], value: &[u8]) -> Parsed<()> {
        match key {
            b"eventfd-count" => self.count = Some(text::unsigned(value, 16, "eventfd-count")?),
            b"eventfd-id" => self.id = Some(text::unsigned(value, 10, "eventfd-id")?),
            b"eventfd-semaphore" => {
                self.semaphore = Some(text::unsigned::<u64>(value, 10, "eventfd-semaphore")? != 0);
            }
            b"tfd" => self.targets.push(epoll_target(value)?),
            b"sigmask" => self.mask = Some(text::unsigned(value, 16, "sigmask")?),
            b"clockid" => self.clockid = Some(text::signed(value, "clockid")?),
            b"ticks" => self.ticks = Some(text::unsigned(value, 10, "ticks")?),
            b"settime flags" => {
                self.settime_flags = Some(text::unsigned(value, 8, "settime flags")?);
            }
            b"it_value" => self.value = Some(seconds(value, "it_value")?),
            b"it_interval" => self.interval = Some(seconds(value, "it_interval")?),
            b"tty-index" => self.terminal = Some(text::unsigned(value, 10, "tty-index")?),
            b"Pid" => self.pid = Some(text::signed(value, "Pid")?),
            b"NSpid" => self.nspid = text::numbers(value, "NSpid")?,
            _ => {}
        }
        Ok(())
    }

    /// Returns the kind, according to the lines that were present.
    fn detail(self) -> Parsed<FdDetail> {
        if let Some(count) = self.count {
            return Ok(FdDetail::EventFd { count, id: self.id, semaphore: self.semaphore });
        }
        if !self.targets.is_empty() {
            return Ok(FdDetail::EventPoll { targets: self.targets });
        }
        if let Some(mask) = self.mask {
            return Ok(FdDetail::SignalFd { mask });
        }
        if let Some(clockid) = self.clockid {
            let (value_sec, value_nsec) = self.value.ok_or(Defect::missing("it_value"))?;
            let (interval_sec, interval_nsec) =
                self.interval.ok_or(Defect::missing("it_interval"))?;
            return Ok(FdDetail::TimerFd {
                clockid,
                ticks: self.ticks.ok_or(Defect::missing("ticks"))?,
                settime_flags: self.settime_flags.ok_or(Defect::missing("settime flags"))?,
                value_sec,
                value_nsec,
                interval_sec,
                interval_nsec,
            });
        }
        if !self.inotify.is_empty() {
            return Ok(FdDetail::Inotify(self.inotify));
        }
        if let Some(group) = self.fanotify {
            return Ok(FdDetail::Fanotify(group));
        }
        if let Some(index) = self.terminal {
            return Ok(FdDetail::Master { index });
        }
        Ok(match self.pid {
            Some(pid) => FdDetail::PidFd { pid, nspid: self.nspid },
            None => FdDetail::None,
        })
    }
}

/// Parses what follows `tfd:`:
/// `       3 events:       19 data:                3  pos:0 ino:40e sdev:10`.
fn epoll_target(value: &[u8]) -> Parsed<EpollTarget> {
    let mut words = text::words(value);
    let tfd = text::signed(words.next().unwrap_or_default(), "tfd")?;
    let (mut events, mut data, mut pos, mut ino, mut dev) = (None, None, None, None, None);
    while let Some(word) = words.next() {
        let (key, attached) =
            text::split_once(word, b':').ok_or_else(|| Defect::new("epoll target", value))?;
        // The kernel may pad the number, which then is the next word.
        let number = if attached.is_empty() { words.next().unwrap_or_default() } else { attached };
        match key {
            b"events" => events = Some(text::unsigned(number, 16, "events")?),
            b"data" => data = Some(text::unsigned(number, 16, "data")?),
            b"pos" => pos = Some(text::signed(number, "pos")?),
            b"ino" => ino = Some(text::unsigned(number, 16, "ino")?),
            b"sdev" => dev = Some(text::unsigned(number, 16, "sdev")?),
            _ => {}
        }
    }
    Ok(EpollTarget {
        tfd,
        events: events.ok_or_else(|| Defect::new("events", value))?,
        data: data.ok_or_else(|| Defect::new("data", value))?,
        pos: pos.ok_or_else(|| Defect::new("pos", value))?,
        ino: ino.ok_or_else(|| Defect::new("ino", value))?,
        dev: dev.ok_or_else(|| Defect::new("sdev", value))?,
    })
}

/// Parses `(SECONDS, NANOSECONDS)`.
fn seconds(value: &[u8], what: &'static str) -> Parsed<(u64, u64)> {
    let pair = value
        .trim_ascii()
        .strip_prefix(b"(")
        .and_then(|rest| rest.strip_suffix(b")"))
        .and_then(|pair| text::split_once(pair, b','))
        .ok_or_else(|| Defect::new(what, value))?;
    Ok((text::unsigned(pair.0, 10, what)?, text::unsigned(pair.1, 10, what)?))
}
