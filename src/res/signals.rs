//! Queues of pending signals, of a process or of a thread.

use nix::libc;

use super::{ResError, Result};
use crate::{
    image::proto,
    inject::Script,
    sys::ptrace::SIGINFO_BYTES,
    units::{LocalPid, NsPid},
};

/// Builds the image entry for a queue of `siginfo_t` structures.
pub fn queue(signals: Vec<Vec<u8>>) -> proto::SignalQueueEntry {
    let signals = signals.into_iter().map(|siginfo| proto::SiginfoEntry { siginfo }).collect();
    proto::SignalQueueEntry { signals }
}

/// Adds the calls by which a process (if `thread` is `None`) or a thread queues signals for
/// itself. `of` is its number in the images.
///
/// # Errors
/// [`ResError::Image`] for an entry that is not a `siginfo_t`.
pub fn requeue(
    queue: &proto::SignalQueueEntry,
    of: NsPid,
    pid: LocalPid,
    thread: Option<LocalPid>,
    script: &mut Script,
) -> Result<()> {
    let malformed =
        || ResError::Image { pid: of, problem: "a queued signal is not a siginfo_t".into() };
    for entry in &queue.signals {
        let number = entry.siginfo.first_chunk().filter(|_| entry.siginfo.len() == SIGINFO_BYTES);
        let signal = i32::from_le_bytes(*number.ok_or_else(malformed)?);
        let info = script.bytes(&entry.siginfo);
        let what = format!("queue signal {signal}");
        match thread {
            None => script.call(
                what,
                libc::SYS_rt_sigqueueinfo,
                &[pid.into(), signal.into(), info.into()],
            ),
            Some(tid) => script.call(
                what,
                libc::SYS_rt_tgsigqueueinfo,
                &[pid.into(), tid.into(), signal.into(), info.into()],
            ),
        };
    }
    Ok(())
}
