//! System calls that a task is blocked in around the checkpoint.
//!
//! They go on as after a stop and continue by signals: none may return EINTR
//! but those the kernel never restarts (signal(7)), which try again here.

use std::{
    io::Error,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU32, Ordering},
    },
    time::Instant,
};

use crate::{
    Row,
    kit::{
        Area, Checkpoint, Thread, Verdict, gettid, nap, read_some, same, slowness, wait_blocked,
        write_all,
    },
    threads::{bit, block},
};

pub const ROWS: &[Row] = &[
    ("blocked_read", blocked_read),
    ("blocked_write", blocked_write),
    ("blocked_futex", blocked_futex),
    ("blocked_futex_timeout", blocked_futex_timeout),
    ("blocked_poll", blocked_poll),
    ("blocked_poll_timeout", blocked_poll_timeout),
    ("blocked_select", blocked_select),
    ("blocked_epoll", blocked_epoll),
    ("blocked_sleep", blocked_sleep),
    ("blocked_sleep_until", blocked_sleep_until),
    ("blocked_wait", blocked_wait),
    ("blocked_sigsuspend", blocked_sigsuspend),
    ("blocked_pause", blocked_pause),
    ("blocked_sigwait", blocked_sigwait),
    ("blocked_accept", blocked_accept),
    ("blocked_receive", blocked_receive),
    ("blocked_eventfd", blocked_eventfd),
    ("blocked_fifo_open", blocked_fifo_open),
];

/// Starts a thread that is inside a system call when this returns.
pub fn enter(
    checkpoint: &Checkpoint,
    number: i64,
    body: impl FnOnce() -> Verdict + Send + 'static,
) -> Result<(Thread, i32), String> {
    let tid = Arc::new(AtomicI32::new(0));
    let told = tid.clone();
    let thread = checkpoint.thread(move |thread| {
        told.store(gettid(), Ordering::SeqCst);
        thread.announce();
        drop(told);
        body()
    })?;
    let tid = tid.load(Ordering::SeqCst);
    wait_blocked(tid, number)?;
    Ok((thread, tid))
}

fn is_interrupted() -> bool {
    Error::last_os_error().raw_os_error() == Some(libc::EINTR)
}

fn pipe() -> Result<[i32; 2], String> {
    let mut ends = [0; 2];
    sys!(pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC))?;
    Ok(ends)
}

/// Waits, and then a little more, for what would go on wrongly to do so.
fn settle(checkpoint: &Checkpoint) {
    checkpoint.wait();
    nap(20);
}

fn blocked_read(checkpoint: &Checkpoint) -> Verdict {
    let [from, to] = pipe()?;
    let (thread, _) = enter(checkpoint, libc::SYS_read, move || {
        same("bytes read", &b"woken"[..], &read_some(from, 100)?[..])
    })?;
    settle(checkpoint);
    write_all(to, b"woken")?;
    thread.join()
}

fn blocked_write(checkpoint: &Checkpoint) -> Verdict {
    let [from, to] = pipe()?;
    let size = sys!(fcntl(to, libc::F_GETPIPE_SZ))? as usize;
    let whole = super::kit::bytes(1, size + 3000);
    write_all(to, &whole[..size])?;
    // None of it fits, so that the call has nothing to say if interrupted.
    let rest = whole[size..].to_vec();
    let (thread, _) = enter(checkpoint, libc::SYS_write, move || write_all(to, &rest))?;
    settle(checkpoint);
    let mut found = Vec::new();
    while found.len() < whole.len() {
        found.extend(read_some(from, 4096)?);
    }
    thread.join()?;
    ensure!(found == whole, "{} bytes have come, not those written", found.len());
    Ok(())
}

fn futex(
    word: &AtomicU32,
    operation: i32,
    value: u32,
    timeout: *const libc::timespec,
) -> Result<i64, String> {
    let word = word.as_ptr();
    sys!(syscall(libc::SYS_futex, word, operation, value, timeout, 0, u32::MAX))
}

/// The word of a futex in an area.
fn word(area: Area, at: usize) -> &'static AtomicU32 {
    // SAFETY: the areas here are mapped for good and only used by words.
    unsafe { AtomicU32::from_ptr(area.at.cast::<u32>().add(at)) }
}

fn blocked_futex(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::private(1)?;
    let shared = Area::shared(1)?;
    let mut threads = Vec::new();
    for (at, area, operation) in [
        (0, area, libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG),
        (1, area, libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG),
        (2, shared, libc::FUTEX_WAIT),
    ] {
        let (thread, _) = enter(checkpoint, libc::SYS_futex, move || {
            let result = futex(word(area, at), operation, 0, ptr::null());
            same(&format!("result of futex {at}"), Ok(0), result)
        })?;
        threads.push(thread);
    }
    settle(checkpoint);
    for (at, area, flag) in
        [(0, area, libc::FUTEX_PRIVATE_FLAG), (1, area, libc::FUTEX_PRIVATE_FLAG), (2, shared, 0)]
    {
        let woken = futex(word(area, at), libc::FUTEX_WAKE | flag, 10, ptr::null())?;
        same(&format!("threads woken at futex {at}"), 1, woken)?;
    }
    threads.into_iter().try_for_each(Thread::join)
}

fn now() -> Result<libc::timespec, String> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    sys!(clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time))?;
    Ok(time)
}

fn blocked_futex_timeout(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::private(1)?;
    let (woken, _) = enter(checkpoint, libc::SYS_futex, move || {
        let long = libc::timespec { tv_sec: 1000, tv_nsec: 0 };
        let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
        same("result of a futex with a timeout", Ok(0), futex(word(area, 0), operation, 0, &long))
    })?;
    let (until, _) = enter(checkpoint, libc::SYS_futex, move || {
        let mut end = now()?;
        end.tv_sec += 2 * i64::from(slowness());
        let operation = libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG;
        let result = futex(word(area, 1), operation, 0, &end);
        let error = Error::last_os_error();
        ensure!(
            result.is_err() && error.raw_os_error() == Some(libc::ETIMEDOUT),
            "a futex with a time to end: {result:?}, {error}"
        );
        let passed = now()?;
        let reached = (passed.tv_sec, passed.tv_nsec) >= (end.tv_sec, end.tv_nsec);
        ensure!(reached, "ended at {passed:?}, before {end:?}");
        Ok(())
    })?;
    settle(checkpoint);
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    same("threads woken", 1, futex(word(area, 0), operation, 10, ptr::null())?)?;
    woken.join()?;
    until.join()
}

fn poll(fd: i32, milliseconds: i32) -> Result<(i32, i16), String> {
    let mut wanted = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let count = sys!(poll(&raw mut wanted, 1, milliseconds))?;
    Ok((count, wanted.revents))
}

fn blocked_poll(checkpoint: &Checkpoint) -> Verdict {
    let [from, to] = pipe()?;
    let (plain, _) = enter(checkpoint, libc::SYS_poll, move || {
        same("result of poll", (1, libc::POLLIN), poll(from, -1)?)
    })?;
    let (masked, _) = enter(checkpoint, libc::SYS_ppoll, move || {
        let mut wanted = libc::pollfd { fd: from, events: libc::POLLIN, revents: 0 };
        let mask = bit(libc::SIGUSR1);
        let arguments = (&raw mut wanted, ptr::null::<u8>(), &raw const mask);
        let count = sys!(syscall(libc::SYS_ppoll, arguments.0, 1, arguments.1, arguments.2, 8))?;
        same("result of ppoll", (1, libc::POLLIN), (count, wanted.revents))?;
        same("mask after ppoll", 0, crate::threads::blocked()?)
    })?;
    settle(checkpoint);
    write_all(to, b"x")?;
    plain.join()?;
    masked.join()
}

fn blocked_poll_timeout(checkpoint: &Checkpoint) -> Verdict {
    let [from, to] = pipe()?;
    let [silent, _kept] = pipe()?;
    let (woken, _) = enter(checkpoint, libc::SYS_poll, move || {
        same("result of poll with a timeout", (1, libc::POLLIN), poll(from, 1_000_000)?)
    })?;
    let (ended, _) = enter(checkpoint, libc::SYS_poll, move || {
        let begin = Instant::now();
        let slowness = slowness();
        let time = 2000 * i32::try_from(slowness).expect("it is not that slow");
        same("result of poll that times out", (0, 0), poll(silent, time)?)?;
        let least = std::time::Duration::from_millis(1999) * slowness;
        ensure!(begin.elapsed() >= least, "timed out after {:?}", begin.elapsed());
        Ok(())
    })?;
    settle(checkpoint);
    write_all(to, b"x")?;
    woken.join()?;
    ended.join()
}

fn blocked_select(checkpoint: &Checkpoint) -> Verdict {
    let [from, to] = pipe()?;
    let (thread, _) = enter(checkpoint, libc::SYS_pselect6, move || {
        // SAFETY: all zeros is an empty set; the descriptor is below 1024.
        let mut set: libc::fd_set = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        unsafe { libc::FD_SET(from, &raw mut set) };
        let (read, none) = (&raw mut set, ptr::null_mut());
        same("result of select", 1, sys!(select(from + 1, read, none, none, ptr::null_mut()))?)
    })?;
    settle(checkpoint);
    write_all(to, b"x")?;
    thread.join()
}

fn blocked_epoll(checkpoint: &Checkpoint) -> Verdict {
    let [from, to] = pipe()?;
    let epoll = sys!(epoll_create1(0))?;
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0x1234 };
    sys!(epoll_ctl(epoll, libc::EPOLL_CTL_ADD, from, &raw mut event))?;
    let (thread, _) = enter(checkpoint, libc::SYS_epoll_wait, move || {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // The kernel itself never restarts it.
        let count = loop {
            match sys!(epoll_wait(epoll, &raw mut event, 1, 1_000_000)) {
                Err(_) if is_interrupted() => {}
                other => break other?,
            }
        };
        let data = event.u64;
        same("result of epoll_wait", (1, 0x1234), (count, data))
    })?;
    settle(checkpoint);
    write_all(to, b"x")?;
    thread.join()
}

fn blocked_sleep(checkpoint: &Checkpoint) -> Verdict {
    let mut threads = Vec::new();
    // On a slow machine, too, the dump comes while they sleep.
    let slowness = slowness();
    for seconds in [1, 2].map(|seconds| seconds * i64::from(slowness)) {
        let (thread, _) = enter(checkpoint, libc::SYS_clock_nanosleep, move || {
            let begin = Instant::now();
            let time = libc::timespec { tv_sec: seconds, tv_nsec: 0 };
            // SAFETY: the structure outlives the call.
            let result = unsafe { libc::nanosleep(&raw const time, ptr::null_mut()) };
            ensure!(result == 0, "sleep: {}", Error::last_os_error());
            let passed = begin.elapsed();
            ensure!(passed.as_secs() as i64 >= seconds, "slept only for {passed:?}");
            ensure!(passed.as_secs() < 30 * u64::from(slowness), "slept for {passed:?}");
            Ok(())
        })?;
        threads.push(thread);
    }
    let (raw, _) = enter(checkpoint, libc::SYS_nanosleep, move || {
        let time = libc::timespec { tv_sec: 2 * i64::from(slowness), tv_nsec: 0 };
        sys!(syscall(libc::SYS_nanosleep, &raw const time, 0)).map(drop)
    })?;
    settle(checkpoint);
    threads.into_iter().try_for_each(Thread::join)?;
    raw.join()
}

fn blocked_sleep_until(checkpoint: &Checkpoint) -> Verdict {
    let (thread, _) = enter(checkpoint, libc::SYS_clock_nanosleep, move || {
        let mut end = now()?;
        end.tv_sec += 2 * i64::from(slowness());
        let (clock, flags) = (libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME);
        // SAFETY: the structure outlives the call.
        let error = unsafe { libc::clock_nanosleep(clock, flags, &raw const end, ptr::null_mut()) };
        same("result of clock_nanosleep", 0, error)?;
        let passed = now()?;
        let reached = (passed.tv_sec, passed.tv_nsec) >= (end.tv_sec, end.tv_nsec);
        ensure!(reached, "woken at {passed:?}, before {end:?}");
        Ok(())
    })?;
    settle(checkpoint);
    thread.join()
}

fn blocked_wait(checkpoint: &Checkpoint) -> Verdict {
    let child = checkpoint.fork(|child| {
        child.wait();
        child.wait_mark("settled")
    })?;
    let pid = child.pid;
    let (thread, _) = enter(checkpoint, libc::SYS_wait4, move || {
        let mut status = 0;
        same("child waited for", pid, sys!(waitpid(pid, &raw mut status, 0))?)?;
        same("its status", 0, status)
    })?;
    settle(checkpoint);
    checkpoint.mark("settled");
    thread.join()
}

static CAUGHT: AtomicU32 = AtomicU32::new(0);

extern "C" fn note(_signal: i32) {
    CAUGHT.fetch_add(1, Ordering::SeqCst);
}

fn catch(signal: i32) -> Verdict {
    // SAFETY: the handler only counts.
    let old = unsafe { libc::signal(signal, note as extern "C" fn(i32) as usize) };
    ensure!(old != libc::SIG_ERR, "signal {signal} cannot be caught");
    Ok(())
}

/// A call that ends only by a signal, which must not come from nowhere.
fn until_signal(
    checkpoint: &Checkpoint,
    number: i64,
    signal: i32,
    call: impl FnOnce() -> Result<i32, String> + Send + 'static,
) -> Verdict {
    catch(signal)?;
    let (thread, tid) = enter(checkpoint, number, move || {
        let result = call();
        let interrupted = is_interrupted();
        ensure!(result.is_err() && interrupted, "it returned {result:?}");
        same("signals caught before it returned", 1, CAUGHT.load(Ordering::SeqCst))
    })?;
    settle(checkpoint);
    // SAFETY: getpid has no preconditions.
    let pid = unsafe { libc::getpid() };
    sys!(syscall(libc::SYS_tgkill, pid, tid, signal))?;
    thread.join()
}

fn blocked_sigsuspend(checkpoint: &Checkpoint) -> Verdict {
    until_signal(checkpoint, libc::SYS_rt_sigsuspend, libc::SIGUSR1, || {
        block(bit(libc::SIGUSR1) | bit(libc::SIGHUP))?;
        let mask = bit(libc::SIGHUP);
        let result = sys!(syscall(libc::SYS_rt_sigsuspend, &raw const mask, 8));
        let error = Error::last_os_error().raw_os_error().unwrap_or(0);
        // The mask from before is back.
        let found = crate::threads::blocked()?;
        same("mask", bit(libc::SIGUSR1) | bit(libc::SIGHUP), found)
            .unwrap_or_else(|e| panic!("{e}"));
        // SAFETY: errno's place is the thread's own.
        unsafe { *libc::__errno_location() = error };
        result.map(|value| value as i32)
    })
}

fn blocked_pause(checkpoint: &Checkpoint) -> Verdict {
    until_signal(checkpoint, libc::SYS_pause, libc::SIGUSR2, || sys!(pause()))
}

fn blocked_sigwait(checkpoint: &Checkpoint) -> Verdict {
    block(bit(libc::SIGUSR1))?;
    let (thread, _) = enter(checkpoint, libc::SYS_rt_sigtimedwait, move || {
        let set = bit(libc::SIGUSR1);
        // The kernel itself never restarts it.
        let signal = loop {
            match sys!(syscall(libc::SYS_rt_sigtimedwait, &raw const set, 0, 0, 8)) {
                Err(_) if is_interrupted() => {}
                other => break other?,
            }
        };
        same("signal", i64::from(libc::SIGUSR1), signal)
    })?;
    settle(checkpoint);
    // SAFETY: getpid has no preconditions.
    sys!(kill(libc::getpid(), libc::SIGUSR1))?;
    thread.join()
}

fn blocked_accept(checkpoint: &Checkpoint) -> Verdict {
    let name = crate::sockets::abstract_name(&format!("rcriu-{}", std::process::id()));
    let server = crate::sockets::socket(libc::AF_UNIX, libc::SOCK_STREAM)?;
    name.bind(server)?;
    sys!(listen(server, 3))?;
    let call = libc::SYS_accept;
    let (thread, _) = enter(checkpoint, call, move || {
        let peer = sys!(accept(server, ptr::null_mut(), ptr::null_mut()))?;
        same("bytes from the client", &b"hello"[..], &read_some(peer, 10)?[..])
    })?;
    settle(checkpoint);
    let client = crate::sockets::socket(libc::AF_UNIX, libc::SOCK_STREAM)?;
    name.connect(client)?;
    write_all(client, b"hello")?;
    thread.join()
}

fn blocked_receive(checkpoint: &Checkpoint) -> Verdict {
    let mut pair = [0; 2];
    sys!(socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()))?;
    let (thread, _) = enter(checkpoint, libc::SYS_recvfrom, move || {
        let mut data = [0_u8; 10];
        let count = sys!(recv(pair[0], data.as_mut_ptr().cast(), 5, libc::MSG_WAITALL))?;
        same("bytes received", (5, &b"whole"[..]), (count, &data[..5]))
    })?;
    settle(checkpoint);
    write_all(pair[1], b"who")?;
    nap(5);
    write_all(pair[1], b"le")?;
    thread.join()
}

fn blocked_eventfd(checkpoint: &Checkpoint) -> Verdict {
    let fd = sys!(eventfd(0, 0))?;
    let (thread, _) = enter(checkpoint, libc::SYS_read, move || {
        same("event", &5_u64.to_le_bytes()[..], &read_some(fd, 8)?[..])
    })?;
    settle(checkpoint);
    write_all(fd, &5_u64.to_le_bytes())?;
    thread.join()
}

fn blocked_fifo_open(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.c_path("fifo");
    sys!(mkfifo(path.as_ptr(), 0o600))?;
    let own = path.clone();
    let (thread, _) = enter(checkpoint, libc::SYS_openat, move || {
        let fd = super::kit::open(&own, libc::O_RDONLY)?;
        same("bytes through the FIFO", &b"late"[..], &read_some(fd, 10)?[..])
    })?;
    settle(checkpoint);
    let fd = super::kit::open(&path, libc::O_WRONLY)?;
    write_all(fd, b"late")?;
    thread.join()
}
