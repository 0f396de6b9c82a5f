//! Pid namespaces below that of a tree.

use std::{fs, io::Read, os::fd::AsRawFd, path::Path, ptr};

use crate::{
    Row,
    kit::{Checkpoint, Child, Verdict, same, wait_until},
    mounts, users,
};

pub const ROWS: &[Row] = &[
    ("pid_namespaces", pid_namespaces),
    ("pid_namespaces_of_users", of_users),
    ("pid_namespace_members", members),
    ("pid_namespace_mounts", proc_mounts),
    ("pid_namespace_entered", entered),
];

/// The lines of `status` with the numbers of the calling thread, its group and its session in all
/// namespaces, and the same numbers as it sees them itself.
fn numbers() -> Result<(Vec<String>, [i32; 5]), String> {
    let text = fs::read_to_string("/proc/thread-self/status").map_err(|error| error.to_string())?;
    let names = ["NStgid:", "NSpid:", "NSpgid:", "NSsid:"];
    let lines = text.lines().filter(|line| names.iter().any(|name| line.starts_with(name)));
    let own = [
        sys!(getpid())?,
        sys!(getppid())?,
        sys!(getpgrp())?,
        sys!(getsid(0))?,
        crate::kit::gettid(),
    ];
    Ok((lines.map(str::to_owned).collect(), own))
}

/// Waits for the checkpoint, and compares the numbers before and after.
fn keep_numbers(checkpoint: &Checkpoint) -> Verdict {
    let before = numbers()?;
    checkpoint.wait();
    same("numbers", before, numbers()?)
}

/// The namespace that the children of this process will be in.
fn for_children() -> Option<u64> {
    let inode = |file: &str| {
        let stat = fs::metadata(format!("/proc/self/ns/{file}")).ok();
        stat.map(|stat| std::os::unix::fs::MetadataExt::ino(&stat))
    };
    inode("pid_for_children").filter(|found| Some(*found) != inode("pid"))
}

/// Forks the first process of a new namespace.
fn begin(
    checkpoint: &Checkpoint,
    body: impl FnOnce(&Checkpoint) -> Verdict,
) -> Result<Child, String> {
    sys!(unshare(libc::CLONE_NEWPID))?;
    let first = checkpoint.fork(|first| {
        same("the pid of the first process", 1, sys!(getpid())?)?;
        body(first)
    })?;
    ensure!(for_children().is_some(), "children do not get into the new namespace");
    Ok(first)
}

/// Forks a child that gets into the namespace of `first`, which is the first process there.
fn next(first: i32) -> Verdict {
    ensure!(for_children().is_some(), "children no longer get into the namespace below");
    let child = sys!(fork())?;
    if child == 0 {
        // SAFETY: the child only ends.
        unsafe { libc::_exit(i32::from(libc::getpid() == 1 || libc::getppid() != 0)) };
    }
    let mut status = 0;
    same("the child", child, sys!(waitpid(child, &raw mut status, 0))?)?;
    same("the place of the child", 0, status)?;
    same("a signal to the first process", 0, sys!(kill(first, 0))?)
}

/// Three namespaces, one in the other. Their creators still make their children inside.
fn pid_namespaces(checkpoint: &Checkpoint) -> Verdict {
    let outer = begin(checkpoint, |outer| {
        let middle = begin(outer, |middle| {
            let inner = begin(middle, |inner| {
                sys!(setsid())?;
                let last = inner.fork(keep_numbers)?;
                keep_numbers(inner)?;
                last.join()?;
                inner.wait_mark("inner")
            })?;
            keep_numbers(middle)?;
            next(inner.pid)?;
            middle.mark("inner");
            inner.join()?;
            middle.wait_mark("middle")
        })?;
        keep_numbers(outer)?;
        next(middle.pid)?;
        outer.mark("middle");
        middle.join()?;
        outer.wait_mark("outer")
    })?;
    // The parent of the root is not part of the state.
    let before = numbers()?.0;
    checkpoint.wait();
    same("numbers of the root", before, numbers()?.0)?;
    next(outer.pid)?;
    checkpoint.mark("outer");
    outer.join()
}

/// The same below a user namespace, whose processes may not choose their pids in that of the machine.
fn of_users(checkpoint: &Checkpoint) -> Verdict {
    users::open_up(checkpoint)?;
    users::enter(["0 100000 65536\n", "0 300000 65536\n"], None)?;
    sys!(setgroups(0, ptr::null()))?;
    sys!(setresgid(0, 0, 0))?;
    sys!(setresuid(0, 0, 0))?;
    sys!(prctl(libc::PR_SET_DUMPABLE, 1))?;
    pid_namespaces(checkpoint)
}

/// Leaves an orphan to the first process of the namespace, which reaps it later.
fn orphan(first: &Checkpoint) -> Result<i32, String> {
    let orphan = first.fork(|parent| {
        let child = parent.fork(|child| {
            child.announce();
            wait_until("the new parent", || {
                // SAFETY: getppid has no preconditions.
                unsafe { libc::getppid() == 1 }
            })?;
            let before = numbers()?;
            child.mark("orphan");
            child.wait_go();
            same("numbers of the orphan", before, numbers()?)
        })?;
        // The parent ends at once, and its number stays free.
        parent.mark(&format!("orphan.{}", child.pid));
        parent.announce();
        Ok(())
    })?;
    orphan.join()?;
    first.wait_mark("orphan")?;
    let mut child = 0;
    wait_until("the child", || {
        child = (2..20).find(|pid| first.path(&format!("orphan.{pid}")).exists()).unwrap_or(0);
        child != 0
    })?;
    Ok(child)
}

/// What may be in a namespace: threads, sessions, groups, a dead process, an orphan that the first process
/// has adopted, and numbers that the kernel keeps for a process.
fn members(checkpoint: &Checkpoint) -> Verdict {
    // A group that has no number in the namespace of one of its processes.
    let creator = checkpoint.fork(|creator| {
        sys!(setpgid(0, 0))?;
        members_of_group(creator)
    })?;
    checkpoint.wait();
    creator.join()
}

fn members_of_group(checkpoint: &Checkpoint) -> Verdict {
    let first = begin(checkpoint, |first| {
        let orphan = orphan(first)?;
        let leader = first.fork(|leader| {
            sys!(setsid())?;
            let member = leader.fork(|member| {
                sys!(setpgid(0, 0))?;
                keep_numbers(member)
            })?;
            let thread = leader.thread(keep_numbers)?;
            keep_numbers(leader)?;
            thread.join()?;
            member.join()
        })?;
        let dead = sys!(fork())?;
        if dead == 0 {
            // SAFETY: the child only ends.
            unsafe { libc::_exit(7) };
        }
        let stopped = first.fork(|stopped| {
            stopped.announce();
            sys!(raise(libc::SIGSTOP))?;
            Ok(())
        })?;
        let mut status = 0;
        let flags = libc::WUNTRACED;
        same("the stop", stopped.pid, sys!(waitpid(stopped.pid, &raw mut status, flags))?)?;
        // A timer for this thread, and a descriptor with the leader as its owner.
        // SAFETY: all zeros is a value of it.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        (event.sigev_notify, event.sigev_signo) = (libc::SIGEV_THREAD_ID, libc::SIGUSR1);
        event.sigev_notify_thread_id = crate::kit::gettid();
        let mut timer = 0_i32;
        let clock = libc::CLOCK_MONOTONIC;
        sys!(syscall(libc::SYS_timer_create, clock, &raw const event, &raw mut timer))?;
        let mut ends = [0; 2];
        sys!(socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr()))?;
        sys!(fcntl(ends[0], libc::F_SETOWN, leader.pid))?;
        // A signal that this process has sent to itself.
        let mut set = 0_u64;
        for signal in [libc::SIGUSR1, libc::SIGUSR2] {
            set |= 1 << (signal - 1);
        }
        let now = [0_i64; 2];
        let none = ptr::null_mut::<u64>();
        sys!(syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const set, none, 8))?;
        sys!(kill(1, libc::SIGUSR2))?;
        keep_numbers(first)?;
        same("the owner", leader.pid, sys!(fcntl(ends[0], libc::F_GETOWN))?)?;
        // SAFETY: all zeros is a value of it.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let take = libc::SYS_rt_sigtimedwait;
        let signal = sys!(syscall(take, &raw const set, &raw mut info, &raw const now, 8))?;
        // SAFETY: `kill` has filled this part.
        let sender = unsafe { info.si_pid() };
        same("signal and sender", (i64::from(libc::SIGUSR2), 1), (signal, sender))?;
        let soon = [0_i64, 0, 0, 1_000_000];
        sys!(syscall(libc::SYS_timer_settime, timer, 0, &raw const soon, 0))?;
        let long = [60_i64, 0];
        let signal = sys!(syscall(take, &raw const set, 0, &raw const long, 8))?;
        same("the timer", i64::from(libc::SIGUSR1), signal)?;
        same("the dead", dead, sys!(waitpid(dead, &raw mut status, 0))?)?;
        same("its status", 7, libc::WEXITSTATUS(status))?;
        sys!(kill(stopped.pid, libc::SIGCONT))?;
        stopped.join()?;
        leader.join()?;
        same("the orphan", orphan, sys!(waitpid(orphan, &raw mut status, 0))?)?;
        same("its status", 0, status)
    })?;
    keep_numbers(checkpoint)?;
    first.join()
}

/// What `/proc` shows: the own number, all processes, the names of those, and the mounts.
fn shown() -> Result<(String, Vec<String>, Vec<String>), String> {
    let text = |error: std::io::Error| error.to_string();
    let own = fs::read_link("/proc/self").map_err(text)?.display().to_string();
    let entries = fs::read_dir("/proc").map_err(text)?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut pids: Vec<String> = names.filter(|name| name.parse::<u32>().is_ok()).collect();
    pids.sort();
    let status =
        |pid: &String| fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let lines = |text: String| {
        let names = ["Pid:", "PPid:", "NSpid:"];
        let lines = text.lines().filter(|line| names.iter().any(|name| line.starts_with(name)));
        lines.collect::<Vec<_>>().join(" ")
    };
    let processes = pids.iter().map(|pid| lines(status(pid))).collect();
    Ok((own, processes, mounts::table()?))
}

/// Namespaces that have a mount namespace and a `/proc` each, three deep: the inner ones also have the mounts
/// of the outer ones, hidden by their own.
fn proc_mounts(checkpoint: &Checkpoint) -> Verdict {
    fn nest(checkpoint: &Checkpoint, depth: u32) -> Verdict {
        let name = format!("depth.{depth}");
        let child = begin(checkpoint, |first| {
            mounts::enter()?;
            let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
            mounts::mount("proc", Path::new("/proc"), "proc", flags, "")?;
            let status = fs::File::open("/proc/1/status").map_err(|error| error.to_string());
            let mut status = status?;
            if depth == 2 {
                // As container managers protect the kernel.
                let sys = Path::new("/proc/sys");
                mounts::mount("/proc/sys", sys, "", libc::MS_BIND, "")?;
                let flags = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY;
                mounts::mount("none", sys, "", flags, "")?;
                mounts::mount("/dev/null", Path::new("/proc/timer_list"), "", libc::MS_BIND, "")?;
            }
            if depth < 3 {
                nest(first, depth + 1)?;
            } else {
                let before = shown()?;
                let member = first.fork(|member| {
                    let before = shown()?.0;
                    member.wait();
                    same("the own number", before, shown()?.0)?;
                    member.wait_mark("seen")
                })?;
                let before = (before.0, shown()?.1, before.2);
                first.wait();
                same("what /proc shows", before, shown()?)?;
                for depth in 1..=3 {
                    first.wait_mark(&format!("seen.{depth}"))?;
                }
                first.mark("seen");
                member.join()?;
            }
            let mut text = String::new();
            status.read_to_string(&mut text).map_err(|error| error.to_string())?;
            ensure!(text.contains("\nNSpid:\t1\n"), "another process in the open file: {text}");
            first.wait_mark(&format!("depth.{depth}"))
        })?;
        let before = shown()?;
        checkpoint.wait();
        // The root sees the machine, which changes meanwhile.
        if depth > 1 {
            same("what /proc shows", before, shown()?)?;
        }
        checkpoint.mark(&format!("seen.{depth}"));
        checkpoint.wait_mark("seen")?;
        checkpoint.mark(&name);
        child.join()
    }
    nest(checkpoint, 1)
}

/// Refused: a process that has come into the namespace from outside.
fn entered(checkpoint: &Checkpoint) -> Verdict {
    let first = checkpoint.path("first");
    let creator = checkpoint.fork(|creator| {
        let child = begin(creator, |child| {
            child.wait();
            // Its end would end all processes of the namespace.
            child.wait_mark("left")
        })?;
        crate::publish(&first, &child.pid.to_string());
        creator.wait();
        child.join()
    })?;
    let pid = fs::read_to_string(&first).map_err(|error| error.to_string())?;
    let space = fs::File::open(format!("/proc/{pid}/ns/pid")).map_err(|error| error.to_string())?;
    sys!(setns(space.as_raw_fd(), libc::CLONE_NEWPID))?;
    let stranger = checkpoint.fork(|stranger| {
        stranger.wait();
        Ok(())
    })?;
    checkpoint.wait();
    stranger.join()?;
    checkpoint.mark("left");
    creator.join()
}
