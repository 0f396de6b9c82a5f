//! Processes that share what others have for themselves: memory, descriptors, directories,
//! signal handlers (`clone(2)`).

use std::{
    io::Error,
    mem, ptr,
    sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering},
};

use crate::{
    Row,
    kit::{Area, Checkpoint, PAGE, Verdict, same, wait_until},
};

pub const ROWS: &[Row] = &[
    ("shared_descriptors", shared_descriptors),
    ("shared_directory", shared_directory),
    ("shared_address_space", shared_address_space),
    ("shared_handlers", shared_handlers),
    ("shared_everything", shared_everything),
    ("shared_by_siblings", shared_by_siblings),
];

/// What a servant is asked to do; 0 when it has done it.
mod order {
    pub const OPEN: u32 = 1;
    pub const CLOSE: u32 = 2;
    pub const STAND: u32 = 3;
    pub const HANDLE: u32 = 4;
    pub const WRITE: u32 = 5;
    pub const FORK: u32 = 6;
    pub const EXIT: u32 = 7;
}

/// What a servant and its master both see.
#[repr(C)]
#[derive(Debug)]
struct Desk {
    order: AtomicU32,
    result: AtomicI32,
    /// An address to write to, flags of `clone(2)`, a descriptor.
    argument: AtomicU64,
    /// The desk of the servant that it makes, and the end of that one's stack.
    desk: AtomicU64,
    stack: AtomicU64,
}

/// The umask that a servant sets.
const UMASK: u32 = 0o135;

/// What it writes.
const WORD: u64 = 0x1234_5678_9abc_def0;

extern "C" fn handle(_: i32) {}

/// Does what it is asked to. It may have the memory of its master, thread-local storage and
/// all, and so makes no calls but system calls.
extern "C" fn serve(desk: *mut libc::c_void) -> i32 {
    // SAFETY: the desk is mapped as long as the servant lives.
    let desk = unsafe { &*desk.cast::<Desk>() };
    loop {
        let order = desk.order.load(Ordering::Acquire);
        let argument = desk.argument.load(Ordering::Relaxed);
        // SAFETY: the master hands out addresses that are mapped; paths are terminated.
        let result = unsafe {
            match order {
                0 => {
                    let time = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
                    libc::syscall(libc::SYS_nanosleep, &raw const time, 0);
                    continue;
                }
                order::OPEN => {
                    let path = c"/dev/null".as_ptr();
                    libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, libc::O_RDONLY)
                }
                order::CLOSE => libc::syscall(libc::SYS_close, argument),
                order::STAND => {
                    libc::syscall(libc::SYS_umask, UMASK);
                    libc::syscall(libc::SYS_chdir, c"/usr".as_ptr())
                }
                order::HANDLE => {
                    let mut action: libc::sigaction = mem::zeroed();
                    action.sa_sigaction = handle as *const () as usize;
                    libc::sigaction(libc::SIGUSR2, &raw const action, ptr::null_mut()).into()
                }
                order::WRITE => {
                    let place = ptr::with_exposed_provenance_mut::<u64>(argument as usize);
                    place.write_volatile(WORD);
                    0
                }
                order::FORK => {
                    let at = |of: &AtomicU64| {
                        let address = of.load(Ordering::Relaxed) as usize;
                        ptr::with_exposed_provenance_mut::<libc::c_void>(address)
                    };
                    libc::clone(serve, at(&desk.stack), argument as i32, at(&desk.desk)).into()
                }
                _ => return 0,
            }
        };
        desk.result.store(result as i32, Ordering::Relaxed);
        desk.order.store(0, Ordering::Release);
    }
}

/// A servant, which is a process of its own.
#[derive(Debug)]
struct Servant {
    pid: i32,
    desk: Area,
    _stack: Area,
}

/// Pages of a servant's stack.
const STACK_PAGES: usize = 16;

impl Servant {
    fn desk(&self) -> &Desk {
        // SAFETY: it is mapped, and zeros are a desk; both sides use atomic accesses.
        unsafe { &*self.desk.at.cast::<Desk>() }
    }

    fn furniture() -> Result<(Area, Area), String> {
        let (desk, stack) = (Area::shared(1)?, Area::private(STACK_PAGES)?);
        Ok((desk, stack))
    }

    fn stack_end(stack: Area) -> *mut libc::c_void {
        stack.at.wrapping_add(STACK_PAGES * PAGE).cast()
    }

    /// Makes one that shares what `flags` say.
    fn hire(flags: i32) -> Result<Self, String> {
        let (desk, stack) = Self::furniture()?;
        let end = Self::stack_end(stack);
        let pid = sys!(clone(serve, end, flags | libc::SIGCHLD, desk.at.cast()))?;
        Ok(Self { pid, desk, _stack: stack })
    }

    /// Lets it carry out an order.
    fn ask(&self, order: u32, argument: u64) -> Result<i32, String> {
        let desk = self.desk();
        desk.argument.store(argument, Ordering::Relaxed);
        desk.order.store(order, Ordering::Release);
        wait_until("a servant", || desk.order.load(Ordering::Acquire) == 0)?;
        Ok(desk.result.load(Ordering::Relaxed))
    }

    fn dismiss(self) -> Verdict {
        self.desk().order.store(order::EXIT, Ordering::Release);
        let mut status = 0;
        sys!(waitpid(self.pid, &raw mut status, 0))?;
        same("status of a servant", 0, status)
    }

    /// Whether a descriptor that one opens is one of the other, and as closed.
    fn shares_descriptors(&self, expected: bool) -> Verdict {
        let fd = self.ask(order::OPEN, 0)?;
        ensure!(fd >= 0, "a servant cannot open a file");
        let is_open = |fd| sys!(fcntl(fd, libc::F_GETFD)).is_ok();
        let seen = is_open(fd);
        self.ask(order::CLOSE, fd as u64)?;
        same("an open descriptor of the other", expected, seen)?;
        same("a closed descriptor of the other", false, is_open(fd))?;
        let own = sys!(open(c"/dev/null".as_ptr(), libc::O_RDONLY))?;
        let closed = self.ask(order::CLOSE, own as u64)?;
        same("closed by the other", expected, closed == 0 && !is_open(own))?;
        if !expected {
            sys!(close(own))?;
        }
        Ok(())
    }

    fn shares_directory(&self, expected: bool) -> Verdict {
        // SAFETY: it takes a number.
        let umask = || unsafe { libc::umask(0o22) };
        umask();
        sys!(chdir(c"/".as_ptr()))?;
        same("the other changes its directory", 0, self.ask(order::STAND, 0)?)?;
        let directory = std::env::current_dir().map_err(|error| error.to_string())?;
        same("directory", expected, directory.as_os_str() == "/usr")?;
        same("umask", expected, umask() == UMASK)?;
        sys!(chdir(c"/".as_ptr())).map(drop)
    }

    fn shares_memory(&self, expected: bool) -> Verdict {
        let page = Area::private(1)?;
        let word = page.at.cast::<u64>();
        if expected {
            let address = page.at.expose_provenance() as u64;
            self.ask(order::WRITE, address)?;
        }
        // SAFETY: the page is mapped.
        same("a word of memory", expected, unsafe { word.read_volatile() } == WORD)?;
        sys!(munmap(page.at.cast(), PAGE)).map(drop)
    }

    fn shares_handlers(&self, expected: bool) -> Verdict {
        // SAFETY: it is known to the kernel; all zeros is a valid value.
        unsafe {
            libc::signal(libc::SIGUSR2, libc::SIG_IGN);
            same("the other handles a signal", 0, self.ask(order::HANDLE, 0)?)?;
            let mut now: libc::sigaction = mem::zeroed();
            sys!(sigaction(libc::SIGUSR2, ptr::null(), &raw mut now))?;
            same("handler", expected, now.sa_sigaction == handle as *const () as usize)
        }
    }

    fn shares(&self, flags: i32) -> Verdict {
        let has = |flag: i32| flags & flag != 0;
        self.shares_descriptors(has(libc::CLONE_FILES))?;
        self.shares_directory(has(libc::CLONE_FS))?;
        self.shares_memory(has(libc::CLONE_VM))?;
        self.shares_handlers(has(libc::CLONE_SIGHAND))
    }
}

/// Two processes share what `flags` say and nothing else, before and after.
fn shared(checkpoint: &Checkpoint, flags: i32) -> Verdict {
    let (private, before) = (Area::private(300)?, Area::shared(5)?);
    private.fill(1);
    before.fill(2);
    let mut ends = [0; 2];
    sys!(pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK))?;
    sys!(write(ends[1], b"queued".as_ptr().cast(), 6))?;
    let servant = Servant::hire(flags)?;
    // A child that has all for itself, made by one that shares.
    let child = checkpoint.fork(|child| {
        child.wait();
        private.verify("private memory of a child", 1)
    })?;
    servant.shares(flags)?;
    checkpoint.wait();
    private.verify("private memory", 1)?;
    before.verify("shared memory", 2)?;
    servant.shares(flags)?;
    let mut bytes = [0_u8; 16];
    same("bytes in a pipe", 6, sys!(read(ends[0], bytes.as_mut_ptr().cast(), bytes.len()))?)?;
    child.join()?;
    servant.dismiss()?;
    private.verify("private memory at the end", 1)
}

fn shared_descriptors(checkpoint: &Checkpoint) -> Verdict {
    shared(checkpoint, libc::CLONE_FILES)
}

fn shared_directory(checkpoint: &Checkpoint) -> Verdict {
    shared(checkpoint, libc::CLONE_FS)
}

fn shared_address_space(checkpoint: &Checkpoint) -> Verdict {
    shared(checkpoint, libc::CLONE_VM)
}

fn shared_handlers(checkpoint: &Checkpoint) -> Verdict {
    shared(checkpoint, libc::CLONE_VM | libc::CLONE_SIGHAND)
}

fn shared_everything(checkpoint: &Checkpoint) -> Verdict {
    let all = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_SIGHAND;
    shared(checkpoint, all)
}

/// Two children share their descriptors and their directory, but not with their parent.
fn shared_by_siblings(checkpoint: &Checkpoint) -> Verdict {
    // The second one's stack is mapped before the first is made, which has a copy of it.
    let (desk, stack) = Servant::furniture()?;
    let first = Servant::hire(0)?;
    let own = first.desk();
    own.desk.store(desk.at.expose_provenance() as u64, Ordering::Relaxed);
    own.stack.store(Servant::stack_end(stack).expose_provenance() as u64, Ordering::Relaxed);
    let flags = libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_PARENT | libc::SIGCHLD;
    let pid = first.ask(order::FORK, flags as u64)?;
    ensure!(pid > 0, "a servant cannot make another one: {}", Error::last_os_error());
    let second = Servant { pid, desk, _stack: stack };
    let look = || -> Verdict {
        first.shares_descriptors(false)?;
        let fd = first.ask(order::OPEN, 0)?;
        same("closed by a sibling", 0, second.ask(order::CLOSE, fd as u64)?)?;
        let closed = first.ask(order::CLOSE, fd as u64)?;
        same("closed again", -1, closed)?;
        first.ask(order::STAND, 0)?;
        let place = |pid: i32| std::fs::read_link(format!("/proc/{pid}/cwd")).ok();
        same("directories", place(first.pid), place(second.pid))
    };
    look()?;
    checkpoint.wait();
    look()?;
    first.dismiss()?;
    second.dismiss()
}
