//! States that a dump refuses by name: their programs go on as if nothing had happened.

use crate::{
    Row,
    kit::{Checkpoint, Verdict},
};

pub const ROWS: &[Row] = &[
    ("thread_own_descriptors", thread_own_descriptors),
    ("thread_own_directory", thread_own_directory),
    ("thread_own_undo", thread_own_undo),
    ("thread_own_network", thread_own_network),
    ("time_namespace_for_children", time_namespace_for_children),
    ("caught_system_calls", caught_system_calls),
];

/// A thread that leaves what it shared with the others.
fn unshared(checkpoint: &Checkpoint, flags: i32) -> Verdict {
    let thread = checkpoint.thread(move |thread| {
        sys!(unshare(flags))?;
        thread.wait();
        Ok(())
    })?;
    checkpoint.wait();
    thread.join()
}

fn thread_own_descriptors(checkpoint: &Checkpoint) -> Verdict {
    unshared(checkpoint, libc::CLONE_FILES)
}

fn thread_own_directory(checkpoint: &Checkpoint) -> Verdict {
    unshared(checkpoint, libc::CLONE_FS)
}

fn thread_own_undo(checkpoint: &Checkpoint) -> Verdict {
    unshared(checkpoint, libc::CLONE_SYSVSEM)
}

fn thread_own_network(checkpoint: &Checkpoint) -> Verdict {
    unshared(checkpoint, libc::CLONE_NEWNET)
}

fn time_namespace_for_children(checkpoint: &Checkpoint) -> Verdict {
    /// `CLONE_NEWTIME` (`linux/sched.h`).
    const NEW_TIME: i32 = 0x80;
    sys!(unshare(NEW_TIME))?;
    checkpoint.wait();
    Ok(())
}

/// A program that catches its system calls, as emulators of other systems do.
fn caught_system_calls(checkpoint: &Checkpoint) -> Verdict {
    /// `PR_SET_SYSCALL_USER_DISPATCH`, `PR_SYS_DISPATCH_ON` (`linux/prctl.h`).
    const DISPATCH: i32 = 59;
    const ON: u64 = 1;
    static SELECTOR: u8 = 0; // SYSCALL_DISPATCH_FILTER_ALLOW
    sys!(prctl(DISPATCH, ON, 0_u64, 0_u64, &raw const SELECTOR))?;
    checkpoint.wait();
    Ok(())
}
