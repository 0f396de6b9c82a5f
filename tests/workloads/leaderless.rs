//! A process whose first thread has ended while others live.

use std::{ffi::CString, fs, mem, ptr};

use crate::{
    Row,
    kit::{Area, Checkpoint, Child, Verdict, gettid, lacks, same, wait_until},
    threads::{bit, block, blocked},
};

pub const ROWS: &[Row] =
    &[("exited_leader", exited_leader), ("exited_leader_of_a_session", exited_leader_of_a_session)];

/// The exit code of the first thread, which no process sees.
const FIRST_CODE: i32 = 7;

/// Forks a child in which `prepare` runs in the first thread, and the rest in another one,
/// when the first has ended.
fn leaderless(
    checkpoint: &Checkpoint,
    prepare: impl FnOnce() -> Verdict,
    body: impl FnOnce(&Checkpoint) -> Verdict + Send + 'static,
) -> Result<Child, String> {
    /// `PIDFD_THREAD` (`linux/pidfd.h`).
    const PIDFD_THREAD: i32 = libc::O_EXCL;
    match sys!(syscall(libc::SYS_pidfd_open, gettid(), PIDFD_THREAD)) {
        Ok(fd) => sys!(close(fd as i32)).map(drop)?,
        Err(_) => lacks("descriptors of threads (Linux 6.9)")?,
    }
    checkpoint.fork(|child| {
        prepare()?;
        let child = child.clone();
        std::thread::spawn(move || {
            let verdict = crate::judged(|| {
                wait_until("the end of the first thread", || first_state() == Some('Z'))?;
                body(&child)
            });
            // SAFETY: getpid has no preconditions.
            let pid = unsafe { libc::getpid() };
            if let Err(error) = &verdict {
                crate::publish(&child.path(&format!("failure.{pid}")), error);
            }
            // SAFETY: nothing of this process needs to be unwound.
            unsafe { libc::_exit(i32::from(verdict.is_err())) };
        });
        // SAFETY: the thread holds nothing that the others use.
        unsafe { libc::syscall(libc::SYS_exit, FIRST_CODE) };
        Err("the first thread lives".into())
    })
}

/// The state of the first thread.
fn first_state() -> Option<char> {
    let text = fs::read_to_string("/proc/self/stat").ok()?;
    text.rsplit_once(") ")?.1.chars().next()
}

/// What shows of the first thread.
fn first() -> Result<Vec<String>, String> {
    let text = fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let wanted = ["Name:", "State:", "Uid:", "Gid:", "Groups:", "CapPrm:"];
    let lines = text.lines().filter(|line| wanted.iter().any(|word| line.starts_with(word)));
    // SAFETY: getpid has no preconditions.
    let path = format!("/proc/self/task/{}/stat", unsafe { libc::getpid() });
    let stat = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let code = stat.split_whitespace().last().unwrap_or_default();
    same("the status of the first thread", (FIRST_CODE << 8).to_string(), code.to_owned())?;
    Ok(lines.map(str::to_owned).collect())
}

/// What the process has, by this thread.
fn shared() -> Result<Vec<String>, String> {
    let tid = gettid();
    let read = |name: &str| {
        fs::read_to_string(format!("/proc/{tid}/{name}"))
            .map_err(|error| format!("{name}: {error}"))
    };
    let link = |name: &str| {
        fs::read_link(format!("/proc/{tid}/{name}"))
            .map(|to| to.display().to_string())
            .map_err(|error| format!("{name}: {error}"))
    };
    let mut interval: libc::itimerval = libc::itimerval {
        it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 },
        it_value: libc::timeval { tv_sec: 0, tv_usec: 0 },
    };
    sys!(getitimer(libc::ITIMER_REAL as _, &raw mut interval))?;
    ensure!(interval.it_value.tv_sec > 0, "the timer has stopped");
    let umask = read("status")?.lines().find(|line| line.starts_with("Umask")).map(str::to_owned);
    Ok(vec![
        read("limits")?,
        read("cmdline")?,
        read("oom_score_adj")?,
        umask.unwrap_or_default(),
        link("cwd")?,
        link("exe")?,
        interval.it_interval.tv_sec.to_string(),
        format!("{:?}", blocked()?),
    ])
}

extern "C" fn handle(_: i32) {}

/// Sets up what belongs to the process.
fn prepare() -> Verdict {
    sys!(prctl(libc::PR_SET_NAME, c"the first".as_ptr()))?;
    let limit = libc::rlimit { rlim_cur: 77, rlim_max: 99 };
    sys!(setrlimit(libc::RLIMIT_NOFILE, &raw const limit))?;
    // SAFETY: all zeros is a valid value; the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        sys!(sigaction(libc::SIGUSR2, &raw const action, ptr::null_mut()))?;
    }
    let seconds = |tv_sec| libc::timeval { tv_sec, tv_usec: 0 };
    let timer = libc::itimerval { it_interval: seconds(5000), it_value: seconds(90_000) };
    sys!(setitimer(libc::ITIMER_REAL as _, &raw const timer, ptr::null_mut()))?;
    // SAFETY: it takes a number.
    unsafe { libc::umask(0o123) };
    let root = CString::new("/").expect("no NUL");
    sys!(chdir(root.as_ptr()))?;
    block(bit(libc::SIGUSR1))
}

/// Everything of the process is there, and its first thread is still the ghost it was. A
/// child that waits for the death of the thread that made it does not take it for that.
fn exited_leader(checkpoint: &Checkpoint) -> Verdict {
    let child = leaderless(checkpoint, prepare, |child| {
        let (private, shared_memory) = (Area::private(300)?, Area::shared(5)?);
        private.fill(1);
        shared_memory.fill(2);
        let mut ends = [0; 2];
        sys!(pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK))?;
        sys!(write(ends[1], b"queued".as_ptr().cast(), 6))?;
        // SAFETY: getpid has no preconditions.
        let pid = unsafe { libc::getpid() };
        sys!(kill(pid, libc::SIGUSR1))?;
        let second = child.thread(|thread| {
            sys!(prctl(libc::PR_SET_NAME, c"the third".as_ptr()))?;
            let tid = gettid();
            thread.wait();
            same("thread id", tid, gettid())
        })?;
        let below = child.fork(|below| {
            sys!(prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM))?;
            // SAFETY: getppid has no preconditions.
            let parent = || unsafe { libc::getppid() };
            let before = parent();
            below.wait();
            let mut signal = 0;
            sys!(prctl(libc::PR_GET_PDEATHSIG, &raw mut signal))?;
            same("parent-death signal", libc::SIGTERM, signal)?;
            same("parent", before, parent())
        })?;
        let before = (first()?, shared()?, gettid());
        child.wait();
        same("state of the first thread", Some('Z'), first_state())?;
        same("first thread, process, thread", before, (first()?, shared()?, gettid()))?;
        private.verify("private memory", 1)?;
        shared_memory.verify("shared memory", 2)?;
        let mut bytes = [0_u8; 16];
        same("bytes in a pipe", 6, sys!(read(ends[0], bytes.as_mut_ptr().cast(), bytes.len()))?)?;
        same("bytes", b"queued".as_slice(), &bytes[..6])?;
        let (set, none) = (bit(libc::SIGUSR1), libc::timespec { tv_sec: 0, tv_nsec: 0 });
        let call = libc::SYS_rt_sigtimedwait;
        let taken = sys!(syscall(call, &raw const set, 0, &raw const none, 8))?;
        same("pending signal", i64::from(libc::SIGUSR1), taken)?;
        // Signals to the process find a thread that lives.
        sys!(kill(pid, libc::SIGUSR2))?;
        second.join()?;
        below.join()?;
        sys!(mmap(ptr::null_mut(), 4096, libc::PROT_READ, 0x22, -1, 0)).map(drop)
    })?;
    checkpoint.wait();
    child.join()
}

/// It leads a session, and its last thread ends like the first, by itself.
fn exited_leader_of_a_session(checkpoint: &Checkpoint) -> Verdict {
    let lead = || sys!(setsid()).map(drop);
    let child = leaderless(checkpoint, lead, |child| {
        let member = child.fork(|member| {
            // SAFETY: both have no preconditions.
            let place = || unsafe { [libc::getppid(), libc::getpgrp(), libc::getsid(0)] };
            let before = place();
            member.wait();
            same("parent, group, session", before, place())
        })?;
        child.wait();
        same("state of the first thread", Some('Z'), first_state())?;
        member.join()?;
        // SAFETY: nothing of this process needs to be unwound.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
        Err("the last thread lives".into())
    })?;
    checkpoint.wait();
    child.join()
}
