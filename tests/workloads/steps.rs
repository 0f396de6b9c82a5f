//! Programs that change their memory step by step, each in a way that a tracker of
//! changes could miss.
//!
//! `workload --steps NAME DIRECTORY` does the first step, writes its number to the
//! file `at` and waits for the file `go.NUMBER`; after the last it writes `end`. What
//! the memory holds is for the test to see: it dumps twice.

mod shared;

use std::{
    cell::Cell,
    ffi::CString,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use super::kit::{Area, PAGE, Verdict, nap, open};

/// A program by name.
type Row = (&'static str, fn(&Steps) -> Verdict);

const ROWS: &[Row] = &[
    ("private_pages", private_pages),
    ("shared_pages", shared_pages),
    ("child_that_ends", child_that_ends),
    ("short_mapping", short_mapping),
    ("written_memfd", written_memfd),
    ("written_by_others", written_by_others),
    ("read_into", read_into),
    ("uring", uring),
    ("outsider", outsider),
    ("zeroed", zeroed),
    ("discarded", discarded),
    ("moved", moved),
    ("protected", protected),
    ("mapped_again", mapped_again),
    ("executed", executed),
    ("executed_again", executed_again),
    ("shared_executed_again", shared::executed_again),
    ("forks", forks),
    ("grow_and_shrink", grow_and_shrink),
    ("huge", huge),
    ("heap_and_stack", heap_and_stack),
    ("private_file", private_file),
    ("busy_threads", busy_threads),
    ("random", random),
    ("big", big),
];

/// What tells the test where a program is.
#[derive(Debug)]
struct Steps {
    dir: PathBuf,
    number: Cell<u32>,
}

pub fn main(name: &str, dir: &Path) -> ExitCode {
    let mut rows = ROWS.iter().chain(shared::ROWS);
    let Some((_, run)) = rows.find(|(row, _)| *row == name) else {
        eprintln!("there are no steps {name}");
        return ExitCode::from(2);
    };
    // A program that executes another one goes on counting.
    let at = fs::read_to_string(dir.join("at")).ok().and_then(|text| text.parse().ok());
    let steps = Steps { dir: dir.to_owned(), number: Cell::new(at.unwrap_or(0)) };
    if let Err(error) = crate::judged(|| run(&steps)) {
        crate::publish(&steps.dir.join("at"), &format!("failed: {error}"));
        return ExitCode::FAILURE;
    }
    crate::publish(&steps.dir.join("at"), "end");
    loop {
        nap(1000);
    }
}

impl Steps {
    /// Lets the test look at the memory as it is.
    fn pause(&self) {
        self.number.set(self.number.get() + 1);
        let number = self.number.get();
        crate::publish(&self.dir.join("at"), &number.to_string());
        let go = self.dir.join(format!("go.{number}"));
        let go = CString::new(go.as_os_str().as_bytes()).expect("no NUL");
        while sys!(access(go.as_ptr(), libc::F_OK)).is_err() {
            nap(1);
        }
    }

    fn path(&self, name: &str) -> CString {
        CString::new(self.dir.join(name).as_os_str().as_bytes()).expect("no NUL")
    }
}

/// Forks a child that runs a body and ends.
fn forked(body: impl FnOnce()) -> Result<i32, String> {
    let pid = sys!(fork())?;
    if pid == 0 {
        body();
        // SAFETY: nothing of this process needs to be unwound.
        unsafe { libc::_exit(0) };
    }
    Ok(pid)
}

fn ended(pid: i32) -> Verdict {
    let mut status = 0;
    sys!(waitpid(pid, &raw mut status, 0))?;
    ensure!(status == 0, "a child ended with {status:#x}");
    Ok(())
}

fn memfd(pages: usize) -> Result<i32, String> {
    let fd = sys!(memfd_create(c"steps".as_ptr(), 0))?;
    sys!(ftruncate(fd, (pages * PAGE) as i64))?;
    Ok(fd)
}

/// Numbers without order, the same each time.
fn next(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 11) as usize
}

fn private_pages(steps: &Steps) -> Verdict {
    let area = Area::private(300)?;
    area.fill(1);
    for step in 0..4 {
        steps.pause();
        for page in (step * 13..300).step_by(41) {
            area.page(page).set(7, step as u64);
        }
        // To what it was.
        area.page(step).set(9, area.page(step).get(9));
    }
    steps.pause();
    Ok(())
}

fn shared_pages(steps: &Steps) -> Verdict {
    let area = Area::shared(300)?;
    area.part(0, 200).fill(1);
    for step in 0..4 {
        steps.pause();
        for page in (step * 17..300).step_by(37) {
            area.page(page).set(3, step as u64 + 1);
        }
    }
    steps.pause();
    Ok(())
}

fn child_that_ends(steps: &Steps) -> Verdict {
    let (shared, private) = (Area::shared(100)?, Area::private(100)?);
    shared.fill(1);
    private.fill(2);
    for step in 0..3 {
        steps.pause();
        ended(forked(|| {
            shared.page(step * 7).fill(step as u64 + 10);
            private.page(step).fill(9);
        })?)?;
        private.page(step + 50).fill(3);
    }
    steps.pause();
    Ok(())
}

fn short_mapping(steps: &Steps) -> Verdict {
    let fd = memfd(64)?;
    let area = Area::of_file(64, fd, libc::MAP_SHARED)?;
    area.fill(1);
    for step in 0..3 {
        steps.pause();
        let other = Area::of_file(64, fd, libc::MAP_SHARED)?;
        other.page(step * 5 + 1).fill(20 + step as u64);
        other.unmap()?;
    }
    steps.pause();
    Ok(())
}

fn written_memfd(steps: &Steps) -> Verdict {
    let (mapped, bare) = (memfd(64)?, memfd(64)?);
    let area = Area::of_file(64, mapped, libc::MAP_SHARED)?;
    area.fill(1);
    let data = [0x5a_u8; 9000];
    for step in 0..3_i64 {
        steps.pause();
        for (fd, at) in [(mapped, step * 20_000 + 50), (bare, step * 30_000)] {
            sys!(pwrite(fd, data.as_ptr().cast(), data.len(), at))?;
        }
        sys!(lseek(bare, step * 40_000 + 3, libc::SEEK_SET))?;
        sys!(write(bare, data.as_ptr().cast(), 100))?;
    }
    steps.pause();
    Ok(())
}

fn written_by_others(steps: &Steps) -> Verdict {
    let area = Area::private(64)?;
    area.fill(1);
    // SAFETY: getpid has no preconditions.
    let own = unsafe { libc::getpid() };
    // Those that are restricted to descendants (Yama) may all the same.
    let _ = sys!(prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0));
    for step in 0..3 {
        steps.pause();
        ended(forked(|| {
            let bytes = vec![step as u8 + 1; 6000];
            let local =
                libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
            let at = area.page(step * 9).at.wrapping_add(500);
            let remote = libc::iovec { iov_base: at.cast(), iov_len: bytes.len() };
            let written =
                sys!(process_vm_writev(own, &raw const local, 1, &raw const remote, 1, 0));
            assert_eq!(written, Ok(6000));
        })?)?;
        // Through the file of its memory, as a debugger does.
        let path = CString::new(format!("/proc/{own}/mem")).expect("no NUL");
        let fd = open(&path, libc::O_RDWR)?;
        let at = area.page(step * 9 + 40).at as i64;
        sys!(pwrite(fd, [7_u8; 5000].as_ptr().cast(), 5000, at))?;
        sys!(close(fd))?;
        if step == 1 {
            ended(forked(|| poke(own, area.page(60).at))?)?;
        }
    }
    steps.pause();
    Ok(())
}

/// Stops a process for a moment and writes a word into it.
fn poke(pid: i32, at: *mut u8) {
    let mut status = 0;
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: the kernel reads no pointer of ours; the address is the parent's.
    unsafe {
        assert_eq!(libc::ptrace(libc::PTRACE_ATTACH, pid, none, none), 0);
        assert_eq!(libc::waitpid(pid, &raw mut status, libc::__WALL), pid);
        assert_eq!(libc::ptrace(libc::PTRACE_POKEDATA, pid, at, 0x1234_5678_u64), 0);
        assert_eq!(libc::ptrace(libc::PTRACE_DETACH, pid, none, none), 0);
    }
}

fn read_into(steps: &Steps) -> Verdict {
    let area = Area::private(64)?;
    area.fill(1);
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
        let mut ends = [0; 2];
        sys!(pipe2(ends.as_mut_ptr(), 0))?;
        sys!(write(ends[1], data.as_ptr().cast(), 300))?;
        sys!(read(ends[0], area.page(step + 50).at.cast(), 300))?;
        sys!(close(ends[0]))?;
        sys!(close(ends[1]))?;
    }
    sys!(close(fd))?;
    steps.pause();
    Ok(())
}

/// Reads through an io_uring, which the kernel may do at any time after it was asked.
/// Between the steps there is one whose buffer is pinned; a dump refuses that, a
/// pre-dump does not.
fn uring(steps: &Steps) -> Verdict {
    let area = Area::private(64)?;
    area.fill(1);
    let fd = open(&steps.path("data"), libc::O_RDWR | libc::O_CREAT)?;
    sys!(pwrite(fd, vec![0x77_u8; 64 * PAGE].as_ptr().cast(), 64 * PAGE, 0))?;
    for step in 0..3 {
        steps.pause();
        let mut ring = Ring::new()?;
        ring.register(area.part(30, 4))?;
        let read = |ring: &mut Ring| {
            ring.map()?;
            ring.read(fd, area.page(step * 5), false)?;
            ring.read(fd, area.page(31), true)?;
            ring.memory.unmap()?;
            ring.entries.unmap()
        };
        // A thread of the kernel's has come to be by it.
        read(&mut ring)?;
        // The test takes a pre-dump while the ring is there.
        crate::publish(&steps.dir.join("ring"), "");
        let gone = steps.dir.join("ring");
        super::kit::wait_until("the pre-dump", || !gone.exists())?;
        read(&mut ring)?;
        sys!(close(ring.fd))?;
    }
    sys!(close(fd))?;
    steps.pause();
    Ok(())
}

/// An io_uring of one entry.
struct Ring {
    fd: i32,
    parameters: [u32; 30],
    memory: Area,
    entries: Area,
}

impl Ring {
    fn new() -> Result<Self, String> {
        // `struct io_uring_params` (`linux/io_uring.h`), 120 bytes.
        let mut parameters = [0_u32; 30];
        let fd = sys!(syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()))? as i32;
        let nothing = Area { at: std::ptr::null_mut(), bytes: 0 };
        Ok(Self { fd, parameters, memory: nothing, entries: nothing })
    }

    /// Maps it: `IORING_OFF_SQ_RING` with `IORING_FEAT_SINGLE_MMAP`, and
    /// `IORING_OFF_SQES`. A mapping of it would stop a pre-dump as well.
    fn map(&mut self) -> Verdict {
        let map = |offset: i64| {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
            let at = sys!(mmap(std::ptr::null_mut(), PAGE, protection, flags, self.fd, offset))?;
            Ok::<_, String>(Area { at: at.cast(), bytes: PAGE })
        };
        (self.memory, self.entries) = (map(0)?, map(0x1000_0000)?);
        Ok(())
    }

    /// Pins a buffer (`IORING_REGISTER_BUFFERS`).
    fn register(&self, area: Area) -> Verdict {
        let buffer = libc::iovec { iov_base: area.at.cast(), iov_len: area.bytes };
        sys!(syscall(libc::SYS_io_uring_register, self.fd, 0, &raw const buffer, 1)).map(drop)
    }

    /// Reads the beginning of a file into a page (`IORING_OP_READ`, or
    /// `IORING_OP_READ_FIXED` into the buffer that is pinned), by a worker.
    fn read(&self, fd: i32, page: Area, pinned: bool) -> Verdict {
        /// `IOSQE_ASYNC`, a bit of the second byte.
        const ASYNC: u64 = 1 << (4 + 8);
        let opcode: u64 = if pinned { 4 } else { 22 };
        self.entries.set(0, opcode | ASYNC | (fd as u64) << 32);
        self.entries.set(1, 0);
        self.entries.set(2, page.at as u64);
        self.entries.set(3, PAGE as u64);
        for word in 4..8 {
            self.entries.set(word, 0);
        }
        // `sq_off.tail` and `sq_off.array`.
        let field = |offset: u32| self.memory.at.wrapping_add(offset as usize).cast::<u32>();
        let (tail, array) = (field(self.parameters[11]), field(self.parameters[16]));
        // SAFETY: the kernel has told where in the ring, which is mapped, they are.
        unsafe {
            array.write_volatile(0);
            tail.write_volatile(tail.read_volatile().wrapping_add(1));
        }
        /// `IORING_ENTER_GETEVENTS`.
        const GET_EVENTS: u32 = 1;
        let none = std::ptr::null::<libc::c_void>();
        sys!(syscall(libc::SYS_io_uring_enter, self.fd, 1, 1, GET_EVENTS, none, 0)).map(drop)
    }
}

fn outsider(steps: &Steps) -> Verdict {
    let area = Area::shared(64)?;
    area.fill(1);
    for step in 0..3 {
        steps.pause();
        let done = area.page(63);
        done.set(0, 0);
        ended(forked(|| {
            let _ = forked(|| {
                let _ = sys!(setsid());
                area.page(step * 11).fill(30);
                done.set(0, 1);
            });
        })?)?;
        while done.get(0) == 0 {
            nap(1);
        }
    }
    steps.pause();
    Ok(())
}

fn zero(area: Area) {
    for word in 0..area.bytes / 8 {
        area.set(word, 0);
    }
}

fn zeroed(steps: &Steps) -> Verdict {
    let (private, shared) = (Area::private(64)?, Area::shared(64)?);
    private.fill(1);
    shared.fill(2);
    steps.pause();
    zero(private.part(3, 5));
    zero(shared.part(6, 5));
    steps.pause();
    private.page(4).fill(3);
    zero(private.part(20, 2));
    shared.page(7).fill(4);
    steps.pause();
    zero(private);
    zero(shared);
    steps.pause();
    Ok(())
}

fn discarded(steps: &Steps) -> Verdict {
    let (private, shared) = (Area::private(64)?, Area::shared(64)?);
    private.fill(1);
    shared.fill(2);
    let fd = memfd(64)?;
    let file = Area::of_file(64, fd, libc::MAP_SHARED)?;
    file.fill(3);
    steps.pause();
    private.part(5, 10).advise(libc::MADV_DONTNEED)?;
    shared.part(5, 10).advise(libc::MADV_REMOVE)?;
    let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    sys!(fallocate(fd, flags, 5 * PAGE as i64, 10 * PAGE as i64))?;
    steps.pause();
    // Pages of zeros come in by reading.
    for page in 0..64 {
        std::hint::black_box(private.page(page).get(0) ^ shared.page(page).get(0));
    }
    steps.pause();
    private.page(7).set(1, 1);
    shared.page(8).set(1, 1);
    private.part(30, 2).advise(libc::MADV_FREE)?;
    let _ = private.part(40, 10).advise(libc::MADV_PAGEOUT);
    steps.pause();
    private.advise(libc::MADV_DONTNEED)?;
    private.page(9).set(0, 2);
    steps.pause();
    Ok(())
}

fn moved(steps: &Steps) -> Verdict {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let shift = |from: Area, to: Area| {
        sys!(mremap(from.at.cast(), from.bytes, to.bytes, flags, to.at)).map(drop)
    };
    let (one, other, spare) = (Area::apart(16)?, Area::apart(16)?, Area::apart(16)?);
    one.fill(1);
    other.fill(2);
    steps.pause();
    // Exchanged.
    shift(one, spare)?;
    shift(other, one)?;
    shift(spare, other)?;
    steps.pause();
    // Back again, a part of it.
    let whole = Area::apart(16)?;
    shift(one.part(4, 4), whole.part(4, 4))?;
    let again = Area { at: one.part(4, 4).at, bytes: 4 * PAGE };
    sys!(mmap(
        again.at.cast(),
        again.bytes,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
        -1,
        0
    ))?;
    again.page(1).fill(5);
    steps.pause();
    // Grown, in place or not.
    let grown = sys!(mremap(other.at.cast(), other.bytes, 40 * PAGE, libc::MREMAP_MAYMOVE))?;
    let grown = Area { at: grown.cast(), bytes: 40 * PAGE };
    grown.page(30).fill(6);
    steps.pause();
    sys!(mremap(grown.at.cast(), grown.bytes, 20 * PAGE, 0))?;
    grown.page(3).fill(7);
    steps.pause();
    Ok(())
}

fn protected(steps: &Steps) -> Verdict {
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let area = Area::apart(64)?;
    area.fill(1);
    steps.pause();
    area.part(0, 20).protect(libc::PROT_READ)?;
    area.part(30, 10).protect(libc::PROT_NONE)?;
    steps.pause();
    area.part(0, 20).protect(both)?;
    area.page(3).fill(2);
    steps.pause();
    area.part(30, 10).protect(both)?;
    area.page(33).fill(3);
    area.part(30, 10).protect(libc::PROT_NONE)?;
    area.page(50).fill(4);
    area.page(50).protect(libc::PROT_READ)?;
    steps.pause();
    area.protect(both)?;
    steps.pause();
    Ok(())
}

fn mapped_again(steps: &Steps) -> Verdict {
    let area = Area::apart(64)?;
    area.fill(1);
    let again = |part: Area| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        sys!(mmap(part.at.cast(), part.bytes, protection, flags, -1, 0)).map(drop)
    };
    steps.pause();
    area.part(10, 10).unmap()?;
    again(area.part(10, 10))?;
    steps.pause();
    area.page(12).set(0, 1);
    area.part(30, 10).unmap()?;
    steps.pause();
    again(area.part(30, 5))?;
    area.page(31).fill(2);
    again(area.part(50, 4))?;
    steps.pause();
    area.part(0, 10).unmap()?;
    again(area.part(0, 10))?;
    area.part(0, 10).fill(1);
    steps.pause();
    Ok(())
}

/// Where the programs that follow one another have memory.
const PLACE: usize = 0x2_0000_0000;

fn at_place(pages: usize) -> Result<Area, String> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let place = std::ptr::without_provenance_mut(PLACE);
    let at = sys!(mmap(place, pages * PAGE, protection, flags, -1, 0))?;
    Ok(Area { at: at.cast(), bytes: pages * PAGE })
}

fn execute(steps: &Steps, name: &str) -> Verdict {
    let program = CString::new("/proc/self/exe").expect("no NUL");
    let words = [
        CString::new("workload").expect("no NUL"),
        CString::new("--steps").expect("no NUL"),
        CString::new(name).expect("no NUL"),
        CString::new(steps.dir.as_os_str().as_bytes()).expect("no NUL"),
    ];
    let mut pointers: Vec<_> = words.iter().map(|word| word.as_ptr()).collect();
    pointers.push(std::ptr::null());
    sys!(execv(program.as_ptr(), pointers.as_ptr())).map(drop)
}

fn executed(steps: &Steps) -> Verdict {
    at_place(32)?.fill(1);
    steps.pause();
    execute(steps, "executed_again")
}

fn executed_again(steps: &Steps) -> Verdict {
    let area = at_place(32)?;
    area.part(0, 8).fill(1);
    area.page(20).fill(2);
    steps.pause();
    area.page(5).fill(3);
    steps.pause();
    if steps.number.get() < 5 { execute(steps, "executed_again") } else { Ok(()) }
}

fn forks(steps: &Steps) -> Verdict {
    let area = Area::private(64)?;
    let shared = Area::shared(4)?;
    area.fill(1);
    steps.pause();
    let turn = shared.page(0);
    let mut children = Vec::new();
    for number in 0..3_u64 {
        children.push(forked(|| {
            area.page(number as usize).fill(number + 5);
            turn.set(1 + number as usize, 1);
            while turn.get(0) < number + 1 {
                nap(1);
            }
            area.page(number as usize + 10).fill(number + 6);
            turn.set(11 + number as usize, 1);
            while turn.get(0) < 100 {
                nap(1);
            }
        })?);
        while turn.get(1 + number as usize) == 0 {
            nap(1);
        }
        area.page(number as usize + 20).fill(40 + number);
        steps.pause();
    }
    for number in 0..3_u64 {
        turn.set(0, number + 1);
        while turn.get(11 + number as usize) == 0 {
            nap(1);
        }
        steps.pause();
    }
    turn.set(0, 100);
    for child in children {
        ended(child)?;
    }
    steps.pause();
    Ok(())
}

fn grow_and_shrink(steps: &Steps) -> Verdict {
    let fd = memfd(20)?;
    let area = Area::of_file(60, fd, libc::MAP_SHARED)?;
    area.part(0, 20).fill(1);
    steps.pause();
    sys!(ftruncate(fd, 60 * PAGE as i64))?;
    area.page(50).fill(2);
    steps.pause();
    sys!(ftruncate(fd, 10 * PAGE as i64 + 100))?;
    steps.pause();
    sys!(ftruncate(fd, 40 * PAGE as i64))?;
    area.page(30).fill(3);
    steps.pause();
    sys!(ftruncate(fd, 0))?;
    steps.pause();
    Ok(())
}

/// `MADV_COLLAPSE` (`linux/mman.h`, Linux 6.1).
const MADV_COLLAPSE: i32 = 25;

fn huge(steps: &Steps) -> Verdict {
    let area = Area::private(4096)?;
    area.advise(libc::MADV_HUGEPAGE)?;
    for page in 0..4096 {
        area.page(page).set(0, page as u64 + 1);
    }
    steps.pause();
    area.page(1500).set(5, 1);
    steps.pause();
    // Splits one.
    area.part(2000, 3).protect(libc::PROT_READ)?;
    area.part(700, 1).advise(libc::MADV_DONTNEED)?;
    area.page(3000).set(5, 1);
    steps.pause();
    area.part(2000, 3).protect(libc::PROT_READ | libc::PROT_WRITE)?;
    let _ = area.advise(MADV_COLLAPSE);
    area.page(701).set(1, 8);
    steps.pause();
    // A page of zeros as large.
    area.advise(libc::MADV_DONTNEED)?;
    std::hint::black_box(area.page(1024).get(0));
    steps.pause();
    Ok(())
}

fn heap_and_stack(steps: &Steps) -> Verdict {
    #[inline(never)]
    fn deep(level: u64, seed: u64) -> u64 {
        let mut frame = [level ^ seed; 512];
        std::hint::black_box(&mut frame);
        if level == 0 { 0 } else { deep(level - 1, seed) + frame[std::hint::black_box(511)] }
    }
    let begin = sys!(sbrk(0))?;
    for step in 0..4 {
        sys!(sbrk(20 * PAGE as isize))?;
        let heap = Area { at: begin.cast(), bytes: (step + 1) * 20 * PAGE };
        heap.page(step * 20 + 3).fill(step as u64);
        heap.page(step * 5).fill(9);
        std::hint::black_box(deep(20 << step, step as u64));
        steps.pause();
    }
    sys!(sbrk(-50 * PAGE as isize))?;
    steps.pause();
    sys!(sbrk(50 * PAGE as isize))?;
    steps.pause();
    Ok(())
}

fn private_file(steps: &Steps) -> Verdict {
    let fd = open(&steps.path("file"), libc::O_RDWR | libc::O_CREAT)?;
    sys!(ftruncate(fd, 64 * PAGE as i64))?;
    sys!(pwrite(fd, vec![1_u8; 64 * PAGE].as_ptr().cast(), 64 * PAGE, 0))?;
    let area = Area::of_file(64, fd, libc::MAP_PRIVATE)?;
    area.part(0, 10).fill(1);
    steps.pause();
    area.page(5).fill(2);
    area.page(20).fill(3);
    steps.pause();
    area.part(0, 3).advise(libc::MADV_DONTNEED)?;
    steps.pause();
    area.page(1).set(3, area.page(1).get(3));
    area.page(2).set(0, 1);
    steps.pause();
    // Zeros are no less than other bytes where a file is below.
    area.page(5).clear();
    area.page(30).clear();
    steps.pause();
    steps.pause();
    area.page(5).advise(libc::MADV_DONTNEED)?;
    area.page(30).set(0, 7);
    steps.pause();
    Ok(())
}

/// Threads that never rest, while the memory is read.
fn busy_threads(steps: &Steps) -> Verdict {
    static STOP: AtomicBool = AtomicBool::new(false);
    let (private, shared) = (Area::private(500)?, Area::shared(500)?);
    private.fill(1);
    shared.fill(2);
    let threads: Vec<_> = (0..3_u64)
        .map(|number| {
            thread::spawn(move || {
                let mut state = number + 77;
                while !STOP.load(Ordering::Relaxed) {
                    let at = next(&mut state);
                    let area = if at & 1 == 0 { private } else { shared };
                    area.page(at / 2 % 500).set(at % 512, at as u64);
                    if at.is_multiple_of(4096) {
                        nap(1);
                    }
                }
            })
        })
        .collect();
    for _ in 0..8 {
        steps.pause();
    }
    STOP.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")?;
    }
    steps.pause();
    Ok(())
}

/// Lets processes of two threads each work for good.
fn crowd(work: impl Fn(u64) + Copy + Send + 'static) -> Verdict {
    for number in 0..2_u64 {
        forked(move || {
            thread::spawn(move || work(number + 20));
            work(number + 10);
        })?;
    }
    for number in 0..2_u64 {
        thread::spawn(move || work(number));
    }
    Ok(())
}

/// Processes and threads that do at random all that there is, all the time.
fn random(steps: &Steps) -> Verdict {
    let shared = Area::shared(400)?;
    let fd = memfd(100)?;
    let private = Area::private(400)?;
    private.fill(1);
    let work = move |seed: u64| {
        let mut state = seed * 0x9e37_79b9 + 1;
        let own = Area::apart(100).expect("there is memory");
        loop {
            let at = next(&mut state);
            let page = at / 16 % 400;
            let own_page = own.page(page % 100);
            match at % 16 {
                0..4 => private.page(page).set(at % 512, at as u64),
                4..8 => shared.page(page).set(at % 512, at as u64),
                8 => zero(private.page(page)),
                9 => drop(private.page(page).advise(libc::MADV_DONTNEED)),
                10 => drop(shared.page(page).advise(libc::MADV_REMOVE)),
                11 => {
                    let offset = (page % 100 * PAGE) as i64;
                    let _ = sys!(pwrite(fd, (&raw const at).cast(), 8, offset));
                }
                12 => own_page.fill(at as u64),
                13 => {
                    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                    let protection = libc::PROT_READ | libc::PROT_WRITE;
                    let _ = sys!(mmap(own_page.at.cast(), PAGE, protection, flags, -1, 0));
                }
                14 => drop(own_page.protect(libc::PROT_READ | libc::PROT_WRITE)),
                _ if at.is_multiple_of(512) => {
                    if let Ok(child) = forked(|| shared.page(page).set(1, at as u64)) {
                        let _ = ended(child);
                    }
                }
                _ => nap(1),
            }
        }
    };
    crowd(work)?;
    for _ in 0..15 {
        steps.pause();
    }
    Ok(())
}

/// Much memory, of which little changes: for measurements.
fn big(steps: &Steps) -> Verdict {
    let mib = |name: &str| {
        let text = std::env::var(name).ok().and_then(|text| text.parse::<usize>().ok());
        text.unwrap_or(64) << 8
    };
    let private = Area::private(mib("STEPS_PRIVATE_MIB"))?;
    let shared = Area::shared(mib("STEPS_SHARED_MIB"))?;
    for area in [private, shared] {
        for page in 0..area.pages() {
            area.page(page).fill(page as u64);
        }
    }
    let mut state = 5;
    loop {
        steps.pause();
        // One per cent of the pages, wherever they are.
        for area in [private, shared] {
            for _ in 0..area.pages() / 100 {
                area.page(next(&mut state) % area.pages()).set(11, state);
            }
        }
        steps.pause();
        // Every page once: how long does it take?
        let begin = std::time::Instant::now();
        for area in [private, shared] {
            for page in 0..area.pages() {
                area.page(page).set(12, state);
            }
        }
        let time = begin.elapsed().as_micros().to_string();
        crate::publish(&steps.dir.join("time"), &time);
    }
}
