//! Whether a stopped tree is one that can be dumped: what is told from outside, before
//! anything in it is changed.

use std::{cmp::Ordering, collections::BTreeSet, os::fd::OwnedFd};

use nix::errno::Errno;

use super::{DumpError, Goal, Result};
use crate::{
    causes::tell,
    image::tree::{Arena, ArenaIds, Arenas, Births, Kin},
    inject::{Task, Tracee},
    proc,
    res::{
        attribute::lost::Own,
        ns::{self, FOR_CHILDREN, KINDS},
    },
    step::StepError,
    sys::{
        process::{self, Shared},
        ptrace::{self, Rare},
    },
    units::{HostPid, PidMap},
};

/// What the user says of the tree's relations to processes outside of it.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    shell_job: bool,
}

impl Options {
    /// `shell_job`: its session and process group may be those of processes outside the tree
    /// (`--shell-job`).
    pub fn new(shell_job: bool) -> Self {
        Self { shell_job }
    }
}

/// The number that images give to what this program has.
const NUMBER_OF_OWN: u32 = 1;

/// The pid of the first process of a pid namespace.
const FIRST_PID: i32 = 1;

/// Checks that what is to become of the tree can be done to the first process of a pid
/// namespace: the kernel keeps signals from it that come from inside.
fn check_first(tasks: &[Task], goal: Goal) -> Result<()> {
    match tasks.iter().find(|task| task.pid.0 == FIRST_PID) {
        Some(first) if !goal.runs_on() => Err(DumpError::Unsupported {
            pid: first.pid,
            what:
                "is the first one of this pid namespace, which no process inside can kill or stop"
                    .to_owned(),
            help: "dump it with --leave-running, and end it from outside",
        }),
        _ => Ok(()),
    }
}

/// Checks that a tree is one that can be dumped, and returns the numbers that its images
/// have for what its processes may have in common.
///
/// # Errors
/// [`DumpError::Unsupported`] for the first thing that is not.
pub(super) fn tree(
    tasks: &[Task],
    pids: &PidMap,
    goal: Goal,
    options: Options,
) -> Result<Vec<ArenaIds>> {
    let own = HostPid(nix::unistd::getpid().as_raw());
    let own: Vec<_> = all_namespaces().map(|kind| proc::namespace(own, kind.file).ok()).collect();
    let first = tasks.iter().find(|task| !task.is_zombie()).map(Task::witness);
    let members: BTreeSet<HostPid> = tasks.iter().map(|task| task.pid).collect();
    check_first(tasks, goal)?;
    for task in tasks.iter().filter(|task| !task.is_zombie()) {
        // Before anything is taken for not shared because that cannot be told.
        compare(task.witness(), task.witness(), Shared::Memory)?;
        if task.is_leaderless() && !goal.is_pre_dump() {
            open_process(task)?;
        }
        check_namespaces(task, &own)?;
        first.map_or(Ok(()), |first| check_common_namespaces(task, first))?;
        check_sharing(task)?;
        for thread in &task.threads {
            check_thread(task.pid, thread)?;
        }
    }
    warn_of_losses(tasks, &members);
    for task in tasks {
        let stat = proc::stat(task.pid)?;
        // The leader of a session or group may have ended, but then nobody outside
        // may be in it.
        for (kind, leader) in [("session", stat.session), ("process group", stat.pgrp)] {
            let outside = !members.contains(&leader) && process::exists(leader);
            // The kernel shows what is outside of this pid namespace as 0.
            if leader.0 == 0 && !options.shell_job {
                return Err(DumpError::Unsupported {
                    pid: task.pid,
                    what: format!("is in a {kind} whose leader is outside of this pid namespace"),
                    help: "start the tree by setsid(1), dump it from where its leader is seen, or \
                           use --shell-job",
                });
            }
            if outside && !options.shell_job {
                return Err(DumpError::Unsupported {
                    pid: task.pid,
                    what: format!("is in the {kind} of process {leader}, which is not in the tree"),
                    help: "dump that process, start the tree by setsid(1), or use --shell-job",
                });
            }
        }
    }
    let ids = arenas(tasks)?;
    check_births(tasks, pids, &ids)?;
    Ok(ids)
}

/// Numbers what the processes of a tree may have in common, from 2 on: 1 is what this program
/// has. Those that have ended have nothing.
fn arenas(tasks: &[Task]) -> Result<Vec<ArenaIds>> {
    let mut next = NUMBER_OF_OWN;
    // Who has each first, in the order of the kernel.
    let mut known: [Vec<(HostPid, u32)>; 4] = Default::default();
    let mut found = Vec::with_capacity(tasks.len());
    for task in tasks {
        let mut ids = ArenaIds::default();
        if task.is_zombie() {
            found.push(ids);
            continue;
        }
        next += 1;
        let witness = task.witness();
        for (arena, known) in Arena::ALL.into_iter().zip(&mut known) {
            let kind = match arena {
                Arena::Memory => Shared::Memory,
                Arena::Files => Shared::Files,
                Arena::Fs => Shared::Fs,
                Arena::Handlers => Shared::Handlers,
            };
            let mut untold = None;
            let place = known.binary_search_by(|(other, _)| {
                compare(*other, witness, kind).unwrap_or_else(|error| {
                    untold = Some(error);
                    Ordering::Less
                })
            });
            if let Some(error) = untold {
                return Err(error);
            }
            let id = match place {
                Ok(place) => known[place].1,
                Err(place) => {
                    known.insert(place, (witness, next));
                    next
                }
            };
            ids.set(arena, id);
        }
        found.push(ids);
    }
    Ok(found)
}

/// Checks that a restore can make the processes so that they share what they do.
fn check_births(tasks: &[Task], pids: &PidMap, ids: &[ArenaIds]) -> Result<()> {
    if !Arenas::new(ids.to_vec()).any_shared() {
        return Ok(());
    }
    let position = |pid| tasks.iter().position(|task| task.pid == pid);
    let mut kin = Vec::with_capacity(tasks.len());
    for (task, ids) in tasks.iter().zip(ids) {
        kin.push(Kin {
            pid: pids.ns(task.pid),
            parent: if kin.is_empty() { None } else { position(task.parent) },
            session: pids.ns(proc::stat(task.pid)?.session),
            ids: *ids,
        });
    }
    Births::plan(&kin, true, false).map(drop).map_err(|(pid, problem)| DumpError::Unsupported {
        pid: pids.host(pid),
        what: format!("could not be restored: {problem}"),
        help: "dump the tree when one of them has ended",
    })
}

/// Says what is seen here and will be lost.
fn warn_of_losses(tasks: &[Task], pids: &BTreeSet<HostPid>) {
    let own = Own::read();
    let in_tree = |pid: HostPid| pids.contains(&pid);
    for task in tasks.iter().filter(|task| !task.is_zombie()) {
        let tids: Vec<_> = task.threads.iter().map(|thread| thread.tid).collect();
        for what in own.look(task.witness(), &tids, &in_tree) {
            tell(log::Level::Warn, &format!("process {} {what}", task.pid));
        }
    }
}

fn all_namespaces() -> impl Iterator<Item = &'static ns::Kind> {
    KINDS.iter().chain(&FOR_CHILDREN)
}

/// Checks that a process lives in the namespaces of this program, but for those that a
/// tree can have for itself.
fn check_namespaces(task: &Task, own: &[Option<u64>]) -> Result<()> {
    let mut what = Vec::new();
    let mut flags = Vec::new();
    for (kind, ours) in all_namespaces().zip(own).filter(|(kind, _)| !kind.is_dumped()) {
        let ns::Kind { file, name, flag, .. } = kind;
        // Kernels without a kind of namespace have nothing to differ in.
        if let (Ok(theirs), Some(ours)) = (proc::namespace(task.witness(), file), ours)
            && theirs != *ours
            && !flags.contains(flag)
        {
            what.push(format!("{name} ({file}:[{theirs}])"));
            flags.push(*flag);
        }
    }
    if what.is_empty() {
        return Ok(());
    }
    Err(DumpError::Namespaces { pid: task.pid, what: what.join(" and "), flags: flags.join(" ") })
}

/// Checks that a process lives in the same namespaces as the first of its tree, where the
/// tree can have one for itself.
fn check_common_namespaces(task: &Task, first: HostPid) -> Result<()> {
    for kind in KINDS.iter().filter(|kind| kind.is_dumped()) {
        let pair = [first, task.witness()].map(|pid| proc::namespace(pid, kind.file).ok());
        if let [Some(wanted), Some(found)] = pair
            && wanted != found
        {
            let (file, name) = (kind.file, kind.name);
            return Err(DumpError::Unsupported {
                pid: task.pid,
                what: format!("has {name} ({file}:[{found}]) that is not that of process {first}"),
                help: "a tree can have only one; dump the part of it that is in there",
            });
        }
    }
    Ok(())
}

/// Checks that the threads of a process have in common what those of a restored one have.
fn check_sharing(task: &Task) -> Result<()> {
    let pid = task.pid;
    let first = task.witness();
    let threads = task.threads.iter().map(|thread| thread.tid).skip(1);
    let namespaces: Vec<_> = all_namespaces()
        .map(|kind| (kind, proc::thread_namespace(pid, first, kind.file).ok()))
        .collect();
    for tid in threads {
        for (what, kind) in [
            ("a descriptor table (CLONE_FILES)", Shared::Files),
            ("a root, working directory and umask (CLONE_FS)", Shared::Fs),
            ("a list of semaphore operations to be undone (CLONE_SYSVSEM)", Shared::Undo),
        ] {
            if compare(first, tid, kind)? != Ordering::Equal {
                return Err(own_of_thread(pid, tid, what));
            }
        }
        for (kind, of_first) in &namespaces {
            if of_first.is_some() && proc::thread_namespace(pid, tid, kind.file).ok() != *of_first {
                return Err(own_of_thread(pid, tid, kind.name));
            }
        }
    }
    Ok(())
}

/// Compares what two processes or threads have. What could not be told would be taken for
/// something else, and the tree restored without what it shares.
fn compare(a: HostPid, b: HostPid, kind: Shared) -> Result<Ordering> {
    process::kcmp(a, b, kind).map_err(|source| DumpError::Compare { pid: a, source })
}

fn own_of_thread(pid: HostPid, tid: HostPid, what: &str) -> DumpError {
    DumpError::Unsupported {
        pid,
        what: format!("has a thread, {tid}, with {what} of its own (unshare(2), setns(2))"),
        help: "restored threads share theirs; dump it when that thread has ended",
    }
}

/// Checks that a thread has nothing that no restored one has.
fn check_thread(pid: HostPid, thread: &Tracee) -> Result<()> {
    let tid = thread.tid;
    let refused = |what: &str, help| DumpError::Unsupported {
        pid,
        what: format!("has {what} in thread {tid}"),
        help,
    };
    let status = proc::thread_status(pid, tid)?;
    if status.seccomp != 0 {
        return Err(refused("a seccomp filter", "seccomp is not dumped yet"));
    }
    if status.shadow_stack {
        return Err(refused(
            "a shadow stack",
            "start it without (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)",
        ));
    }
    if ptrace::syscall_dispatch(tid).is_ok_and(|dispatch| dispatch.mode != 0) {
        return Err(refused(
            "its system calls caught (PR_SET_SYSCALL_USER_DISPATCH)",
            "it could not work for this program; dump it when that is switched off",
        ));
    }
    for (what, which) in [
        ("ports of the machine (ioperm(2))", Rare::Ports),
        ("thread-local storage for 32-bit code (set_thread_area(2))", Rare::LocalStorage),
    ] {
        if ptrace::has_rare(tid, which) == Ok(true) {
            return Err(refused(what, "such threads are not dumped"));
        }
    }
    Ok(())
}

/// Returns a descriptor of a process, by which its descriptors are duplicated.
///
/// # Errors
/// [`DumpError::Unsupported`] where the kernel has none for a process whose first thread has
/// exited; [`StepError::Process`].
pub(super) fn open_process(task: &Task) -> Result<OwnedFd> {
    let opened = if task.is_leaderless() {
        process::pidfd_open_thread(task.witness())
    } else {
        process::pidfd_open(task.pid)
    };
    opened.map_err(|source| match source {
        Errno::EINVAL => DumpError::Unsupported {
            pid: task.pid,
            what:
                "has threads that live, but the first of them has exited (pthread_exit(3) in main)"
                    .to_owned(),
            help: "it takes Linux 6.9 or newer to see what these have open; let main wait for them",
        },
        source => StepError::Process { pid: task.pid, step: "open", source }.into(),
    })
}
