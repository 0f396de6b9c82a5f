//! Descriptors of processes and threads.

use std::{mem, os::fd::RawFd, ptr};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, gettid, lacks, same},
};

pub const ROWS: &[Row] = &[
    ("pidfds", pidfds),
    ("pidfds_of_the_dead", pidfds_of_the_dead),
    ("pidfds_of_threads", pidfds_of_threads),
    ("pidfds_watched", pidfds_watched),
    ("pidfd_of_another_tree", pidfd_of_another_tree),
];

/// `PIDFD_THREAD` (`linux/pidfd.h`).
const THREAD: i32 = libc::O_EXCL;

fn open(pid: i32, flags: i32) -> Result<RawFd, String> {
    sys!(syscall(libc::SYS_pidfd_open, pid, flags)).map(|fd| fd as RawFd)
}

/// What `fdinfo` says of the process.
fn pid_of(fd: RawFd) -> Result<String, String> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}"));
    let text = text.map_err(|error| error.to_string())?;
    let lines = text.lines().filter(|line| line.starts_with("Pid:") || line.starts_with("NSpid:"));
    Ok(lines.collect::<Vec<_>>().join(" "))
}

fn inode(fd: RawFd) -> Result<u64, String> {
    // SAFETY: all zeros is a valid value.
    let mut stat: libc::stat = unsafe { mem::zeroed() };
    sys!(fstat(fd, &raw mut stat))?;
    Ok(stat.st_ino)
}

/// Whether the process has ended.
fn is_readable(fd: RawFd) -> Result<bool, String> {
    let mut asked = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    sys!(poll(&raw mut asked, 1, 0)).map(|count| count > 0)
}

fn flags(fd: RawFd) -> Result<(i32, i32), String> {
    Ok((sys!(fcntl(fd, libc::F_GETFL))?, sys!(fcntl(fd, libc::F_GETFD))?))
}

type Seen = (String, bool, (i32, i32));

fn look(fd: RawFd) -> Result<Seen, String> {
    Ok((pid_of(fd)?, is_readable(fd)?, flags(fd)?))
}

fn send(fd: RawFd, signal: i32) -> Result<i64, String> {
    sys!(syscall(libc::SYS_pidfd_send_signal, fd, signal, ptr::null::<u8>(), 0))
}

/// Waits for the child of a pidfd, and returns how it has ended.
fn wait(fd: RawFd) -> Result<(i32, i32), String> {
    // SAFETY: all zeros is a valid value.
    let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
    sys!(waitid(libc::P_PIDFD, fd as u32, &raw mut info, libc::WEXITED))?;
    // SAFETY: it is the information of a child.
    Ok((info.si_code, unsafe { info.si_status() }))
}

/// Of itself, of children, of its parent, of a zombie.
fn pidfds(checkpoint: &Checkpoint) -> Verdict {
    let own = sys!(getpid())?;
    let child = checkpoint.fork(|child| {
        let parent = open(sys!(getppid())?, 0)?;
        let before = look(parent)?;
        child.wait();
        same("pidfd of the parent", before, look(parent)?)?;
        child.wait_mark("looked")
    })?;
    let zombie = sys!(fork())?;
    if zombie == 0 {
        // SAFETY: nothing of this process needs to be unwound.
        unsafe { libc::_exit(7) };
    }
    let fds =
        [open(own, 0)?, open(child.pid, libc::O_NONBLOCK)?, open(child.pid, 0)?, open(zombie, 0)?];
    sys!(fcntl(fds[2], libc::F_SETFD, 0))?;
    crate::kit::wait_until("the zombie", || is_readable(fds[3]) == Ok(true))?;
    let before = fds.iter().map(|fd| look(*fd)).collect::<Result<Vec<_>, _>>()?;
    let one_inode = inode(fds[1])? == inode(fds[2])?;
    checkpoint.wait();
    let after = fds.iter().map(|fd| look(*fd)).collect::<Result<Vec<_>, _>>()?;
    same("pidfds", before, after)?;
    same("inodes that are the same", one_inode, inode(fds[1])? == inode(fds[2])?)?;
    send(fds[0], 0)?;
    send(fds[1], 0)?;
    checkpoint.mark("looked");
    same("the end of the zombie", (libc::CLD_EXITED, 7), wait(fds[3])?)?;
    child.join()?;
    same("the end of the child", true, is_readable(fds[2])?)
}

/// How a process has ended, which is known after it was reaped since Linux 6.15.
fn end_of_reaped(fd: RawFd) -> Option<i32> {
    #[repr(C)]
    struct Info {
        mask: u64,
        cgroup: u64,
        numbers: [u32; 11],
        exit_code: i32,
    }
    const EXIT: u64 = 1 << 3;
    const GET_INFO: u64 = 3 << 30 | (size_of::<Info>() as u64) << 16 | 0xff << 8 | 11;
    let mut info = Info { mask: EXIT, cgroup: 0, numbers: [0; 11], exit_code: 0 };
    let asked = sys!(ioctl(fd, GET_INFO, &raw mut info));
    (asked.is_ok() && info.mask & EXIT != 0).then_some(info.exit_code)
}

/// Of processes that were reaped: two of one process, and others.
fn pidfds_of_the_dead(checkpoint: &Checkpoint) -> Verdict {
    let ended = |code: i32, signal: i32| -> Result<[RawFd; 2], String> {
        let pid = sys!(fork())?;
        if pid == 0 {
            // SAFETY: nothing of this process needs to be unwound.
            unsafe {
                if signal != 0 {
                    libc::kill(libc::getpid(), signal);
                }
                libc::_exit(code)
            };
        }
        let fds = [open(pid, 0)?, open(pid, libc::O_NONBLOCK)?];
        wait(fds[0])?;
        Ok(fds)
    };
    let all = [ended(3, 0)?, ended(0, libc::SIGKILL)?, ended(0, libc::SIGUSR1)?].concat();
    let pidfs = inode(all[0])? != inode(all[2])?;
    let look_at_all = || -> Result<Vec<(Seen, Option<i32>)>, String> {
        all.iter().map(|fd| Ok((look(*fd)?, end_of_reaped(*fd)))).collect()
    };
    let before = look_at_all()?;
    checkpoint.wait();
    same("pidfds", before, look_at_all()?)?;
    same("one inode for a process", inode(all[0])?, inode(all[1])?)?;
    same("an inode for each process", pidfs, inode(all[0])? != inode(all[2])?)?;
    same("a signal to it", true, send(all[0], 0).is_err_and(|error| error.contains("No such")))
}

/// Of the first thread, and of another one, which ends.
fn pidfds_of_threads(checkpoint: &Checkpoint) -> Verdict {
    let own = gettid();
    let Ok(first) = open(own, THREAD) else { return lacks("PIDFD_THREAD (Linux 6.9)") };
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = checkpoint.thread(move |thread| {
        sender.send(gettid()).map_err(|error| error.to_string())?;
        thread.wait();
        Ok(())
    })?;
    let other = open(receiver.recv().map_err(|error| error.to_string())?, THREAD)?;
    let before = (look(first)?, look(other)?);
    checkpoint.wait();
    // The thread is free to end by now.
    let after = (look(first)?, pid_of(other)?, flags(other)?);
    same("pidfd of the first thread", before.0, after.0)?;
    ensure!(after.1 == before.1.0 || after.1.contains("-1"), "it is of {}", after.1);
    same("flags", before.1.2, after.2)?;
    thread.join()?;
    crate::kit::wait_until("the end of the thread", || is_readable(other) == Ok(true))
}

/// An epoll waits for the end of a child.
fn pidfds_watched(checkpoint: &Checkpoint) -> Verdict {
    let child = checkpoint.fork(|child| {
        child.wait();
        Ok(())
    })?;
    let fd = open(child.pid, 0)?;
    let epoll = sys!(epoll_create1(0))?;
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 4711 };
    sys!(epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event))?;
    checkpoint.wait();
    child.join()?;
    let mut found = libc::epoll_event { events: 0, u64: 0 };
    same("events", 1, sys!(epoll_wait(epoll, &raw mut found, 1, 10_000))?)?;
    let (events, data) = (found.events, found.u64);
    same("the event", (libc::EPOLLIN as u32, 4711), (events & libc::EPOLLIN as u32, data))
}

/// Refused: the restored process would have no such process.
fn pidfd_of_another_tree(checkpoint: &Checkpoint) -> Verdict {
    open(1, 0)?;
    checkpoint.wait();
    Ok(())
}
