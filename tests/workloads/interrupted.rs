//! Calls that block while the tree is stopped and goes on: which of them notice.
//!
//! The list is also in src/docs/limits.md: change both.

use std::{io::Error, ptr, sync::mpsc};

use crate::{
    Row,
    blocked::enter,
    kit::{Checkpoint, Thread, Verdict, same, write_all},
    sockets::{listening, pair},
    threads::{bit, block},
};

pub const ROWS: &[Row] = &[("interrupted", interrupted)];

/// What a call came back with: a count, or an error's number.
type Outcome = Result<i64, i32>;

/// A call in a thread of its own.
struct Call {
    name: &'static str,
    thread: Thread,
    outcome: mpsc::Receiver<Outcome>,
    expected: Outcome,
}

/// The calls of a state, and what lets those go on that were not interrupted.
struct Calls<'a> {
    checkpoint: &'a Checkpoint,
    blocked: Vec<Call>,
}

impl Calls<'_> {
    /// Makes a call with six arguments, in which it blocks.
    fn block(
        &mut self,
        name: &'static str,
        expected: Outcome,
        number: i64,
        arguments: [i64; 6],
    ) -> Verdict {
        let (sender, outcome) = mpsc::channel();
        let (thread, _) = enter(self.checkpoint, number, move || {
            let [a, b, c, d, e, f] = arguments;
            // SAFETY: what the arguments point to is never freed.
            let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
            let error = Error::last_os_error().raw_os_error().unwrap_or(0);
            let outcome = if result < 0 { Err(error) } else { Ok(result) };
            sender.send(outcome).map_err(|error| error.to_string())
        })?;
        self.blocked.push(Call { name, thread, outcome, expected });
        Ok(())
    }
}

/// The address of something that is never freed.
fn lasting<T>(value: T) -> i64 {
    Box::leak(Box::new(value)) as *mut T as i64
}

/// A thousand seconds, as all timeouts here that end nothing.
fn long() -> i64 {
    lasting(libc::timespec { tv_sec: 1000, tv_nsec: 0 })
}

fn pipe() -> Result<[i32; 2], String> {
    let mut ends = [0; 2];
    sys!(pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC))?;
    Ok(ends)
}

/// An epoll that waits for a descriptor.
fn epoll_of(fd: i32) -> Result<i64, String> {
    let epoll = sys!(epoll_create1(libc::EPOLL_CLOEXEC))?;
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
    sys!(epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event))?;
    Ok(epoll.into())
}

fn set_timeout(fd: i32, option: i32) -> Verdict {
    let time = libc::timeval { tv_sec: 1000, tv_usec: 0 };
    let (value, len) = ((&raw const time).cast(), size_of_val(&time) as u32);
    sys!(setsockopt(fd, libc::SOL_SOCKET, option, value, len)).map(drop)
}

/// Takes one from a semaphore.
fn down() -> i64 {
    lasting(libc::sembuf { sem_num: 0, sem_op: -1, sem_flg: 0 })
}

/// Removes System V objects at the end.
struct Objects {
    semaphore: i32,
    queue: i32,
}

impl Drop for Objects {
    fn drop(&mut self) {
        let _ = sys!(semctl(self.semaphore, 0, libc::IPC_RMID));
        let _ = sys!(msgctl(self.queue, libc::IPC_RMID, ptr::null_mut()));
    }
}

fn interrupted(checkpoint: &Checkpoint) -> Verdict {
    const WAKE: &[u8] = b"woken";
    let wakes = WAKE.len() as i64;
    let buffer = lasting([0_u8; 64]);
    let event = lasting([0_u8; 64]);
    let signal = libc::SIGUSR1;
    block(bit(signal))?;
    let objects = Objects {
        semaphore: sys!(semget(libc::IPC_PRIVATE, 1, 0o600))?,
        queue: sys!(msgget(libc::IPC_PRIVATE, 0o600))?,
    };
    let (semaphore, queue) = (i64::from(objects.semaphore), i64::from(objects.queue));
    let mut calls = Calls { checkpoint, blocked: Vec::new() };

    // Those that go on as if nothing had happened.
    let [from, to] = pipe()?;
    calls.block("read", Ok(wakes), libc::SYS_read, [from.into(), buffer, 64, 0, 0, 0])?;
    let [own, other] = pair(libc::SOCK_STREAM)?;
    calls.block("recv", Ok(wakes), libc::SYS_recvfrom, [own.into(), buffer, 64, 0, 0, 0])?;
    let [ready, wake] = pipe()?;
    let polled = lasting(libc::pollfd { fd: ready, events: libc::POLLIN, revents: 0 });
    calls.block("poll", Ok(1), libc::SYS_poll, [polled, 1, -1, 0, 0, 0])?;
    let polled = lasting(libc::pollfd { fd: ready, events: libc::POLLIN, revents: 0 });
    calls.block("poll, timed", Ok(1), libc::SYS_poll, [polled, 1, 1_000_000, 0, 0, 0])?;
    let epoll = epoll_of(ready)?;
    calls.block("epoll_wait", Ok(1), libc::SYS_epoll_wait, [epoll, event, 1, -1, 0, 0])?;
    let mask = lasting(bit(signal) | bit(libc::SIGUSR2));
    let waits = [epoll, event, 1, -1, mask, 8];
    calls.block("epoll_pwait", Ok(1), libc::SYS_epoll_pwait, waits)?;
    calls.block("semop", Ok(0), libc::SYS_semop, [semaphore, down(), 1, 0, 0, 0])?;
    let waits = [semaphore, down(), 1, 0, 0, 0];
    calls.block("semtimedop, untimed", Ok(0), libc::SYS_semtimedop, waits)?;
    calls.block("msgrcv", Ok(1), libc::SYS_msgrcv, [queue, buffer, 1, 0, 0, 0])?;
    let waits = [lasting(bit(signal)), 0, 0, 8, 0, 0];
    calls.block("sigwaitinfo", Ok(signal.into()), libc::SYS_rt_sigtimedwait, waits)?;

    // Those with a timeout that the kernel does not keep: they say so.
    let silent = pair(libc::SOCK_STREAM)?[0];
    let epoll = epoll_of(silent)?;
    let stopped = Err(libc::EINTR);
    let waits = [epoll, event, 1, 1_000_000, 0, 0];
    calls.block("epoll_wait, timed", stopped, libc::SYS_epoll_wait, waits)?;
    let waits = [semaphore, down(), 1, long(), 0, 0];
    calls.block("semtimedop", stopped, libc::SYS_semtimedop, waits)?;
    let waits = [lasting(bit(libc::SIGUSR2)), 0, long(), 8, 0, 0];
    calls.block("sigtimedwait", stopped, libc::SYS_rt_sigtimedwait, waits)?;
    set_timeout(silent, libc::SO_RCVTIMEO)?;
    let waits = [silent.into(), buffer, 64, 0, 0, 0];
    calls.block("recv, SO_RCVTIMEO", stopped, libc::SYS_recvfrom, waits)?;
    let name = crate::sockets::abstract_name(&format!("rcriu-int-{}", std::process::id()));
    let server = listening(&name, libc::SOCK_STREAM)?;
    set_timeout(server, libc::SO_RCVTIMEO)?;
    let waits = [server.into(), 0, 0, 0, 0, 0];
    calls.block("accept, SO_RCVTIMEO", stopped, libc::SYS_accept4, waits)?;

    let [_kept, full] = pair(libc::SOCK_STREAM)?;
    set_timeout(full, libc::SO_SNDTIMEO)?;
    while sys!(send(full, [7_u8; 1024].as_ptr().cast(), 1024, libc::MSG_DONTWAIT)).is_ok() {}
    let sends = [full.into(), lasting([7_u8; 1024]), 1024, 0, 0, 0];
    calls.block("send, SO_SNDTIMEO", stopped, libc::SYS_sendto, sends)?;

    // Those that have done a part.
    let [_kept, full] = pipe()?;
    let size = i64::from(sys!(fcntl(full, libc::F_GETPIPE_SZ))?);
    let whole = lasting([7_u8; 1 << 20]);
    let writes = [full.into(), whole, 1 << 20, 0, 0, 0];
    calls.block("write", Ok(size), libc::SYS_write, writes)?;
    let [part, sender] = pair(libc::SOCK_STREAM)?;
    write_all(sender, WAKE)?;
    let waits = [part.into(), buffer, 64, libc::MSG_WAITALL.into(), 0, 0];
    calls.block("recv, MSG_WAITALL", Ok(wakes), libc::SYS_recvfrom, waits)?;

    checkpoint.wait();
    write_all(to, WAKE)?;
    write_all(other, WAKE)?;
    write_all(wake, WAKE)?;
    let up = libc::sembuf { sem_num: 0, sem_op: 2, sem_flg: 0 };
    sys!(semop(objects.semaphore, (&raw const up).cast_mut(), 1))?;
    let message: [i64; 2] = [1, 0];
    sys!(msgsnd(objects.queue, message.as_ptr().cast(), 1, 0))?;
    // SAFETY: getpid has no preconditions.
    sys!(kill(libc::getpid(), signal))?;
    for Call { name, thread, outcome, expected } in calls.blocked {
        let patience = std::time::Duration::from_secs(10) * crate::kit::slowness();
        let outcome = outcome.recv_timeout(patience).map_err(|_| format!("{name} goes on"))?;
        same(name, expected, outcome)?;
        thread.join()?;
    }
    Ok(())
}
