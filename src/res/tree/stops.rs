//! Whether the parent of a stopped process was told so: it is, once, by `wait(2)`.

use std::collections::HashMap;

use nix::libc;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Begun, Collector};
use crate::{
    causes::tell as say,
    inject::{Answers, Buffer, CallId, Script, Task},
    res::task,
    units::{HostPid, NsPid, PidMap},
};

/// `P_PID` (`linux/wait.h`).
const P_PID: i32 = 1;

/// `CLD_CONTINUED` (`asm-generic/siginfo.h`).
const CLD_CONTINUED: i32 = 6;

/// The begin of a `siginfo_t` of `SIGCHLD` (`asm-generic/siginfo.h`).
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

/// Bytes of a `siginfo_t`.
const INFO_BYTES: usize = 128;

/// What a parent has not been told of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Untold {
    /// Nothing.
    Nothing,
    /// That it has stopped.
    Stop,
    /// That it goes on.
    Continuation,
}

/// What the processes of a tree were not told.
#[derive(Debug)]
struct Stops {
    pids: PidMap,
    /// Children of each process.
    children: HashMap<HostPid, Vec<HostPid>>,
    /// What the process at hand was asked of its children.
    asked: Vec<(HostPid, Asked)>,
    /// What parents were not told of these.
    untold: HashMap<HostPid, Untold>,
}

/// Begins with the processes that live.
///
/// # Errors
/// None.
pub(super) fn collector(tasks: &[Task], pids: &PidMap) -> Begun<dyn Collector> {
    let mut stops = Stops {
        pids: pids.clone(),
        children: HashMap::new(),
        asked: Vec::new(),
        untold: HashMap::new(),
    };
    for task in tasks.iter().filter(|task| !task.is_zombie()) {
        stops.children.entry(task.parent).or_default().push(task.pid);
    }
    Ok(Box::new(stops))
}

impl Collector for Stops {
    fn ask(&mut self, of: task::Process, script: &mut Script) {
        for child in self.children.get(&of.pid).into_iter().flatten() {
            self.asked.push((*child, ask(self.pids.ns(*child), script)));
        }
    }

    /// Notes what the process was not told of its children, and whether its own parent was
    /// told that it has stopped.
    fn collect(&mut self, of: &task::Stopped<'_>, answers: &Answers, images: &mut task::Images) {
        for (child, asked) in std::mem::take(&mut self.asked) {
            if let Some(untold) = collect(asked, answers) {
                self.untold.insert(child, untold);
            }
        }
        let pid = of.of.pid;
        let untold = self.untold.get(&pid).copied();
        if untold == Some(Untold::Continuation) {
            let message = format!(
                "process {pid} was stopped and goes on, which its parent was not told yet \
                 (WCONTINUED): the parent of the restored one will not be"
            );
            say(log::Level::Warn, &message);
        }
        if of.stopped_by != 0 {
            images.core.rcriu_stop_told = untold.map(|untold| untold != Untold::Stop);
        }
    }
}

/// The questions about a child to its parent.
#[derive(Clone, Copy, Debug)]
struct Asked {
    call: CallId,
    info: Buffer,
}

/// Adds the question, which changes nothing.
fn ask(child: NsPid, script: &mut Script) -> Asked {
    let info = script.space(INFO_BYTES);
    let flags = libc::WSTOPPED | libc::WCONTINUED | libc::WNOWAIT | libc::WNOHANG | libc::__WALL;
    let arguments = [P_PID.into(), child.into(), info.into(), flags.into()];
    Asked { call: script.attempt(libc::SYS_waitid, &arguments), info }
}

/// Returns what the parent has not been told; `None` if it cannot say.
fn collect(asked: Asked, answers: &Answers) -> Option<Untold> {
    answers.result(asked.call).ok()?;
    let info: Info = answers.value(asked.info);
    Some(match (info.pid, info.code) {
        (0, _) => Untold::Nothing,
        (_, CLD_CONTINUED) => Untold::Continuation,
        _ => Untold::Stop,
    })
}

/// Adds the call by which a parent is told that a child has stopped.
pub fn tell(child: NsPid, script: &mut Script) {
    let flags = libc::WSTOPPED | libc::WNOHANG | libc::__WALL;
    let arguments = [P_PID.into(), child.into(), 0.into(), flags.into()];
    script.attempt(libc::SYS_waitid, &arguments);
}

/// Adds the call that takes away the signals of children.
pub fn forget_signal(signal: u32, script: &mut Script) {
    let bit = 1_u64.checked_shl(signal.wrapping_sub(1)).unwrap_or(0);
    let set = script.bytes(&bit.to_le_bytes());
    let now = script.bytes(&[0; 16]);
    let arguments = [set.into(), 0.into(), now.into(), 8.into()];
    script.attempt(libc::SYS_rt_sigtimedwait, &arguments);
}
