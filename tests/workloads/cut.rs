//! Memory that changes all the time in a known order, so that an image that is not of one moment
//! shows after the restore.

use std::ptr;

use crate::{
    Row,
    busy::until_go,
    kit::{Area, Checkpoint, PAGE, Thread, Verdict, gettid, same},
};

pub const ROWS: &[Row] = &[("ordered_writes", ordered_writes), ("passing_memory", passing_memory)];

/// Pages of each memory that a thread writes again and again: more than are copied at once.
const PAGES: usize = 1024;

/// Threads of each process that do so.
const WRITERS: usize = 2;

/// Pages of memory that does not stay.
const PASSING_PAGES: usize = 128;

/// Three processes, whose threads each write one page after the other, in private memory and then in
/// memory that all share. Before it writes a page, a thread checks that it holds what the thread
/// wrote there a round before.
fn ordered_writes(checkpoint: &Checkpoint) -> Verdict {
    let shared = Area::shared(3 * WRITERS * PAGES)?;
    let part = |process: usize| shared.part(process * WRITERS * PAGES, WRITERS * PAGES);
    let children = [
        checkpoint.fork(|child| write_in_order(child, part(1)))?,
        checkpoint.fork(|child| write_in_order(child, part(2)))?,
    ];
    let result = write_in_order(checkpoint, part(0));
    children.into_iter().try_for_each(crate::kit::Child::join)?;
    result
}

fn write_in_order(checkpoint: &Checkpoint, shared: Area) -> Verdict {
    let mut threads = Vec::new();
    for number in 0..WRITERS {
        let (private, shared) = (Area::private(PAGES)?, shared.part(number * PAGES, PAGES));
        threads.push(checkpoint.thread(move |thread| {
            let mut written = 0_u64;
            until_go(thread, || {
                let (round, page) = (written / PAGES as u64, (written % PAGES as u64) as usize);
                let word = page * (PAGE / 8) + page % 8;
                for (what, area) in [("private memory", private), ("shared memory", shared)] {
                    same(what, round, area.get(word))?;
                    area.set(word, round + 1);
                }
                written += 1;
                Ok(())
            })?;
            same("pages are written", true, written > 0)
        })?);
    }
    checkpoint.wait();
    threads.into_iter().try_for_each(Thread::join)
}

/// Threads that make memory and remove it, move it, drop its pages, and fork processes that look at it
/// or execute a program. Another process has no children, whatever a dump does.
fn passing_memory(checkpoint: &Checkpoint) -> Verdict {
    let childless = checkpoint.fork(|child| {
        until_go(child, || {
            // SAFETY: the status may be null.
            let result = unsafe { libc::waitpid(-1, ptr::null_mut(), libc::WNOHANG) };
            let error = std::io::Error::last_os_error().raw_os_error();
            same("wait without children", (-1, Some(libc::ECHILD)), (result, error))
        })
    })?;
    let kept = Area::private(PASSING_PAGES)?;
    kept.fill(1);
    let bodies: [fn(u64, Area) -> Verdict; 5] = [come_and_go, drop_pages, shift, fork, execute];
    let mut threads = Vec::new();
    for body in bodies {
        threads.push(checkpoint.thread(move |thread| {
            let mut seed = u64::from(gettid().unsigned_abs());
            until_go(thread, || {
                seed += 1;
                body(seed, kept)
            })
        })?);
    }
    checkpoint.wait();
    threads.into_iter().try_for_each(Thread::join)?;
    kept.verify("memory that stays", 1)?;
    childless.join()
}

fn come_and_go(seed: u64, _: Area) -> Verdict {
    let area = Area::private(PASSING_PAGES)?;
    area.fill(seed);
    area.verify("new memory", seed)?;
    area.unmap()
}

fn drop_pages(seed: u64, _: Area) -> Verdict {
    let area = Area::private(PASSING_PAGES)?;
    area.fill(seed);
    let (first, rest) = (area.part(0, 8), area.part(8, PASSING_PAGES - 8));
    first.advise(libc::MADV_DONTNEED)?;
    for word in 0..first.bytes / 8 {
        same("a page that was dropped", 0, first.get(word))?;
    }
    same("a page beside it", area.get(8 * PAGE / 8), rest.get(0))?;
    area.unmap()
}

fn shift(seed: u64, _: Area) -> Verdict {
    let area = Area::private(PASSING_PAGES)?;
    area.fill(seed);
    let to = Area::private(PASSING_PAGES)?;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    sys!(mremap(area.at.cast(), area.bytes, area.bytes, flags, to.at))?;
    to.verify("moved memory", seed)?;
    to.unmap()
}

/// Has a child run `body`, which makes nothing but system calls and looks at memory.
fn child(body: impl FnOnce() -> bool) -> Verdict {
    let pid = sys!(fork())?;
    if pid == 0 {
        // SAFETY: nothing of this process needs to be unwound.
        unsafe { libc::_exit(i32::from(!body())) };
    }
    let mut status = 0;
    while let Err(error) = sys!(waitpid(pid, &raw mut status, 0)) {
        if std::io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
    same("the end of a child", 0, status)
}

fn fork(_: u64, kept: Area) -> Verdict {
    child(|| kept.verify("inherited memory", 1).is_ok())
}

fn execute(_: u64, _: Area) -> Verdict {
    child(|| {
        let words = [c"true".as_ptr(), ptr::null()];
        // SAFETY: the words are terminated and outlive the call.
        unsafe { libc::execv(c"/bin/true".as_ptr(), words.as_ptr()) };
        false
    })
}
