//! Timerfds.

use std::os::fd::{AsFd, AsRawFd};

use nix::{errno::Errno, libc};

use super::{
    Collector, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage, descriptor,
};
use crate::{
    image::{
        proto::{self, FdTypes},
        tree,
    },
    proc::{self, FdDetail, FdInfo},
    sys::fds::{self, TimerSetting},
    units::{HostPid, TargetFd},
};

pub(super) const KIND: FileKind = FileKind {
    name: "timerfd",
    types: &[FdTypes::Timerfd],
    usage: Usage::Descriptor,
    collector: |_| Box::new(Timerfds::default()),
    opener: |_| Box::new(Timerfds::default()),
};

const NANOSECONDS: u64 = 1_000_000_000;

#[derive(Default)]
struct Timerfds {
    /// The timers that [`Opener::start`] sets.
    entries: Vec<proto::TimerfdEntry>,
}

impl Collector for Timerfds {
    fn claims(&self, file: &Description) -> bool {
        file.is_anonymous("[timerfd]")
    }

    fn collect(&mut self, file: &Description, _: &mut dyn Intake) -> Result<proto::FileEntry> {
        let step = "read the timer of";
        // The kernel rearms an expired timer when it is next read, and reports no time left
        // before. So read it first.
        let left = fds::timer(file.fd.as_fd()).map_err(file.failed(step))?;
        let own = HostPid::own();
        let info = proc::fdinfo(own, TargetFd(file.fd.as_raw_fd()));
        let Ok(FdInfo { detail: FdDetail::TimerFd { clockid, ticks, settime_flags, .. }, .. }) =
            info
        else {
            return Err(file.failed(step)(Errno::ENODATA));
        };
        Ok(proto::FileEntry {
            r#type: FdTypes::Timerfd.into(),
            id: file.id,
            tfd: Some(proto::TimerfdEntry {
                id: file.id,
                flags: file.status(),
                fown: file.fown,
                clockid: clockid.cast_unsigned(),
                ticks,
                settime_flags,
                vsec: left.value.0,
                vnsec: left.value.1,
                isec: left.interval.0,
                insec: left.interval.1,
            }),
            ..Default::default()
        })
    }
}

impl Opener for Timerfds {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        for entry in entries {
            let missing =
                || FileError::image(entry.id, "it is a timerfd, but its entry is missing");
            let timer = entry.tfd.as_ref().ok_or_else(missing)?;
            check(timer)?;
            let failed = || FileError::restore(entry.id, "create", "a timerfd");
            let fd = fds::timerfd(timer.clockid.cast_signed()).map_err(failed())?;
            descriptor::set_status(fd.as_fd(), timer.flags).map_err(failed())?;
            opened.insert(entry.id, fd);
            self.entries.push(*timer);
        }
        Ok(())
    }

    fn start(&mut self, opened: &Opened) -> Result<()> {
        for entry in &self.entries {
            let fd = opened.get(entry.id)?;
            let set = setting(entry)
                .and_then(|setting| fds::set_timer(fd, entry.settime_flags.cast_signed(), setting));
            set.map_err(FileError::restore(entry.id, "set", "a timerfd"))?;
            if entry.ticks == 0 {
                continue;
            }
            match fds::set_timer_ticks(fd, entry.ticks) {
                Err(Errno::ENOTTY) => {
                    let timer = opened.holder(entry.id).map_or_else(
                        || "a timer".to_owned(),
                        |holder| format!("a timer of process {}", holder.pid),
                    );
                    log::warn!(
                        "{timer}: this kernel cannot set the count of expirations, so {} of them \
                         are lost",
                        entry.ticks
                    );
                }
                result => result.map_err(FileError::restore(
                    entry.id,
                    "set the expiration count of",
                    "a timerfd",
                ))?,
            }
        }
        Ok(())
    }
}

fn check(entry: &proto::TimerfdEntry) -> Result<()> {
    tree::timer_problem(entry).map_or(Ok(()), |problem| Err(FileError::image(entry.id, problem)))
}

/// Returns what to set a timer to. Images always store the time left, never an absolute time.
///
/// CRIU records no time left for a periodic timer that has expired and was not read since. Such a
/// timer has counted expirations, unlike one that is disarmed.
fn setting(entry: &proto::TimerfdEntry) -> nix::Result<TimerSetting> {
    let mut value = (entry.vsec, entry.vnsec);
    if value == (0, 0) && entry.ticks > 0 {
        value = (entry.isec, entry.insec);
    }
    let absolute = entry.settime_flags & libc::TFD_TIMER_ABSTIME.cast_unsigned() != 0;
    if absolute && value != (0, 0) {
        let now = fds::clock(entry.clockid.cast_signed())?;
        let nanoseconds = value.1 + now.1;
        value = (value.0 + now.0 + nanoseconds / NANOSECONDS, nanoseconds % NANOSECONDS);
    }
    Ok(TimerSetting { value, interval: (entry.isec, entry.insec) })
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read};

    use super::*;
    use crate::res::file::testing::Tree;

    #[test]
    fn timers_go_on_with_what_was_left_and_what_had_expired() {
        let mut tree = Tree::new();
        let relative = fds::timerfd(libc::CLOCK_MONOTONIC).unwrap();
        let setting = TimerSetting { value: (1000, 5), interval: (7, 9) };
        fds::set_timer(relative.as_fd(), 0, setting).unwrap();
        fds::set_timer_ticks(relative.as_fd(), 3).unwrap();
        tree.add(1, relative);
        let absolute = fds::timerfd(libc::CLOCK_REALTIME).unwrap();
        let now = fds::clock(libc::CLOCK_REALTIME).unwrap();
        let setting = TimerSetting { value: (now.0 + 500, 0), interval: (0, 0) };
        fds::set_timer(absolute.as_fd(), libc::TFD_TIMER_ABSTIME, setting).unwrap();
        tree.add(2, absolute);
        tree.add(3, fds::timerfd(libc::CLOCK_BOOTTIME).unwrap());

        let restored = tree.restore();
        let told = |detail: FdDetail| match detail {
            FdDetail::TimerFd {
                clockid,
                settime_flags,
                value_sec,
                interval_sec,
                interval_nsec,
                ticks,
                ..
            } => {
                (clockid, settime_flags, value_sec.div_ceil(10), interval_sec, interval_nsec, ticks)
            }
            other => panic!("{other:?}"),
        };
        for id in 1..=3 {
            assert_eq!(
                told(restored.info(id).detail),
                told(restored.before(id).info.detail.clone())
            );
            assert_eq!(restored.flags(id), restored.before(id).flags);
        }
        let mut ticks = [0; 8];
        File::from(restored.take(1)).read_exact(&mut ticks).unwrap();
        assert_eq!(u64::from_ne_bytes(ticks), 3);
    }

    #[test]
    fn expired_timers_run_on() {
        let mut tree = Tree::new();
        let fd = fds::timerfd(libc::CLOCK_MONOTONIC).unwrap();
        let setting = TimerSetting { value: (0, 1), interval: (1000, 0) };
        fds::set_timer(fd.as_fd(), 0, setting).unwrap();
        tree.add(1, fd);
        let restored = tree.restore();
        let left = fds::timer(restored.get(1)).unwrap();
        assert!(left.value.0 >= 900 && left.interval == (1000, 0), "{left:?}");

        let criu = proto::TimerfdEntry { ticks: 1, isec: 7, ..Default::default() };
        assert_eq!(super::setting(&criu).unwrap().value, (7, 0));
        let off = proto::TimerfdEntry { ticks: 0, ..criu };
        assert_eq!(super::setting(&off).unwrap().value, (0, 0));
    }

    #[test]
    fn impossible_times_are_errors() {
        let good = proto::TimerfdEntry { vnsec: NANOSECONDS - 1, ..Default::default() };
        check(&good).unwrap();
        check(&proto::TimerfdEntry { vnsec: NANOSECONDS, ..good }).unwrap_err();
        check(&proto::TimerfdEntry { isec: u64::MAX, ..good }).unwrap_err();
        check(&proto::TimerfdEntry { settime_flags: 4, ..good }).unwrap_err();
    }
}
