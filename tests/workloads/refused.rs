//! States that a dump refuses by name: their programs go on as if nothing had happened.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::{
    Row,
    attributes::{ALLOW, BLOCK, DISPATCH, ON},
    kit::{Checkpoint, Verdict, wait_until},
};

pub const ROWS: &[Row] = &[
    ("thread_own_descriptors", thread_own_descriptors),
    ("thread_own_directory", thread_own_directory),
    ("thread_own_undo", thread_own_undo),
    ("thread_own_network", thread_own_network),
    ("time_namespace_for_children", time_namespace_for_children),
    ("caught_system_calls", caught_system_calls),
    ("pty_of_another_devpts", pty_of_another_devpts),
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

/// A terminal in a devpts of its own, which is mounted nowhere.
fn pty_of_another_devpts(checkpoint: &Checkpoint) -> Verdict {
    /// `FSCONFIG_CMD_CREATE` (`linux/mount.h`).
    const CREATE: i32 = 6;
    let context = sys!(syscall(libc::SYS_fsopen, c"devpts".as_ptr(), 0))?;
    let none = std::ptr::null::<i8>();
    sys!(syscall(libc::SYS_fsconfig, context, CREATE, none, none, 0))?;
    let mount = sys!(syscall(libc::SYS_fsmount, context, 0, 0))?;
    let mount = i32::try_from(mount).map_err(|error| error.to_string())?;
    sys!(openat(mount, c"ptmx".as_ptr(), libc::O_RDWR | libc::O_NOCTTY))?;
    sys!(syscall(libc::SYS_close, context))?;
    sys!(close(mount))?;
    checkpoint.wait();
    Ok(())
}

/// A thread that handles its system calls itself, as emulators of other systems do, and that
/// makes none while the dump would need it to.
fn caught_system_calls(checkpoint: &Checkpoint) -> Verdict {
    static SELECTOR: AtomicU8 = AtomicU8::new(ALLOW);
    static DONE: AtomicBool = AtomicBool::new(false);
    let thread = checkpoint.thread(|thread| {
        sys!(prctl(DISPATCH, ON, 0_u64, 0_u64, &raw const SELECTOR))?;
        thread.announce();
        SELECTOR.store(BLOCK, Ordering::Relaxed);
        while !DONE.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
        SELECTOR.store(ALLOW, Ordering::Relaxed);
        Ok(())
    })?;
    wait_until("the thread", || SELECTOR.load(Ordering::Relaxed) == BLOCK)?;
    checkpoint.wait();
    DONE.store(true, Ordering::Release);
    thread.join()
}
