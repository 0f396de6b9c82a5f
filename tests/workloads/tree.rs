//! The tree of processes, and what is dead or stopped in it.

use std::fs;

use crate::{
    Row,
    kit::{Area, Checkpoint, Child, Verdict, nap, same, wait_until},
};

pub const ROWS: &[Row] = &[
    ("tree", tree),
    ("sessions", sessions),
    ("dead_session_leader", dead_session_leader),
    ("dead_group_leader", dead_group_leader),
    ("zombies", zombies),
    ("orphaned_zombies", orphaned_zombies),
    ("zombies_of_a_session", zombies_of_a_session),
    ("zombies_of_the_heedless", zombies_of_the_heedless),
    ("zombie_of_a_gone_group", zombie_of_a_gone_group),
    ("stopped_child", stopped_child),
    ("stops_told_and_untold", stops_told_and_untold),
    ("stopped_root", stopped_root),
    ("stopped_twice", stopped_twice),
    ("subreaper", subreaper),
    ("parent_death_signal", parent_death_signal),
    ("chain_of_forks", chain_of_forks),
    ("two_hundred", two_hundred),
];

/// Pid, parent, group and session.
fn place() -> [i32; 4] {
    // SAFETY: these have no preconditions.
    unsafe { [libc::getpid(), libc::getppid(), libc::getpgrp(), libc::getsid(0)] }
}

fn keep_place(checkpoint: &Checkpoint) -> Verdict {
    let before = place();
    checkpoint.wait();
    same("pid, parent, group, session", before, place())
}

/// Waits for the checkpoint in the root, whose parent is not part of the state.
fn keep_root(checkpoint: &Checkpoint) -> Verdict {
    let [pid, _, group, session] = place();
    checkpoint.wait();
    let [now, _, now_group, now_session] = place();
    same("pid, group, session", [pid, group, session], [now, now_group, now_session])
}

fn tree(checkpoint: &Checkpoint) -> Verdict {
    let mut children = Vec::new();
    for _ in 0..3 {
        children.push(checkpoint.fork(|child| {
            let below = child.fork(|grandchild| {
                let thread = grandchild.thread(|thread| {
                    let before = place();
                    thread.wait();
                    same("place of a thread", before, place())
                })?;
                keep_place(grandchild)?;
                thread.join()
            })?;
            keep_place(child)?;
            below.join()
        })?);
    }
    keep_root(checkpoint)?;
    children.into_iter().try_for_each(Child::join)
}

fn sessions(checkpoint: &Checkpoint) -> Verdict {
    let leader = checkpoint.fork(|child| {
        sys!(setsid())?;
        let member = child.fork(keep_place)?;
        let group = child.fork(|grandchild| {
            sys!(setpgid(0, 0))?;
            let in_group = grandchild.fork(keep_place)?;
            keep_place(grandchild)?;
            in_group.join()
        })?;
        let inner = child.fork(|grandchild| {
            sys!(setsid())?;
            keep_place(grandchild)
        })?;
        keep_place(child)?;
        member.join()?;
        group.join()?;
        inner.join()
    })?;
    let group = checkpoint.fork(|child| {
        sys!(setpgid(0, 0))?;
        keep_place(child)
    })?;
    let joined = checkpoint.fork(|child| {
        sys!(setpgid(0, group.pid))?;
        keep_place(child)
    })?;
    keep_root(checkpoint)?;
    leader.join()?;
    group.join()?;
    joined.join()
}

fn dead_session_leader(checkpoint: &Checkpoint) -> Verdict {
    sys!(prctl(libc::PR_SET_CHILD_SUBREAPER, 1))?;
    let leader = checkpoint.fork(|child| {
        sys!(setsid())?;
        child.announce();
        child.fork(orphan).map(drop)
    })?;
    leader.join()?;
    checkpoint.wait_mark("orphan")?;
    keep_root(checkpoint)?;
    reap_orphan()
}

/// Waits for the death of the parent, and keeps the place it gets by that.
fn orphan(checkpoint: &Checkpoint) -> Verdict {
    let parent = place()[1];
    checkpoint.announce();
    wait_until("the new parent", || place()[1] != parent)?;
    let before = place();
    checkpoint.mark("orphan");
    checkpoint.wait_go();
    same("place of the orphan", before, place())
}

/// Waits for a child that came to this process by its parent's death.
fn reap_orphan() -> Verdict {
    let mut status = 0;
    sys!(wait4(-1, &raw mut status, 0, std::ptr::null_mut()))?;
    same("status of the orphan", 0, status)
}

fn dead_group_leader(checkpoint: &Checkpoint) -> Verdict {
    let leader = checkpoint.fork(|child| {
        sys!(setpgid(0, 0))?;
        child.announce();
        child.wait_mark("member")
    })?;
    let member = checkpoint.fork(|child| {
        sys!(setpgid(0, leader.pid))?;
        keep_place(child)
    })?;
    checkpoint.mark("member");
    leader.join()?;
    keep_root(checkpoint)?;
    member.join()
}

fn zombies(checkpoint: &Checkpoint) -> Verdict {
    let mut dead = Vec::new();
    for number in 0..5 {
        let pid = sys!(fork())?;
        if pid == 0 {
            let signal = [0, 0, libc::SIGKILL, libc::SIGTERM, libc::SIGUSR2][number];
            // SAFETY: the child only ends.
            unsafe {
                if signal == 0 {
                    libc::_exit([0, 7][number]);
                }
                libc::kill(libc::getpid(), signal);
                libc::_exit(99);
            }
        }
        dead.push(pid);
    }
    // Neither the leader of a group nor of a session need be alive.
    let pid = sys!(fork())?;
    if pid == 0 {
        // SAFETY: the child only ends.
        unsafe {
            libc::setsid();
            libc::_exit(5);
        }
    }
    dead.push(pid);
    for pid in &dead {
        // SAFETY: the structure is written before it is read.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        sys!(waitid(libc::P_PID, *pid as u32, &raw mut info, libc::WEXITED | libc::WNOWAIT))?;
    }
    checkpoint.wait();
    let expected = [0, 7 << 8, libc::SIGKILL, libc::SIGTERM, libc::SIGUSR2, 5 << 8];
    for (pid, expected) in dead.into_iter().zip(expected) {
        let mut status = 0;
        same("pid", pid, sys!(waitpid(pid, &raw mut status, libc::WNOHANG))?)?;
        same("status of a zombie", expected, status & 0xff7f)?;
    }
    Ok(())
}

/// Waits until a process has ended, without waiting for it.
fn await_zombie(pid: i32) -> Verdict {
    wait_until("the end of a process", || {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
    })
}

/// Zombies whose parent has died before they were waited for, of a depth; all come to
/// this process.
fn orphan_zombies(depth: u32, leads: bool) -> Verdict {
    sys!(prctl(libc::PR_SET_CHILD_SUBREAPER, 1))?;
    let pid = sys!(fork())?;
    if pid == 0 {
        // SAFETY: the child only makes others and ends.
        unsafe {
            if leads {
                libc::setsid();
            }
            let mut left = depth;
            while left > 0 && libc::fork() == 0 {
                left -= 1;
            }
            // The child of this one ends first.
            let mut info: libc::siginfo_t = std::mem::zeroed();
            libc::waitid(libc::P_ALL, 0, &raw mut info, libc::WEXITED | libc::WNOWAIT);
            libc::_exit(left as i32 + 1);
        }
    }
    await_zombie(pid)
}

fn own_children() -> Result<Vec<i32>, String> {
    let text = fs::read_to_string(format!("/proc/self/task/{}/children", place()[0]));
    let text = text.map_err(|error| error.to_string())?;
    let mut pids: Vec<i32> = text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
    pids.sort_unstable();
    Ok(pids)
}

/// Keeps zombies as they are, and waits for them.
fn keep_zombies(checkpoint: &Checkpoint) -> Verdict {
    let before = own_children()?;
    checkpoint.wait();
    same("dead children", &before, &own_children()?)?;
    for pid in before {
        let mut status = 0;
        same("pid", pid, sys!(waitpid(pid, &raw mut status, libc::WNOHANG))?)?;
        ensure!(libc::WIFEXITED(status), "status of {pid}: {status:#x}");
    }
    Ok(())
}

fn orphaned_zombies(checkpoint: &Checkpoint) -> Verdict {
    orphan_zombies(3, false)?;
    keep_zombies(checkpoint)
}

fn zombies_of_a_session(checkpoint: &Checkpoint) -> Verdict {
    orphan_zombies(2, true)?;
    keep_zombies(checkpoint)
}

/// A process that ignores SIGCHLD gets no new zombies, but keeps the old ones.
fn zombies_of_the_heedless(checkpoint: &Checkpoint) -> Verdict {
    orphan_zombies(1, false)?;
    // SAFETY: nothing runs in a handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    keep_zombies(checkpoint)
}

/// A zombie in a group whose leader was waited for.
fn zombie_of_a_gone_group(checkpoint: &Checkpoint) -> Verdict {
    let leader = checkpoint.fork(|child| {
        sys!(setpgid(0, 0))?;
        child.announce();
        child.wait_mark("member")
    })?;
    let member = sys!(fork())?;
    if member == 0 {
        // SAFETY: the child only ends.
        unsafe { libc::_exit(i32::from(libc::setpgid(0, leader.pid) != 0)) };
    }
    await_zombie(member)?;
    checkpoint.mark("member");
    let group = leader.pid;
    leader.join()?;
    let place = || {
        let stat = fs::read_to_string(format!("/proc/{member}/stat")).unwrap_or_default();
        stat.split(' ').nth(4).unwrap_or_default().to_owned()
    };
    same("group of the zombie", group.to_string(), place())?;
    checkpoint.wait();
    same("group of the zombie", group.to_string(), place())?;
    let mut status = 0;
    same("zombie", member, sys!(waitpid(-group, &raw mut status, libc::WNOHANG))?)?;
    same("status of the zombie", 0, status)
}

/// The state of a process as the kernel shows it.
fn state_of(pid: i32) -> Option<char> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    status.rsplit(") ").next()?.chars().next()
}

/// The first process is stopped while its child works.
fn stopped_root(checkpoint: &Checkpoint) -> Verdict {
    // SAFETY: getpid has no preconditions.
    let root = unsafe { libc::getpid() };
    let child = checkpoint.fork(|child| {
        child.announce();
        super::kit::wait_until("the stop of the root", || state_of(root) == Some('T'))?;
        checkpoint.wait();
        let state = state_of(root);
        sys!(kill(root, libc::SIGCONT))?;
        super::kit::same("the state of the root", Some('T'), state)
    })?;
    sys!(raise(libc::SIGSTOP))?;
    checkpoint.wait_go();
    child.join()
}

/// A child was stopped, and stopped again: the second SIGSTOP waits.
fn stopped_twice(checkpoint: &Checkpoint) -> Verdict {
    let child = checkpoint.fork(|child| {
        child.announce();
        child.wait_go();
        Ok(())
    })?;
    for _ in 0..2 {
        sys!(kill(child.pid, libc::SIGSTOP))?;
        super::kit::wait_until("the stop of the child", || state_of(child.pid) == Some('T'))?;
    }
    checkpoint.wait();
    super::kit::same("the state of the child", Some('T'), state_of(child.pid))?;
    sys!(kill(child.pid, libc::SIGCONT))?;
    child.join()
}

fn stopped_child(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::private(4)?;
    area.fill(1);
    let word = Area::shared(1)?;
    let pid = sys!(fork())?;
    if pid == 0 {
        word.set(0, 1);
        sys!(raise(libc::SIGSTOP))?;
        let verdict = area.verify("memory of the stopped child", 1);
        // SAFETY: nothing needs to be unwound.
        unsafe { libc::_exit(if verdict.is_ok() { 5 } else { 6 }) };
    }
    let mut status = 0;
    sys!(waitpid(pid, &raw mut status, libc::WUNTRACED))?;
    ensure!(libc::WIFSTOPPED(status), "the child has not stopped: {status:#x}");
    checkpoint.wait();
    nap(20);
    let text = fs::read_to_string(format!("/proc/{pid}/status")).map_err(|e| e.to_string())?;
    let state = text.lines().find(|line| line.starts_with("State:")).unwrap_or("none");
    ensure!(state.contains("T (stopped)"), "the child is not stopped: {state}");
    sys!(kill(pid, libc::SIGCONT))?;
    sys!(waitpid(pid, &raw mut status, 0))?;
    same("status of the child that went on", 5 << 8, status)
}

/// Stopped children, of which one was waited for, and the signal that tells of it.
fn stops_told_and_untold(checkpoint: &Checkpoint) -> Verdict {
    use crate::threads::{bit, block};
    block(bit(libc::SIGCHLD))?;
    let stopped = || -> Result<i32, String> {
        let pid = sys!(fork())?;
        if pid == 0 {
            // SAFETY: the child only stops and ends.
            unsafe {
                libc::raise(libc::SIGSTOP);
                libc::_exit(0);
            }
        }
        wait_until("a child that has stopped", || {
            fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") T "))
        })?;
        Ok(pid)
    };
    let look = |pid: i32, flags: i32| -> Result<i32, String> {
        // SAFETY: all zeros is a valid value.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let all = libc::WSTOPPED | libc::WNOHANG | flags;
        sys!(waitid(libc::P_PID, pid as u32, &raw mut info, all))?;
        // SAFETY: it is that of SIGCHLD, or zeros.
        Ok(unsafe { info.si_pid() })
    };
    let pending = || -> Result<u64, String> {
        let mut set = 0_u64;
        sys!(syscall(libc::SYS_rt_sigpending, &raw mut set, 8))?;
        Ok(set)
    };
    let (told, untold) = (stopped()?, stopped()?);
    same("the one that is waited for", told, look(told, 0)?)?;
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let set = bit(libc::SIGCHLD);
    sys!(syscall(libc::SYS_rt_sigtimedwait, &raw const set, 0, &raw const now, 8))?;
    let read =
        || Ok::<_, String>((look(told, libc::WNOWAIT)?, look(untold, libc::WNOWAIT)?, pending()?));
    let before = read()?;
    same("what is not told yet", (0, untold, 0), before)?;
    checkpoint.wait();
    same("what is not told yet, and pending", before, read()?)?;
    for pid in [told, untold] {
        sys!(kill(pid, libc::SIGCONT))?;
        let mut status = 0;
        sys!(waitpid(pid, &raw mut status, 0))?;
        same("status", 0, status)?;
    }
    Ok(())
}

fn subreaper(checkpoint: &Checkpoint) -> Verdict {
    let reaper = checkpoint.fork(|child| {
        sys!(prctl(libc::PR_SET_CHILD_SUBREAPER, 1))?;
        let middle = child.fork(|middle| {
            middle.announce();
            middle.fork(orphan).map(drop)
        })?;
        middle.join()?;
        child.wait_mark("orphan")?;
        // One that becomes an orphan only afterwards.
        let late = child.fork(|late| {
            drop(late.fork(|below| {
                let parent = place()[1];
                below.wait();
                wait_until("the new parent", || place()[1] != parent)
            })?);
            late.wait();
            Ok(())
        })?;
        child.wait();
        let mut is = 0;
        sys!(prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut is))?;
        same("subreaper", 1, is)?;
        late.join()?;
        reap_orphan()?;
        reap_orphan()
    })?;
    let mut is = 0;
    checkpoint.wait();
    sys!(prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut is))?;
    same("subreaper, in its parent", 0, is)?;
    reaper.join()
}

fn parent_death_signal(checkpoint: &Checkpoint) -> Verdict {
    let child = checkpoint.fork(|child| {
        let victim = child.fork(|victim| {
            sys!(prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM))?;
            victim.wait();
            let mut signal = 0;
            sys!(prctl(libc::PR_GET_PDEATHSIG, &raw mut signal))?;
            same("parent-death signal", libc::SIGTERM, signal)?;
            victim.mark("seen");
            loop {
                nap(1000);
            }
        })?;
        child.wait();
        child.wait_mark("seen")?;
        fs::write(child.path("victim"), victim.pid.to_string()).map_err(|error| error.to_string())
    })?;
    // The victim comes here once its parent has gone.
    sys!(prctl(libc::PR_SET_CHILD_SUBREAPER, 1))?;
    checkpoint.wait();
    child.join()?;
    let text = fs::read_to_string(checkpoint.path("victim")).map_err(|error| error.to_string())?;
    let pid: i32 = text.parse().map_err(|_| format!("no pid: {text}"))?;
    let mut status = 0;
    same("victim", pid, sys!(waitpid(pid, &raw mut status, 0))?)?;
    same("what ended the victim", libc::SIGTERM, status)
}

/// A chain of forty generations.
fn chain_of_forks(checkpoint: &Checkpoint) -> Verdict {
    fn below(checkpoint: &Checkpoint, generations: u32) -> Verdict {
        if generations == 0 {
            return keep_place(checkpoint);
        }
        let child = checkpoint.fork(|child| below(child, generations - 1))?;
        let before = place();
        checkpoint.wait();
        same("pid, group, session", &before[2..], &place()[2..])?;
        same("pid", before[0], place()[0])?;
        child.join()
    }
    below(checkpoint, 40)
}

/// Two hundred processes with memory of their own and some that all share.
fn two_hundred(checkpoint: &Checkpoint) -> Verdict {
    let shared = Area::shared(1)?;
    let own = Area::private(4)?;
    let leaf = |child: &Checkpoint, number: u64| {
        own.page(1).fill(number);
        child.wait();
        own.page(1).verify("memory of a leaf", number)?;
        shared.set(number as usize, number + 1);
        Ok(())
    };
    own.page(0).fill(1000);
    let mut branches = Vec::new();
    for branch in 0..10 {
        branches.push(checkpoint.fork(|child| {
            let mut leaves = Vec::new();
            for number in 0..19 {
                leaves.push(child.fork(|child| leaf(child, branch * 20 + number))?);
            }
            leaf(child, branch * 20 + 19)?;
            leaves.into_iter().try_for_each(Child::join)
        })?);
    }
    keep_root(checkpoint)?;
    own.page(0).verify("memory of the root", 1000)?;
    branches.into_iter().try_for_each(Child::join)?;
    for number in 0..200 {
        same("word of a leaf", number as u64 + 1, shared.get(number))?;
    }
    Ok(())
}
