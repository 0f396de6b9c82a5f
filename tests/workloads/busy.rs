//! Trees that work while they are dumped, and processes that are hard to work in.

use std::ptr;

use crate::{
    Row,
    kit::{Checkpoint, Thread, Verdict, nap, same},
};

pub const ROWS: &[Row] = &[
    ("busy_tree", busy_tree),
    ("no_ignored_signal", no_ignored_signal),
    ("no_room_for_mappings", no_room_for_mappings),
    ("no_room_nor_signal", no_room_nor_signal),
    ("no_room_for_data", no_room_for_data),
    ("no_room_to_lock", no_room_to_lock),
    ("pending_trap", pending_trap),
];

/// Steps of a computation between two looks at whether it came out right.
const STEPS: u64 = 20_000;

/// Three processes of six threads each, all of which do something and look at what came
/// of it.
fn busy_tree(checkpoint: &Checkpoint) -> Verdict {
    let children = [checkpoint.fork(busy)?, checkpoint.fork(busy)?];
    let result = busy(checkpoint);
    children.into_iter().try_for_each(super::kit::Child::join)?;
    result
}

fn busy(checkpoint: &Checkpoint) -> Verdict {
    let mut ends = [[0; 2]; 2];
    for pair in &mut ends {
        sys!(pipe2(pair.as_mut_ptr(), libc::O_CLOEXEC))?;
    }
    let [there, back] = ends;
    let threads: [Thread; 5] = [
        checkpoint.thread(|thread| until_go(thread, compute))?,
        checkpoint.thread(|thread| until_go(thread, || call(thread)))?,
        checkpoint.thread(|thread| {
            crate::threads::block(crate::threads::bit(libc::SIGUSR1))?;
            until_go(thread, wait)
        })?,
        checkpoint.thread(move |thread| {
            let mut number = 0_u64;
            let result = until_go(thread, || {
                number += 1;
                send(there[1], number)?;
                same("what came back", Some(number), receive(back[0])?)
            });
            sys!(close(there[1]))?;
            result
        })?,
        checkpoint.thread(move |thread| {
            thread.announce();
            while let Some(number) = receive(there[0])? {
                send(back[1], number)?;
            }
            Ok(())
        })?,
    ];
    checkpoint.wait();
    threads.into_iter().try_for_each(Thread::join)
}

/// Repeats a thing until the checkpoint is over.
pub fn until_go(thread: &Checkpoint, mut act: impl FnMut() -> Verdict) -> Verdict {
    thread.announce();
    while !thread.is_go() {
        act()?;
    }
    Ok(())
}

/// Integers and floating-point numbers in registers.
fn compute() -> Verdict {
    let run = || {
        let (mut whole, mut sum) = (1_u64, 0.0_f64);
        for step in 0..STEPS {
            whole = whole.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(step);
            sum = sum * 0.5 + f64::from((whole >> 40) as u32);
        }
        (whole, sum.to_bits())
    };
    let first = run();
    same("what is computed", first, run())
}

/// Calls that return at once.
fn call(thread: &Checkpoint) -> Verdict {
    // SAFETY: getpid has no preconditions.
    let pid = unsafe { libc::getpid() };
    for _ in 0..100 {
        // SAFETY: as above.
        same("getpid", pid, unsafe { libc::getpid() })?;
    }
    same("a file that is not there", false, thread.path("nothing").exists())
}

/// A wait in which the kernel sets the signal mask and puts it back: to the same one, so
/// that each look finds it the same.
fn wait() -> Verdict {
    let time = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
    // SAFETY: a signal set is plain data; the calls read and write what outlives them.
    let (result, same_mask) = unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut mask);
        let before = libc::sigismember(&raw const mask, libc::SIGUSR1);
        let result = libc::ppoll(ptr::null_mut(), 0, &raw const time, &raw const mask);
        libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut mask);
        (result, before == libc::sigismember(&raw const mask, libc::SIGUSR1))
    };
    same("a wait for nothing", 0, result)?;
    same("the signal mask stays", true, same_mask)?;
    nap(1);
    Ok(())
}

fn send(fd: i32, number: u64) -> Verdict {
    let bytes = number.to_le_bytes();
    let sent = sys!(write(fd, bytes.as_ptr().cast(), bytes.len()))?;
    same("bytes that were sent", 8, sent)
}

/// Returns what was sent, or `None` at the end.
fn receive(fd: i32) -> Result<Option<u64>, String> {
    let mut bytes = [0; 8];
    let got = sys!(read(fd, bytes.as_mut_ptr().cast(), bytes.len()))?;
    Ok((got == 8).then(|| u64::from_le_bytes(bytes)))
}

extern "C" fn caught(_signal: i32) {
    // SAFETY: it ends the process, which is allowed in a handler.
    unsafe { libc::_exit(77) };
}

/// Catches all signals that are ignored by default.
fn catch_all() -> Verdict {
    // Which Rust's runtime ignores.
    let all = [libc::SIGPIPE, libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD, libc::SIGCONT];
    for signal in all {
        // SAFETY: a sigaction is plain data; the handler is a function of its type.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = caught as *const () as usize;
            let result = libc::sigaction(signal, &raw const action, ptr::null_mut());
            same("sigaction", 0, result)?;
        }
    }
    Ok(())
}

/// As Go's runtime does: there is no signal that has no effect.
fn no_ignored_signal(checkpoint: &Checkpoint) -> Verdict {
    catch_all()?;
    let thread = checkpoint.thread(|thread| until_go(thread, compute))?;
    checkpoint.wait();
    thread.join()
}

/// A signal waits that others use to tell that a thread has stopped for them.
fn pending_trap(checkpoint: &Checkpoint) -> Verdict {
    let trap = crate::threads::bit(libc::SIGTRAP);
    crate::threads::block(trap)?;
    // SAFETY: getpid has no preconditions.
    sys!(kill(unsafe { libc::getpid() }, libc::SIGTRAP))?;
    checkpoint.wait();
    let nothing = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a signal set is plain data; both outlive the call.
    let got = unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut mask, libc::SIGTRAP);
        libc::sigtimedwait(&raw const mask, ptr::null_mut(), &raw const nothing)
    };
    same("the signal that waits", libc::SIGTRAP, got)
}

/// Makes the address space be as large as it may be.
fn limit() -> Result<u64, String> {
    let status = std::fs::read_to_string("/proc/self/statm").map_err(|error| error.to_string())?;
    let pages = status.split(' ').next().and_then(|word| word.parse::<u64>().ok());
    let bytes = pages.ok_or("statm has no size")? * super::kit::PAGE as u64;
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    sys!(setrlimit(libc::RLIMIT_AS, &raw const limit))?;
    Ok(bytes)
}

fn check_limit(bytes: u64) -> Verdict {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    sys!(getrlimit(libc::RLIMIT_AS, &raw mut limit))?;
    same("limit of the address space", bytes, limit.rlim_cur)?;
    // What it hands out is left for what comes.
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    sys!(setrlimit(libc::RLIMIT_AS, &raw const limit)).map(drop)
}

/// No new mapping is possible (`RLIMIT_AS`).
fn no_room_for_mappings(checkpoint: &Checkpoint) -> Verdict {
    let thread = checkpoint.thread(|thread| until_go(thread, compute))?;
    let bytes = limit()?;
    checkpoint.wait();
    check_limit(bytes)?;
    thread.join()
}

/// Neither the one nor the other.
fn no_room_nor_signal(checkpoint: &Checkpoint) -> Verdict {
    catch_all()?;
    let bytes = limit()?;
    checkpoint.wait();
    check_limit(bytes)
}

fn set_limit(resource: libc::__rlimit_resource_t, bytes: u64) -> Verdict {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    sys!(setrlimit(resource, &raw const limit)).map(drop)
}

/// No new memory can be written to (`RLIMIT_DATA`).
fn no_room_for_data(checkpoint: &Checkpoint) -> Verdict {
    let thread = checkpoint.thread(|thread| until_go(thread, compute))?;
    let status = std::fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmData:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    set_limit(libc::RLIMIT_DATA, kib.ok_or("no VmData")? << 10)?;
    checkpoint.wait();
    set_limit(libc::RLIMIT_DATA, libc::RLIM_INFINITY)?;
    thread.join()
}

/// New memory is to be locked, and may not be.
fn no_room_to_lock(checkpoint: &Checkpoint) -> Verdict {
    sys!(mlockall(libc::MCL_FUTURE))?;
    let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    sys!(setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit))?;
    // A process with CAP_IPC_LOCK may lock memory beyond the limit.
    const NOBODY: u32 = 65534;
    sys!(setresuid(NOBODY, NOBODY, NOBODY))?;
    checkpoint.wait();
    let mut now = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
    sys!(getrlimit(libc::RLIMIT_MEMLOCK, &raw mut now))?;
    same("limit of locked memory", 0, now.rlim_cur)
}
