//! Programs that write to shared memory in ways that tracking could miss. Who is to
//! write has begun before the first step, so that no fork gives it away, unless that is
//! the point.

use std::{ffi::CString, thread};

use super::{Row, Steps, crowd, ended, forked, memfd, next, poke, zero};
use crate::kit::{Area, PAGE, Verdict, nap, open};

pub const ROWS: &[Row] = &[
    ("shared_twice", twice),
    ("shared_from_afar", from_afar),
    ("shared_read_into", read_into),
    ("shared_opened", opened),
    ("shared_handed_over", handed_over),
    ("shared_by_several", by_several),
    ("shared_in_part", in_part),
    ("shared_exchanged", exchanged),
    ("shared_zeroed_unseen", zeroed_unseen),
    ("shared_executed", executed),
    ("shared_memfd_closed", memfd_closed),
    ("shared_by_new_threads", by_new_threads),
    ("shared_huge", huge),
    ("swapped", swapped),
    ("shared_random", random),
];

/// A process that works when it is told to.
struct Helper {
    turn: Area,
    pid: i32,
}

impl Helper {
    fn start(work: impl Fn(u64)) -> Result<Self, String> {
        let turn = Area::shared(1)?;
        let pid = forked(|| {
            let mut done = 0;
            while done != Self::END {
                let order = turn.get(0);
                if order == done {
                    nap(1);
                    continue;
                }
                if order != Self::END {
                    work(order);
                }
                done = order;
                turn.set(1, done);
            }
        })?;
        Ok(Self { turn, pid })
    }

    const END: u64 = u64::MAX;

    /// Lets it do its work of a number that it has not done just before.
    fn order(&self, number: usize) {
        self.turn.set(0, number as u64);
        while self.turn.get(1) != number as u64 {
            nap(1);
        }
    }

    fn end(self) -> Verdict {
        self.turn.set(0, Self::END);
        ended(self.pid)
    }
}

fn filled(pages: usize) -> Result<Area, String> {
    let area = Area::shared(pages)?;
    area.fill(1);
    Ok(area)
}

fn own() -> i32 {
    // SAFETY: getpid has no preconditions.
    unsafe { libc::getpid() }
}

/// The same memory a second time (`mremap(2)` with an old size of 0).
fn again(area: Area) -> Result<Area, String> {
    let at = sys!(mremap(area.at.cast(), 0, area.bytes, libc::MREMAP_MAYMOVE))?;
    Ok(Area { at: at.cast(), bytes: area.bytes })
}

fn twice(steps: &Steps) -> Verdict {
    let area = filled(100)?;
    for step in 0..4 {
        steps.pause();
        area.page(step).fill(7);
        if step % 2 == 1 {
            let other = again(area)?;
            other.page(step * 9).fill(20 + step as u64);
            other.unmap()?;
        }
    }
    steps.pause();
    // One that stays.
    let other = again(area)?;
    other.page(70).fill(30);
    steps.pause();
    other.page(71).fill(31);
    steps.pause();
    other.page(72).fill(32);
    other.unmap()?;
    steps.pause();
    Ok(())
}

/// By a process that does not map it.
fn from_afar(steps: &Steps) -> Verdict {
    let area = filled(100)?;
    area.advise(libc::MADV_DONTFORK)?;
    let own = own();
    let _ = sys!(prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0));
    let path = CString::new(format!("/proc/{own}/mem")).expect("no NUL");
    let helper = Helper::start(|step| {
        let page = |page: usize| area.page(page + step as usize).at;
        let bytes = vec![step as u8; 6000];
        let local =
            libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let remote = libc::iovec { iov_base: page(0).cast(), iov_len: bytes.len() };
        let written = sys!(process_vm_writev(own, &raw const local, 1, &raw const remote, 1, 0));
        assert_eq!(written, Ok(6000));
        poke(own, page(40));
        let fd = open(&path, libc::O_RDWR).expect("it may");
        assert_eq!(sys!(pwrite(fd, bytes.as_ptr().cast(), 5000, page(60) as i64)), Ok(5000));
        let _ = sys!(close(fd));
    })?;
    for step in 1..5 {
        steps.pause();
        helper.order(step);
    }
    steps.pause();
    helper.end()
}

/// By the kernel.
fn read_into(steps: &Steps) -> Verdict {
    let area = filled(100)?;
    let path = steps.path("data");
    let fd = open(&path, libc::O_RDWR | libc::O_CREAT)?;
    let data: Vec<u8> = (0..64 * PAGE).map(|at| (at / 77) as u8).collect();
    sys!(pwrite(fd, data.as_ptr().cast(), data.len(), 0))?;
    // Not every file system has it.
    let direct = open(&path, libc::O_RDONLY | libc::O_DIRECT);
    for step in 0..3 {
        steps.pause();
        let offset = (step * 3 * PAGE) as i64;
        sys!(pread(fd, area.page(step * 10).at.cast(), 5000, offset))?;
        if let Ok(direct) = direct {
            sys!(pread(direct, area.page(step * 10 + 4).at.cast(), 2 * PAGE, offset))?;
        }
    }
    steps.pause();
    Ok(())
}

/// Where the kernel shows the object behind an area of this process.
fn map_file(area: Area) -> CString {
    let own = own();
    let (start, end) = (area.at as usize, area.at as usize + area.bytes);
    CString::new(format!("/proc/{own}/map_files/{start:x}-{end:x}")).expect("no NUL")
}

/// Writes to an object by a descriptor in different ways.
fn write_by(fd: i32, step: usize, pages: usize) {
    let at = (step * 11 % pages * PAGE) as i64;
    match step % 3 {
        0 => assert_eq!(sys!(pwrite(fd, [step as u8; 900].as_ptr().cast(), 900, at)), Ok(900)),
        1 => {
            let other = Area::of_file(pages, fd, libc::MAP_SHARED).expect("there is room");
            other.page(step * 7 % pages).fill(step as u64 + 50);
            other.unmap().expect("it was there");
        }
        _ => {
            let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            assert_eq!(sys!(fallocate(fd, flags, at, 3 * PAGE as i64)), Ok(0));
        }
    }
}

/// By a process that opens it through its mapping.
fn opened(steps: &Steps) -> Verdict {
    let area = filled(100)?;
    area.advise(libc::MADV_DONTFORK)?;
    let path = map_file(area);
    let helper = Helper::start(|step| {
        let fd = open(&path, libc::O_RDWR).expect("root may");
        write_by(fd, step as usize, 100);
        let _ = sys!(close(fd));
    })?;
    for step in 1..7 {
        steps.pause();
        helper.order(step);
        area.page(step).set(3, step as u64);
    }
    steps.pause();
    helper.end()
}

/// By a process that is given a descriptor: it takes one of its parent's.
fn handed_over(steps: &Steps) -> Verdict {
    let fd = memfd(100)?;
    let area = Area::of_file(100, fd, libc::MAP_SHARED)?;
    area.fill(1);
    area.advise(libc::MADV_DONTFORK)?;
    let own = own();
    let helper = Helper::start(|step| {
        let _ = sys!(close(fd));
        let pidfd = sys!(syscall(libc::SYS_pidfd_open, own, 0)).expect("it is there");
        let taken = sys!(syscall(libc::SYS_pidfd_getfd, pidfd, fd, 0)).expect("root may");
        write_by(taken as i32, step as usize, 100);
        let _ = sys!(close(taken as i32));
        let _ = sys!(close(pidfd as i32));
    })?;
    for step in 1..5 {
        steps.pause();
        helper.order(step);
    }
    steps.pause();
    helper.end()
}

/// By processes that all have it, of which some end.
fn by_several(steps: &Steps) -> Verdict {
    let area = filled(200)?;
    let start = |from: usize| {
        Helper::start(move |step| area.page(from + step as usize % 40).fill(step + from as u64))
    };
    let (one, other) = (start(50)?, start(100)?);
    for step in 1..4 {
        steps.pause();
        one.order(step);
        if step != 2 {
            other.order(step);
        }
        area.page(step).fill(9);
    }
    steps.pause();
    // The last thing that it does.
    other.order(30);
    other.end()?;
    steps.pause();
    one.order(20);
    steps.pause();
    one.order(21);
    area.page(190).fill(10);
    steps.pause();
    one.end()
}

/// By mappings that are gone, in part, when it is dumped.
fn in_part(steps: &Steps) -> Verdict {
    let area = filled(200)?;
    let helper = Helper::start(|step| match step {
        1 => {
            area.page(60).fill(60);
            area.part(50, 20).unmap().expect("it was there");
        }
        2 => {
            area.page(80).fill(80);
            let part = area.part(75, 10);
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let at = part.at.cast();
            assert!(sys!(mmap(at, part.bytes, protection, flags, -1, 0)).is_ok());
            part.fill(3);
        }
        _ => {
            area.page(step as usize + 100).fill(step);
        }
    })?;
    for step in [1, 3, 2, 4] {
        steps.pause();
        helper.order(step);
    }
    steps.pause();
    area.part(120, 10).protect(libc::PROT_READ)?;
    helper.order(25);
    steps.pause();
    area.part(120, 10).protect(libc::PROT_READ | libc::PROT_WRITE)?;
    area.page(121).fill(8);
    steps.pause();
    helper.end()
}

/// By a mapping that another one of the same memory takes the place of.
fn exchanged(steps: &Steps) -> Verdict {
    let area = filled(100)?;
    let shift = |from: *mut u8, bytes: usize, to: *mut u8, flags: i32| {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | flags;
        sys!(mremap(from.cast(), bytes, bytes, flags, to)).map(drop)
    };
    steps.pause();
    area.page(5).fill(2);
    let other = again(area)?;
    shift(other.at, other.bytes, area.at, 0)?;
    area.page(6).fill(2);
    steps.pause();
    area.page(7).fill(2);
    // The pages go with the new one, and the old one stays, empty.
    let spare = Area::apart(100)?;
    shift(area.at, area.bytes, spare.at, libc::MREMAP_DONTUNMAP)?;
    spare.page(8).fill(2);
    steps.pause();
    spare.page(9).fill(2);
    spare.unmap()?;
    steps.pause();
    area.page(10).fill(3);
    area.part(0, 20).advise(libc::MADV_DONTNEED)?;
    std::hint::black_box(area.page(10).get(0));
    steps.pause();
    Ok(())
}

/// Pages that become zero without a write, and come back by being read.
fn zeroed_unseen(steps: &Steps) -> Verdict {
    let area = filled(150)?;
    for step in 0..4 {
        steps.pause();
        area.part(step * 20, 5).advise(libc::MADV_REMOVE)?;
        std::hint::black_box(area.page(step * 20 + 2).get(0));
        area.page(140).set(step, 1);
    }
    steps.pause();
    for step in 0..2 {
        let _ = area.part(90, 30).advise(libc::MADV_PAGEOUT);
        area.page(100 + step).set(0, 8);
        steps.pause();
    }
    Ok(())
}

/// By a process that runs another program, and then by one that executes something else
/// afterwards.
fn executed(steps: &Steps) -> Verdict {
    let area = filled(100)?;
    let helper = Helper::start(|step| {
        area.page(10 + step as usize).fill(step);
        if step == 3 {
            // Not by a fork: it has the memory of its parent until it executes.
            let ended = std::process::Command::new("true").status().expect("there is one");
            assert!(ended.success());
        }
    })?;
    for step in 1..5 {
        steps.pause();
        helper.order(step);
    }
    steps.pause();
    // The one that is left executes, after it has written.
    area.page(90).fill(9);
    helper.order(5);
    super::execute(steps, "shared_executed_again")
}

pub fn executed_again(steps: &Steps) -> Verdict {
    let area = filled(100)?;
    steps.pause();
    area.page(3).fill(3);
    steps.pause();
    Ok(())
}

/// A memfd that no process has open.
fn memfd_closed(steps: &Steps) -> Verdict {
    let fd = memfd(100)?;
    let area = Area::of_file(100, fd, libc::MAP_SHARED)?;
    area.fill(1);
    steps.pause();
    area.page(3).fill(2);
    sys!(close(fd))?;
    let path = map_file(area);
    for step in 1..8 {
        steps.pause();
        area.page(step + 20).fill(2);
        if step > 3 {
            let fd = open(&path, libc::O_RDWR)?;
            write_by(fd, step, 100);
            sys!(close(fd))?;
        }
    }
    steps.pause();
    Ok(())
}

/// Threads that begin after the tracking has, and make other writers.
fn by_new_threads(steps: &Steps) -> Verdict {
    let area = filled(100)?;
    let run = |body: fn(Area)| {
        let thread = thread::spawn(move || thread::spawn(move || body(area)).join());
        thread.join().ok().and_then(Result::ok).ok_or("a thread panicked".to_owned())
    };
    steps.pause();
    run(|area| area.page(3).fill(3))?;
    steps.pause();
    run(|area| {
        let other = again(area).expect("there is room");
        other.page(4).fill(3);
        other.unmap().expect("it was there");
    })?;
    steps.pause();
    run(|area| {
        let child = forked(|| area.page(5).fill(3)).expect("it may");
        ended(child).expect("it ends");
    })?;
    steps.pause();
    area.page(6).fill(3);
    steps.pause();
    Ok(())
}

/// Shared and private memory that is swapped out before it is written, and afterwards.
fn swapped(steps: &Steps) -> Verdict {
    let (shared, private) = (filled(300)?, Area::private(300)?);
    private.fill(2);
    for step in 0..6 {
        steps.pause();
        for area in [shared, private] {
            if step % 2 == 0 {
                area.advise(libc::MADV_PAGEOUT)?;
            }
            area.page(step * 7).set(3, 5);
            zero(area.page(step * 7 + 1));
            std::hint::black_box(area.page(step * 7 + 2).get(0));
            if step % 3 == 1 {
                area.advise(libc::MADV_PAGEOUT)?;
            }
        }
    }
    steps.pause();
    Ok(())
}

/// Huge pages, before and after tracking has begun.
fn huge(steps: &Steps) -> Verdict {
    let area = Area::shared(4096)?;
    let collapse = |area: Area| drop(area.advise(super::MADV_COLLAPSE));
    area.part(0, 3000).fill(1);
    collapse(area);
    for step in 0..3 {
        steps.pause();
        area.page(700 * step + 30).set(5, 1);
        area.page(2900).set(step, 1);
    }
    steps.pause();
    area.part(0, 1500).advise(libc::MADV_DONTNEED)?;
    area.page(600).set(5, 2);
    collapse(area);
    area.page(1700).set(5, 2);
    steps.pause();
    Ok(())
}

/// Processes and threads that do at random what tracking sees, and now and then what it
/// does not.
fn random(steps: &Steps) -> Verdict {
    let area = filled(400)?;
    let mood = Area::shared(1)?;
    let work = move |seed: u64| {
        let mut state = seed * 0x9e37_79b9 + 1;
        loop {
            let at = next(&mut state);
            let page = area.page(at / 32 % 400);
            match at % 32 {
                0..16 => page.set(at / 32 % 512, at as u64),
                16..18 => zero(page),
                18 => drop(page.advise(libc::MADV_DONTNEED)),
                19 => drop(page.advise(libc::MADV_PAGEOUT)),
                20..24 => drop(std::hint::black_box(page.get(at % 512))),
                // What it does not see, in some of the steps.
                24 if mood.get(0) == 1 => drop(page.advise(libc::MADV_REMOVE)),
                25 if mood.get(0) == 2 => {
                    if let Ok(other) = again(area) {
                        other.page(at / 32 % 400).set(3, at as u64);
                        let _ = other.unmap();
                    }
                }
                26 if mood.get(0) == 3 && at.is_multiple_of(64) => {
                    if let Ok(child) = forked(|| page.set(1, at as u64)) {
                        let _ = ended(child);
                    }
                }
                _ => nap(1),
            }
        }
    };
    crowd(work)?;
    for step in 0..18 {
        steps.pause();
        mood.set(0, if step % 3 == 2 { 1 + step / 3 % 3 } else { 0 });
    }
    Ok(())
}
