//! Time namespaces.

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, same},
};

pub const ROWS: &[Row] = &[("time_namespace", time_namespace)];

/// `CLONE_NEWTIME` (`linux/sched.h`).
const CLONE_NEWTIME: i32 = 0x80;

/// How far the clocks of the tree are ahead of those of the machine, in seconds.
const AHEAD: [i64; 2] = [1_000_000, 2_000_000];

/// How much the clocks may advance while the tree is checkpointed.
const PATIENCE: i64 = 100;

/// Moves into a new time namespace.
fn enter() -> Verdict {
    sys!(unshare(CLONE_NEWTIME))?;
    let text = format!("monotonic {} 500000000\nboottime {} 0\n", AHEAD[0], AHEAD[1]);
    fs::write("/proc/self/timens_offsets", text).map_err(|error| format!("offsets: {error}"))?;
    let namespace = File::open("/proc/self/ns/time_for_children").map_err(|e| e.to_string())?;
    sys!(setns(namespace.as_raw_fd(), CLONE_NEWTIME))?;
    Ok(())
}

/// Reads a clock by a system call.
fn by_call(clock: i32) -> Result<i64, String> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    sys!(syscall(libc::SYS_clock_gettime, clock, &raw mut time))?;
    Ok(time.tv_sec)
}

/// Reads a clock by the vDSO, where the C library does.
fn by_vdso(clock: i32) -> Result<i64, String> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    sys!(clock_gettime(clock, &raw mut time))?;
    Ok(time.tv_sec)
}

/// Checks that the clocks have advanced a little since `before`.
fn check(before: [i64; 2]) -> Verdict {
    for (clock, before) in [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME].into_iter().zip(before) {
        let [call, vdso] = [by_call(clock)?, by_vdso(clock)?];
        ensure!((before..before + PATIENCE).contains(&call), "clock {clock}: {before}, now {call}");
        ensure!((call..=call + 1).contains(&vdso), "clock {clock}: {call}, in the vDSO {vdso}");
    }
    Ok(())
}

/// Clocks that are ahead of those of the machine, in a process and in its child; timers of which one
/// waits for a moment, not for a while.
fn time_namespace(checkpoint: &Checkpoint) -> Verdict {
    enter()?;
    let now = || Ok::<_, String>([by_call(libc::CLOCK_MONOTONIC)?, by_call(libc::CLOCK_BOOTTIME)?]);
    let before = now()?;
    ensure!(before[0] >= AHEAD[0] && before[1] >= AHEAD[1], "the clocks show {before:?}");
    let timer = sys!(timerfd_create(libc::CLOCK_BOOTTIME, 0))?;
    // SAFETY: all zeros are a value of it.
    let mut setting: libc::itimerspec = unsafe { std::mem::zeroed() };
    setting.it_value.tv_sec = before[1] + 1000;
    let absolute = libc::TFD_TIMER_ABSTIME;
    sys!(timerfd_settime(timer, absolute, &raw const setting, std::ptr::null_mut()))?;
    let moment = Instant::now();
    let child = checkpoint.fork(move |child| {
        child.wait();
        check(before)
    })?;
    checkpoint.wait();
    check(before)?;
    child.join()?;
    ensure!(moment.elapsed() < Duration::from_secs(PATIENCE.unsigned_abs()), "{moment:?}");
    // SAFETY: as above.
    let mut left: libc::itimerspec = unsafe { std::mem::zeroed() };
    sys!(timerfd_gettime(timer, &raw mut left))?;
    let (passed, left) = (now()?[1] - before[1], left.it_value.tv_sec);
    ensure!((1000 - passed - PATIENCE..=1000).contains(&left), "{left} s left after {passed} s");
    let offsets = fs::read_to_string("/proc/self/timens_offsets").map_err(|e| e.to_string())?;
    same("clocks with an offset", 2, offsets.lines().count())
}
