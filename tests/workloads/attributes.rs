//! Attributes of threads and processes that CRIU's images have no place for.

use std::{
    fs, mem, ptr,
    sync::atomic::{AtomicU8, Ordering},
};

use crate::{
    Row,
    kit::{Area, Checkpoint, Verdict, gettid, same, wait_until},
};

pub const ROWS: &[Row] = &[
    ("affinity", affinity),
    ("io_priorities", io_priorities),
    ("timer_slack", timer_slack),
    ("write_or_execute", write_or_execute),
    ("time_stamp_counter", time_stamp_counter),
    ("machine_checks", machine_checks),
    ("memory_policy", memory_policy),
    ("mapping_policies", mapping_policies),
    ("memory_merging", memory_merging),
    ("huge_pages_where_asked", huge_pages_where_asked),
    ("core_filter", core_filter),
    ("futex_hash", futex_hash),
    ("nice_session", nice_session),
    ("reset_on_fork", reset_on_fork),
    ("deadline", deadline),
    ("exit_signals", exit_signals),
    ("sealed", sealed),
    ("locked_later", locked_later),
    ("locked_later_on_fault", locked_later_on_fault),
    ("keyrings", keyrings),
    ("undone_semaphores", undone_semaphores),
    ("undone_semaphores_of_a_namespace", undone_semaphores_of_a_namespace),
    ("intercepted_system_calls", intercepted_system_calls),
];

/// Lets threads set something each, and looks at it afterwards; the main thread keeps
/// what it has.
fn of_threads<T: PartialEq + std::fmt::Debug + 'static>(
    checkpoint: &Checkpoint,
    what: &'static str,
    read: fn() -> Result<T, String>,
    set: &[fn() -> Verdict],
) -> Verdict {
    let main = read()?;
    let mut threads = Vec::new();
    let mut differ = false;
    for set in set.iter().copied() {
        let thread = checkpoint.thread(move |thread| {
            set()?;
            let before = read()?;
            thread.wait();
            same(what, before, read()?)
        })?;
        threads.push(thread);
        differ = true;
    }
    ensure!(differ, "no thread has anything of its own");
    checkpoint.wait();
    same(what, main, read()?)?;
    threads.into_iter().try_for_each(super::kit::Thread::join)
}

fn processors() -> Result<u64, String> {
    let mut mask = [0_u64; 16];
    sys!(syscall(libc::SYS_sched_getaffinity, 0, mem::size_of_val(&mask), mask.as_mut_ptr()))?;
    Ok(mask[0])
}

fn run_on(mask: u64) -> Verdict {
    sys!(syscall(libc::SYS_sched_setaffinity, 0, 8, &raw const mask)).map(drop)
}

fn affinity(checkpoint: &Checkpoint) -> Verdict {
    let all = processors()?;
    ensure!(all.count_ones() > 1, "this state needs two processors");
    of_threads(
        checkpoint,
        "processors",
        processors,
        &[
            || run_on(1 << processors()?.trailing_zeros()),
            || run_on(1 << processors()?.ilog2()),
            || run_on(processors()?),
        ],
    )
}

fn io_priority() -> Result<i64, String> {
    sys!(syscall(libc::SYS_ioprio_get, 1, 0))
}

fn io_priorities(checkpoint: &Checkpoint) -> Verdict {
    fn set(class: i64, level: i64) -> Verdict {
        sys!(syscall(libc::SYS_ioprio_set, 1, 0, class << 13 | level)).map(drop)
    }
    of_threads(
        checkpoint,
        "priority of I/O",
        io_priority,
        &[|| set(3, 0), || set(2, 6), || set(2, 1), || set(1, 4)],
    )
}

/// A program whose memory is never both writable and executable: nothing can be mapped to
/// ask it.
fn write_or_execute(checkpoint: &Checkpoint) -> Verdict {
    /// `PR_SET_MDWE`, `PR_GET_MDWE` and `PR_MDWE_REFUSE_EXEC_GAIN` (`linux/prctl.h`).
    const SET: i32 = 65;
    const GET: i32 = 66;
    const REFUSE_EXEC_GAIN: i32 = 1;
    sys!(prctl(SET, u64::from(REFUSE_EXEC_GAIN.cast_unsigned()), 0_u64, 0_u64, 0_u64))?;
    checkpoint.wait();
    same("what is refused", REFUSE_EXEC_GAIN, sys!(prctl(GET, 0_u64, 0_u64, 0_u64, 0_u64))?)
}

fn timer_slack(checkpoint: &Checkpoint) -> Verdict {
    of_threads(
        checkpoint,
        "timer slack",
        || sys!(prctl(libc::PR_GET_TIMERSLACK)),
        &[
            || sys!(prctl(libc::PR_SET_TIMERSLACK, 1_000_000)).map(drop),
            || sys!(prctl(libc::PR_SET_TIMERSLACK, 7)).map(drop),
        ],
    )
}

fn time_stamp_counter(checkpoint: &Checkpoint) -> Verdict {
    of_threads(
        checkpoint,
        "whether the time stamp counter may be read",
        || {
            let mut how = 0;
            sys!(prctl(libc::PR_GET_TSC, &raw mut how))?;
            Ok(how)
        },
        &[|| sys!(prctl(libc::PR_SET_TSC, libc::PR_TSC_SIGSEGV)).map(drop)],
    )
}

fn machine_checks(checkpoint: &Checkpoint) -> Verdict {
    fn set(how: i32) -> Verdict {
        sys!(prctl(libc::PR_MCE_KILL, libc::PR_MCE_KILL_SET, how, 0, 0)).map(drop)
    }
    of_threads(
        checkpoint,
        "when a broken page ends it",
        || sys!(prctl(libc::PR_MCE_KILL_GET, 0, 0, 0, 0)),
        &[|| set(libc::PR_MCE_KILL_EARLY), || set(libc::PR_MCE_KILL_LATE)],
    )
}

fn memory_policy(checkpoint: &Checkpoint) -> Verdict {
    fn read() -> Result<(i32, u64), String> {
        let (mut mode, mut nodes) = (0, [0_u64; 16]);
        sys!(syscall(libc::SYS_get_mempolicy, &raw mut mode, nodes.as_mut_ptr(), 1024, 0, 0))?;
        Ok((mode, nodes[0]))
    }
    fn set(mode: i32) -> Verdict {
        let nodes = 1_u64;
        sys!(syscall(libc::SYS_set_mempolicy, mode, &raw const nodes, 64)).map(drop)
    }
    of_threads(
        checkpoint,
        "nodes that memory is taken from",
        read,
        &[|| set(libc::MPOL_BIND), || set(libc::MPOL_INTERLEAVE), || set(libc::MPOL_PREFERRED)],
    )
}

/// Mappings with policies of their own, in a thread that has another one.
fn mapping_policies(checkpoint: &Checkpoint) -> Verdict {
    /// `MPOL_F_ADDR` (`linux/mempolicy.h`).
    const AT_ADDRESS: u64 = 2;
    let read = |at: usize| {
        let (mut mode, mut nodes) = (0, [0_u64; 16]);
        let (mode_at, nodes_at) = (&raw mut mode, nodes.as_mut_ptr());
        sys!(syscall(libc::SYS_get_mempolicy, mode_at, nodes_at, 1024, at, AT_ADDRESS))?;
        Ok::<_, String>((mode, nodes[0]))
    };
    let set = |at: usize, pages: usize, mode: i32| {
        let nodes = 1_u64;
        let mask = &raw const nodes;
        sys!(syscall(libc::SYS_mbind, at, pages * crate::kit::PAGE, mode, mask, 64, 0)).map(drop)
    };
    let nodes = 1_u64;
    sys!(syscall(libc::SYS_set_mempolicy, libc::MPOL_PREFERRED, &raw const nodes, 64))?;
    let area = Area::private(8)?;
    let start = area.at.addr();
    set(start, 2, libc::MPOL_BIND)?;
    set(start + 4 * crate::kit::PAGE, 1, libc::MPOL_INTERLEAVE)?;
    let look =
        || (0..8).map(|page| read(start + page * crate::kit::PAGE)).collect::<Result<Vec<_>, _>>();
    let before = look()?;
    ensure!(before[0] != before[3] && before[4] != before[3], "no policies: {before:?}");
    checkpoint.wait();
    same("policies of mappings", before, look()?)
}

/// Keeps what a child sets, and the root does not have.
fn of_child<T: PartialEq + std::fmt::Debug>(
    checkpoint: &Checkpoint,
    what: &str,
    read: impl Fn() -> Result<T, String>,
    set: impl Fn() -> Verdict,
) -> Verdict {
    let root = read()?;
    let child = checkpoint.fork(|child| {
        set()?;
        let before = read()?;
        ensure!(before != root, "{what}: {before:?} in parent and child");
        child.wait();
        same(what, before, read()?)
    })?;
    checkpoint.wait();
    same(what, root, read()?)?;
    child.join()
}

fn memory_merging(checkpoint: &Checkpoint) -> Verdict {
    /// `PR_SET_MEMORY_MERGE`, `PR_GET_MEMORY_MERGE` (`linux/prctl.h`).
    const SET: i32 = 67;
    const GET: i32 = 68;
    of_child(
        checkpoint,
        "merging of equal pages",
        || sys!(prctl(GET, 0_u64, 0_u64, 0_u64, 0_u64)),
        || sys!(prctl(SET, 1_u64, 0_u64, 0_u64, 0_u64)).map(drop),
    )
}

fn huge_pages_where_asked(checkpoint: &Checkpoint) -> Verdict {
    /// `PR_THP_DISABLE_EXCEPT_ADVISED` (`linux/prctl.h`, since Linux 6.18).
    const EXCEPT_ADVISED: u64 = 2;
    of_child(
        checkpoint,
        "where huge pages are disabled",
        || sys!(prctl(libc::PR_GET_THP_DISABLE, 0_u64, 0_u64, 0_u64, 0_u64)),
        || {
            let set =
                |flags: u64| sys!(prctl(libc::PR_SET_THP_DISABLE, 1_u64, flags, 0_u64, 0_u64));
            set(EXCEPT_ADVISED).or_else(|_| set(0)).map(drop)
        },
    )
}

fn text(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))
}

fn core_filter(checkpoint: &Checkpoint) -> Verdict {
    of_child(
        checkpoint,
        "what a core dump has",
        || text("/proc/self/coredump_filter"),
        || fs::write("/proc/self/coredump_filter", "0x7f").map_err(|error| error.to_string()),
    )
}

/// A number of slots that the kernel would not choose; on kernels before Linux 6.16, none.
fn futex_hash(checkpoint: &Checkpoint) -> Verdict {
    /// Of `linux/prctl.h`.
    const FUTEX_HASH: i32 = 78;
    const SET_SLOTS: u64 = 1;
    const GET_SLOTS: u64 = 2;
    let read = || sys!(prctl(FUTEX_HASH, GET_SLOTS, 0_u64, 0_u64, 0_u64));
    if read().is_err() {
        checkpoint.wait();
        return Ok(());
    }
    let thread = checkpoint.thread(|thread| {
        thread.wait();
        Ok(())
    })?;
    sys!(prctl(FUTEX_HASH, SET_SLOTS, 512_u64, 0_u64, 0_u64))?;
    let before = read()?;
    ensure!(before == 512, "{before} slots");
    checkpoint.wait();
    same("slots for private futexes", before, read()?)?;
    thread.join()
}

fn nice_session(checkpoint: &Checkpoint) -> Verdict {
    of_child(
        checkpoint,
        "how nice a session is",
        || {
            let text = text("/proc/self/autogroup")?;
            Ok(text.split_once(" nice ").map(|(_, nice)| nice.to_owned()))
        },
        || {
            sys!(setsid())?;
            fs::write("/proc/self/autogroup", "7").map_err(|error| error.to_string())
        },
    )
}

/// `struct sched_attr` (`linux/sched/types.h`).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

fn scheduling() -> Result<Attributes, String> {
    let mut found = Attributes::default();
    let size = mem::size_of::<Attributes>();
    sys!(syscall(libc::SYS_sched_getattr, 0, &raw mut found, size, 0))?;
    Ok(found)
}

fn schedule(wanted: Attributes) -> Verdict {
    let wanted = Attributes { size: mem::size_of::<Attributes>() as u32, ..wanted };
    sys!(syscall(libc::SYS_sched_setattr, 0, &raw const wanted, 0)).map(drop)
}

fn reset_on_fork(checkpoint: &Checkpoint) -> Verdict {
    const RESET: u64 = 1;
    of_threads(
        checkpoint,
        "scheduling",
        scheduling,
        &[
            || schedule(Attributes { flags: RESET, nice: 4, ..Default::default() }),
            || schedule(Attributes { policy: 2, flags: RESET, priority: 3, ..Default::default() }),
            // A slice of its own.
            || schedule(Attributes { runtime: 5_000_000, ..Default::default() }),
        ],
    )
}

/// A thread with a deadline; where that is forbidden, as any other.
fn deadline(checkpoint: &Checkpoint) -> Verdict {
    of_threads(
        checkpoint,
        "scheduling",
        scheduling,
        &[|| {
            let millisecond = 1_000_000;
            let wanted = Attributes {
                policy: 6, // SCHED_DEADLINE
                runtime: millisecond,
                deadline: 50 * millisecond,
                period: 100 * millisecond,
                ..Default::default()
            };
            let _ = schedule(wanted);
            Ok(())
        }],
    )
}

/// Makes a child that tells its end by another signal.
fn cloned(signal: i32, body: impl FnOnce()) -> Result<i32, String> {
    let pid = sys!(syscall(libc::SYS_clone, i64::from(signal), 0_u64, 0_u64, 0_u64, 0_u64))?;
    if pid == 0 {
        body();
        // SAFETY: nothing needs to be unwound.
        unsafe { libc::_exit(3) };
    }
    Ok(pid as i32)
}

fn exit_signal(pid: i32) -> Result<String, String> {
    let stat = text(&format!("/proc/{pid}/stat"))?;
    let fields: Vec<_> = stat[stat.rfind(')').unwrap_or(0) + 2..].split(' ').collect();
    Ok(fields[35].to_owned())
}

fn exit_signals(checkpoint: &Checkpoint) -> Verdict {
    use crate::threads::{bit, block};
    block(bit(libc::SIGUSR1) | bit(libc::SIGUSR2) | bit(libc::SIGCHLD))?;
    let alive = [
        cloned(libc::SIGUSR1, || checkpoint.wait_go())?,
        cloned(0, || checkpoint.wait_go())?,
        cloned(libc::SIGCHLD, || checkpoint.wait_go())?,
    ];
    let dead = cloned(libc::SIGUSR2, || ())?;
    wait_until("the end of a child", || {
        text(&format!("/proc/{dead}/stat")).is_ok_and(|s| s.contains(") Z "))
    })?;
    // What it said is no part of the state.
    let mut set = bit(libc::SIGUSR2);
    let now = libc::timespec { tv_sec: 5, tv_nsec: 0 };
    let first = sys!(syscall(libc::SYS_rt_sigtimedwait, &raw mut set, 0, &raw const now, 8))?;
    same("signal of the dead child", i64::from(libc::SIGUSR2), first)?;
    let read =
        || alive.iter().chain([&dead]).map(|pid| exit_signal(*pid)).collect::<Result<Vec<_>, _>>();
    let before = read()?;
    same("exit signals", "10 0 17 12", &*before.join(" "))?;
    checkpoint.wait();
    for pid in alive.iter().chain([&dead]) {
        wait_until("the end of the children", || {
            text(&format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
        })?;
    }
    same("exit signals", before, read()?)?;
    let mut pending = 0_u64;
    sys!(syscall(libc::SYS_rt_sigpending, &raw mut pending, 8))?;
    same("signals that tell of ends", bit(libc::SIGUSR1) | bit(libc::SIGCHLD), pending)?;
    for pid in alive.iter().chain([&dead]) {
        let mut status = 0;
        sys!(waitpid(*pid, &raw mut status, libc::__WALL))?;
        same("status", 3 << 8, status)?;
    }
    Ok(())
}

fn smaps_flags(at: usize) -> Result<String, String> {
    let text = text("/proc/self/smaps")?;
    let begin = format!("{at:x}-");
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&begin));
    let flags = lines.find(|line| line.starts_with("VmFlags:"));
    Ok(flags.ok_or("no such mapping")?.to_owned())
}

fn sealed(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::apart(3)?;
    area.fill(7);
    let (at, bytes) = (area.at.addr(), area.bytes);
    const MSEAL: i64 = 462;
    sys!(syscall(MSEAL, at, bytes, 0))?;
    // Write protection is the tracker's.
    let flags = || Ok::<_, String>(smaps_flags(at)?.replace(" uw", ""));
    let before = flags()?;
    checkpoint.wait();
    same("flags of sealed memory", before, flags()?)?;
    ensure!(area.unmap().is_err(), "sealed memory could be unmapped");
    area.verify("sealed memory", 7)
}

fn lock_later(checkpoint: &Checkpoint, flags: i32) -> Verdict {
    sys!(mlockall(flags))?;
    let look = || {
        let area = Area::apart(5)?;
        let flags = smaps_flags(area.at.addr())?;
        area.unmap()?;
        Ok::<_, String>(flags.replace(" sd", ""))
    };
    let before = look()?;
    ensure!(before.contains(" lo"), "new memory is not locked: {before}");
    checkpoint.wait();
    same("flags of new memory", before, look()?)
}

fn locked_later(checkpoint: &Checkpoint) -> Verdict {
    lock_later(checkpoint, libc::MCL_FUTURE)
}

fn locked_later_on_fault(checkpoint: &Checkpoint) -> Verdict {
    lock_later(checkpoint, libc::MCL_FUTURE | libc::MCL_ONFAULT)
}

/// Keyrings, which are lost.
fn keyrings(checkpoint: &Checkpoint) -> Verdict {
    let thread = checkpoint.thread(|thread| {
        sys!(syscall(libc::SYS_keyctl, 0, -1, 1))?;
        thread.wait();
        ensure!(gettid() > 0, "no thread id");
        Ok(())
    })?;
    sys!(syscall(libc::SYS_keyctl, 0, -2, 1))?;
    checkpoint.wait();
    thread.join()
}

/// Operations that the end of a process undoes: one takes, another gives. A second thread of the
/// process has the same list.
fn undone_semaphores(checkpoint: &Checkpoint) -> Verdict {
    let set = sys!(semget(libc::IPC_PRIVATE, 3, 0o600))?;
    let values = || -> Result<Vec<i32>, String> {
        (0..3).map(|number| sys!(semctl(set, number, libc::GETVAL))).collect()
    };
    let operate = move |number: u16, operation: i16| {
        let flags = libc::SEM_UNDO as libc::c_short;
        let mut operation = libc::sembuf { sem_num: number, sem_op: operation, sem_flg: flags };
        sys!(semop(set, ptr::from_mut(&mut operation), 1)).map(drop)
    };
    sys!(semctl(set, 0, libc::SETVAL, 5))?;
    let verdict = (|| {
        let child = checkpoint.fork(|child| {
            let thread = child.thread(move |thread| {
                operate(0, -2)?;
                thread.wait();
                Ok(())
            })?;
            operate(2, 3)?;
            child.wait();
            thread.join()?;
            same("values", vec![3, 0, 3], values()?)
        })?;
        checkpoint.wait();
        child.join()?;
        same("values after the end", vec![5, 0, 0], values()?)
    })();
    sys!(semctl(set, 0, libc::IPC_RMID))?;
    verdict
}

fn undone_semaphores_of_a_namespace(checkpoint: &Checkpoint) -> Verdict {
    sys!(unshare(libc::CLONE_NEWIPC))?;
    undone_semaphores(checkpoint)
}

/// `PR_SET_SYSCALL_USER_DISPATCH`, `PR_SYS_DISPATCH_ON`, and the values of the selector
/// (`linux/prctl.h`).
pub const DISPATCH: i32 = 59;
pub const ON: u64 = 1;
pub const ALLOW: u8 = 0;
pub const BLOCK: u8 = 1;

/// A program that plays the kernel for some of its system calls, which a byte selects.
fn intercepted_system_calls(checkpoint: &Checkpoint) -> Verdict {
    static SELECTOR: AtomicU8 = AtomicU8::new(ALLOW);
    extern "C" fn play(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
        SELECTOR.store(ALLOW, Ordering::Relaxed);
        // SAFETY: it is the context of a handler that was installed with SA_SIGINFO.
        let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
        context.uc_mcontext.gregs[libc::REG_RAX as usize] = 4711;
    }
    let intercepted = || {
        SELECTOR.store(BLOCK, Ordering::Relaxed);
        sys!(syscall(libc::SYS_getppid))
    };
    // SAFETY: all zeros is a valid value.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = play as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    sys!(sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()))?;
    sys!(prctl(DISPATCH, ON, 0_u64, 0_u64, &raw const SELECTOR))?;
    same("the result", 4711, intercepted()?)?;
    checkpoint.wait();
    same("the result", 4711, intercepted()?)?;
    let passed = sys!(syscall(libc::SYS_getppid))?;
    ensure!(passed != 4711, "a call was intercepted that should not be");
    Ok(())
}
