//! Makes calls in a process that resumes afterwards as if nothing had happened.
//!
//! Threads whose registers are changed can find home by these alone (see `home`), so the
//! process is not harmed if rcriu is killed.
//!
//! Scripts run from scratch memory, which one thread, the keeper, has mapped. While no thread runs
//! a script, the registers of the keeper are such that it unmaps the memory and comes home when it
//! resumes. A thread that runs a script ends in the same way. It reports the end of the script by
//! sending itself a signal that the process ignores: only its tracer sees it.
//!
//! So at any moment one thread is set to unmap the memory. While the memory changes hands, two
//! threads are; if rcriu is killed just then, both unmap it. The second call finds nothing there,
//! since the memory is in the middle of the largest gap, where the kernel places no mapping by
//! itself.
//!
//! If the process ignores no signal, or has no room for scratch memory (`RLIMIT_AS`, `RLIMIT_DATA`,
//! `RLIMIT_MEMLOCK` with `MCL_FUTURE`), rcriu stops the thread at each call instead, and puts the
//! data on the stack. So it does for a process with seccomp filters, which it suspends meanwhile: if
//! rcriu were killed, a list of calls would go on under the filters, which might kill the process.
//! With one call at a time, it can do so only for a call that has just entered the kernel.

use nix::{errno::Errno, libc};
use zerocopy::IntoBytes;

use super::{
    Answers, InjectError, Result, Script,
    home::{Home, Slot, is_returning},
    scratch::{MAP_FLAGS, Scratch, bits, failed_call, no_births},
    tracee::{Sign, Tracee},
};
use crate::{
    arch::{
        Return,
        native::{self as arch, ADDRESSES_END},
    },
    fault::{self, Point},
    proc::{self, Mapping},
    sys::{process::CloneArguments, ptrace::Registers, supervise},
    units::{HostPid, PAGE_SIZE, RemoteAddr},
};

/// Signals that are ignored by default, except `SIGCONT`, which has side effects.
const IGNORED: u64 = 1 << (libc::SIGURG - 1) | 1 << (libc::SIGWINCH - 1) | 1 << (libc::SIGCHLD - 1);

/// Signals that cannot be used even if they are ignored, because sending them has side effects.
const SPECIAL: u64 = 1 << (libc::SIGCONT - 1)
    | 1 << (libc::SIGTSTP - 1)
    | 1 << (libc::SIGTTIN - 1)
    | 1 << (libc::SIGTTOU - 1);

/// `CLONE_CLEAR_SIGHAND` (`linux/sched.h`, Linux 5.5): the child has default signal actions.
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;

/// How much of a gap must stay free on both sides of scratch memory.
const GAP_MARGIN: u64 = 64 << 10;

/// Work in one process.
#[derive(Debug)]
pub struct Session {
    home: Home,
    /// The stack pointer that leads the keeper home.
    stack: Option<RemoteAddr>,
    place: Place,
    /// Whether scratch memory failed because it would have been locked (`MCL_FUTURE`).
    locked: bool,
}

/// Where the data of scripts is.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// In scratch memory; the signal reports the end of a script.
    Scratch(Scratch, i32),
    /// On the stack.
    Stack,
}

/// Calls `work`, in which threads of a stopped process can run scripts, and restores the process
/// afterwards. `in_use` are the stack pointers of threads of other processes that share the
/// memory.
///
/// # Errors
/// Those of `work`, and of restoring the process.
pub fn with_session<T>(
    threads: &mut [Tracee],
    mappings: &[Mapping],
    in_use: &[RemoteAddr],
    table_bytes: usize,
    work: impl FnOnce(&mut Session, &mut [Tracee]) -> Result<T>,
) -> Result<T> {
    let mut session = Session::begin(threads, mappings, in_use, table_bytes)?;
    let result = fault::hit(Point::DumpInjected)
        .map_err(InjectError::from)
        .and_then(|()| work(&mut session, threads));
    let ended = session.end(&mut threads[0]);
    for thread in threads {
        thread.put_back()?;
        thread.resume_filters()?;
    }
    session.home.clear()?;
    ended?;
    result
}

impl Session {
    fn begin(
        threads: &mut [Tracee],
        mappings: &[Mapping],
        in_use: &[RemoteAddr],
        table_bytes: usize,
    ) -> Result<Self> {
        if let Some(thread) = threads.iter().find(|thread| is_returning(thread)) {
            return Err(InjectError::Returning { tid: thread.tid });
        }
        let filtered = suspend_filters(threads)?;
        let mut home = Home::find(threads, mappings, in_use)?;
        let keeper = &mut threads[0];
        let stack = home.prepare(Slot::Keeper, keeper)?;
        let mut session = Self { home, stack, place: Place::Stack, locked: false };
        let signal = choose_signal(threads)?;
        let why = match signal {
            None => Some("it ignores no signal"),
            // Without room on the stack, the thread cannot return by itself anyway.
            Some(_) if filtered && session.home.room().is_some() => Some("it has seccomp filters"),
            Some(_) => None,
        };
        let Some(signal) = signal.filter(|_| why.is_none()) else {
            let why = why.unwrap_or_default();
            log::debug!("{}: {why}, so scripts run call by call", threads[0].tid);
            return Ok(session);
        };
        let page = usize::try_from(PAGE_SIZE).expect("small");
        let scratch = Scratch {
            start: free_place(mappings),
            table_bytes: table_bytes.next_multiple_of(page),
            instruction: session.home.call,
        };
        let keeper = &mut threads[0];
        match session.map(keeper, &scratch, signal) {
            Ok(()) => {}
            Err(InjectError::Call { source, .. }) if is_forbidden(source) => {
                // mmap(2) fails with EAGAIN if it would have to lock the mapping and may not.
                session.locked = source == Errno::EAGAIN;
                log::debug!("{}: no scratch memory can be mapped", keeper.tid);
                supervise::clear_scratch();
                session.place = Place::Stack;
                keeper.put_back()?;
            }
            Err(error) => {
                let _ = session.end(keeper);
                keeper.put_back()?;
                session.home.clear()?;
                return Err(error);
            }
        }
        Ok(session)
    }

    /// Has the keeper map scratch memory, and parks it with the registers that unmap it.
    fn map(&mut self, keeper: &mut Tracee, scratch: &Scratch, signal: i32) -> Result<()> {
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let map = [scratch.start.0, scratch.len(), bits(all), bits(MAP_FLAGS), u64::MAX, 0];
        supervise::note_scratch(keeper.tid, scratch.start, scratch.len());
        self.place = Place::Scratch(*scratch, signal);
        let mask = mask_for(signal);
        let tid = keeper.tid;
        // If rcriu is killed now, the frame leads the keeper from this call to the unmapping one.
        let parked = parked(keeper, scratch, self.stack);
        let stack = match self.stack {
            Some(_) => self.home.detour(Slot::Keeper, &parked, mask)?,
            None => None,
        };
        let result = keeper.call(scratch.instruction, stack, mask, libc::SYS_mmap, map)?;
        let what = "map scratch memory".into();
        result.map_err(|source| InjectError::Call { tid, what, source })?;
        fault::hit(Point::DumpMapped)?;
        self.park(keeper, self.stack)?;
        scratch.load_code(tid)
    }

    /// Sets the registers of a thread so that it unmaps the scratch memory and comes home by the
    /// frame at `stack` when it resumes.
    fn park(&self, thread: &mut Tracee, stack: Option<RemoteAddr>) -> Result<()> {
        let Place::Scratch(scratch, signal) = self.place else { return thread.put_back() };
        thread.set_registers(&parked(thread, &scratch, stack))?;
        thread.block(mask_for(signal))
    }

    /// Unmaps the scratch memory.
    fn end(&mut self, keeper: &mut Tracee) -> Result<()> {
        let Place::Scratch(scratch, signal) = self.place else { return Ok(()) };
        let mask = mask_for(signal);
        let call = unmap(&scratch);
        let tid = keeper.tid;
        let result = keeper.call(scratch.instruction, self.stack, mask, libc::SYS_munmap, call)?;
        self.place = Place::Stack;
        supervise::clear_scratch();
        let what = "unmap scratch memory".into();
        result.map(drop).map_err(|source| InjectError::Call { tid, what, source })
    }

    /// Whether new mappings must be locked (`MCL_FUTURE`), but may not be.
    pub fn is_locked(&self) -> bool {
        self.locked
    }

    /// Before the first script, calls `look` with the address of a page that the process has just
    /// mapped and that was never written; with `None` if it can map none.
    ///
    /// Without scratch memory it maps a page for that, which stays if rcriu and its supervisor are
    /// killed just then. So it does so only if `needed`.
    ///
    /// # Errors
    /// Those of `look`, and of mapping the page.
    pub fn with_new_page<T>(
        &mut self,
        threads: &mut [Tracee],
        mappings: &[Mapping],
        needed: bool,
        look: impl FnOnce(&Self, Option<RemoteAddr>) -> Result<T>,
    ) -> Result<T> {
        let page = match self.place {
            Place::Scratch(scratch, _) => return look(self, Some(scratch.table())),
            Place::Stack if needed && !self.locked => free_place(mappings),
            Place::Stack => return look(self, None),
        };
        let keeper = &mut threads[0];
        let (tid, instruction) = (keeper.tid, self.home.call);
        let failed = |what: &str, source| InjectError::Call { tid, what: what.into(), source };
        let access = bits(libc::PROT_READ | libc::PROT_WRITE);
        let map = [page.0, PAGE_SIZE, access, bits(MAP_FLAGS), u64::MAX, 0];
        supervise::note_scratch(tid, page, PAGE_SIZE);
        let mapped = keeper.call(instruction, self.stack, u64::MAX, libc::SYS_mmap, map)?;
        let looked = match mapped {
            Ok(_) => {
                let looked = look(self, Some(page));
                let unmap = [page.0, PAGE_SIZE, 0, 0, 0, 0];
                let unmapped =
                    keeper.call(instruction, self.stack, u64::MAX, libc::SYS_munmap, unmap)?;
                unmapped.map_err(|source| failed("unmap a page", source))?;
                looked
            }
            Err(source) if is_forbidden(source) => {
                self.locked = source == Errno::EAGAIN;
                look(self, None)
            }
            Err(source) => Err(failed("map a page", source)),
        };
        supervise::clear_scratch();
        keeper.put_back()?;
        looked
    }

    /// Has a thread make the calls of a script, and returns the answers. The first of `threads` is
    /// the keeper.
    ///
    /// # Errors
    /// [`InjectError::Call`] for the first failed call that must succeed;
    /// [`InjectError::TooLong`], [`InjectError::Lost`].
    pub fn run(
        &mut self,
        threads: &mut [Tracee],
        position: usize,
        script: &Script,
    ) -> Result<Answers> {
        self.work(threads, position, script, None)
    }

    /// Like [`Self::run`]; calls `act` with the answers so far when the script pauses.
    pub fn run_paused(
        &mut self,
        threads: &mut [Tracee],
        position: usize,
        script: &Script,
        act: &mut dyn FnMut(&Answers),
    ) -> Result<Answers> {
        self.work(threads, position, script, Some(act))
    }

    /// Has the keeper make a child with a copy of its memory, which `take_over` finds by its pid in the
    /// pid namespace of the process. The child must never run: its stack pointer points nowhere. In its
    /// memory, what the session has overwritten is restored.
    pub(super) fn fork(
        &mut self,
        threads: &mut [Tracee],
        mappings: &[Mapping],
        take_over: impl FnOnce(i32) -> Result<HostPid>,
    ) -> Result<()> {
        // The place of the scratch memory has unmapped memory on both sides.
        let nowhere = free_place(mappings).0 - GAP_MARGIN;
        let arguments = CloneArguments {
            flags: CLONE_CLEAR_SIGHAND | u64::from(libc::CLONE_PTRACE.cast_unsigned()),
            stack: nowhere,
            stack_size: GAP_MARGIN / 2,
            ..CloneArguments::default()
        };
        let (bytes, keeper) = (arguments.as_bytes(), &mut threads[0]);
        let tid = keeper.tid;
        let (address, stack) = match self.place {
            Place::Scratch(scratch, signal) => {
                let address = scratch.table();
                crate::sys::process::write_memory(tid, address, bytes).map_err(|source| {
                    let len = bytes.len() as u64;
                    InjectError::Memory { tid, step: "write", address, len, source }
                })?;
                // If rcriu is killed now, the frame leads the keeper from this call to the unmapping one.
                let parked = parked(keeper, &scratch, self.stack);
                let detour = match self.stack {
                    Some(_) => self.home.detour(Slot::Keeper, &parked, mask_for(signal))?,
                    None => None,
                };
                (address, detour)
            }
            Place::Stack => {
                let (room, _) = self.home.room().ok_or(InjectError::NoRoom { tid })?;
                self.home.lend(room, bytes)?;
                (room, self.stack)
            }
        };
        let call = [address.0, bytes.len() as u64, 0, 0, 0, 0];
        let made = keeper.call(self.home.call, stack, u64::MAX, libc::SYS_clone3, call);
        self.park(keeper, self.stack)?;
        let what = "make a copy of its memory (fork)";
        let number =
            made?.map_err(|source| InjectError::Call { tid, what: what.into(), source })?;
        let copy = take_over(i32::try_from(number).expect("pids are small"))?;
        self.home.restore_in(copy)
    }

    fn work(
        &mut self,
        threads: &mut [Tracee],
        position: usize,
        script: &Script,
        act: Option<&mut dyn FnMut(&Answers)>,
    ) -> Result<Answers> {
        let stack = match position {
            0 => self.stack,
            _ => self.home.prepare(Slot::Worker, &threads[position])?,
        };
        let Place::Scratch(scratch, signal) = self.place else {
            let result = self.step(&mut threads[position], stack, script, act);
            threads[position].put_back()?;
            return result;
        };
        let thread = &threads[position];
        scratch.load(thread.tid, script)?;
        let home = Return {
            signal,
            scratch: scratch.start,
            scratch_bytes: u32::try_from(scratch.len()).expect("small"),
            call: scratch.instruction,
            frame: stack.unwrap_or(RemoteAddr(arch::stack_pointer(&thread.registers))),
        };
        let (code, table) = (scratch.start, scratch.table());
        let registers = arch::enter_and_return(&thread.registers, code, table, home);
        if position == 0 {
            threads[0].set_registers(&registers)?;
            threads[0].block(mask_for(signal))?;
            let result = Self::walk(&mut threads[0], &scratch, signal, script, act);
            self.park(&mut threads[0], self.stack)?;
            return result;
        }
        // The keeper must not unmap code that the other thread executes. So both are set to unmap the
        // memory until one of them is restored.
        self.park(&mut threads[position], stack)?;
        fault::hit(Point::DumpHanded)?;
        threads[0].put_back()?;
        fault::hit(Point::DumpHanded)?;
        threads[position].set_registers(&registers)?;
        let result = Self::walk(&mut threads[position], &scratch, signal, script, act);
        let waits = self.park(&mut threads[position], stack);
        let keeps = self.park(&mut threads[0], self.stack);
        fault::hit(Point::DumpHanded)?;
        waits.and(keeps)?;
        threads[position].put_back()?;
        result
    }

    /// Has a thread walk the loaded table.
    fn walk(
        thread: &mut Tracee,
        scratch: &Scratch,
        signal: i32,
        script: &Script,
        act: Option<&mut dyn FnMut(&Answers)>,
    ) -> Result<Answers> {
        let sign = Sign::Signal { number: signal, told: arch::told(scratch.start) };
        fault::hit(Point::DumpListed)?;
        thread.start()?;
        // After any failure below, still wait for the end: a running thread cannot be restored.
        let fault = fault::hit(Point::DumpWalking);
        if let Some(act) = act {
            let answers = scratch.go_on_paused(thread, sign, script, act);
            fault?;
            return answers;
        }
        thread.join(sign, &mut no_births)?;
        fault?;
        fault::hit(Point::DumpWalked)?;
        scratch.answers(thread.tid, script)
    }

    /// Has a thread make the calls of a script one by one.
    fn step(
        &mut self,
        thread: &mut Tracee,
        stack: Option<RemoteAddr>,
        script: &Script,
        act: Option<&mut dyn FnMut(&Answers)>,
    ) -> Result<Answers> {
        let tid = thread.tid;
        let Some((room, limit)) = self.home.room() else {
            return Err(InjectError::NoRoom { tid });
        };
        let data = script.data(room);
        if data.len() > limit {
            return Err(InjectError::TooLong { tid, bytes: data.len(), limit });
        }
        self.home.lend(room, &data)?;
        let read = || -> Result<Vec<u8>> {
            let mut bytes = data.clone();
            crate::sys::process::read_memory(tid, room, &mut bytes).map_err(|source| {
                let len = bytes.len() as u64;
                InjectError::Memory { tid, step: "read", address: room, len, source }
            })?;
            Ok(bytes)
        };
        let mut act = act;
        let instruction = self.home.call;
        let results = script.walk(
            room,
            |number, arguments| thread.call(instruction, stack, u64::MAX, number, arguments),
            |results| {
                if let Some(act) = &mut act {
                    let so_far = script.conclude(results, read()?);
                    act(&so_far.map_err(|failed| failed_call(tid, script, failed))?);
                }
                Ok(())
            },
        )?;
        script.conclude(&results, read()?).map_err(|failed| failed_call(tid, script, failed))
    }
}

/// Returns the signal mask of a thread that runs a script: all signals but the one that reports
/// the end.
const fn mask_for(signal: i32) -> u64 {
    !(1 << (signal - 1))
}

/// Returns the registers with which a thread unmaps the scratch memory and comes home.
fn parked(thread: &Tracee, scratch: &Scratch, stack: Option<RemoteAddr>) -> Registers {
    thread.registers_to_call(scratch.instruction, stack, libc::SYS_munmap, unmap(scratch))
}

fn unmap(scratch: &Scratch) -> [u64; 6] {
    [scratch.start.0, scratch.len(), 0, 0, 0, 0]
}

/// Whether `mmap(2)` fails like this because a limit is exhausted, or because the process may not
/// execute memory that was writable.
fn is_forbidden(errno: Errno) -> bool {
    matches!(errno, Errno::ENOMEM | Errno::EAGAIN | Errno::EACCES | Errno::EPERM)
}

/// Suspends the seccomp filters of the threads that have any; returns whether there is one.
fn suspend_filters(threads: &mut [Tracee]) -> Result<bool> {
    let mut any = false;
    for thread in threads {
        if thread.status()?.seccomp != 0 {
            thread.suspend_filters()?;
            any = true;
        }
    }
    Ok(any)
}

/// Chooses a signal without effect: the process ignores it, and no thread blocks it, since a thread
/// that waits for it (`sigwait(3)`, `signalfd(2)`) would notice it.
fn choose_signal(threads: &[Tracee]) -> Result<Option<i32>> {
    let status = proc::status(threads[0].tid)?;
    let blocked = threads.iter().fold(0, |blocked, thread| blocked | thread.signal_mask);
    let pending = status.shared_pending | status.sig_pending;
    let ignored = (IGNORED & !status.sig_caught | status.sig_ignored) & !SPECIAL;
    let usable = ignored & !blocked & !pending;
    // Prefer signals that are ignored by default: programs do not react to them.
    let usable = if usable & IGNORED == 0 { usable } else { usable & IGNORED };
    Ok((usable != 0).then(|| u64::BITS - usable.leading_zeros()).map(u32::cast_signed))
}

/// Returns the middle of the largest gap between mappings, where no mapping grows to, and where the
/// kernel places new mappings last.
pub(super) fn free_place(mappings: &[Mapping]) -> RemoteAddr {
    let mut end = GAP_MARGIN;
    let mut best = (0, 0);
    let starts = mappings.iter().map(|mapping| (mapping.start.0, mapping.end.0));
    for (start, next_end) in starts.chain([(ADDRESSES_END, ADDRESSES_END)]) {
        let start = start.min(ADDRESSES_END);
        best = best.max((start.saturating_sub(end), end));
        end = next_end.max(end);
    }
    let (bytes, start) = best;
    RemoteAddr((start + bytes / 2) & !(PAGE_SIZE - 1))
}
