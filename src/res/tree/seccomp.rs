//! Seccomp filters of threads (`seccomp(2)`).
//!
//! Filters run from the newest to the oldest. The kernel does not tell which threads share them:
//! threads that inherited them from the thread that created them, or got them by
//! `SECCOMP_FILTER_FLAG_TSYNC`, have the same ones, and others may have equal ones. It matters
//! only to a later `SECCOMP_FILTER_FLAG_TSYNC`, which fails if the filters of the other threads
//! are not the oldest ones of the caller's. So filters that all threads of a process begin with
//! are shared by them after a restore, as CRIU does if the threads have no others.

use std::collections::HashMap;

use nix::{errno::Errno, libc};

use super::{Begun, Collector, Plan, Restorer};
use crate::{
    causes::tell,
    image::{
        self, Kind, SnapshotWriter,
        proto::{CoreEntry, SeccompEntry, SeccompFilter, SeccompMode},
        seccomp::{Confinement, flags, of_process},
    },
    inject::{Script, Task},
    res::{ResError, Result, calls::Calls, seccomp, thread},
    sys::ptrace,
    units::{HostPid, NsPid},
};

/// `SECCOMP_SET_MODE_FILTER`, `SECCOMP_MODE_STRICT` (`linux/seccomp.h`).
const SET_MODE_FILTER: u32 = 1;
const MODE_STRICT: u32 = 1;

/// Bytes of `struct sock_fprog`, and where its pointer is (`linux/filter.h`).
const PROGRAM_BYTES: usize = 16;
const POINTER_AT: usize = 8;

/// `CAP_SYS_ADMIN` (`linux/capability.h`).
const SYS_ADMIN: u64 = 1 << 21;

/// Reads the filters of all threads of a stopped tree.
///
/// # Errors
/// The filters of a thread cannot be read.
pub(super) fn collector(tasks: &[Task]) -> Begun<dyn Collector> {
    let mut filters = Filters::default();
    for task in tasks {
        filters.enter_task(task)?;
    }
    Ok(Box::new(filters))
}

/// The filters of a tree.
#[derive(Debug, Default)]
struct Filters {
    /// The image.
    entry: SeccompEntry,
    /// The number of the oldest filter of each list that is in the image.
    known: HashMap<Vec<(Vec<u8>, u32)>, u32>,
    /// The same for each thread that has filters; `None` for a thread that has those of its
    /// leader.
    threads: HashMap<HostPid, Option<u32>>,
}

impl Filters {
    fn enter_task(&mut self, task: &Task) -> Result<()> {
        let mut of_threads = Vec::with_capacity(task.threads.len());
        for thread in &task.threads {
            let tid = thread.tid;
            let found = match seccomp::filters(tid) {
                // A dumper without the privilege has refused threads with filters already.
                Err(Errno::EACCES) => Vec::new(),
                found => found.map_err(|source| ResError::Thread {
                    tid,
                    step: "read the seccomp filters of",
                    source,
                })?,
            };
            of_threads.push(found);
        }
        let Some((of_leader, of_others)) = of_threads.split_first_mut() else { return Ok(()) };
        let all_equal = !task.is_leaderless()
            && !of_leader.is_empty()
            && of_others.iter().all(|filters| filters == of_leader);
        if all_equal {
            for filter in of_leader {
                filter.flags = Some(filter.flags.unwrap_or(0) | flags::SHARED);
            }
        }
        for (position, (thread, filters)) in task.threads.iter().zip(of_threads).enumerate() {
            if all_equal && position > 0 {
                self.threads.insert(thread.tid, None);
            } else if let Some(first) = self.enter(filters) {
                self.threads.insert(thread.tid, Some(first));
            }
        }
        Ok(())
    }

    /// Enters a list of filters into the image, and returns the number of the oldest one.
    fn enter(&mut self, filters: Vec<SeccompFilter>) -> Option<u32> {
        let key = |filter: &SeccompFilter| (filter.filter.clone(), filter.flags.unwrap_or(0));
        let key: Vec<_> = filters.iter().map(key).collect();
        if let Some(first) = self.known.get(&key) {
            return Some(*first);
        }
        let mut newer = None;
        for filter in filters.into_iter().rev() {
            let number = u32::try_from(self.entry.seccomp_filters.len()).expect("fits in memory");
            self.entry.seccomp_filters.push(SeccompFilter { prev: newer, ..filter });
            newer = Some(number);
        }
        self.known.extend(newer.map(|first| (key, first)));
        newer
    }
}

impl Collector for Filters {
    fn thread(&mut self, of: thread::Thread, core: &mut CoreEntry) -> Result<()> {
        let own = thread::own(core);
        match self.threads.get(&of.tid) {
            Some(Some(first)) => own.seccomp_filter = Some(*first),
            Some(None) => own.seccomp_mode = Some(SeccompMode::Disabled.into()),
            None => {}
        }
        Ok(())
    }

    fn write(&self, images: &SnapshotWriter) -> image::Result<()> {
        if self.entry.seccomp_filters.is_empty() {
            return Ok(());
        }
        images.write(Kind::Seccomp, 0, std::slice::from_ref(&self.entry))
    }
}

/// Reads the filters of all threads.
///
/// # Errors
/// A malformed image; the restorer may not suspend filters.
pub(super) fn restorer(plan: &Plan<'_>) -> Begun<dyn Restorer> {
    let entry = plan.images.message_if_any::<SeccompEntry>(Kind::Seccomp, 0)?;
    let mut confined = Confined::default();
    for process in &plan.processes {
        let cores: Vec<_> = process.iter().map(|(_, core)| *core).collect();
        let found = of_process(entry.as_ref(), &cores)
            .map_err(|problem| ResError::Image { pid: process[0].0, problem })?;
        confined.enter(process, &found);
    }
    if let Some(tid) = confined.threads.keys().min() {
        let own = &plan.own.status;
        if own.cap_effective & SYS_ADMIN == 0 || own.seccomp != 0 {
            return Err(ResError::Image {
                pid: *tid,
                problem: "its system calls were confined by seccomp(2), which this rcriu may not \
                          suspend\nhelp: run rcriu with CAP_SYS_ADMIN outside of user namespaces, and \
                          without a seccomp filter of its own"
                    .to_owned(),
            });
        }
    }
    Ok(Box::new(confined))
}

/// A restriction that a thread puts on itself.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    /// Strict mode.
    Strict,
    /// This filter, with these flags.
    Filter(Vec<u8>, u32),
}

/// The threads whose system calls were confined.
#[derive(Debug, Default)]
struct Confined {
    threads: HashMap<NsPid, Vec<Step>>,
}

impl Confined {
    /// Plans the restrictions of the threads of a process, the leader first.
    fn enter(&mut self, process: &[(NsPid, &CoreEntry)], found: &[Confinement<'_>]) {
        let filters = |of: &Confinement<'_>| match of {
            Confinement::Filters(filters) => filters.iter().map(|filter| step(filter)).collect(),
            Confinement::Strict | Confinement::None => Vec::new(),
        };
        let each: Vec<Vec<Step>> = found.iter().map(filters).collect();
        let in_common =
            |a: &[Step], b: &[Step]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        let shared = each.iter().map(|other| in_common(&each[0], other)).min().unwrap_or(0);
        let mut seen: Vec<&[Step]> = Vec::new();
        let mut parted = false;
        for (((tid, _), of), filters) in process.iter().zip(found).zip(&each) {
            let mut steps = match of {
                Confinement::Strict => vec![Step::Strict],
                _ => filters.clone(),
            };
            let own = &filters[shared..];
            parted |= seen.iter().any(|other| in_common(own, other) > 0);
            if !own.is_empty() && !seen.contains(&own) {
                seen.push(own);
            }
            if *tid == process[0].0 {
                for step in &mut steps[..shared] {
                    if let Step::Filter(_, set) = step
                        && process.len() > 1
                    {
                        *set |= flags::SHARED;
                    }
                }
            } else {
                steps.drain(..shared);
            }
            if of != &Confinement::None {
                self.threads.insert(*tid, steps);
            }
        }
        if parted {
            let message = format!(
                "process {}: some of its threads, but not all, have equal seccomp filters, which become \
                 separate ones: SECCOMP_FILTER_FLAG_TSYNC fails in these threads",
                process[0].0
            );
            tell(log::Level::Warn, &message);
        }
    }
}

/// Returns what installs a filter.
fn step(filter: &SeccompFilter) -> Step {
    // The attributes of the thread include the effect of the filter on speculation.
    let flags = filter.flags.unwrap_or(0) & flags::LOG | flags::SPEC_ALLOW;
    Step::Filter(filter.filter.clone(), flags)
}

impl Restorer for Confined {
    fn trace_options(&self) -> i32 {
        if self.threads.is_empty() { 0 } else { ptrace::options::SUSPEND_SECCOMP }
    }

    fn set(&self, of: &thread::Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        for step in self.threads.get(&of.tid).into_iter().flatten() {
            // One filter at a time: all of them may be larger than the scratch memory.
            let mut script = Script::new();
            let call = match step {
                Step::Strict => script.call(
                    "enter the strict mode of seccomp",
                    libc::SYS_prctl,
                    &[libc::PR_SET_SECCOMP.into(), MODE_STRICT.into()],
                ),
                Step::Filter(program, flags) => {
                    let bytes = script.bytes(program);
                    let instructions = program.len() / image::seccomp::INSTRUCTION_BYTES;
                    let mut head = [0; PROGRAM_BYTES];
                    let count = u16::try_from(instructions).expect("it was checked");
                    head[..size_of::<u16>()].copy_from_slice(&count.to_le_bytes());
                    let head = script.bytes(&head);
                    script.point(head, POINTER_AT, bytes);
                    script.call(
                        "install a seccomp filter",
                        libc::SYS_seccomp,
                        &[SET_MODE_FILTER.into(), (*flags).into(), head.into()],
                    )
                }
            };
            let answers = calls.make(&script)?;
            // It is the thread that cannot share the filter.
            match answers.result(call) {
                Ok(0) => {}
                other => {
                    let problem = format!("its seccomp filters cannot be shared ({other:?})");
                    return Err(ResError::Image { pid: of.pid, problem });
                }
            }
        }
        Ok(())
    }
}
