//! System calls that are confined by `seccomp(2)`.
//!
//! Some of the filters kill for calls that a dump makes in the process, or for those by which a
//! thread returns to its own work afterwards.

use std::{
    ptr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{
    Row,
    kit::{Checkpoint, PAGE, Verdict, same, wait_until},
};

pub const ROWS: &[Row] = &[
    ("seccomp_filters", seccomp_filters),
    ("seccomp_kills", seccomp_kills),
    ("seccomp_kills_returns", seccomp_kills_returns),
    ("seccomp_kills_locked_later", seccomp_kills_locked_later),
    ("seccomp_strict", seccomp_strict),
    ("seccomp_shared", seccomp_shared),
    ("seccomp_of_each_thread", seccomp_of_each_thread),
    ("seccomp_inherited", seccomp_inherited),
    ("seccomp_without_privileges", seccomp_without_privileges),
    ("seccomp_trap", seccomp_trap),
    ("seccomp_notifies", seccomp_notifies),
    ("seccomp_listener", seccomp_listener),
];

/// Flags and actions (`linux/seccomp.h`).
const TSYNC: u64 = 1;
const LOG: u64 = 2;
const ERRNO: u32 = 0x0005_0000;
const TRAP: u32 = 0x0003_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
const USER_NOTIF: u32 = 0x7fc0_0000;
const ALLOW: u32 = 0x7fff_0000;

/// Instructions of classic BPF (`linux/bpf_common.h`).
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

fn instruction(code: u16, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf, k }
}

/// A program with an action for each of these calls, and one for all others.
pub fn program(rows: &[(libc::c_long, u32)], otherwise: u32) -> Vec<libc::sock_filter> {
    let mut program = vec![instruction(LOAD, 0, 0)];
    for (number, action) in rows {
        program.push(instruction(JUMP_IF_EQUAL, 1, *number as u32));
        program.push(instruction(RETURN, 0, *action));
    }
    program.push(instruction(RETURN, 0, otherwise));
    program
}

/// Installs a filter for the calling thread. Returns the result of `seccomp(2)`.
pub fn install(program: &[libc::sock_filter], flags: u64) -> Result<i64, String> {
    const SET_MODE_FILTER: i32 = 1;
    let program =
        libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    sys!(syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, &raw const program))
}

/// A filter that makes `getppid(2)` fail with this error.
fn getppid_fails(with: u32) -> Vec<libc::sock_filter> {
    program(&[(libc::SYS_getppid, ERRNO | with)], ALLOW)
}

/// The result of a call without arguments, as the kernel returns it.
fn raw(number: libc::c_long) -> i64 {
    // SAFETY: the calls that the states make so have no arguments.
    let result = unsafe { libc::syscall(number) };
    // SAFETY: the place of errno is the thread's own.
    if result == -1 { -i64::from(unsafe { *libc::__errno_location() }) } else { result }
}

/// Calls that nothing but the states make, each with its own filter.
const CALLS: [libc::c_long; 3] = [libc::SYS_getppid, libc::SYS_getpgrp, libc::SYS_gettid];

fn results() -> [i64; 3] {
    CALLS.map(raw)
}

fn status_line(name: &str) -> Result<String, String> {
    let text = std::fs::read_to_string("/proc/thread-self/status");
    let text = text.map_err(|error| error.to_string())?;
    let line = text.lines().find(|line| line.starts_with(name));
    line.map(str::to_owned).ok_or_else(|| format!("status has no {name}"))
}

fn no_new_privileges() -> Verdict {
    sys!(prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)).map(drop)
}

/// Filters of all lengths. The newest that has an error decides which.
fn seccomp_filters(checkpoint: &Checkpoint) -> Verdict {
    no_new_privileges()?;
    install(&getppid_fails(77), 0)?;
    install(&program(&[(libc::SYS_getpgrp, ERRNO | 78)], ALLOW), LOG)?;
    let mut long = program(&[(libc::SYS_gettid, ERRNO | 79)], ALLOW);
    long.resize(4096, instruction(RETURN, 0, ALLOW));
    install(&long, 0)?;
    install(&getppid_fails(80), 0)?;
    let before = (results(), status_line("Seccomp_filters")?);
    same("results", [-80, -78, -79], before.0)?;
    checkpoint.wait();
    same("results and filters", before, (results(), status_line("Seccomp_filters")?))?;
    install(&getppid_fails(81), 0)?;
    same("a new filter", -81, raw(libc::SYS_getppid))
}

/// The calls that a state needs after its checkpoint.
const NEEDED: [libc::c_long; 22] = [
    libc::SYS_access,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_rename,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fcntl,
    libc::SYS_futex,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_getpid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_sigaltstack,
    libc::SYS_munmap,
    libc::SYS_rt_sigreturn,
];

/// A filter that kills for all calls except some. A workload needs neither `sigaltstack(2)` nor
/// `munmap(2)` before it has reported its verdict.
fn kills_but_for(needed: &[libc::c_long]) -> Vec<libc::sock_filter> {
    let rows = needed.iter().map(|number| (*number, ALLOW));
    let rows: Vec<_> = [(libc::SYS_getppid, ERRNO | 77)].into_iter().chain(rows).collect();
    program(&rows, KILL_PROCESS)
}

fn killed_unless_needed(checkpoint: &Checkpoint, needed: &[libc::c_long]) -> Verdict {
    no_new_privileges()?;
    install(&kills_but_for(needed), 0)?;
    checkpoint.wait();
    same("result of getppid(2)", -77, raw(libc::SYS_getppid))
}

/// The filter kills for the calls that a dump makes in the process, but not for those by which a
/// thread returns to its own work.
fn seccomp_kills(checkpoint: &Checkpoint) -> Verdict {
    killed_unless_needed(checkpoint, &NEEDED)
}

/// The filter also kills for the calls by which a thread returns to its own work.
fn seccomp_kills_returns(checkpoint: &Checkpoint) -> Verdict {
    killed_unless_needed(checkpoint, &NEEDED[..NEEDED.len() - 1])
}

/// Only a new mapping shows whether the process locks new memory.
fn seccomp_kills_locked_later(checkpoint: &Checkpoint) -> Verdict {
    sys!(mlockall(libc::MCL_FUTURE))?;
    // A dump looks at new mappings only in processes with locked memory.
    let (bytes, access) = (PAGE, libc::PROT_READ | libc::PROT_WRITE);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    sys!(mmap(ptr::null_mut(), bytes, access, flags, -1, 0))?;
    no_new_privileges()?;
    install(&kills_but_for(&NEEDED), 0)?;
    let locked = || -> Result<u64, String> {
        let line = status_line("VmLck")?;
        let digits: String = line.chars().filter(char::is_ascii_digit).collect();
        digits.parse().map_err(|_| line)
    };
    checkpoint.wait();
    let before = locked()?;
    sys!(mmap(ptr::null_mut(), 4 * bytes, access, flags, -1, 0))?;
    ensure!(locked()? >= before + 16, "new memory is not locked");
    same("result of getppid(2)", -77, raw(libc::SYS_getppid))
}

/// A child that may only read, write and exit. It answers each byte, until it breaks the rule.
fn seccomp_strict(checkpoint: &Checkpoint) -> Verdict {
    let (mut questions, mut answers) = ([0; 2], [0; 2]);
    sys!(pipe(questions.as_mut_ptr()))?;
    sys!(pipe(answers.as_mut_ptr()))?;
    let pid = sys!(fork())?;
    if pid == 0 {
        // SAFETY: nothing of the process needs to be unwound, and the bytes outlive the calls.
        unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, 1);
            let mut byte = 0_u8;
            while libc::read(questions[0], (&raw mut byte).cast(), 1) == 1 && byte != b'!' {
                byte += 1;
                libc::write(answers[1], (&raw const byte).cast(), 1);
            }
            libc::syscall(libc::SYS_getppid);
            libc::syscall(libc::SYS_exit, 0);
        }
    }
    let ask = |byte: u8| -> Result<u8, String> {
        let mut answer = 0_u8;
        sys!(write(questions[1], (&raw const byte).cast(), 1))?;
        sys!(read(answers[0], (&raw mut answer).cast(), 1))?;
        Ok(answer)
    };
    same("the answer", b'b', ask(b'a')?)?;
    checkpoint.wait();
    same("the answer", b'd', ask(b'c')?)?;
    let last = b'!';
    sys!(write(questions[1], (&raw const last).cast(), 1))?;
    let mut status = 0;
    sys!(waitpid(pid, &raw mut status, 0))?;
    same("how the child ends", libc::SIGKILL, libc::WTERMSIG(status))
}

/// Filters that all threads share: a thread can still give all of them another one.
fn seccomp_shared(checkpoint: &Checkpoint) -> Verdict {
    no_new_privileges()?;
    let mut threads = Vec::new();
    let looked = Arc::new(AtomicU32::new(0));
    for _ in 0..3 {
        let looked = looked.clone();
        threads.push(checkpoint.thread(move |thread| {
            thread.wait();
            same("results of a thread", -77, raw(libc::SYS_getppid))?;
            same("results of a thread", -78, raw(libc::SYS_getpgrp))?;
            looked.fetch_add(1, Ordering::Release);
            thread.wait_mark("synchronized")?;
            same("the new filter in a thread", -79, raw(libc::SYS_getppid))
        })?);
    }
    install(&getppid_fails(77), TSYNC)?;
    install(&program(&[(libc::SYS_getpgrp, ERRNO | 78)], ALLOW), TSYNC | LOG)?;
    checkpoint.wait();
    same("results", -77, raw(libc::SYS_getppid))?;
    wait_until("the other threads", || looked.load(Ordering::Acquire) == 3)?;
    same("the thread that cannot share", 0, install(&getppid_fails(79), TSYNC)?)?;
    checkpoint.mark("synchronized");
    same("the new filter", -79, raw(libc::SYS_getppid))?;
    threads.into_iter().try_for_each(crate::kit::Thread::join)
}

/// Threads with the filters of the first one, with more of their own, and without any.
fn seccomp_of_each_thread(checkpoint: &Checkpoint) -> Verdict {
    no_new_privileges()?;
    let mut threads = Vec::new();
    // The results of these two calls do not depend on the restorer.
    let before = [raw(libc::SYS_getegid), raw(libc::SYS_getpgrp)];
    let getegid_fails = |with| program(&[(libc::SYS_getegid, ERRNO | with)], ALLOW);
    let of_getpgrp = |with| program(&[(libc::SYS_getpgrp, ERRNO | with)], ALLOW);
    let mut thread = |own: Vec<Vec<libc::sock_filter>>, expected: [i64; 2]| -> Verdict {
        let new = checkpoint.thread(move |thread| {
            own.iter().try_for_each(|program| install(program, 0).map(drop))?;
            thread.wait();
            same("results", expected, [raw(libc::SYS_getegid), raw(libc::SYS_getpgrp)])
        })?;
        threads.push(new);
        Ok(())
    };
    thread(vec![], [before[0], before[1]])?;
    thread(vec![of_getpgrp(70)], [before[0], -70])?;
    install(&getegid_fails(77), 0)?;
    thread(vec![], [-77, before[1]])?;
    thread(vec![of_getpgrp(78)], [-77, -78])?;
    thread(vec![of_getpgrp(78), getegid_fails(79)], [-79, -78])?;
    install(&getegid_fails(80), 0)?;
    checkpoint.wait();
    same(
        "results of the first thread",
        [-80, before[1]],
        [raw(libc::SYS_getegid), raw(libc::SYS_getpgrp)],
    )?;
    threads.into_iter().try_for_each(crate::kit::Thread::join)
}

/// Children have the filters of their parent, and more.
fn seccomp_inherited(checkpoint: &Checkpoint) -> Verdict {
    no_new_privileges()?;
    install(&getppid_fails(77), 0)?;
    let mut children = Vec::new();
    for own in [0, 78, 79] {
        children.push(checkpoint.fork(|child| {
            if own != 0 {
                install(&getppid_fails(own), 0)?;
            }
            child.wait();
            let expected = if own == 0 { -77 } else { -i64::from(own) };
            same("result in a child", expected, raw(libc::SYS_getppid))
        })?);
    }
    checkpoint.wait();
    same("result", -77, raw(libc::SYS_getppid))?;
    children.into_iter().try_for_each(crate::kit::Child::join)
}

/// A process that installed a filter without `no_new_privs`, and has since lost the privilege to do
/// so.
fn seccomp_without_privileges(checkpoint: &Checkpoint) -> Verdict {
    const NOBODY: u32 = 65534;
    install(&getppid_fails(77), 0)?;
    std::fs::set_permissions(
        checkpoint.path("").parent().expect("it is in a directory"),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .map_err(|error| error.to_string())?;
    sys!(setgroups(0, ptr::null()))?;
    sys!(setresgid(NOBODY, NOBODY, NOBODY))?;
    sys!(setresuid(NOBODY, NOBODY, NOBODY))?;
    sys!(prctl(libc::PR_SET_DUMPABLE, 1))?;
    checkpoint.wait();
    same("result", -77, raw(libc::SYS_getppid))?;
    same("no_new_privs", 0, sys!(prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0))?)?;
    let refused = install(&getppid_fails(78), 0);
    ensure!(refused.is_err(), "it has the privilege to install filters");
    Ok(())
}

/// A filter that sends a signal, whose handler plays the kernel.
fn seccomp_trap(checkpoint: &Checkpoint) -> Verdict {
    extern "C" fn play(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
        // SAFETY: it is the context of a handler that was installed with SA_SIGINFO.
        let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
        context.uc_mcontext.gregs[libc::REG_RAX as usize] = 4711;
    }
    no_new_privileges()?;
    // SAFETY: all zeros is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = play as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    sys!(sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()))?;
    install(&program(&[(libc::SYS_getppid, TRAP)], ALLOW), 0)?;
    same("result", 4711, raw(libc::SYS_getppid))?;
    checkpoint.wait();
    same("result", 4711, raw(libc::SYS_getppid))
}

/// A filter that asks another process, as container managers install them.
fn seccomp_notifies(checkpoint: &Checkpoint) -> Verdict {
    no_new_privileges()?;
    install(&program(&[(libc::SYS_getppid, USER_NOTIF)], ALLOW), 0)?;
    checkpoint.wait();
    same("result without a process that answers", -i64::from(libc::ENOSYS), raw(libc::SYS_getppid))
}

/// The process that answers, without the one that asks.
fn seccomp_listener(checkpoint: &Checkpoint) -> Verdict {
    const NEW_LISTENER: u64 = 8;
    no_new_privileges()?;
    // The descriptors of both processes are the same, so the child need not send its own.
    let flags = (libc::CLONE_FILES | libc::SIGCHLD) as u64;
    let pid = sys!(syscall(libc::SYS_clone, flags, 0, 0, 0, 0))?;
    if pid == 0 {
        let listener = install(&program(&[(libc::SYS_getppid, USER_NOTIF)], ALLOW), NEW_LISTENER);
        // SAFETY: nothing of the process needs to be unwound.
        unsafe { libc::_exit(i32::from(listener.is_err())) };
    }
    let mut status = 0;
    sys!(waitpid(pid as i32, &raw mut status, 0))?;
    same("the end of the child", 0, status)?;
    checkpoint.wait();
    Ok(())
}
