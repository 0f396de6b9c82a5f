//! Interval timers (`setitimer(2)`) and POSIX timers (`timer_create(2)`).

use nix::libc;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    image::proto,
    inject::{Answers, Buffer, CallId, Script},
    proc::PosixTimer,
};

/// `PR_TIMER_CREATE_RESTORE_IDS` (`linux/prctl.h`, since Linux 6.16): a new timer
/// gets the id that is asked for.
const TIMER_CREATE_RESTORE_IDS: i32 = 77;

/// The most timers made and deleted in one go on the way to an id.
const GAP_LIMIT: u32 = 200;

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
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Event {
    value: u64,
    signal: u32,
    notify: u32,
    thread: i32,
    padding: [u32; 11],
}

const _: () = assert!(size_of::<Event>() == 64);

/// What a process was asked.
#[derive(Clone, Debug)]
pub struct Asked {
    intervals: [Buffer; 3],
    posix: Vec<(PosixTimer, Buffer, CallId)>,
}

/// Adds the questions; `posix` are the timers that `/proc` shows.
pub fn ask(posix: Vec<PosixTimer>, script: &mut Script) -> Asked {
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

/// Returns what an image says of the timers of a process.
pub fn collect(asked: &Asked, answers: &Answers) -> proto::TaskTimersEntry {
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
            notify_thread_id: timer.notify.is_for_thread().then_some(timer.notify_pid).flatten(),
        }
    };
    proto::TaskTimersEntry { real, virt, prof, posix: asked.posix.iter().map(entry).collect() }
}

/// Returns an interval timer as it is once its signal, if one is pending, is taken.
///
/// The kernel sets such a timer anew only then, and until then tells of no time that
/// is left. What it will be is at most the interval, and a timer that is off has
/// none.
fn running(timer: proto::ItimerEntry) -> proto::ItimerEntry {
    if (timer.vsec, timer.vusec) == (0, 0) {
        proto::ItimerEntry { vsec: timer.isec, vusec: timer.iusec, ..timer }
    } else {
        timer
    }
}

/// Adds the calls that make the POSIX timers of a process, without starting them.
///
/// The ids of timers are given out one after another: where the kernel cannot be
/// asked for one, timers are made and deleted until it is the next one's turn.
///
/// # Errors
/// What is wrong with the entry.
pub fn create(entries: &[proto::PosixTimerEntry], script: &mut Script) -> Result<(), String> {
    if entries.is_empty() {
        return Ok(());
    }
    let mut entries: Vec<_> = entries.iter().collect();
    entries.sort_by_key(|entry| entry.it_id);
    let by_id = [TIMER_CREATE_RESTORE_IDS.into(), 1.into()];
    let chosen = script.attempt(libc::SYS_prctl, &by_id);
    let _ = chosen;
    for entry in &entries {
        let event = Event {
            value: entry.sival_ptr,
            signal: entry.si_signo,
            notify: entry.it_sigev_notify,
            thread: entry.notify_thread_id.unwrap_or(0),
            padding: [0; 11],
        };
        let event = script.bytes(event.as_bytes());
        let id = script.bytes(&entry.it_id.to_le_bytes());
        script.call(
            format!("make timer {}", entry.it_id),
            libc::SYS_timer_create,
            &[entry.clock_id.into(), event.into(), id.into()],
        );
    }
    script.attempt(libc::SYS_prctl, &[TIMER_CREATE_RESTORE_IDS.into(), 0.into()]);
    if entries.last().is_some_and(|entry| entry.it_id > GAP_LIMIT << 10) {
        return Err(format!("timer id {} is too large", entries[entries.len() - 1].it_id));
    }
    Ok(())
}

/// Adds the calls that start all timers of a process, with what was left of their
/// time.
pub fn start(entry: &proto::TaskTimersEntry, script: &mut Script) {
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
}
