//! Semaphore operations that the kernel undoes when a process ends (`SEM_UNDO` of `semop(2)`).
//!
//! A semaphore set belongs to the IPC namespace and survives the process. When the dumped process
//! ends, the kernel undoes its operations; the restored process makes them again. In an IPC
//! namespace of the tree's own, the images have the values after the operations: there the restored
//! process makes each operation and one that undoes its effect on the semaphore, in one call. No call
//! shows what a process has to undo, so the dump reads it in the memory of the kernel.

use std::collections::BTreeMap;

use nix::{errno::Errno, libc};

use super::{Begun, Collector, Restorer};
use crate::{
    causes::{tell, with_sources},
    image::{
        proto::{CoreEntry, RcriuUndo},
        tree::undone,
    },
    inject::{Answers, Script, Task},
    proc,
    res::{
        ResError, Result,
        calls::Calls,
        kernel::{Kernel, KernelError, KernelResult},
        sysv::{self, SEMAPHORES},
        task, thread,
    },
    sys::{
        kernel_memory::KernelAddr,
        process::{self, Shared},
        sysv as kernel_calls,
    },
    units::{HostPid, NsPid},
};

/// The most traced threads, lists of a process, and operations of one call (`SEMOPM`).
const THREADS_MAX: usize = 1 << 22;
const SETS_MAX: usize = 1 << 15;
const OPERATIONS_MAX: usize = 500;

/// What errors call a list of such operations.
const LISTED: &str = "operations to undo";

/// `IPC_NOWAIT` (`linux/ipc.h`), and `SEM_UNDO` (`linux/sem.h`).
const NO_WAIT: i16 = 0o4000;
const UNDO: i16 = 0x1000;

/// An operation: the number of the semaphore, what is added to it, and the flags.
type Operation = (u16, i16, i16);

/// The operations of one call of `semop(2)` on a set.
type Group = (i32, Vec<Operation>);

/// The size of `struct sembuf` (`linux/sem.h`).
const OPERATION_BYTES: usize = 6;

/// What the processes have to undo, by process.
#[derive(Debug)]
struct Undos(BTreeMap<HostPid, Vec<RcriuUndo>>);

/// Reads what stopped processes have to undo.
pub(super) fn collector(tasks: &[Task]) -> Begun<dyn Collector> {
    let own = HostPid::own();
    // Equal if neither has a list. Otherwise the process has one, which may be empty.
    let has_list = |task: &&Task| {
        let compared = process::kcmp(task.witness(), own, Shared::Undo);
        !task.is_zombie() && compared.is_ok_and(std::cmp::Ordering::is_ne)
    };
    let mut undos = Undos(BTreeMap::new());
    // By their IPC namespaces.
    let mut found: BTreeMap<u64, Vec<&Task>> = BTreeMap::new();
    for task in tasks.iter().filter(has_list) {
        let inode = proc::namespace(task.witness(), "ipc")?;
        found.entry(inode).or_default().push(task);
    }
    for of_namespace in found.values() {
        undos.0.append(&mut of_one(of_namespace)?.0);
    }
    Ok(Box::new(undos))
}

/// Reads what processes in one IPC namespace have to undo.
fn of_one(tasks: &[&Task]) -> Result<Undos> {
    let foreign = tasks.first().filter(|first| !is_in_own(first)).map(|first| first.witness());
    let visit = sysv::visit(foreign)?;
    let sets = sets()?;
    if sets.is_empty() {
        return Ok(Undos(BTreeMap::new()));
    }
    let undos = read(tasks, &sets, foreign.is_some()).unwrap_or_else(|error| {
        warn_unread(tasks, &error);
        Undos(BTreeMap::new())
    });
    drop(visit);
    Ok(undos)
}

/// Returns the sets of the IPC namespace that this thread visits, with the number of semaphores.
fn sets() -> Result<BTreeMap<i32, usize>> {
    let ids = kernel_calls::semaphore_sets().map_err(SEMAPHORES.failed(0, "list"))?;
    let set = |id: u32| {
        // A set that has gone meanwhile is not counted.
        let count = kernel_calls::semaphores(id).ok()?.count;
        Some((i32::try_from(id).ok()?, count as usize))
    };
    Ok(ids.into_iter().filter_map(set).collect())
}

/// Whether a process is in the IPC namespace of rcriu.
fn is_in_own(task: &Task) -> bool {
    let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/ipc")).ok();
    of(&task.witness().to_string()) == of("self")
}

/// Warns about processes that may lose operations, because the dump cannot read them.
fn warn_unread(tasks: &[&Task], error: &KernelError) {
    let in_tree = |pid: HostPid| tasks.iter().any(|task| task.pid == pid);
    let sets = crate::sys::task::semaphores_used_by(&in_tree);
    if sets.is_empty() {
        return;
    }
    let pids: Vec<String> = tasks.iter().map(|task| task.pid.to_string()).collect();
    let what = format!(
        "process {} may have semaphore operations to undo on exit (SEM_UNDO, sets {sets:?}), which \
         cannot be read: {}. They are undone when it exits, and the restored process has none",
        pids.join(", "),
        with_sources(error)
    );
    tell(log::Level::Warn, &what);
}

/// Reads what these processes, which the calling thread traces, have to undo. `sets` has the number
/// of semaphores of each set, and `kept` tells whether the images have the values of the semaphores.
fn read(tasks: &[&Task], sets: &BTreeMap<i32, usize>, kept: bool) -> KernelResult<Undos> {
    const TASK: &str = "task_struct";
    let mut kernel = Kernel::open()?;
    let own = kernel.task()?;
    let first = kernel.member(own, TASK, "ptraced")?;
    let mut undos = Undos(BTreeMap::new());
    // The first process of each list.
    let mut owners: BTreeMap<KernelAddr, HostPid> = BTreeMap::new();
    let mut missing = tasks.len();
    for entry in list(&mut kernel, first, THREADS_MAX, "the traced threads")? {
        let thread = kernel.containing(entry, TASK, "ptrace_entry")?;
        let pid = kernel.pointer(thread, TASK, "thread_pid")?;
        let tid = HostPid(kernel.pid(pid)?);
        let Some(task) = tasks.iter().find(|task| task.witness() == tid) else { continue };
        missing -= 1;
        let undo_list = kernel.pointer(thread, TASK, "sysvsem.undo_list")?;
        if undo_list.is_null() {
            continue;
        }
        if let Some(owner) = owners.get(&undo_list) {
            let what = format!(
                "process {} shares its semaphore operations to undo on exit (SEM_UNDO) with \
                 process {owner} (CLONE_SYSVSEM): after a restore, only process {owner} has them",
                task.pid
            );
            tell(log::Level::Warn, &what);
            continue;
        }
        owners.insert(undo_list, task.pid);
        let operations = operations(&mut kernel, undo_list, sets, kept)?;
        undos.0.insert(task.pid, operations);
    }
    if missing > 0 {
        return Err(KernelError::Unexpected("the traced threads"));
    }
    Ok(undos)
}

/// Reads a list of operations to undo (`struct sem_undo_list`, `ipc/sem.c`).
fn operations(
    kernel: &mut Kernel,
    undo_list: KernelAddr,
    sets: &BTreeMap<i32, usize>,
    kept: bool,
) -> KernelResult<Vec<RcriuUndo>> {
    const UNDO: &str = "sem_undo";
    let mut found = Vec::new();
    let first = kernel.member(undo_list, "sem_undo_list", "list_proc")?;
    for entry in list(kernel, first, SETS_MAX, LISTED)? {
        let undo = kernel.containing(entry, UNDO, "list_proc")?;
        let set = kernel.word(undo, UNDO, "semid")?.cast_signed();
        // A set that was removed has the id -1.
        let Some(count) = sets.get(&set) else { continue };
        let start = kernel.member(undo, UNDO, "semadj")?;
        // On older kernels, `semadj` is a pointer to the numbers, otherwise it is the numbers.
        let room = undo.plus(kernel.size(UNDO)?).0 - start.0;
        let start = if room >= 8 { kernel.pointer(undo, UNDO, "semadj")? } else { start };
        let bytes = kernel.bytes(start, count * size_of::<i16>(), LISTED)?;
        for (number, bytes) in (0_u32..).zip(bytes.chunks_exact(size_of::<i16>())) {
            let adjust = i16::from_ne_bytes(bytes.try_into().expect("chunks of 2"));
            if adjust != 0 {
                let kept = kept.then_some(true);
                found.push(RcriuUndo { set, number, adjust: adjust.into(), kept });
            }
        }
    }
    Ok(found)
}

/// Returns the entries of a list (`struct list_head`), at most `max`.
fn list(
    kernel: &mut Kernel,
    head: KernelAddr,
    max: usize,
    what: &'static str,
) -> KernelResult<Vec<KernelAddr>> {
    let mut entries = Vec::new();
    let mut at = KernelAddr(kernel.long_at(head, what)?);
    while at != head {
        if entries.len() == max {
            return Err(KernelError::Unexpected(what));
        }
        entries.push(at);
        at = KernelAddr(kernel.long_at(at, what)?);
    }
    Ok(entries)
}

impl Collector for Undos {
    fn collect(&mut self, of: &task::Stopped<'_>, _: &Answers, images: &mut task::Images) {
        images.core.rcriu_undo = self.0.remove(&of.of.pid).unwrap_or_default();
    }
}

/// Makes the operations again.
#[derive(Debug)]
struct Again;

/// Reads nothing: the entries are in the cores.
pub(super) fn restorer() -> Begun<dyn Restorer> {
    Ok(Box::new(Again))
}

impl Restorer for Again {
    fn set(&self, of: &thread::Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        let groups = groups(of.tid, of.core)?;
        if groups.is_empty() {
            return Ok(());
        }
        let mut script = Script::new();
        let mut made = Vec::new();
        for (set, group) in groups {
            let bytes: Vec<u8> = group.iter().flat_map(operation).collect();
            let count = group.len() as u64;
            let operations = script.bytes(&bytes);
            let arguments = [set.into(), operations.into(), count.into()];
            made.push((set, group, script.attempt(libc::SYS_semop, &arguments)));
        }
        let answers = calls.make(&script)?;
        for (set, group, call) in made {
            match answers.result(call) {
                Ok(_) => {}
                Err(Errno::EINVAL | Errno::EIDRM) => tell(
                    log::Level::Warn,
                    &format!(
                        "process {} had operations on the semaphore set {set} to undo on exit \
                         (SEM_UNDO): the set is gone, and so are they",
                        of.tid
                    ),
                ),
                Err(errno) => return Err(refused(of.tid, set, &group, errno)),
            }
        }
        Ok(())
    }
}

fn refused(pid: NsPid, set: i32, group: &[Operation], errno: Errno) -> ResError {
    let numbers: Vec<String> =
        group.iter().map(|(number, operation, _)| format!("{number} by {operation}")).collect();
    let problem = format!(
        "it had changed semaphores of the System V set {set} with SEM_UNDO, and cannot change them \
         again ({}): {errno}\nhelp: another process uses them now: end it, or have it release them \
         (ipcs -s -i {set})",
        numbers.join(", ")
    );
    ResError::Image { pid, problem }
}

/// Returns the operations of a process that is restored, for each call: those that raise a semaphore
/// first, since the others may have to wait for them.
fn groups(pid: NsPid, core: &CoreEntry) -> Result<Vec<Group>> {
    let undos = core.tc.as_ref().map_or(&[][..], |task| &task.rcriu_undo);
    let mut groups: BTreeMap<(bool, i32), Vec<Operation>> = BTreeMap::new();
    for undo in undos {
        let (number, adjust) = undone(undo).map_err(|problem| ResError::Image { pid, problem })?;
        let operation = -adjust;
        let group = groups.entry((operation < 0, undo.set)).or_default();
        let made = (number, operation, UNDO | NO_WAIT);
        match (undo.kept(), operation < 0) {
            (false, _) => group.push(made),
            // The kernel makes them one after the other, and all or none.
            (true, false) => group.extend([made, (number, adjust, NO_WAIT)]),
            (true, true) => group.extend([(number, adjust, NO_WAIT), made]),
        }
    }
    let split = |((_, set), group): ((bool, i32), Vec<Operation>)| {
        let parts: Vec<_> = group.chunks(OPERATIONS_MAX).map(|part| (set, part.to_vec())).collect();
        parts
    };
    Ok(groups.into_iter().flat_map(split).collect())
}

/// Returns a `struct sembuf`.
fn operation((number, operation, flags): &Operation) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPERATION_BYTES);
    bytes.extend(number.to_ne_bytes());
    bytes.extend(operation.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::proto::TaskCoreEntry;

    fn core(undos: &[(i32, u32, i32)], kept: bool) -> CoreEntry {
        let undo = |(set, number, adjust): &(i32, u32, i32)| RcriuUndo {
            set: *set,
            number: *number,
            adjust: *adjust,
            kept: Some(kept),
        };
        let rcriu_undo = undos.iter().map(undo).collect();
        let tc = TaskCoreEntry { rcriu_undo, ..Default::default() };
        CoreEntry { tc: Some(tc), ..Default::default() }
    }

    #[test]
    fn operations_that_raise_come_first_and_none_is_too_long() {
        let pid = NsPid::of_image(7);
        let both = UNDO | NO_WAIT;
        let undos = [(3, 0, 1), (3, 1, -2), (2, 5, 4)];
        let made = groups(pid, &core(&undos, false)).unwrap();
        let expected =
            [(3, vec![(1, 2, both)]), (2, vec![(5, -4, both)]), (3, vec![(0, -1, both)])];
        assert_eq!(made, expected);
        assert_eq!(operation(&(1, 2, both)), [1, 0, 2, 0, 0, 0x18]);
        // The values of the semaphores stay.
        let made = groups(pid, &core(&undos[..2], true)).unwrap();
        let expected =
            [(3, vec![(1, 2, both), (1, -2, NO_WAIT)]), (3, vec![(0, 1, NO_WAIT), (0, -1, both)])];
        assert_eq!(made, expected);
        let many: Vec<_> = (0..=500).map(|number| (1, number, 1)).collect();
        let lengths = groups(pid, &core(&many, false)).unwrap();
        let lengths: Vec<_> = lengths.iter().map(|(_, group)| group.len()).collect();
        assert_eq!(lengths, [500, 1]);
    }

    #[test]
    fn impossible_operations_are_errors() {
        for undo in [(1, 65_536, 1), (1, 0, 32_768), (1, 0, -32_768), (1, 0, i32::MIN)] {
            let error = groups(NsPid::of_image(7), &core(&[undo], false)).unwrap_err();
            assert!(error.to_string().contains("process 7"), "{error}");
        }
    }
}
