//! Cancellation: signals set a flag, so that rcriu can undo its work before it exits.
#![expect(unsafe_code, reason = "handlers of signals")]

use std::sync::atomic::{AtomicBool, Ordering};

use nix::{
    libc,
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
};

/// The signals that ask rcriu to stop.
pub const REQUESTS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

static CANCELLED: AtomicBool = AtomicBool::new(false);

extern "C" fn cancel(_signal: libc::c_int) {
    CANCELLED.store(true, Ordering::Relaxed);
}

/// Makes `SIGINT`, `SIGTERM` and `SIGHUP` set a flag instead of killing this process. `SIGINT` and
/// `SIGHUP` stay ignored if they were ignored when it started, as with nohup(1).
///
/// A signal interrupts a waiting system call once, which returns `EINTR`.
pub fn install() -> nix::Result<()> {
    for signal in REQUESTS {
        if signal == Signal::SIGTERM || !is_ignored(signal)? {
            let handler = SigHandler::Handler(cancel);
            let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
            // SAFETY: the handler only stores to an atomic, which is allowed in
            // a handler at any point of the program.
            unsafe { sigaction(signal, &action) }?;
        }
    }
    Ok(())
}

/// Whether this process was asked to stop since [`install`].
pub fn is_cancelled() -> bool {
    CANCELLED.load(Ordering::Relaxed)
}

pub(super) fn is_ignored(signal: Signal) -> nix::Result<bool> {
    // SAFETY: all bytes zero are a sigaction; the kernel overwrites it.
    let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action nothing changes; `now` outlives the call.
    let result = unsafe { libc::sigaction(signal as libc::c_int, std::ptr::null(), &raw mut now) };
    nix::errno::Errno::result(result)?;
    Ok(now.sa_sigaction == libc::SIG_IGN)
}
