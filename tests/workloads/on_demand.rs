//! What programs do with memory that may be missing still.

use std::{
    ffi::CString,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{
    Row,
    kit::{Area, Checkpoint, PAGE, Verdict, pattern, same},
};

pub const ROWS: &[Row] = &[
    ("on_demand", on_demand),
    ("on_demand_moved", on_demand_moved),
    ("on_demand_forked", on_demand_forked),
    ("on_demand_threads", on_demand_threads),
];

/// More than what is read ahead at a time, so that most is missing.
const PAGES: usize = 4096;

fn filled(seed: u64) -> Result<Area, String> {
    let area = Area::apart(PAGES)?;
    area.fill(seed);
    Ok(area)
}

/// Compares the pages of a part of what `filled` has made.
fn verify(what: &str, area: Area, (first, pages): (usize, usize), seed: u64) -> Verdict {
    for word in 0..pages * PAGE / 8 {
        // The words of a page depend on its place in the area that was filled.
        let (expected, found) = (pattern(seed, first * PAGE / 8 + word), area.get(word));
        ensure!(expected == found, "{what}: word {word}: expected {expected:#x}, found {found:#x}");
    }
    Ok(())
}

/// System calls, advice, and new mappings.
fn on_demand(checkpoint: &Checkpoint) -> Verdict {
    let (written, read, dropped) = (filled(1)?, filled(2)?, filled(3)?);
    let (replaced, protected, sparse) = (filled(4)?, filled(5)?, Area::apart(PAGES)?);
    for page in (0..PAGES).step_by(5) {
        sparse.page(page).fill(page as u64);
    }
    checkpoint.wait();
    // The kernel reads and writes missing pages.
    let mut ends = [0; 2];
    sys!(pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC))?;
    let middle = written.part(PAGES / 2, 4);
    same(
        "bytes written",
        middle.bytes as isize,
        sys!(write(ends[1], middle.at.cast(), middle.bytes))?,
    )?;
    let target = read.part(PAGES / 3, 4);
    same(
        "bytes read",
        target.bytes as isize,
        sys!(read(ends[0], target.at.cast(), target.bytes))?,
    )?;
    verify("what was read", target, (PAGES / 2, 4), 1)?;
    verify("before it", read, (0, PAGES / 3), 2)?;
    verify("after it", read.part(PAGES / 3 + 4, 8), (PAGES / 3 + 4, 8), 2)?;
    // Part of a missing page is overwritten.
    let word = (PAGES - 9) * PAGE / 8;
    written.set(word, 4711);
    same("word", 4711, written.get(word))?;
    verify("before the word", written.part(PAGES - 10, 1), (PAGES - 10, 1), 1)?;
    dropped.part(16, 512).advise(libc::MADV_DONTNEED)?;
    dropped.part(16, 512).verify_zero("dropped")?;
    verify("before what was dropped", dropped, (0, 16), 3)?;
    verify("after what was dropped", dropped.part(528, 64), (528, 64), 3)?;
    replaced.part(64, 256).unmap()?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let hole = replaced.part(64, 256);
    sys!(mmap(hole.at.cast(), hole.bytes, access, flags, -1, 0))?;
    hole.verify_zero("mapped anew")?;
    verify("beside it", replaced.part(320, 64), (320, 64), 4)?;
    protected.part(100, 100).protect(libc::PROT_READ)?;
    protected.part(300, 100).protect(libc::PROT_NONE)?;
    verify("read only", protected.part(90, 120), (90, 120), 5)?;
    protected.part(300, 100).protect(access)?;
    verify("accessible again", protected.part(290, 120), (290, 120), 5)?;
    for page in 0..PAGES {
        match page % 5 {
            0 => sparse.page(page).verify("page with data", page as u64)?,
            _ => sparse.page(page).verify_zero("page without")?,
        }
    }
    verify("all", written, (0, PAGES - 9), 1)
}

/// `mremap(2)` in its forms.
fn on_demand_moved(checkpoint: &Checkpoint) -> Verdict {
    let (moved, halves, grown) = (filled(1)?, filled(2)?, filled(3)?);
    let (left, overwritten) = (filled(4)?, filled(5)?);
    checkpoint.wait();
    let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let target = Area::private(PAGES)?;
    sys!(mremap(moved.at.cast(), moved.bytes, moved.bytes, fixed, target.at))?;
    target.verify("moved", 1)?;
    // Two halves exchanged, in pieces, over what was there.
    let half = PAGES / 2;
    let spare = Area::private(half)?;
    let bytes = half * PAGE;
    verify("the upper half", halves.part(half, 3), (half, 3), 2)?;
    sys!(mremap(halves.at.cast(), bytes, bytes, fixed, spare.at))?;
    sys!(mremap(halves.part(half, half).at.cast(), bytes, bytes, fixed, halves.at))?;
    sys!(mremap(spare.at.cast(), bytes, bytes, fixed, halves.part(half, half).at))?;
    verify("lower half", halves, (half, half), 2)?;
    verify("upper half", halves.part(half, half), (0, half), 2)?;
    let at = sys!(mremap(grown.at.cast(), grown.bytes, 2 * grown.bytes, libc::MREMAP_MAYMOVE))?;
    let grown = Area { at: at.cast(), bytes: 2 * grown.bytes };
    grown.part(PAGES, PAGES).verify_zero("the new part")?;
    grown.part(0, PAGES).verify("the old part", 3)?;
    // What is left behind is empty.
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
    let anywhere = std::ptr::null_mut::<u8>();
    let at = sys!(mremap(left.at.cast(), left.bytes, left.bytes, flags, anywhere))?;
    left.verify_zero("left behind")?;
    left.fill(7);
    Area { at: at.cast(), bytes: left.bytes }.verify("moved away", 4)?;
    left.verify("left behind, written", 7)?;
    // A mapping over which another one comes.
    let over = Area::private(PAGES)?;
    over.fill(6);
    sys!(mremap(over.at.cast(), over.bytes, over.bytes, fixed, overwritten.at))?;
    overwritten.verify("overwritten", 6)
}

/// Children that change their copies.
fn on_demand_forked(checkpoint: &Checkpoint) -> Verdict {
    let (area, other) = (filled(1)?, filled(2)?);
    checkpoint.wait();
    let children = (0..3).map(|number| {
        let pid = sys!(fork())?;
        if pid == 0 {
            let verdict = child(number, area, other);
            if let Err(error) = &verdict {
                std::fs::write(checkpoint.path("child.failed"), error).expect("a file of ours");
            }
            // SAFETY: nothing of this process needs to be unwound.
            unsafe { libc::_exit(i32::from(verdict.is_err())) };
        }
        // Changes of the parent do not reach the children.
        area.part(number * 64, 32).fill(9);
        Ok(pid)
    });
    let children: Vec<i32> = children.collect::<Result<_, String>>()?;
    verify("the parent's", area.part(512, 512), (512, 512), 1)?;
    other.part(0, 64).verify("the parent's other area", 2)?;
    for pid in children {
        let mut status = 0;
        sys!(waitpid(pid, &raw mut status, 0))?;
        let why = std::fs::read_to_string(checkpoint.path("child.failed")).unwrap_or_default();
        ensure!(status == 0, "child {pid}: status {status:#x}: {why}");
    }
    verify("the parent's, later", area.part(512, PAGES - 512), (512, PAGES - 512), 1)?;
    for number in 0..3 {
        area.part(number * 64, 32).verify("written by the parent", 9)?;
    }
    other.verify("the parent's other area, later", 2)
}

fn child(number: usize, area: Area, other: Area) -> Verdict {
    for earlier in 0..number {
        area.part(earlier * 64, 32).verify("written before the fork", 9)?;
    }
    let first = number * 64;
    verify("not written before the fork", area.part(first, 512), (first, 512), 1)?;
    let target = Area::private(PAGES)?;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    sys!(mremap(other.at.cast(), other.bytes, other.bytes, flags, target.at))?;
    target.part(0, 1000).advise(libc::MADV_DONTNEED)?;
    if number == 2 {
        // A child of the child, and another program.
        let pid = sys!(fork())?;
        if pid == 0 {
            let right = verify("moved", target.part(1000, 100), (1000, 100), 2).is_ok();
            let program =
                CString::new(if right { "/bin/true" } else { "/bin/false" }).expect("no zero");
            let arguments = [program.as_ptr(), std::ptr::null()];
            let _ = sys!(execv(program.as_ptr(), arguments.as_ptr()));
            // SAFETY: nothing of this process needs to be unwound.
            unsafe { libc::_exit(9) };
        }
        let mut status = 0;
        sys!(waitpid(pid, &raw mut status, 0))?;
        same("status of the other program", 0, status)?;
    }
    target.part(0, 1000).verify_zero("dropped")?;
    verify("moved", target.part(1000, PAGES - 1000), (1000, PAGES - 1000), 2)
}

/// Threads that read while another one moves other memory, drops it, and forks.
fn on_demand_threads(checkpoint: &Checkpoint) -> Verdict {
    let (read, moved) = (filled(1)?, filled(2)?);
    let done = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..3)
        .map(|number| {
            let done = Arc::clone(&done);
            checkpoint.thread(move |checkpoint| {
                checkpoint.announce();
                checkpoint.wait_go();
                let mut verdict = read.verify("read by a thread", 1);
                while number == 0 && verdict.is_ok() && !done.load(Ordering::Acquire) {
                    verdict = read.part(0, 16).verify("read again", 1);
                    crate::kit::nap(1);
                }
                verdict
            })
        })
        .collect::<Result<_, _>>()?;
    checkpoint.wait();
    let mut at = moved;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    for round in 0..64 {
        let target = Area::private(PAGES)?;
        sys!(mremap(at.at.cast(), at.bytes, at.bytes, flags, target.at))?;
        at = target;
        at.page(round).advise(libc::MADV_DONTNEED)?;
        at.page(round).verify_zero("dropped")?;
        let page = PAGES - 1 - 7 * round;
        verify("moved", at.page(page), (page, 1), 2)?;
        if round.is_multiple_of(16) {
            let pid = sys!(fork())?;
            if pid == 0 {
                let right = verify("child's", at.part(2000, 8), (2000, 8), 2).is_ok();
                // SAFETY: nothing of this process needs to be unwound.
                unsafe { libc::_exit(i32::from(!right)) };
            }
            let mut status = 0;
            sys!(waitpid(pid, &raw mut status, 0))?;
            same("status of a child", 0, status)?;
        }
    }
    done.store(true, Ordering::Release);
    at.part(0, 64).verify_zero("dropped, later")?;
    verify("moved, later", at.part(64, PAGES - 64), (64, PAGES - 64), 2)?;
    readers.into_iter().try_for_each(crate::kit::Thread::join)
}
