//! Handlers, pending signals, and the timers that send them.

use std::{
    mem, ptr,
    sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering},
};

use crate::{
    Row,
    kit::{Area, Checkpoint, Verdict, gettid, nap, same, wait_until},
    threads::{bit, block, blocked},
};

pub const ROWS: &[Row] = &[
    ("handlers", handlers),
    ("pending_process", pending_process),
    ("pending_thread", pending_thread),
    ("pending_many", pending_many),
    ("signal_mask", signal_mask),
    ("alternate_stack", alternate_stack),
    ("inside_handler", inside_handler),
    ("interval_timers", interval_timers),
    ("interval_timer_idle", interval_timer_idle),
    ("posix_timers", posix_timers),
    ("posix_timer_ids", posix_timer_ids),
];

static CAUGHT: [AtomicU32; 65] = [const { AtomicU32::new(0) }; 65];

extern "C" fn count(signal: i32) {
    CAUGHT[signal as usize].fetch_add(1, Ordering::SeqCst);
}

fn caught(signal: i32) -> u32 {
    CAUGHT[signal as usize].load(Ordering::SeqCst)
}

/// The kernel's `struct sigaction` (arch/x86/include/uapi/asm/signal.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct KernelAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

fn action(signal: i32) -> Result<KernelAction, String> {
    let mut found = KernelAction::default();
    sys!(syscall(libc::SYS_rt_sigaction, signal, 0, &raw mut found, 8))?;
    Ok(found)
}

/// Catches a signal by the C library's function, for a working return.
fn catch(signal: i32, flags: i32, mask: &[i32]) -> Verdict {
    // SAFETY: all zeros is a valid value; the handler only counts.
    let mut new: libc::sigaction = unsafe { mem::zeroed() };
    new.sa_sigaction = count as extern "C" fn(i32) as usize;
    new.sa_flags = flags;
    for signal in mask {
        sys!(sigaddset(&raw mut new.sa_mask, *signal))?;
    }
    sys!(sigaction(signal, &raw const new, ptr::null_mut())).map(drop)
}

fn ignore(signal: i32) -> Verdict {
    // SAFETY: ignoring a signal has no preconditions.
    let old = unsafe { libc::signal(signal, libc::SIG_IGN) };
    ensure!(old != libc::SIG_ERR, "signal {signal} cannot be ignored");
    Ok(())
}

fn handlers(checkpoint: &Checkpoint) -> Verdict {
    catch(libc::SIGUSR1, libc::SA_RESTART, &[])?;
    catch(libc::SIGUSR2, libc::SA_SIGINFO | libc::SA_NODEFER, &[libc::SIGHUP, libc::SIGINT])?;
    catch(libc::SIGHUP, libc::SA_RESETHAND, &[])?;
    catch(libc::SIGCHLD, libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT, &[])?;
    catch(libc::SIGCONT, libc::SA_ONSTACK, &[])?;
    catch(40, 0, &[63, 64])?;
    catch(64, libc::SA_RESTART, &[libc::SIGTERM])?;
    ignore(libc::SIGTERM)?;
    ignore(libc::SIGTTOU)?;
    ignore(50)?;
    let all = || (1..=64).map(action).collect::<Result<Vec<_>, _>>();
    let before = all()?;
    checkpoint.wait();
    for (at, (before, after)) in before.into_iter().zip(all()?).enumerate() {
        same(&format!("action of signal {}", at + 1), before, after)?;
    }
    let conts = caught(libc::SIGCONT);
    for signal in [libc::SIGUSR1, libc::SIGUSR2, libc::SIGHUP, libc::SIGCONT, 40, 64] {
        sys!(raise(signal))?;
    }
    for signal in [libc::SIGUSR1, libc::SIGUSR2, libc::SIGHUP, 40, 64] {
        same(&format!("deliveries of {signal}"), 1, caught(signal))?;
    }
    same("deliveries of SIGCONT", conts + 1, caught(libc::SIGCONT))?;
    same("action that is reset", 0, action(libc::SIGHUP)?.handler)
}

/// Takes a pending signal: its code, sender and value.
fn take(signal: i32) -> Result<(i32, i32, i32), String> {
    let set = bit(signal);
    // SAFETY: all zeros is a valid value.
    let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let call = libc::SYS_rt_sigtimedwait;
    sys!(syscall(call, &raw const set, &raw mut info, &raw const none, 8))
        .map_err(|error| format!("signal {signal}: {error}"))?;
    // SAFETY: the fields read are those of a signal that a process has sent.
    unsafe { Ok((info.si_code, info.si_pid(), info.si_value().sival_ptr.addr() as i32)) }
}

/// Queues a signal with a value, to a process or to a thread of it.
fn queue(thread: Option<i32>, signal: i32, value: i32) -> Verdict {
    /// The kernel's `siginfo_t` of a queued signal.
    #[repr(C)]
    #[derive(Debug)]
    struct Queued {
        signal: i32,
        errno: i32,
        code: i32,
        padding: i32,
        pid: i32,
        uid: u32,
        value: usize,
        rest: [u64; 12],
    }
    const _: () = assert!(mem::size_of::<Queued>() == 128);
    // SAFETY: getpid has no preconditions.
    let pid = unsafe { libc::getpid() };
    let code = libc::SI_QUEUE;
    let info = Queued {
        signal,
        errno: 0,
        code,
        padding: 0,
        pid,
        uid: 0,
        value: value as usize,
        rest: [0; 12],
    };
    match thread {
        None => sys!(syscall(libc::SYS_rt_sigqueueinfo, pid, signal, &raw const info)),
        Some(tid) => sys!(syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, signal, &raw const info)),
    }
    .map(drop)
}

const REAL_TIME: i32 = 37;

fn pending_process(checkpoint: &Checkpoint) -> Verdict {
    block(bit(libc::SIGUSR1) | bit(libc::SIGTERM) | bit(REAL_TIME) | bit(libc::SIGCHLD))?;
    // SAFETY: getpid has no preconditions.
    let pid = unsafe { libc::getpid() };
    sys!(kill(pid, libc::SIGUSR1))?;
    queue(None, libc::SIGTERM, 11)?;
    for value in [3, 1, 2] {
        queue(None, REAL_TIME, value)?;
    }
    // What a child's end leaves.
    let child = sys!(fork())?;
    if child == 0 {
        // SAFETY: the child only ends.
        unsafe { libc::_exit(9) };
    }
    let mut status = 0;
    sys!(waitpid(child, &raw mut status, 0))?;
    checkpoint.wait();
    same("SIGUSR1", (libc::SI_USER, pid), take(libc::SIGUSR1).map(|(code, pid, _)| (code, pid))?)?;
    same("SIGTERM", (libc::SI_QUEUE, pid, 11), take(libc::SIGTERM)?)?;
    for value in [3, 1, 2] {
        same("queued signal", (libc::SI_QUEUE, pid, value), take(REAL_TIME)?)?;
    }
    let (code, sender, _) = take(libc::SIGCHLD)?;
    same("SIGCHLD", (libc::CLD_EXITED, child), (code, sender))?;
    ensure!(take(REAL_TIME).is_err(), "one queued signal too many");
    ensure!(take(libc::SIGUSR1).is_err(), "one SIGUSR1 too many");
    Ok(())
}

fn pending_thread(checkpoint: &Checkpoint) -> Verdict {
    block(bit(libc::SIGUSR1) | bit(REAL_TIME))?;
    let mut threads = Vec::new();
    for number in 0..3 {
        threads.push(checkpoint.thread(move |thread| {
            // SAFETY: getpid has no preconditions.
            let (tid, pid) = (gettid(), unsafe { libc::getpid() });
            block(bit(libc::SIGUSR1) | bit(REAL_TIME))?;
            sys!(syscall(libc::SYS_tgkill, pid, tid, libc::SIGUSR1))?;
            for value in 0..2 {
                queue(Some(tid), REAL_TIME, number * 10 + value)?;
            }
            thread.wait();
            let (code, sender, _) = take(libc::SIGUSR1)?;
            same("SIGUSR1 to a thread", (libc::SI_TKILL, pid), (code, sender))?;
            for value in 0..2 {
                let expected = (libc::SI_QUEUE, pid, number * 10 + value);
                same("signal queued to a thread", expected, take(REAL_TIME)?)?;
            }
            ensure!(take(REAL_TIME).is_err(), "one queued signal too many in a thread");
            Ok(())
        })?);
    }
    checkpoint.wait();
    ensure!(take(REAL_TIME).is_err(), "a thread's signal went to another");
    threads.into_iter().try_for_each(super::kit::Thread::join)
}

fn pending_many(checkpoint: &Checkpoint) -> Verdict {
    block(bit(REAL_TIME) | bit(REAL_TIME + 1))?;
    for value in 0..200 {
        queue(None, REAL_TIME + value % 2, value)?;
    }
    checkpoint.wait();
    for value in (0..200).step_by(2).chain((1..200).step_by(2)) {
        same("value", value, take(REAL_TIME + value % 2)?.2)?;
    }
    Ok(())
}

fn signal_mask(checkpoint: &Checkpoint) -> Verdict {
    let mask = bit(libc::SIGINT) | bit(libc::SIGALRM) | bit(32) | bit(33) | bit(64);
    block(mask)?;
    checkpoint.wait();
    same("mask", mask, blocked()?)
}

static STACK: AtomicUsize = AtomicUsize::new(0);

extern "C" fn note_stack(_signal: i32) {
    let local = 0_u8;
    STACK.store(ptr::from_ref(&local).addr(), Ordering::SeqCst);
}

fn on_own_stack(signal: i32, handler: extern "C" fn(i32)) -> Result<Area, String> {
    let area = Area::private(16)?;
    let stack = libc::stack_t { ss_sp: area.at.cast(), ss_flags: 0, ss_size: area.bytes };
    sys!(sigaltstack(&raw const stack, ptr::null_mut()))?;
    // SAFETY: all zeros is a valid value; the handler only stores a number.
    let mut new: libc::sigaction = unsafe { mem::zeroed() };
    new.sa_sigaction = handler as usize;
    new.sa_flags = libc::SA_ONSTACK;
    sys!(sigaction(signal, &raw const new, ptr::null_mut()))?;
    Ok(area)
}

fn alternate_stack(checkpoint: &Checkpoint) -> Verdict {
    let area = on_own_stack(libc::SIGUSR1, note_stack)?;
    checkpoint.wait();
    sys!(raise(libc::SIGUSR1))?;
    let at = STACK.load(Ordering::SeqCst);
    let range = area.at.addr()..area.at.addr() + area.bytes;
    ensure!(range.contains(&at), "the handler ran at {at:#x}, not in {range:x?}");
    Ok(())
}

static CHECKPOINT: AtomicPtr<Checkpoint> = AtomicPtr::new(ptr::null_mut());

extern "C" fn wait_inside(_signal: i32) {
    let local = 0_u8;
    let before = blocked();
    // SAFETY: the pointer was stored before the signal was raised, and what it
    // points to outlives the handler. The thread was not inside the allocator.
    unsafe { (*CHECKPOINT.load(Ordering::SeqCst)).wait() };
    if before.is_ok() && before == blocked() {
        STACK.store(ptr::from_ref(&local).addr(), Ordering::SeqCst);
    }
}

fn inside_handler(checkpoint: &Checkpoint) -> Verdict {
    let area = on_own_stack(libc::SIGUSR1, wait_inside)?;
    let mask = bit(libc::SIGHUP) | bit(60);
    block(mask)?;
    CHECKPOINT.store(ptr::from_ref(checkpoint).cast_mut(), Ordering::SeqCst);
    let floating = std::hint::black_box(1.25_f64);
    sys!(raise(libc::SIGUSR1))?;
    same("floating-point value across the handler", 2.5, floating * std::hint::black_box(2.0))?;
    same("mask after the handler", mask, blocked()?)?;
    let at = STACK.load(Ordering::SeqCst);
    let range = area.at.addr()..area.at.addr() + area.bytes;
    ensure!(range.contains(&at), "the handler ended at {at:#x}, not in {range:x?}");
    Ok(())
}

fn microseconds(time: libc::timeval) -> i64 {
    time.tv_sec * 1_000_000 + time.tv_usec
}

fn set_timer(which: u32, first: i64, interval: i64) -> Verdict {
    let time = |us| libc::timeval { tv_sec: us / 1_000_000, tv_usec: us % 1_000_000 };
    let value = libc::itimerval { it_interval: time(interval), it_value: time(first) };
    let which = which as _;
    sys!(setitimer(which, &raw const value, ptr::null_mut())).map(drop)
}

/// First expiry and interval, in microseconds.
fn timer(which: u32) -> Result<(i64, i64), String> {
    let none = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let mut found = libc::itimerval { it_interval: none, it_value: none };
    let which = which as _;
    sys!(getitimer(which, &raw mut found))?;
    Ok((microseconds(found.it_value), microseconds(found.it_interval)))
}

const REAL: u32 = libc::ITIMER_REAL as u32;
const VIRTUAL: u32 = libc::ITIMER_VIRTUAL as u32;
const PROF: u32 = libc::ITIMER_PROF as u32;

fn interval_timers(checkpoint: &Checkpoint) -> Verdict {
    for signal in [libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF] {
        catch(signal, libc::SA_RESTART, &[])?;
    }
    set_timer(REAL, 30_000, 20_000)?;
    set_timer(VIRTUAL, 30_000, 10_000)?;
    set_timer(PROF, 30_000, 10_000)?;
    checkpoint.wait();
    let before = [libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF].map(caught);
    for (which, interval) in [(REAL, 20_000), (VIRTUAL, 10_000), (PROF, 10_000)] {
        let (value, found) = timer(which)?;
        // The kernel rounds the times of processors to its ticks.
        ensure!((interval..interval + 10_000).contains(&found), "interval {found} of {which}");
        ensure!((1..60_000).contains(&value), "next expiry of {which} in {value} us");
    }
    let begin = std::time::Instant::now();
    wait_until("the timers", || {
        for word in 0..100_000_u64 {
            std::hint::black_box(word);
        }
        let now = [libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF].map(caught);
        now.iter().zip(before).all(|(now, before)| *now >= before + 2)
    })?;
    ensure!(begin.elapsed().as_millis() >= 20, "three expiries in {:?}", begin.elapsed());
    Ok(())
}

fn interval_timer_idle(checkpoint: &Checkpoint) -> Verdict {
    set_timer(REAL, 1_000_000_000, 500_000)?;
    set_timer(PROF, 2_000_000_000, 0)?;
    let child = checkpoint.fork(|child| {
        // Timers are not inherited.
        child.wait();
        same("timer of the child", (0, 0), timer(REAL)?)
    })?;
    checkpoint.wait();
    let (value, interval) = timer(REAL)?;
    same("interval", 500_000, interval)?;
    ensure!((800_000_000..1_000_000_000).contains(&value), "next expiry in {value} us");
    let (value, interval) = timer(PROF)?;
    same("interval of the other", 0, interval)?;
    ensure!((1_900_000_000..2_010_000_000).contains(&value), "its expiry in {value} us");
    same("timer that was not set", (0, 0), timer(VIRTUAL)?)?;
    child.join()
}

/// Creates a POSIX timer by the kernel's call and returns its id.
fn create_timer(
    clock: i32,
    notify: i32,
    signal: i32,
    value: usize,
    tid: i32,
) -> Result<i32, String> {
    // SAFETY: all zeros is a valid value.
    let mut event: libc::sigevent = unsafe { mem::zeroed() };
    event.sigev_notify = notify;
    event.sigev_signo = signal;
    event.sigev_value.sival_ptr = ptr::without_provenance_mut(value);
    event.sigev_notify_thread_id = tid;
    let mut id = 0_i32;
    sys!(syscall(libc::SYS_timer_create, clock, &raw const event, &raw mut id))?;
    Ok(id)
}

fn arm(id: i32, first_ms: i64, interval_ms: i64) -> Verdict {
    let time = |ms: i64| libc::timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 };
    let value = libc::itimerspec { it_interval: time(interval_ms), it_value: time(first_ms) };
    sys!(syscall(libc::SYS_timer_settime, id, 0, &raw const value, 0)).map(drop)
}

/// Milliseconds to the next expiry, and of the interval.
fn armed(id: i32) -> Result<(i64, i64), String> {
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut found = libc::itimerspec { it_interval: none, it_value: none };
    sys!(syscall(libc::SYS_timer_gettime, id, &raw mut found))?;
    let ms = |time: libc::timespec| time.tv_sec * 1000 + time.tv_nsec / 1_000_000;
    Ok((ms(found.it_value), ms(found.it_interval)))
}

static TIMER_VALUE: AtomicUsize = AtomicUsize::new(0);
static TIMER_THREAD: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_timer(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands in a siginfo of a timer.
    let value = unsafe { (*info).si_value().sival_ptr.addr() };
    TIMER_VALUE.store(value, Ordering::SeqCst);
    TIMER_THREAD.store(gettid() as u32, Ordering::SeqCst);
    count(signal);
}

fn posix_timers(checkpoint: &Checkpoint) -> Verdict {
    let (plain, targeted) = (41, 42);
    for signal in [plain, targeted] {
        // SAFETY: all zeros is a valid value; the handler only stores numbers.
        let mut new: libc::sigaction = unsafe { mem::zeroed() };
        new.sa_sigaction = on_timer as extern "C" fn(_, _, _) as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        sys!(sigaction(signal, &raw const new, ptr::null_mut()))?;
    }
    let helper = checkpoint.thread(|thread| {
        std::fs::write(thread.path("helper"), gettid().to_string()).map_err(|e| e.to_string())?;
        thread.wait();
        thread.wait_mark("checked")
    })?;
    let text = std::fs::read_to_string(checkpoint.path("helper")).map_err(|e| e.to_string())?;
    let helper_tid: i32 = text.parse().map_err(|_| format!("no tid: {text}"))?;
    let clock = libc::CLOCK_MONOTONIC;
    let running = create_timer(clock, libc::SIGEV_SIGNAL, plain, 0xabc, 0)?;
    let silent = create_timer(libc::CLOCK_REALTIME, libc::SIGEV_NONE, 0, 0, 0)?;
    let to_thread = create_timer(clock, libc::SIGEV_THREAD_ID, targeted, 0xdef, helper_tid)?;
    let disarmed = create_timer(libc::CLOCK_BOOTTIME, libc::SIGEV_SIGNAL, 43, 1, 0)?;
    arm(running, 20, 15)?;
    arm(silent, 1_000_000, 7000)?;
    arm(to_thread, 20, 25)?;
    checkpoint.wait();
    same("disarmed timer", (0, 0), armed(disarmed)?)?;
    let (value, interval) = armed(silent)?;
    same("interval of the silent timer", 7000, interval)?;
    ensure!((800_000..=1_000_000).contains(&value), "silent timer expires in {value} ms");
    same("interval of the running timer", 15, armed(running)?.1)?;
    same("interval of the thread's timer", 25, armed(to_thread)?.1)?;
    let (begin, begin_targeted) = (caught(plain), caught(targeted));
    wait_until("expiries of the running timer", || caught(plain) >= begin + 2)?;
    wait_until("expiries of the thread's timer", || caught(targeted) >= begin_targeted + 2)?;
    arm(running, 0, 0)?;
    nap(5);
    let before = caught(targeted);
    wait_until("one more expiry", || caught(targeted) > before)?;
    same("value of the thread's timer", 0xdef, TIMER_VALUE.load(Ordering::SeqCst))?;
    same("its thread", helper_tid as u32, TIMER_THREAD.load(Ordering::SeqCst))?;
    let overrun = sys!(syscall(libc::SYS_timer_getoverrun, running))?;
    ensure!((0..10_000).contains(&overrun), "overrun {overrun}");
    arm(to_thread, 0, 0)?;
    checkpoint.mark("checked");
    helper.join()
}

fn posix_timer_ids(checkpoint: &Checkpoint) -> Verdict {
    let mut ids = Vec::new();
    for number in 0..12 {
        let id = create_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0)?;
        if number % 3 == 1 {
            ids.push(id);
        } else {
            sys!(syscall(libc::SYS_timer_delete, id))?;
        }
    }
    for (number, id) in ids.iter().enumerate() {
        arm(*id, 1_000_000 + number as i64, 100 + number as i64)?;
    }
    checkpoint.wait();
    for (number, id) in ids.iter().enumerate() {
        same(&format!("interval of timer {id}"), 100 + number as i64, armed(*id)?.1)?;
    }
    let fresh = create_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0)?;
    ensure!(!ids.contains(&fresh), "id {fresh} twice");
    Ok(())
}
