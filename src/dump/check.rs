//! Checks whether a stopped tree can be dumped: everything that is visible from outside,
//! before the dump changes anything in it.

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

/// Options about processes outside of the tree.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    shell_job: bool,
}

impl Options {
    /// With `shell_job`, the session and process group of the tree may belong to processes
    /// outside of it (`--shell-job`).
    pub fn new(shell_job: bool) -> Self {
        Self { shell_job }
    }
}

/// The number that images give to what belongs to this program.
const NUMBER_OF_OWN: u32 = 1;

/// The pid of the first process of a pid namespace.
const FIRST_PID: i32 = 1;

/// Checks that the dump can kill or stop the first process of this pid namespace, if it
/// must: the kernel blocks such signals from inside the namespace.
fn check_first(tasks: &[Task], goal: Goal) -> Result<()> {
    match tasks.iter().find(|task| task.pid.0 == FIRST_PID) {
        Some(first) if !goal.runs_on() => Err(DumpError::Unsupported {
            pid: first.pid,
            what:
                "is the first process of this pid namespace, which no process inside can kill or stop"
                    .to_owned(),
            help: "dump it with --leave-running, and kill it from outside",
        }),
        _ => Ok(()),
    }
}

/// Checks that a tree can be dumped, and returns the ids that the images give to what its
/// processes may share.
///
/// # Errors
/// [`DumpError::Unsupported`] for the first problem.
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
        // Fails early if the kernel cannot compare: otherwise shared state would look
        // separate.
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
        // The leader of a session or group may have ended, but must not be outside of the
        // tree.
        for (kind, leader) in [("session", stat.session), ("process group", stat.pgrp)] {
            let outside = !members.contains(&leader) && process::exists(leader);
            // The kernel reports leaders outside of this pid namespace as 0.
            if leader.0 == 0 && !options.shell_job {
                return Err(DumpError::Unsupported {
                    pid: task.pid,
                    what: format!("is in a {kind} whose leader is outside of this pid namespace"),
                    help: "start the tree with setsid(1), dump it from a namespace that sees the leader, \
                           or use --shell-job",
                });
            }
            if outside && !options.shell_job {
                return Err(DumpError::Unsupported {
                    pid: task.pid,
                    what: format!("is in the {kind} of process {leader}, which is not in the tree"),
                    help: "dump that process, start the tree with setsid(1), or use --shell-job",
                });
            }
        }
    }
    let ids = arenas(tasks)?;
    check_births(tasks, pids, &ids)?;
    Ok(ids)
}

/// Numbers what the processes of a tree may share, from 2 on: 1 stands for what belongs to
/// this program. Zombies have nothing.
fn arenas(tasks: &[Task]) -> Result<Vec<ArenaIds>> {
    let mut next = NUMBER_OF_OWN;
    // The first owner of each, in the order of kcmp(2).
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

/// Checks that a restore can make the processes with everything that they share.
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
        help: "dump the tree when one of these processes has ended",
    })
}

/// Warns about visible state that the images cannot hold.
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

/// Checks that a process is in the namespaces of this program, except for those kinds of
/// which a tree can have its own.
fn check_namespaces(task: &Task, own: &[Option<u64>]) -> Result<()> {
    let mut what = Vec::new();
    let mut flags = Vec::new();
    for (kind, ours) in all_namespaces().zip(own).filter(|(kind, _)| !kind.is_dumped()) {
        let ns::Kind { file, name, flag, .. } = kind;
        // A kernel without this kind of namespace has nothing to compare.
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

/// Checks that a process is in the same namespaces as the first process of its tree, for
/// those kinds of which a tree can have its own.
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
                help: "dump the part of the tree in that namespace: a tree can have only one",
            });
        }
    }
    Ok(())
}

/// Checks that the threads of a process share what threads of a restored process share.
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

/// Compares what two processes or threads have. A failure is an error: if the answer were
/// guessed, the tree would be restored without what it shares.
fn compare(a: HostPid, b: HostPid, kind: Shared) -> Result<Ordering> {
    process::kcmp(a, b, kind).map_err(|source| DumpError::Compare { pid: a, source })
}

fn own_of_thread(pid: HostPid, tid: HostPid, what: &str) -> DumpError {
    DumpError::Unsupported {
        pid,
        what: format!("has a thread, {tid}, with {what} of its own (unshare(2), setns(2))"),
        help: "dump it when that thread has ended: threads of a restored process share theirs",
    }
}

/// Checks that a thread has no state that a restore cannot give it.
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
            "start the program without it (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)",
        ));
    }
    if ptrace::syscall_dispatch(tid).is_ok_and(|dispatch| dispatch.mode != 0) {
        return Err(refused(
            "its system calls caught (PR_SET_SYSCALL_USER_DISPATCH)",
            "dump it when the dispatch is off: until then it can make no system calls for rcriu",
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

/// Returns a pidfd of a process, for duplicating its descriptors.
///
/// # Errors
/// [`DumpError::Unsupported`] if the first thread has exited and the kernel provides no
/// such pidfd; [`StepError::Process`].
pub(super) fn open_process(task: &Task) -> Result<OwnedFd> {
    let opened = if task.is_leaderless() {
        process::pidfd_open_thread(task.witness())
    } else {
        process::pidfd_open(task.pid)
    };
    opened.map_err(|source| match source {
        Errno::EINVAL => DumpError::Unsupported {
            pid: task.pid,
            what: "has live threads, but its first thread has exited (pthread_exit(3) in main)"
                .to_owned(),
            help: "let main wait for its threads, or use Linux 6.9 or newer",
        },
        source => StepError::Process { pid: task.pid, step: "open", source }.into(),
    })
}
