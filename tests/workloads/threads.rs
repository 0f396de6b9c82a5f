//! What each thread has of its own.

use std::{cell::Cell, fs, mem, ptr};

use crate::{
    Row,
    kit::{Area, Checkpoint, Verdict, gettid, same},
};

pub const ROWS: &[Row] = &[
    ("threads", threads),
    ("thread_names", thread_names),
    ("thread_scheduling", thread_scheduling),
    ("thread_masks", thread_masks),
    ("thread_creds", thread_creds),
    ("robust_mutex", robust_mutex),
    ("clear_tid", clear_tid),
    ("condition_variable", condition_variable),
];

/// Threads that end at the wrong time or with the wrong local values are seen
/// here; everything else has a workload of its own.
fn threads(checkpoint: &Checkpoint) -> Verdict {
    thread_local! {
        static LOCAL: Cell<u64> = const { Cell::new(5) };
    }
    let mut threads = Vec::new();
    for number in 0..20 {
        threads.push(checkpoint.thread(move |thread| {
            LOCAL.set(1000 + number);
            let tid = gettid();
            // SAFETY: pthread_self has no preconditions.
            let own = unsafe { libc::pthread_self() };
            let robust = robust_list()?;
            thread.wait();
            same("thread-local value", 1000 + number, LOCAL.get())?;
            same("thread id", tid, gettid())?;
            same("robust list", robust, robust_list()?)?;
            // SAFETY: pthread_self has no preconditions.
            same("pthread_self", own, unsafe { libc::pthread_self() })?;
            // SAFETY: errno's place is the thread's own.
            unsafe { *libc::__errno_location() = 0 };
            Ok(())
        })?);
    }
    LOCAL.set(7);
    checkpoint.wait();
    same("thread-local value of the main thread", 7, LOCAL.get())?;
    threads.into_iter().try_for_each(super::kit::Thread::join)?;
    // New threads can still be made.
    let fresh = checkpoint.thread(|thread| {
        thread.announce();
        same("fresh thread-local value", 5, LOCAL.get())
    })?;
    fresh.join()
}

fn robust_list() -> Result<(usize, usize), String> {
    let (mut head, mut length) = (0_usize, 0_usize);
    sys!(syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut length))?;
    Ok((head, length))
}

fn own_name() -> Result<String, String> {
    fs::read_to_string("/proc/thread-self/comm").map_err(|error| error.to_string())
}

fn thread_names(checkpoint: &Checkpoint) -> Verdict {
    let mut threads = Vec::new();
    for name in [c"first", c"with space", c"fifteen-letters", c"paren) (x", c""] {
        threads.push(checkpoint.thread(move |thread| {
            sys!(prctl(libc::PR_SET_NAME, name.as_ptr()))?;
            let before = own_name()?;
            thread.wait();
            same("thread name", before, own_name()?)
        })?);
    }
    sys!(prctl(libc::PR_SET_NAME, c"the main one".as_ptr()))?;
    checkpoint.wait();
    same("main thread's name", "the main one\n", &own_name()?)?;
    threads.into_iter().try_for_each(super::kit::Thread::join)
}

fn thread_scheduling(checkpoint: &Checkpoint) -> Verdict {
    let rows: [(i32, i32, i32); 6] = [
        (libc::SCHED_OTHER, 0, 0),
        (libc::SCHED_OTHER, 0, 7),
        (libc::SCHED_BATCH, 0, 12),
        (libc::SCHED_IDLE, 0, 5),
        (libc::SCHED_RR, 3, 4),
        (libc::SCHED_FIFO, 5, 0),
    ];
    let read = || -> Result<(i32, i32, i32), String> {
        let policy = sys!(sched_getscheduler(0))?;
        let mut parameters: libc::sched_param = libc::sched_param { sched_priority: 0 };
        sys!(sched_getparam(0, &raw mut parameters))?;
        let tid = gettid() as libc::id_t;
        Ok((policy, parameters.sched_priority, sys!(getpriority(libc::PRIO_PROCESS, tid))?))
    };
    let mut threads = Vec::new();
    let mut kinds = 0;
    for (policy, priority, nice) in rows {
        let allowed = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let told = allowed.clone();
        threads.push(checkpoint.thread(move |thread| {
            let tid = gettid() as libc::id_t;
            sys!(setpriority(libc::PRIO_PROCESS, tid, nice))?;
            let parameters = libc::sched_param { sched_priority: priority };
            // Real-time policies may be forbidden in a container.
            let set = sys!(sched_setscheduler(0, policy, &raw const parameters)).is_ok();
            told.store(set, std::sync::atomic::Ordering::Relaxed);
            let before = read()?;
            thread.wait();
            same("policy, priority, nice", before, read()?)
        })?);
        kinds += u32::from(allowed.load(std::sync::atomic::Ordering::Relaxed));
    }
    ensure!(kinds >= 4, "only {kinds} policies could be set");
    sys!(setpriority(libc::PRIO_PROCESS, 0, 3))?;
    let before = read()?;
    checkpoint.wait();
    same("policy, priority, nice of the main thread", before, read()?)?;
    threads.into_iter().try_for_each(super::kit::Thread::join)
}

/// The signals of a mask, as bits.
pub fn blocked() -> Result<u64, String> {
    let mut bits = 0_u64;
    sys!(syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, 0, &raw mut bits, 8))?;
    Ok(bits)
}

/// Sets a mask as bits, those that the C library keeps for itself included.
pub fn block(bits: u64) -> Verdict {
    sys!(syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const bits, 0, 8)).map(drop)
}

pub fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

fn alternate_stack() -> Result<(usize, usize, i32), String> {
    // SAFETY: all zeros is a valid value.
    let mut stack: libc::stack_t = unsafe { mem::zeroed() };
    sys!(sigaltstack(ptr::null(), &raw mut stack))?;
    Ok((stack.ss_sp.addr(), stack.ss_size, stack.ss_flags))
}

fn thread_masks(checkpoint: &Checkpoint) -> Verdict {
    let mut threads = Vec::new();
    for number in 0..6 {
        threads.push(checkpoint.thread(move |thread| {
            let mask = bit(libc::SIGUSR1) << number | bit(64) | bit(33 + number);
            block(mask)?;
            let area = Area::private(8)?;
            let stack = libc::stack_t {
                ss_sp: area.at.cast(),
                ss_flags: if number == 2 { libc::SS_DISABLE } else { 0 },
                ss_size: area.bytes,
            };
            sys!(sigaltstack(&raw const stack, ptr::null_mut()))?;
            let before = (blocked()?, alternate_stack()?);
            thread.wait();
            same("mask", mask, before.0)?;
            same("mask and alternate stack", before, (blocked()?, alternate_stack()?))
        })?);
    }
    block(bit(libc::SIGHUP))?;
    checkpoint.wait();
    same("main thread's mask", bit(libc::SIGHUP), blocked()?)?;
    threads.into_iter().try_for_each(super::kit::Thread::join)
}

fn ids() -> Result<[u32; 6], String> {
    let mut ids = [0_u32; 6];
    let [a, b, c, d, e, f] = &mut ids;
    sys!(syscall(libc::SYS_getresuid, ptr::from_mut(a), ptr::from_mut(b), ptr::from_mut(c)))?;
    sys!(syscall(libc::SYS_getresgid, ptr::from_mut(d), ptr::from_mut(e), ptr::from_mut(f)))?;
    Ok(ids)
}

fn credentials_lines() -> Result<Vec<String>, String> {
    let text = fs::read_to_string("/proc/thread-self/status").map_err(|error| error.to_string())?;
    let wanted = ["Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:"];
    let lines = text.lines().filter(|line| wanted.iter().any(|word| line.starts_with(word)));
    Ok(lines.map(str::to_owned).collect())
}

/// Ids set behind the C library's back are one thread's own.
fn thread_creds(checkpoint: &Checkpoint) -> Verdict {
    let mut threads = Vec::new();
    for number in 0..4_u32 {
        threads.push(checkpoint.thread(move |thread| {
            let groups = [5000 + number, 6000];
            sys!(syscall(libc::SYS_setgroups, 2, groups.as_ptr()))?;
            sys!(syscall(libc::SYS_setresgid, 100 + number, 200 + number, 0))?;
            if number > 0 {
                sys!(syscall(libc::SYS_setresuid, 1000 + number, 2000 + number, 0))?;
            }
            let before = (ids()?, credentials_lines()?);
            thread.wait();
            same("credentials", before, (ids()?, credentials_lines()?))
        })?);
    }
    let before = (ids()?, credentials_lines()?);
    checkpoint.wait();
    same("credentials of the main thread", before, (ids()?, credentials_lines()?))?;
    threads.into_iter().try_for_each(super::kit::Thread::join)
}

/// The owner of a robust mutex ends after the checkpoint without giving it up.
fn robust_mutex(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::shared(1)?;
    let mutex: *mut libc::pthread_mutex_t = area.at.cast();
    // SAFETY: the mutex lies in shared memory that is mapped for good, and is initialised
    // before another thread uses it.
    unsafe {
        let mut attributes: libc::pthread_mutexattr_t = mem::zeroed();
        libc::pthread_mutexattr_init(&raw mut attributes);
        libc::pthread_mutexattr_setrobust(&raw mut attributes, libc::PTHREAD_MUTEX_ROBUST);
        libc::pthread_mutexattr_setpshared(&raw mut attributes, libc::PTHREAD_PROCESS_SHARED);
        libc::pthread_mutex_init(mutex, &raw const attributes);
    }
    // SAFETY: the mutex is initialised.
    let lock = move |area: Area| unsafe { libc::pthread_mutex_lock(area.at.cast()) };
    let child = checkpoint.fork(|child| {
        let mut thread = Some(checkpoint.thread(move |thread| {
            same("lock in the child", 0, lock(area))?;
            thread.wait();
            Ok(())
        })?);
        child.wait();
        thread.take().expect("it was put there").join()
    })?;
    checkpoint.wait();
    same("lock of a dead owner's mutex", libc::EOWNERDEAD, lock(area))?;
    child.join()
}

/// Joining a thread is the kernel's clearing of its id.
fn clear_tid(checkpoint: &Checkpoint) -> Verdict {
    let mut threads = Vec::new();
    for number in 0..8 {
        threads.push(checkpoint.thread(move |thread| {
            thread.wait();
            super::kit::nap(number * 3);
            Ok(())
        })?);
    }
    let joined = checkpoint.thread(move |thread| {
        thread.announce();
        threads.into_iter().try_for_each(super::kit::Thread::join)
    })?;
    checkpoint.wait();
    joined.join()
}

/// A child whose threads all wait for each other on one condition variable.
fn condition_variable(checkpoint: &Checkpoint) -> Verdict {
    use std::sync::{Arc, Condvar, Mutex};
    let child = checkpoint.fork(|child| {
        let shared = Arc::new((Mutex::new(0_u32), Condvar::new()));
        let mut threads = Vec::new();
        for number in 0..10 {
            let shared = shared.clone();
            threads.push(child_thread(
                child,
                move || {
                    let (count, turn) = &*shared;
                    let mut count = count.lock().map_err(|error| error.to_string())?;
                    while *count != number {
                        count = turn.wait(count).map_err(|error| error.to_string())?;
                    }
                    *count += 1;
                    turn.notify_all();
                    Ok(())
                },
                number == 0,
            )?);
        }
        child.wait();
        for thread in threads {
            thread.join()?;
        }
        same("turns taken", 10, *shared.0.lock().map_err(|error| error.to_string())?)
    })?;
    checkpoint.wait();
    child.join()
}

/// Starts a thread that enters its body at once, or after the checkpoint.
fn child_thread(
    checkpoint: &Checkpoint,
    body: impl FnOnce() -> Verdict + Send + 'static,
    after: bool,
) -> Result<super::kit::Thread, String> {
    checkpoint.thread(move |thread| {
        thread.announce();
        if after {
            thread.wait_go();
        }
        body()
    })
}
