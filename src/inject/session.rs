//! Work in a process that goes on afterwards, as if nothing had happened.
//!
//! Threads of it that have other registers than their own find home by these alone (see
//! `home`), so that the process takes no harm if this program is killed.
//!
//! Scripts are made from scratch memory, which one thread, the keeper, has mapped. While no
//! thread works, the keeper's registers are those with which it unmaps that memory and
//! comes home. A thread that works ends in the same way. It tells that it is through by a
//! signal to itself that the process ignores: only the tracer of the thread sees it.
//!
//! So at each moment some thread is to unmap the memory. While it changes hands, two are:
//! if this program is killed just then, each unmaps it. The second call finds nothing, as
//! the place is in the middle of the largest gap, where the kernel puts no mapping of its
//! own choice.
//!
//! Where there is no such signal, or no room for scratch memory (`RLIMIT_AS`, `RLIMIT_DATA`,
//! `RLIMIT_MEMLOCK` with `MCL_FUTURE`), a thread is stopped at each call instead, with its
//! data on the stack.

use nix::{errno::Errno, libc};

use super::{
    Answers, InjectError, Result, Script,
    home::{Home, Slot, is_abroad},
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
    sys::{ptrace::Registers, supervise},
    units::{PAGE_SIZE, RemoteAddr},
};

/// Signals that a process ignores by default, but for `SIGCONT`, which has effects of its
/// own.
const IGNORED: u64 = 1 << (libc::SIGURG - 1) | 1 << (libc::SIGWINCH - 1) | 1 << (libc::SIGCHLD - 1);

/// Signals that cannot be used: what comes instead of one that is ignored, or has effects
/// of its own when it is sent.
const SPECIAL: u64 = 1 << (libc::SIGCONT - 1)
    | 1 << (libc::SIGTSTP - 1)
    | 1 << (libc::SIGTTIN - 1)
    | 1 << (libc::SIGTTOU - 1);

/// What a gap has to have for scratch memory on both sides.
const GAP_MARGIN: u64 = 64 << 10;

/// Work in one process.
#[derive(Debug)]
pub struct Session {
    home: Home,
    /// Where the keeper's stack pointer has to be.
    stack: Option<RemoteAddr>,
    place: Place,
    /// Whether there is no scratch memory because it would be locked.
    locked: bool,
}

/// Where scripts are made from.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// Scratch memory, with a signal that tells of the end.
    Scratch(Scratch, i32),
    /// Nowhere.
    Stack,
}

/// Lets threads of a stopped process make system calls, and puts everything back. `in_use`
/// are stack pointers of threads of other processes in the same memory.
///
/// # Errors
/// What `work` returns, and whatever keeps the process from being put back.
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
        if let Some(thread) = threads.iter().find(|thread| is_abroad(thread)) {
            return Err(InjectError::Abroad { tid: thread.tid });
        }
        let mut home = Home::find(threads, mappings, in_use)?;
        let keeper = &mut threads[0];
        let stack = home.prepare(Slot::Keeper, keeper)?;
        let mut session = Self { home, stack, place: Place::Stack, locked: false };
        let Some(signal) = choose_signal(threads)? else {
            log::debug!("{}: it ignores no signal, which makes work slower", threads[0].tid);
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
            // What limits allow for is used up, or code that was written is not executed.
            Err(InjectError::Call {
                source: source @ (Errno::ENOMEM | Errno::EAGAIN | Errno::EACCES | Errno::EPERM),
                ..
            }) => {
                // Which is what a mapping that is to be locked fails with.
                session.locked = source == Errno::EAGAIN;
                log::debug!("{}: there is no scratch memory to be had", keeper.tid);
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

    /// Maps scratch memory by the keeper, and has it wait in a state from which it unmaps
    /// it.
    fn map(&mut self, keeper: &mut Tracee, scratch: &Scratch, signal: i32) -> Result<()> {
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let map = [scratch.start.0, scratch.len(), bits(all), bits(MAP_FLAGS), u64::MAX, 0];
        supervise::note_scratch(keeper.tid, scratch.start, scratch.len());
        self.place = Place::Scratch(*scratch, signal);
        let mask = mask_for(signal);
        let tid = keeper.tid;
        // If this program is killed now, the keeper returns from the call to the next one.
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

    /// Gives a thread, whose way home begins at `stack`, the registers with which it unmaps
    /// the scratch memory and goes there.
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

    /// Whether new mappings are to be locked (`MCL_FUTURE`), but may not be.
    pub fn is_locked(&self) -> bool {
        self.locked
    }

    /// Returns the address of a page that was never written, before the first script;
    /// `None` without scratch memory.
    pub fn untouched(&self) -> Option<RemoteAddr> {
        match self.place {
            Place::Scratch(scratch, _) => Some(scratch.table()),
            Place::Stack => None,
        }
    }

    /// Lets a thread make the calls of a script, and returns what came of them. The first
    /// of `threads` is the keeper.
    ///
    /// # Errors
    /// [`InjectError::Call`] for the first call that had to succeed and did not;
    /// [`InjectError::TooLong`], [`InjectError::Lost`].
    pub fn run(
        &mut self,
        threads: &mut [Tracee],
        position: usize,
        script: &Script,
    ) -> Result<Answers> {
        self.work(threads, position, script, None)
    }

    /// As [`Self::run`]; `act` is called when the script pauses, with the answers so far.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_paused(
        &mut self,
        threads: &mut [Tracee],
        position: usize,
        script: &Script,
        act: &mut dyn FnMut(&Answers),
    ) -> Result<Answers> {
        self.work(threads, position, script, Some(act))
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
        // The keeper may not unmap what the other thread executes: both wait to unmap it
        // until one of them is put back.
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

    /// Lets a thread walk the table that is loaded.
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
        // Whatever fails now, it has to come to its end: one that runs cannot be put back.
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

    /// Lets a thread make the calls of a script one by one.
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

/// The signals that a thread blocks while it works: all but the one by which it stops.
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

/// Chooses a signal that has no effect: one that the process ignores, and that no thread
/// blocks, since one that waits for it (`sigwait(3)`, `signalfd(2)`) would notice.
fn choose_signal(threads: &[Tracee]) -> Result<Option<i32>> {
    let status = proc::status(threads[0].tid)?;
    let blocked = threads.iter().fold(0, |blocked, thread| blocked | thread.signal_mask);
    let pending = status.shared_pending | status.sig_pending;
    let ignored = (IGNORED & !status.sig_caught | status.sig_ignored) & !SPECIAL;
    let usable = ignored & !blocked & !pending;
    // Signals that are ignored by default come first: programs expect nothing of them.
    let usable = if usable & IGNORED == 0 { usable } else { usable & IGNORED };
    Ok((usable != 0).then(|| u64::BITS - usable.leading_zeros()).map(u32::cast_signed))
}

/// Returns the middle of the largest gap between mappings, where nothing grows to, and
/// nothing is put soon.
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
