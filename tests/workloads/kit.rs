//! What the states have in common: the protocol, children, threads, checks.

use std::{
    cell::{Cell, RefCell},
    ffi::CString,
    fs,
    io::Error,
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

/// Nothing, or what was expected and what was found.
pub type Verdict = Result<(), String>;

/// What a state says instead of being set up, where it cannot be.
const LACKS: &str = "needs ";

/// The verdict of a state that this machine cannot have, since it lacks something. The
/// test is skipped.
pub fn lacks(what: &str) -> Verdict {
    Err(format!("{LACKS}{what}"))
}

/// Bounds every wait inside a workload but the one for its checkpoint, on a machine
/// that is not slower than usual.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How many times slower than usual the machine is, from the environment
/// (`RCRIU_TEST_SLOWNESS`).
pub fn slowness() -> u32 {
    let value = std::env::var("RCRIU_TEST_SLOWNESS").unwrap_or_default();
    value.parse().unwrap_or(1).max(1)
}
pub const PAGE: usize = 4096;

/// Calls a function of libc and makes an error of the value that stands for one.
macro_rules! sys {
    ($name:ident ( $($argument:expr),* $(,)? )) => {{
        #[expect(clippy::allow_attributes, reason = "the arguments differ")]
        #[allow(unused_unsafe, clippy::macro_metavars_in_unsafe, reason = "they may need it")]
        // SAFETY: callers hand in pointers to live objects of the type that
        // the function's manual names, and lengths that fit them.
        let value = unsafe { libc::$name($($argument),*) };
        $crate::kit::checked(stringify!($name), value)
    }};
}

/// Leaves with a failure unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}

/// A value of a C function that may say that the call failed.
pub trait Returned: Copy {
    fn failed(self) -> bool;
}

impl Returned for i32 {
    fn failed(self) -> bool {
        self == -1
    }
}

impl Returned for i64 {
    fn failed(self) -> bool {
        self == -1
    }
}

impl Returned for isize {
    fn failed(self) -> bool {
        self == -1
    }
}

impl Returned for *mut libc::c_void {
    fn failed(self) -> bool {
        self == libc::MAP_FAILED
    }
}

pub fn checked<T: Returned>(name: &str, value: T) -> Result<T, String> {
    if value.failed() { Err(format!("{name}: {}", Error::last_os_error())) } else { Ok(value) }
}

/// Compares a thing with what it was.
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, expected: T, found: T) -> Verdict {
    ensure!(expected == found, "{what}: expected {expected:?}, found {found:?}");
    Ok(())
}

/// Waits for a condition without leaving anything behind.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) -> Verdict {
    let begin = Instant::now();
    while !condition() {
        ensure!(begin.elapsed() < PATIENCE * slowness(), "waited in vain for {what}");
        nap(1);
    }
    Ok(())
}

pub fn nap(milliseconds: i64) {
    let time = libc::timespec { tv_sec: 0, tv_nsec: milliseconds * 1_000_000 };
    // SAFETY: the structure outlives the call.
    unsafe { libc::nanosleep(&time, std::ptr::null_mut()) };
}

/// The one point in a task's life around which its state must not change.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    status: PathBuf,
    go: Arc<CString>,
    announce: Announce,
}

/// How a task says that its state is set up.
#[derive(Clone, Debug)]
enum Announce {
    File,
    /// To the parent, once; the descriptor is gone afterwards.
    Pipe(Cell<i32>),
    /// To the thread that started it.
    Channel(RefCell<Option<mpsc::Sender<()>>>),
}

impl Checkpoint {
    pub fn new(status: &Path) -> Self {
        let go = CString::new([status.as_os_str().as_bytes(), b".go"].concat()).expect("no NUL");
        Self { status: status.to_owned(), go: Arc::new(go), announce: Announce::File }
    }

    /// Says that the state is set up, and waits for the time after.
    pub fn wait(&self) {
        self.announce();
        self.wait_go();
    }

    pub fn announce(&self) {
        match &self.announce {
            Announce::File => crate::publish(&self.status, "ready\n"),
            Announce::Pipe(fd) => {
                let fd = fd.replace(-1);
                // SAFETY: the byte outlives the call; the descriptor is this
                // task's and used by nobody else.
                unsafe {
                    libc::write(fd, b"r".as_ptr().cast(), 1);
                    libc::close(fd);
                }
            }
            Announce::Channel(sender) => {
                if let Some(sender) = sender.take() {
                    let _ = sender.send(());
                }
            }
        }
    }

    pub fn is_go(&self) -> bool {
        // SAFETY: the path is terminated and outlives the call.
        unsafe { libc::access(self.go.as_ptr(), libc::F_OK) == 0 }
    }

    pub fn wait_go(&self) {
        while !self.is_go() {
            nap(2);
        }
    }

    /// A path beside the status file, for a file that is part of the state.
    pub fn path(&self, name: &str) -> PathBuf {
        let mut path = self.status.as_os_str().to_owned();
        path.push(".");
        path.push(name);
        path.into()
    }

    pub fn c_path(&self, name: &str) -> CString {
        CString::new(self.path(name).as_os_str().as_bytes()).expect("no NUL")
    }

    /// Tells the other tasks of the tree that a step after the checkpoint is done.
    pub fn mark(&self, step: &str) {
        // A process that sees it finds it closed.
        crate::publish(&self.path(step), "");
    }

    pub fn wait_mark(&self, step: &str) -> Verdict {
        let path = self.path(step);
        wait_until(step, || path.exists())
    }

    pub fn conclude(&self, verdict: &Verdict) {
        match verdict {
            Ok(()) => crate::publish(&self.status, "ok\n"),
            Err(error) => match error.strip_prefix(LACKS) {
                Some(what) => crate::publish(&self.status, &format!("{LACKS}{what}\n")),
                None => crate::publish(&self.status, &format!("failed: {error}\n")),
            },
        }
    }

    /// Forks a child that runs a body, and waits until it has announced itself.
    pub fn fork(&self, body: impl FnOnce(&Self) -> Verdict) -> Result<Child, String> {
        let mut ends = [0; 2];
        sys!(pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC))?;
        let pid = sys!(fork())?;
        if pid == 0 {
            let _ = sys!(close(ends[0]));
            if let Announce::Pipe(parents) = &self.announce {
                let _ = sys!(close(parents.get()));
            }
            let mut child = self.clone();
            child.announce = Announce::Pipe(Cell::new(ends[1]));
            let verdict = crate::judged(|| body(&child));
            if let Err(error) = &verdict {
                // SAFETY: getpid has no preconditions.
                let name = format!("failure.{}", unsafe { libc::getpid() });
                crate::publish(&self.path(&name), error);
            }
            // SAFETY: nothing of this process needs to be unwound.
            unsafe { libc::_exit(i32::from(verdict.is_err())) };
        }
        let child = Child { pid, failure: self.path(&format!("failure.{pid}")) };
        sys!(close(ends[1]))?;
        let mut byte = 0_u8;
        let got = sys!(read(ends[0], (&raw mut byte).cast(), 1));
        // To the end, so that the child's descriptor is gone.
        while sys!(read(ends[0], (&raw mut byte).cast(), 1)) == Ok(1) {}
        sys!(close(ends[0]))?;
        if got != Ok(1) {
            child.join()?;
            return Err("a child ended before its checkpoint".to_owned());
        }
        Ok(child)
    }

    /// Starts a thread that runs a body, and waits until it has announced itself.
    pub fn thread(
        &self,
        body: impl FnOnce(&Self) -> Verdict + Send + 'static,
    ) -> Result<Thread, String> {
        let (sender, receiver) = mpsc::channel();
        let mut own = self.clone();
        own.announce = Announce::Channel(RefCell::new(Some(sender)));
        let handle = std::thread::spawn(move || {
            let verdict = crate::judged(|| body(&own));
            drop(own);
            verdict
        });
        match receiver.recv() {
            Ok(()) => Ok(Thread(handle)),
            Err(_) => {
                handle.join().map_err(|_| "a thread panicked".to_owned())??;
                Err("a thread ended before its checkpoint".to_owned())
            }
        }
    }
}

/// A forked child, which ends with a verdict.
#[derive(Debug)]
pub struct Child {
    pub pid: i32,
    failure: PathBuf,
}

impl Child {
    /// Waits for the child's verdict.
    pub fn join(self) -> Verdict {
        let mut status = 0;
        sys!(waitpid(self.pid, &raw mut status, 0))?;
        if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0 {
            return Ok(());
        }
        let text = fs::read_to_string(&self.failure);
        Err(format!("child {}: {}", self.pid, text.unwrap_or(format!("status {status:#x}"))))
    }
}

/// A thread, which ends with a verdict.
#[derive(Debug)]
pub struct Thread(std::thread::JoinHandle<Verdict>);

impl Thread {
    pub fn join(self) -> Verdict {
        self.0.join().map_err(|_| "a thread panicked".to_owned())?
    }
}

/// Returns the calling thread's id.
pub fn gettid() -> i32 {
    // SAFETY: gettid has no preconditions.
    unsafe { libc::gettid() }
}

/// Waits until another task is inside a system call.
///
/// # Errors
///
/// If it does not get there in time.
pub fn wait_blocked(tid: i32, number: i64) -> Verdict {
    let path = format!("/proc/{tid}/syscall");
    let wanted = number.to_string();
    wait_until(&format!("task {tid} in system call {number}"), || {
        fs::read_to_string(&path)
            .is_ok_and(|line| line.split_whitespace().next() == Some(wanted.as_str()))
    })
}

/// A mapping of this process, addressed by raw pointers alone since what is
/// there is what the kernel makes of it.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    pub at: *mut u8,
    pub bytes: usize,
}

// SAFETY: an area is a pair of numbers; its users order their accesses by
// checkpoints and steps.
unsafe impl Send for Area {}

impl Area {
    pub fn map(pages: usize, protection: i32, flags: i32, fd: i32) -> Result<Self, String> {
        let bytes = pages * PAGE;
        let at = sys!(mmap(std::ptr::null_mut(), bytes, protection, flags, fd, 0))?;
        Ok(Self { at: at.cast(), bytes })
    }

    /// Private anonymous memory.
    pub fn private(pages: usize) -> Result<Self, String> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        Self::map(pages, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
    }

    /// The same, separated from its neighbours by unused pages, so that the kernel's list
    /// shows it by itself.
    pub fn apart(pages: usize) -> Result<Self, String> {
        let whole = Self::private(pages + 2)?;
        whole.page(0).unmap()?;
        whole.page(pages + 1).unmap()?;
        Ok(whole.part(1, pages))
    }

    /// Shared anonymous memory.
    pub fn shared(pages: usize) -> Result<Self, String> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        Self::map(pages, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
    }

    /// The memory of a file.
    pub fn of_file(pages: usize, fd: i32, share: i32) -> Result<Self, String> {
        Self::map(pages, libc::PROT_READ | libc::PROT_WRITE, share, fd)
    }

    pub fn pages(self) -> usize {
        self.bytes / PAGE
    }

    pub fn page(self, page: usize) -> Self {
        self.part(page, 1)
    }

    pub fn part(self, first: usize, pages: usize) -> Self {
        assert!((first + pages) * PAGE <= self.bytes);
        Self { at: self.at.wrapping_add(first * PAGE), bytes: pages * PAGE }
    }

    pub fn protect(self, protection: i32) -> Verdict {
        sys!(mprotect(self.at.cast(), self.bytes, protection)).map(drop)
    }

    pub fn unmap(self) -> Verdict {
        sys!(munmap(self.at.cast(), self.bytes)).map(drop)
    }

    pub fn advise(self, advice: i32) -> Verdict {
        sys!(madvise(self.at.cast(), self.bytes, advice)).map(drop)
    }

    /// Writes the words that belong to a seed.
    pub fn fill(self, seed: u64) {
        for word in 0..self.bytes / 8 {
            // SAFETY: the area is mapped and writable, as callers see to.
            unsafe { self.at.cast::<u64>().add(word).write_volatile(pattern(seed, word)) };
        }
    }

    /// Writes zeros.
    pub fn clear(self) {
        (0..self.bytes / 8).for_each(|word| self.set(word, 0));
    }

    pub fn get(self, word: usize) -> u64 {
        assert!(word * 8 < self.bytes);
        // SAFETY: the area is mapped and readable, as callers see to.
        unsafe { self.at.cast::<u64>().add(word).read_volatile() }
    }

    pub fn set(self, word: usize, value: u64) {
        assert!(word * 8 < self.bytes);
        // SAFETY: the area is mapped and writable, as callers see to.
        unsafe { self.at.cast::<u64>().add(word).write_volatile(value) };
    }

    /// Compares every word with those that belong to a seed.
    pub fn verify(self, what: &str, seed: u64) -> Verdict {
        for word in 0..self.bytes / 8 {
            let (found, expected) = (self.get(word), pattern(seed, word));
            ensure!(
                found == expected,
                "{what}: word {word} at {:p}: expected {expected:#x}, found {found:#x}",
                self.at.wrapping_add(word * 8)
            );
        }
        Ok(())
    }

    /// Checks that every word is zero.
    pub fn verify_zero(self, what: &str) -> Verdict {
        for word in 0..self.bytes / 8 {
            let found = self.get(word);
            ensure!(found == 0, "{what}: word {word}: expected 0, found {found:#x}");
        }
        Ok(())
    }
}

/// A word that is recognisable by its place and seed.
pub fn pattern(seed: u64, word: usize) -> u64 {
    (seed << 40 ^ word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Recognisable bytes.
pub fn bytes(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed) ^ (at >> 8) as u8).collect()
}

/// Writes to a descriptor all there is.
pub fn write_all(fd: i32, data: &[u8]) -> Verdict {
    let count = sys!(write(fd, data.as_ptr().cast(), data.len()))?;
    same("bytes written", data.len() as isize, count)
}

/// Reads what a descriptor has, up to a number of bytes.
pub fn read_some(fd: i32, limit: usize) -> Result<Vec<u8>, String> {
    let mut data = vec![0; limit];
    let count = sys!(read(fd, data.as_mut_ptr().cast(), limit))?;
    data.truncate(count as usize);
    Ok(data)
}

/// Opens a file of the state.
pub fn open(path: &std::ffi::CStr, flags: i32) -> Result<i32, String> {
    sys!(open(path.as_ptr(), flags, 0o600)).map_err(|error| format!("{path:?}: {error}"))
}

/// Gives back what pages of zeros this process has in memory of its own: rcriu stores none,
/// while other programs want each page that they leave to the parent to be there.
pub fn give_back_zeros() -> Verdict {
    let text = |error: std::io::Error| error.to_string();
    let pagemap = fs::File::open("/proc/self/pagemap").map_err(text)?;
    for line in fs::read_to_string("/proc/self/maps").map_err(text)?.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        let private = fields[1] == "rw-p" && fields[4] == "0";
        if !private || fields.get(5).is_some_and(|name| *name != "[heap]") {
            continue;
        }
        let address = |text| usize::from_str_radix(text, 16).map_err(|error| error.to_string());
        let (start, end) = fields[0].split_once('-').ok_or("a range")?;
        for at in (address(start)?..address(end)?).step_by(PAGE) {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, (at / PAGE * 8) as u64).map_err(text)?;
            let page = Area { at: std::ptr::with_exposed_provenance_mut(at), bytes: PAGE };
            if entry[7] & 0x80 != 0 && page.verify_zero("").is_ok() {
                page.advise(libc::MADV_DONTNEED)?;
            }
        }
    }
    Ok(())
}
