//! File locks, as their holders and others see them.

use std::{fs, io::Error};

use crate::{
    Row,
    blocked::enter,
    kit::{Checkpoint, Verdict, nap, open, read_some, same, write_all},
    sockets::{receive_descriptors, send_descriptors},
    threads::{bit, block},
};

pub const ROWS: &[Row] = &[
    ("locks_posix", locks_posix),
    ("locks_flock", locks_flock),
    ("locks_ofd", locks_ofd),
    ("locks_shared_table", locks_shared_table),
    ("locks_many", locks_many),
    ("locks_queued", locks_queued),
    ("leases", leases),
    ("lease_breaking", lease_breaking),
    ("blocked_locks", blocked_locks),
];

/// `F_SETSIG`, `F_SETLEASE` and `F_GETLEASE` (`linux/fcntl.h`).
const F_SETSIG: i32 = 10;
const F_SETLEASE: i32 = 1024;
const F_GETLEASE: i32 = 1025;

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    let short = |number: i32| number as libc::c_short;
    libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

fn set(fd: i32, command: i32, kind: i32, start: i64, len: i64) -> Verdict {
    let lock = range(kind, start, len);
    sys!(fcntl(fd, command, &raw const lock)).map(drop)
}

/// Whether another holder keeps this lock from being taken.
fn is_denied(fd: i32, command: i32, kind: i32, start: i64, len: i64) -> Result<bool, String> {
    match set(fd, command, kind, start, len) {
        Ok(()) => Ok(false),
        Err(_) if matches!(errno(), libc::EAGAIN | libc::EACCES) => Ok(true),
        Err(error) => Err(error),
    }
}

fn errno() -> i32 {
    Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Returns the first conflicting lock: mode, start, length, pid of its holder.
fn holder(fd: i32, command: i32, start: i64, len: i64) -> Result<(i32, i64, i64, i32), String> {
    let mut found = range(libc::F_WRLCK, start, len);
    sys!(fcntl(fd, command, &raw mut found))?;
    Ok((found.l_type.into(), found.l_start, found.l_len, found.l_pid))
}

/// The locks that the kernel shows of a descriptor, without the file, in order.
fn shown(fd: i32) -> Result<Vec<String>, String> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).map_err(|e| e.to_string())?;
    let locks = text.lines().filter_map(|line| line.strip_prefix("lock:\t"));
    let mut found: Vec<String> = locks
        .map(|lock| {
            let words = lock.split_whitespace().skip(1).enumerate();
            words.filter(|(at, _)| *at != 4).map(|(_, word)| word).collect::<Vec<_>>().join(" ")
        })
        .collect();
    found.sort();
    Ok(found)
}

fn file(checkpoint: &Checkpoint, name: &str, flags: i32) -> Result<i32, String> {
    fs::write(checkpoint.path(name), [b'x'; 1000]).map_err(|error| error.to_string())?;
    open(&checkpoint.c_path(name), flags)
}

fn locks_posix(checkpoint: &Checkpoint) -> Verdict {
    let fd = file(checkpoint, "file", libc::O_RDWR | libc::O_CLOEXEC)?;
    let copy = sys!(dup(fd))?;
    let command = libc::F_SETLK;
    set(fd, command, libc::F_WRLCK, 0, 100)?;
    set(copy, command, libc::F_RDLCK, 200, 100)?;
    set(fd, command, libc::F_WRLCK, 500, 0)?;
    let me = std::process::id() as i32;
    let child = checkpoint.fork(|child| {
        set(fd, command, libc::F_RDLCK, 250, 100)?;
        let look = || -> Result<_, String> {
            let of_parent = [0, 220, 600].map(|at| holder(fd, libc::F_GETLK, at, 1));
            Ok((of_parent, holder(fd, libc::F_GETLK, 120, 10), shown(fd)?))
        };
        let before = look()?;
        same("who holds it", Ok((libc::F_WRLCK, 0, 100, me)), before.0[0].clone())?;
        same("who holds the rest", Ok((libc::F_WRLCK, 500, 0, me)), before.0[2].clone())?;
        child.wait();
        same("what the child sees", before, look()?)?;
        ensure!(is_denied(fd, command, libc::F_RDLCK, 50, 1)?, "the parent's lock is lost");
        ensure!(is_denied(fd, command, libc::F_WRLCK, 220, 1)?, "the read lock is lost");
        child.mark("looked");
        child.wait_mark("unlocked")?;
        ensure!(!is_denied(fd, command, libc::F_WRLCK, 0, 100)?, "the lock was not released");
        ensure!(is_denied(fd, command, libc::F_WRLCK, 999, 1)?, "the other lock was released");
        Ok(())
    })?;
    let before = (shown(fd)?, shown(copy)?);
    same("locks", 3, before.0.len())?;
    checkpoint.wait();
    same("what the kernel shows", before, (shown(fd)?, shown(copy)?))?;
    same("the child's", (libc::F_RDLCK, 250, 100, child.pid), holder(fd, libc::F_GETLK, 320, 1)?)?;
    checkpoint.wait_mark("looked")?;
    set(fd, command, libc::F_UNLCK, 0, 100)?;
    checkpoint.mark("unlocked");
    child.join()
}

fn locks_flock(checkpoint: &Checkpoint) -> Verdict {
    let dir = checkpoint.path("locked");
    fs::create_dir(&dir).map_err(|error| error.to_string())?;
    let path = checkpoint.c_path("locked");
    let exclusive = open(&path, libc::O_RDONLY | libc::O_DIRECTORY)?;
    sys!(flock(exclusive, libc::LOCK_EX))?;
    let shared = file(checkpoint, "file", libc::O_RDONLY)?;
    let other = open(&checkpoint.c_path("file"), libc::O_WRONLY)?;
    let deleted = file(checkpoint, "deleted", libc::O_RDWR)?;
    let deleted_too = open(&checkpoint.c_path("deleted"), libc::O_RDWR)?;
    fs::remove_file(checkpoint.path("deleted")).map_err(|error| error.to_string())?;
    sys!(flock(shared, libc::LOCK_SH))?;
    sys!(flock(other, libc::LOCK_SH))?;
    sys!(flock(deleted, libc::LOCK_EX))?;
    let is_denied = |fd, operation| -> Result<bool, String> {
        match sys!(flock(fd, operation | libc::LOCK_NB)) {
            Ok(_) => Ok(false),
            Err(_) if errno() == libc::EWOULDBLOCK => Ok(true),
            Err(error) => Err(error),
        }
    };
    // The child has the descriptions, and so the locks.
    let child = checkpoint.fork(|child| {
        child.wait();
        child.wait_mark("closed")?;
        let apart = open(&path, libc::O_RDONLY)?;
        ensure!(is_denied(apart, libc::LOCK_SH)?, "the lock that the child inherited is lost");
        sys!(flock(exclusive, libc::LOCK_UN))?;
        ensure!(!is_denied(apart, libc::LOCK_EX)?, "the child could not release the lock");
        Ok(())
    })?;
    let all = [exclusive, shared, other, deleted, deleted_too];
    let state = || all.map(shown);
    let before = state();
    checkpoint.wait();
    same("what the kernel shows", before, state())?;
    ensure!(is_denied(deleted_too, libc::LOCK_SH)?, "the lock on the deleted file is lost");
    let new = open(&checkpoint.c_path("file"), libc::O_RDONLY)?;
    ensure!(is_denied(new, libc::LOCK_EX)?, "the shared locks are lost");
    ensure!(!is_denied(new, libc::LOCK_SH)?, "the shared locks are exclusive");
    sys!(close(exclusive))?;
    let apart = open(&path, libc::O_RDONLY)?;
    ensure!(is_denied(apart, libc::LOCK_SH)?, "the child does not hold the lock");
    sys!(close(apart))?;
    checkpoint.mark("closed");
    child.join()
}

fn locks_ofd(checkpoint: &Checkpoint) -> Verdict {
    let (get, set_to) = (libc::F_OFD_GETLK, libc::F_OFD_SETLK);
    let first = file(checkpoint, "file", libc::O_RDWR)?;
    let second = open(&checkpoint.c_path("file"), libc::O_RDWR)?;
    set(first, set_to, libc::F_WRLCK, 10, 10)?;
    set(first, set_to, libc::F_RDLCK, 30, 10)?;
    set(second, set_to, libc::F_RDLCK, 35, 10)?;
    set(second, set_to, libc::F_WRLCK, 1 << 40, 0)?;
    let state = || -> Result<_, String> {
        let seen = (holder(second, get, 0, 20)?, holder(first, get, 36, 1)?);
        Ok((seen, holder(first, get, 1 << 41, 1)?, shown(first)?, shown(second)?))
    };
    let before = state()?;
    same("the first lock", (libc::F_WRLCK, 10, 10, -1), before.0.0)?;
    let child = checkpoint.fork(|child| {
        child.wait();
        child.wait_mark("looked")?;
        // The description's lock is this process's as well.
        ensure!(!is_denied(first, set_to, libc::F_WRLCK, 15, 2)?, "its own lock is in the way");
        set(first, set_to, libc::F_UNLCK, 0, 0)?;
        child.mark("unlocked");
        Ok(())
    })?;
    checkpoint.wait();
    same("what the kernel shows", before, state()?)?;
    ensure!(is_denied(second, set_to, libc::F_WRLCK, 15, 1)?, "the lock is lost");
    checkpoint.mark("looked");
    checkpoint.wait_mark("unlocked")?;
    ensure!(!is_denied(second, set_to, libc::F_WRLCK, 0, 40)?, "the child did not release it");
    child.join()
}

/// A process that shares the descriptor table of its parent has taken a POSIX lock.
fn locks_shared_table(checkpoint: &Checkpoint) -> Verdict {
    let fd = file(checkpoint, "file", libc::O_RDWR)?;
    let flags = libc::CLONE_FILES | libc::SIGCHLD;
    let child = sys!(syscall(libc::SYS_clone, flags, 0, 0, 0, 0))? as i32;
    if child == 0 {
        let taken = set(fd, libc::F_SETLK, libc::F_WRLCK, 0, 10);
        let done = taken.and_then(|()| {
            checkpoint.wait_go();
            checkpoint.wait_mark("looked")
        });
        // SAFETY: nothing of this process needs to be unwound.
        unsafe { libc::_exit(i32::from(done.is_err())) };
    }
    crate::kit::wait_until("the lock", || shown(fd).is_ok_and(|locks| !locks.is_empty()))?;
    let apart = checkpoint.fork(|apart| {
        let denied = || is_denied(fd, libc::F_SETLK, libc::F_RDLCK, 0, 1);
        same("before", Ok(true), denied())?;
        apart.wait();
        same("after", Ok(true), denied())?;
        apart.mark("looked");
        apart.wait_mark("unlocked")?;
        same("when the other process has released it", Ok(false), denied())
    })?;
    let before = shown(fd)?;
    checkpoint.wait();
    same("what the kernel shows", before, shown(fd)?)?;
    checkpoint.wait_mark("looked")?;
    // The lock is also this process's, so it can release it.
    set(fd, libc::F_SETLK, libc::F_UNLCK, 0, 10)?;
    checkpoint.mark("unlocked");
    apart.join()?;
    let mut status = 0;
    sys!(waitpid(child, &raw mut status, 0))?;
    same("how the process that took the lock ended", 0, status)
}

/// Many ranges of one file.
fn locks_many(checkpoint: &Checkpoint) -> Verdict {
    let fd = file(checkpoint, "file", libc::O_RDWR)?;
    for at in 0..2000 {
        let kind = if at % 3 == 0 { libc::F_WRLCK } else { libc::F_RDLCK };
        set(fd, libc::F_SETLK, kind, at * 4, 2)?;
    }
    let before = shown(fd)?;
    checkpoint.wait();
    same("locks", before, shown(fd)?)
}

/// A locked file that only the queue of a socket has.
fn locks_queued(checkpoint: &Checkpoint) -> Verdict {
    let mut ends = [0; 2];
    sys!(socketpair(libc::AF_UNIX, libc::SOCK_DGRAM, 0, ends.as_mut_ptr()))?;
    let fd = file(checkpoint, "file", libc::O_RDWR)?;
    sys!(flock(fd, libc::LOCK_EX))?;
    set(fd, libc::F_OFD_SETLK, libc::F_WRLCK, 5, 5)?;
    send_descriptors(ends[0], b"here", &[fd])?;
    sys!(close(fd))?;
    let other = open(&checkpoint.c_path("file"), libc::O_RDWR)?;
    checkpoint.wait();
    let denied = sys!(flock(other, libc::LOCK_SH | libc::LOCK_NB)).is_err();
    ensure!(denied && errno() == libc::EWOULDBLOCK, "the lock is lost");
    ensure!(is_denied(other, libc::F_OFD_SETLK, libc::F_RDLCK, 5, 1)?, "the OFD lock is lost");
    let (_, got) = receive_descriptors(ends[1])?;
    sys!(close(got[0]))?;
    sys!(flock(other, libc::LOCK_EX | libc::LOCK_NB)).map(drop)
}

/// A real-time signal, which carries the descriptor.
fn signal() -> i32 {
    libc::SIGRTMIN() + 3
}

/// Takes the pending signal of a lease, and returns its descriptor.
fn taken_signal() -> Result<Option<i32>, String> {
    let set = bit(signal());
    let mut info = [0_i32; 32];
    let time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let call = libc::SYS_rt_sigtimedwait;
    match sys!(syscall(call, &raw const set, info.as_mut_ptr(), &raw const time, 8)) {
        // `si_fd` follows `si_band`, a long (`asm-generic/siginfo.h`).
        Ok(_) => Ok(Some(info[6])),
        Err(_) if errno() == libc::EAGAIN => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens a file without waiting for its lease to be broken; whether it could.
fn can_open(checkpoint: &Checkpoint, name: &str, flags: i32) -> Result<bool, String> {
    match open(&checkpoint.c_path(name), flags | libc::O_NONBLOCK) {
        Ok(fd) => sys!(close(fd)).map(|_| true),
        Err(_) if errno() == libc::EWOULDBLOCK => Ok(false),
        Err(error) => Err(error),
    }
}

fn leases(checkpoint: &Checkpoint) -> Verdict {
    block(bit(signal()))?;
    let read = file(checkpoint, "read", libc::O_RDONLY)?;
    let write = file(checkpoint, "write", libc::O_RDONLY)?;
    let deleted = file(checkpoint, "deleted", libc::O_RDONLY)?;
    sys!(lseek(deleted, 7, libc::SEEK_SET))?;
    fs::remove_file(checkpoint.path("deleted")).map_err(|error| error.to_string())?;
    for (fd, kind) in [(read, libc::F_RDLCK), (write, libc::F_WRLCK), (deleted, libc::F_RDLCK)] {
        sys!(fcntl(fd, F_SETSIG, signal()))?;
        sys!(fcntl(fd, F_SETLEASE, kind))?;
    }
    let all = [read, write, deleted];
    let state = || all.map(|fd| (sys!(fcntl(fd, F_GETLEASE)), shown(fd), crate::files::offset(fd)));
    let before = state();
    checkpoint.wait();
    same("leases", before, state())?;
    same("a signal", None, taken_signal()?)?;
    same("bytes", &b"xxx"[..], &read_some(deleted, 3)?[..])?;
    ensure!(can_open(checkpoint, "read", libc::O_RDONLY)?, "a reader breaks a read lease");
    ensure!(!can_open(checkpoint, "read", libc::O_WRONLY)?, "the read lease is lost");
    same("the descriptor in the signal", Some(read), taken_signal()?)?;
    ensure!(!can_open(checkpoint, "write", libc::O_RDONLY)?, "the write lease is lost");
    same("the descriptor in the other signal", Some(write), taken_signal()?)?;
    sys!(fcntl(write, F_SETLEASE, libc::F_RDLCK))?;
    ensure!(can_open(checkpoint, "write", libc::O_RDONLY)?, "the lease was not downgraded");
    sys!(fcntl(read, F_SETLEASE, libc::F_UNLCK))?;
    ensure!(can_open(checkpoint, "read", libc::O_WRONLY)?, "the lease was not released");
    Ok(())
}

/// Leases that others break; one signal was taken, the other is pending.
fn lease_breaking(checkpoint: &Checkpoint) -> Verdict {
    block(bit(signal()))?;
    let read = file(checkpoint, "read", libc::O_RDONLY)?;
    let write = file(checkpoint, "write", libc::O_RDWR)?;
    let down = file(checkpoint, "down", libc::O_RDWR)?;
    for (fd, kind) in [(read, libc::F_RDLCK), (write, libc::F_WRLCK), (down, libc::F_WRLCK)] {
        sys!(fcntl(fd, F_SETSIG, signal()))?;
        sys!(fcntl(fd, F_SETLEASE, kind))?;
    }
    let all = [read, write, down];
    ensure!(!can_open(checkpoint, "read", libc::O_WRONLY)?, "there is no read lease");
    same("the first signal", Some(read), taken_signal()?)?;
    ensure!(!can_open(checkpoint, "write", libc::O_WRONLY)?, "there is no write lease");
    same("the second signal", Some(write), taken_signal()?)?;
    // Readers wait as well.
    let reader = {
        let path = checkpoint.c_path("down");
        let number = libc::SYS_openat;
        let (thread, _) = enter(checkpoint, number, move || {
            let fd = open(&path, libc::O_RDONLY)?;
            same("bytes", &b"xx"[..], &read_some(fd, 2)?[..])
        })?;
        thread
    };
    let state = || all.map(|fd| (sys!(fcntl(fd, F_GETLEASE)), shown(fd)));
    let before = state();
    same("what the lease is to become", Ok(libc::F_RDLCK), before[2].0.clone())?;
    checkpoint.wait();
    nap(20);
    same("leases", before, state())?;
    same("the pending signal", Some(down), taken_signal()?)?;
    same("another signal", None, taken_signal()?)?;
    ensure!(!can_open(checkpoint, "read", libc::O_WRONLY)?, "the first lease is gone");
    for fd in all {
        sys!(fcntl(fd, F_SETLEASE, libc::F_UNLCK))?;
    }
    ensure!(can_open(checkpoint, "read", libc::O_WRONLY)?, "the first lease was not released");
    ensure!(can_open(checkpoint, "write", libc::O_WRONLY)?, "the second one was not released");
    reader.join()
}

/// Threads and a child that wait for locks.
fn blocked_locks(checkpoint: &Checkpoint) -> Verdict {
    let fd = file(checkpoint, "file", libc::O_RDWR)?;
    let whole = file(checkpoint, "whole", libc::O_RDWR)?;
    set(fd, libc::F_SETLK, libc::F_WRLCK, 0, 10)?;
    set(fd, libc::F_OFD_SETLK, libc::F_WRLCK, 20, 10)?;
    sys!(flock(whole, libc::LOCK_EX))?;
    let other = open(&checkpoint.c_path("file"), libc::O_RDWR)?;
    let other_whole = open(&checkpoint.c_path("whole"), libc::O_RDWR)?;
    let (ofd, _) = enter(checkpoint, libc::SYS_fcntl, move || {
        set(other, libc::F_OFD_SETLKW, libc::F_WRLCK, 25, 10)
    })?;
    let (flock, _) = enter(checkpoint, libc::SYS_flock, move || {
        sys!(flock(other_whole, libc::LOCK_SH)).map(drop)
    })?;
    let child = checkpoint.fork(|child| {
        child.announce();
        set(fd, libc::F_SETLKW, libc::F_RDLCK, 5, 10)?;
        child.wait_mark("unlocked")?;
        write_all(fd, b"the child's turn")
    })?;
    crate::kit::wait_blocked(child.pid, libc::SYS_fcntl)?;
    let state = || (shown(fd), shown(whole), shown(other), shown(other_whole));
    let before = state();
    checkpoint.wait();
    nap(20);
    same("locks", before, state())?;
    checkpoint.mark("unlocked");
    set(fd, libc::F_SETLK, libc::F_UNLCK, 0, 10)?;
    child.join()?;
    set(fd, libc::F_OFD_SETLK, libc::F_UNLCK, 0, 0)?;
    ofd.join()?;
    sys!(flock(whole, libc::LOCK_UN))?;
    flock.join()
}
