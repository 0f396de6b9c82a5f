//! Small tables of a process: limits, timers, control groups.

use super::text::{self, Defect, Parsed};
use crate::units::{HostPid, IdRange};

/// The nanoseconds of a second.
const NANOSECONDS: i64 = 1_000_000_000;

/// The number of resource limits (`RLIM_NLIMITS`, `include/uapi/asm-generic/resource.h`).
pub const LIMITS: usize = 16;

/// No limit: `RLIM_INFINITY`.
pub const UNLIMITED: u64 = u64::MAX;

/// The name of each `RLIMIT_*` in `limits`, by number (`lnames`, `fs/proc/base.c`).
const LIMIT_NAMES: [&str; LIMITS] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// How a timer notifies of its expiration: `SIGEV_*` bits
/// (`include/uapi/asm-generic/siginfo.h`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Notify(pub u32);

impl Notify {
    /// `SIGEV_SIGNAL`: by a signal to the process.
    pub const SIGNAL: Self = Self(0);
    /// `SIGEV_NONE`: not at all.
    pub const NONE: Self = Self(1);
    /// `SIGEV_THREAD`: by a thread that the C library starts; for the kernel it is a signal.
    pub const THREAD: Self = Self(2);
    /// `SIGEV_THREAD_ID`: the bit for a signal to one thread.
    pub const THREAD_ID: Self = Self(4);

    /// Whether the signal is sent to one thread, not to the process.
    pub const fn is_for_thread(self) -> bool {
        self.0 & Self::THREAD_ID.0 != 0
    }
}

/// A timer created by `timer_create(2)`, as `/proc/PID/timers` shows it (`show_timer`,
/// `fs/proc/base.c`; with `CONFIG_CHECKPOINT_RESTORE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PosixTimer {
    /// The id within the process.
    pub id: i32,
    /// The signal.
    pub signal: i32,
    /// The data sent with the signal: a number or an address of the process.
    pub value: u64,
    /// How the timer notifies of its expiration.
    pub notify: Notify,
    /// The receiver of the signal, in the pid namespace of this `/proc`: a thread if
    /// [`Notify::is_for_thread`], otherwise the process. `None` if it has exited or is outside
    /// the namespace.
    pub notify_pid: Option<HostPid>,
    /// The clock: a `CLOCK_*` number.
    pub clock: i32,
}

/// The control group of a process in one hierarchy: a line of `/proc/PID/cgroup`, see
/// [`cgroups`](super::cgroups).
///
/// The fields are the id of the hierarchy, 0 for version 2; its controllers or its name
/// (`name=systemd`), separated by commas, empty for version 2; and the path in the caller's cgroup
/// namespace.
pub type Cgroup = (u32, Vec<u8>, Vec<u8>);

/// Parses the text of `limits`; columns may have any width.
pub(super) fn parse_limits(text: &[u8]) -> Parsed<[(u64, u64); LIMITS]> {
    let mut limits = [None; LIMITS];
    for line in text::lines(text) {
        for (name, limit) in LIMIT_NAMES.iter().zip(&mut limits) {
            let Some(columns) = line.strip_prefix(name.as_bytes()) else { continue };
            let mut columns = text::words(columns);
            let mut next = || self::limit(columns.next().unwrap_or_default(), name);
            *limit = Some((next()?, next()?));
        }
    }
    let mut found = [(0, 0); LIMITS];
    for ((limit, name), found) in limits.into_iter().zip(LIMIT_NAMES).zip(&mut found) {
        *found = limit.ok_or(Defect::missing(name))?;
    }
    Ok(found)
}

fn limit(column: &[u8], name: &'static str) -> Parsed<u64> {
    if column == b"unlimited" { Ok(UNLIMITED) } else { text::unsigned(column, 10, name) }
}

/// Parses the text of `timers`.
pub(super) fn parse_timers(text: &[u8]) -> Parsed<Vec<PosixTimer>> {
    let mut timers = Vec::new();
    let mut lines = text::lines(text);
    while let Some(line) = lines.next() {
        let id = text::signed(keyed(Some(line), "ID")?, "ID")?;
        let (signal, value) = keyed(lines.next(), "signal").and_then(|text| pair(text, b'/'))?;
        let (how, whom) = keyed(lines.next(), "notify").and_then(|text| pair(text, b'/'))?;
        let (sort, pid) = pair(whom, b'.')?;
        let target = match sort {
            b"pid" => 0,
            b"tid" => Notify::THREAD_ID.0,
            _ => return Err(Defect::new("pid or tid", whom)),
        };
        let how = match how {
            b"signal" => Notify::SIGNAL,
            b"none" => Notify::NONE,
            b"thread" => Notify::THREAD,
            _ => return Err(Defect::new("signal, none or thread", how)),
        };
        timers.push(PosixTimer {
            id,
            signal: text::signed(signal, "signal")?,
            value: text::unsigned(value, 16, "value of signal")?,
            notify: Notify(how.0 | target),
            notify_pid: Some(text::signed(pid, "pid or tid")?).filter(|&pid| pid > 0).map(HostPid),
            clock: text::signed(keyed(lines.next(), "ClockID")?, "ClockID")?,
        });
    }
    Ok(timers)
}

/// Returns the value of a line, which must have this key.
fn keyed<'a>(line: Option<&'a [u8]>, key: &'static str) -> Parsed<&'a [u8]> {
    let line = line.ok_or(Defect::missing(key))?;
    match text::field(line) {
        Some((found, value)) if found == key.as_bytes() => Ok(value),
        _ => Err(Defect::new(key, line)),
    }
}

fn pair(text: &[u8], separator: u8) -> Parsed<(&[u8], &[u8])> {
    text::split_once(text, separator).ok_or_else(|| Defect::new("two parts", text))
}

/// Parses the text of `cgroup`.
pub(super) fn parse_cgroups(text: &[u8]) -> Parsed<Vec<Cgroup>> {
    text::lines(text)
        .map(|line| {
            let what = "id:controllers:path";
            let (id, rest) = text::split_once(line, b':').ok_or_else(|| Defect::new(what, line))?;
            let (controllers, path) =
                text::split_once(rest, b':').ok_or_else(|| Defect::new(what, line))?;
            Ok((text::unsigned(id, 10, what)?, controllers.to_vec(), path.to_vec()))
        })
        .collect()
}

/// Parses `uid_map` or `gid_map` (`m_show`, `kernel/user_namespace.c`).
pub(super) fn parse_id_map(text: &[u8]) -> Parsed<Vec<IdRange>> {
    let range = |line| match text::numbers::<u32>(line, "ids inside, outside, their count")?[..] {
        [inside, outside, count] => Ok(IdRange { inside, outside, count }),
        _ => Err(Defect::new("ids inside, outside, their count", line)),
    };
    text::lines(text).map(range).collect()
}

/// Parses `timens_offsets` (`proc_timens_show_offsets`, `kernel/time/namespace.c`): lines of a clock,
/// its seconds and its nanoseconds.
pub(super) fn parse_time_offsets(text: &[u8]) -> Parsed<[i64; 2]> {
    let of = |clock: &'static str| {
        let line = text::lines(text).find_map(|line| line.strip_prefix(clock.as_bytes()));
        let line = line.ok_or_else(|| Defect::missing(clock))?;
        let [seconds, rest] = text::numbers::<i64>(line, "seconds and nanoseconds")?[..] else {
            return Err(Defect::new("seconds and nanoseconds", line));
        };
        let offset = seconds.checked_mul(NANOSECONDS).and_then(|ns| ns.checked_add(rest));
        offset.ok_or_else(|| Defect::new("a time in nanoseconds", line))
    };
    Ok([of("monotonic")?, of("boottime")?])
}

/// Parses the target of a link such as `mnt:[4026531841]`, and returns the number.
pub(super) fn parse_namespace(link: &[u8]) -> Parsed<u64> {
    let what = "kind:[inode]";
    link.strip_suffix(b"]")
        .and_then(|rest| text::split_once(rest, b'['))
        .filter(|(kind, _)| kind.ends_with(b":"))
        .ok_or_else(|| Defect::new(what, link))
        .and_then(|(_, number)| text::unsigned(number, 10, what))
}

/// Parses the words of `auxv`.
pub(super) fn parse_auxv(bytes: &[u8]) -> Parsed<Vec<u64>> {
    let (words, rest) = bytes.as_chunks();
    if rest.is_empty() {
        Ok(words.iter().map(|word| u64::from_ne_bytes(*word)).collect())
    } else {
        Err(Defect::missing("whole words of 8 bytes"))
    }
}
