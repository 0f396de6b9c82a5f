//! Checks of a core: a process and its threads.

use super::Problems;
use crate::{arch::Machine, image::proto};

/// How many resource limits there are (`RLIM_NLIMITS`, `asm-generic/resource.h`).
const LIMITS: usize = 16;

/// How many signals there are (`_NSIG`).
const SIGNALS: u32 = 64;

/// Bytes of a `siginfo_t`.
const SIGINFO_BYTES: usize = 128;

const NANOSECONDS: u64 = 1_000_000_000;
const MICROSECONDS: u64 = 1_000_000;

/// The clocks that timers can use and that have a positive number (`linux/time.h`); clocks
/// of processes and threads have negative ones.
const CLOCKS: [i32; 8] = [0, 1, 2, 3, 7, 8, 9, 11];

/// Scheduling policies (`linux/sched.h`), and those of them that use a priority.
const POLICIES: [u32; 7] = [0, 1, 2, 3, 5, 6, 7];
const REAL_TIME: [u32; 2] = [1, 2];

/// A flag beside the policy: children get the default policy (`SCHED_RESET_ON_FORK`).
const RESET_ON_FORK: u32 = 0x4000_0000;

/// Bytes of `struct robust_list_head` (`linux/futex.h`).
const ROBUST_LIST_BYTES: u32 = 24;

/// Returns the number of a semaphore and what the kernel is to add to it, or why that is impossible.
///
/// # Errors
/// The defect, and the possible values.
pub fn undone(undo: &proto::RcriuUndo) -> Result<(u16, i16), String> {
    match (u16::try_from(undo.number), i16::try_from(undo.adjust)) {
        (Ok(number), Ok(adjust)) if adjust != i16::MIN => Ok((number, adjust)),
        _ => Err(format!(
            "it is to undo a change of semaphore {} by {} (the greatest are {} and {})",
            undo.number,
            undo.adjust,
            u16::MAX,
            i16::MAX
        )),
    }
}

/// Checks a process, without its memory and files.
pub(super) fn check_task(task: &proto::TaskCoreEntry, problems: &mut Problems) {
    let limits = task.rlimits.iter().flat_map(|limits| &limits.rlimits);
    for (number, limit) in limits.enumerate() {
        if number >= LIMITS {
            problems.broken(format!("it has a resource limit {number}, which does not exist"));
            break;
        }
        if limit.cur > limit.max {
            problems.broken(format!(
                "its soft limit {number} is {}, above the hard limit {}",
                limit.cur, limit.max
            ));
        }
    }
    if task.sigactions.len() > SIGNALS as usize - 2 {
        problems.broken(format!("it has actions for {} signals", task.sigactions.len()));
    }
    if let Some(queue) = &task.signals_s {
        check_queue(queue, problems);
    }
    if let Some(timers) = &task.timers {
        check_timers(timers, problems);
    }
    for problem in task.rcriu_undo.iter().filter_map(|undo| undone(undo).err()) {
        problems.broken(problem);
    }
    if task.oom_score_adj.is_some_and(|adjustment| !(-1000..=1000).contains(&adjustment)) {
        problems.broken(format!("its OOM score adjustment is {:?}", task.oom_score_adj));
    }
}

fn check_queue(queue: &proto::SignalQueueEntry, problems: &mut Problems) {
    for entry in &queue.signals {
        let number = entry.siginfo.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
        let fine = entry.siginfo.len() == SIGINFO_BYTES
            && number.is_some_and(|number| (1..=SIGNALS).contains(&number));
        if !fine {
            problems.broken("a signal in its queue is malformed");
        }
    }
}

fn check_timers(timers: &proto::TaskTimersEntry, problems: &mut Problems) {
    for timer in [timers.real, timers.virt, timers.prof] {
        let fine = timer.vusec.max(timer.iusec) < MICROSECONDS
            && timer.vsec.max(timer.isec) <= i64::MAX.cast_unsigned();
        if !fine {
            problems.broken("an interval timer with an impossible time");
        }
    }
    let mut ids: Vec<u32> = timers.posix.iter().map(|timer| timer.it_id).collect();
    ids.sort_unstable();
    if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        problems.broken(format!("there are two timers with the id {}", pair[0]));
    }
    for timer in &timers.posix {
        let id = timer.it_id;
        if i32::try_from(id).is_err() {
            problems.broken(format!("there is a timer with the id {id}"));
        }
        let fine = timer.vnsec.max(timer.insec) < NANOSECONDS
            && timer.vsec.max(timer.isec) <= i64::MAX.cast_unsigned();
        if !fine {
            problems.broken(format!("timer {id} has an impossible time"));
        }
        let clock = timer.clock_id.cast_signed();
        if clock >= 0 && !CLOCKS.contains(&clock) {
            problems.broken(format!("timer {id} is of the clock {clock}"));
        }
        // SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID.
        let notifies = matches!(timer.it_sigev_notify, 0..=2 | 4);
        let signals = matches!(timer.it_sigev_notify, 0 | 2 | 4);
        if !notifies || signals && !(1..=SIGNALS).contains(&timer.si_signo) {
            problems.broken(format!(
                "timer {id} notifies in the unknown way {} or by the unknown signal {}",
                timer.it_sigev_notify, timer.si_signo
            ));
        }
    }
}

/// Checks one thread.
pub(super) fn check_thread(tid: u32, core: &proto::CoreEntry, problems: &mut Problems) {
    let machine = match Machine::of(core) {
        Ok(machine) => machine,
        Err(unknown) => {
            problems.not_restored(format!("thread {tid}: {unknown}"));
            return;
        }
    };
    if machine != Machine::NATIVE {
        let (name, native) = (machine.name(), Machine::NATIVE.name());
        problems.not_restored(format!("thread {tid} is of {name}, and this is {native}"));
    }
    machine.check_registers(core, &mut |problem| {
        problems.broken(format!("thread {tid}: {problem}"));
    });
    if machine.is_narrow(core) {
        problems.not_restored(format!("thread {tid} executes 32-bit code, which is not restored"));
    }
    let mut wrong = |problem: String| problems.broken(format!("thread {tid}: {problem}"));
    let Some(thread) = &core.thread_core else { return };
    if thread.futex_rla != 0 && thread.futex_rla_len != ROBUST_LIST_BYTES {
        wrong(format!(
            "its list of robust futexes has {} bytes, {ROBUST_LIST_BYTES} expected",
            thread.futex_rla_len
        ));
    }
    let policy = thread.sched_policy.unwrap_or(0) & !RESET_ON_FORK;
    let priority = thread.sched_prio.unwrap_or(0);
    let fits =
        if REAL_TIME.contains(&policy) { (1..100).contains(&priority) } else { priority == 0 };
    if !POLICIES.contains(&policy) || !fits {
        wrong(format!("its scheduling policy is {policy} with priority {priority}"));
    }
    if thread.pdeath_sig.is_some_and(|signal| signal > SIGNALS) {
        wrong(format!("its parent-death signal is {:?}", thread.pdeath_sig));
    }
    if let Some(rseq) = &thread.rseq_entry
        && rseq.rseq_abi_pointer != 0
        && (rseq.rseq_abi_pointer >= machine.addresses_end() || rseq.rseq_abi_size < 20)
    {
        wrong("its restartable sequences have no address".into());
    }
    if let Some(creds) = &thread.creds {
        check_creds(creds, &mut wrong);
    }
    if let Some(queue) = &thread.signals_p {
        check_queue(queue, problems);
    }
}

fn check_creds(creds: &proto::CredsEntry, wrong: &mut dyn FnMut(String)) {
    let ids = [
        creds.uid,
        creds.euid,
        creds.suid,
        creds.fsuid,
        creds.gid,
        creds.egid,
        creds.sgid,
        creds.fsgid,
    ];
    // -1 is not a valid id.
    if ids.iter().chain(&creds.groups).any(|id| *id == u32::MAX) {
        wrong("a user or group id is -1".into());
    }
    let sets = [&creds.cap_inh, &creds.cap_prm, &creds.cap_eff, &creds.cap_bnd];
    if let Some(set) = sets.iter().find(|set| set.len() != 2) {
        wrong(format!("a capability set has {} words, expected two", set.len()));
        return;
    }
    let within = |set: &[u32], of: &[u32]| set.iter().zip(of).all(|(set, of)| set & !of == 0);
    if !within(&creds.cap_eff, &creds.cap_prm) {
        wrong("its effective capabilities exceed the permitted ones".into());
    }
    let amb = &creds.cap_amb;
    if !within(amb, &creds.cap_prm) || !within(amb, &creds.cap_inh) {
        wrong("its ambient capabilities exceed the permitted and inheritable ones".into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(core: &proto::CoreEntry) -> String {
        let mut problems = Problems::default();
        check_thread(7, core, &mut problems);
        if let Some(task) = &core.tc {
            check_task(task, &mut problems);
        }
        problems.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    }

    fn core() -> proto::CoreEntry {
        let gpregs = proto::UserX86RegsEntry { cs: 0x33, ss: 0x2b, ..Default::default() };
        let fpregs = proto::UserX86FpregsEntry {
            mxcsr: 0x1f80,
            st_space: vec![0; 32],
            xmm_space: vec![0; 64],
            ..Default::default()
        };
        proto::CoreEntry {
            mtype: proto::core_entry::March::X8664.into(),
            thread_info: Some(proto::ThreadInfoX86 { gpregs, fpregs, ..Default::default() }),
            tc: Some(proto::TaskCoreEntry::default()),
            thread_core: Some(proto::ThreadCoreEntry::default()),
            ..Default::default()
        }
    }

    #[test]
    fn what_the_kernel_would_refuse_is_told() {
        assert_eq!(told(&core()), "");
        type Break = fn(&mut proto::CoreEntry);
        fn info(core: &mut proto::CoreEntry) -> &mut proto::ThreadInfoX86 {
            core.thread_info.as_mut().unwrap()
        }
        let mut reset = core();
        let thread = reset.thread_core.as_mut().unwrap();
        (thread.sched_policy, thread.sched_prio) = (Some(1 | RESET_ON_FORK), Some(7));
        assert_eq!(told(&reset), "");
        let breaks: [(Break, &str); 8] = [
            (|core| info(core).fpregs.st_space.truncate(31), "st_space has 124 bytes"),
            (|core| info(core).gpregs.cs = 0, "register cs is 0x0"),
            (|core| info(core).gpregs.fs_base = u64::MAX, "fs_base is 0xffffffffffffffff"),
            (|core| core.thread_info = None, "no registers"),
            (|core| core.mtype = 2, "not known (Arm)"),
            (|core| core.mtype = 3, "is of aarch64, and this is x86-64"),
            (
                |core| {
                    let limit = proto::RlimitEntry { cur: 2, max: 1 };
                    let rlimits = Some(proto::TaskRlimitsEntry { rlimits: vec![limit] });
                    core.tc.as_mut().unwrap().rlimits = rlimits;
                },
                "soft limit 0 is 2, above the hard limit 1",
            ),
            (
                |core| {
                    let queue = proto::SignalQueueEntry { signals: vec![Default::default()] };
                    core.tc.as_mut().unwrap().signals_s = Some(queue);
                },
                "a signal in its queue is malformed",
            ),
        ];
        for (damage, expected) in breaks {
            let mut broken = core();
            damage(&mut broken);
            let told = told(&broken);
            assert!(told.contains(expected), "{expected}: {told}");
        }
    }
}
