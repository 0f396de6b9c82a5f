//! Interval timers (`setitimer(2)`) and POSIX timers (`timer_create(2)`).

use std::collections::VecDeque;

use nix::libc;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Calling, Kind, Restored};
use crate::{
    image::proto,
    inject::{Answers, Buffer, CallId, Script},
    proc::{self, PosixTimer},
    res::{ResError, Result, calls::Calls},
    sys::Features,
    units::{NsPid, PidMap},
};

/// `PR_TIMER_CREATE_RESTORE_IDS` (`linux/prctl.h`, since Linux 6.15): `timer_create(2)` then
/// uses the id that the caller passes.
const TIMER_CREATE_RESTORE_IDS: i32 = 77;

/// Timers that one script creates. A script of as many calls fits into half of the scratch
/// memory.
const GAP_AT_ONCE: u32 = 200;

/// The highest id that the restore reaches by creating and deleting timers. It takes about
/// two seconds.
const COUNTED_LIMIT: u32 = 1 << 20;

/// `SIGEV_NONE` (`asm-generic/siginfo.h`): the timer sends no signal.
const NOTIFY_NONE: u32 = 1;

/// `struct itimerval`, `struct itimerspec`: interval, then value, each in seconds
/// and micro- or nanoseconds.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Times {
    interval_s: u64,
    interval_fraction: u64,
    value_s: u64,
    value_fraction: u64,
}

/// `struct sigevent` (`asm-generic/siginfo.h`).
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct Event {
    value: u64,
    signal: u32,
    notify: u32,
    /// A thread id of the process's own pid namespace.
    thread: i32,
    padding: [u32; 11],
}

const _: () = assert!(size_of::<Event>() == 64);

pub(super) struct Timers;

impl Kind for Timers {
    fn ask(&self, of: &Calling<'_>, script: &mut Script) -> Result<super::Collect> {
        let posix = match proc::timers(of.of.witness) {
            Err(error) if error.is_vanished() => Vec::new(),
            timers => timers?,
        };
        let asked = ask(posix, script);
        Ok(Box::new(move |of, answers, images| {
            images.core.timers = Some(collect(&asked, answers, of.pids));
            Ok(())
        }))
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        let timers = of.core.tc.as_ref().and_then(|task| task.timers.as_ref());
        let mut posix = timers.map_or_else(Vec::new, |timers| timers.posix.clone());
        for tid in posix.iter_mut().filter_map(|entry| entry.notify_thread_id.as_mut()) {
            *tid = of.local(NsPid::of_image(*tid))?.raw();
        }
        let wrong = |problem| ResError::Image { pid: of.pid, problem };
        for script in create(posix).map_err(wrong)? {
            calls.make(&script)?;
        }
        Ok(())
    }

    fn last_calls(&self, of: &Restored<'_>, script: &mut Script) -> Result<()> {
        if let Some(timers) = of.core.tc.as_ref().and_then(|task| task.timers.as_ref()) {
            start(timers, script);
        }
        Ok(())
    }
}

/// The calls that read the timers of a process.
#[derive(Clone, Debug)]
struct Asked {
    intervals: [Buffer; 3],
    posix: Vec<(PosixTimer, Buffer, CallId)>,
}

/// Adds these calls; `posix` are the timers that `/proc` shows.
fn ask(posix: Vec<PosixTimer>, script: &mut Script) -> Asked {
    let intervals = [0, 1, 2].map(|which: i32| {
        let buffer = script.space(size_of::<Times>());
        let arguments = [which.into(), buffer.into()];
        script.call("read an interval timer", libc::SYS_getitimer, &arguments);
        buffer
    });
    let ask_one = |timer: PosixTimer| {
        let buffer = script.space(size_of::<Times>());
        let arguments = [timer.id.into(), buffer.into()];
        script.call("read a timer", libc::SYS_timer_gettime, &arguments);
        let overrun = script.attempt(libc::SYS_timer_getoverrun, &[timer.id.into()]);
        (timer, buffer, overrun)
    };
    Asked { intervals, posix: posix.into_iter().map(ask_one).collect() }
}

/// Builds the image entry for the timers of a process.
fn collect(asked: &Asked, answers: &Answers, pids: &PidMap) -> proto::TaskTimersEntry {
    let [real, virt, prof] = asked.intervals.map(|buffer| {
        let times: Times = answers.value(buffer);
        running(proto::ItimerEntry {
            isec: times.interval_s,
            iusec: times.interval_fraction,
            vsec: times.value_s,
            vusec: times.value_fraction,
        })
    });
    let entry = |(timer, buffer, overrun): &(PosixTimer, Buffer, CallId)| {
        let times: Times = answers.value(*buffer);
        let overrun = answers.result(*overrun).unwrap_or(0);
        proto::PosixTimerEntry {
            it_id: timer.id.cast_unsigned(),
            clock_id: timer.clock.cast_unsigned(),
            si_signo: timer.signal.cast_unsigned(),
            it_sigev_notify: timer.notify.0,
            sival_ptr: timer.value,
            overrun: u32::try_from(overrun).unwrap_or(0),
            isec: times.interval_s,
            insec: times.interval_fraction,
            vsec: times.value_s,
            vnsec: times.value_fraction,
            notify_thread_id: timer
                .notify_pid
                .filter(|_| timer.notify.is_for_thread())
                .map(|tid| pids.ns(tid).raw()),
        }
    };
    proto::TaskTimersEntry { real, virt, prof, posix: asked.posix.iter().map(entry).collect() }
}

/// Returns an interval timer as it is after the process has taken its pending signal.
///
/// Until then the kernel has not rearmed the timer and reports no time left. A rearmed timer has
/// the whole interval left; a disarmed one has no interval.
fn running(timer: proto::ItimerEntry) -> proto::ItimerEntry {
    if (timer.vsec, timer.vusec) == (0, 0) {
        proto::ItimerEntry { vsec: timer.isec, vusec: timer.iusec, ..timer }
    } else {
        timer
    }
}

/// Returns the scripts that create the POSIX timers of a process, without starting them. The entries have
/// the numbers of threads that the process passes to calls.
///
/// The kernel numbers timers from 0 upwards. Where it does not let the caller choose the id,
/// a script creates and deletes timers until the wanted id is next.
///
/// # Errors
/// Two timers have the same id, or an id is too high to be reached.
fn create(mut entries: Vec<proto::PosixTimerEntry>) -> Result<Creation, String> {
    entries.sort_by_key(|entry| entry.it_id);
    if let Some(pair) = entries.windows(2).find(|pair| pair[0].it_id == pair[1].it_id) {
        return Err(format!("there are two timers with the id {}", pair[0].it_id));
    }
    let counts = !Features::has_timer_ids();
    if let Some(last) = entries.last().filter(|last| counts && last.it_id > COUNTED_LIMIT) {
        return Err(format!(
            "timer id {} is too high: this kernel (before Linux 6.15) numbers timers in order, \
             and rcriu creates at most {COUNTED_LIMIT} timers to reach an id",
            last.it_id
        ));
    }
    Ok(Creation { entries: entries.into(), counts, next: 0 })
}

/// Iterates over the scripts that create timers.
#[derive(Debug)]
struct Creation {
    entries: VecDeque<proto::PosixTimerEntry>,
    /// Whether ids can only be reached in order.
    counts: bool,
    /// The id of the next timer, if `counts`.
    next: u32,
}

impl Iterator for Creation {
    type Item = Script;

    fn next(&mut self) -> Option<Script> {
        let mut script = Script::new();
        if !self.counts {
            script.attempt(libc::SYS_prctl, &[TIMER_CREATE_RESTORE_IDS.into(), 1.into()]);
        }
        let mut made = 0;
        while made < GAP_AT_ONCE
            && let Some(entry) = self.entries.front()
        {
            made += 1;
            if self.counts && self.next < entry.it_id {
                let event = Event { notify: NOTIFY_NONE, ..Event::default() };
                make(&mut script, self.next, libc::CLOCK_MONOTONIC.cast_unsigned(), event);
                let what = format!("delete timer {}", self.next);
                script.call(what, libc::SYS_timer_delete, &[self.next.into()]);
            } else {
                let event = Event {
                    value: entry.sival_ptr,
                    signal: entry.si_signo,
                    notify: entry.it_sigev_notify,
                    thread: entry.notify_thread_id.unwrap_or(0),
                    padding: [0; 11],
                };
                make(&mut script, entry.it_id, entry.clock_id, event);
                let times = script.space(size_of::<Times>());
                let what = format!("check for timer {}", entry.it_id);
                let arguments = [entry.it_id.into(), times.into()];
                script.call(what, libc::SYS_timer_gettime, &arguments);
                self.entries.pop_front();
            }
            self.next += 1;
        }
        if !self.counts {
            script.attempt(libc::SYS_prctl, &[TIMER_CREATE_RESTORE_IDS.into(), 0.into()]);
        }
        (made > 0).then_some(script)
    }
}

/// Adds the call that creates a timer with this id.
fn make(script: &mut Script, id: u32, clock: u32, event: Event) {
    let event = script.bytes(event.as_bytes());
    let buffer = script.bytes(&id.to_le_bytes());
    let arguments = [clock.into(), event.into(), buffer.into()];
    script.call(format!("create timer {id}"), libc::SYS_timer_create, &arguments);
}

/// Adds the calls that start all timers of a process with the time that was left.
fn start(entry: &proto::TaskTimersEntry, script: &mut Script) {
    for timer in &entry.posix {
        let times = Times {
            interval_s: timer.isec,
            interval_fraction: timer.insec,
            value_s: timer.vsec,
            value_fraction: timer.vnsec,
        };
        if timer.vsec == 0 && timer.vnsec == 0 {
            continue;
        }
        let times = script.bytes(times.as_bytes());
        script.call(
            format!("start timer {}", timer.it_id),
            libc::SYS_timer_settime,
            &[timer.it_id.into(), 0.into(), times.into()],
        );
    }
    for (which, timer) in [(0, entry.real), (1, entry.virt), (2, entry.prof)] {
        let timer = running(timer);
        let times = Times {
            interval_s: timer.isec,
            interval_fraction: timer.iusec,
            value_s: timer.vsec,
            value_fraction: timer.vusec,
        };
        if timer.vsec == 0 && timer.vusec == 0 {
            continue;
        }
        let times = script.bytes(times.as_bytes());
        script.call("start an interval timer", libc::SYS_setitimer, &[which.into(), times.into()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_with_a_signal_pending_run_on() {
        let timer = |isec, vusec| proto::ItimerEntry { isec, iusec: 0, vsec: 0, vusec };
        assert_eq!(running(timer(7, 5)), timer(7, 5));
        assert_eq!(running(timer(0, 0)), timer(0, 0));
        assert_eq!(running(timer(7, 0)), proto::ItimerEntry { vsec: 7, ..timer(7, 0) });
    }

    #[test]
    fn ids_are_reached_by_counting() {
        let timer = |it_id| proto::PosixTimerEntry { it_id, ..Default::default() };
        let entries: VecDeque<_> = [0, 3, 500].map(timer).into();
        let mut creation = Creation { entries: entries.clone(), counts: true, next: 0 };
        let lengths: Vec<_> = creation.by_ref().map(|script| script.len()).collect();
        // Two calls for each: 501 ids.
        assert_eq!(lengths, [400, 400, 202]);
        let script = Creation { entries, counts: false, next: 0 }.next().unwrap();
        assert_eq!(script.len(), 2 + 3 * 2);
        assert!(create(vec![timer(1), timer(1)]).unwrap_err().contains("two timers"));
        assert_eq!(create(Vec::new()).unwrap().count(), 0);
    }

    #[test]
    fn a_script_that_counts_fits_into_the_memory_for_it() {
        let entries =
            VecDeque::from([proto::PosixTimerEntry { it_id: 1000, ..Default::default() }]);
        let script = Creation { entries, counts: true, next: 0 }.next().unwrap();
        assert!(script.bytes_needed() < crate::inject::TABLE_BYTES * 3 / 4);
    }
}
