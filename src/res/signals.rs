//! Signal handlers and signals that wait to be delivered.

use nix::{errno::Errno, libc};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    image::proto,
    inject::{Answers, Buffer, Script},
    sys::ptrace::SIGINFO_BYTES,
    units::HostPid,
};

/// Signals on Linux: 1 to 64.
const SIGNALS: i32 = 64;

/// Bytes of a kernel signal set.
const SIGSET_BYTES: i32 = 8;

/// `struct kernel_sigaction` (`include/linux/signal_types.h`) on x86-64.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Action {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

const _: () = assert!(size_of::<Action>() == 32);

/// The signals whose handlers can be set, in the order of the images.
fn settable() -> impl Iterator<Item = i32> {
    (1..=SIGNALS).filter(|signal| !matches!(*signal, libc::SIGKILL | libc::SIGSTOP))
}

/// What a process was asked.
#[derive(Clone, Debug)]
pub struct Asked {
    actions: Vec<Buffer>,
}

/// Adds the questions.
pub fn ask(script: &mut Script) -> Asked {
    let ask_one = |signal: i32| {
        let buffer = script.space(size_of::<Action>());
        script.call(
            "read the action of a signal",
            libc::SYS_rt_sigaction,
            &[signal.into(), 0.into(), buffer.into(), SIGSET_BYTES.into()],
        );
        buffer
    };
    Asked { actions: settable().map(ask_one).collect() }
}

/// Returns what an image says of the handlers of a process.
pub fn collect(asked: &Asked, answers: &Answers) -> Vec<proto::SaEntry> {
    let entry = |buffer: &Buffer| {
        let action: Action = answers.value(*buffer);
        proto::SaEntry {
            sigaction: action.handler,
            flags: action.flags,
            restorer: action.restorer,
            mask: action.mask,
            compat_sigaction: Some(false),
            mask_extended: None,
        }
    };
    asked.actions.iter().map(entry).collect()
}

/// Adds the calls that set the handlers of a process, all of which are at their
/// defaults before.
pub fn apply(entries: &[proto::SaEntry], script: &mut Script) {
    for (signal, entry) in settable().zip(entries) {
        let action = Action {
            handler: entry.sigaction,
            flags: entry.flags,
            restorer: entry.restorer,
            mask: entry.mask,
        };
        if action.as_bytes().iter().all(|byte| *byte == 0) {
            continue;
        }
        let buffer = script.bytes(action.as_bytes());
        script.call(
            format!("set the action of signal {signal}"),
            libc::SYS_rt_sigaction,
            &[signal.into(), buffer.into(), 0.into(), SIGSET_BYTES.into()],
        );
    }
}

/// Returns what an image says of a queue of signals.
pub fn queue(signals: Vec<Vec<u8>>) -> proto::SignalQueueEntry {
    let signals = signals.into_iter().map(|siginfo| proto::SiginfoEntry { siginfo }).collect();
    proto::SignalQueueEntry { signals }
}

/// Adds the calls by which a process (`thread` is `None`) or a thread puts signals
/// into its own queue.
///
/// # Errors
/// `EINVAL` for an entry that is not a `siginfo_t`.
pub fn requeue(
    queue: &proto::SignalQueueEntry,
    pid: HostPid,
    thread: Option<HostPid>,
    script: &mut Script,
) -> Result<(), Errno> {
    for entry in &queue.signals {
        let number = entry.siginfo.first_chunk().filter(|_| entry.siginfo.len() == SIGINFO_BYTES);
        let signal = i32::from_le_bytes(*number.ok_or(Errno::EINVAL)?);
        let info = script.bytes(&entry.siginfo);
        let what = format!("queue signal {signal}");
        match thread {
            None => script.call(
                what,
                libc::SYS_rt_sigqueueinfo,
                &[pid.0.into(), signal.into(), info.into()],
            ),
            Some(tid) => script.call(
                what,
                libc::SYS_rt_tgsigqueueinfo,
                &[pid.0.into(), tid.0.into(), signal.into(), info.into()],
            ),
        };
    }
    Ok(())
}
