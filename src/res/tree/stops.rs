//! Whether the parent of a stopped process has been notified: `wait(2)` reports a stop once.

use std::{collections::HashMap, iter};

use nix::libc;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Begun, Child, Collector, Restorer};
use crate::{
    causes::tell as say,
    image::{proto::CoreEntry, tree::exit_signal},
    inject::{Answers, Buffer, CallId, Script, Task, living},
    res::task,
    units::{HostPid, LocalPid, PidMap},
};

/// `P_PID` (`linux/wait.h`).
const P_PID: i32 = 1;

/// `CLD_CONTINUED` (`asm-generic/siginfo.h`).
const CLD_CONTINUED: i32 = 6;

/// The first fields of a `siginfo_t` for `SIGCHLD` (`asm-generic/siginfo.h`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Info {
    signal: i32,
    errno: i32,
    code: i32,
    padding: i32,
    pid: i32,
    uid: u32,
    status: i32,
}

const _: () = assert!(size_of::<Info>() == 28);

/// Bytes reserved for each child: `waitid(2)` writes those fields of a `siginfo_t` one by one, up to
/// the status (`kernel/exit.c`), and no more. If the calls are made one by one, all have to fit on the
/// stack of the process, which may have hundreds of children.
const INFO_BYTES: usize = size_of::<Info>().next_multiple_of(align_of::<u64>());

/// A state change of a child that `wait(2)` has not reported to its parent yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unreported {
    /// Nothing.
    Nothing,
    /// The child has stopped.
    Stop,
    /// The child has continued.
    Continuation,
}

/// The notifications that parents have not received.
#[derive(Debug)]
struct Stops {
    pids: PidMap,
    /// The live children of each process.
    children: HashMap<HostPid, Vec<HostPid>>,
    /// The calls about the children of the current process.
    asked: Vec<(HostPid, Asked)>,
    /// The result, by child.
    unreported: HashMap<HostPid, Unreported>,
}

/// Starts with the processes that are alive.
pub(super) fn collector(tasks: &[Task], pids: &PidMap) -> Begun<dyn Collector> {
    let mut stops = Stops {
        pids: pids.clone(),
        children: HashMap::new(),
        asked: Vec::new(),
        unreported: HashMap::new(),
    };
    for task in living(tasks) {
        stops.children.entry(task.parent).or_default().push(task.pid);
    }
    Ok(Box::new(stops))
}

impl Collector for Stops {
    fn ask(&mut self, of: task::Process, script: &mut Script) {
        for child in self.children.get(&of.pid).into_iter().flatten() {
            let number = self.pids.local(self.pids.ns(*child), self.pids.ns(of.pid));
            self.asked.extend(number.map(|number| (*child, ask(number, script))));
        }
    }

    /// Records what the process has not been notified of, and whether its own parent has been
    /// notified that it stopped.
    fn collect(&mut self, of: &task::Stopped<'_>, answers: &Answers, images: &mut task::Images) {
        for (child, asked) in std::mem::take(&mut self.asked) {
            if let Some(unreported) = collect(asked, answers) {
                self.unreported.insert(child, unreported);
            }
        }
        let pid = of.of.pid;
        let unreported = self.unreported.get(&pid).copied();
        if unreported == Some(Unreported::Continuation) {
            let message = format!(
                "process {pid} was stopped and has continued, but its parent has not waited for that \
                 yet (WCONTINUED): after a restore, wait(2) will not report it"
            );
            say(log::Level::Warn, &message);
        }
        if of.stopped_by != 0 {
            images.core.rcriu_stop_told =
                unreported.map(|unreported| unreported != Unreported::Stop);
        }
    }
}

/// A call about a child in its parent.
#[derive(Clone, Copy, Debug)]
struct Asked {
    call: CallId,
    info: Buffer,
}

/// Adds the call, which only peeks (`WNOWAIT`).
fn ask(child: LocalPid, script: &mut Script) -> Asked {
    let info = script.space(INFO_BYTES);
    let flags = libc::WSTOPPED | libc::WCONTINUED | libc::WNOWAIT | libc::WNOHANG | libc::__WALL;
    let arguments = [P_PID.into(), child.into(), info.into(), flags.into()];
    Asked { call: script.attempt(libc::SYS_waitid, &arguments), info }
}

/// Returns what the parent has not been notified of; `None` if `waitid(2)` failed.
fn collect(asked: Asked, answers: &Answers) -> Option<Unreported> {
    answers.result(asked.call).ok()?;
    let info: Info = answers.value(asked.info);
    Some(match (info.pid, info.code) {
        (0, _) => Unreported::Nothing,
        (_, CLD_CONTINUED) => Unreported::Continuation,
        _ => Unreported::Stop,
    })
}

/// Restores what each parent has learned of the ends and stops of its children.
#[derive(Debug)]
struct Reports;

/// Reads nothing: the entries are in the cores.
pub(super) fn restorer() -> Begun<dyn Restorer> {
    Ok(Box::new(Reports))
}

impl Restorer for Reports {
    /// Removes the signals that reported the ends. The parent has had those that it was to have
    /// before the dump.
    fn children_ended(&self, children: &[Child<'_>], script: &mut Script) {
        for signal in signals(children) {
            forget_signal(signal, script);
        }
    }

    /// Consumes the notifications of stops that the parent had received before the dump, and removes
    /// the signals, except those that were pending.
    fn children_stopped(&self, parent: &CoreEntry, children: &[Child<'_>], script: &mut Script) {
        for child in children {
            let core = child.core.tc.as_ref();
            let was_stopped = core.is_some_and(|core| core.task_state == task::STOPPED);
            // Images of CRIU do not record it; most parents wait at once.
            if !was_stopped || core.and_then(|core| core.rcriu_stop_told) != Some(false) {
                child.number.into_iter().for_each(|number| tell(number, script));
            }
        }
        let pending = parent.tc.as_ref().and_then(|core| core.signals_s.as_ref());
        let was_pending = |signal: u32| {
            let signal = signal.to_le_bytes();
            pending.is_some_and(|queue| {
                queue.signals.iter().any(|entry| entry.siginfo.starts_with(&signal))
            })
        };
        for signal in signals(children).filter(|signal| !was_pending(*signal)) {
            forget_signal(signal, script);
        }
    }
}

/// Returns the signals that may report the ends or stops of children.
fn signals(children: &[Child<'_>]) -> impl Iterator<Item = u32> {
    let own = children.iter().map(|child| exit_signal(child.core));
    iter::once(libc::SIGCHLD.cast_unsigned()).chain(own).filter(|signal| *signal != 0)
}

/// Adds the call by which a parent consumes the notification that a child has stopped.
fn tell(child: LocalPid, script: &mut Script) {
    let flags = libc::WSTOPPED | libc::WNOHANG | libc::__WALL;
    let arguments = [P_PID.into(), child.into(), 0.into(), flags.into()];
    script.attempt(libc::SYS_waitid, &arguments);
}

/// Adds the call that consumes a pending signal, such as a child's `SIGCHLD`.
fn forget_signal(signal: u32, script: &mut Script) {
    let bit = 1_u64.checked_shl(signal.wrapping_sub(1)).unwrap_or(0);
    let set = script.bytes(&bit.to_le_bytes());
    let now = script.bytes(&[0; 16]);
    let arguments = [set.into(), 0.into(), now.into(), 8.into()];
    script.attempt(libc::SYS_rt_sigtimedwait, &arguments);
}
